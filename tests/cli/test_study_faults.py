"""Faults in the middle of a study: a full disk, a damaged file. Nothing is lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from command_line import CommandLine, dev_losses, largest_file
from peft_study.storage.files import output_error
from peft_study.storage.journal import Journal
from peft_study.storage.metrics import MetricsWriter


@pytest.fixture
def study(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Path:
    values: dict[str, Any] = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tiny_data), "held_out": 8, "test": 8, "max_length": 64},
        "training": {"steps": 9, "batch_size": 4},
        "budget": {"trials": 3},
        "methods": {"lora": {"rank": 4}, "prompt_tuning": {"tokens": 3}},
        "finals": {"best": 1, "seeds": 2},
        "logging": {"tensorboard": False},
        "slots": 2,
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def same_as_uninterrupted(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    cli("run", study).ok()
    cli("run", study, "-o", tmp_path / "whole").ok()
    assert dev_losses(tmp_path / "out") == dev_losses(tmp_path / "whole")


def test_a_disk_that_takes_no_more(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    with largest_file(8_000):
        line = cli("run", study).error()
    assert str(tmp_path / "out") in line
    assert (tmp_path / "out" / "status.json").exists()
    same_as_uninterrupted(cli, study, tmp_path)


@pytest.mark.parametrize("moment", [3, 11, 24])
def test_a_journal_that_cannot_be_written(
    cli: CommandLine, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    calls = 0

    def append(self: Journal, events: Any, *, real: Any = Journal.append) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            with self._path.open("ab") as file:
                file.write(b'{"event":"mea')  # half a line, as a disk that fills up leaves it
            self._torn = True
            raise output_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), self._path)
        real(self, events)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", append)
        assert "journal.jsonl: the disk is full; free some space" in cli("run", study).error()
    same_as_uninterrupted(cli, study, tmp_path)


def test_metrics_that_cannot_be_written(
    cli: CommandLine, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def write(self: MetricsWriter, event: str, step: int, *, real: Any = MetricsWriter.write, **values: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise output_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), self._path)
        real(self, event, step, **values)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsWriter, "write", write)
        assert "the disk is full" in cli("run", study).error()
    same_as_uninterrupted(cli, study, tmp_path)


def test_a_damaged_optuna_db_is_a_line_and_comes_back(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    cli("run", study).ok()
    path = tmp_path / "out" / "optuna.db"
    before = {name: trials_in(path, name) for name in ("lora", "prompt_tuning")}
    assert [len(trials) for trials in before.values()] == [3, 3]
    path.write_bytes(b"no database" * 100)
    assert "optuna.db: cannot be written" in cli("run", study).ok().out
    path.unlink()
    cli("run", study).ok()
    assert {name: trials_in(path, name) for name in before} == before


def trials_in(path: Path, name: str) -> list[Any]:
    trials = optuna.load_study(study_name=name, storage=f"sqlite:///{path}").trials
    return [(trial.user_attrs["name"], trial.state, trial.value, trial.params) for trial in trials]


def test_a_damaged_journal_is_one_line(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    cli("run", study).ok()
    path = tmp_path / "out" / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], '{"event": "mea\n', *lines[4:]]))
    assert "journal.jsonl: line 4 is damaged" in cli("run", study).error()


def test_a_folder_that_holds_something_else(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "holds files that are no run" in cli("run", study).error()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
