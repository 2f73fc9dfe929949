"""What a run leaves is used as the run says: prompts of every form, and models trained as a whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from command_line import CommandLine, listing


@pytest.fixture
def adapter(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Path:
    """Returns a LoRA adapter of one step."""
    cli(
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--use_lora"),
        *("--max_train_steps", 1, "--output_dir", tmp_path / "out"),
    ).ok()
    return tmp_path / "out" / "adapter"


def test_prompts_of_every_form(cli: CommandLine, adapter: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
    rows = [
        {"messages": [*turns, {"role": "assistant", "content": "2"}]},
        {"prompt": "2+2", "response": "4"},
        {"instruction": "Add.", "input": "3+3", "output": "6"},
        {"question": "4+4", "answer": "8"},
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = cli("generate", adapter, "--prompts", prompts, "--max-new-tokens", 2).ok()
    found = [json.loads(line)["prompt"] for line in ran.out.splitlines()]
    assert found == [turns, *([{"role": "user", "content": text}] for text in ("2+2", "Add.\n\n3+3", "4+4"))]


def test_a_model_trained_as_a_whole(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    """The line that such a run ends with works as it stands."""
    ran = cli(
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data),
        *("--max_train_steps", 1, "--dtype", "float32", "--output_dir", tmp_path / "out"),
    ).ok()
    (line,) = [line for line in ran.out.splitlines() if line.startswith("try it: peft-study ")]
    words = line.removeprefix("try it: peft-study ").split()
    assert cli(*words, "--max-new-tokens", 2, stdin="1+1\n").ok().out.startswith("you: adapter: ")


def test_another_base_is_warned_of_in_one_line(
    cli: CommandLine, adapter: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    (line,) = cli("chat", adapter, "--base", other, stdin="").ok().err.splitlines()
    assert line.startswith("warning: ")
    assert str(tiny_model_folder) in line
    assert cli("chat", adapter, stdin="").ok().err == ""


def test_merging_leaves_only_the_model(cli: CommandLine, adapter: Path, tmp_path: Path) -> None:
    before = listing(adapter)
    cli("merge", adapter, "-o", tmp_path / "merged").ok()
    assert listing(adapter) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "out"]


def test_a_model_that_lacks_weights_is_not_filled_with_random_ones(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    tensors = load_file(other / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    del tensors[lost]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    line = cli(
        *("finetune", "--model_name_or_path", other, "--train_file", tiny_data, "--use_lora"),
        *("--output_dir", tmp_path / "out"),
    ).error()
    assert f"{other}: its files lack 1 weights, {lost} first; " in line
    assert not (tmp_path / "out").exists()
