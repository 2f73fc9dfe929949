"""Rules on the training loss of a run: each fires on its fault, and just does not beside it."""

from __future__ import annotations

import numpy as np
import pytest
from run_curves import all_checks, falling, noise, one, seen, wrong

from peft_study.doctor.observations import UsedSettings
from peft_study.doctor.rule import RULES, examine

LORA = UsedSettings(method="lora", learning_rate=3e-4, total_steps=100)


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("points", [20, 60, 300])
def test_healthy_runs_get_no_warning(points: int, spread: float) -> None:
    told = [
        found
        for seed in range(10)
        if (found := wrong(seen(falling(points) + noise(points, spread, seed=seed), settings=LORA)))
    ]
    assert not told


def test_a_steady_rise_is_told_and_noise_is_not() -> None:
    up = np.linspace(1.0, 1.4, 100) + noise(100, 0.1)
    assert wrong(seen(up))[0] == "rising"
    problem = examine(seen(up)).problems[0]
    assert problem.level == "error"
    assert problem.values["end"] == pytest.approx(1.4, abs=0.1)
    # the same rise in noise that hides it, and one of 1 %
    assert "rising" not in all_checks(seen(np.linspace(1.0, 1.4, 20) + noise(20, 0.6)))
    assert "rising" not in all_checks(seen(np.linspace(1.0, 1.01, 400) + noise(400, 0.005)))


def test_the_loss_minus_the_base_shows_what_batches_hide() -> None:
    hard, above = noise(40, 0.6), np.linspace(0.0, 0.4, 40)
    assert not wrong(seen(2 + hard + above))
    assert wrong(seen(2 + hard + above, minus_base=above + noise(40, 0.03)))[0] == "rising"


def test_a_noisy_run_that_falls_gets_a_note_with_its_largest_jump() -> None:
    loss = np.linspace(2.0, 1.7, 200) + noise(200, 0.3)
    loss[120] = 3.4
    problem = one("noisy", seen(loss))
    assert problem is not None
    assert problem.level == "note"
    assert problem.step == 121
    assert one("noisy", seen(np.linspace(2.0, 1.0, 200) + noise(200, 0.05))) is None


def test_a_short_log_is_undecided_with_the_steps_that_it_takes() -> None:
    problem = one("undecided", seen(2 + noise(12, 0.5)))
    assert problem is not None
    assert problem.level == "note"
    assert problem.values["steps"] > 12
    # four times the noise takes sixteen times the steps, up to the change that there seems to be
    assert one("undecided", seen(2 + noise(400, 0.05))) is None
    assert one("undecided", seen([2.0])) is not None


def test_nan_to_the_end_is_divergence_and_a_hole_is_none() -> None:
    loss = falling(50)
    loss[30:] = np.nan
    problem = examine(seen(loss, settings=LORA)).problems[0]
    assert (problem.check, problem.step, problem.sure) == ("diverged", 31, "certain")
    loss = falling(50)
    loss[30] = np.nan
    assert not wrong(seen(loss))
    # Trainer leaves NaN out of the mean: the log says 0
    loss, norms = falling(50), np.full(50, 0.5)
    loss[30:], norms[30:] = 0.0, np.nan
    assert examine(seen(loss, gradient_norm=norms)).problems[0].step == 31
    assert not wrong(seen(falling(50, end=0.0), gradient_norm=np.full(50, 0.5)))


def test_an_explosion_is_divergence_and_a_small_jump_is_not() -> None:
    loss = falling(80, start=2.0, end=1.0) + noise(80, 0.05)
    loss[40:] = 6.0 + noise(40, 0.3)
    problem = examine(seen(loss, rate=np.full(80, 0.02), gradient_norm=np.full(80, 3.0))).problems[0]
    assert (problem.check, problem.level, problem.step) == ("diverged", "error", 41)
    assert "learning rate 0.02" in problem.evidence.en
    loss[40:] = 2.9 + noise(40, 0.3)
    assert wrong(seen(loss))[0] != "diverged"
    assert wrong(seen([2.0, 30.0])) == ["diverged"]
    assert not wrong(seen([2.0, 3.0]))


def test_a_jump_that_stays_or_recovers_is_too_hot() -> None:
    loss = falling(100) + noise(100, 0.05)
    loss[50:70] += 0.8
    problem = examine(seen(loss)).problems[0]
    assert problem.check == "too_hot"
    assert problem.step is not None
    assert 49 <= problem.step <= 53
    loss = falling(100) + noise(100, 0.05)
    loss[50] += 2.0  # one odd batch
    loss[70:80] += 0.1  # a hard stretch within the noise
    assert not wrong(seen(loss))


