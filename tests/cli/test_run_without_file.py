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
            "--data: goes without a study file, but s.yaml is given; leave it out, or change the file "
            "(--set data.train=...)",
        ),
        (
            ["run", "s.yaml", "--split", "train"],
            "--split: goes without a study file, but s.yaml is given; leave it out, or change the file "
            "(--set data.split=...)",
        ),
        (
            ["run", "s.yaml", "--methods", "lora"],
            "--methods: goes without a study file, but s.yaml is given; leave it out, or change the file "
            "(--set 'methods={lora: {}}')",
        ),
        (
            ["run", "d.jsonl"],
            "d.jsonl: is data, not a study file; `peft-study run --model MODEL --data d.jsonl`",
        ),
        (
            ["run", "--model", "m", "--data", "d.jsonl", "--methods", "-o", "x"],
            "--methods: is given without a value; give one or several",
        ),
        (["run", "--model", "m", "--data"], "--data: is given without a value; give one or several"),
        (
            ["run", "--model", "m", "--data", "d.jsonl", "--minutes", "inf"],
            "--minutes: inf is not finite; give e.g. 60",
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


def test_settings_of_the_command_line_are_planned_with_and_resumed_with(
    cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", "--model", tiny_model_folder, "--data", tiny_data, *STUDY, "--dtype", "float32"]
    cli(*words, "--set", "methods.lora.rank=2").ok()
    head = (tmp_path / "runs/sums/study.yaml").read_text().splitlines()
    assert head[2] == "#   peft-study run runs/sums/study.yaml --dtype float32 --set methods.lora.rank=2"
    assert "--set methods.lora.rank=2 -o runs/sums" in next(line for line in head if line.startswith("# peft-study"))
    journal = (tmp_path / "runs/sums/journal.jsonl").read_bytes()
    cli(*words, "--set", "methods.lora.rank=2").ok()
    cli(*head[2].split()[2:]).ok()
    assert (tmp_path / "runs/sums/journal.jsonl").read_bytes() == journal
    assert "was written for another command" in cli(*words, "--set", "methods.lora.rank=4").error()


def test_the_minutes_are_planned_with_the_settings_of_the_command_line(
    cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", "--model", tiny_model_folder, "--data", tiny_data, "--methods", "lora", "--minutes", 1, "--dry-run"]
    assert "(one pass over the data: 6)" in cli(*words).ok().out
    assert "(one pass over the data: 12)" in cli(*words, "--set", "training.batch_size=4").ok().out


def test_a_command_that_was_corrected_before_the_study_began_writes_the_file_again(
    cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", "--model", tiny_model_folder, "--data", tiny_data, *STUDY]
    assert "hold out fewer" in cli(*words, "--set", "data.held_out=59").error()
    assert (tmp_path / "runs/sums/study.yaml").exists()
    cli(*words, "--set", "data.held_out=9").ok()
    assert "data.held_out=9" in (tmp_path / "runs/sums/study.yaml").read_text()


def test_a_mistake_beside_a_file_of_settings_is_one_line(cli: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "recommended.yaml"
    file.write_text("model: {name: m}\nmethod: {method: lora}\n")
    said = cli("finetune", file, "--num_train_epochs", 3).error()
    assert said == (
        f"error: {file}: unrecognized arguments: --num_train_epochs 3; beside FILE.yaml there are -o, "
        "--overwrite_output_dir, and --set KEY=VALUE for its settings"
    )
    file.write_text("model: {name: m}\nmethods: {lora: {}}\n")
    said = cli("finetune", file).error()
    assert said == f"error: {file}: is a study of several settings; peft-study run {file}"


def test_what_cannot_be_run_leaves_no_file(
    cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = cli("run", "--model", tiny_model_folder, "--data", tiny_data, "--trials", 0).error()
    assert said.startswith("error: --trials, budget.trials: ")
    assert list(tmp_path.iterdir()) == []


def test_several_methods_are_taken_behind_a_flag_of_the_program(
    cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = cli("-v", "run", "--model", tiny_model_folder, "--data", tiny_data, *STUDY, "--dry-run").ok().out
    assert " prompt_tuning " in out


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


def test_a_study_file_of_the_users_is_not_replaced(
    cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    own = tmp_path / "out/study.yaml"
    own.parent.mkdir()
    own.write_text("# mine\nmodel: m\n")
    said = cli("run", "--model", tiny_model_folder, "--data", tiny_data, *STUDY, "-o", own.parent).error()
    assert "is a study file that this command did not write" in said
    assert f"peft-study run {own}" in said
    assert own.read_text() == "# mine\nmodel: m\n"
