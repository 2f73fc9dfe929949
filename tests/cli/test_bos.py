"""A tokenizer that puts BOS before a text by itself, and a chat template that does not: every command says so."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny_world
from command_line import CommandLine
from tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer, with_bos

MISSING = "no example begins with BOS: the tokenizer puts '<s>' before a text by itself"
WRITES_BOS = "{{ bos_token }}" + CHAT_TEMPLATE


@pytest.fixture
def model(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """Returns the tiny model with a tokenizer that puts BOS first by itself; its template does not write it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    with_bos(tiny_tokenizer(tiny_world.VOCABULARY)).save_pretrained(folder)
    return folder


def finetune(model: Path, data: Path, output: Path, *more: object) -> tuple[object, ...]:
    flags = ("--use_lora", "--chat_template", "own", "--max_train_steps", 1, "--dtype", "float32", "--held_out", 8)
    return ("finetune", "--model_name_or_path", model, "--train_file", data, "--output_dir", output, *flags, *more)


def study(folder: Path, model: Path, train: Path, **data: Any) -> Path:
    path = folder / "study.yaml"
    values = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(train), "held_out": 8, **data},
        "methods": {"lora": {"rank": 2, "learning_rate": [1e-3]}},
        "training": {"steps": 1},
        "finals": {"best": 0},
        "output": str(folder / "out"),
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_init_sets_it(cli: CommandLine, tmp_path: Path, model: Path, tiny_data: Path) -> None:
    path = tmp_path / "study.yaml"
    ran = cli("init", "--model", model, "--data", tiny_data, "-o", path).ok()
    assert yaml.safe_load(path.read_text())["data"]["add_bos"] is True
    reason = "the tokenizer puts '<s>' before a text by itself, and the chat template does not write it"
    assert f"# {reason}\n" in path.read_text()
    assert f"add_bos: true, since {reason}" in ran.out
    assert MISSING not in cli("run", path, "--dry-run", "--steps", 1).ok().out


def test_init_leaves_it_where_nothing_is_missing(
    cli: CommandLine, tmp_path: Path, model: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    (model / "chat_template.jinja").write_text(WRITES_BOS)
    for name in (model, tiny_model_folder):
        ran = cli("init", "--model", name, "--data", tiny_data, "-o", tmp_path / "study.yaml", "--overwrite").ok()
        assert yaml.safe_load((tmp_path / "study.yaml").read_text())["data"]["add_bos"] is False
        assert "add_bos" not in ran.out


def test_finetune_warns_with_the_loss_of_the_base_both_ways(
    cli: CommandLine, tmp_path: Path, model: Path, tiny_data: Path
) -> None:
    """LoRA starts as the base does: the loss before step 1 is the base's."""
    without = cli(*finetune(model, tiny_data, tmp_path / "without")).ok().out
    behind = cli(*finetune(model, tiny_data, tmp_path / "behind", "--add_bos")).ok().out
    assert without.count(MISSING) == 1
    assert "--add_bos" in without
    assert MISSING not in behind
    said = re.search(r"held-out loss is ([\d.]+) so, and ([\d.]+) with BOS", without)
    assert said is not None, without
    start = [re.search(r"held-out loss ([\d.]+) .* before", text) for text in (without, behind)]
    assert [f"{float(found[1]):.3f}" for found in start if found] == list(said.groups())
    assert said[1] != said[2]


def test_finetune_says_nothing_where_nothing_is_missing(
    cli: CommandLine, tmp_path: Path, model: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    (model / "chat_template.jinja").write_text(WRITES_BOS)
    for name in (model, tiny_model_folder):
        assert "BOS" not in cli(*finetune(name, tiny_data, tmp_path / f"of-{name.name}")).ok().out


@pytest.mark.parametrize("words", [(), ("--dry-run",)], ids=["run", "dry-run"])
def test_a_study_warns(cli: CommandLine, tmp_path: Path, model: Path, tiny_data: Path, words: tuple[str, ...]) -> None:
    lines = cli("run", study(tmp_path, model, tiny_data), *words).ok().out.splitlines()
    found = [line for line in lines if MISSING in line]
    assert len(found) == 1
    assert "data.add_bos: true" in found[0]
    assert MISSING not in cli("run", study(tmp_path, model, tiny_data, add_bos=True), "--dry-run").ok().out


def test_data_stats_warns(cli: CommandLine, model: Path, tiny_data: Path) -> None:
    out = " ".join(cli("data", "stats", tiny_data, "--model", model).ok().out.split())
    assert out.count(MISSING) == 1
    (model / "chat_template.jinja").write_text(WRITES_BOS)
    assert "BOS" not in cli("data", "stats", tiny_data, "--model", model).ok().out
