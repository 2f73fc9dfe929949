"""status, list and show on a small trained study, and on hand-made ones in every state."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from command_line import CommandLine, listing, study_file
from hand_made import RATE, HandMade
from peft_study.statistics import TokenCounts
from peft_study.storage.study_dir import StudyFolder


def test_a_finished_study(cli: CommandLine, trained: Path) -> None:
    before = listing(trained)
    said = cli("status", trained).ok().out
    assert said.startswith(f"{trained}: finished\n")
    assert "to resume it" not in said
    assert "winner by mean dev loss of its seeds: " in said
    assert "2/2" in said
    assert "disk: " in said
    assert listing(trained) == before


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [
        ("interrupted", "stopped with 2 trials under way", "interrupted (stopped with 2 trials under way)"),
        ("failed", "the disk is full", "failed (the disk is full)"),
        ("running", None, "its process was killed; nothing runs it now"),
    ],
)
def test_an_unfinished_study_says_why_and_how_it_goes_on(
    cli: CommandLine, made: HandMade, status: str, reason: str | None, expected: str
) -> None:
    made.asked("lora-002", "lora", "search", 2, None, {"learning_rate": 1.0})
    folder = made.written(status, reason)
    said = cli("status", folder).ok().out
    assert said.startswith(f"{folder}: {expected}\n")
    assert f": peft-study run {folder}/config.given.json -o {folder}\n" in said
    assert "under way: lora-002 0/100\n" in said
    assert "lora-000: 1.500 (-0.500 [-0.50" in said
    (line,) = (line for line in said.splitlines() if line.startswith(" lora"))
    assert line.split()[:6] == ["lora", "9", "1", "1", "1", "0"], "to come, interrupted, finished, pruned, diverged"


def test_a_study_that_another_process_runs(cli: CommandLine, made: HandMade) -> None:
    made.asked("lora-002", "lora", "search", 2, None, {"learning_rate": 1.0})
    folder = made.written("running")
    trial = made.folder.trial("lora-002")
    trial.path.mkdir(parents=True)
    lines = [json.dumps({"event": "train", "step": step}) + "\n" for step in (1, 2)]
    trial.metrics.write_text("".join(lines) + '{"event": "tra')
    with made.folder.journal.open("a") as file:
        file.write('{"event": "meas')  # it is writing this line now
    with StudyFolder(folder).run.locked():
        said = cli("status", folder).ok().out
        assert said.startswith(f"{folder}: running by process {os.getpid()} on {socket.gethostname()}\n")
        assert "under way: lora-002 2/100\n" in said
        assert "to resume it" not in said
        assert "is writing to it" in cli("clean", folder, "--force").error()
        rows = json.loads(cli("list", folder, "--json", "--status", "running").ok().out)
        assert [row["name"] for row in rows] == ["lora-002"]


def test_a_process_that_was_killed_or_is_elsewhere(cli: CommandLine, made: HandMade) -> None:
    folder = made.written("running")
    owner = folder / "owner.json"
    (folder / "lock").touch()
    gone = subprocess.Popen(["true"])
    gone.wait()
    owner.write_text(json.dumps({"process": gone.pid, "machine": socket.gethostname()}))
    with patch(
        "peft_study.storage.study_dir._locked", side_effect=AssertionError("the lock of a dead process was tried")
    ):
        assert "its process was killed" in cli("status", folder).ok().out
    # its number has been given to another process
    owner.write_text(json.dumps({"process": os.getpid(), "machine": socket.gethostname()}))
    assert "its process was killed" in cli("status", folder).ok().out
    owner.write_text(json.dumps({"process": 7, "machine": "elsewhere"}))
    assert "begun by process 7 on elsewhere; cannot tell from this machine" in cli("status", folder).ok().out


def test_a_study_killed_before_it_had_trials(cli: CommandLine, tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": RATE})
    study.events.clear()
    folder = study.written("running")
    (folder / "examples.json").unlink()
    (folder / "status.json").unlink()
    said = cli("status", folder).ok().out
    assert "its process was killed" in said
    assert "it was not far enough to have trials" in said
    assert json.loads(cli("list", folder, "--json").ok().out) == []
    assert cli("list", folder, "--csv").ok().out.startswith("name,method,kind,")
    assert "has no trials yet" in cli("show", "lora-000", "-s", folder).error()


def test_kill_nine_status_and_the_command_it_names(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    path, out = study_file(tmp_path, tiny_model_folder, tiny_data, steps=60), tmp_path / "out"
    log = (tmp_path / "log").open("w")
    program = [sys.executable, "-c", "from peft_study.cli import main; main()", "run", str(path)]
    process = subprocess.Popen(program, stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while not (list(out.glob("checkpoints/step_*")) and list(out.glob("trials/*/metrics.jsonl"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    said = cli("status", out).ok().out
    assert f"running by process {process.pid} on " in said
    cli("list", out).ok()
    process.send_signal(signal.SIGKILL)
    process.wait()
    said = cli("status", out).ok().out
    assert "its process was killed; nothing runs it now" in said
    (command,) = (line.split(": peft-study ")[1] for line in said.splitlines() if line.startswith("to resume it"))
    assert "would lose the checkpoint" in cli("clean", out).error()
    assert "resumes at step" in cli(*command.split()).ok().out
    assert "finished" in cli("status", out).ok().out


# -- which study


def test_the_folder_may_be_left_out(
    cli: CommandLine, made: HandMade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made.written()
    monkeypatch.chdir(tmp_path)
    assert "no study here or under runs/" in cli("status").error()
    (tmp_path / "runs").mkdir()
    shutil.copytree(folder, tmp_path / "runs/one")
    assert cli("status").ok().out.startswith("runs/one: finished")
    assert cli("show", "lora-000").ok().out.startswith("lora-000: ")
    shutil.copytree(folder, tmp_path / "runs/two")
    assert "2 studies under runs/: runs/one, runs/two; say which one" in cli("list").error()
    monkeypatch.chdir(folder)
    assert cli("status").ok().out.startswith(".: finished")


def test_folders_that_cannot_be_read(cli: CommandLine, made: HandMade, tmp_path: Path) -> None:
    assert "there is no such folder" in cli("status", tmp_path / "nothing").error()
    file = tmp_path / "study.yaml"
    file.touch()
    assert "is a file; give the output folder" in cli("status", file).error()
    assert "holds no study" in cli("list", tmp_path).error()
    folder = made.written()
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "version": 99}))
    assert "written by a newer version of this program (schema 99" in cli("status", folder).error()
    (folder / "status.json").write_text(json.dumps(status))
    lines = made.folder.journal.read_text().splitlines(keepends=True)
    for damaged in ('{"event": "as\n', "7\n", '{"event": "ended", "name": "nobody"}\n', '{"event": "danced"}\n'):
        made.folder.journal.write_text("".join([*lines[:3], damaged, *lines[3:]]))
        assert "journal.jsonl: line 4 is damaged" in cli("status", folder).error()
    made.folder.journal.write_text("".join(lines))
    (folder / "examples.json").unlink()
    assert "examples.json is missing" in cli("list", folder).error()


# -- list and show


def test_rows_are_filtered_and_sorted(cli: CommandLine, made: HandMade) -> None:
    folder = made.written()

    def names(*words: object) -> list[str]:
        return [row["name"] for row in csv.DictReader(io.StringIO(cli("list", folder, "--csv", *words).ok().out))]

    assert names() == ["none", "lora-000", "lora-001", "prompt_tuning-000", "prompt_tuning-001"]
    assert names("--method", "lora") == ["lora-000", "lora-001"]
    assert names("--status", "diverged") == ["prompt_tuning-001"]
    assert names("--sort", "dev") == ["lora-000", "prompt_tuning-000", "lora-001", "none", "prompt_tuning-001"]
    assert names("--sort", "name")[0] == "lora-000"
    table = cli("list", folder).ok().out
    assert "learning_rate 0.001  finished  1.500 [1." in table
    assert "--method: unknown 'lira'; did you mean 'lora'?" in cli("list", folder, "--method", "lira").error()
    assert "--status: unknown 'prunned'; did you mean 'pruned'?" in cli("list", folder, "--status", "prunned").error()
    assert "--sort: unknown 'loss'" in cli("list", folder, "--sort", "loss").error()
    assert "exclude each other" in cli("list", folder, "--json", "--csv").error()
    (row,) = json.loads(cli("list", folder, "--json", "--status", "diverged").ok().out)
    assert (row["dev"], row["reason"]) == (None, "the loss became nan at step 3")


def test_the_list_of_a_finished_study_is_its_results_file(cli: CommandLine, trained: Path) -> None:
    with (trained / "results.csv").open() as file:
        expected = list(csv.DictReader(file))
    found = list(csv.DictReader(io.StringIO(cli("list", trained, "--csv").ok().out)))
    assert [row["name"] for row in found] == [row["name"] for row in expected]
    for mine, other in zip(found, expected, strict=True):
        for name in ("dev", "dev_low", "dev_minus_base_high", "test", "learning_rate", "data_tokens"):
            assert mine[name] == other[name] == "" or float(mine[name]) == pytest.approx(float(other[name])), name


def test_everything_about_a_trial(cli: CommandLine, trained: Path) -> None:
    said = cli("show", "lora-001-seed-2", "-s", trained).ok().out
    assert said.startswith("lora-001-seed-2: a retrained setting, seed 2, finished\n")
    for part in ("rank 2", "learning_rate 0.01", "batch_size 5", "seed 2", "test loss ", "9/9", "best; shown"):
        assert part in said, part
    assert "0/9" not in said, "a final is measured at its end only"
    assert " 0/9 " in cli("show", "lora-001", "-s", trained).ok().out
    assert "9 steps, " in said
    assert "adapter/adapter_model.safetensors" in said
    assert cli("show", trained / "trials/lora-001-seed-2").ok().out == said
    assert "virtual ones" in cli("show", "prefix_tuning-000", "-s", trained).ok().out
    assert "the untouched base" in cli("show", "none", "-s", trained).ok().out


def test_unknown_trials_are_told_the_nearest(cli: CommandLine, trained: Path) -> None:
    assert "has no trial 'lora-01'; did you mean 'lora-001'?" in cli("show", "lora-01", "-s", trained).error()
    assert "has no trial 'x'; one of: " in cli("show", "x", "-s", trained).error()
    assert "give its name, or STUDY/trials/NAME" in cli("show", "some/where", "-s", trained).error()
    assert "leave out -s" in cli("show", trained / "trials/lora-000", "-s", trained).error()


# -- compare


def test_numbers_of_the_list_are_finite_json(cli: CommandLine, tmp_path: Path) -> None:
    """A single held-out example has an interval without ends."""
    study = HandMade(tmp_path / "s", {"lora": RATE})
    study.examples = type(study.examples)(TokenCounts(np.array([10])), np.array([20.0]), TokenCounts(np.array([10])))
    study.events = study.events[:1]
    study.measured("none", 0, [20.0])
    study.ended("none", "finished")
    out = cli("list", study.written(), "--json").ok().out
    assert "Infinity" not in out
    assert json.loads(out)[0]["dev_low"] is None
