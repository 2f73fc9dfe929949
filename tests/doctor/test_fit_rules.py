"""Rules on held-out losses, borders of epochs, resumed runs and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from run_curves import all_checks, falling, noise, one, seen, wrong

from peft_study.doctor.observations import UsedSettings

STEPS = np.arange(0.0, 101.0, 12.5)


def held_out(*losses: float, **more: Any) -> dict[str, Any]:
    """Returns held-out losses, spread evenly over 100 steps."""
    return {"held_out_steps": np.linspace(0, 100, len(losses)), "held_out_loss": np.array(losses), **more}


def test_a_held_out_loss_that_turns_up_is_overfitting() -> None:
    train = falling(100, end=0.3) + noise(100, 0.03)
    problem = one("overfitting", seen(train, **held_out(2.0, 1.5, 1.3, 1.4, 1.6)))
    assert problem is not None
    assert problem.step == 50
    assert wrong(seen(train, **held_out(2.0, 1.5, 1.3, 1.4, 1.6))) == ["overfitting"]
    assert not wrong(seen(train, **held_out(2.0, 1.5, 1.3, 1.31, 1.32), epoch=np.linspace(0, 1, 100)))
    # one evaluation after the lowest: it may be chance
    assert one("overfitting", seen(train, **held_out(2.0, 1.5, 1.3, 1.37))) is None
    assert one("overfitting", seen(train, **held_out(2.0, 1.5, 1.3, 1.5))) is not None
    # training rises too: that is no overfitting
    assert one("overfitting", seen(train[::-1], **held_out(2.0, 1.5, 1.3, 1.4, 1.6))) is None
    # noise of the evaluations themselves
    wobble = held_out(2.0, 1.2, 1.5, 1.1, 1.4, 1.15, 1.45, 1.1, 1.3)
    assert one("overfitting", seen(train, **wobble)) is None


def test_the_interval_of_held_out_losses_is_heeded() -> None:
    train = falling(100, end=0.3) + noise(100, 0.03)
    losses = held_out(2.0, 1.5, 1.3, 1.35, 1.38)
    above = losses["held_out_loss"] - 2.0
    wide = {"held_out_minus_base": above, "held_out_low": above - 0.3, "held_out_high": above + 0.3}
    narrow = {"held_out_minus_base": above, "held_out_low": above - 0.02, "held_out_high": above + 0.02}
    assert one("overfitting", seen(train, **losses, **wide)) is None
    assert one("overfitting", seen(train, **losses, **narrow)) is not None


def test_memorising_needs_a_gap_and_several_epochs() -> None:
    train = falling(100, end=0.1, speed=8)
    apart = held_out(2.0, 1.4, 1.3, 1.3, 1.3)
    assert wrong(seen(train, **apart, epoch=np.linspace(0, 6, 100))) == ["memorising"]
    assert not wrong(seen(train, **apart, epoch=np.linspace(0, 1, 100)))
    learned = held_out(2.0, 0.5, 0.2, 0.15, 0.12)
    assert not wrong(seen(train, **learned, epoch=np.linspace(0, 6, 100)))
    # without held-out losses it is a note at most
    assert not wrong(seen(falling(100, end=0.001), epoch=np.linspace(0, 8, 100)))
    assert "memorising" in all_checks(seen(falling(100, end=0.001), epoch=np.linspace(0, 8, 100)))


def test_one_source_that_rises_while_others_fall_is_told() -> None:
    sources = {"maths": np.array([2.0, 1.5, 1.2, 1.0, 0.9]), "code": np.array([1.0, 0.9, 1.0, 1.15, 1.3])}
    whole = held_out(1.5, 1.2, 1.1, 1.07, 1.1)
    train = falling(100, end=0.8)
    found = one("source_rising", seen(train, **whole, source_loss=sources))
    assert found is not None
    assert found.values["source"] == "code"
    assert wrong(seen(train, **whole, source_loss=sources)) == ["source_rising"]
    both = {"maths": sources["maths"], "code": np.array([1.0, 0.9, 0.88, 0.89, 0.9])}
    assert not wrong(seen(train, **whole, source_loss=both))
    # all of them rise: overfitting, not a source
    assert one("source_rising", seen(train, **whole, source_loss={"a": sources["code"], "b": sources["code"]})) is None


def epochs(points: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns the epoch at each step, as Trainer logs it: n / (steps an epoch)."""
    return np.arange(1, points + 1) * count / points


