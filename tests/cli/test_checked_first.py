"""What is wrong with a template, a path or the head of a file is told before the model is loaded, with its setting."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from command_line import CommandLine, conversation


@pytest.fixture(autouse=True)
def _no_model() -> Iterator[None]:
    """Lets no command load a model: what is asked for here must not need one."""
    with patch("peft_study.model.load.load_model", side_effect=AssertionError("the model was loaded first")):
        yield


@pytest.fixture
def untemplated(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """Returns the tiny model without its chat template."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    (model / "chat_template.jinja").unlink()
    return model


def study(folder: Path, model: Path | str, **data: Any) -> Path:
    path = folder / "study.yaml"
    values = {"model": {"name": str(model)}, "data": data, "methods": {"lora": {}}, "output": str(folder / "out")}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def finetune(folder: Path, model: Path, data: Path, *more: object) -> tuple[object, ...]:
    flags = ("--use_lora", "--output_dir", folder / "out")
    return ("finetune", "--model_name_or_path", model, "--train_file", data, *flags, *more)


def bad_heads(folder: Path) -> dict[Path, str]:
    """Writes data that cannot be used from its first row on; returns what must be said of each."""
    rows = {
        "roles.jsonl": {"messages": [{"role": "usher", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "columns.jsonl": {"frage": "1+1", "antwort": "2"},
    }
    for name, row in rows.items():
        (folder / name).write_text(json.dumps(row) + "\n")
    (folder / "empty.jsonl").write_text("")
    shards = folder / "shards"
    shards.mkdir()
    (shards / "one.jsonl").write_text(json.dumps(conversation(1)) + "\n")
    (shards / "two.jsonl").write_text("{\n")
    said = {"roles.jsonl": "usher", "columns.jsonl": "frage", "empty.jsonl": "empty.jsonl", "shards": "two.jsonl"}
    return {folder / "no.jsonl": "no such file", **{folder / name: words for name, words in said.items()}}


def test_no_template(cli: CommandLine, tmp_path: Path, untemplated: Path, tiny_data: Path) -> None:
    missing = "the tokenizer has no chat template of its own; give tulu, another built-in name, or a Jinja file"
    path = study(tmp_path, untemplated, train=str(tiny_data))
    for words in (("run", path), ("run", path, "--dry-run")):
        assert cli(*words).error() == f"error: {path}, line 3, data.chat_template: {missing}"
    said = cli(*finetune(tmp_path, untemplated, tiny_data, "--chat_template", "own")).error()
    assert said == f"error: --chat_template: {missing}"
    said = cli("data", "stats", tiny_data, "--model", untemplated).error()
    assert said == f"error: --chat-template: {missing}"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("tullu", "unknown chat template 'tullu'; did you mean 'tulu'?"),
        ("no.jinja", "there is no such chat template file; check the path"),
        ("broken.jinja", "is not valid Jinja"),
    ],
)
def test_a_template_that_cannot_be_used(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch,
    template: str, what: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jinja").write_text("{% if %}")
    path = study(tmp_path, tiny_model_folder, train=str(tiny_data), chat_template=template)
    cases = {
        f"{path}, line 5, data.chat_template": ("run", path),
        "--set, data.chat_template": ("run", path, "--set", f"data.chat_template={template}"),
        "--chat_template_name": finetune(tmp_path, tiny_model_folder, tiny_data, "--chat_template_name", template),
        "--chat_template": finetune(tmp_path, tiny_model_folder, tiny_data, "--chat_template", template),
        "--chat-template": ("data", "stats", tiny_data, "--model", tiny_model_folder, "--chat-template", template),
    }
    for where, words in cases.items():
        line = cli(*words).error()
        assert line.startswith((f"error: {where}: ", f"error: {where}, ")), line
        assert what in line


def test_a_template_that_refuses_the_first_row(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    template = tmp_path / "refuses.jinja"
    template.write_text("{{ raise_exception('never') }}")
    path = study(tmp_path, tiny_model_folder, train=str(tiny_data), chat_template=str(template))
    for words in (
        ("run", path),
        finetune(tmp_path, tiny_model_folder, tiny_data, "--chat_template", template),
        ("data", "stats", tiny_data, "--model", tiny_model_folder, "--chat-template", template),
    ):
        line = cli(*words).error()
        assert "refuses the conversation: never; change the row, or choose another chat template" in line
        assert "--" not in line.replace(str(tmp_path), "")


def test_training_data(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    for data, words in bad_heads(tmp_path).items():
        assert words in cli(*finetune(tmp_path, tiny_model_folder, data)).error()
        for train in (str(data), [str(tiny_data), "skills", str(data)]):
            path = study(tmp_path, tiny_model_folder, train=train)
            assert words in cli("run", path).error()
            assert words in cli("run", path, "--dry-run").error()


def test_init_reads_every_head_before_all_rows(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    with patch("peft_study.study.template.survey", side_effect=AssertionError("all rows were read first")):
        for data, words in bad_heads(tmp_path).items():
            ran = cli("init", "--model", tiny_model_folder, "--data", tiny_data, "--data", data, "-o", tmp_path / "i")
            assert words in ran.error()


def test_held_out_and_test_data(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    for data, words in bad_heads(tmp_path).items():
        for field in ("held_out", "test"):
            path = study(tmp_path, tiny_model_folder, train=str(tiny_data), **{field: str(data)})
            line = cli("run", path).error()
            assert line.startswith(f"error: {path}, line 5, data.{field}, ")
            assert words in line
        if data.exists():
            line = cli(*finetune(tmp_path, tiny_model_folder, tiny_data, "--held_out", data)).error()
            assert line.startswith("error: --held_out, ")
            assert words in line


def test_a_model_that_is_not_there(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    path = study(tmp_path, "./no-model", train=str(tiny_data))
    tokenizer = ("--set", f"model.tokenizer={tiny_model_folder}")
    for words in (("run", path), ("run", path, *tokenizer)):
        assert "no such model folder" in cli(*words).error()


def test_several_splits(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path) -> None:
    data = tmp_path / "splits"
    data.mkdir()
    for name in ("train", "test"):
        (data / f"{name}.jsonl").write_text(json.dumps(conversation(1)) + "\n")
    line = cli("run", study(tmp_path, tiny_model_folder, train=str(data))).error()
    assert "has several splits: test, train" in line
    assert "data.split" in line
