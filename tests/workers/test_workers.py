"""Several workers: the same study whoever runs it, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from command_line import CommandLine
from peft_study.config import ModelConfig
from peft_study.engine import checkpoint, memory
from peft_study.storage import journal
from peft_study.storage.run_dir import RunFolder
from peft_study.workers.subprocesses import ProcessLink, SubprocessLauncher
from worker_cases import alive, each_once, kill, resumed, same, start, steps, table, until, workers_of, write_study

LONG = {
    "training": {"steps": 60, "batch_size": 5, "row_tokens": 130},
    "budget": {"trials": 2},
    "finals": {"best": 1, "seeds": 1},
    "methods": {"lora": {"rank": [2, 4], "dropout": 0.2}, "prompt_tuning": {"tokens": 17}},
    "logging": {"tensorboard": False, "checkpoint_every": 5, "evaluate_every": 3},
}
"""Few trials with many steps, so that a kill finds them under way; what was measured since the cut is so once more."""


@pytest.fixture(scope="module")
def model_and_data(tiny_model_folder: Path, tiny_data: Path) -> tuple[Path, Path]:
    return tiny_model_folder, tiny_data


@pytest.fixture
def study(tmp_path: Path, model_and_data: tuple[Path, Path]) -> Path:
    return write_study(tmp_path, *model_and_data)


@pytest.fixture
def long_study(tmp_path: Path, model_and_data: tuple[Path, Path]) -> Path:
    return write_study(tmp_path, *model_and_data, **LONG)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_and_data: tuple[Path, Path]) -> Path:
    """Returns the folder of the long study, run by one process and never disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_study(folder, *model_and_data, **LONG)
    process = start(("run", path, "-o", folder / "out"), folder / "log")
    assert process.wait() == 0, (folder / "log").read_text()
    return folder / "out"


def cut_of(out: Path, worker: str) -> checkpoint.Checkpoint | None:
    return checkpoint.newest(out / "checkpoints" / worker)


def under_way(out: Path, worker: str, least: int = 3) -> bool:
    """True where the worker's newest cut holds a trial that has taken some steps."""
    found = cut_of(out, worker)
    return found is not None and max(found.steps, default=0) >= least


