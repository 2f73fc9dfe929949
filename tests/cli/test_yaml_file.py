"""Study files: every error names the line, and what the command line sets takes the place of what stands there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import CommandLine
from peft_study.config import Choices, Range, StudyConfig, validate
from peft_study.errors import ConfigError
from peft_study.storage.yaml_file import SettingsFile, load_yaml

HEAD = "model:\n  name: m\ndata:\n  train: d\noutput: o\nmethods:\n"
"""Six lines: what is put under it begins in line 7."""


@pytest.fixture
def file(tmp_path: Path) -> Any:
    """Returns a function that writes a text and reads it as settings."""

    def read(text: str) -> SettingsFile:
        path = tmp_path / "study.yaml"
        path.write_text(text, encoding="utf-8")
        return load_yaml(path)

    return read


def config(settings: SettingsFile) -> StudyConfig:
    return validate(StudyConfig, settings.values, where=settings.path.name, place=settings.place)


def mistake(settings: SettingsFile) -> str:
    """Returns the error of settings, with the file's name alone."""
    with pytest.raises(ConfigError) as error:
        config(settings)
    return str(error.value).replace(str(settings.path), settings.path.name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  lora:\n    rang: 3\n", "line 8, methods.lora.rang"),
        ("  lora:\n    rank:\n      - 8\n      - 0\n", "line 10, methods.lora.rank.1"),
        ("  lora:\n    rank:\n      low: 4\n      hgh: 8\n", "line 10, methods.lora.rank.hgh"),
        ("  lora:\n    rank:\n      low: 4\n", "line 8, methods.lora.rank.high: Field required"),
        ("  lora:\n    rank: {choices: [8, 0]}\n", "line 8, methods.lora.rank.choices.1"),
        ("  lora:\n  loraa:\n", "line 8, methods.loraa: unknown method"),
        ("  none:\n  wide:\n    rank: 8\n    method: loar\n", "line 10, methods.wide.method: unknown method"),
        ("  wide:\n    method: lora\n    rank: 0\n", "line 9, methods.wide.rank"),
        ("  wide:\n    rank: 8\n", "line 7, methods.wide: unknown method"),
        ("  1:\n    method: lora\n    rank: 0\n", "line 9, methods.1.rank"),
        ("  lora: {}\nfinals:\n  best: 2\n  seds: 3\n", "line 10, finals.seds"),
        ("  lora: {}\nbudget:\n  steps: 3\n  tokens: 4\n", "line 10, budget.tokens"),
        ("  lora: {}\ntraining:\n  batch_size: 4\n  learning_rate: 1e-4\n", "line 10, training.learning_rate"),
        ("  lora: &a\n    rank: 0\n  wide:\n    <<: *a\n    method: lora\n", "line 8, methods.lora.rank"),
        ("  none: &a\n    rank: 8\n", "line 8, methods.none.rank"),
    ],
)
def test_the_line_of_a_mistake(file: Any, text: str, said: str) -> None:
    assert mistake(file(HEAD + text)).startswith(f"study.yaml, {said}")


def test_a_missing_setting_is_placed_where_its_section_begins(file: Any) -> None:
    text = "model:\n  name: m\nmethods:\n  lora:\noutput: o\n"
    assert mistake(file(text + "data:\n  limit: 3\n")) == "study.yaml, line 6, data.train: Field required"
    assert mistake(file(text)) == "study.yaml, data: Field required"


