"""One trial of a checkpoint, alone in another engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

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


def trial_of(base: Base, name: str, config: MethodConfig, **changed: Any) -> Trial:
    values = {"learning_rate": 1e-3, "steps": 9, "batch_size": 3, "schedule": "cosine", "weight_decay": 0.1}
    examples = tw.examples([9, 14, 11, 8, 20, 13, 10])
    return Trial(name, create(config, base, tw.material(), 0), TrainingConfig(**(values | changed)), examples)


def losses_of(engine: Engine, trial: Trial) -> list[float]:
    found = []
    while not trial.finished:
        found += [e.report.loss for e in engine.step() if e.report is not None and e.trial is trial]
    return found


@pytest.mark.parametrize(
    "config",
    [LoraConfig(rank=4, dropout=0.2), PrefixTuningConfig(tokens=4, init="text"), PromptTuningConfig(tokens=4)],
    ids=lambda config: config.method,
)
def test_one_trial_of_a_cut_goes_on_among_others(config: MethodConfig, tmp_path: Path) -> None:
    alone = trial_of(base := tw.base("llama"), "t", config)
    engine = Engine(base, row_tokens=30)
    engine.admit(alone)
    expected = losses_of(engine, alone)

    engine = Engine(base := tw.base("llama"), row_tokens=30)
    first, neighbour = trial_of(base, "t", config), trial_of(base, "n", LoraConfig(rank=2), batch_size=5)
    engine.admit(neighbour)
    engine.admit(first)
    early = []
    # between two rows of a batch: gradients and loss sums of its first examples are in the cut, too
    while first.step < 4 or not first.progress().sums:
        early += [e.report.loss for e in engine.step() if e.report is not None and e.trial is first]
    checkpoint.save(engine, tmp_path, 4, "mine")

    engine = Engine(base := tw.base("llama"), row_tokens=64)
    others = [trial_of(base, name, PrefixTuningConfig(tokens=2, init="text"), batch_size=4) for name in "ab"]
    for other in others:
        engine.admit(other)
    engine.step()
    engine.evict(others[0])
    second = trial_of(base, "t", config)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert dict(zip(found.trials, found.steps, strict=True)) == {"n": neighbour.step, "t": 4}
    checkpoint.load_one(engine, found, second)
    assert second.step == 4
    assert engine.row_tokens == 64
    assert early + losses_of(engine, second) == pytest.approx(expected, rel=2e-4)


def test_a_trial_of_all_weights_goes_on_elsewhere(tmp_path: Path) -> None:
    whole = trial_of(base := tw.base("llama"), "t", FullConfig())
    engine = Engine(base, row_tokens=30)
    engine.admit(whole)
    expected = losses_of(engine, whole)
    engine = Engine(base := tw.base("llama"), row_tokens=30)
    engine.admit(first := trial_of(base, "t", FullConfig()))
    while first.step < 4:
        engine.step()
    checkpoint.save(engine, tmp_path, 4, "mine")
    engine = Engine(base := tw.base("llama"), row_tokens=30)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    checkpoint.load_one(engine, found, second := trial_of(base, "t", FullConfig()))
    assert losses_of(engine, second) == pytest.approx(expected[4:], rel=1e-5)


def test_a_damaged_file_leaves_the_trial_as_it_was(tmp_path: Path) -> None:
    engine = Engine(base := tw.base("llama"), row_tokens=30)
    engine.admit(trial_of(base, "t", LoraConfig(rank=4)))
    engine.step()
    found = checkpoint.read(checkpoint.save(engine, tmp_path, 1, "mine"))
    assert found is not None
    (file,) = found.folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    engine = Engine(base := tw.base("llama"), row_tokens=30)
    trial = trial_of(base, "t", LoraConfig(rank=4))
    before = {name: p.detach().clone() for name, p in trial.parameters.items()}
    with pytest.raises(OutputError, match="damaged"):
        checkpoint.load_one(engine, found, trial)
    assert not engine.trials
    assert all(torch.equal(p, before[name]) for name, p in trial.parameters.items())
    shutil.rmtree(found.folder)
    with pytest.raises(OutputError, match="damaged"):
        checkpoint.load_one(engine, found, trial)