def test_two_processes_run_the_same_study_as_one(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    """Contract of every backend; the trial of all weights must be alone in its worker, and is there once."""
    cli("run", study, "-o", tmp_path / "one").ok()
    said = cli("run", study, "--workers", 2, "-o", tmp_path / "two").ok().out
    assert "2 workers, each with" in said
    same(tmp_path / "two", tmp_path / "one")
    assert {row["status"] for row in table(tmp_path / "two").values()} == {"finished"}
    found = json.loads((tmp_path / "two" / "capacity.json").read_text())
    assert found["workers"] == 2
    assert found["slots"] == 2
    assert found["threads"] == max(1, torch.get_num_threads() // 2)
    assert not list((tmp_path / "two" / "checkpoints").glob("worker-*")), "of trials that have ended"
    assert not workers_of(os.getpid())


def test_each_of_two_processes_measures_its_share_of_one_memory(
    cli: CommandLine, tmp_path: Path, model_and_data: tuple[Path, Path]
) -> None:
    """The first one measures while it is alone, and all take what it found."""
    changes: dict[str, Any] = {"slots": "auto", "methods": {"lora": {"rank": [2, 4], "dropout": 0.2}}}
    study = write_study(
        tmp_path,
        *model_and_data,
        **{**LONG, **changes, "budget": {"trials": 4}, "training": {"steps": 2, "batch_size": 5}},
    )
    free = memory.available(torch.device("cpu"))
    if free is None:
        pytest.skip("this system does not say what is free")
    cli("run", study, "--workers", 2, "-o", tmp_path / "two").ok()
    found = json.loads((tmp_path / "two" / "capacity.json").read_text())["measured"]
    assert 0.2 * free < found["free"] < 0.6 * free
    assert found["fits"] <= 0.9 * found["free"] / found["slot"]


def test_a_worker_killed_costs_its_trials_the_time_since_their_checkpoint(
    long_study: Path, whole: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(("run", long_study, "--workers", 2, "-o", out), log)
    until(lambda: under_way(out, "worker-0") and under_way(out, "worker-1"), process)
    kill(workers_of(process.pid)[1])
    held = cut_of(out, "worker-1")
    assert process.wait() == 0, log.read_text()
    said = log.read_text()
    assert "worker-1 died (SIGKILL" in said
    assert "Traceback" not in said
    assert held is not None
    went_on = resumed(said)
    assert went_on, said
    for name, step in zip(held.trials, held.steps, strict=True):
        assert went_on.get(name, 0) >= step > 0 or steps(out, name) == 60
    same(out, whole, rel=0.05)


@pytest.mark.slow
def test_a_scheduler_killed_twice_loses_no_trial_and_leaves_no_worker(
    cli: CommandLine, long_study: Path, whole: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    for begun in (5, 120):
        process = start(("run", long_study, "--workers", 2, "-o", out), log)
        until(lambda begun=begun: steps(out) >= begun and (out / "checkpoints").is_dir(), process)  # type: ignore[misc]
        workers = workers_of(process.pid)
        assert workers
        kill(process.pid)
        process.wait()
        until(lambda workers=workers: not any(alive(worker) for worker in workers))  # type: ignore[misc]
    # one process alone goes on with what two have begun
    said = cli("run", long_study, "-o", out).ok().out
    assert max(resumed(said).values()) > 0
    assert "Traceback" not in log.read_text()
    same(out, whole, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_and_stops(long_study: Path, tmp_path: Path, number: int) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(("run", long_study, "--workers", 2, "-o", out), log)
    until(lambda: under_way(out, "worker-0") and steps(out) > 20, process)
    workers = workers_of(process.pid)
    for worker in workers:  # as a terminal, or a batch system, sends it to everybody
        os.kill(worker, number)
    process.send_signal(number)
    assert process.wait(120) == 130, log.read_text()
    assert "with a checkpoint; the same command (without --overwrite) resumes there" in log.read_text()
    assert "died" not in log.read_text()
    assert not any(alive(worker) for worker in workers)
    status = RunFolder(out).status()
    assert status is not None
    assert status[0] == "interrupted"
    events = journal.read(out / "journal.jsonl")
    running = {e["name"] for e in events if e["event"] == "asked"} - {
        e["name"] for e in events if e["event"] == "ended"
    }
    held: dict[str, int] = {}
    for worker in (out / "checkpoints").glob("worker-*"):
        for cut in checkpoint.find(worker)[-1:]:
            held |= dict(zip(cut.trials, cut.steps, strict=True))
    assert running
    assert {name: held.get(name) for name in running} == {name: steps(out, name) for name in running}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_lives_on_when_a_signal_comes_before_it_has_loaded(number: int) -> None:
    with SubprocessLauncher(1, ModelConfig(name="unused", device="cpu")) as launcher:
        link = launcher.open(0)
        os.kill(until(lambda: workers_of(os.getpid()))[0], number)
        link.call("save", {})
        assert "has no attribute '_worker'" in (link.answer().defect or ""), "nothing is open yet"


class Elsewhere(SubprocessLauncher):
    """Workers on a machine that has another folder where the study's is."""

    def open(self, place: int) -> ProcessLink:
        link = super().open(place)
        call = link.call

        def of_that_machine(method: str, *arguments: Any) -> None:
            call(method, *(Path("/elsewhere", *one.parts[1:]) if isinstance(one, Path) else one for one in arguments))

        link.call = of_that_machine  # type: ignore[method-assign]
        return link


def test_a_worker_that_does_not_see_the_study_folder_is_refused(
    cli: CommandLine, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("peft_study.study.run.SubprocessLauncher", Elsewhere)
        line = cli("run", study, "--workers", 2).error()
    assert line.startswith("error: worker-0: process ")
    assert f"does not see /elsewhere{tmp_path / 'out'}; " in line
    assert line.endswith("; give an output folder that all machines see (docs/scale.md)")
    # the same command, where it is seen: under a new name, as the old one might still be at work
    cli("run", study, "--workers", 2).ok()
    # (a second worker that is slow to load gets no name: the first one may have run all trials)
    assert json.loads((tmp_path / "out" / "workers.json").read_text())["next"] in (2, 3)


def test_a_first_worker_that_dies_is_one_line(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    with patch("peft_study.workers.subprocesses._PROGRAM", ("-c", "import os; os.kill(os.getpid(), 9)")):
        line = cli("run", study, "--workers", 2).error()
    assert "the first worker died (SIGKILL, as where memory ran out)" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--workers", 0), ("--workers", "equal to 1", "value: 0")),
        (("--workers", "two"), ("--workers", "a valid integer")),
        (("--workers", 2, "--ray", "auto"), ("--workers", "Ray", "leave --workers out")),
        (("--ray", "nowhere"), ("--ray nowhere", "HOST:PORT")),
        (("--ray", "127.0.0.1:9"), ("--ray 127.0.0.1:9", "nobody answers", "ray start --head")),
        (("--ray", "auto"), ("--ray auto", "ray start --head")),
        (("--workers", 2, "--set", "checkpoints=s3://x"), ("--set, checkpoints", "unknown key 'checkpoints'")),
    ],
)
def test_bad_words(
    cli: CommandLine, study: Path, tmp_path: Path, words: tuple[object, ...], said: tuple[str, ...]
) -> None:
    line = cli("run", study, *words).error()
    for word in said:
        assert word in line, (word, line)
    assert not (tmp_path / "out").exists()


def test_ray_that_is_not_installed(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    with patch.dict(sys.modules, {"ray": None}):
        line = cli("run", study, "--ray", "auto").error()
    assert line == "error: --ray: Ray is not installed; pip install 'peft-study[ray]'"
    assert not (tmp_path / "out").exists()


def test_more_workers_than_gpus(cli: CommandLine, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    line = cli("run", study, "--workers", 4).error()
    assert line == ("error: --workers: 4 workers, but 2 GPUs; give at most 2: many trials share a GPU in one worker")


def test_each_once_finds_a_trial_that_is_there_twice(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    cli("run", study, "-o", tmp_path / "one", "--set", "budget.trials=1", "--set", "methods={lora: {}}").ok()
    path = tmp_path / "one" / "journal.jsonl"
    each_once(tmp_path / "one")
    path.write_text(path.read_text() + path.read_text())
    with pytest.raises(AssertionError):
        each_once(tmp_path / "one")