def test_the_line_in_a_merged_section_is_the_one_that_counts(file: Any) -> None:
    text = HEAD + "  lora: &a\n    rank: 8\n    alpha: 16\n  wide:\n    <<: *a\n    method: lora\n    rank: 0\n"
    assert mistake(file(text)).startswith("study.yaml, line 13, methods.wide.rank")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: a is given twice; it is also in line 1"),
        ("a:\n  - {b: 1, c: 2}\n  - b: 1\n    b: 2\n", "line 4: a.1.b is given twice; it is also in line 3"),
        ("a: 1\n---\nb: 1\n", "line 2: is not valid YAML"),
        ("a: 1\nb: 2024-13-45\n", "line 2: is not valid YAML ('2024-13-45' cannot be read as timestamp)"),
        ("a: !!int x\n", "line 1: is not valid YAML ('x' cannot be read as int)"),
        ("a: !!python/object/apply:os.getcwd []\n", "line 1: is not valid YAML (could not determine a constructor"),
        ("{[1]: 2}\n", "line 1: is not valid YAML (found unhashable key)"),
        ("[" * 5000, "study.yaml: is not valid YAML (nested too deeply)"),
    ],
)
def test_no_yaml_of_settings(file: Any, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        file(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_section_named_twice_is_not_one_given_twice(file: Any) -> None:
    settings = file(HEAD + "  lora: &a {rank: 8}\n  wide: {<<: *a, method: lora, rank: 16}\n")
    found = config(settings).methods
    assert (found["lora"].flat({})["rank"], found["wide"].flat({})["rank"]) == (8, 16)


def test_a_list_that_holds_itself(file: Any) -> None:
    assert mistake(file("a: &a [*a]\n")).startswith("study.yaml, line 1, a: unknown key 'a'")


def test_numbers_without_a_point(file: Any) -> None:
    """YAML 1.1 takes 1e-4 for a text."""
    text = "  lora:\n    learning_rate: {low: 1e-5, high: 1E-2, log: true}\n    rank: [1e1, 2e+1]\n    alpha: 1e1\n"
    settings = file(HEAD + text)
    settings.assign("methods.full.learning_rate=[1e-5, 3e-5]")
    settings.assign("data.held_out=1e-1")
    found = config(settings)
    rate = getattr(found.methods["lora"], "learning_rate")  # noqa: B009
    assert rate == Range(low=1e-5, high=1e-2, log=True)
    assert found.methods["lora"].dimensions()["rank"] == Choices(choices=(10, 20))
    assert found.methods["lora"].flat({"rank": 10})["alpha"] == 10.0
    assert found.methods["full"].dimensions() == {"learning_rate": Choices(choices=(1e-5, 3e-5))}
    assert found.data.held_out == 0.1
    # as texts, from whoever reads YAML 1.1, they are the same numbers
    texts = yaml.safe_load(HEAD + text.replace("rank: [1e1, 2e+1]", "dropout: [1e-1, 1e-2]"))
    assert texts["methods"]["lora"]["dropout"] == ["1e-1", "1e-2"]
    space = validate(StudyConfig, texts, where="").methods["lora"]
    assert space.dimensions() == {"learning_rate": rate, "dropout": Choices(choices=(0.1, 0.01))}
    for word in ("e5", "1e", "1e-4x", "v1e-4"):
        assert file(f"a: {word}\n").values == {"a": word}


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("methods.lora.rank=[8, 16]", "methods.lora.rank", [8, 16]),
        ("methods.new-1_a.method=lora", "methods.new-1_a.method", "lora"),
        ("methods.none=", "methods.none", None),
        ("search.sampler=tpe", "search.sampler", "tpe"),
        ("finals={best: 1, seeds: 5}", "finals", {"best": 1, "seeds": 5}),
        ("ray=ray://a?b=c", "ray", "ray://a?b=c"),
        (" budget.trials = 3", "budget.trials", 3),
    ],
)
def test_set(file: Any, assignment: str, path: str, value: Any) -> None:
    settings = file(HEAD + "  lora:\n    alpha: 16\n  none:\n")
    before = settings.values
    settings.assign(assignment)
    found: Any = settings.values
    for key in path.split("."):
        found = found[key]
    assert found == value
    config(settings)
    assert before == load_yaml(settings.path).values


def test_set_fills_an_empty_section(file: Any) -> None:
    settings = file(HEAD + "  lora:\n")
    settings.assign("methods.lora.rank=4")
    settings.assign("methods.lora.alpha=8")
    assert settings.values["methods"] == {"lora": {"rank": 4, "alpha": 8}}


