"""Every kind of bad data, through every command that reads it: one line, exit code 2, and nothing left behind."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import CommandLine, conversation, listing

GOOD = [conversation(i) for i in range(30)]


def _rows(folder: Path, rows: list[Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _with(row: dict[str, Any]) -> Callable[[Path], Path]:
    """Returns a writer of good rows with this one as the third."""
    return lambda folder: _rows(folder, [*GOOD[:2], row, *GOOD[2:]])


def _turns(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _missing(folder: Path) -> Path:
    return folder / "data.jsonl"


def _empty(folder: Path) -> Path:
    return _rows(folder, [])


def _truncated(folder: Path) -> Path:
    path = folder / "data.jsonl.gz"
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in GOOD).encode())
    path.write_bytes(whole[: len(whole) // 2])
    return path


def _broken(folder: Path) -> Path:
    path = _rows(folder, GOOD)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2][:20] + "\n", *lines[3:]]))
    return path


def _wrong_columns(folder: Path) -> Path:
    return _rows(folder, [{"frage": "1+1", "antwort": "2"}] * 30)


def _mixed(folder: Path) -> Path:
    return _rows(folder, [*GOOD[:2], {"instruction": "Add 1 and 1.", "input": "", "output": "2"}, *GOOD[2:]])


def _no_data_set(folder: Path) -> Path:
    path = folder / "data"
    path.mkdir()
    (path / "notes.md").write_text("nothing here")
    return path


ROW = "row 3"
CASES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "missing file": (_missing, ("data.jsonl", "no such file")),
    "empty file": (_empty, ("data.jsonl",)),
    "truncated gzip": (_truncated, ("data.jsonl.gz", "gzip")),
    "broken JSON line": (_broken, ("data.jsonl", ROW, "JSON")),
    "row without messages": (_with({"id": "x", "source": "y"}), ("data.jsonl", ROW, "messages")),
    "empty messages": (_with({"messages": []}), ("data.jsonl", ROW, "messages")),
    "unknown role": (_with(_turns(("user", "1+1"), ("asistant", "2"))), ("data.jsonl", ROW, "asistant", "assistant")),
    "no assistant": (_with(_turns(("user", "1+1"))), ("data.jsonl", ROW, "assistant")),
    "empty content": (_with(_turns(("user", "1+1"), ("assistant", ""))), ("data.jsonl", ROW, "content")),
    "content is no text": (_with(_turns(("user", "1+1"), ("assistant", 2))), ("data.jsonl", ROW, "content")),
    "wrong column names": (_wrong_columns, ("data.jsonl", "frage", "antwort", "--map")),
    "mixed formats": (_mixed, ("data.jsonl", ROW)),
    "folder that is no data set": (_no_data_set, ("data", "no data set")),
}


@pytest.fixture(params=CASES, ids=[name.replace(" ", "-") for name in CASES])
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """Returns a bad data set and the words that its error must hold."""
    write, words = CASES[request.param]
    return write(tmp_path), words


def check(line: str, words: tuple[str, ...], remedied: bool = True) -> None:
    """Asserts that an error says what, where, and what to do."""
    for word in words:
        assert word.lower() in line.lower(), (word, line)
    assert not remedied or "; " in line, f"no remedy: {line}"


def test_convert(cli: CommandLine, bad: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    path, words = bad
    before = listing(tmp_path)
    ran = cli("data", "convert", path, "-o", tmp_path / "new" / "out.jsonl")
    check(ran.error(), words)
    assert listing(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_finetune(cli: CommandLine, bad: tuple[Path, tuple[str, ...]], tmp_path: Path, tiny_model_folder: Path) -> None:
    path, words = bad
    before = listing(tmp_path)
    ran = cli(
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", path, "--use_lora"),
        *("--output_dir", tmp_path / "runs" / "new", "--preprocessing_num_workers", 1),
    )
    check(ran.error(), words)
    assert listing(tmp_path) == before
    assert not (tmp_path / "runs").exists()


def test_run(cli: CommandLine, bad: tuple[Path, tuple[str, ...]], tmp_path: Path, tiny_model_folder: Path) -> None:
    path, words = bad
    study = tmp_path / "study.yaml"
    settings = {
        "model": {"name": str(tiny_model_folder)},
        "data": {"train": str(path), "workers": 1},
        "methods": {"lora": {"rank": 2}},
        "output": str(tmp_path / "runs" / "new"),
    }
    study.write_text(yaml.safe_dump(settings))
    before = listing(tmp_path)
    check(cli("run", study).error(), words)
    assert listing(tmp_path) == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["finetune", "run"])
def test_max_length_that_supervises_nothing(
    cli: CommandLine, command: str, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    study = tmp_path / "study.yaml"
    settings = {
        "model": {"name": str(tiny_model_folder)},
        "data": {"train": str(tiny_data), "max_length": 4},
        "methods": {"lora": {}},
        "output": str(tmp_path / "out"),
    }
    study.write_text(yaml.safe_dump(settings))
    flags = ("--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--use_lora", "--max_seq_length", 4)
    words = ("run", study) if command == "run" else ("finetune", *flags, "--output_dir", tmp_path / "out")
    check(cli(*words).error(), ("max_length", "4", "lose all supervised tokens", "give at least"))
    assert list(listing(tmp_path)) == ["study.yaml"]


def test_old_run_survives_a_mistake_in_the_command_that_would_replace_it(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    words = ("finetune", "--model_name_or_path", tiny_model_folder, "--use_prompt_tuning", "--max_train_steps", 1)
    out = ("--output_dir", tmp_path / "out")
    cli(*words, *out, "--train_file", tiny_data).ok()
    before = listing(tmp_path)
    assert "out/adapter/adapter_model.safetensors" in before
    cli(*words, *out, "--train_file", tmp_path / "missing.jsonl", "--overwrite_output_dir").error()
    assert listing(tmp_path) == before


def test_answers_without_prompts(cli: CommandLine, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    for path, words in (
        (tmp_path / "none.txt", ("none.txt", "no such file")),
        (tmp_path / "none.jsonl", ("none.jsonl", "no such file")),
        (empty, ("empty.txt", "no prompts", "a prompt a line")),
        (_rows(tmp_path, [{"text": "1+1"}]), ("data.jsonl", "row 1", "no prompt", "text")),
    ):
        check(cli("generate", tmp_path, "--prompts", path, "-o", tmp_path / "out.jsonl").error(), words)
        assert not (tmp_path / "out.jsonl").exists()
