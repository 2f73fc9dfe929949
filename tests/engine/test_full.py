"""The reference row of full fine-tuning: a plain loop's numbers, and a base put back bit by bit."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

import peft_reference as pr
import tiny_world as tw
from peft_study.config import TrainingConfig
from peft_study.engine.engine import Engine
from peft_study.engine.order import DataOrder
from peft_study.engine.trial import Trial
from peft_study.methods.reference import FullAdapter
from peft_study.model.load import Base

STEPS = 10


def settings(rate: float = 1e-3) -> TrainingConfig:
    return TrainingConfig(learning_rate=rate, steps=STEPS, batch_size=4, warmup_ratio=0.2, weight_decay=0.01)


def train(base: Base, training: TrainingConfig, *, recompute: bool = False) -> tuple[list[float], Trial, Engine]:
    engine = Engine(base, row_tokens=40, gradient_checkpointing=recompute)
    trial = Trial("full", FullAdapter(base), training, tw.examples([9, 14, 11, 8, 20, 13, 10, 17]))
    engine.admit(trial)
    losses = []
    while not trial.finished:
        losses += [event.report.loss for event in engine.step()]
    return losses, trial, engine


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # with tied embeddings, and with a capped head
def test_the_curve_is_that_of_a_plain_loop(family: str, recompute: bool) -> None:
    base = tw.base(family)
    losses, trial, _ = train(base, settings(), recompute=recompute)
    model, examples = tw.model(family), trial.examples
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.01)
    scheduler = get_scheduler("linear", optimizer, 2, STEPS)
    order, expected = DataOrder(len(examples), 4, 0), []
    for step in range(STEPS):
        batch = [examples[i] for i in order.batch(step)]
        loss = sum(model(**pr.tensors([e], 0)).loss * pr.supervised([e]) for e in batch) / pr.supervised(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    assert set(trial.adapter.parameters()) == set(parameters)
    for name, parameter in trial.adapter.parameters().items():
        assert pr.relative(parameter.detach(), parameters[name].detach()) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_put_back_bit_by_bit(dtype: torch.dtype) -> None:
    base = tw.base("llama", dtype=dtype)
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    _, trial, engine = train(base, settings())
    assert all(not torch.equal(p, before[name]) for name, p in base.model.named_parameters()), "nothing was trained"
    engine.evict(trial)
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert not parameter.requires_grad
        assert parameter.grad is None
    adapter, examples = pr.adapter_of(pr.METHODS["lora"], base), tw.examples([9, 14])
    assert pr.ours(base, adapter, examples)[0] == pr.ours(tw.base("llama", dtype=dtype), adapter, examples)[0]


def test_updates_too_small_for_bfloat16_add_up_in_the_masters() -> None:
    """At 1e-6 a step is far below bfloat16's spacing at 0.2 (about 1e-3): in place, no weight would ever move."""
    base = tw.base("llama", dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj.weight"
    start = base.model.get_parameter(name).float().clone()
    _, trial, _ = train(base, settings(1e-6))
    moved = trial.adapter.parameters()[name].detach() - start
    assert (moved != 0).float().mean() > 0.99
    # AdamW moves a weight by at most about its rate a step
    assert moved.abs().max() < 2e-6 * STEPS
    assert trial.adapter.parameters()[name].dtype == torch.float32
    assert torch.equal(base.model.get_parameter(name), trial.adapter.parameters()[name].to(torch.bfloat16))
    rounded = base.model.get_parameter(name).float()
    assert (rounded == start).float().mean() > 0.9, "the steps were not small"


def test_gradients_of_several_rows_add_up() -> None:
    """A batch in one row and in four gives the same first step."""
    found = []
    for row_tokens in (1, 4096):
        base = tw.base("granite")
        engine = Engine(base, row_tokens=row_tokens)
        training = TrainingConfig(learning_rate=1e-3, steps=1, batch_size=4)
        trial = Trial("full", FullAdapter(base), training, tw.examples([9, 14, 11, 8]))
        engine.admit(trial)
        while not (events := engine.step()):
            pass
        found.append((events[0].report.gradient_norm, {n: p.detach().clone() for n, p in trial.parameters.items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, parameter in found[0][1].items():
        assert pr.relative(parameter, found[1][1][name]) < 1e-5
