"""Rows are filled while the row before them runs: the same rows as if each were filled in its turn."""

from __future__ import annotations

import gc
import weakref
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny_world as tw
from company import NINE, ROW_TOKENS, drive, trial
from peft_study.config import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TrainingConfig
from peft_study.engine import engine as engine_module
from peft_study.engine.engine import Engine
from peft_study.engine.filling import Filled, Waiting, fill
from peft_study.engine.row import Item, RowPlan
from peft_study.engine.trial import Trial
from peft_study.methods import create


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[Filled]:
    """All rows that were filled, run or not."""
    found: list[Filled] = []

    def noted(*given: object) -> Filled:
        found.append(fill(*given))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(engine_module, "fill", noted)
    return found


def losses_and_places(slots: int) -> tuple[dict[str, list[float]], list[list[int]]]:
    """Returns the losses of nine trials in so many slots, and the tokens served before every row."""
    base, served = tw.base("llama"), list[list[int]]()
    trials = [trial(base, name, dropout=0.2) for name in NINE]
    passing = trial(base, "rslora", dropout=0.2)
    passing.name = "passing"

    def between(engine: Engine) -> None:
        served.append([tokens for _, tokens in engine.places.values()])
        if len(served) == 7 and engine.has_room():
            engine.admit(passing)
        if len(served) == 9 and passing in engine.trials:
            engine.evict(passing)
        if len(served) == 12:
            engine.row_tokens -= 10

    return drive(Engine(base, row_tokens=ROW_TOKENS, slots=slots), trials, between=between), served


@pytest.mark.parametrize("slots", [3, 10])
def test_rows_filled_ahead_are_those_filled_in_their_turn(slots: int) -> None:
    """Trials that enter, end and leave in the middle of a batch, and rows that become shorter."""
    with patch.object(Engine, "_fill_ahead"):
        in_turn = losses_and_places(slots)
    assert losses_and_places(slots) == in_turn


def test_a_row_is_filled_once_while_no_trial_enters_or_leaves(filled: list[Filled]) -> None:
    base, rows = tw.base("llama"), 0
    engine = Engine(base, row_tokens=ROW_TOKENS)
    trials = [trial(base, name) for name in ("lora", "prefix", "prompt")]
    for own in trials:
        engine.admit(own)
    while not any(own.finished for own in trials):
        engine.step()
        rows += 1
        assert len(filled) == rows + 1, "this row before it ran, and the next one"
    assert rows > 5


def test_a_step_that_float16_repeats_fills_its_row_again(filled: list[Filled]) -> None:
    """The batch after it was filled ahead, and is not run: the same examples come again, by half the scale."""
    base = tw.base("llama")
    training = TrainingConfig(learning_rate=1e-3, steps=3, batch_size=2)
    own = Trial("t", create(LoraConfig(rank=2), base, None, 0), training, tw.examples([9, 7, 8, 6]), scales_loss=True)
    engine = Engine(base)
    engine.admit(own)
    own.loss_scale = float(torch.finfo(torch.float32).max)
    (event,) = engine.step()
    assert event.report is not None
    assert event.report.skipped
    (again,) = engine.step()
    assert again.report is not None
    assert again.report.examples == event.report.examples
    first, repeated = ({item.weight for row in filled[number].rows for _, _, item in row.entries} for number in (0, 2))
    assert {2 * weight for weight in repeated} == first


def test_a_trial_that_left_is_kept_by_nobody() -> None:
    """The rows filled ahead hold the trials whose examples they have."""
    base = tw.base("llama")
    engine = Engine(base, row_tokens=ROW_TOKENS)
    own = trial(base, "lora")
    engine.admit(own)
    engine.step()
    engine.evict(own)
    left = weakref.ref(own)
    del own
    gc.collect()
    assert left() is None


class _Copies(TorchDispatchMode):
    """Counts the tensors that go from the host to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_meta and not args[0].is_meta:
            self.count += 1
        return out


def test_all_numbers_of_a_row_are_copied_at_once() -> None:
    base, examples = tw.base("llama"), tw.examples([4, 3, 5])
    prefix, prompt = PrefixTuningConfig(tokens=3, init="random"), PromptTuningConfig(tokens=2, init="random")
    adapters = [create(config, base, None, 0) for config in (LoraConfig(rank=2), prefix, prompt)]
    items = [Item(slot, adapters[slot], example) for slot, example in enumerate(examples)]
    plan = RowPlan.of(items, base.device)
    with _Copies() as copies:
        numbers = plan.numbers(torch.device("meta"))
    assert all(x.is_meta for x in numbers)
    assert copies.count == 1


def test_rows_are_the_same_only_where_all_that_they_are_filled_from_is() -> None:
    base = tw.base("llama")
    adapter = create(LoraConfig(rank=2), base, None, 0)
    one, like_it = (Item(0, adapter, tw.examples([4])[0]) for _ in range(2))
    waiting = Waiting({0: ((0, one),)}, {0: 5}, 64)
    assert waiting == Waiting({0: ((0, one),)}, {0: 5}, 64)
    for other in ({0: ((0, like_it),)}, {0: 5}, 64), ({0: ((0, one),)}, {0: 6}, 64), ({0: ((0, one),)}, {0: 5}, 32):
        assert waiting != Waiting(*other)
