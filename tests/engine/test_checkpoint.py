"""Contract 4 for one trial: saved at a step and continued, the same bits as never interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

import tiny_world as tw
from peft_study.config import (
    FullConfig,
    LoraConfig,
    MethodConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainingConfig,
)
from peft_study.engine import checkpoint
from peft_study.engine.engine import Engine
from peft_study.engine.trial import Trial
from peft_study.errors import OutputError
from peft_study.methods import create
from peft_study.model.load import Base

CONFIGS: dict[str, MethodConfig] = {
    "lora with dropout": LoraConfig(rank=4, dropout=0.2),
    "prefix": PrefixTuningConfig(tokens=4, init="text"),
    "prefix, projected": PrefixTuningConfig(tokens=4, init="text", projection=True),
    "prompt": PromptTuningConfig(tokens=4, init="vocab"),
    "full": FullConfig(),
}


def trial_of(base: Base, config: MethodConfig, *, seed: int = 0, **changed: Any) -> Trial:
    values = {"learning_rate": 1e-3, "steps": 9, "batch_size": 3, "schedule": "cosine", "weight_decay": 0.1}
    training = TrainingConfig(**(values | changed))
    examples = tw.examples([9, 14, 11, 8, 20, 13, 10])
    return Trial("t", create(config, base, tw.material(), seed), training, examples)


def run(base: Base, trial: Trial, until: int) -> list[float]:
    engine = Engine(base, row_tokens=30)
    engine.admit(trial)
    losses = []
    while trial.step < until:
        losses += [event.report.loss for event in engine.step()]
    return losses


def values(trial: Trial) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trial.parameters.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_continued_run_is_bit_equal(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = trial_of(base := tw.base("llama", dtype=dtype), CONFIGS[name])
    losses = run(base, whole, 9)

    first = trial_of(base := tw.base("llama", dtype=dtype), CONFIGS[name])
    early = run(base, first, 4)
    checkpoint.save(first, tmp_path, "mine")

    # a fresh process: nothing of the first trial is left, and another initialisation must not matter
    second = trial_of(base := tw.base("llama", dtype=dtype), CONFIGS[name], seed=8)
    engine = Engine(base, row_tokens=30)
    engine.admit(second)
    (found,) = checkpoint.find(tmp_path)
    checkpoint.load(second, found)
    assert second.step == 4
    late = []
    while second.step < 9:
        late += [event.report.loss for event in engine.step()]
    assert early + late == losses
    assert second.tokens == whole.tokens
    for parameter, tensor in values(second).items():
        assert torch.equal(tensor, values(whole)[parameter]), parameter


def saved(folder: Path, step: int = 2) -> tuple[Trial, checkpoint.Found]:
    base = tw.base("llama")
    trial = trial_of(base, LoraConfig(rank=2))
    run(base, trial, step)
    checkpoint.save(trial, folder, "mine")
    return trial, checkpoint.find(folder)[-1]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_trial_untouched(damage: str, tmp_path: Path) -> None:
    trial, found = saved(tmp_path)
    path = found.folder / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
    elif damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content)
    before = values(trial)
    with pytest.raises(OutputError, match=r"damaged.*resume from an earlier one"):
        checkpoint.load(trial, found)
    assert all(torch.equal(before[name], p) for name, p in values(trial).items())


@pytest.mark.parametrize("manifest", ['{"step": 2', "", "[]", "{}", '{"step": 2}'])
def test_a_folder_without_a_whole_manifest_is_no_checkpoint(manifest: str, tmp_path: Path) -> None:
    _, found = saved(tmp_path)
    (found.folder / "checkpoint.json").write_text(manifest)
    assert checkpoint.read(found.folder) is None
    assert checkpoint.find(tmp_path) == []
    (found.folder / "checkpoint.json").unlink()
    assert checkpoint.find(tmp_path) == []


def test_another_settings_checkpoint_is_refused_by_parameter(tmp_path: Path) -> None:
    _, found = saved(tmp_path)
    other = trial_of(tw.base("llama"), LoraConfig(rank=3))
    before = values(other)
    with pytest.raises(OutputError, match=r"does not fit at model\.layers\.0\.self_attn\.q_proj\.lora_A"):
        checkpoint.load(other, found)
    assert all(torch.equal(before[name], p) for name, p in values(other).items())


def fake(folder: Path, step: int) -> None:
    target = folder / f"step_{step}"
    target.mkdir(parents=True)
    (target / "checkpoint.json").write_text(json.dumps({"step": step, "identity": "mine", "sha256": ""}))


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (1000, 900, 50):
        fake(tmp_path, step)
    assert [found.step for found in checkpoint.find(tmp_path)] == [50, 900, 1000]


@pytest.mark.parametrize(
    ("keep", "left"), [(-1, [50, 900, 1000]), (0, []), (1, [1000]), (2, [900, 1000]), (5, [50, 900, 1000])]
)
def test_the_newest_are_kept(keep: int, left: list[int], tmp_path: Path) -> None:
    for step in (1000, 900, 50):
        fake(tmp_path, step)
    checkpoint.prune(tmp_path, keep)
    assert [found.step for found in checkpoint.find(tmp_path)] == left


def test_saving_twice_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    trial, _ = saved(tmp_path)
    checkpoint.save(trial, tmp_path, "again")
    (found,) = checkpoint.find(tmp_path)
    assert (found.step, found.identity) == (2, "again")
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_one_error_and_leaves_nothing(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, _ = saved(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    trial.step = 3
    with pytest.raises(OutputError, match="No space left on device"):
        checkpoint.save(trial, tmp_path, "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


def test_a_resumed_loss_scale_doubles_when_it_would_have(tmp_path: Path) -> None:
    base = tw.base("llama")
    first, second = trial_of(base, LoraConfig(rank=2)), trial_of(base, LoraConfig(rank=2))
    first.step, first.good_steps, first.loss_scale = 4, 999, 512.0
    checkpoint.save(first, tmp_path, "mine")
    checkpoint.load(second, checkpoint.find(tmp_path)[0])
    assert (second.step, second.good_steps, second.loss_scale) == (4, 999, 512.0)
