"""What `Study` and `finetune` take for model, data and methods, and what they refuse in one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_study
from command_line import conversation
from peft_study import LoRA, PromptTuning, Range, Study
from peft_study.errors import ConfigError, ModelError

ROWS = [conversation(i) for i in range(60)]


def test_the_arguments_are_those_of_a_study_file(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        "model: {name: m}\ndata: {train: t.jsonl}\nbudget: {trials: 12, steps: 200}\noutput: out\n"
        "methods: {lora: {rank: [8, 32]}, prompt_tuning: {learning_rate: {low: 0.01, high: 1, log: true}}}\n"
        "training: {batch_size: 4}\n"
    )
    spaces = [LoRA(rank=[8, 32]), PromptTuning(learning_rate=Range(low=0.01, high=1, log=True))]
    ours = Study("m", "t.jsonl", spaces, trials=12, steps=200, training={"batch_size": 4}, output="out")
    assert ours.config == Study.from_yaml(path).config
    fewer = Study.from_yaml(path, {"budget.trials": 3, "output": "short"}).config
    assert (fewer.budget.trials, str(fewer.output), fewer.budget.steps) == (3, "short", 200)


@pytest.mark.parametrize(
    ("methods", "names"),
    [
        ("lora", {"lora": "lora"}),
        (LoRA(rank=4), {"lora": "lora"}),
        (["lora", "prompt_tuning"], {"lora": "lora", "prompt_tuning": "prompt_tuning"}),
        ([LoRA(rank=4), LoRA(rank=8), "full"], {"lora": "lora", "lora-2": "lora", "full": "full"}),
        ({"small": LoRA(rank=4), "full": {"learning_rate": 1e-5}}, {"small": "lora", "full": "full"}),
    ],
)
def test_methods_are_named(methods: Any, names: dict[str, str]) -> None:
    found = Study("m", "t.jsonl", methods).config.methods
    assert {name: space.kind for name, space in found.items()} == names


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Study("m", "t.jsonl", ["lra"]), "Study, methods.lra: unknown method 'lra'; did you mean 'lora'?"),
        (lambda: Study("m", "t.jsonl", trails=3), "Study, trails: is no argument; did you mean 'trials'?"),
        (
            lambda: Study("m", "t.jsonl", trials=3, budget={"trials": 4}),
            "trials and budget.trials: is given twice; keep one of them",
        ),
        (
            lambda: Study("m", "t.jsonl", trials=0),
            "Study, budget.trials: Input should be greater than or equal to 1 (value: 0)",
        ),
        (
            lambda: Study("m", "t.jsonl", [3]),
            "methods: 3 is no method; give a name, as 'lora', LoRA(...) and its like, or a configuration of peft",
        ),
        (lambda: LoRA(rank=[8, 0]), "LoRA, rank.1: Input should be greater than or equal to 1 (value: 0)"),
        (
            lambda: Study("m", {"train": "t.jsonl", "held_out": -1}),
            "Study, data.held_out: a comparison needs held-out rows: give a number above 0 (value: -1)",
        ),
        (
            lambda: peft_study.finetune("m", "t.jsonl", LoRA(rank=[2, 4])),
            "method: has several values of rank, but one setting is trained; give one value of each, "
            "or compare them with Study",
        ),
        (lambda: peft_study.finetune("m", "t.jsonl", "lra"), "method: unknown method 'lra'; did you mean 'lora'?"),
    ],
)
def test_mistakes_are_one_line(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert str(error.value) == said


PEFT = [
    (peft.LoraConfig(r=4, lora_alpha=8), {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    (
        peft.LoraConfig(r=4, use_rslora=True, lora_dropout=0.1, target_modules=["k_proj"], task_type="CAUSAL_LM"),
        {"rank": 4, "rslora": True, "dropout": 0.1, "target_modules": ["k_proj"]},
    ),
    (peft.PromptTuningConfig(num_virtual_tokens=5), {"tokens": 5, "init": "random"}),
    (
        peft.PromptTuningConfig(
            num_virtual_tokens=5,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="add",
            tokenizer_name_or_path="anything",
        ),
        {"tokens": 5, "init": "text", "init_text": "add"},
    ),
    (peft.PrefixTuningConfig(num_virtual_tokens=5), {"tokens": 5, "init": "random"}),
    (peft.PrefixTuningConfig(num_virtual_tokens=5, init_weights="zero"), {"tokens": 5, "init": "zero"}),
]


@pytest.mark.parametrize(("config", "settings"), PEFT, ids=lambda value: type(value).__name__)
def test_a_configuration_of_peft_is_a_setting(tiny_model_folder: Path, config: Any, settings: dict[str, Any]) -> None:
    (space,) = Study(str(tiny_model_folder), "t.jsonl", [config]).config.methods.values()
    found = space.model_dump(mode="json")
    searched = {"choices": settings.get("target_modules")}  # a list is what a space searches
    for name, value in settings.items():
        assert found[name] in (value, searched), name


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.LoraConfig(use_dora=True), "LoraConfig.use_dora: True is not trained here; leave it at False"),
        (peft.LoraConfig(bias="all"), "LoraConfig.bias: 'all' is not trained here; leave it at 'none'"),
        (
            peft.LoraConfig(rank_pattern={"q": 2}),
            "LoraConfig.rank_pattern: {'q': 2} is not trained here; leave it at {}",
        ),
        (
            peft.LoraConfig(task_type="SEQ_CLS"),
            "LoraConfig.task_type: 'SEQ_CLS' is not trained here; leave it at None",
        ),
        (
            peft.LoraConfig(target_modules=".*q_proj"),
            "LoraConfig.target_modules: '.*q_proj' is a pattern; give a list of names, or 'all-linear'",
        ),
        (peft.IA3Config(), "IA3Config: IA3 is not trained here; give LORA, PREFIX_TUNING or PROMPT_TUNING"),
    ],
    ids=["dora", "bias", "ranks", "task", "pattern", "ia3"],
)
def test_what_peft_trains_and_we_do_not_is_refused_by_its_field(
    tiny_model_folder: Path, config: Any, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        Study(str(tiny_model_folder), "t.jsonl", [config])
    assert str(error.value) == said


def test_peft_trains_the_adapter_that_its_configuration_describes(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"])
    trained = peft_study.finetune(
        str(tiny_model_folder), str(tiny_data), config, steps=2, output=tmp_path / "run", verbose=False
    )
    kept = peft.LoraConfig.from_pretrained(trained.adapter_path)
    assert (kept.r, kept.lora_alpha, set(kept.target_modules)) == (3, 6, {"q_proj", "up_proj"})


def test_what_is_no_base_is_refused(tiny_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    with pytest.raises(ModelError, match="carries an adapter; take it off"):
        Study(peft.get_peft_model(model, peft.LoraConfig(r=2)), ROWS)
    bare = AutoModelForCausalLM.from_config(model.config)
    bare.name_or_path = ""
    with pytest.raises(ModelError, match=r"names no folder to load a tokenizer from; give tokenizer=\.\.\."):
        Study(bare, ROWS)
    with pytest.raises(ConfigError, match="tokenizer: is an object, but the model is not"):
        Study("m", ROWS, tokenizer=AutoTokenizer.from_pretrained(model.name_or_path))


def test_a_method_shows_its_settings_where_it_is_called() -> None:
    parameters = inspect.signature(PromptTuning).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "tokens": 50,
        "init": "text",
        "init_text": None,
        "learning_rate": None,
        "warmup_ratio": 0.03,
        "weight_decay": 0.0,
    }
    assert all(f"    {name}: " in (PromptTuning.__doc__ or "") for name in parameters)
