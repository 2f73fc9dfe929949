"""Fixtures of evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluated import CHOICES, SUMS
from peft_study import LoRA, PrefixTuning, PromptTuning, finetune


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_data: Path) -> list[Path]:
    """Trains one adapter a method for a few steps at a high rate, so that each answers otherwise than the base."""
    folder = tmp_path_factory.mktemp("adapters")
    settings = LoRA(rank=4, learning_rate=0.05), PrefixTuning(learning_rate=0.5), PromptTuning(learning_rate=0.5)
    names = "lora", "prefix_tuning", "prompt_tuning"
    for name, setting in zip(names, settings, strict=True):
        finetune(str(tiny_model_folder), str(tiny_data), setting, steps=3, output=folder / name, verbose=False)
    return [folder / name for name in names]


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    files = {
        "sums": (SUMS, {"metric": "number", "max_new_tokens": 6}),
        "choices": (CHOICES, {"metric": "choice", "choices": "c"}),
    }
    for name, (rows, task) in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"data": f"{name}.jsonl", "prompt": "{q}", **task}))
    return [tmp_path / f"{name}.yaml" for name in files]
