"""Text files that a user gives: another encoding, a mark in front, a folder or a picture in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import CommandLine
from peft_study.compat.command_line import parse
from peft_study.errors import ConfigError
from peft_study.storage.files import read_text

COMMANDS = {"run": ("run",), "finetune": ("finetune",)}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("# ok\nname: 你好\n".encode("gbk"), ("line 2 is not UTF-8 text", "iconv -f GBK -t UTF-8 ")),
        ("name: 你好\n".encode("utf-16"), ("line 1 is not UTF-8 text", "iconv -f UTF-16 -t UTF-8 ")),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff\xfe", ("is not a text file; name a text file",)),
        (None, ("is a folder, not a file; name a file in it",)),
    ],
    ids=["gbk", "utf-16", "binary", "folder"],
)
def test_what_is_no_utf8_text(
    cli: CommandLine, tmp_path: Path, command: str, content: bytes | None, said: tuple[str, ...]
) -> None:
    path = tmp_path / "given.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    line = cli(*COMMANDS[command], path).error()
    assert line.startswith(f"error: {path}: ")
    for words in said:
        assert words in line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_not_there(cli: CommandLine, tmp_path: Path, command: str) -> None:
    path = tmp_path / "no.yaml"
    line = cli(*COMMANDS[command], path).error()
    assert line == f"error: {path}: cannot be read (No such file or directory); check the path and its permissions"


def test_a_mark_in_front_of_a_study_file_and_its_data(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    """Editors on Windows put a byte order mark before UTF-8."""
    data, template = tmp_path / "data.jsonl", tmp_path / "template.jinja"
    data.write_text("\ufeff" + tiny_data.read_text())
    values: dict[str, Any] = {
        "model": {"name": str(tiny_model_folder)},
        "data": {"train": str(data), "held_out": 4},
        "training": {"steps": 1, "batch_size": 2},
        "methods": {"lora": {"learning_rate": [1e-3]}},
        "finals": {"best": 0},
        "output": str(tmp_path / "out"),
    }
    study = tmp_path / "study.yaml"
    study.write_text("\ufeff" + yaml.safe_dump(values))
    cli("run", study).ok()
    assert cli("data", "convert", data, "-o", tmp_path / "plain.jsonl").ok().out.startswith("60 rows")
    template.write_text("\ufeff# arguments\n")
    assert read_text(template) == "# arguments\n"


def test_a_mark_in_front_of_arguments(tmp_path: Path) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text("\ufeffuse_lora: true\n")
    assert parse([str(path)]).arguments.use_lora
    accelerate = tmp_path / "accelerate.yaml"
    accelerate.write_text("\ufeffnum_processes: 3\n")
    assert parse(["--config_file", str(accelerate)]).launch.processes == 3


def test_a_file_that_must_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\); check the path and its permissions"):
        read_text(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        (("--sizes", "1_0", "2_0"), (10, 20)),
        (("--sizes", "0.02k"), None),
        (("--sizes", "10", "--sizes", "20"), (10, 20)),
        (("--sizes=1_0", "20"), (10, 20)),
        (("--sizes", "1,0", "20"), (10, 20)),
        (("--sizes", "many"), None),
    ],
    ids=["underscore", "fraction", "repeated", "joined", "comma", "word"],
)
def test_sizes(
    cli: CommandLine, tiny_data: Path, tmp_path: Path, words: tuple[str, ...], sizes: tuple[int, ...] | None
) -> None:
    ran = cli("data", "sample", tiny_data, "-o", tmp_path / "out", *words)
    if sizes is None:
        assert "is no number of rows; write 9000, 9_000 or 9k" in ran.error()
        return
    ran.ok()
    assert sorted(path.name for path in (tmp_path / "out").glob("sample-*")) == [f"sample-{n}.jsonl" for n in sizes]


def test_sizes_in_thousands(cli: CommandLine, tmp_path: Path) -> None:
    data, out = tmp_path / "skills.jsonl", tmp_path / "out"
    cli("data", "skills", "-o", data, "--count", 2100).ok()
    cli("data", "sample", data, "-o", out, "--sizes", "1k", "2K").ok()
    assert [len((out / f"sample-{n}.jsonl").read_text().splitlines()) for n in (1000, 2000)] == [1000, 2000]
    assert (
        "a sample of 1000000 rows is wanted"
        in cli("data", "sample", data, "-o", tmp_path / "b", "--sizes", "1m").error()
    )
