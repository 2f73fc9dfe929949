"""What the tests of `peft-study evaluate` share: rows of two tasks, words of the command, and its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

METHODS = ("lora", "prefix_tuning", "prompt_tuning")
SUMS = [{"id": f"s{n}", "q": f"{n}+{n}", "answer": str(2 * n)} for n in range(5)] + [{"id": "none", "q": "1+2"}]
CHOICES = [{"id": f"c{n}", "q": f"{n}+1", "c": [str(n), str(n + 1), "a word"], "answer": "B"} for n in range(4)]


def words(tasks: list[Path], out: Path) -> list[Any]:
    return [*(word for task in tasks for word in ("--tasks", task)), "-o", out, "--dtype", "float32"]


def rows_of(out: Path, task: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(out / f"{task}.parquet").to_pylist()
    return found
