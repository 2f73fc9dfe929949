"""Learning rates are transformers' own, also after a resume; float16's loss scale finds its level."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from transformers import get_scheduler

import tiny_world as tw
from peft_study.config import LoraConfig, PromptTuningConfig, Schedule, TrainingConfig
from peft_study.engine.engine import Engine
from peft_study.engine.trial import Progress, Trial
from peft_study.methods import create

STEPS, RATE = 12, 3e-3


def trial_of(schedule: str, *, ratio: float = 0.3, **changed: Any) -> Trial:
    training = TrainingConfig(**{"learning_rate": RATE, "steps": STEPS, "batch_size": 2} | changed).model_copy(
        update={"schedule": schedule, "warmup_ratio": ratio}
    )
    base = tw.base("llama")
    return Trial("t", create(PromptTuningConfig(tokens=2, init="random"), base, None, 0), training, tw.examples([8, 9]))


def rates(trial: Trial, *, at: int = 0) -> list[float]:
    engine = Engine(tw.base("llama"))
    engine.admit(trial)
    trial.restore(Progress(at), slot=0)
    found = []
    while not trial.finished:
        found += [event.report.learning_rate for event in engine.step() if event.report]
    return found


def plain(schedule: str, warmup: int) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=RATE)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("ratio", "warmup"), [(0.0, 0), (0.3, 3), (0.5, 6)])
@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_every_schedule_is_transformers(schedule: str, ratio: float, warmup: int) -> None:
    assert rates(trial_of(schedule, ratio=ratio)) == pytest.approx(plain(schedule, warmup), abs=1e-12)


@pytest.mark.parametrize("at", [0, 2, 7, 11])
@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_a_restored_schedule_goes_on_where_it_was(schedule: str, at: int) -> None:
    assert rates(trial_of(schedule), at=at) == pytest.approx(plain(schedule, 3)[at:], abs=1e-12)


def test_all_six_schedules_are_tested() -> None:
    assert len(get_args(Schedule)) == 6


def test_epochs_count_whole_passes_and_steps_override_them() -> None:
    assert trial_of("linear", steps=None, epochs=3).total_steps == 3
    assert trial_of("linear", steps=None, epochs=3, batch_size=1).total_steps == 6
    assert trial_of("linear", steps=5, epochs=3).total_steps == 5


@pytest.mark.parametrize(("rank", "start"), [(2, 2.0**16), (2, 2.0**4)])
def test_scaled_gradients_give_the_steps_of_unscaled_ones(rank: int, start: float) -> None:
    """In float32 a scale changes nothing: what is multiplied in is divided out."""
    ends = []
    for scales in (False, True):
        base, examples = tw.base("llama"), tw.examples([8, 9, 12])
        training = TrainingConfig(learning_rate=1e-2, steps=4, batch_size=3)
        trial = Trial("t", create(LoraConfig(rank=rank), base, None, 0), training, examples, scales_loss=scales)
        if scales:
            trial.loss_scale = start
        engine = Engine(base)
        engine.admit(trial)
        norms = [event.report.gradient_norm for _ in range(4) for event in engine.step()]
        ends.append((norms, [p.detach().clone() for p in trial.parameters.values()]))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    for plain_end, scaled_end in zip(ends[0][1], ends[1][1], strict=True):
        torch.testing.assert_close(plain_end, scaled_end, rtol=1e-4, atol=1e-7)


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    base, examples = tw.base("llama", dtype=torch.float16), tw.examples([8, 9, 12])
    training = TrainingConfig(learning_rate=1e-2, steps=3, batch_size=3)
    trial = Trial("t", create(LoraConfig(rank=2), base, None, 0), training, examples, scales_loss=True)
    trial.loss_scale = 2.0**24
    before = {name: p.detach().clone() for name, p in trial.parameters.items()}
    engine = Engine(base)
    engine.admit(trial)
    (event,) = engine.step()
    assert event.report.skipped
    assert event.diverged is None
    assert math.isfinite(event.report.loss)
    assert trial.loss_scale == 2.0**23
    assert trial.step == 0
    assert all(torch.equal(before[name], p) for name, p in trial.parameters.items())
    assert trial.optimizer is not None
    assert not trial.optimizer.state, "the optimizer took a step"
    reports = []
    while not trial.finished:
        reports += [event.report for event in engine.step()]
    taken = [report for report in reports if not report.skipped]
    assert [report.step for report in taken] == [1, 2, 3]
    assert trial.loss_scale < 2.0**23
    assert all(math.isfinite(report.gradient_norm) for report in taken)
    assert any(not torch.equal(before[name], p) for name, p in trial.parameters.items())


def test_gradients_that_stay_infinite_at_scale_one_are_a_divergence() -> None:
    base, examples = tw.base("llama"), tw.examples([8, 9])
    training = TrainingConfig(learning_rate=1e-2, steps=3, batch_size=2)
    trial = Trial("t", create(LoraConfig(rank=2), base, None, 0), training, examples, scales_loss=True)
    trial.loss_scale = 2.0
    before = {name: p.detach().clone() for name, p in trial.parameters.items()}
    engine = Engine(base)
    engine.admit(trial)
    first = next(iter(trial.parameters.values()))
    first.grad = torch.full_like(first, math.inf)
    (event,) = engine.step()
    assert event.report is not None
    assert event.report.skipped, "at a lower scale it might have gone on"
    first.grad = torch.full_like(first, math.inf)
    (event,) = engine.step()
    assert event.diverged == "the gradient became inf at step 1"
    assert event.report is None
    assert engine.trials == ()
    assert all(torch.equal(before[name], p) for name, p in trial.parameters.items()), "it stepped all the same"


def test_a_batch_that_goes_on_after_a_restart_began_when_it_was_restored() -> None:
    trial = trial_of("constant")
    engine = Engine(tw.base("llama"), row_tokens=11)
    engine.admit(trial)
    assert engine.step() == [], "a row holds one of the two examples"
    trial.restore(trial.progress(), slot=0)
    (event,) = engine.step()
    assert event.report is not None
    assert event.report.seconds < 60
