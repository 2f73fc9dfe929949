"""Commands run in process: how one ended, and what it left on disk."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


def conversation(number: int) -> dict[str, Any]:
    """Returns one row in Tulu's form."""
    left, right = number, (7 * number) % 11
    return {
        "id": f"sum-{number}",
        "messages": [
            {"role": "user", "content": f"{left}+{right}"},
            {"role": "assistant", "content": f"The answer is {left + right}."},
        ],
        "source": "sums",
    }


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """Returns the one line of a user's error, after checking that it is one."""
        lines = self.err.splitlines()
        assert self.code == 2, (self.code, self.out, self.err)
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        assert "Traceback" not in self.out + self.err
        return lines[0]

    def ok(self) -> Ran:
        """Returns itself, after checking that the command ended well."""
        assert self.code == 0, (self.code, self.out, self.err)
        return self


CommandLine = Callable[..., Ran]


def listing(folder: Path) -> dict[str, int]:
    """Returns every path below a folder with its size."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def dev_losses(study: Path) -> dict[str, list[float]]:
    """Returns the summed dev losses of each example after the last step, of every trial of a study that finished."""
    last: dict[str, list[float]] = {}
    finished = set()
    for line in (study / "journal.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "measured":
            last[event["name"]] = event["sums"]
        elif event["event"] == "ended" and event["status"] == "finished":
            finished.add(event["name"])
    return {name: sums for name, sums in last.items() if name in finished}


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Lets this process write no file beyond `size` bytes: the system refuses, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def study_file(folder: Path, model: Path, data: Path, *, steps: int = 9, out: str = "out") -> Path:
    """Writes the file of a small study of two methods, and returns its path."""
    values: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(data), "held_out": 8, "max_length": 64},
        "training": {"steps": steps, "batch_size": 5, "row_tokens": 130},
        "methods": {
            "lora": {"rank": 2, "dropout": 0.2, "learning_rate": [1e-3, 1e-2]},
            "prefix_tuning": {"tokens": 4, "learning_rate": [0.1, 0.3]},
        },
        "finals": {"best": 1, "seeds": 2},
        "search": {"pruner": "none"},
        "logging": {"checkpoint_every": 3},
        "slots": 3,
        "output": str(folder / out),
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
