"""A model whose positions end: what would run past them is refused before anything is written, or ends one trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pyarrow import parquet
from transformers import AutoModelForCausalLM, GPT2Config

import tiny_world
from command_line import CommandLine
from tiny_tokenizer import tiny_tokenizer

POSITIONS = 70


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a random GPT-2 whose positions hold the tiny data with few virtual tokens."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(
        vocab_size=tiny_world.VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer(tiny_world.VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture
def flags(tmp_path: Path, model: Path, tiny_data: Path) -> tuple[object, ...]:
    return (
        *("finetune", "--model_name_or_path", model, "--train_file", tiny_data, "--max_train_steps", 1),
        *("--output_dir", tmp_path / "out"),
    )


@pytest.fixture
def study(tmp_path: Path, model: Path, tiny_data: Path) -> Path:
    values: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(tiny_data), "held_out": 8},
        "training": {"steps": 2, "batch_size": 4},
        "methods": {"prefix_tuning": {"tokens": [2, 45], "learning_rate": 1e-2}, "lora": {"learning_rate": 1e-3}},
        "finals": {"best": 1, "seeds": 1},
        "logging": {"tensorboard": False},
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("method", ["--use_prefix_tuning", "--use_prompt_tuning"])
def test_virtual_tokens_beyond_the_last_position_are_refused(
    cli: CommandLine, flags: tuple[object, ...], tmp_path: Path, method: str
) -> None:
    line = cli(*flags, method, "--num_virtual_tokens", 45).error()
    assert "the longest example's " in line
    assert " tokens and 45 virtual tokens need " in line
    assert f"the model has {POSITIONS}; use fewer virtual tokens, or give a max_length of 25 or less" in line
    assert not (tmp_path / "out").exists()
    cli(*flags, method, "--num_virtual_tokens", 45, "--max_seq_length", 25).ok()


def test_examples_beyond_the_last_position_are_refused(
    cli: CommandLine, flags: tuple[object, ...], tmp_path: Path
) -> None:
    data = tmp_path / "long.jsonl"
    turns = [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y"}]
    data.write_text(
        "".join(
            json.dumps({"messages": [*turns, {"role": "user", "content": str(n)}, turns[1]]}) + "\n" for n in range(30)
        )
    )
    words = (*flags, "--use_lora", "--train_file", data)
    line = cli(*words).error()
    assert line.startswith("error: max_length: rows are longer than the model's positions: the longest example's ")
    assert f" positions, the model has {POSITIONS}; give a max_length of {POSITIONS} or less" in line
    assert not (tmp_path / "out").exists()


def test_a_setting_beyond_the_last_position_is_a_row_that_failed(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    said = cli("run", study).ok().out
    assert "methods.prefix_tuning: some settings of its space cannot be made (rows are longer than " in said
    rows = parquet.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert {row["tokens"]: row["status"] for row in rows if row["method"] == "prefix_tuning"} == {
        2: "finished",
        45: "failed",
    }
    reasons = {row["reason"] for row in rows if row["status"] == "failed"}
    assert len(reasons) == 1
    assert f"the model has {POSITIONS}" in reasons.pop()


def test_a_method_of_which_no_setting_has_positions_is_refused(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    words = ("run", study, "--set", "methods.prefix_tuning.tokens=[45, 69, 80]")
    for more in ((), ("--dry-run",)):
        line = cli(*words, *more)
        assert line.code == 2
        assert ", methods.prefix_tuning: " in line.err
        assert f"the model has {POSITIONS}" in line.err
        assert "Traceback" not in line.err
    assert not (tmp_path / "out").exists()


def test_an_answer_stops_at_the_last_position_and_a_prompt_beyond_it_is_refused(
    cli: CommandLine, flags: tuple[object, ...], tmp_path: Path
) -> None:
    cli(*flags, "--use_prefix_tuning", "--num_virtual_tokens", 10).ok()
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("1+1\n")
    long.write_text("1+1" * 40 + "\n")
    adapter = tmp_path / "out" / "adapter"
    ran = cli("generate", adapter, "--prompts", short, "--max-new-tokens", 500).ok()
    assert "answer" in ran.out
    line = cli("generate", adapter, "--prompts", long).error()
    assert f"10 virtual tokens leave none of the model's {POSITIONS} positions for an answer" in line


def test_computed_positions_beyond_those_a_model_was_made_for_are_one_warning(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    words = (
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--max_train_steps", 1),
        *("--use_prompt_tuning", "--prompt_init", "random", "--output_dir", tmp_path / "out", "--num_virtual_tokens"),
    )
    text = " positions, the model was made for 256; use fewer virtual tokens"
    assert cli(*words, 250).ok().out.count(text) == 1
    assert text not in cli(*words, 50, "--overwrite_output_dir").ok().out
