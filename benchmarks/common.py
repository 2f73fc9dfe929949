"""What all benchmarks share: rows of results, facts of the machine, a stopwatch, the matrix ceiling."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peft_study.storage.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared"
PACKAGES = ("peft-study", "torch", "transformers", "peft", "trl", "accelerate", "liger-kernel", "ray")
LONG = ("settings", "sums", "start", "counts", "lengths", "values")
"""Entries of a row that are not printed."""


def arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that every benchmark has.

    Args:
        description: the module's docstring.
        name: of the benchmark and of its file of rows.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.set_defaults(name=name)
    return parser


class Rows:
    """Prints rows and appends them to OUT/NAME.jsonl as they come, so that a killed run keeps what it measured.

    Args:
        options: what `arguments` parsed.
        facts: what every row of this run says beside machine, date and command.
    """

    def __init__(self, options: argparse.Namespace, **facts: Any) -> None:
        self.path = options.out / f"{options.name}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._facts = {**facts, **machine()}

    def add(self, **row: Any) -> dict[str, Any]:
        """Writes one row and returns it."""
        whole = {**row, **self._facts}
        with self.path.open("a") as file:
            file.write(json.dumps(whole) + "\n")
        print(json.dumps({key: value for key, value in row.items() if key not in LONG}), flush=True)
        return whole


def machine() -> dict[str, Any]:
    """Returns machine, versions, date, commit and command of this process."""
    from importlib.metadata import PackageNotFoundError, version

    found = environment()
    hardware: Any = found["machine"]
    code: Any = found["code"] or {}
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    # the script by its place in the repository and no folder of rows: no path of this machine is written down
    script, words = Path(sys.argv[0]), sys.argv[1:]
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    script_name = f"benchmarks/{script.name}" if script.parent.name == "benchmarks" else script.name
    return {
        "machine": hardware["gpu"] or f"{hardware['processor']}, {hardware['cores']} cores",
        "threads": hardware["threads"],
        "python": found["python"],
        "packages": packages,
        "date": found["date"],
        "commit": code.get("commit"),
        "commit_changed": code.get("changed"),
        "command": " ".join(["python", script_name, *words]),
    }


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Returns how long `work` takes, the device's part included."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def median(values: list[float], digits: int = 1) -> float:
    """Returns the rounded median."""
    return round(statistics.median(values), digits)


def ceiling(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Returns the FLOP/s of a square matrix product, median of 10 after three to warm up."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    taken = [seconds(lambda: a @ b, device) for _ in range(13)]
    return 2 * size**3 / statistics.median(taken[3:])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file; none where it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
