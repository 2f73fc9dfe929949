"""Contract 2 with nine trials in one engine: each is the trial it is alone, whoever comes and goes beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch

import company
import tiny_world as tw
from company import NINE, ROW_TOKENS, alone, apart, drive, trial, values
from peft_study.config import LoraConfig, PromptTuningConfig, TrainingConfig
from peft_study.data.conversation import Example
from peft_study.engine.engine import Engine
from peft_study.engine.processes import ALONE, ProcessGroup
from peft_study.engine.trial import Trial
from peft_study.methods import create
from peft_study.model.load import Base


def compare(family: str, curves: dict[str, list[float]], trials: Sequence[Trial], dropout: float) -> None:
    """Compares with each trial alone: every loss to 1e-5, and every tensor at the end.

    AdamW divides small gradients by their own size, so rounding grows. A tensor may be as far off as those of the trial
    alone are from each other where only the cut of its batches into rows differs, but for a factor of two.
    """
    for own in trials:
        by_itself = alone(family, own.name, dropout=dropout)
        cuts = [alone(family, own.name, dropout=dropout, row_tokens=n).parameters for n in (35, ROW_TOKENS, 4096)]
        noise = max(apart(a[name], b[name]) for name in by_itself.parameters for a in cuts for b in cuts)
        assert noise < 1e-4, "noise as large as this would hide anything"
        assert len(curves[own.name]) == own.total_steps
        assert curves[own.name] == pytest.approx(by_itself.losses, rel=1e-5), own.name
        for parameter, tensor in values(own).items():
            assert apart(tensor, by_itself.parameters[parameter]) < max(1e-5, 2 * noise), (own.name, parameter)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_nine_trials_from_the_start_are_each_the_trial_alone(family: str, dropout: float) -> None:
    base = tw.base(family)
    trials = [trial(base, name, dropout=dropout) for name in NINE]
    engine = Engine(base, row_tokens=ROW_TOKENS)
    for own in trials:
        engine.admit(own)
    compare(family, drive(engine), trials, dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_trials_that_enter_and_leave_midway_change_no_other(family: str, dropout: float) -> None:
    """Three slots for nine trials, and a tenth and an eleventh that are taken out in the middle of a batch."""
    base = tw.base(family)
    trials = [trial(base, name, dropout=dropout) for name in NINE]
    passing = [trial(base, name, dropout=dropout) for name in ("rslora", "prefix")]
    for own in passing:
        own.name = f"passing {own.name}"
    left: list[str] = []

    def take_out(engine: Engine) -> None:
        for own in engine.trials:
            inside = own.progress().sums
            if own in passing and own.step >= 2 and inside and own.progress().waiting:
                engine.evict(own)
                left.append(own.name)

    engine = Engine(base, row_tokens=ROW_TOKENS, slots=3)
    curves = drive(engine, [trials[0], passing[0], trials[1], passing[1], *trials[2:]], between=take_out)
    assert sorted(left) == sorted(own.name for own in passing), "nobody was taken out in the middle of a batch"
    compare(family, curves, trials, dropout)


def test_dropout_is_there_to_be_compared() -> None:
    plain, dropped = (alone("llama", "lora", dropout=p).losses for p in (0.0, 0.2))
    assert plain[0] == pytest.approx(dropped[0], rel=1e-5), "B is zero before the first step"
    assert plain[-1] != pytest.approx(dropped[-1], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_bfloat16_company_is_no_further_off_than_another_cut_into_rows(family: str) -> None:
    """The noise is that of the trial alone, its batches cut into rows of one or two examples, of three, and whole.

    A fourth draw often lies outside the spread of three (a tensor of tiny Gemma-3 by 2 %), so twice the spread counts.
    In company a row has one example of a trial, so the distance is taken from such a cut, too.
    """
    base = tw.base(family, dtype=torch.bfloat16)
    trials = [trial(base, name, dropout=0.1) for name in NINE]
    engine = Engine(base, row_tokens=ROW_TOKENS)
    for own in trials:
        engine.admit(own)
    curves = drive(engine)
    noises = []
    for own in trials:
        cuts = [alone(family, own.name, dropout=0.1, dtype=torch.bfloat16, row_tokens=n) for n in (35, 70, 4096)]
        single = alone(family, own.name, dropout=0.1, dtype=torch.bfloat16, row_tokens=1)
        losses = torch.tensor([cut.losses for cut in cuts], dtype=torch.float64)
        # the spread of the whole curve: where the runs cross each other a single step has hardly any
        spread = float((losses.amax(0) - losses.amin(0)).max())
        distance = float((torch.tensor(curves[own.name], dtype=torch.float64) - losses).abs().amax(1).min())
        assert distance <= max(2 * spread, 1e-4), (own.name, distance, spread)
        noises.append(spread / float(losses.mean()))
        # one tensor's noise is seen in three draws only; the largest of the trial's tensors says what rounding does
        noise = max(apart(a.parameters[n], b.parameters[n]) for n in values(own) for a in cuts for b in cuts)
        for name, tensor in values(own).items():
            nearest = min(apart(tensor, cut.parameters[name]) for cut in (single, *cuts))
            assert nearest <= max(2 * noise, 1e-5), (own.name, name, nearest, noise)
    assert max(noises) < 1e-2, "noise as large as this would hide anything"


def serving(base: Base, examples: Sequence[Example], batches: Sequence[int], row_tokens: int) -> Engine:
    """Returns an engine with a trial for each batch size, prompt tuning and LoRA in turn."""
    engine = Engine(base, row_tokens=row_tokens)
    for number, batch in enumerate(batches):
        config = PromptTuningConfig(tokens=2, init="random") if number % 2 else LoraConfig(rank=2)
        training = TrainingConfig(learning_rate=1e-4, steps=1000, batch_size=batch, data_seed=number)
        engine.admit(Trial(str(number), create(config, base, None, number), training, examples))
    return engine


@pytest.mark.parametrize("batches", [[4] * 12, [1, 8, 2, 16, 3, 5, 1, 32, 4, 4, 2, 7]], ids=["equal", "different"])
def test_no_slot_starves_where_rows_hold_few_examples(batches: list[int]) -> None:
    """Twelve slots, rows of two or three examples: whoever was served least is next, so all stay abreast."""
    base, examples = tw.base("llama"), company.data()
    longest = max(len(example) for example in examples) + 2
    engine = serving(base, examples, batches, row_tokens=60)
    for row in range(120):
        engine.step()
        served = [tokens for _, tokens in engine.places.values()]
        # who did not fit into the row's end waits for the next: what fills that end may go ahead by as much
        assert max(served) - min(served) <= 2 * longest, row
        if row >= 12:
            assert min(served) > 0, "a slot had nothing in twelve rows"
    assert max(served) - min(served) < 0.1 * max(served)
    for own, batch in zip(engine.trials, batches, strict=True):
        assert own.step >= int(0.8 * min(served) / (batch * longest)), own.name
        assert own.step > 0 or batch * longest > min(served), f"{own.name} took no step"


def crowd(trials: int, length: int, *, batch: int, row_tokens: int, processes: ProcessGroup = ALONE) -> Engine:
    """Returns an engine with LoRA trials whose examples have one length."""
    base = tw.base("llama")
    engine = Engine(base, row_tokens=row_tokens, processes=processes)
    training = TrainingConfig(learning_rate=1e-4, steps=1000, batch_size=batch)
    for number in range(trials):
        adapter = create(LoraConfig(rank=2), base, None, number)
        engine.admit(Trial(str(number), adapter, training, tw.examples([length] * 8)))
    return engine


def test_equal_examples_are_served_within_one_of_each_other() -> None:
    """Where every item is as long as the next, no slot is ever more than one example ahead."""
    engine = crowd(9, 20, batch=5, row_tokens=60)
    for _ in range(40):
        engine.step()
        served = [tokens for _, tokens in engine.places.values()]
        assert max(served) - min(served) <= 20


def test_a_late_trial_neither_catches_up_nor_waits() -> None:
    base, examples = tw.base("llama"), company.data()
    engine = serving(base, examples, [4] * 5, row_tokens=60)
    for _ in range(30):
        engine.step()
    late = Trial(
        "late", create(LoraConfig(rank=2), base, None, 9), TrainingConfig(learning_rate=1e-4, steps=9), examples
    )
    engine.admit(late)
    before = {slot: tokens for slot, (_, tokens) in engine.places.items()}
    assert before[5] == min(before.values())
    for _ in range(12):
        engine.step()
    gained = [tokens - before[slot] for slot, (_, tokens) in engine.places.items()]
    assert max(gained) - min(gained) <= 4 * 32
    assert min(gained) > 0


def test_short_examples_of_a_slot_stand_together() -> None:
    """Two of ten tokens are an eighth of the row: of twelve trials eight are in it, and the others in the next."""
    engine = crowd(12, 10, batch=4, row_tokens=160)
    for served in ([20] * 8 + [0] * 4, [40] * 4 + [20] * 8, [40] * 12):
        engine.step()
        assert [tokens for _, tokens in engine.places.values()] == served


def test_short_examples_stand_together_in_the_rows_of_all_processes() -> None:
    """Items go to the row that has the fewest tokens, so a turn is as long as an eighth of all rows."""
    engine = crowd(24, 10, batch=4, row_tokens=160, processes=ProcessGroup(0, 2))
    rows = engine._taken().rows
    counts = [Counter(item.slot for _, _, item in row.entries) for row in rows]
    assert [set(count.values()) for count in counts] == [{2}, {2}]
