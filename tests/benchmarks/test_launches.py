"""Operations do not grow with the trials, and the paths that a card takes compute what those of the CPU do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from launches import as_on_a_card, operations, operations_of_shape, settings
from worlds import World, adapter_of, examples_of_length, vocabulary_of

from peft_study.config import TrainingConfig
from peft_study.engine.engine import Engine
from peft_study.engine.trial import Trial
from peft_study.model.load import Base
from peft_study.model.precision import choose


@pytest.fixture
def card() -> Iterator[tuple[Base, Counter[str]]]:
    count = Counter[str]()
    with as_on_a_card(count):
        yield tiny_base(), count


def tiny_base() -> Base:
    return World("tiny", choose("cpu", "float32")).base()


@pytest.mark.parametrize(("kind", "growth"), [("equal", 1.2), ("mixed", 2.0), ("unequal", 3.0)])
def test_sixteen_trials_take_few_more_operations_than_one(
    card: tuple[Base, Counter[str]], kind: str, growth: float
) -> None:
    """Of `unequal`, ranks of 4 to 32 are three groups: 4 and 8 stand together."""
    base, count = card
    one, many = (operations(base, settings(kind, number), count) for number in (1, 16))
    assert many["operations"] <= growth * one["operations"]
    assert one["waits"] == many["waits"] == 1, "the row's losses are read, once it has been sent to the device"


@pytest.mark.parametrize(("kind", "growth"), [("equal", 1.2), ("mixed", 2.0)])
def test_a_row_of_a_model_of_a_billion_parameters_grows_as_little(kind: str, growth: float) -> None:
    one, many = (operations_of_shape("llama-1b", settings(kind, number)) for number in (1, 16))
    assert 16 * 100 < one < many <= growth * one, "of 16 layers"


def trained(base: Base, kind: str, *, recompute: bool) -> list[list[float]]:
    """Returns losses and gradient norms of six trials over two steps."""
    engine = Engine(base, row_tokens=400, gradient_checkpointing=recompute)
    training = TrainingConfig(learning_rate=1e-2, steps=2, batch_size=3, schedule="constant", warmup_ratio=0)
    examples = examples_of_length(6, 16, vocabulary_of(base))
    trials = [Trial(str(n), adapter_of(c, base, n), training, examples) for n, c in enumerate(settings(kind, 6))]
    for trial in trials:
        engine.admit(trial)
    found: list[list[float]] = [[] for _ in trials]
    while engine.trials:
        for event in engine.step():
            assert event.report is not None
            found[int(event.trial.name)] += [event.report.loss, event.report.gradient_norm]
            if event.trial.finished:
                engine.evict(event.trial)
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["unequal", "mixed"])
def test_a_cards_paths_train_as_the_cpus_do(kind: str, recompute: bool) -> None:
    expected = trained(tiny_base(), kind, recompute=recompute)
    count = Counter[str]()
    with as_on_a_card(count):
        found = trained(tiny_base(), kind, recompute=recompute)
    assert count["varlen"] > 0
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)
