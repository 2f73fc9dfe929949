"""Contract 1: at identical parameters, loss and gradients are those of `peft` with a plain loop."""

from __future__ import annotations

import pytest
import torch

import peft_reference as pr
import tiny_world as tw
from peft_study.config import TrainingConfig
from peft_study.engine.engine import Engine
from peft_study.engine.trial import Trial
from peft_study.methods import create

LENGTHS = [12, 20, 9, 33]  # 33 is longer than the sliding window of tiny Gemma (16)


@pytest.mark.parametrize("method", pr.METHODS)
@pytest.mark.parametrize("family", tw.FAMILIES)
def test_loss_and_gradients_are_pefts_in_float32(family: str, method: str) -> None:
    base, config, examples = tw.base(family), pr.METHODS[method], tw.examples(LENGTHS)
    assert base.proof.packs
    assert base.proof.chunked_head
    adapter = pr.adapter_of(config, base)
    loss, gradients = pr.ours(base, adapter, examples)
    their_loss, theirs = pr.Reference(tw.model(family), config, adapter).gradients(examples)
    assert loss == pytest.approx(their_loss, rel=1e-5)
    assert pr.worst(gradients, theirs) < 1e-5


@pytest.mark.parametrize("method", ["lora", "prefix, random", "prompt, random"])
@pytest.mark.parametrize("family", tw.FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_peft_is(family: str, method: str) -> None:
    """Loss within 1e-2; gradients within 1e-2, or within PEFT's own bfloat16 noise where that is larger.

    On CPU padding does not change a bit of PEFT's gradients, so the noise is taken between PEFT in bfloat16 and PEFT
    in float32, and between two of PEFT's attention implementations; on these random models it is 1 to 5 %.
    """
    config, examples = pr.METHODS[method], tw.examples(LENGTHS)
    base = tw.base(family, dtype=torch.bfloat16)
    adapter = pr.adapter_of(config, base)
    loss, gradients = pr.ours(base, adapter, examples)
    _, exact = pr.Reference(tw.model(family, dtype=torch.bfloat16).float(), config, adapter).gradients(examples)
    noise = []
    # transformers gives Gemma-2 no other implementation than eager: its scores are capped
    for implementation in ("eager",) if family == "gemma2" else ("eager", "sdpa"):
        model = tw.model(family, dtype=torch.bfloat16, implementation=implementation)
        their_loss, theirs = pr.Reference(model, config, adapter).gradients(examples)
        assert loss == pytest.approx(their_loss, rel=1e-2)
        noise.append(pr.worst(theirs, exact))
        # errors of two independent roundings add up as their squares do; twice that on any machine's kernels
        assert pr.worst(gradients, theirs) <= max(1e-2, 2 * 2**0.5 * noise[-1])
    assert pr.worst(gradients, exact) <= max(1e-2, 2 * max(noise))


@pytest.mark.parametrize("method", ["lora", "prefix, text", "prefix, projected", "prompt, text"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradients_are_pefts_at_several_points_of_a_trained_run(family: str, method: str) -> None:
    base, config, examples = tw.base(family), pr.METHODS[method], tw.examples([11, 17, 9, 14, 20, 8, 13, 16])
    adapter = create(config, base, tw.material(), seed=3)
    trial = Trial("t", adapter, TrainingConfig(learning_rate=1e-2, steps=9, batch_size=4), examples)
    engine = Engine(base, row_tokens=64)
    engine.admit(trial)
    compared = 0
    while not trial.finished:
        if engine.step() and trial.step in (1, 4, 9):
            loss, gradients = pr.ours(base, adapter, examples[:4])
            their_loss, theirs = pr.Reference(tw.model(family), config, adapter).gradients(examples[:4])
            assert loss == pytest.approx(their_loss, rel=1e-5)
            assert pr.worst(gradients, theirs) < 1e-5
            compared += 1
    assert compared == 3
