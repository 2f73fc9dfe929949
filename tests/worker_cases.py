"""Studies that several workers run: how they are started, killed and compared."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import parquet

import peft_study
from peft_study.storage import journal
from peft_study.storage.metrics import read
from peft_study.storage.run_dir import RunFolder

PROGRAM = (sys.executable, "-c", "from peft_study.cli import main; main()")
PATIENCE = 240.0
"""Seconds after which something that did not happen will not; a busy machine is no failure."""
SOURCE = str(Path(peft_study.__file__).parents[1])


def write_study(folder: Path, model: Path, data: Path, **changed: Any) -> Path:
    """Writes a study of three methods side by side and one that must be alone, without pruning."""
    values: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(data), "held_out": 8, "max_length": 64},
        "training": {"steps": 6, "batch_size": 5, "row_tokens": 130},
        "budget": {"trials": 3},
        "search": {"sampler": "quasi_random", "pruner": "none", "range_test": False},
        "finals": {"best": 1, "seeds": 2},
        "methods": {
            "lora": {"rank": [2, 4], "dropout": 0.2},
            "prefix_tuning": {"tokens": 4},
            "prompt_tuning": {"tokens": 17},
            "full": {"learning_rate": [1e-4, 1e-3]},
        },
        "logging": {"tensorboard": False, "checkpoint_every": 1},
        "slots": 2,
        "output": str(folder / "out"),
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**values, **changed}))
    return path


def start(words: Sequence[object], log: Path) -> subprocess.Popen[bytes]:
    """Starts the program in a process of its own, and a session of its own as a terminal gives it."""
    paths = os.pathsep.join(filter(None, (SOURCE, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with log.open("ab") as file:
        command = [*PROGRAM, *map(str, words)]
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


def workers_of(process: int) -> list[int]:
    """Returns the processes that a scheduler has started as workers, the first one first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == process and b"peft_study.workers.worker_process" in command:
            found.append(int(folder.name))
    return sorted(found)


def until(happened: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> Any:
    """Waits until something is true, and returns it; the process must not end before."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := happened():
            return found
        assert process is None or process.poll() is None, f"ended with {process and process.returncode}"
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def alive(process: int) -> bool:
    """True for a process that runs; one that nobody has waited for does not."""
    try:
        state = (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def steps(out: Path, trials: str = "*") -> int:
    """Returns the optimizer steps that are written down, of all trials."""
    return sum(
        record["event"] == "train" for path in out.glob(f"trials/{trials}/metrics.jsonl") for record in read(path)
    )


def table(out: Path) -> dict[str, dict[str, Any]]:
    """Returns what must be the same whoever ran the study: each trial with its settings, losses and verdict."""
    rows = parquet.read_table(out / "results.parquet").to_pylist()
    return {row["name"]: {k: v for k, v in row.items() if k != "seconds"} for row in rows}


def same(out: Path, whole: Path, *, rel: float = 1e-3) -> None:
    """Checks a study against one that a single worker ran: the same trials, each once, with the same numbers."""
    ours, theirs = table(out), table(whole)
    assert ours.keys() == theirs.keys()
    for name, row in theirs.items():
        for key, value in row.items():
            expected = pytest.approx(value, rel=rel, abs=rel) if isinstance(value, float) else value
            assert ours[name][key] == expected, (name, key)
    each_once(out)
    (found, expected) = (RunFolder(path).read("results.json") for path in (out, whole))
    assert [f["method"] for f in found["finalists"]] == [f["method"] for f in expected["finalists"]]
    assert RunFolder(out).status() == ("finished", None)


def each_once(out: Path) -> None:
    """Checks that no trial was lost, and none begun, measured or ended twice."""
    events = journal.read(out / "journal.jsonl")
    for kind in ("asked", "measured", "ended"):
        counts = Counter((e["name"], e.get("step")) for e in events if e["event"] == kind)
        assert counts, kind
        assert set(counts.values()) == {1}, kind
    asked, ended = ({e["name"] for e in events if e["event"] == kind} for kind in ("asked", "ended"))
    assert asked == ended
    for name in asked:  # steps follow each other without gap: what a dead worker wrote after its cut is gone
        written = [r["step"] for r in read(out / "trials" / name / "metrics.jsonl") if r["event"] == "train"]
        assert written == list(range(1, len(written) + 1)), name


def resumed(said: str) -> dict[str, int]:
    """Returns trial -> the step that it went on from."""
    return {name: int(step) for name, step in re.findall(r"^(\S+): resumes at step (\d+) of", said, re.M)}


def kill(process: int) -> None:
    """Kills as `kill -9` does."""
    os.kill(process, signal.SIGKILL)
