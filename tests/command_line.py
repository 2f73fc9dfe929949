"""Commands run in process: how one ended, and what it left on disk."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
