"""The 65 arguments: names, types, defaults, and parsing as HfArgumentParser does it."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser

from peft_study.compat.arguments import ExtraArguments, FinetuneArguments
from peft_study.compat.command_line import parse, usage
from peft_study.errors import ConfigError

TABLE = Path(__file__).parents[3] / "shared" / "open-instruct-arguments.tsv"
FIELDS = {item.name: item for item in dataclasses.fields(FinetuneArguments)}
# what the table's types are in Python, and a value for each as a command line writes it and as it is read
TYPES: dict[str, tuple[Any, list[str], Any]] = {
    "str": (str, ["some text"], "some text"),
    "str?": (str | None, ["some text"], "some text"),
    "bool": (bool, ["True"], True),
    "int": (int, ["17"], 17),
    "int?": (int | None, ["17"], 17),
    "float": (float, ["1e-3"], 0.001),
    "dict?": (dict | None, ['{"a": 0.5}'], {"a": 0.5}),
    "list[str]?": (list[str] | None, ["a", "1.0"], ["a", "1.0"]),
    "str/list[str]": (str | list[str], ["wandb", "tensorboard"], ["wandb", "tensorboard"]),
}


def table() -> list[dict[str, str]]:
    if not TABLE.exists():
        pytest.skip(f"the arguments file {TABLE} is not on this machine")
    with TABLE.open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def default_in(text: str) -> Any:
    """Reads a default as the table writes it: ``"finetune" (file name)``, ``-1 (off)``, ``True (user fork: False)``."""
    fork = re.search(r"user fork: (\w+)", text)
    return yaml.safe_load((fork[1] if fork else text.split(" (")[0]).replace("None", "null").replace("2e-5", "2.0e-5"))


def test_the_table_is_accepted_row_by_row() -> None:
    rows = table()
    assert len(rows) == 65
    assert {row["name"] for row in rows} == set(FIELDS)
    hints = get_type_hints(FinetuneArguments)
    defaults = parse([]).arguments
    for row in rows:
        name = row["name"]
        kind, words, value = TYPES[row["type"]]
        if choices := FIELDS[name].metadata.get("choices"):
            words, value = [choices[-1]], choices[-1]
        assert hints[name] == kind, name
        assert getattr(defaults, name) == default_in(row["default"]), name
        command = parse([f"--{name}", *words])
        assert getattr(command.arguments, name) == value, name
        assert command.given == {name}
        changed = {key for key in FIELDS if getattr(command.arguments, key) != getattr(defaults, key)}
        assert changed <= {name}


SINGLE = {"str", "int", "float"}
WORDS = {
    "str": st.text("abc/._1", min_size=1, max_size=8),
    "int": st.integers(-99, 99).map(str),
    "float": st.floats(0, 1).map(repr),
}
BOOLS = [name for name, item in FIELDS.items() if isinstance(item.default, bool)]


def _kind(name: str) -> str | None:
    text = str(get_type_hints(FinetuneArguments)[name]).replace(" | None", "")
    return next((kind for kind in SINGLE if text in (kind, f"<class '{kind}'>")), None)


def _words(name: str) -> st.SearchStrategy[str]:
    choices = FIELDS[name].metadata.get("choices")
    return st.sampled_from(choices) if choices else WORDS[str(_kind(name))]


FLAG = st.one_of(
    st.sampled_from([name for name in FIELDS if _kind(name)]).flatmap(
        lambda name: _words(name).map(lambda word: [f"--{name}", word])
    ),
    st.sampled_from(BOOLS).map(lambda name: [f"--{name}"]),
    st.tuples(st.sampled_from(BOOLS), st.sampled_from(["True", "False", "true", "0"])).map(
        lambda pair: [f"--{pair[0]}", pair[1]]
    ),
    st.sampled_from([name for name in BOOLS if FIELDS[name].default]).map(lambda name: [f"--no_{name}"]),
    st.just(["--dataset_mixer_list", "a", "0.5", "b", "1.0"]),
    st.just(["--report-to", "wandb"]),
)


@settings(max_examples=120, deadline=None)
@given(flags=st.lists(FLAG, max_size=6))
def test_flags_parse_as_with_hf_argument_parser(flags: list[list[str]]) -> None:
    argv = [word for words in flags for word in words]
    (expected,) = HfArgumentParser(FinetuneArguments).parse_args_into_dataclasses(argv, look_for_args_file=False)
    if expected.report_to is None:
        # HfArgumentParser drops the default of `str | list[str]`, so the original saw None where its file says "all"
        expected = dataclasses.replace(expected, report_to="all")
    command = parse(argv)
    assert command.arguments == expected
    names = {words[0].lstrip("-").replace("-", "_").removeprefix("no_") for words in flags}
    assert command.given == names


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_yaml_alone_and_with_overrides(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.yaml",
        "model_name_or_path: meta-llama/Llama-3.2-1B\nuse_lora: true\nlearning_rate: 1e-4\nnum_train_epochs: 3\n"
        "dataset_mixer:\n  allenai/tulu: 0.5\nreport_to:\n  - wandb\ncheckpointing_steps: 500\nwandb_entity: null\n"
        "lora_alpha: 32\neval_steps: 7\n",
    )
    command = parse([file])
    assert command.arguments.learning_rate == 1e-4
    assert command.arguments.dataset_mixer == {"allenai/tulu": 0.5}
    assert command.arguments.report_to == ["wandb"]
    assert command.arguments.checkpointing_steps == "500"
    assert command.extra.eval_steps == 7
    assert command.given == {
        "model_name_or_path", "use_lora", "learning_rate", "num_train_epochs", "dataset_mixer", "report_to",
        "checkpointing_steps", "lora_alpha", "eval_steps",
    }  # fmt: skip
    changed = parse([file, "--learning_rate=2e-3", "--use_lora=False", "--seed", "3", "--report_to=wandb,aim"])
    assert changed.arguments.learning_rate == 2e-3
    assert changed.arguments.use_lora is False
    assert changed.arguments.seed == 3
    assert changed.arguments.num_train_epochs == 3
    assert changed.arguments.report_to == ["wandb", "aim"]
    assert changed.given == command.given | {"seed"}


def test_a_yaml_file_may_follow_launch_arguments_and_the_script(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yml", "seed: 9\n")
    command = parse(["--num_processes", "2", "finetune.py", file, "--use_lora"])
    assert command.arguments.seed == 9
    assert command.arguments.use_lora
    assert command.launch.processes == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown argument 'learning_rat'; did you mean 'learning_rate'?"),
        ("learning_rate: fast", "learning_rate: 'fast' is not a number"),
        ("learning_rate: true", "learning_rate: 'True' is not a number"),
        ("num_train_epochs: 1.5", "num_train_epochs: '1.5' is not a whole number"),
        ("use_lora: maybe", "use_lora: 'maybe' is not True or False"),
        ("dataset_mixer: [a]", "dataset_mixer: ['a'] is not"),
        ("train_file: {a: 1}", "train_file: {'a': 1} is not"),
        ("- a", "is not a mapping of settings"),
        ("", "is not a mapping of settings"),
        ("seed: 1\na: [", "line 2: is not valid YAML"),
        ("seed: 1\nseed: 2", "line 2: seed is given twice"),
        ("seed: !!int x", "line 1: is not valid YAML ('x' cannot be read as int)"),
    ],
)
def test_a_mistake_in_a_yaml_file_gives_one_line_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as error:
        parse([file])
    assert message in str(error.value)
    assert file in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--learning_rate", "x"], "--learning_rate: 'x' is not a number"),
        (["--lora_rank", "1.5"], "--lora_rank: '1.5' is not a whole number"),
        (["--learning_rate=--"], "--learning_rate: needs a value"),
        (["--learning_rate"], "--learning_rate: needs a value; write --learning_rate VALUE"),
        (["--use_lora=maybe"], "--use_lora: 'maybe' is not True or False"),
        (["--use_lora", "maybe"], "unexpected value 'maybe'"),
        (["--no_fused_optimizer=x"], "--no_fused_optimizer: takes no value"),
        (["--dataset_mixer", "["], "--dataset_mixer: '[' is not a mapping"),
        (["--dataset_mixer_list"], "--dataset_mixer_list: needs a value"),
        (["--learn", "1"], "unknown argument '--learn'"),
        (["--lora-rnk", "1"], "unknown argument '--lora-rnk'; did you mean '--lora_rank'?"),
    ],
)
def test_a_mistake_on_the_command_line_gives_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_negative_numbers_are_values() -> None:
    assert parse(["--learning_rate", "-1e-4"]).arguments.learning_rate == -1e-4
    assert parse(["--clip_grad_norm", "-inf"]).arguments.clip_grad_norm == float("-inf")


def test_the_help_lists_every_argument() -> None:
    text = usage()
    for item in (*FIELDS.values(), *dataclasses.fields(ExtraArguments)):
        assert f"--{item.name}" in text
        assert item.metadata["help"]
