"""What a person sees: 80 columns, quiet and verbose, and Ctrl-C in a talk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandLine, Ran, conversation, study_file

LONG = "an_owner_with_a_long_name/and_a_mixture_with_a_longer_name"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has commands take their output for a terminal of 80 columns without colours or moving parts."""
    for name, value in {"FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": "80", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)


def lines(ran: Ran) -> list[str]:
    """Returns what was printed, after checking that it fits 80 columns; a path or a command may be longer."""
    found = [line.rstrip() for line in (ran.out + ran.err).splitlines()]
    for line in found:
        assert len(line) <= 80 or " " not in line.strip() or "peft-study " in line or "tensorboard " in line, line
        assert "…" not in line, line
    return found


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_data: Path) -> tuple[Ran, Path]:
    """Runs a small study, and returns what it printed into a pipe, and its folder."""
    import contextlib
    import io
    import sys
    from unittest.mock import patch

    from peft_study.cli import main
    from peft_study.display import terminal as module

    folder = tmp_path_factory.mktemp("study")
    path = study_file(folder, tiny_model_folder, tiny_data)
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["peft-study", "run", str(path)]),
        patch.object(module, "LINE_SECONDS", 0.0),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return Ran(int(ended.value.code or 0), out.getvalue(), err.getvalue()).ok(), folder / "out"


def test_a_study_in_a_log_says_how_far_it_is_and_what_is_left(studied: tuple[Ran, Path]) -> None:
    told = [line for line in studied[0].out.splitlines() if line.startswith("study: ")]
    assert told
    assert all(" elapsed" in line and " steps, " in line for line in told)
    # two methods with two trials and two finals each, of 9 steps
    assert "of 72 steps" in told[0]
    done = [int(line.split()[1]) for line in told]
    assert done == sorted(done)
    assert done[-1] > 36  # the finals count
    assert "\x1b" not in studied[0].out


@pytest.mark.usefixtures("terminal")
def test_looking_at_a_study_fits_80_columns(studied: tuple[Ran, Path], cli: CommandLine) -> None:
    folder = studied[1]
    listed = lines(cli("list", folder).ok())
    for name in ("lora-000", "prefix_tuning-000", "prefix_tuning-001"):
        assert sum(line.startswith(f" {name} ") for line in listed) == 1
    assert sum(line.startswith("   learning_rate ") for line in listed) == 8
    finals = [path.name for path in (folder / "trials").glob("prefix*-seed-*")]
    for words in (
        ("status", folder),
        ("show", finals[0], "-s", folder),
        ("compare", "lora-000", finals[0], "-s", folder),
    ):
        lines(cli(*words).ok())


@pytest.mark.usefixtures("terminal")
def test_a_command_to_paste_is_one_line(studied: tuple[Ran, Path], cli: CommandLine) -> None:
    folder = studied[1]
    ran = cli("run", folder / "config.given.json", "-o", folder).ok()
    said = ran.out[ran.out.index("what next:") :].splitlines()
    commands = [line.strip() for line in said if line.startswith("    ")]
    assert len(commands) == 4
    assert all(command.startswith("peft-study ") and str(folder) in command for command in commands)
    assert max(map(len, commands)) > 80


