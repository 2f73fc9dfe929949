"""status, list, show, compare, rerun and clean on a small trained study, and on hand-made ones in every state."""

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
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import yaml

from command_line import CommandLine, listing
from hand_made import RATE, HandMade
from peft_study.storage.study_dir import StudyFolder
from peft_study.training.interrupt import StopRequest
from peft_study.training.loop import Slots


def study_file(folder: Path, model: Path, data: Path, *, steps: int = 9, out: str = "out") -> Path:
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_data: Path) -> Path:
    """Returns the folder of a study that has run; tests that change it work on a copy."""
    from peft_study.cli import main

    folder = tmp_path_factory.mktemp("trained")
    path = study_file(folder, tiny_model_folder, tiny_data)
    with patch.object(sys, "argv", ["peft-study", "run", str(path)]), pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    return folder / "out"


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "study")


@pytest.fixture
def made(tmp_path: Path) -> HandMade:
    """Returns a study in the middle of its finals, not yet written."""
    study = HandMade(tmp_path / "made", {"lora": RATE, "prompt_tuning": RATE}, finals={"best": 1, "seeds": 2})
    study.trial("lora", 1e-3, 0.5)
    study.trial("lora", 1e-2, 0.1, status="pruned", reason="at step 11 worse")
    study.trial("prompt_tuning", 0.1, 0.2)
    study.trial("prompt_tuning", 3.0, None)
    return study


# -- status


def test_a_finished_study(cli: CommandLine, trained: Path) -> None:
    before = listing(trained)
    said = cli("status", trained).ok().out
    assert said.startswith(f"{trained}: finished\n")
    assert "to go on" not in said
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
    assert "under way: lora-002 0\n" in said
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
        assert "under way: lora-002 2\n" in said
        assert "to go on" not in said
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
    assert "begun by process 7 on elsewhere; whether that still runs" in cli("status", folder).ok().out


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
    (command,) = (line.split(": peft-study ")[1] for line in said.splitlines() if line.startswith("to go on"))
    assert "would lose the checkpoint" in cli("clean", out).error()
    assert "goes on from step" in cli(*command.split()).ok().out
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
    assert "examples.json is gone" in cli("list", folder).error()


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
    said = cli("show", "lora-000-seed-2", "-s", trained).ok().out
    assert said.startswith("lora-000-seed-2: a retrained setting, seed 2, finished\n")
    for part in ("rank 2", "learning_rate 0.01", "batch_size 5", "seed 2", "test loss ", "0/9", "9/9", "best; shown"):
        assert part in said, part
    assert "9 steps, " in said
    assert "adapter/adapter_model.safetensors" in said
    assert cli("show", trained / "trials/lora-000-seed-2").ok().out == said
    assert "virtual ones" in cli("show", "prefix_tuning-000", "-s", trained).ok().out
    assert "the untouched base" in cli("show", "none", "-s", trained).ok().out


def test_unknown_trials_are_told_the_nearest(cli: CommandLine, trained: Path) -> None:
    assert "has no trial 'lora-01'; did you mean 'lora-001'?" in cli("show", "lora-01", "-s", trained).error()
    assert "has no trial 'x'; one of: " in cli("show", "x", "-s", trained).error()
    assert "give its name, or STUDY/trials/NAME" in cli("show", "some/where", "-s", trained).error()
    assert "leave out -s" in cli("show", trained / "trials/lora-000", "-s", trained).error()


# -- compare


def test_two_settings_of_the_search(cli: CommandLine, made: HandMade) -> None:
    made.trial("lora", 0.5, 0.45)
    folder = made.written()
    said = cli("compare", "lora-000", "lora-002", "-s", folder).ok().out
    assert "- on the dev part lora-000 is better than lora-002 by 0.050 [0.0" in said
    assert "one seed each (seed 0)" in said
    assert [line.split() for line in said.splitlines() if "learning_rate" in line] == [
        ["learning_rate", "0.001", "0.5"]
    ]
    turned = cli("compare", "lora-002", "lora-000", "-s", folder).ok().out
    assert "- on the dev part lora-000 is better than lora-002 by 0.050 [0.0" in turned
    assert "better than the untouched base by 0.500" in cli("compare", "lora-000", "none", "-s", folder).ok().out


