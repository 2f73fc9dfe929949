"""What the doctor says of runs that others recorded: 63 curves of peft's method comparison, and 30 of our soft prompts.

    python benchmarks/doctor/recorded.py [--folder ../shared/references/recorded] [--lines]

peft's runs (Llama-3.2-3B on MetaMathQA, a point every 250 steps) count as never learned where they end at 0.5 % right
answers or less: of those the doctor should say so, and of all others it should be silent. `--lines` prints what
it says of each.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from peft_study.doctor.diagnosis import Diagnosis
from peft_study.doctor.observations import LossCurve, Observations, UsedSettings
from peft_study.doctor.readers.adapter_config import method_settings
from peft_study.doctor.rule import examine

RECORDED = Path(__file__).resolve().parents[3] / "shared" / "references" / "recorded"
NEVER_LEARNED = 0.005
"""Share of right answers at the end at which a run has learned nothing."""
NOTHING = ("never_learned", "too_cold", "rate_too_low")
"""Checks that say so."""
WARMUP = 0.1
"""Share of the steps over which the comparison's script warms up."""


def peft_runs(folder: Path) -> dict[str, tuple[Observations, float]]:
    """Returns what is known of each run of the method comparison, and its share of right answers at the end."""
    found = {}
    with gzip.open(folder / "peft-method-comparison-runs.jsonl.gz", "rt") as file:
        runs = [run for run in map(json.loads, file) if "/MetaMathQA/" in run["file"]]
    for run in runs:
        *points, last = run["metrics"]
        found[run["experiment"]] = (_of_peft_run(run, points), last["test accuracy"])
    return found


def _of_peft_run(run: dict[str, Any], points: list[dict[str, Any]]) -> Observations:
    train, config = run["train_config"], run["peft_config"]
    steps = np.array([float(point["step"]) for point in points])
    settings = UsedSettings(
        **{"method": "full", **(method_settings(config) if config else {})},
        learning_rate=train["optimizer_kwargs"].get("lr"),
        optimizer=train["optimizer_type"].lower(),
        schedule=train["lr_scheduler"],
        warmup_steps=int(WARMUP * train["max_steps"]),
        total_steps=train["max_steps"],
        batch_size=train["batch_size"],
        accumulation=1,
        clip_norm=train["grad_norm_clip"],
        weight_decay=train["optimizer_kwargs"].get("weight_decay"),
        compute_dtype=train["dtype"],
    )
    curve = LossCurve(
        steps=steps,
        loss=np.array([point["train loss"] for point in points]),
        window=train["eval_steps"],
        accuracy_steps=steps,
        accuracy=np.array([point["valid accuracy"] for point in points]),
    )
    return Observations(stage="after", steps_done=train["max_steps"], settings=settings, curve=curve)


def soft_prompts(folder: Path) -> dict[str, Observations]:
    """Returns what is known of each of our recorded trials of soft prompts and prefixes."""
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    with (folder / "soft-prompt-curves-2026-11-25.csv").open() as file:
        for row in csv.DictReader(file):
            rows[row["trial"]].append(row)
    base = float(rows.pop("none")[0]["loss"])
    return {trial: _of_trial(those, base) for trial, those in rows.items()}


def _of_trial(rows: list[dict[str, str]], base: float) -> Observations:
    train, held_out = ([row for row in rows if row["event"] == event] for event in ("train", "held_out"))
    first, steps = rows[0], np.array([float(row["step"]) for row in train])
    losses = np.array([float(row["loss"]) for row in held_out])
    settings = UsedSettings(
        method=first["method"],
        learning_rate=float(first["learning_rate"]),
        tokens=int(first["tokens"]),
        init="text",
        total_steps=36,
        batch_size=4,
    )
    curve = LossCurve(
        steps=steps,
        loss=np.array([float(row["loss"]) for row in train]),
        held_out_steps=np.array([float(row["step"]) for row in held_out]),
        held_out_loss=losses,
        held_out_minus_base=losses - base,
        base_loss=base,
        start_loss=float(losses[0]) if held_out[0]["step"] == "0" else None,
    )
    return Observations(stage="after", steps_done=int(steps[-1]), settings=settings, curve=curve)


def said(diagnosis: Diagnosis) -> str:
    """Returns the checks that found something, notes in brackets."""
    names = [p.check if p.level != "note" else f"({p.check})" for p in diagnosis.problems]
    return ", ".join(names) or "silent"


def about_peft(folder: Path, *, lines: bool) -> None:
    """Prints what the doctor says of the method comparison, and counts hits and false alarms."""
    counts: Counter[str] = Counter()
    missed, alarms = [], []
    for name, (seen, accuracy) in sorted(peft_runs(folder).items(), key=lambda item: item[1][1]):
        diagnosis = examine(seen)
        worst = [p.check for p in diagnosis.problems if p.level != "note"]
        never = accuracy <= NEVER_LEARNED
        counts["never learned"] += never
        counts["hits"] += never and bool(worst) and worst[0] in NOTHING
        counts["others silent"] += not never and not worst
        missed += [name] if never and not worst else []
        alarms += [f"{name}: {', '.join(worst)} (ends at {accuracy:.1%})"] if worst and not never else []
        if lines or worst or never:
            assert seen.curve is not None
            loss = seen.curve.loss
            print(
                f"{name:58} {seen.settings.learning_rate or 0:8.0e} loss {loss[0]:.3f} to {loss[-1]:.3f} "
                f"accuracy {accuracy:6.1%}  {said(diagnosis)}"
            )
    runs = counts["never learned"] + counts["others silent"] + len(alarms)
    print(f"\n{runs} runs; {counts['never learned']} never learned, told of {counts['hits']} of them")
    print(f"of the {runs - counts['never learned']} others {counts['others silent']} silent; alarms:")
    print("\n".join(f"  {alarm}" for alarm in alarms) or "  none")
    print("missed: " + (", ".join(missed) or "none"))


def about_soft_prompts(folder: Path) -> None:
    """Prints what the doctor says of our recorded trials."""
    for name, seen in sorted(
        soft_prompts(folder).items(),
        key=lambda item: (item[1].settings.method, item[1].settings.tokens, item[1].settings.learning_rate),
    ):
        curve, settings = seen.curve, seen.settings
        assert curve is not None
        assert curve.held_out_loss is not None
        first, high, last = curve.loss[0], curve.loss.max(), curve.loss[-1]
        print(
            f"{name:20} {settings.tokens:3} tokens at {settings.learning_rate:<7g} batches {first:.2f}, "
            f"highest {high:.2f}, last {last:.2f}; held out {curve.held_out_loss[0]:.2f} to "
            f"{curve.held_out_loss[-1]:.2f}  {said(examine(seen))}"
        )


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RECORDED)
    parser.add_argument("--lines", action="store_true", help="a line for each of the 63, not only for those of note")
    options = parser.parse_args()
    about_peft(options.folder, lines=options.lines)
    print()
    about_soft_prompts(options.folder)


if __name__ == "__main__":
    main()
