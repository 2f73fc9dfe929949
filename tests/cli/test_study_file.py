"""``peft-study init`` and ``peft-study schema``: what is written is a whole study file that says what it would do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from command_line import CommandLine, conversation, listing
from peft_study.config import METHODS, SPACES, StudyConfig, TrainingConfig, validate
from peft_study.config.schema import SCHEMA_FILE, schema_text
from peft_study.storage.yaml_file import load_yaml


@pytest.fixture
def written(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Path:
    """Returns the study file of the tiny model and data."""
    path = tmp_path / "mine.yaml"
    cli("init", "--model", tiny_model_folder, "--data", tiny_data, "-o", path).ok()
    return path


def rows(path: Path, lengths: list[int]) -> Path:
    """Writes conversations whose answers have so many words."""
    made = [conversation(number) for number in range(len(lengths))]
    for row, length in zip(made, lengths, strict=True):
        row["messages"][1]["content"] = "a " * length
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_it_is_a_study_of_the_default_spaces(written: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    values = load_yaml(written).values
    found = validate(StudyConfig, values, where="").filled()
    assert (found.model.name, found.data.train[0].path) == (str(tiny_model_folder), str(tiny_data))
    assert found.output == Path("runs/mine")
    assert found.methods == {
        name: SPACES[name]().filled(TrainingConfig()) for name in ("lora", "prefix_tuning", "prompt_tuning", "none")
    }
    plain = {"model": values["model"], "data": values["data"], "output": values["output"]}
    bare = validate(StudyConfig, {**plain, "methods": dict.fromkeys(found.methods)}, where="").filled()
    for section in StudyConfig.model_fields:
        if section not in ("budget", "training"):  # their steps are fitted to the data
            assert getattr(found, section) == getattr(bare, section), section


def test_every_reader_reads_the_same_values(written: Path) -> None:
    """PyYAML takes 1e-05 for a text, editors for a number."""
    values = yaml.safe_load(written.read_text(encoding="utf-8"))
    assert values == load_yaml(written).values
    Draft7Validator(json.loads(SCHEMA_FILE.read_text())).validate(values)


def test_it_names_the_schema_and_every_setting(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    first, *_ = text.splitlines()
    assert first == f"# yaml-language-server: $schema={SCHEMA_FILE.resolve().as_uri()}"
    values = yaml.safe_load(text)
    assert list(values) == list(StudyConfig.model_fields)
    for section, field in StudyConfig.model_fields.items():
        fields = getattr(field.annotation, "model_fields", {})
        left_out = {"learning_rate", "warmup_ratio", "weight_decay", "steps"} if section == "training" else set()
        assert set(values[section] if fields else ()) == set(fields) - left_out
        for name, inner in fields.items():
            assert name in left_out or inner.description.replace("None:", "null:") in text, f"{section}.{name}"
    for method in METHODS.values():
        assert method.__doc__ in text
    assert max(len(line) for line in text.splitlines() if str(written.parent) not in line) <= 120


def test_the_reference_that_costs_most_is_there_to_be_uncommented(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    lines = text[text.index("  # full:") : text.index("# Optimizer, schedule")].splitlines()
    asked = text.replace("\n".join(lines), "\n".join(line.replace("# ", "", 1) for line in lines))
    written.write_text(asked)
    found = validate(StudyConfig, load_yaml(written).values, where="").filled()
    assert found.methods["full"] == SPACES["full"]().filled(TrainingConfig())


@pytest.mark.parametrize(
    ("lengths", "max_length", "held_out", "steps", "said"),
    [
        ([3] * 60, 128, 6, 7, "60 rows; half have at most"),
        ([3] * 50 + [600] * 10, 1024, 6, 7, "no longer row was seen"),
        ([3] * 2990 + [600] * 10, 128, 128, 300, "one pass over the data is 359 steps"),
        ([3] * 2, 128, 1, 1, "2 rows"),
    ],
)
def test_it_fits_the_data(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, lengths: list[int], max_length: int, held_out: int,
    steps: int, said: str,
) -> None:  # fmt: skip
    data = rows(tmp_path / "data.jsonl", lengths)
    path = tmp_path / "study.yaml"
    cli("init", "--model", tiny_model_folder, "--data", data, "-o", path).ok()
    values = yaml.safe_load(path.read_text())
    found = (values["data"]["max_length"], values["data"]["held_out"], values["budget"]["steps"])
    assert found == (max_length, held_out, steps)
    assert said in path.read_text()


def test_a_model_that_takes_less(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 300}))
    path = tmp_path / "study.yaml"
    cli("init", "--model", model, "--data", rows(tmp_path / "data.jsonl", [600] * 30), "-o", path).ok()
    assert yaml.safe_load(path.read_text())["data"]["max_length"] == 300


def test_a_model_without_chat_template(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    (model / "chat_template.jinja").unlink()
    path = tmp_path / "study.yaml"
    cli("init", "--model", model, "--data", tiny_data, "-o", path).ok()
    assert yaml.safe_load(path.read_text())["data"]["chat_template"] == "tulu"
    assert "the tokenizer has none of its own" in path.read_text()


def test_several_sources_in_a_new_folder(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    path = tmp_path / "new" / "a study.yaml"
    ran = cli("init", "--model", tiny_model_folder, "--data", tiny_data, "--data", "skills", "-o", path).ok()
    assert "2,060 rows" in ran.out
    assert f"peft-study run '{path}'" in ran.out
    assert f"peft-study run '{path}'" in path.read_text()
    assert yaml.safe_load(path.read_text())["data"]["train"] == [str(tiny_data), "skills"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--data": "no.jsonl"}, ("no.jsonl", "no such file")),
        ({"--data": None}, ("--data",)),
        ({"--data": "one.jsonl"}, ("one.jsonl", "one row", "more data")),
        ({"--model": "./no-model"}, ("no-model", "no such model folder")),
        ({"-o": "there.yaml"}, ("there.yaml", "is there already", "--overwrite")),
        ({"-o": "folder"}, ("folder", "is a folder")),
        ({"-o": "there.yaml/study.yaml"}, ("there.yaml",)),
        ({"--split": "tset"}, ("tset",)),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any], said: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").write_text("mine: true\n")
    (tmp_path / "folder").mkdir()
    rows(tmp_path / "one.jsonl", [3])
    before = listing(tmp_path)
    words = {"--model": tiny_model_folder, "--data": tiny_data, "-o": "study.yaml", **changes}
    line = cli("init", *(word for pair in words.items() if pair[1] is not None for word in pair)).error()
    for word in said:
        assert word in line
    assert listing(tmp_path) == before


def test_a_file_is_replaced_when_asked(cli: CommandLine, written: Path, tiny_model_folder: Path) -> None:
    written.write_text("mine: true\n")
    words = ("init", "--model", tiny_model_folder, "--data", "skills", "-o", written)
    cli(*words).error()
    assert written.read_text() == "mine: true\n"
    cli(*words, "--overwrite").ok()
    assert load_yaml(written).values["data"]["train"] == "skills"


def test_schema(cli: CommandLine, tmp_path: Path) -> None:
    assert cli("schema").ok().out == schema_text()
    cli("schema", "-o", tmp_path / "schema.json").ok()
    assert (tmp_path / "schema.json").read_text(encoding="utf-8") == schema_text()
    assert str(tmp_path) in cli("schema", "-o", tmp_path).error()