def test_a_prompt_that_leaves_its_text_is_too_hot_from_its_step_on() -> None:
    # measured: SmolLM2-135M, MAWPS, prompt tuning with 8 tokens at 0.1, batches of 4; the loss less the base's
    loss = [2.87, 2.28, 2.53, 2.44, 2.1, 3.15, 5.72, 2.93, 3.62, 4.39, 3.36, 2.69]
    above = [-0.03, -0.05, -0.19, -0.32, -0.48, 0.31, 3.11, 0.4, 0.9, 1.52, 0.8, -0.18]
    norms = [0.65, 0.45, 0.34, 0.51, 0.69, 29.57, 28.66, 16.75, 3.72, 4.3, 5.68, 1.03]
    prompt = UsedSettings(method="prompt_tuning", learning_rate=0.1)
    problem = examine(seen(loss, minus_base=np.array(above), gradient_norm=np.array(norms), settings=prompt)).problems[
        0
    ]
    assert (problem.check, problem.step) == ("too_hot", 6)
    # 0.03 beside it
    loss = [2.87, 2.28, 2.53, 2.52, 2.16, 2.44, 2.2, 1.96, 2.14, 2.17, 1.92, 2.13]
    above = [-0.03, -0.05, -0.2, -0.25, -0.42, -0.4, -0.41, -0.58, -0.58, -0.7, -0.65, -0.74]
    norms = [0.65, 0.45, 1.13, 0.51, 1.17, 0.46, 0.57, 0.68, 0.36, 0.61, 0.32, 0.48]
    assert not wrong(seen(loss, minus_base=np.array(above), gradient_norm=np.array(norms), settings=prompt))


def test_losing_all_that_was_learned_is_too_hot_without_gradient_norms() -> None:
    above = np.concatenate([[0, 0, -0.11, -0.27, -0.39], np.full(8, 0.04), np.linspace(-0.05, -0.8, 23)])
    above = above + noise(36, 0.04)
    hard = noise(36, 0.2, seed=1)
    assert wrong(seen(2.5 + hard + above, minus_base=above)) == ["too_hot"]
    above[5:13] = -0.3
    assert not wrong(seen(2.5 + hard + above, minus_base=above))


def test_an_early_explosion_that_recovers_is_a_short_warmup() -> None:
    loss = falling(60, start=2.5, end=0.8) + noise(60, 0.05)
    loss[2:6] = [5.3, 3.9, 3.4, 3.0]
    rate = np.full(60, 0.3)
    problem = examine(seen(loss, rate=rate)).problems[0]
    assert (problem.check, problem.step) == ("warmup_too_short", 3)
    # still warming up there: the rate was not at its height
    assert one("warmup_too_short", seen(loss, rate=np.minimum(np.arange(60) / 30, 1.0))) is None
    # one odd batch
    loss[3:6] = falling(60, start=2.5, end=0.8)[3:6]
    assert one("warmup_too_short", seen(loss, rate=rate)) is None
    # a rise of a few percent during the warm-up
    mild = falling(60, start=2.5, end=0.8) + noise(60, 0.05)
    mild[1:4] += 0.3
    assert not wrong(seen(mild, rate=rate))


def test_a_rate_of_zero_is_told_but_not_a_schedules_end() -> None:
    flat = 2 + noise(40, 0.02)
    assert wrong(seen(flat, rate=np.zeros(40)))[0] == "rate_zero"
    rate = np.linspace(1e-3, 0, 40)
    assert one("rate_zero", seen(flat, rate=rate)) is None
    rate[0] = 0.0  # the first step of a warm-up
    assert one("rate_zero", seen(flat, rate=rate)) is None
    rate[30:] = 0.0
    problem = one("rate_zero", seen(falling(40), rate=rate))
    assert problem is not None
    assert (problem.level, problem.step) == ("warning", 31)


def test_a_rate_below_the_range_that_teaches_nothing_is_too_cold() -> None:
    flat = 2 + noise(100, 0.05)
    prompt = UsedSettings(method="prompt_tuning", learning_rate=1e-4)
    assert wrong(seen(flat, settings=prompt)) == ["too_cold"]
    assert "0.001 and 3" in examine(seen(flat, settings=prompt)).problems[0].evidence.en
    # slow, but it learns
    assert not wrong(seen(np.linspace(2, 1.7, 100) + noise(100, 0.05), settings=prompt))
    # in the range it has another cause
    assert wrong(seen(flat, settings=LORA)) == ["never_learned"]
    assert one("too_cold", seen(flat, settings=UsedSettings(learning_rate=1e-7))) is not None
    assert one("too_cold", seen(flat, settings=UsedSettings(learning_rate=1e-7, optimizer="sgd"))) is None


