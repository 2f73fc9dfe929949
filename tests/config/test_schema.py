"""The JSON schema that ships: it is the settings' own, and it and the validation agree on what a study file is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from peft_study.config import METHODS, StudyConfig, validate
from peft_study.config.schema import SCHEMA_FILE, schema, schema_text
from peft_study.errors import ConfigError
from peft_study.storage.yaml_file import load_yaml

ROOT = Path(__file__).resolve().parents[2]
STUDY: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": "d"}, "methods": {"lora": None}, "output": "o"}


def changed(place: str, value: Any) -> dict[str, Any]:
    """Returns a good study, changed at one place (a.b.c)."""
    study = copy.deepcopy(STUDY)
    inner = study
    *parents, last = place.split(".")
    for parent in parents:
        inner[parent] = inner.get(parent) or {}
        inner = inner[parent]
    inner[last] = value
    return study


GOOD: dict[str, Any] = {
    "methods.lora.rank": [8, [8, 16], {"choices": [8]}, {"low": 1, "high": 9}, {"low": 1, "high": 9, "log": True}],
    "methods.lora.learning_rate": [None, 1e-4, [1e-4, 1e-3], {"low": 1e-5, "high": 1e-2, "log": True}],
    "methods.lora.target_modules": ["all-linear", ["q_proj", "v_proj"], ["all-linear", ["q_proj"]]],
    "methods.lora.method": ["lora"],
    "methods.lora.space": ["default", None],
    "methods.none": [None, {}],
    "methods.prefix_tuning": [None, {"tokens": [10, 30], "init": ["text", "zero"], "init_text": None}],
    "methods.wide-2": [{"method": "lora", "rank": [64, 128]}, {"method": "full"}],
    "data.train": ["a", {"path": "a", "take": 9}, ["a", {"path": "b"}]],
    "data.held_out": [None, 64, 0.1, "held.jsonl"],
    "data.mapping": [None, {"messages": "chat"}],
    "slots": ["auto", 3],
    "budget.trials": [None, 3],
    "search.range_test": ["auto", True, False],
    "logging.checkpoint_every": ["epoch", 3, None],
}
BAD: dict[str, Any] = {
    "methods": [None, {}, ["lora"]],
    "methods.lora": [3, [], {"rang": 3}],
    "methods.lora.rank": [0, [], [8, 0], {"choices": []}, {"low": 1}, {"low": 1, "hgh": 3}, "fast", None],
    "methods.lora.rslora": [{"low": 0, "high": 1}],
    "methods.lora.learning_rate": [0, [1e-4, None], {"choices": [None]}],
    "methods.lora.dropout": [1, [0, 1]],
    "methods.lora.method": ["full"],
    "methods.wide": [None, {}, {"rank": 8}, {"method": "loar"}, {"method": "full", "rank": 8}],
    "methods.a b": [{"method": "lora"}],
    "methods.--": [{"method": "lora"}],
    "model": [None, {}, {"name": "m", "nam": "n"}],
    "data.train": [None, [], 3, {"take": 3}, [{"path": "a", "take": 0}]],
    "data.max_length": [0, "long"],
    "slots": [0, "many", None],
    "search": [None, {"sampler": "tpee"}],
    "outptu": ["o"],
}


def cases(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(changed(at, value), id=f"{at}={value}") for at, values in table.items() for value in values]


def accepted(study: dict[str, Any]) -> tuple[bool, bool]:
    """Returns whether the schema and whether the validation takes a study."""
    try:
        validate(StudyConfig, study, where="study")
    except ConfigError:
        return Draft7Validator(schema()).is_valid(study), False
    return Draft7Validator(schema()).is_valid(study), True


@pytest.mark.parametrize("study", cases(GOOD))
def test_both_take_what_is_good(study: dict[str, Any]) -> None:
    assert accepted(study) == (True, True)


@pytest.mark.parametrize("study", cases(BAD))
def test_both_refuse_what_is_bad(study: dict[str, Any]) -> None:
    assert accepted(study) == (False, False)


def test_the_file_that_ships_is_the_settings_schema() -> None:
    remedy = "the settings changed: run `peft-study schema -o src/peft_study/study.schema.json`"
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), remedy
    Draft7Validator.check_schema(schema())


def test_the_file_is_packed() -> None:
    assert SCHEMA_FILE.name in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_study_file(path: Path) -> None:
    values = load_yaml(path).values
    Draft7Validator(schema()).validate(values)
    validate(StudyConfig, values, where=str(path))
    line = path.read_text(encoding="utf-8").splitlines()[0]
    assert (path.parent / line.removeprefix("# yaml-language-server: $schema=")).resolve() == SCHEMA_FILE.resolve()


def test_an_editor_can_complete_each_method() -> None:
    """Each method's name leads to its own fields, each with its meaning."""
    made = schema()
    methods = made["properties"]["methods"]["properties"]
    assert list(methods) == list(METHODS)
    for method, config in METHODS.items():
        reference, null = methods[method]["anyOf"]
        assert null == {"type": "null"}
        space = made["$defs"][reference["$ref"].removeprefix("#/$defs/")]
        assert {*config.model_fields, "learning_rate", "warmup_ratio"} <= set(space["properties"])
        assert "required" not in space
        assert all("description" in field for name, field in space["properties"].items() if name != "method")


def test_an_editor_writes_no_default_of_a_whole_section() -> None:
    """A section written out by its defaults would fix what is searched: training.warmup_ratio, for one."""
    assert all(
        "default" not in field or field["default"] in ("auto", 1, None) for field in schema()["properties"].values()
    )
    assert "None:" not in schema_text()
