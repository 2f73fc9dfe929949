"""The loss without all logits at once: the model's own logits, chunk by chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peft_reference as pr
import tiny_world as tw
from peft_study.config import TrainingConfig
from peft_study.engine.engine import Engine
from peft_study.engine.row import Item, RowRunner
from peft_study.engine.trial import Trial
from peft_study.methods.reference import FullAdapter, NoAdapter
from peft_study.model import head, load
from peft_study.model.load import Base

LENGTHS = [12, 20, 9, 33]


def own_losses(family: str) -> list[float]:
    """Summed token losses from the logits of the untouched model, one example at a time."""
    model, sums = tw.model(family), []
    for example in tw.examples(LENGTHS):
        batch = pr.tensors([example], padding=0)
        logits_LV = model(input_ids=batch["input_ids"]).logits[0, :-1].float()
        sums.append(F.cross_entropy(logits_LV, batch["labels"][0, 1:], ignore_index=-100, reduction="sum").item())
    return sums


def our_losses(base: Base) -> list[float]:
    with torch.no_grad(), RowRunner(base).row([Item(0, NoAdapter(), e) for e in tw.examples(LENGTHS)]) as result:
        return result.item_losses


@pytest.mark.parametrize("positions", [1, 2, 7, 36, 1000])
@pytest.mark.parametrize("family", tw.FAMILIES)
def test_chunks_of_any_size_give_the_models_own_losses(
    family: str, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tw.base(family)
    monkeypatch.setattr(head, "CHUNK_LOGITS", positions * tw.VOCABULARY)
    assert our_losses(base) == pytest.approx(own_losses(family), rel=1e-5)


@pytest.mark.parametrize("positions", [1, 3, 1000])
@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_chunks_of_any_size_give_pefts_gradients(family: str, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", positions * tw.VOCABULARY)
    base, config, examples = tw.base(family), pr.METHODS["prefix, random"], tw.examples(LENGTHS)
    adapter = pr.adapter_of(config, base)
    _, gradients = pr.ours(base, adapter, examples)
    _, theirs = pr.Reference(tw.model(family), config, adapter).gradients(examples)
    assert pr.worst(gradients, theirs) < 1e-5


@pytest.mark.parametrize("trained", [False, True])
def test_weights_and_chunks_reach_the_gradient_of_hidden_states_and_head(
    trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", 3 * 50)
    torch.manual_seed(1)
    linear = torch.nn.Linear(8, 50).requires_grad_(trained)
    hidden_SE, targets_S = torch.randn(10, 8, requires_grad=True), torch.randint(50, (10,))
    weights_S = torch.rand(10)

    def cap(logits: Tensor) -> Tensor:
        return torch.tanh(logits)

    total, losses_S = head.token_losses(hidden_SE, targets_S, weights_S, linear, cap)
    (total * 2).backward()
    found = [hidden_SE.grad, linear.weight.grad, linear.bias.grad]
    hidden_SE.grad = linear.weight.grad = linear.bias.grad = None
    expected_S = F.cross_entropy(cap(linear(hidden_SE)), targets_S, reduction="none")
    ((expected_S * weights_S).sum() * 2).backward()
    torch.testing.assert_close(losses_S, expected_S)
    for ours, plain in zip(found, [hidden_SE.grad, linear.weight.grad, linear.bias.grad], strict=True):
        if plain is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, plain)


def ignore_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the program believe that no model does anything to its logits."""

    def nothing(_config: Any) -> Any:
        return lambda logits: logits

    monkeypatch.setattr(load, "head_transform", nothing)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_an_unknown_transform_is_found_at_load_and_the_model_makes_its_own_logits(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignore_transform(monkeypatch)
    base = tw.base(family)
    assert not base.proof.chunked_head
    assert base.proof.head_error > 0.1
    assert base.proof.packs
    assert our_losses(base) == pytest.approx(own_losses(family), rel=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("method", ["lora", "prefix, random", "prompt, random"])
def test_gradients_through_the_models_own_logits_are_pefts(
    method: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignore_transform(monkeypatch)
    base, config, examples = tw.base("gemma2"), pr.METHODS[method], tw.examples(LENGTHS)
    Engine(base, gradient_checkpointing=recompute)
    adapter = pr.adapter_of(config, base)
    loss, gradients = pr.ours(base, adapter, examples)
    their_loss, theirs = pr.Reference(tw.model("gemma2"), config, adapter).gradients(examples)
    assert loss == pytest.approx(their_loss, rel=1e-5)
    assert pr.worst(gradients, theirs) < 1e-5


def test_full_fine_tuning_through_the_models_own_logits_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = []
    for known in (True, False):
        if not known:
            ignore_transform(monkeypatch)
        base = tw.base("granite")
        training = TrainingConfig(learning_rate=1e-3, steps=4, batch_size=4)
        trial, engine = Trial("t", FullAdapter(base), training, tw.examples(LENGTHS * 2)), Engine(base, row_tokens=64)
        engine.admit(trial)
        curves.append([])
        while not trial.finished:
            curves[-1] += [event.report.loss for event in engine.step()]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_row_without_supervision_has_no_loss_and_no_gradient(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not chunked:
        ignore_transform(monkeypatch)
    base, (example,) = tw.base("gemma2"), tw.examples([9])
    example.supervised_L[:] = False
    adapter = pr.adapter_of(pr.METHODS["prompt, random"], base)
    with RowRunner(base).row([Item(0, adapter, example)]) as result:
        result.total.backward()
    assert result.item_losses == [0.0]
    assert all(p.grad is None or not p.grad.any() for p in adapter.parameters().values())
