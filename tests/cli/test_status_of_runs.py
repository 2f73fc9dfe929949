"""status, show and list on runs of `finetune`: in every state, and in a folder beside studies."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import shutil
import socket
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from command_line import CommandLine, listing
from hand_made import HandMade
from peft_study.storage.metrics import read
from peft_study.storage.run_dir import RunFolder
from peft_study.training.trial_run import TrialRun


@pytest.fixture(scope="module")
def words(tiny_model_folder: Path, tiny_data: Path) -> tuple[Any, ...]:
    """Returns a run as it is begun under a launcher, whose arguments are not kept."""
    return (
        *("finetune", "--mixed_precision", "bf16", "--num_processes", 2, "--use_deepspeed", "train.py"),
        *("--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--use_lora", "--cpu"),
        *(
            "--per_device_train_batch_size",
            2,
            "--max_train_steps",
            6,
            "--eval_steps",
            2,
            "--use_slow_tokenizer",
            "False",
        ),
        *("--checkpointing_steps", 2, "--early_stopping", 5, "--output_dir"),
    )


def stopped(cli: CommandLine, words: tuple[Any, ...], out: Path) -> None:
    """Stops a run before its adapter, at step 6."""
    with patch.object(TrialRun, "save_adapter", side_effect=KeyboardInterrupt):
        assert cli(*words, out).code == 130


def held_out(out: Path) -> list[dict[str, Any]]:
    return [record for record in read(out / "metrics.jsonl") if record["event"] == "held_out"]


def test_a_finished_run(cli: CommandLine, words: tuple[Any, ...], tmp_path: Path, tiny_data: Path) -> None:
    out = tmp_path / "my out"
    cli(*words, out).ok()
    before, lines = listing(out), held_out(out)
    said = cli("status", out).ok().out
    assert said.startswith(f"{out}: finished\n")
    assert f" on {tiny_data}\n" in said
    assert "\nstep 6/6, loss of the last batch " in said
    assert " tokens/s\n" in said
    best = min(lines[1:], key=lambda record: record["loss"])
    assert f"held-out loss after step {best['step']} (the lowest so far" in said
    assert f": {best['loss']:.3f} [" in said
    assert f"against the untouched base: {best['minus_base']:.3f} [" in said
    assert f"adapter: '{out / 'adapter'}'\n" in said
    assert "resume" not in said
    shown = cli("show", out).ok().out
    assert "method: method lora, rank 64, alpha 16, dropout 0.1" in shown
    assert "clip_norm 1" in shown
    assert "early stopping: after 5 held-out losses" in shown
    for line in lines:
        (row,) = (row for row in shown.splitlines() if row.strip().startswith(f"{line['step']}/6 "))
        assert f"{line['loss']:.4f} [" in row
        assert row.rstrip().endswith("kept") == (line is best)
    assert "metrics.jsonl" in shown
    assert listing(out) == before


def test_a_stopped_run_says_how_it_is_resumed_and_the_command_does_that(
    cli: CommandLine, words: tuple[Any, ...], tmp_path: Path
) -> None:
    out = tmp_path / "my out"
    stopped(cli, words, out)
    RunFolder(out).set_status("interrupted", "stopped at step 6 of 6 of lora, with a checkpoint")
    said = cli("status", out).ok().out
    assert said.startswith(f"{out}: interrupted (stopped at step 6 of 6 of lora, with a checkpoint)\n")
    RunFolder(out).set_status("running")  # a killed process can say nothing
    said = cli("status", out).ok().out
    assert said.startswith(f"{out}: its process was killed; nothing runs it now\n")
    (line,) = (line for line in said.splitlines() if line.startswith("to resume it at step 6, "))
    command = shlex.split(line[line.index("peft-study finetune") :])
    assert "resumes at step 6 of 6" in cli(*command[1:]).ok().out
    assert cli("status", out).ok().out.startswith(f"{out}: finished\n")


def test_a_run_that_another_process_trains(cli: CommandLine, words: tuple[Any, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(cli, words, out)
    with RunFolder(out).locked():
        said = cli("status", out).ok().out
    assert said.startswith(f"{out}: running by process {os.getpid()} on {socket.gethostname()}\n")
    assert " ago\n" in said
    assert "resume" not in said


def test_a_run_that_was_killed_before_it_measured_anything(
    cli: CommandLine, words: tuple[Any, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped(cli, words, out)
    for name in ("metrics.jsonl", "record.json"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoints")
    RunFolder(out).set_status("running")
    for command in ("status", "show"):
        said = cli(command, out).ok().out
        assert "to resume it at step 0, for want of a checkpoint" in said
        assert "step 0/6\n" in said


def test_a_run_that_is_loading_its_model(cli: CommandLine, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "out").locked():
        line = cli("status", tmp_path / "out").error()
    assert f"no study or run yet: process {os.getpid()} on {socket.gethostname()} is loading model and data" in line


def test_a_folder_of_runs_and_studies(
    cli: CommandLine, words: tuple[Any, ...], made: HandMade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    cli(*words, runs / "a").ok()
    shutil.copytree(runs / "a", runs / "b")
    RunFolder(runs / "b").set_status("running")
    shutil.copytree(runs / "a", runs / "old")
    status = json.loads((runs / "old/status.json").read_text())
    (runs / "old/status.json").write_text(json.dumps({**status, "version": 1}))
    (runs / "notes").mkdir()
    said = cli("list", runs).ok().out
    rows = [line.split() for line in said.splitlines() if line.startswith(f" {tmp_path}")]
    assert [row[:4] for row in rows] == [
        [str(runs / "a"), "lora", "finished", "6/6"],
        [str(runs / "b"), "lora", "killed", "6/6"],
        [str(runs / "old"), "-", "unreadable", "-"],
    ]
    best = min(record["loss"] for record in held_out(runs / "a")[1:])
    assert rows[0][4] == f"{best:.3f}"
    values = json.loads(cli("list", runs, "--json").ok().out)
    assert values[0]["loss"] == best
    assert values[0]["state"] == "finished"
    (first, *_) = csv.DictReader(io.StringIO(cli("list", runs, "--csv").ok().out))
    assert first["loss"] == str(best)
    assert "are for the trials of a study" in cli("list", runs, "--method", "lora").error()
    monkeypatch.chdir(tmp_path)
    assert "runs/a" in cli("list").ok().out
    monkeypatch.chdir(runs / "a")
    assert cli("status").ok().out.startswith(".: finished\n")
    assert " lora " in cli("list").ok().out

    shutil.copytree(made.written(), runs / "study")
    said = cli("list", runs).ok().out
    (row,) = (line for line in said.splitlines() if " study of " in line)
    assert "study of lora, prompt_tuning" in row
    assert "finished" in row
    assert " trials " in row
    monkeypatch.chdir(tmp_path)
    assert "lora-000" in cli("list").ok().out, "the only study under runs/ is meant, as before"


def test_a_trial_of_a_study_is_shown_as_one(cli: CommandLine, trained: Path) -> None:
    said = cli("show", trained / "trials" / "lora-000").ok().out
    assert said.startswith("lora-000: a setting of the search, finished")
