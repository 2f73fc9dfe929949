"""Every target by name, with what was measured: results/*.jsonl -> results/summary.json.

    python benchmarks/summary.py

The newest rows count. A target without rows stands there with value null; so does a comparison whose peers did not
see the same tokens or compute the same loss.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import arguments, read_rows

Row = dict[str, Any]
Found = tuple[float, Row] | None
Files = dict[str, list[Row]]

NO_GPU = "not measured: needs a GPU (gpu.sh)"
NOT_YET = "not measured"
EMBEDDED = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class Target:
    """One thing that was asked for.

    Attributes:
        name: unique.
        target: the number to reach; None where only the measurement was asked for.
        unit: of value and target.
        find: gives the newest value and the row it is from.
        at_most: True where less is better.
        gpu: True where it needs one.
    """

    name: str
    target: float | None
    unit: str
    find: Callable[[Files], Found]
    at_most: bool = False
    gpu: bool = False

    def entry(self, files: Files) -> Row:
        """Returns the target's entry of the summary."""
        found = self.find(files)
        head = {"name": self.name, "value": None, "target": self.target, "unit": self.unit, "met": None}
        if found is None:
            note = NO_GPU if self.gpu else NOT_YET
            return {**head, "machine": None, "date": None, "command": None, "note": note}
        value, row = found
        if self.target is not None:
            head["met"] = value <= self.target if self.at_most else value >= self.target
        facts = {key: row[key] for key in ("machine", "date", "command", "commit", "packages")}
        return {**head, "value": value, **facts}


def newest(rows: list[Row], **wanted: Any) -> Row | None:
    """Returns the last row with these entries."""
    return next((row for row in reversed(rows) if all(row.get(key) == value for key, value in wanted.items())), None)


def against(peer: str, method: str, device: str, model: str) -> Callable[[Files], Found]:
    """Returns how to find our speed divided by a peer's, of one run."""

    def find(files: Files) -> Found:
        rows = files.get("one_trial", [])
        which = {"row": "median", "method": method, "device": device, "model": model}
        theirs = newest(rows, **which, peer=peer, same_tokens=True, same_loss=True)
        if theirs is None:
            return None
        ours = newest(rows, **which, peer="ours", date=theirs["date"], command=theirs["command"])
        if ours is None:
            return None
        return round(ours["tokens_per_second"] / theirs["tokens_per_second"], 2), theirs

    return find


def entry_of(file: str, key: str, **wanted: Any) -> Callable[[Files], Found]:
    """Returns how to find one entry of the newest row of a file."""

    def find(files: Files) -> Found:
        row = newest(files.get(file, []), **wanted)
        return None if row is None or row.get(key) is None else (row[key], row)

    return find