def test_jumps_up_at_epoch_borders_are_a_warning_and_falls_a_note() -> None:
    tooth = np.tile(np.linspace(1.6, 1.2, 40), 4) + noise(160, 0.05)
    problem = one("epoch_jumps", seen(tooth, epoch=epochs(160, 4)))
    assert problem is not None
    assert (problem.level, problem.step) == ("warning", 41)
    stairs = np.repeat([2.0, 1.4, 1.0, 0.7], 40) + noise(160, 0.05)
    problem = one("epoch_jumps", seen(stairs, epoch=epochs(160, 4)))
    assert problem is not None
    assert problem.level == "note"
    assert not wrong(seen(stairs, epoch=epochs(160, 4)))
    assert one("epoch_jumps", seen(falling(160) + noise(160, 0.05), epoch=epochs(160, 4))) is None
    # the jumps lie elsewhere
    assert one("epoch_jumps", seen(np.roll(tooth, 17), epoch=epochs(160, 4))) is None


def test_a_jump_at_a_resume_is_told_as_such() -> None:
    loss = falling(100) + noise(100, 0.05)
    loss[60:] += 0.9
    assert wrong(seen(loss, resumed=(60,))) == ["resume_jump"]
    assert wrong(seen(loss, resumed=(20,))) == ["too_hot"]
    assert not wrong(seen(falling(100) + noise(100, 0.05), resumed=(60,)))


@pytest.mark.parametrize(
    ("clip", "norm", "optimizer", "level"),
    [
        (1.0, 3.0, "sgd", "note"),
        (1.0, 30.0, "sgd", "warning"),
        (0.01, 3.0, "adamw_torch", "note"),
        (0.1, 3.0, None, "note"),
    ],
)
def test_clipping_at_every_step_is_a_note_unless_plain_descent_is_cut_short(
    clip: float, norm: float, optimizer: str | None, level: str
) -> None:
    norms = norm * (1 + 0.1 * noise(50, 1.0))
    settings = UsedSettings(clip_norm=clip, optimizer=optimizer)
    problem = one("always_clipped", seen(falling(50), gradient_norm=norms, settings=settings))
    assert problem is not None
    assert problem.level == level
    half = np.where(np.arange(50) % 2, 0.5 * clip, norm)
    assert one("always_clipped", seen(falling(50), gradient_norm=half, settings=settings)) is None


def test_overflow_in_float16_is_told_but_not_the_scalers_way_down() -> None:
    half = UsedSettings(compute_dtype="float16")
    scale = 65536.0 / 2 ** np.minimum(np.arange(100), 5)
    assert one("fp16_overflow", seen(falling(100), loss_scale=scale, settings=half)) is None
    scale = 65536.0 / 2 ** (np.arange(100) // 8)
    assert wrong(seen(falling(100), loss_scale=scale, settings=half)) == ["fp16_overflow"]
    norms = np.full(100, 1.0)
    norms[20::10] = np.inf
    assert one("fp16_overflow", seen(falling(100), gradient_norm=norms, settings=half)) is not None
    norms[20::10] = np.nan  # not float16: not logged
    assert one("fp16_overflow", seen(falling(100), gradient_norm=norms)) is None
    assert one("fp16_overflow", seen(falling(100), skipped=30, settings=half)) is not None
    assert one("fp16_overflow", seen(falling(100), skipped=2, settings=half)) is None


def test_held_out_losses_that_are_no_numbers() -> None:
    nan = float("nan")
    problem = one("held_out_broken", seen(falling(100), **held_out(2.0, nan, nan)))
    assert problem is not None
    assert (problem.level, problem.step) == ("warning", 50)
    assert one("held_out_broken", seen(falling(100), **held_out(2.0, nan, 1.5))) is None
    # a run that diverged has told it
    assert one("held_out_broken", seen([2.0, 1.5, nan], **held_out(2.0, nan, nan))) is None