def test_differences_within_noise_are_none(cli: CommandLine, tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": RATE})
    study.trial("lora", 1e-3, 0.5, noise=0.3)
    study.trial("lora", 1e-2, 0.49, noise=0.3)
    said = cli("compare", "lora-000", "lora-001", "-s", study.written()).ok().out
    assert "- on the dev part lora-000 and lora-001 cannot be told apart (-0.010 [-" in said


def test_finalists_are_compared_over_their_seeds(cli: CommandLine, made: HandMade) -> None:
    made.chosen(lora=[0], prompt_tuning=[0])
    names = made.finals("lora", 0, [0.5, 0.6]) + made.finals("prompt_tuning", 0, [0.2, 0.3])
    made.concluded("lora")
    made.opened(**dict(zip(names, (0.4, 0.5, 0.1, 0.1), strict=True)))
    folder = made.written()
    said = cli("compare", "lora-000", "prompt_tuning-000", "-s", folder).ok().out
    assert "dev loss        1.450" in said or "1.450 [" in said
    assert "-0.300 [" in said
    assert "-0.350 [" in said, "test"
    assert "one seed" not in said
    (line,) = (line for line in said.splitlines() if line.strip().startswith("seeds"))
    assert line.split() == ["seeds", "2", "2"]
    single = cli("compare", "lora-000-seed-1", folder / "trials/prompt_tuning-000-seed-2").ok().out
    assert "one seed each, and not the same (seeds 1 and 2)" in single
    assert "-0.200 [" in single


def test_finals_beside_a_setting_that_has_none(cli: CommandLine, made: HandMade) -> None:
    made.trial("lora", 0.5, 0.45)
    made.chosen(lora=[0])
    made.finals("lora", 0, [0.5, 0.6])
    said = cli("compare", "lora-000", "lora-002", "-s", made.written()).ok().out
    assert "lora-000 was retrained with new seeds, lora-002 was not: the trials of the search are compared" in said
    assert "0.050 [" in said


def test_what_has_no_value_is_not_compared(cli: CommandLine, made: HandMade) -> None:
    made.chosen(lora=[0])
    made.finals("lora", 0, [0.5, None])
    made.asked("lora-002", "lora", "search", 2, None, {"learning_rate": 1.0})
    folder = made.written()

    def error(first: str, second: str) -> str:
        return cli("compare", first, second, "-s", folder).error()

    assert "lora-001 was pruned (at step 11 worse), so it has no final loss" in error("lora-001", "prompt_tuning-000")
    assert "prompt_tuning-001 diverged (the loss became nan at step 3), so" in error("none", "prompt_tuning-001")
    assert "lora-002 was interrupted, so it has no final loss" in error("lora-002", "none")
    assert "lora-000: 1 of its 2 seeds did not finish (lora-000-seed-2: the loss" in error("lora-000", "none")
    assert "lora-000-seed-1 is both of them" in error("lora-000-seed-1", "lora-000-seed-1")
    assert "has no trial 'lora-0'" in error("none", "lora-0")


# -- rerun


def test_a_trial_trained_again_comes_out_the_same(cli: CommandLine, copy: Path) -> None:
    before = listing(copy)
    ran = cli("rerun", "lora-000-seed-1", "-s", copy).ok()
    assert "lora-000-seed-1: the same: apart by " in ran.out
    found = json.loads((copy / "reruns/lora-000-seed-1/rerun.json").read_text())
    assert found["same"]
    step, then, now = found["curve"][-1]
    assert step == 9
    assert now == pytest.approx(then, rel=1e-5)
    assert found["tolerance"] == pytest.approx(1e-5 * then)
    assert (copy / "reruns/lora-000-seed-1/adapter/adapter_model.safetensors").exists()
    assert not (copy / "reruns/lora-000-seed-1/checkpoints").exists()
    after = {name: size for name, size in listing(copy).items() if not name.startswith("reruns/")}
    assert after == before, "the study itself is left alone"
    cli("rerun", copy / "trials/lora-000-seed-1").ok()
    assert (copy / "reruns/lora-000-seed-1-2/rerun.json").exists()


def test_a_trial_that_comes_out_otherwise_is_said_to(cli: CommandLine, copy: Path) -> None:
    journal = copy / "journal.jsonl"
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    for event in events:
        if event["event"] == "measured" and event["name"] == "prefix_tuning-000" and event["step"] == 9:
            event["sums"][0] += 0.01
        if event["event"] == "ended" and event["name"] == "prefix_tuning-001":
            event.update(status="diverged", reason="the loss became nan at step 3")
    journal.write_text("".join(json.dumps(event) + "\n" for event in events))
    ran = cli("rerun", "prefix_tuning-000", "-s", copy)
    assert ran.code == 1
    assert "prefix_tuning-000: NOT the same: apart by " in ran.out
    ran = cli("rerun", "prefix_tuning-001", "-s", copy)
    assert ran.code == 1
    assert "NOT the same: then diverged (the loss became nan at step 3), now finished" in ran.out


def test_a_pruned_trial_is_trained_up_to_where_it_was_stopped(cli: CommandLine, copy: Path) -> None:
    journal = copy / "journal.jsonl"
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    kept = [e for e in events if not (e["event"] == "measured" and e["name"] == "lora-000" and e["step"] > 0)]
    metrics = (copy / "trials/lora-000/metrics.jsonl").read_text().splitlines()
    assert any('"step": 9' in line for line in metrics)
    for event in kept:
        if event["event"] == "ended" and event["name"] == "lora-000":
            event.update(status="pruned", reason="at step 3 worse")
    # what it had at step 3 is not written down, so it is found out first
    at = next(i for i, e in enumerate(kept) if e["event"] == "ended" and e["name"] == "lora-000")
    kept.insert(at, {"event": "measured", "name": "lora-000", "step": 3, "sums": [1.0] * 8})
    journal.write_text("".join(json.dumps(event) + "\n" for event in kept))
    ran = cli("rerun", "lora-000", "-s", copy)
    assert ran.code == 1
    found = json.loads((copy / "reruns/lora-000/rerun.json").read_text())
    assert found["now"] == ["pruned", "as in the study, at step 3 worse"]
    assert [step for step, _, _ in found["curve"]] == [0, 3]


def test_what_cannot_be_trained_again(
    cli: CommandLine, copy: Path, tiny_data: Path, tmp_path: Path, made: HandMade
) -> None:
    assert "nothing was trained" in cli("rerun", "none", "-s", copy).error()
    made.asked("lora-002", "lora", "search", 2, None, {"learning_rate": 1.0})
    folder = made.written("interrupted")
    assert "lora-002 has not ended" in cli("rerun", "lora-002", "-s", folder).error()
    assert "its settings are not known" in cli("rerun", "lora-000", "-s", folder).error()
    data = tmp_path / "other.jsonl"
    data.write_text("".join(tiny_data.read_text().splitlines(keepends=True)[:-5]))
    config = copy / "config.resolved.json"
    values = json.loads(config.read_text())
    values["data"]["train"][0]["path"] = str(data)
    config.write_text(json.dumps(values))
    assert "since this run began, the training rows" in cli("rerun", "lora-000", "-s", copy).error()
    assert not (copy / "reruns").exists()


def test_a_rerun_that_is_stopped_says_so(cli: CommandLine, copy: Path) -> None:
    with patch.object(StopRequest, "asked", property(lambda _s: True, lambda _s, _v: None), create=True):
        ran = cli("rerun", "lora-000", "-s", copy)
    assert ran.code == 130
    assert "nothing is kept of a rerun that was stopped" in ran.err
    assert json.loads((copy / "reruns/lora-000/status.json").read_text())["status"] == "interrupted"


def test_other_versions_and_code_are_notes(cli: CommandLine, copy: Path) -> None:
    record = json.loads((copy / "record.json").read_text())
    record["packages"]["torch"] = "1.0"
    record["code"] = {"commit": "0123456789abcdef", "changed": False}
    (copy / "record.json").write_text(json.dumps(record))
    said = cli("rerun", "lora-000", "-s", copy).ok().out
    assert "torch was 1.0, is " in said
    assert "the code was at 0123456789ab, is at " in said


# -- clean


def test_clean_frees_what_is_spare_and_nothing_else(cli: CommandLine, copy: Path) -> None:
    before = listing(copy)
    dry = cli("clean", copy, "--dry-run").ok().out
    assert "nothing was deleted" in dry
    assert listing(copy) == before
    said = cli("clean", copy).ok().out
    assert said.splitlines()[:-1] == dry.splitlines()[:-1]
    gone = set(before) - set(listing(copy))
    assert gone
    assert all(name.startswith("checkpoints/") or "/tensorboard/" in name or "/adapter/" in name for name in gone), gone
    finals = json.loads((copy / "results.json").read_text())["finalists"]
    chosen = {f"{f['method']}-{f['number']:03d}" for f in finals}
    left = {path.parent.name for path in copy.glob("trials/*/adapter")}
    assert left == chosen | {f"{name}-seed-{seed}" for name in chosen for seed in (1, 2)}
    assert not list(copy.rglob("tensorboard"))
    assert cli("clean", copy).ok().out == "0 B freed\n"


def test_a_cleaned_study_is_still_finished(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, trained: Path
) -> None:
    """Without any checkpoint the same command would begin it again, and forget its journal."""
    copy = shutil.copytree(trained, tmp_path / "out")
    cli("clean", copy).ok()
    journal = (copy / "journal.jsonl").read_text()
    path = study_file(tmp_path, tiny_model_folder, tiny_data)
    with patch.object(Slots, "_enter", side_effect=AssertionError("something is trained")) as enter:
        enter.side_effect = lambda plans: [] if not plans else pytest.fail("something is trained")
        cli("run", path).ok()
    assert (copy / "journal.jsonl").read_text() == journal


def test_a_study_without_finals_keeps_each_methods_best(cli: CommandLine, made: HandMade) -> None:
    made.trial("lora", 0.5, 0.45)
    folder = made.written()
    for name in ("lora-000", "lora-002", "prompt_tuning-000"):
        adapter = made.folder.trial(name).adapter
        adapter.mkdir(parents=True)
        adapter.joinpath("adapter_model.safetensors").write_bytes(b"0" * 2_000_000)
    assert "2.0 MB freed" in cli("clean", folder).ok().out
    assert sorted(p.parent.name for p in folder.glob("trials/*/adapter")) == ["lora-000", "prompt_tuning-000"]


def test_an_unfinished_study_needs_force_and_keeps_its_adapters(cli: CommandLine, made: HandMade) -> None:
    folder = made.written("interrupted")
    for path in (made.folder.trial("lora-000").adapter, made.folder.checkpoints / "step_1"):
        path.mkdir(parents=True)
        path.joinpath("x.safetensors").write_bytes(b"0" * 1000)
    line = cli("clean", folder).error()
    assert "has not finished, and would lose the checkpoint it goes on from" in line
    assert "--force" in line
    assert (folder / "checkpoints/step_1").exists()
    cli("clean", folder, "--force").ok()
    assert not (folder / "checkpoints").exists()
    assert (folder / "trials/lora-000/adapter").exists()


def test_numbers_of_the_list_are_finite_json(cli: CommandLine, tmp_path: Path) -> None:
    """A single held-out example has an interval without ends."""
    study = HandMade(tmp_path / "s", {"lora": RATE})
    study.examples = type(study.examples)(np.array([10]), np.array([20.0]), np.array([10]))
    study.events = study.events[:1]
    study.measured("none", 0, [20.0])
    study.ended("none", "finished")
    out = cli("list", study.written(), "--json").ok().out
    assert "Infinity" not in out
    assert json.loads(out)[0]["dev_low"] is None
