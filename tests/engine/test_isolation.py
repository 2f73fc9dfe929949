"""Contract 2: nothing leaks between segments, and a trial in company is the trial alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import peft_reference as pr
import tiny_world as tw
from peft_study.config import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TrainingConfig
from peft_study.data.conversation import Example
from peft_study.engine.engine import Engine
from peft_study.engine.row import Item, RowPlan, RowRunner, fill_rows
from peft_study.engine.trial import Trial
from peft_study.methods import Adapter, create
from peft_study.methods.dropout import DropoutKey
from peft_study.methods.reference import NoAdapter
from peft_study.model.load import Base

CONFIGS = (
    LoraConfig(rank=4, alpha=8, dropout=0.1),
    PrefixTuningConfig(tokens=5, init="random"),
    PromptTuningConfig(tokens=3, init="random"),
    LoraConfig(rank=2, alpha=2, target_modules=("v_proj", "up_proj")),
)
PROPERTY = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
_lengths = st.lists(st.integers(2, 40), min_size=2, max_size=6)


def row(base: Base, items: Sequence[Item]) -> tuple[list[float], dict[tuple[int, str], Tensor]]:
    """Returns the items' losses and the gradients by slot and parameter."""
    adapters = {item.slot: item.adapter for item in items}
    for adapter in adapters.values():
        for parameter in adapter.parameters().values():
            parameter.grad = None
    with RowRunner(base).row(items) as result:
        result.total.backward()
    gradients = {}
    for slot, adapter in adapters.items():
        for name, parameter in adapter.parameters().items():
            if parameter.grad is not None:
                gradients[slot, name] = parameter.grad.clone()
    return result.item_losses, gradients


def others_tokens(example: Example) -> Example:
    """Every token another one, the same mask."""
    return Example((example.tokens_L - 3 + 17) % (tw.VOCABULARY - 3) + 3, example.supervised_L)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@PROPERTY
@given(lengths=_lengths, data=st.data())
def test_changing_one_example_changes_no_other_items_loss(family: str, lengths: list[int], data: st.DataObject) -> None:
    base, examples = tw.base(family), tw.examples(lengths, seed=len(lengths))
    changed = data.draw(st.integers(0, len(lengths) - 1))
    slots = sorted(data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths))))
    adapters = [pr.adapter_of(config, base, seed=s + 1) for s, config in enumerate(CONFIGS)]

    def losses(shown: Sequence[Example]) -> tuple[list[float], dict[tuple[int, str], Tensor]]:
        return row(base, [Item(slot, adapters[slot], example) for slot, example in zip(slots, shown, strict=True)])

    before, gradients = losses(examples)
    after, new_gradients = losses([others_tokens(e) if i == changed else e for i, e in enumerate(examples)])
    for place, (a, b) in enumerate(zip(before, after, strict=True)):
        if place != changed:
            assert a == b, f"item {place} noticed item {changed}"
    assert before[changed] != after[changed]
    for (slot, name), gradient in gradients.items():
        if slot != slots[changed]:
            assert torch.equal(gradient, new_gradients[slot, name]), f"slot {slot}'s {name} noticed"


@pytest.mark.parametrize("family", tw.FAMILIES)
@PROPERTY
@given(lengths=_lengths, data=st.data())
def test_an_item_in_a_row_has_the_loss_it_has_alone(family: str, lengths: list[int], data: st.DataObject) -> None:
    base, examples = tw.base(family), tw.examples(lengths)
    slots = sorted(data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths))))
    adapters = [pr.adapter_of(config, base, seed=s + 1) for s, config in enumerate(CONFIGS)]
    items = [Item(slot, adapters[slot], example) for slot, example in zip(slots, examples, strict=True)]
    together, gradients = row(base, items)
    summed: dict[tuple[int, str], Tensor] = {}
    for item, loss in zip(items, together, strict=True):
        (alone,), own = row(base, [item])
        assert loss == pytest.approx(alone, rel=1e-5, abs=1e-6)
        for name, gradient in own.items():
            summed[name] = summed.get(name, 0) + gradient
    for name, gradient in gradients.items():
        # a value's gradient is zero where the segment has one token to attend to
        assert (gradient - summed[name]).norm() <= 2e-5 * summed[name].norm() + 1e-6, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