def seconds_to_first_step(kind: str) -> Callable[[Files], Found]:
    """Returns how to find the median time to the first step of the newest run."""

    def find(files: Files) -> Found:
        rows = files.get("startup", [])
        last = newest(rows, row="first step", kind=kind, model=EMBEDDED)
        if last is None:
            return None
        same = [r for r in rows if r.get("kind") == kind and r["date"] == last["date"]]
        times = sorted(r["seconds"]["in all"] for r in same)
        return times[len(times) // 2], last

    return find


def growth(axis: str, device: str, model: str) -> Callable[[Files], Found]:
    """Returns how to find the time per token at the largest value of an axis divided by that at the smallest."""

    def find(files: Files) -> Found:
        last = newest(files.get("growth", []), axis=axis, device=device, model=model)
        if last is None:
            return None
        same = [r for r in files["growth"] if r["axis"] == axis and r["date"] == last["date"] and r["model"] == model]
        low, high = (edge(same, key=lambda r: r[axis]) for edge in (min, max))
        return round(high["ms_per_token"] / low["ms_per_token"], 2), last

    return find


def targets() -> list[Target]:
    """Returns everything that was asked for."""
    times, cpu, gpu = "times as fast", ("cpu", EMBEDDED), ("cuda", "llama-1b")
    found = []
    for method in ("lora", "prefix_tuning", "prompt_tuning"):
        found += [
            Target(f"cpu: {method} against TRL's defaults", 5.0, times, against("trl_default", method, *cpu)),
            Target(f"cpu: {method} against TRL's best", 3.0, times, against("trl_best", method, *cpu)),
            Target(f"cpu: {method} against peft in a plain loop", None, times, against("peft_loop", method, *cpu)),
        ]
    fused = {"part": "speed", "row": "median"}
    eight = {"model": EMBEDDED, "device": "cpu", "trials": 8, "step_tokens": 128}
    find = entry_of("many_trials", "ratio", **fused, **eight, variant="equal")
    found.append(Target("cpu: 8 LoRA trials fused against one after another", 1.0, times, find))
    share = entry_of("many_trials", "share", part="memory", row="memory", **eight)
    found.append(
        Target("cpu: memory of 8 trials against 8 processes", None, "of the processes' peak memory", share, True)
    )
    share = entry_of(
        "one_trial", "share_of_ceiling", row="median", peer="ours", method="lora", device=gpu[0], model=gpu[1]
    )
    found += [
        Target("gpu: one LoRA trial, rows of 8k tokens", 0.55, "of the matrix ceiling", share, gpu=True),
        Target("gpu: lora against TRL's defaults", 2.0, times, against("trl_default", "lora", *gpu), gpu=True),
        Target("gpu: lora against TRL's best", 2.0, times, against("trl_best", "lora", *gpu), gpu=True),
    ]
    sixteen = {"model": "llama-1b", "device": "cuda", "trials": 16, "step_tokens": 512}
    for variant, name, goal in (
        ("equal", "16 equal LoRA trials", 6.0),
        ("unequal", "16 LoRA trials of very different ranks and batches", 1.0),
        ("mixed", "16 trials of mixed methods", 1.0),
    ):
        find = entry_of("many_trials", "ratio", **fused, **sixteen, variant=variant)
        found.append(Target(f"gpu: {name}, fused against one after another", goal, times, find, gpu=True))
    for model in ("llama-1b", "llama-8b"):
        find = entry_of("many_trials", "slots", part="slots", row="most", model=model, device="cuda")
        found.append(Target(f"gpu: slots that fit in memory, {model}", None, "LoRA trials", find, gpu=True))
    for axis in ("slots", "rank", "row", "length"):
        find = growth(axis, *cpu)
        found.append(Target(f"cpu: growth with {axis}", None, "time per token, largest / smallest", find, True))
    found += search_targets(times)
    for count, name, goal in ((8, "8 adapters", 1.5), (1, "one adapter", 0.95)):
        find = entry_of("answers", "ratio", row="answers", adapters=count)
        found.append(Target(f"answers: {name} against PEFT's generate at its best batch", goal, times, find))
    help_time = entry_of("startup", "seconds", row="help", model=EMBEDDED)
    found += [
        Target("start-up: peft-study --help", 0.3, "seconds", help_time, True),
        Target("start-up: first step, empty cache", None, "seconds", seconds_to_first_step("cache empty"), True),
        Target("start-up: first step, full cache", None, "seconds", seconds_to_first_step("cache full"), True),
    ]
    return found


def search_targets(unit: str) -> list[Target]:
    """Returns how much sooner our search recommends a setting within 2 % of the grid's best for good than its peers."""
    found = []
    for against, peer, goal in (
        ("a default", "one TRL run after another, TRL's defaults", 10.0),
        ("a best", "one TRL run after another, TRL's best", 5.0),
        ("b default", "Ray Tune's ASHA over TRL runs, TRL's defaults", 4.0),
        ("b best", "Ray Tune's ASHA over TRL runs, TRL's best", 4.0),
        ("c", "our engine, one trial after another", 4.0),
    ):
        for system, share in {"d": 1.0, "d, no prior": 0.5}.items():
            name = f"search: ours{system.removeprefix('d')} against {peer}"
            where = {
                "row": "factor",
                "unit": "seconds",
                "system": system,
                "against": against,
                "rule": "highest",
                "model": EMBEDDED,
                "data": "mawps",
                "method": "lora",
                "slots": 1,
            }
            found.append(Target(name, share * goal, unit, entry_of("search", "stays", **where)))
    return found


def summarise(folder: Path) -> list[Row]:
    """Returns the entry of every target, from the rows in a folder."""
    files = {path.stem: read_rows(path) for path in sorted(folder.glob("*.jsonl"))}
    return [target.entry(files) for target in targets()]


def main(words: list[str] | None = None) -> None:
    """Writes summary.json and prints a line a target."""
    options = arguments(__doc__, "summary").parse_args(sys.argv[1:] if words is None else words)
    entries = summarise(options.out)
    (options.out / "summary.json").write_text(json.dumps(entries, indent=1) + "\n")
    for entry in entries:
        met = {True: "met", False: "missed", None: "open"}[entry["met"]]
        goal = "" if entry["target"] is None else f" (target {entry['target']:g}: {met})"
        print(f"{entry['name']}: {entry['note'] if entry['value'] is None else entry['value']}{goal}")


if __name__ == "__main__":
    main()
