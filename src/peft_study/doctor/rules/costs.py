"""What a run takes: memory and time."""

from __future__ import annotations

from peft_study.doctor.diagnosis import Problem, Said
from peft_study.doctor.observations import Observations
from peft_study.doctor.rule import rule
from peft_study.statistics import duration

MARGIN = 0.1
"""Share of the free memory that is left alone."""


@rule(
    "settings",
    looks_at="memory that the run is expected to take beside the base, and what is free",
    threshold="more than 90 % of what is free: an error",
    source="float32 values, gradients and AdamW's moments: 16 bytes a number, and a row's activations",
    false_alarms="memory that another process is about to give back",
    needs=("settings.memory_bytes", "settings.free_bytes"),
)
def memory(seen: Observations) -> Problem | None:
    """Whether the run fits into memory; a note with the figures where it does."""
    who = seen.settings.method or "the run"
    need, free = seen.settings.memory_bytes or 0, seen.settings.free_bytes or 0
    fits = need <= free * (1 - MARGIN)
    return Problem(
        level="note" if fits else "error",
        sure="likely",
        cause=Said("memory expected" if fits else "it does not fit into memory", "预计内存" if fits else "内存放不下"),
        evidence=Said(
            f"{who} needs {need / 2**30:,.1f} GB of memory beside the base, {free / 2**30:,.1f} GB are free",
            f"除基座外，{who} 需要 {need / 2**30:,.1f} GB 内存，可用 {free / 2**30:,.1f} GB",
        ),
        consequence=Said("" if fits else "training ends in out of memory", "" if fits else "训练会因内存不足而中断"),
        change=Said(
            "" if fits else "take a smaller adapter or base, a lower max_length, or set gradient_checkpointing",
            "" if fits else "换用更小的适配器或基座，降低 max_length，或启用 gradient_checkpointing",
        ),
        values={"bytes": need, "free": free},
    )


@rule(
    "settings",
    looks_at="the time that the run is expected to take",
    threshold="none: a note with the figure",
    source="a few measured steps",
    false_alarms="none: it is a note",
    needs=("settings.seconds",),
)
def time(seen: Observations) -> Problem | None:
    """How long the run is expected to take."""
    seconds = seen.settings.seconds or 0.0
    return Problem(
        level="note",
        sure="likely",
        cause=Said("time expected", "预计时间"),
        evidence=Said(f"about {duration(seconds)}", f"约 {duration(seconds)}"),
        consequence=Said("", ""),
        change=Said("", ""),
        values={"seconds": seconds},
    )
