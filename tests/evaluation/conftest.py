"""Fixtures of evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

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
