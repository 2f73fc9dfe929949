"""Who gets a slot, and what leaving one means."""

from __future__ import annotations

import pytest
import torch

import tiny_world as tw
from peft_study.config import FullConfig, LoraConfig, MethodConfig, PromptTuningConfig, TrainingConfig
from peft_study.engine.engine import Engine
from peft_study.engine.trial import Trial
from peft_study.errors import ConfigError
from peft_study.methods import create
from peft_study.model.load import Base

EXAMPLES = tw.examples([9, 14, 11, 8, 20, 13, 10])


def trial_of(base: Base, name: str, config: MethodConfig | None = None, **changed: int) -> Trial:
    training = TrainingConfig(**{"learning_rate": 1e-3, "steps": 6, "batch_size": 4, **changed})
    return Trial(name, create(config or LoraConfig(rank=2), base, tw.material(), 0), training, EXAMPLES)


def losses_to_the_end(engine: Engine, trial: Trial) -> list[float]:
    found = []
    while not trial.finished:
        found += [e.report.loss for e in engine.step() if e.trial is trial and e.report]
    return found


def test_slots_are_given_out_in_order_and_again() -> None:
    base = tw.base()
    engine = Engine(base, slots=2)
    first, second, third = (trial_of(base, name) for name in "abc")
    assert (engine.admit(first), engine.admit(second)) == (0, 1)
    assert not engine.has_room()
    with pytest.raises(ConfigError, match="all 2 slots are taken"):
        engine.admit(third)
    engine.evict(first)
    assert engine.admit(third) == 0
    assert engine.trials == (third, second)


def test_a_name_an_adapter_and_a_trial_are_there_once() -> None:
    base = tw.base()
    engine = Engine(base)
    first = trial_of(base, "a")
    engine.admit(first)
    with pytest.raises(ConfigError, match="of this name"):
        engine.admit(trial_of(base, "a"))
    with pytest.raises(ConfigError, match="with this adapter"):
        engine.admit(Trial("b", first.adapter, first.training, EXAMPLES))
    engine.evict(first)
    with pytest.raises(ConfigError, match="is not in the engine"):
        engine.evict(first)


def test_who_changes_the_base_is_alone() -> None:
    base = tw.base()
    engine = Engine(base)
    lora, full = trial_of(base, "lora"), trial_of(base, "full", FullConfig())
    engine.admit(lora)
    assert not engine.has_room(exclusive=True)
    with pytest.raises(ConfigError, match="must run alone"):
        engine.admit(full)
    engine.evict(lora)
    engine.admit(full)
    assert not engine.has_room()
    with pytest.raises(ConfigError, match="must run alone"):
        engine.admit(lora)


def test_a_trial_that_left_in_the_middle_of_a_batch_comes_back_into_another_slot() -> None:
    """Its batch was cut: what had been summed of it must not be counted twice, nor its items keep the old slot."""
    base = tw.base()
    alone = trial_of(base, "alone", PromptTuningConfig(tokens=3, init="random"))
    engine = Engine(base, row_tokens=40)
    engine.admit(alone)
    expected = losses_to_the_end(engine, alone)

    engine = Engine(base, row_tokens=40)
    other, guest = trial_of(base, "other", steps=40), trial_of(base, "guest", alone.adapter.config)
    engine.admit(guest)
    engine.admit(other)
    engine.step()
    assert guest.progress().sums, "its batch was not cut: the test tests nothing"
    engine.evict(guest)
    engine.step()
    engine.evict(other)
    engine.admit(trial_of(base, "third", steps=40))
    assert engine.admit(guest) == 1
    assert losses_to_the_end(engine, guest) == pytest.approx(expected, rel=1e-5)
    for name, parameter in alone.parameters.items():
        torch.testing.assert_close(guest.parameters[name], parameter, rtol=1e-4, atol=1e-6)


def test_a_newcomer_does_not_crowd_out_who_was_served_before() -> None:
    base = tw.base()
    engine = Engine(base, row_tokens=30)
    old = trial_of(base, "old", steps=100)
    engine.admit(old)
    for _ in range(20):
        engine.step()
    before = engine.places[0][1]
    engine.admit(trial_of(base, "new", steps=100))
    for _ in range(20):
        engine.step()
    (_, old_tokens), (_, new_tokens) = engine.places.values()
    assert old_tokens > before + 100
    assert abs(old_tokens - new_tokens) <= 20, "from now on both get the same"


def test_held_out_losses_of_several_trials_are_those_of_each() -> None:
    base = tw.base()
    engine = Engine(base, row_tokens=50)
    configs = (LoraConfig(rank=2), PromptTuningConfig(tokens=3, init="random"))
    trials = [trial_of(base, str(number), config) for number, config in enumerate(configs)]
    for trial in trials:
        engine.admit(trial)
    for _ in range(8):
        engine.step()
    rows: list[set[int]] = []
    whole = engine.runner.row

    def note(items):  # type: ignore[no-untyped-def]
        rows.append({item.slot for item in items})
        return whole(items)

    engine.runner.row = note  # type: ignore[method-assign]
    together = engine.losses([trial.adapter for trial in trials], EXAMPLES, [5, 0, 3])
    assert {0, 1} in rows, "they share a row"
    for trial, found in zip(trials, together, strict=True):
        (alone,) = engine.losses([trial.adapter], EXAMPLES, [5, 0, 3])
        assert found == pytest.approx(alone, rel=1e-5)