@PROPERTY
@given(lengths=_lengths, data=st.data())
def test_gradients_do_not_depend_on_what_the_neighbours_say_or_who_they_are(
    family: str, dropout: float, lengths: list[int], data: st.DataObject
) -> None:
    """Other tokens in the same lengths: the same bits. Other neighbours, or none: the same to rounding."""
    base, examples = tw.base(family), tw.examples(lengths, seed=len(lengths))
    kept = data.draw(st.integers(0, 3), label="trial")
    slots = sorted(
        [kept, *data.draw(st.lists(st.integers(0, 3), min_size=len(lengths) - 1, max_size=len(lengths) - 1))]
    )
    configs = [c.model_copy(update={"dropout": dropout}) if isinstance(c, LoraConfig) else c for c in CONFIGS]
    adapters = [pr.adapter_of(config, base, seed=s + 1) for s, config in enumerate(configs)]
    unexpected = [pr.adapter_of(config, base, seed=s + 51) for s, config in enumerate([*configs[1:], configs[0]])]

    def item(slot: int, adapter: Adapter, number: int, example: Example) -> Item:
        return Item(slot, adapter, example, 0.5, DropoutKey(slot, 3, number, adapter.row_tokens + len(example)))

    def own(found: tuple[list[float], dict[tuple[int, str], Tensor]]) -> dict[str, Tensor]:
        return {name: gradient for (slot, name), gradient in found[1].items() if slot == kept}

    places = list(enumerate(zip(slots, examples, strict=True)))
    gradients = own(row(base, [item(s, adapters[s], i, e) for i, (s, e) in places]))
    assert gradients
    others = own(row(base, [item(s, adapters[s], i, e if s == kept else others_tokens(e)) for i, (s, e) in places]))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), f"{name} noticed its neighbours' tokens"

    replaced = [item(s, adapters[s] if s == kept else unexpected[s], i, e) for i, (s, e) in places]
    absent = [item(s, adapters[s], i, e) for i, (s, e) in places if s == kept]
    for company, items in {"other neighbours": replaced, "no neighbours": absent}.items():
        found = own(row(base, items))
        assert set(found) == set(gradients)
        for name, gradient in gradients.items():
            # a key's gradient is zero where the segment has one token to attend to
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, (company, name)


@pytest.mark.parametrize("poisoned", [0, 1, 2, 3])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_one_trials_nan_stays_its_own(family: str, poison: float, poisoned: int) -> None:
    base, examples = tw.base(family), tw.examples([13, 22, 9, 17])
    adapters = [pr.adapter_of(config, base, seed=s + 1) for s, config in enumerate(CONFIGS)]
    items = [Item(slot, adapter, examples[slot]) for slot, adapter in enumerate(adapters)]
    losses, gradients = row(base, items)
    with torch.no_grad():
        next(iter(adapters[poisoned].parameters().values())).fill_(poison)
    sick_losses, sick_gradients = row(base, items)
    assert not math.isfinite(sick_losses[poisoned])
    for slot in range(4):
        if slot != poisoned:
            assert sick_losses[slot] == losses[slot]
    for (slot, name), gradient in gradients.items():
        if slot != poisoned:
            assert torch.equal(gradient, sick_gradients[slot, name]), f"slot {slot}'s {name} was infected"


def test_a_diverged_trial_leaves_and_the_others_train_on_as_if_alone() -> None:
    base, examples = tw.base("llama"), tw.examples([9, 14, 11, 8] * 3)
    training = TrainingConfig(learning_rate=1e-3, steps=4, batch_size=4)

    def run(sick: bool) -> tuple[list[float], list[str | None]]:
        engine = Engine(base, row_tokens=64)
        well = Trial("well", create(CONFIGS[0], base, None, 1), training, examples)
        if sick:
            adapter = create(CONFIGS[2], base, None, 2)
            with torch.no_grad():
                next(iter(adapter.parameters().values())).fill_(math.nan)
            engine.admit(Trial("sick", adapter, training, examples))
        engine.admit(well)
        losses, diverged = [], []
        while not well.finished:
            for event in engine.step():
                if event.trial is well and event.report:
                    losses.append(event.report.loss)
                diverged.append(event.diverged)
        assert engine.trials == (well,)
        return losses, diverged

    alone, _ = run(sick=False)
    beside, diverged = run(sick=True)
    assert beside == pytest.approx(alone, rel=1e-5)
    assert [message for message in diverged if message] == ["the loss became nan at step 1"]