def test_a_run_without_a_fall_never_learned_unless_it_is_too_short_or_under_way() -> None:
    flat = 2 + noise(100, 0.05)
    assert wrong(seen(flat)) == ["never_learned"]
    assert not wrong(seen(2 + noise(20, 0.5)))
    early = UsedSettings(total_steps=1000)
    assert not wrong(seen(flat, settings=early, stage="during"))
    held_out = {"held_out_steps": np.array([0.0, 100.0]), "held_out_loss": np.array([2.0, 1.8])}
    assert not wrong(seen(flat, **held_out))
    # what a plain log hides: the run lies below the base on the same examples
    assert not wrong(seen(flat, minus_base=-0.2 + noise(100, 0.02)))
    # slow
    assert not wrong(seen(np.linspace(2.0, 1.8, 100) + noise(100, 0.05)))


def test_no_right_answer_at_any_time_is_nothing_learned() -> None:
    loss = np.linspace(1.33, 1.24, 20)
    steps = 250 * np.arange(1, 21)
    none = {"accuracy_steps": steps, "accuracy": np.zeros(20), "steps": steps, "window": 250}
    assert wrong(seen(loss, **none)) == ["never_learned"]
    assert not wrong(seen(loss, **{**none, "accuracy": np.linspace(0.0, 0.1, 20)}))


def test_labels_that_cannot_be_predicted_stop_at_the_unigram_loss() -> None:
    loss = falling(100, start=4.0, end=2.5, speed=30) + noise(100, 0.05)
    assert wrong(seen(loss, unigram_loss=2.45)) == ["wrong_labels"]
    assert not wrong(seen(loss, unigram_loss=3.5))  # hard data: a plateau, but the inputs are used
    assert not wrong(seen(loss))
    passes = falling(100, start=4.0, end=1.5, speed=2) + noise(100, 0.05)
    assert not wrong(seen(passes, unigram_loss=2.45))


def test_every_rule_of_a_run_survives_odd_input() -> None:
    odd = [
        seen([]),
        seen([1.0]),
        seen([np.nan] * 5),
        seen(np.zeros(30)),
        seen(np.full(30, 2.0), rate=np.full(30, np.nan), gradient_norm=np.full(30, np.nan), epoch=np.full(30, np.nan)),
        seen([-1.0, -2.0] * 20, unigram_loss=0.0, resumed=(0, 7, 900)),
        seen([1e30, -1e30] * 10, loss_scale=np.zeros(20), skipped=20),
        seen(np.ones(9), held_out_steps=np.array([]), held_out_loss=np.array([]), source_loss={"a": np.array([])}),
        seen(np.ones(9), held_out_steps=np.array([0.0]), held_out_loss=np.array([np.nan, 1.0]), window=0),
    ]
    settings = UsedSettings(method="?", learning_rate=0.0, clip_norm=0.0, total_steps=0, warmup_steps=0)
    for each in odd:
        for settled in (each.settings, settings):
            observed = type(each)(curve=each.curve, settings=settled)
            for rule in RULES.values():
                if rule.kind == "run":
                    one(rule.name, observed)
            assert examine(observed).text("zh")


def test_a_loss_of_exactly_zero_is_no_success() -> None:
    assert wrong(seen(np.zeros(40)))[0] == "zero_loss"
    ends = np.concatenate([falling(40), np.zeros(20)])
    problem = one("zero_loss", seen(ends, gradient_norm=np.full(60, 0.5)))
    assert problem is not None
    assert (problem.level, problem.step) == ("error", 41)
    # a loss that went to zero by itself, and single zeros
    assert one("zero_loss", seen(np.concatenate([falling(40, end=0.01), np.zeros(20)]))) is None
    assert one("zero_loss", seen(np.concatenate([falling(40), [0.0, 0.0, 1.0]]))) is None


@pytest.mark.parametrize("value", [2.3, 2.3026, 2.302585, 0.6931, 3.14159])
@pytest.mark.parametrize("points", [20, 60, 200])
def test_a_constant_loss_has_learned_nothing_whatever_its_digits(points: int, value: float) -> None:
    assert wrong(seen(np.full(points, value))) == ["never_learned"]


def test_the_highest_of_many_noisy_points_is_no_short_warm_up() -> None:
    for points in (500, 3000, 6000):
        for seed in range(10):
            loss = falling(points) * (1 + noise(points, 0.2, seed=seed))
            assert not wrong(seen(loss)), (points, seed)
    bump = falling(3000) + noise(3000, 0.1)
    bump[20:80] += 3.0
    assert "warmup_too_short" in wrong(seen(bump))


def test_a_log_of_evaluations_alone_says_nothing_of_training() -> None:
    steps = np.array([100.0, 200.0, 300.0])
    losses = {"steps": [], "held_out_steps": steps, "held_out_loss": np.array([1.5, 2.0, 2.4])}
    problem = one("overfitting", seen([], **losses))
    assert problem is not None
    assert "training loss" not in problem.evidence.en
    assert one("undecided", seen([], **losses)) is None
