"""What a caller from Python gets wrong is a `UserError` in one line; what only looks odd is taken."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pytest
import torch
from transformers import AutoModelForCausalLM

import peft_study
from command_line import conversation
from peft_study import Callback, LoRA, PromptTuning, Study, UserError
from peft_study.data.in_memory import is_rows, write_rows

ROWS = [conversation(i) for i in range(40)]
TALKS = [row["messages"] for row in ROWS]


def study(output: Path, **changed: Any) -> Study:
    """Returns a study of a model that is not there, with some arguments of a caller's."""
    return Study(**{"model": "nowhere", "data": ROWS, "methods": ["lora"], "output": output, **changed})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": None}, "model: an object of type NoneType is no model; give a folder, a hub id, or a causal "),
        ({"model": torch.nn.Linear(2, 2)}, "model: an object of type Linear is no model; "),
        (
            {"data": (row for row in ROWS)},
            "data.train: a value of type generator cannot be taken as rows; give a path,",
        ),
        ({"data": None}, "data.train: None cannot be taken as rows; "),
        ({"data": 3}, "data.train: 3 cannot be taken as rows; "),
        ({"methods": None}, "methods: None is no method; give a name, as 'lora', LoRA(...) and its like, or"),
        ({"methods": [LoRA]}, "methods: a value of type function is no method; "),
        ({"output": None}, "output: None is no folder; give a path"),
        ({"budget": "x", "trials": 2}, "budget: 'x' is not a mapping of settings; give e.g. {'steps': 100}"),
        ({"minutes": 5, "trials": 2}, "minutes: plans trials and steps, but trials is given; give the minutes, or "),
        ({"minutes": 5, "budget": {"tokens": 9}}, "minutes: plans trials and steps, but tokens is given; "),
        ({"minutes": -1}, "minutes: -1 is not above 0; give e.g. 60"),
        ({"minutes": float("inf")}, "minutes: inf is not finite; give e.g. 60"),
        ({"minutes": "x"}, "minutes: 'x' is no number; give e.g. 60"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        study(**{"output": tmp_path, **changed})
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LoRA(rnk=3), "LoRA, rnk: unknown key 'rnk'; did you mean 'rank'?"),
        (
            lambda: PromptTuning(tokens=-1),
            "PromptTuning, tokens: Input should be greater than or equal to 1 (value: -1)",
        ),
        (lambda: LoRA(rank=[]), "LoRA, rank: is empty; give at least one"),
    ],
)
def test_a_mistake_in_a_space_is_one_line(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == said


@pytest.mark.parametrize("callbacks", [Callback(), [object()], [Callback]])
def test_what_is_no_callback_is_refused_before_anything_is_written(callbacks: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"callbacks: .* is no (list of callbacks|callback); give a list of objects"):
        study(tmp_path).run(callbacks=callbacks)
    assert not list(tmp_path.iterdir())


def test_overwrite_and_extend_are_alternatives(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"overwrite and extend\): cannot both be given; keep one of them"):
        study(tmp_path).run(overwrite=True, extend=True)


def test_a_model_in_two_precisions_or_without_weights_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    model.model.layers[0].to(torch.bfloat16)
    with pytest.raises(UserError, match="has matrices in bfloat16 and in float32; give it one"):
        study(tmp_path, model=model)
    with pytest.raises(UserError, match="has no weights"):
        study(tmp_path, model=model.to("meta"))
    with pytest.raises(UserError, match="tokenizer: an object of type int is no tokenizer"):
        study(tmp_path, model=AutoModelForCausalLM.from_pretrained(tiny_model_folder), tokenizer=3)


def test_the_tokenizer_of_a_model_in_memory_may_be_a_folder(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model.name_or_path = ""
    found = study(tmp_path, model=model, tokenizer=tiny_model_folder)
    assert found.config.model.name == "in memory: LlamaForCausalLM"


@pytest.mark.parametrize(
    ("value", "rows"),
    [
        (TALKS, True),
        ([tuple(talk) for talk in TALKS], True),
        (ROWS, True),
        (["a.jsonl", "b.jsonl"], False),
        ([TALKS, "a.jsonl"], False),
        ([TALKS, TALKS], False),
        ([ROWS, ROWS], False),
        ([[{"prompt": "a", "completion": "b"}], [{"prompt": "c", "completion": "d"}]], False),
        ([pandas.DataFrame(ROWS), TALKS], False),
        ([{"path": "a.jsonl", "take": 3}, TALKS], False),
    ],
)
def test_a_list_of_sources_is_told_from_a_list_of_rows(value: Any, rows: bool) -> None:
    assert is_rows(value) is rows


def test_sources_in_memory_are_files_of_their_own(tmp_path: Path) -> None:
    found = study(tmp_path, data=[TALKS, "a.jsonl", pandas.DataFrame(ROWS)])
    paths = [source.path for source in found.config.data.train]
    assert paths == [str(tmp_path / "data/train-1.jsonl"), "a.jsonl", str(tmp_path / "data/train-3.jsonl")]


def test_dates_and_numbers_of_numpy_beside_the_texts_are_written(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "n": numpy.int64(3), "day": datetime(2024, 1, 2), "v": numpy.ones(2)}
    write_rows([row], tmp_path / "rows.jsonl", replace=False)
    written = json.loads((tmp_path / "rows.jsonl").read_text())
    assert written == {"prompt": "a", "completion": "b", "n": 3, "day": "2024-01-02T00:00:00", "v": [1.0, 1.0]}
    # each row of a table gets the other's field, null
    table = datasets.Dataset.from_list([{"call": {"x": 1}}, {"call": {"y": 2}}])
    write_rows(table, tmp_path / "table.jsonl", replace=False)
    assert (tmp_path / "table.jsonl").read_text() == '{"call": {"x": 1}}\n{"call": {"y": 2}}\n'
    said = "row 1 in memory: cannot be written as JSON (a bytes is none of its values); give texts, or leave the column"
    with pytest.raises(UserError, match=re.escape(said)):
        write_rows([{"prompt": b"a"}], tmp_path / "other.jsonl", replace=False)


def test_a_setting_of_both_method_and_training_is_refused(tmp_path: Path) -> None:
    training = {"learning_rate": 5e-4}
    with pytest.raises(UserError, match=r"^learning_rate and training\.learning_rate: is given twice"):
        peft_study.finetune("nowhere", ROWS, LoRA(learning_rate=1e-3), training=training, output=tmp_path / "run")


@pytest.mark.parametrize(
    ("what", "given", "said"),
    [
        ("run.yaml", {"base": "b"}, "base (--base): says nothing of a file of settings; leave it out"),
        (["finetune"], {"columns": {"loss": "l"}}, "columns (--map): says nothing of a command; leave it out"),
        ("log.jsonl", {"batches": []}, "batches: says nothing of what lies in a file or folder; leave it out"),
        (torch.nn.Linear(1, 1), {"training_args": "a"}, "training_args (--training-args): says nothing of a model; "),
    ],
)
def test_the_doctor_refuses_what_it_would_not_read(what: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        peft_study.diagnose(what, **given)
    assert str(error.value).startswith(said)