@pytest.mark.parametrize("family", ["llama", "gemma3", "granite"])
def test_three_trials_of_different_methods_train_as_each_alone(family: str) -> None:
    base = tw.base(family)
    examples = tw.examples([int(n) for n in np.random.default_rng(2).integers(7, 40, size=20)])

    def trials() -> list[Trial]:
        made = []
        for number, (config, rate) in enumerate(zip(CONFIGS[:3], (1e-3, 1e-2, 1e-2), strict=True)):
            training = TrainingConfig(
                learning_rate=rate, steps=6 + number, batch_size=3 + number, seed=number, data_seed=number
            )
            made.append(Trial(str(number), create(config, base, None, number), training, examples))
        return made

    def run(chosen: Sequence[Trial], row_tokens: int) -> dict[str, list[float]]:
        engine = Engine(base, row_tokens=row_tokens)
        for trial in chosen:
            engine.admit(trial)
        curves: dict[str, list[float]] = {trial.name: [] for trial in chosen}
        while engine.trials:
            for event in engine.step():
                assert event.diverged is None
                curves[event.trial.name].append(event.report.loss)
                if event.trial.finished:
                    engine.evict(event.trial)
        return curves

    together = trials()
    curves = run(together, row_tokens=150)
    for number, company in enumerate(together):
        alone = trials()[number]
        assert run([alone], row_tokens=150)[alone.name] == pytest.approx(curves[alone.name], rel=1e-5)
        for name, parameter in alone.adapter.parameters().items():
            assert pr.relative(company.adapter.parameters()[name].detach(), parameter.detach()) < 1e-4


def test_a_prefix_takes_its_places_in_a_sliding_window() -> None:
    """Tiny Gemma-3's first layer sees 16 keys: near tokens see the prefix there, far ones do not."""
    base, (example,) = tw.base("gemma3"), tw.examples([40])
    adapter = create(PrefixTuningConfig(tokens=5, init="random"), base, None, 0)
    first_layer: list[Tensor] = []

    def note(_module: object, _inputs: object, output: tuple[Tensor, None]) -> None:
        first_layer.append(output[0][0].detach())

    base.model.get_decoder().layers[0].self_attn.register_forward_hook(note)
    for scale in (1.0, 2.0):
        with torch.no_grad():
            adapter.parameters()["table"].mul_(scale)
            with RowRunner(base).placed([Item(0, adapter, example)]) as (inputs, _, _):
                base.model.get_decoder()(**inputs)
    one, other = first_layer
    noticed = (one != other).any(dim=1).tolist()
    # the query at text position i stands at key 5 + i and sees keys 5 + i - 15 ... 5 + i: the prefix while i <= 14
    assert noticed == [i <= 14 for i in range(40)]


def test_positions_restart_and_a_prefix_shifts_them() -> None:
    base, examples = tw.base("llama"), tw.examples([4, 3, 5, 2])
    none = NoAdapter()
    prefix, prompt = (create(config, base, None, 0) for config in CONFIGS[1:3])
    items = [
        Item(0, none, examples[0]),
        Item(0, none, examples[1]),
        Item(1, prefix, examples[2]),
        Item(2, prompt, examples[3]),
    ]
    positions_T = RowPlan.of(items, base.device).numbers(base.device).positions_T
    assert positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), budget=st.integers(1, 100))
def test_rows_hold_every_item_once_in_order_within_the_budget(lengths: list[int], budget: int) -> None:
    adapter: Adapter = NoAdapter()
    items = [Item(0, adapter, example) for example in tw.examples(lengths)]
    rows = list(fill_rows(items, budget, packs=True))
    assert [id(item) for items in rows for item in items] == [id(item) for item in items]
    for filled, following in zip(rows, [*rows[1:], None], strict=True):
        used = sum(item.row_length for item in filled)
        assert used <= budget or len(filled) == 1
        assert following is None or used + following[0].row_length > budget, "the next item would have fitted"
    assert all(len(row) == 1 for row in fill_rows(items, budget, packs=False))