def test_set_changes_one_of_two_sections_that_are_the_same(file: Any) -> None:
    settings = file(HEAD + "  a: &a {method: lora, rank: 8}\n  b: *a\n")
    settings.assign("methods.b.rank=4")
    assert [settings.values["methods"][name]["rank"] for name in ("a", "b")] == [8, 4]


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("foo", "--set foo: is no assignment"),
        ("=3", "--set =3: is no assignment"),
        ("methods..rank=3", "is no assignment"),
        (
            "model.name.x=3",
            "--set model.name.x: model.name is 'm', which holds no 'x' to set; give model.name as a whole",
        ),
        ("data.train.0.path=a", "data.train is 'd', which holds no '0' to set"),
        ("methods.lora.rank=[8", "--set methods.lora.rank=[8: is not valid YAML"),
        ("methods.lora={rank: 8, rank: 9}", "rank is given twice; keep one of them"),
    ],
)
def test_set_that_cannot_be(file: Any, assignment: str, said: str) -> None:
    settings = file(HEAD + "  lora:\n")
    with pytest.raises(ConfigError) as error:
        settings.assign(assignment)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("methods.lora.rank=0", "--set, methods.lora.rank: Input should be greater than or equal to 1 (value: 0)"),
        (
            "search.pruner=medain",
            "--set, search.pruner: Input should be 'auto', 'probability', 'successive_halving', 'median' or 'none' "
            "(value: 'medain'); did you mean 'median'?",
        ),
        ("methods.lora.rang=3", "--set, methods.lora.rang: unknown key 'rang'; did you mean 'rank'?"),
        ("methods.loraa.rank=3", "--set, methods.loraa: unknown method 'loraa'; did you mean 'lora'?"),
        ("methods.lora.rank={low: 3}", "--set, methods.lora.rank.high: Field required"),
        ("data={}", "--set, data.train: Field required"),
        ("trainning.steps=3", "--set, trainning: unknown key 'trainning'; did you mean 'training'?"),
        # a mistake of the file is still the file's
        ("methods.none=", "study.yaml, line 8, methods.lora.dropout: Input should be less than 1 (value: 1)"),
    ],
)
def test_a_mistake_on_the_command_line_has_no_line(file: Any, assignment: str, said: str) -> None:
    settings = file(HEAD + "  lora:\n    dropout: 1\n" if "none" in assignment else HEAD + "  lora:\n")
    settings.assign(assignment)
    assert mistake(settings) == said


NO_MODEL = "model:\n  name: ./no-model\ndata:\n  train: d\nmethods:\n  lora:\noutput: o\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "methods.lora.rank=0"), "--set, methods.lora.rank"),
        (("--set", "methods.lora.rank=4", "--set", "search.seed=-1"), "--set, search.seed"),
        (("--set", "foo"), "--set foo: is no assignment"),
        (("--steps", 0), "--steps, budget.steps"),
        (("--device", "gpu"), "--device, model.device"),
        (("--slots", "many"), "--slots, slots"),
        (("--steps", 3, "--set", "training.steps=4"), "--steps, budget.steps: 3 steps, but training.steps is 4"),
        (("--set", "model.name=./other", "--set", "methods.lora.rank='[8, 16]'"), "--set, methods.lora.rank"),
        # these are good, so the next thing that is wrong is told
        ((), "./no-model: no such model folder"),
        (("--set", "model.name=./other", "--set", "methods.lora.rank=[8, 16]"), "./other: no such model folder"),
        (("--steps", 3), "./no-model: no such model folder"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "budget", ["", "budget: {tokens: 9}\n", "training: {steps: 9}\n"], ids=["none", "tokens", "steps"]
)
def test_run(cli: CommandLine, tmp_path: Path, words: tuple[object, ...], said: str, budget: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(NO_MODEL + (budget if "training" not in said else ""))
    line = cli("run", path, "-o", tmp_path / "out", *words).error()
    assert line.startswith(f"error: {said}")
    assert list(tmp_path.iterdir()) == [path]
