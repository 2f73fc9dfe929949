"""Contract 1 under gradient checkpointing and dropout, where PEFT itself has no prefix tuning or no such masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import peft_reference as pr
import tiny_world as tw
from peft_study.config import LoraConfig
from peft_study.engine.engine import Engine
from peft_study.model.load import Base

LENGTHS = [12, 20, 9, 33]
METHODS = ["lora", "prefix, random", "prefix, projected", "prompt, random"]


def count_layer_calls(base: Base) -> list[int]:
    """Counts how often the first layer's attention runs."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    base.model.get_decoder().layers[0].self_attn.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tw.FAMILIES)
def test_recomputed_layers_give_pefts_gradients(family: str, method: str) -> None:
    base, config, examples = tw.base(family), pr.METHODS[method], tw.examples(LENGTHS)
    Engine(base, gradient_checkpointing=True)
    calls = count_layer_calls(base)
    adapter = pr.adapter_of(config, base)
    loss, gradients = pr.ours(base, adapter, examples)
    assert calls == [2], "the layer was not recomputed"
    their_loss, theirs = pr.Reference(tw.model(family), config, adapter).gradients(examples)
    assert loss == pytest.approx(their_loss, rel=1e-5)
    assert pr.worst(gradients, theirs) < 1e-5


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", tw.FAMILIES)
def test_our_masks_in_pefts_dropout_give_pefts_gradients(family: str, recompute: bool) -> None:
    base, examples = tw.base(family), tw.examples(LENGTHS)
    config = LoraConfig(rank=4, alpha=8, dropout=0.3)
    Engine(base, gradient_checkpointing=recompute)
    adapter = pr.adapter_of(config, base)
    seed, step = 11, 6
    loss, gradients = pr.ours(base, adapter, examples, at=(seed, step))
    reference = pr.Reference(tw.model(family), config, adapter)
    pr.give_masks(reference, config.dropout)
    their_loss, theirs = reference.gradients(examples, before=lambda i: set_mask(seed, step, i))
    assert loss == pytest.approx(their_loss, rel=1e-5)
    assert pr.worst(gradients, theirs) < 1e-5
    _, other = reference.gradients(examples, before=lambda i: set_mask(seed, step + 1, i))
    assert pr.worst(gradients, other) > 1e-2, "the masks of another step went unnoticed"


def set_mask(seed: int, step: int, example: int) -> None:
    pr.GivenMask.at = (seed, step, example)


def test_checkpointing_can_be_turned_off_again() -> None:
    base = tw.base("llama")
    Engine(base, gradient_checkpointing=True)
    Engine(base, gradient_checkpointing=False)
    calls = count_layer_calls(base)
    pr.ours(base, pr.adapter_of(pr.METHODS["lora"], base), tw.examples([9]))
    assert calls == [1]


@pytest.mark.parametrize("method", METHODS)
def test_recomputation_and_dropout_leave_the_same_bits(method: str) -> None:
    config = pr.METHODS[method]
    if isinstance(config, LoraConfig):
        config = config.model_copy(update={"dropout": 0.2})
    found = []
    for recompute in (False, True):
        base = tw.base("llama")
        Engine(base, gradient_checkpointing=recompute)
        found.append(pr.ours(base, pr.adapter_of(config, base), tw.examples(LENGTHS), at=(1, 2)))
    (loss, gradients), (other_loss, others) = found
    assert loss == other_loss
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name