def test_in_a_pipe_the_list_has_everything_in_a_row(studied: tuple[Ran, Path], cli: CommandLine) -> None:
    (row,) = [line for line in cli("list", studied[1]).ok().out.splitlines() if line.startswith(" lora-000 ")]
    assert "learning_rate" in row
    assert "[" in row


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Returns a file of rows whose sources begin and end alike."""
    path = tmp_path / "mixture.jsonl"
    rows = [{**conversation(n), "source": f"{LONG}:{('one', 'two', 'three')[n % 3]}_of_its_parts"} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.usefixtures("terminal")
def test_data_commands_fit_80_columns(mixture: Path, tiny_model_folder: Path, cli: CommandLine, tmp_path: Path) -> None:
    lines(cli("data", "convert", mixture, "-o", tmp_path / "out.jsonl").ok())
    lines(cli("data", "sample", mixture, "--sizes", 3, "-o", tmp_path / "samples").ok())
    ran = cli(
        "data", "stats", mixture, "--model", tiny_model_folder, "--chat-template", "tulu", "--max-length", 30
    ).ok()
    found = [line.rstrip() for line in ran.out.splitlines()]
    assert max(map(len, found)) <= 80
    assert len({line.split("  ")[0] for line in found if "…" in line}) == 3


def test_stats_for_machines(mixture: Path, tiny_model_folder: Path, cli: CommandLine) -> None:
    words = ("data", "stats", mixture, "--model", tiny_model_folder, "--chat-template", "tulu")
    ran = cli(*words, "--format", "json").ok()
    assert json.loads(ran.out)["total"]["rows"] == 30
    assert "`finetune` trains with this template" in ran.err
    assert len(cli(*words, "--format", "csv").ok().out.splitlines()) == 4
    assert "with data.chat_template: tulu" in cli(*words).ok().out


def test_stats_say_which_template_training_uses(mixture: Path, cli: CommandLine) -> None:
    ran = cli("data", "stats", mixture, "--model", "smollm2-135m-instruct", "--chat-template", "own").ok()
    assert "`finetune` with tulu, unless it has --chat_template own" in ran.out


@pytest.mark.parametrize("place", ["before", "behind"])
def test_quiet_and_verbose(
    place: str, tiny_model_folder: Path, tiny_data: Path, cli: CommandLine, tmp_path: Path
) -> None:
    words = ["finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--use_lora"]
    words += ["--max_train_steps", 4, "--held_out", 8, "--max_seq_length", 20, "--overwrite_output_dir"]
    words += ["--output_dir", tmp_path / "out"]

    def run(flag: str) -> list[str]:
        return cli(*([flag, *words] if place == "before" else [*words, flag])).out.splitlines()

    quiet = run("-q")
    assert not [line for line in quiet if line.startswith(("loading", "step ", "lora:"))]
    assert any(line.startswith("adapter: ") for line in quiet)
    loud = run("--verbose")
    assert [line.split()[2] for line in loud if line.startswith("lora: step")] == ["1/4,", "2/4,", "3/4,", "4/4,"]
    plain = cli(*words).out.splitlines()
    assert "ignored" not in "".join(quiet)
    assert any(line.startswith("loading ") for line in plain)
    assert sum(line.startswith("lora: step") for line in plain) < 4


def test_rows_that_lose_everything_are_a_warning_also_when_quiet(
    tiny_model_folder: Path, tmp_path: Path, cli: CommandLine
) -> None:
    rows = [conversation(n) for n in range(40)]
    for row in rows[:4]:
        row["messages"][0]["content"] = "long " * 100
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["finetune", "--model_name_or_path", tiny_model_folder, "--train_file", data, "--use_lora", "-q"]
    words += ["--max_train_steps", 1, "--held_out", 8, "--max_seq_length", 100, "--output_dir", tmp_path / "out"]
    text = "WARNING: rows are cut: 4 of 40 rows (10.0%) lose all supervised tokens to max_length 100; raise max_length"
    assert text in cli(*words).out


class Talker:
    """An adapter whose second answer is stopped in its middle."""

    asked: list[list[dict[str, str]]]

    def __init__(self) -> None:
        self.asked = []

    def answer(self, messages: list[dict[str, str]], _most: int, stream: Callable[[str], None]) -> str:
        self.asked.append([dict(message) for message in messages])
        stream("one ")
        if len(self.asked) == 2:
            raise KeyboardInterrupt
        stream("two")
        return "one two"


def test_ctrl_c_ends_the_answer_and_at_the_prompt_the_talk(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_study.cli import adapters

    talker, said = Talker(), iter(["first", "second", "third"])

    def ask(_prompt: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(adapters, "_loaded", lambda *_: talker)
    monkeypatch.setattr(adapters, "_folder", lambda _words: Path("here"))
    monkeypatch.setattr("builtins.input", ask)
    ran = cli("chat", "here").ok()
    assert ran.out == "adapter: one two\nadapter: one  [stopped]\nadapter: one two\n\n"
    turns: list[Any] = [(message["role"], message["content"]) for message in talker.asked[-1]]
    assert turns == [
        ("user", "first"),
        ("assistant", "one two"),
        ("user", "second"),
        ("assistant", "one "),
        ("user", "third"),
    ]
