"""Dropout masks are a function of seed, step, example and module, and of nothing else."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import peft_reference as pr
import tiny_world as tw
from peft_study.config import LoraConfig
from peft_study.engine.engine import Engine
from peft_study.engine.row import Item, RowRunner, sample_item
from peft_study.methods import hooks
from peft_study.methods.dropout import DropoutKey, keep_mask
from peft_study.seeds import key

HERE = DropoutKey(seed=1, step=2, example=3, length=50)
MODULE = "model.layers.0.q_proj"


def mask(probability: float = 0.25, width: int = 40, module: str = MODULE, **changed: int) -> Tensor:
    return keep_mask(replace(HERE, **changed), module, probability, torch.zeros(width))


def test_same_place_same_mask_whatever_was_drawn_before() -> None:
    first = mask()
    torch.manual_seed(99)
    torch.rand(1000)
    mask(example=7)
    assert torch.equal(first, mask())


@pytest.mark.parametrize(
    "changed",
    [{"seed": 2}, {"step": 3}, {"example": 4}, {"module": "model.layers.1.q_proj"}],
    ids=lambda c: next(iter(c)),
)
def test_another_place_another_mask(changed: dict[str, Any]) -> None:
    one, other = mask(), mask(**changed)
    # independent masks at 0.25 agree on 0.75^2 + 0.25^2 = 62.5 % of the entries
    agreement = stats.binomtest(int((one == other).sum()), one.numel(), 0.625)
    assert agreement.pvalue > 1e-4


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9])
def test_the_share_kept_is_one_minus_p(probability: float) -> None:
    kept = torch.cat([mask(probability, example=i).flatten() for i in range(20)])
    assert kept.dtype == torch.bool
    assert stats.binomtest(int(kept.sum()), kept.numel(), 1 - probability).pvalue > 1e-4


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9])
def test_what_is_kept_is_scaled_so_that_the_mean_is_one(probability: float) -> None:
    base = tw.base("llama", dtype=torch.bfloat16)
    adapter = pr.adapter_of(LoraConfig(rank=4, dropout=probability), base, seed=1)
    name = adapter.adapted_modules()[0]
    linear, plain = hooks.LinearHooks(base.model), adapter.linear_update(name)
    assert plain is not None
    with linear.row([hooks.Span(0, 50, adapter, (HERE,))]):
        ((span,),) = (group.spans for group in linear._updates(name, torch.zeros(1, 50, plain.A.shape[1])))
    assert span.update.scale == pytest.approx(plain.scale / (1 - probability))


def test_recomputed_layers_keep_no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = list[weakref.ref[Tensor]]()

    def noted(*args: Any) -> Tensor:
        drawn = keep_mask(*args)
        alive.append(weakref.ref(drawn))
        return drawn

    monkeypatch.setattr(hooks, "keep_mask", noted)
    base = tw.base("llama")
    adapter = pr.adapter_of(LoraConfig(rank=4, dropout=0.1), base, seed=1)
    kept = {}
    for recompute in (False, True):
        alive.clear()
        runner = Engine(base, gradient_checkpointing=recompute).runner
        with runner.row([sample_item(adapter, tw.examples([30])[0])]) as result:
            kept[recompute] = sum(mask() is not None for mask in alive)
            result.total.backward()
    assert kept[False] == len(adapter.adapted_modules())
    assert kept[True] == 0


def test_keys_keep_their_parts_apart() -> None:
    assert len({key(1, 23), key(12, 3), key(123), key(1, 2, 3)}) == 4
    assert key(1, "a") == key(1, "a") < 2**63


def test_order_and_neighbours_do_not_change_a_trials_masked_loss() -> None:
    base, examples = tw.base("llama"), tw.examples([14, 9, 21])
    one = pr.adapter_of(LoraConfig(rank=4, dropout=0.4), base, seed=1)
    other = pr.adapter_of(LoraConfig(rank=2, dropout=0.2), base, seed=2)

    def item(slot: int, number: int) -> Item:
        return Item(
            slot, (one, other)[slot], examples[number], dropout=DropoutKey(slot, 5, number, len(examples[number]))
        )

    def losses(items: list[Item]) -> list[float]:
        with RowRunner(base).row(items) as result:
            return result.item_losses

    alone = [losses([item(0, number)])[0] for number in range(3)]
    turned = losses([item(1, 1), item(1, 0), item(0, 2), item(0, 0), item(0, 1)])[2:]
    assert turned == pytest.approx([alone[2], alone[0], alone[1]], rel=1e-5)
    undropped = losses([Item(0, one, examples[0])])[0]
    assert abs(undropped / alone[0] - 1) > 1e-4, "the mask did nothing"
