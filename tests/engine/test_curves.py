"""Contracts 1 and 3 along a run: the curve of a plain PEFT loop, however the batches are cut into rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import get_scheduler

import peft_reference as pr
import tiny_world as tw
from peft_study.config import LoraConfig, MethodConfig, TrainingConfig
from peft_study.data.conversation import Example
from peft_study.engine.engine import Engine
from peft_study.engine.order import DataOrder
from peft_study.engine.trial import StepReport, Trial
from peft_study.methods import Adapter, create

STEPS = 20
RATES = {"lora": 1e-3, "prefix, text": 1e-2, "prefix, projected": 1e-3, "prompt, text": 1e-2}


def data() -> list[Example]:
    lengths = np.random.default_rng(4).integers(7, 30, size=24)
    return tw.examples([int(length) for length in lengths])


def training(method: str, **changed: Any) -> TrainingConfig:
    values = {
        "learning_rate": RATES[method],
        "steps": STEPS,
        "batch_size": 4,
        "warmup_ratio": 0.2,
        "weight_decay": 0.01,
    }
    return TrainingConfig(**(values | changed))


def engine_run(
    config: MethodConfig, training: TrainingConfig, row_tokens: int = 64
) -> tuple[list[StepReport], Adapter]:
    base = tw.base("llama")
    trial = Trial("t", create(config, base, tw.material(), training.seed), training, data())
    engine = Engine(base, row_tokens=row_tokens)
    engine.admit(trial)
    reports = []
    while not trial.finished:
        reports += [event.report for event in engine.step()]
    return reports, trial.adapter


def plain_run(config: MethodConfig, training: TrainingConfig) -> tuple[list[float], list[float], pr.Reference]:
    """PEFT, AdamW and transformers' scheduler in a plain loop; returns losses, gradient norms, and the end."""
    adapter, examples = create(config, tw.base("llama"), tw.material(), training.seed), data()
    reference = pr.Reference(tw.model("llama"), config, adapter)
    if isinstance(config, LoraConfig):
        pr.give_masks(reference, config.dropout)
    parameters = list(reference.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    scheduler = get_scheduler(training.schedule, optimizer, int(STEPS * training.warmup_ratio), STEPS)
    order = DataOrder(len(examples), training.batch_size, training.data_seed)
    losses, norms = [], []
    for step in range(STEPS):
        batch = order.batch(step)
        sums = []
        for index in batch:
            pr.GivenMask.at = (training.seed, step, index)
            sums += reference.losses([examples[index]])
        tokens = pr.supervised([examples[i] for i in batch])
        loss = torch.stack(sums).sum() / (tokens if training.reduce_loss == "mean" else training.sum_divisor)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, training.clip_norm or float("inf"))))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, reference


def distance(adapter: Adapter, reference: pr.Reference) -> float:
    return max(pr.relative(p.detach(), reference.parameters[name].detach()) for name, p in adapter.parameters().items())


@pytest.mark.parametrize("method", RATES)
def test_the_first_twenty_steps_are_pefts(method: str) -> None:
    config, settings = pr.METHODS[method], training(method)
    reports, adapter = engine_run(config, settings)
    losses, norms, reference = plain_run(config, settings)
    assert [r.loss for r in reports] == pytest.approx(losses, rel=1e-5)
    assert [r.gradient_norm for r in reports] == pytest.approx(norms, rel=1e-4)
    assert distance(adapter, reference) < 1e-5
    assert losses[-1] != pytest.approx(losses[0], rel=1e-3), "nothing was learned, so nothing was compared"


def test_the_curve_with_dropout_and_without_clipping_is_pefts() -> None:
    config = LoraConfig(rank=4, alpha=8, dropout=0.1)
    settings = training("lora", clip_norm=None, seed=5, data_seed=6, schedule="cosine")
    reports, adapter = engine_run(config, settings)
    losses, _, reference = plain_run(config, settings)
    assert [r.loss for r in reports] == pytest.approx(losses, rel=1e-5)
    assert distance(adapter, reference) < 1e-5


def test_a_gradient_above_the_limit_is_clipped() -> None:
    config, settings = pr.METHODS["prompt, text"], training("prompt, text", clip_norm=0.05)
    reports, adapter = engine_run(config, settings)
    losses, norms, reference = plain_run(config, settings)
    assert min(norms) > 0.05
    assert [r.loss for r in reports] == pytest.approx(losses, rel=1e-5)
    assert distance(adapter, reference) < 1e-5


@pytest.mark.parametrize("reduce_loss", ["mean", "sum"])
def test_the_curve_does_not_depend_on_how_batches_are_cut_into_rows(reduce_loss: str) -> None:
    """Rows of one example, of some, of whole batches. A mean of micro-batches' means would differ."""
    settings = training("lora", reduce_loss=reduce_loss, sum_divisor=2 if reduce_loss == "sum" else 1)
    runs = [engine_run(pr.METHODS["lora"], settings, row_tokens) for row_tokens in (1, 40, 4096)]
    losses, norms, reference = plain_run(pr.METHODS["lora"], settings)
    for reports, adapter in runs:
        # AdamW hides a factor of the gradient: the norm shows it
        assert [r.gradient_norm for r in reports] == pytest.approx(norms, rel=1e-4)
        assert [r.reduced_loss for r in reports] == pytest.approx(losses, rel=1e-5)
        assert distance(adapter, reference) < 1e-5
    reports = runs[0][0]
    per_token = [sum(r.example_losses) / r.supervised for r in reports]
    assert [r.loss for r in reports] == pytest.approx(per_token)


def test_a_report_says_what_the_step_did() -> None:
    settings, examples = training("lora", steps=7), data()
    reports, _ = engine_run(pr.METHODS["lora"], settings)
    order = DataOrder(len(examples), 4, settings.data_seed)
    assert [order.seen(steps) for steps in range(9)] == [
        sum(len(order.batch(step)) for step in range(steps)) for steps in range(9)
    ]
    for step, report in enumerate(reports):
        assert report.step == step + 1
        assert list(report.examples) == order.batch(step)
        assert report.tokens == sum(len(examples[i]) for i in report.examples)
        assert report.supervised == pr.supervised([examples[i] for i in report.examples])
        assert len(report.example_losses) == 4


def test_every_epoch_shows_every_example_once_in_its_own_order() -> None:
    order = DataOrder(10, 4, seed=3)
    epochs = [[i for step in range(3) for i in order.batch(3 * epoch + step)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert DataOrder(10, 4, seed=3).batch(5) == order.batch(5)
    assert DataOrder(10, 4, seed=4).batch(5) != order.batch(5)
