"""How many trials fit: what is free, less the peak of a row's activations and a margin, over the cost of a slot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from peft_study.engine.engine import Engine
from peft_study.engine.row import Item
from peft_study.engine.trial import Examples
from peft_study.errors import ModelError
from peft_study.methods.base import Adapter
from peft_study.model.load import Base

MARGIN = 0.1
"""Share of the free memory that is left alone."""

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux keeps a container's limits (version 2)."""

_BYTES_A_PARAMETER = 16
"""A float32 value with its gradient and AdamW's two moments."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a probe row showed, in bytes.

    Attributes:
        free: before the row, with the base loaded; None where the system does not say.
        activations: peak that a full row added.
        slot: cost of the dearest adapter in a slot.
        fits: slots by these figures, at least 1; None where `free` is not known.
    """

    free: int | None
    activations: int
    slot: int
    fits: int | None


def slot_bytes(adapter: Adapter) -> int:
    """Returns what a trial of this adapter keeps while it is in a slot."""
    return _BYTES_A_PARAMETER * sum(p.numel() for p in adapter.parameters().values())


def refuse_all_weights(base: Base) -> None:
    """Refuses to train every weight of a base where the memory is known not to hold that.

    Beside the weights in their own precision, which are there and are kept once more, each has a float32 master, a
    gradient and AdamW's two moments.

    Raises:
        ModelError: with what it needs and what is free.
    """
    free = available(base.device)
    weights = list(base.model.parameters())
    needed = sum(p.numel() * (_BYTES_A_PARAMETER + p.element_size()) for p in weights)
    if free is not None and needed > free * (1 - MARGIN):
        raise ModelError(
            f"full fine-tuning needs {needed / 2**30:.1f} GB of memory beside the base, {free / 2**30:.1f} GB are free",
            remedy="leave it out, or use a smaller base",
        )


def probe(engine: Engine, adapters: Sequence[Adapter], examples: Examples) -> Measured:
    """Runs one full row forward and backward with the dearest adapter; a row that does not fit is halved first.

    Args:
        engine: without trials; its `row_tokens` may become smaller.
        adapters: one of each kind that will run beside others.
        examples: training data to fill the row with.
    """
    assert not engine.trials, "the probe has the device to itself"
    dearest = max(adapters, key=slot_bytes)
    free = available(engine.base.device)
    activations = engine.retried(
        lambda: _row_peak(engine, dearest, examples), lambda: dearest.row_tokens + len(examples[0])
    )
    for parameter in dearest.parameters().values():
        parameter.grad = None
    slot = max(1, slot_bytes(dearest))
    fits = None if free is None else max(1, int((free * (1 - MARGIN) - activations) // slot))
    return Measured(free, activations, slot, fits)


def _row_peak(engine: Engine, adapter: Adapter, examples: Examples) -> int:
    items: list[Item] = []
    used = 0
    for number in range(engine.row_tokens):
        item = Item(0, adapter, examples[number % len(examples)])
        if items and (not engine.base.proof.packs or used + item.row_length > engine.row_tokens):
            break
        items.append(item)
        used += item.row_length
    with _peak(engine.base.device) as peak, engine.runner.row(items) as result:
        if result.total.requires_grad:
            result.total.backward()
    return peak[0]


def available(device: torch.device) -> int | None:
    """Returns the bytes that could still be taken on the device: a container's limit counts; None: not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch holds and does not use is free to it
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    free = int(lines["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        free = min(free, int((CGROUP / "memory.max").read_text()) - int((CGROUP / "memory.current").read_text()))
    return free


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Yields a list that holds, after the block, the bytes by which the block's peak was above its beginning."""
    found = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device) - before
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew at what is resident now
    before = resident("VmRSS") or 0
    yield found
    found[0] = max(0, (resident("VmHWM") or 0) - before)


def resident(name: str) -> int | None:
    """Returns a figure of the process in bytes: VmRSS (now) or VmHWM (peak); None where the system has no such file.

    The peak that getrusage tells is, in a child, at least its parent's.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
