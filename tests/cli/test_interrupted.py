"""Ctrl-C while data is read or tokenised: every process of the group gets it, and the user sees one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import conversation

COMMANDS = ("stats", "finetune", "run", "convert", "sample", "init")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns rows that take several seconds to tokenise, and a moment to read."""
    path = tmp_path_factory.mktemp("many") / "rows.jsonl"
    rows: list[dict[str, Any]] = [conversation(i) for i in range(20_000)]
    for row in rows:
        row["messages"][0]["content"] += " word" * 400
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(name: str, data: Path, model: Path, folder: Path) -> list[object]:
    study = folder / "study.yaml"
    study.write_text(
        yaml.safe_dump(
            {
                "model": {"name": str(model)},
                "data": {"train": str(data)},
                "methods": {"lora": {}},
                "output": str(folder / "out"),
            }
        )
    )
    return {
        # -q: a slow machine would print its progress on stderr
        "stats": ["-q", "data", "stats", data, "--model", model],
        "finetune": [
            *("finetune", "--model_name_or_path", model, "--train_file", data, "--use_lora"),
            *("--output_dir", folder / "out"),
        ],
        "run": ["run", study],
        "convert": ["-q", "data", "convert", *[data] * 40, "-o", folder / "converted.jsonl"],
        "sample": ["-q", "data", "sample", *[data] * 40, "--sizes", 1000, "-o", folder / "samples"],
        "init": ["-q", "init", "--model", model, "--data", data, "-o", folder / "made.yaml"],
    }[name]


def reads(process: int, data: Path) -> bool:
    """Returns whether a process has the file open, which it was not given by its parent."""
    try:
        links = list(Path(f"/proc/{process}/fd").iterdir())
        return any(link.readlink() == data for link in links)
    except OSError:
        return False


def until(sign: Callable[[], bool], ended: Callable[[], bool]) -> None:
    """Waits for a sign, at most a minute."""
    end = time.monotonic() + 60
    while not sign():
        assert not ended(), "the command ended before it could be stopped"
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("name", COMMANDS)
def test_one_line_and_nothing_left(name: str, many: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    words = command(name, many, tiny_model_folder, tmp_path)
    before, cache = sorted(tmp_path.iterdir()), tmp_path.parent / f"{tmp_path.name}-cache"
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_study", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, as a terminal gives each command
        env={**os.environ, "PEFT_STUDY_CACHE": str(cache)},
    )
    try:
        tokenising = name in ("stats", "finetune", "run")
        temporary = cache / "tokens"
        until(
            lambda: any(temporary.glob(".*")) if tokenising else reads(process.pid, many),
            lambda: process.poll() is not None,
        )
        if tokenising:
            time.sleep(1.0)  # the processes that tokenise have begun
        os.killpg(process.pid, signal.SIGINT)
        started = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - started < 20, "it went on tokenising"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert (process.returncode, err) == (130, "stopped\n")
    assert sorted(tmp_path.iterdir()) == before
    assert not any(temporary.glob("*"))
