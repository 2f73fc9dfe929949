"""`peft-study run --model M --data D`: what `init` and `run` do, with the study file beside the results."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from command_line import CommandLine
from peft_study.storage.journal import read

STUDY = ("--methods", "lora", "prompt_tuning", "--trials", 2, "--steps", 4)


def test_a_study_without_a_file_writes_the_file_and_resumes_by_the_same_command(
    cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", "--model", tiny_model_folder, "--data", tiny_data, *STUDY]
    first = cli(*words).ok()
    folder = tmp_path / "runs/sums"
    values = yaml.safe_load((folder / "study.yaml").read_text())
    assert list(values["methods"]) == ["lora", "prompt_tuning"]
    assert (values["budget"]["trials"], values["budget"]["steps"]) == (2, 4)
    assert values["data"]["held_out"] == 6, "a tenth of the rows, as init has it"
    journal = (folder / "journal.jsonl").read_bytes()
    again = cli(*words).ok()
    assert (folder / "journal.jsonl").read_bytes() == journal
    assert first.out.splitlines()[-8:] == again.out.splitlines()[-8:]
    cli("run", "runs/sums/study.yaml").ok()
    assert (folder / "journal.jsonl").read_bytes() == journal
    other = cli("run", "--model", tiny_model_folder, "--data", tiny_data, "--trials", 3).error()
    assert other.startswith("error: runs/sums/study.yaml: was written for another command")
    assert "--overwrite" in other
    assert "-o" in other


def test_what_next_is_said_in_commands_that_work(
    cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = cli("run", "--model", tiny_model_folder, "--data", tiny_data, *STUDY, "-o", "a folder").ok().out
    lines = out.splitlines()
    commands = [line.strip() for line in lines[lines.index("what next:") :] if line.strip().startswith("peft-study ")]
    assert [command.split()[1] for command in commands] == ["chat", "generate", "list", "finetune"]
    assert all("'a folder" in command for command in commands)
    import shlex

    Path("prompts.txt").write_text("1+1\n")
    for command in commands:
        words = ["prompts.txt" if word == "FILE" else word for word in shlex.split(command)[1:]]
        cli(*words, stdin="").ok()
    assert len(Path("answers.jsonl").read_text().splitlines()) == 1
    assert Path("a folder-recommended/adapter").is_dir()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run"], "no study; give STUDY.yaml, or --model and --data"),
        (["run", "--model", "m"], "no study; give STUDY.yaml, or --model and --data"),
        (
            ["run", "s.yaml", "--data", "d.jsonl"],
            "--data: goes without a study file, but s.yaml is given; leave it out, or change the file (--set data...)",
        ),
        (
            ["run", "--model", "m", "--data", "d.jsonl", "--methods", "lra"],
            "--methods: unknown method 'lra'; did you mean 'lora'?",
        ),
        (
            ["run", "--model", "m", "--data", "d.jsonl", "--minutes", "5", "--steps", "9"],
            "--minutes: plans trials and steps, but --steps is given; give the minutes, or trials and steps",
        ),
        (
            ["run", "--model", "m", "--data", "d.jsonl", "--minutes", "-1"],
            "--minutes: -1 is not above 0; give e.g. 60",
        ),
    ],
)
def test_what_does_not_go_together_is_said_in_a_line(cli: CommandLine, words: list[str], said: str) -> None:
    assert cli(*words).error() == f"error: {said}"


def test_a_dry_run_writes_nothing(
    cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = cli("run", "--model", tiny_model_folder, "--data", tiny_data, *STUDY, "--dry-run").ok().out
    assert "nothing was written" in out
    assert list(tmp_path.iterdir()) == []


def test_minutes_that_do_not_reach_are_refused_with_what_would(
    cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = cli("run", "--model", tiny_model_folder, "--data", tiny_data, "--minutes", 0.0001).error()
    assert said.startswith("error: minutes: 0.0001 min do not reach for 4 settings a method of ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_study_takes_the_minutes_that_were_asked_for(
    cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    minutes, started = 1.0, time.monotonic()
    words = ["run", "--model", tiny_model_folder, "--data", tiny_data, "--methods", "lora", "prompt_tuning"]
    out = cli(*words, "--minutes", minutes).ok().out
    took = (time.monotonic() - started) / 60
    assert 0.6 * minutes <= took <= 1.25 * minutes
    said = out.splitlines()
    plan = next(i for i, line in enumerate(said) if line.startswith("plan for 1 min: about "))
    again = next(i for i, line in enumerate(said) if line.startswith("at the measured "))
    first = next(i for i, line in enumerate(said) if " finished in " in line and "untouched" not in line)
    assert plan < again
    assert plan < first
    folder = tmp_path / "runs/sums"
    kinds = [event["kind"] for event in read(folder / "journal.jsonl") if event["event"] == "asked"]
    assert kinds.count("final") >= 6
    assert json.loads((folder / "results.json").read_text())["finalists"]
