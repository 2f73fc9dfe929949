"""Bad settings, models and adapters: one line with field, value and remedy, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from safetensors.torch import load_file

from command_line import CommandLine, listing

FINETUNE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown argument": (("--use_lora", "--lora_ranks", "8"), ("--lora_ranks", "--lora_rank")),
    "rank 0": (("--use_lora", "--lora_rank", "0"), ("--lora_rank", "0", "at least 1")),
    "tokens below 0": (("--use_prompt_tuning", "--num_virtual_tokens", "-3"), ("--num_virtual_tokens", "-3")),
    "tokens not whole": (("--use_prompt_tuning", "--num_virtual_tokens", "3.5"), ("3.5", "whole number")),
    "rate 0": (("--use_lora", "--learning_rate", "0"), ("--learning_rate", "above 0")),
    "rate below 0": (("--use_lora", "--learning_rate", "-1e-4"), ("--learning_rate", "-0.0001", "above 0")),
    "rate nan": (("--use_lora", "--learning_rate", "nan"), ("--learning_rate", "nan", "finite")),
    "rate inf": (("--use_lora", "--learning_rate", "inf"), ("--learning_rate", "inf", "finite")),
    "rate a word": (("--use_lora", "--learning_rate", "fast"), ("--learning_rate", "fast", "a number")),
    "two methods": (("--use_lora", "--use_prefix_tuning"), ("--use_lora", "--use_prefix_tuning", "one method")),
    "qlora alone": (("--use_qlora",), ("--use_qlora", "--use_lora")),
    "unknown schedule": (("--use_lora", "--lr_scheduler_type", "linaer"), ("--lr_scheduler_type", "'linear'")),
    "unknown template": (("--use_lora", "--chat_template_name", "tullu"), ("tullu", "'tulu'")),
    "held out file": (("--use_lora", "--held_out", "no.jsonl"), ("--held_out", "no.jsonl")),
    "all held out": (("--use_lora", "--held_out", "60"), ("held_out", "60", "hold out fewer")),
    "too many tokens": (
        ("--use_prompt_tuning", "--prompt_init", "vocab", "--num_virtual_tokens", "300"),
        ("prompt_tuning", "300", "fewer tokens"),
    ),
    "no checkpoint": (("--use_lora", "--resume_from_checkpoint", "."), ("holds no whole checkpoint", "step_N")),
    "no such checkpoint": (("--use_lora", "--resume_from_checkpoint", "./no"), ("--resume_from_checkpoint", "no")),
}


@pytest.fixture
def flags(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Returns a good command line without its method, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return (
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--max_train_steps", 1),
        *("--output_dir", tmp_path / "out"),
    )


def _holds(line: str, words: tuple[str, ...]) -> None:
    for word in words:
        assert word in line, (word, line)


@pytest.mark.parametrize("case", FINETUNE, ids=[name.replace(" ", "-") for name in FINETUNE])
def test_finetune(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path, case: str) -> None:
    words, said = FINETUNE[case]
    _holds(cli(*flags, *words).error(), said)
    assert list(tmp_path.iterdir()) == []


def test_finetune_needs_model_and_data(cli: CommandLine, tiny_model_folder: Path, tiny_data: Path) -> None:
    _holds(cli("finetune", "--use_lora", "--train_file", tiny_data).error(), ("--model_name_or_path",))
    _holds(cli("finetune", "--use_lora", "--model_name_or_path", tiny_model_folder).error(), ("--train_file",))


def test_processes_that_nobody_launched(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    with patch.dict(os.environ, {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}):
        line = cli(*flags, "--use_lora").error()
    _holds(line, ("the 2 processes could not join", "torchrun --nproc-per-node N"))
    assert list(tmp_path.iterdir()) == []


def test_qlora_without_bitsandbytes(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    with patch.dict("sys.modules", {"bitsandbytes": None}):
        line = cli(*flags, "--use_lora", "--use_qlora").error()
    _holds(line, ("bitsandbytes", "pip install"))
    assert list(tmp_path.iterdir()) == []


STUDY: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown key": ({"training.stepps": 3}, ("stepps", "'steps'")),
    "unknown section": ({"trainning": {}}, ("trainning", "'training'")),
    "unknown method": ({"methods.loraa": {}}, ("loraa", "'lora'")),
    "unknown key of a method": ({"methods.lora.rang": 3}, ("rang", "'rank'")),
    "rank 0": ({"methods.lora.rank": 0}, ("rank", "greater than or equal to 1", "0")),
    "tokens 0": ({"methods.prefix_tuning.tokens": 0}, ("tokens", "greater than or equal to 1", "0")),
    "rate 0": ({"methods.lora.learning_rate": [0]}, ("methods.lora.learning_rate.0", "greater than 0", "value: 0")),
    "rate below 0": ({"methods.lora.learning_rate": -1e-4}, ("learning_rate", "-0.0001")),
    "rate nan": ({"methods.lora.learning_rate": [float("nan")]}, ("learning_rate", "nan")),
    "rate a word": ({"methods.lora.learning_rate": ["fast"]}, ("learning_rate", "fast")),
    "rate infinite": ({"methods.lora.learning_rate": float("inf")}, ("learning_rate", "finite", "inf")),
    "no rates": ({"methods.lora.learning_rate": []}, ("learning_rate", "is empty")),
    "null among the rates": ({"methods.lora.learning_rate": [1e-3, None]}, ("learning_rate.1", "None")),
    "low above high": ({"methods.lora.rank": {"low": 8, "high": 4}}, ("methods.lora.rank", "low 8", "high 4")),
    "low is high": ({"methods.lora.rank": {"low": 8, "high": 8}}, ("methods.lora.rank", "low 8", "high 8")),
    "log of 0": ({"methods.lora.dropout": {"low": 0, "high": 0.5, "log": True}}, ("dropout.low", "0 has no logarithm")),
    "range from 0": ({"methods.lora.rank": {"low": 0, "high": 8}}, ("rank.low", "greater than or equal to 1", "0")),
    "range to 1": ({"methods.lora.dropout": {"low": 0, "high": 1}}, ("dropout.high", "less than 1", "value: 1")),
    "range of halves": ({"methods.lora.rank": {"low": 1.5, "high": 8}}, ("rank.low", "integer", "1.5")),
    "range to infinity": ({"methods.lora.rank": {"low": 1, "high": float("inf")}}, ("rank.high", "finite", "inf")),
    "range without end": ({"methods.lora.rank": {"low": 1}}, ("rank.high", "required")),
    "range of words": ({"methods.lora.target_modules": {"low": 1, "high": 2}}, ("target_modules", "no number", "list")),
    "range of truths": ({"methods.lora.rslora": {"low": 0, "high": 1}}, ("rslora", "no number", "list")),
    "mistyped end": ({"methods.lora.rank": {"low": 1, "hgh": 8}}, ("rank.hgh", "did you mean 'high'")),
    "mistyped choices": ({"methods.lora.rank": {"choises": [8]}}, ("rank.choises", "did you mean 'choices'")),
    "choice 0": ({"methods.lora.rank": {"choices": [8, 0]}}, ("rank.choices.1", "greater than or equal to 1", "0")),
    "no choice": ({"methods.lora.rank": {"choices": []}}, ("rank.choices", "is empty")),
    "dropout 1": ({"methods.lora.dropout": 1}, ("methods.lora.dropout", "less than 1", "value: 1")),
    "budget key": ({"budget": {"trails": 3}}, ("budget.trails", "did you mean 'trials'")),
    "search key": ({"search": {"sampeler": "tpe"}}, ("search.sampeler", "did you mean 'sampler'")),
    "finals key": ({"finals": {"sed": 3}}, ("finals.sed", "did you mean 'seeds'")),
    "source key": ({"data.train": [{"path": "a", "tke": 3}]}, ("data.train.0.tke", "did you mean 'take'")),
    "key of a named space": ({"methods.wide": {"method": "lora", "rang": 3}}, ("methods.wide.rang", "'rank'")),
    "unknown method of a name": ({"methods.wide": {"method": "loar"}}, ("methods.wide.method", "loar", "'lora'")),
    "method that is a list": ({"methods.wide": {"method": ["lora"]}}, ("methods.wide.method", "unknown method")),
    "another method's name": ({"methods.lora.method": "full"}, ("methods.lora.method", "full", "another name")),
    "name with a blank": ({"methods.a b": {"method": "lora"}}, ("methods.a b", "letters", "another name")),
    "key that is a number": ({"training": {3: 4}}, ("training.3", "unknown key '3'")),
    "two budgets": ({"budget": {"steps": 3, "tokens": 9}}, ("budget.tokens", "not both")),
    "two numbers of steps": ({"budget": {"steps": 3}}, ("budget.steps", "3 steps", "training.steps is 1")),
    "steps and tokens": ({"budget": {"tokens": 3}}, ("budget.tokens", "training.steps", "one of them")),
    "empty section": ({"search": None}, ("search", "is empty")),
    "section a number": ({"search": 3}, ("search", "3 is not a mapping")),
    "sampler": ({"search": {"sampler": "tpee"}}, ("search.sampler", "'tpe'", "tpee")),
    "unknown column": ({"data.mapping": {"mesages": "a"}}, ("data.mapping", "'mesages'", "'messages'")),
    "half a pair of columns": ({"data.mapping": {"prompt": "q"}}, ("data.mapping", "prompt and response go together")),
    "rows and a half": ({"data.train": [{"path": "a", "take": 1.5}]}, ("data.train.0.take", "neither a whole number")),
    "schedule without its warm-up": (
        {"training.schedule": "constant_with_warmup", "methods.lora.warmup_ratio": [0, 0.1]},
        ("methods.lora.warmup_ratio", "needs a warm-up", "leave out 0"),
    ),
    "data a number": ({"data.train": 3}, ("data.train", "3 is not a mapping")),
    "held out a list": ({"data.held_out": [3]}, ("data.held_out", "a valid number or a valid string", "[3]")),
    "no methods": ({"methods": {}}, ("methods",)),
    "methods a list of words": ({"methods": ["lora"]}, ("methods", "lora")),
    "method a number": ({"methods.lora": 3}, ("methods", "lora", "3")),
    "rate of all methods": ({"training.learning_rate": 1e-4}, ("learning_rate", "under each method")),
    "no model": ({"model": None}, ("model", "is empty")),
    "no data": ({"data": {}}, ("data.train",)),
    "steps 0": ({"training.steps": 0}, ("training.steps", "0")),
    "nothing held out": ({"data.held_out": 0}, ("held_out", "above 0")),
    "no such module": ({"methods.lora.target_modules": ["q_prj"]}, ("q_prj", "q_proj")),
    "model missing": ({"model.name": "./no-model"}, ("no-model", "no such model folder")),
    "slots 0": ({"slots": 0}, ("slots", "neither auto nor a whole number above 0", "0")),
    "slots a word": ({"slots": "many"}, ("slots", "neither auto", "many")),
    "slots squared": ({"slots": "\u00b2"}, ("slots", "neither auto")),
    "slots half": ({"slots": 1.5}, ("slots", "1.5")),
    "unknown device": ({"model.device": "gpu"}, ("model.device", "cuda", "gpu")),
}


KNOWN_LATER = ("no such module", "model missing")
"""Mistakes that only the model or its folder shows; all others are told with the line they stand in."""


def _study(folder: Path, model: Path, data: Path, changes: dict[str, Any] | None = None) -> Path:
    """Writes a study file into a folder, changed at the named places (a.b.c), and returns it."""
    settings: dict[str, Any] = {
        "model": {"name": str(model)},
        "data": {"train": str(data)},
        "training": {"steps": 1},
        "methods": {"lora": {"rank": 2}},
        "output": str(folder / "out"),
    }
    for place, value in (changes or {}).items():
        inner = settings
        *parents, last = place.split(".")
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("case", STUDY, ids=[name.replace(" ", "-") for name in STUDY])
def test_run(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, case: str) -> None:
    changes, said = STUDY[case]
    path = _study(tmp_path, tiny_model_folder, tiny_data, changes)
    _holds(cli("run", path).error(), (*said, *(() if case in KNOWN_LATER else (f"error: {path}, line ",))))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {name: a", ("study.yaml", "line", "not valid YAML")),
        ("a: b\n c: d\n", ("study.yaml, line 2", "not valid YAML")),
        ("- a\n- b\n", ("study.yaml", "not a mapping")),
        ("", ("study.yaml", "not a mapping")),
        ("\x00", ("study.yaml", "not valid YAML")),
    ],
    ids=["unclosed", "indented", "list", "empty", "binary"],
)
@pytest.mark.parametrize("command", ["run", "finetune"])
def test_yaml_that_cannot_be_read(cli: CommandLine, tmp_path: Path, command: str, text: str, said: Any) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    _holds(cli(command, path).error(), said)
    assert list(tmp_path.iterdir()) == [path]


def test_yaml_that_is_not_there(cli: CommandLine, tmp_path: Path) -> None:
    _holds(cli("run", tmp_path / "no.yaml").error(), ("no.yaml", "No such file", "check the path"))
    _holds(cli("finetune", tmp_path / "no.yaml").error(), ("no.yaml",))
    (tmp_path / "latin.yaml").write_bytes("a: für\n".encode("latin-1"))
    _holds(cli("run", tmp_path / "latin.yaml").error(), ("latin.yaml", "not UTF-8"))


def test_command_line_itself(cli: CommandLine, tmp_path: Path) -> None:
    _holds(cli("runn").error(), ("runn",))
    _holds(cli("run").error(), ("STUDY",))
    _holds(cli("run", tmp_path / "a.yaml", "--stpes", "3").error(), ("--stpes", "--steps"))
    _holds(cli("run", tmp_path / "a.yaml", "--steps", "three").error(), ("--steps", "integer"))
    _holds(cli("data", "convert", tmp_path / "a.jsonl").error(), ("--output",))


def _without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _torn(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def _garbled(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4000)


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _config_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _pickle_only(folder: Path) -> None:
    """Keeps all the weights, in the form that is not loaded: a pickle may run code."""
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()


MODELS = {
    "no tokenizer": (_without_tokenizer, ("tokenizer",)),
    "no chat template": (_without_template, ("no chat template", "chat_template", "give tulu")),
    "torn weights": (_torn, ("no causal language model",)),
    "garbled weights": (_garbled, ("no causal language model",)),
    "no config": (_without_config, ("config.json",)),
    "torn config": (_config_is_no_json, ("model",)),
    "pickle only": (_pickle_only, ("safetensors",)),
}


@pytest.mark.parametrize("command", ["run", "finetune"])
@pytest.mark.parametrize("case", MODELS, ids=[name.replace(" ", "-") for name in MODELS])
def test_model_folder(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, case: str, command: str
) -> None:
    spoil, said = MODELS[case]
    model = tmp_path / "broken-model"
    shutil.copytree(tiny_model_folder, model)
    spoil(model)
    study = _study(tmp_path, model, tiny_data)
    before = listing(tmp_path)
    if command == "run":
        ran = cli("run", study)
    else:
        words = ("--model_name_or_path", model, "--train_file", tiny_data, "--use_lora", "--chat_template", "own")
        ran = cli("finetune", *words, "--output_dir", tmp_path / "out")
    _holds(ran.error(), ("broken-model", *said) if case != "no chat template" else said)
    assert listing(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_soft_prompts_cannot_be_merged(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path, method: str) -> None:
    cli(*flags, f"--use_{method}").ok()
    before = listing(tmp_path)
    line = cli("merge", tmp_path / "out" / "adapter", "-o", tmp_path / "merged").error()
    _holds(line, (f"{method.replace('_', ' ')} cannot be merged", "PeftModel.from_pretrained", "peft-study chat"))
    assert listing(tmp_path) == before


def test_folders_without_adapter(cli: CommandLine, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1+1\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (empty, tmp_path / "none"):
        for words in (
            ("merge", folder, "-o", tmp_path / "merged"),
            ("chat", folder),
            ("generate", folder, "--prompts", prompts, "-o", tmp_path / "answers.jsonl"),
        ):
            _holds(cli(*words).error(), (str(folder), "adapter_config.json", "adapter folder of a finished run"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "prompts.txt"]


def test_damaged_adapters(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    cli(*flags, "--use_lora").ok()
    adapter = tmp_path / "out" / "adapter"
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    whole, settings = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:1000])
    _holds(cli("chat", adapter).error(), ("adapter",))
    _holds(cli("merge", adapter, "-o", tmp_path / "merged").error(), ("adapter",))
    weights.unlink()
    _holds(cli("chat", adapter).error(), ("adapter",))
    weights.write_bytes(whole)
    config.write_text(settings[:40])
    _holds(cli("chat", adapter).error(), ("adapter_config.json", "not valid JSON"))
    config.write_text(settings)
    note = adapter / "peft_study.json"
    note.write_text("{")
    _holds(cli("chat", adapter).error(), ("peft_study.json", "not valid JSON"))
    note.unlink()
    config.write_text(json.dumps({**json.loads(settings), "base_model_name_or_path": "/no/model"}))
    _holds(cli("chat", adapter).error(), ("/no/model", "no such model folder"))
    assert not (tmp_path / "merged").exists()


def test_merge_into_a_folder_in_use(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    cli(*flags, "--use_lora").ok()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = listing(tmp_path)
    line = cli("merge", tmp_path / "out" / "adapter", "-o", tmp_path / "full").error()
    _holds(line, ("full", "not an empty folder", "another -o"))
    assert listing(tmp_path) == before
