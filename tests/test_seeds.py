"""Means over seeds: by hand, and how often their intervals cover the truth."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import t

from peft_study.statistics import difference, mean_loss, mean_over_seeds, seeds_difference

Sums = npt.NDArray[np.float64]


def test_without_noise_of_examples_it_is_students_interval_of_the_logarithm() -> None:
    """Three seeds at 1.0, 1.2 and 1.4 nats: mean 1.2, sd 0.2, standard error 0.2/sqrt 3, t of 2 degrees is 4.303.

    The logarithm's standard error is 0.2/sqrt 3/1.2 = 0.0962, so the interval is 1.2 times and by exp(0.4141).
    """
    counts = np.full(20, 5)
    sums = np.outer([1.0, 1.2, 1.4], counts)
    found = mean_over_seeds(sums, counts)
    factor = math.exp(4.302653 * 0.2 / math.sqrt(3) / 1.2)
    assert (found.value, found.low, found.high) == pytest.approx((1.2, 1.2 / factor, 1.2 * factor), rel=1e-6)


def test_the_interval_of_a_loss_stays_above_zero() -> None:
    """Two seeds at 0.572 -+ 0.0602: on the plain scale -0.194 to 1.337."""
    counts = np.full(20, 5)
    found = mean_over_seeds(np.outer([0.5118, 0.6322], counts), counts)
    factor = math.exp(12.7062 * 0.0602 / 0.572)
    assert (found.value, found.low, found.high) == pytest.approx((0.572, 0.572 / factor, 0.572 * factor), rel=1e-4)
    assert found.low > 0.1


def test_losses_of_zero_have_an_interval_from_zero() -> None:
    """Nearly all examples are known by heart: a resample may hold none of the others."""
    counts = np.full(20, 5)
    sums = np.zeros((2, 20))
    sums[:, 0] = [1.0, 2.0]
    found = mean_over_seeds(sums, counts)
    assert 0 <= found.low < found.value < found.high
    zero = mean_over_seeds(np.zeros((2, 20)), counts)
    assert (zero.value, zero.low, zero.high) == (0, 0, 0)


def test_a_difference_may_reach_below_zero() -> None:
    counts = np.full(20, 5)
    found = seeds_difference(np.outer([0.5, 0.7], counts), np.outer([0.5, 0.6], counts), counts)
    assert found.low < 0 < found.high


def test_a_difference_has_welchs_degrees_of_freedom() -> None:
    counts = np.full(20, 5)
    first, second = np.array([1.0, 1.2, 1.4]), np.array([2.0, 2.1])
    found = seeds_difference(np.outer(first, counts), np.outer(second, counts), counts)
    a, b = 0.04 / 3, 0.005 / 2
    half = t.ppf(0.975, (a + b) ** 2 / (a**2 / 2 + b**2 / 1)) * math.sqrt(a + b)
    assert (found.value, found.low, found.high) == pytest.approx((-0.85, -0.85 - half, -0.85 + half), rel=1e-6)


def test_examples_and_seeds_are_added_as_the_sides_of_a_right_angle() -> None:
    generator = np.random.default_rng(1)
    counts = generator.integers(5, 40, size=30)
    sums = counts * generator.gamma(4, 0.25, size=30)
    seeds = np.stack([sums - 0.1 * counts, sums, sums + 0.1 * counts])
    alone, found = mean_loss(sums, counts), mean_over_seeds(seeds, counts)
    half = 4.302653 * 0.1 / math.sqrt(3) / found.value
    above, below = math.log(alone.high / alone.value), math.log(alone.value / alone.low)
    assert math.log(found.high / found.value) == pytest.approx(math.hypot(above, half), rel=1e-6)
    assert math.log(found.value / found.low) == pytest.approx(math.hypot(below, half), rel=1e-6)


def test_one_seed_and_seeds_that_agree_leave_the_interval_over_examples() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(5, 40, size=30)
    sums, others = (counts * generator.gamma(4, 0.25, size=30) for _ in range(2))
    assert mean_over_seeds(sums[None], counts) == mean_loss(sums, counts)
    agree, alone = mean_over_seeds(np.stack([sums] * 3), counts), mean_loss(sums, counts)
    assert (agree.value, agree.low, agree.high) == pytest.approx((alone.value, alone.low, alone.high), rel=1e-12)
    assert seeds_difference(sums[None], others[None], counts) == difference(sums, others, counts)


def test_a_single_example_says_nothing_however_many_seeds() -> None:
    found = mean_over_seeds(np.array([[1.0], [2.0]]), np.array([1]))
    assert (found.value, found.low, found.high) == (1.5, -math.inf, math.inf)


def drawn(
    generator: np.random.Generator, seeds: int, spreads: tuple[float, float]
) -> tuple[Sums, Sums, npt.NDArray[np.int64]]:
    """Returns two methods with the same true loss of 2 nats: skewed examples they share, and seeds of their own."""
    counts = generator.integers(5, 40, size=48)
    examples = generator.gamma(4, 0.15, size=48) - 0.6

    def method(spread: float) -> Sums:
        own = spread * generator.standard_normal((seeds, 1)) + 0.05 * generator.standard_normal((seeds, 48))
        return np.asarray((2.0 + examples + own) * counts)

    return method(spreads[0]), method(spreads[1]), counts


@pytest.mark.parametrize("spreads", [(0.2, 0.2), (0.2, 0.02)], ids=["alike", "unlike"])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_what_they_say(seeds: int, spreads: tuple[float, float]) -> None:
    """With normal intervals it was 82 % (2 seeds), 87 % (3) and 91 % (5).

    Of 300 studies 285 are expected; three standard deviations are 11, and the bootstrap's own error over 48 skewed
    examples is some more. With seeds that differ little beside the examples the interval is rather too wide.
    """
    generator, means, differences = np.random.default_rng(seeds), 0, 0
    for _ in range(300):
        first, second, counts = drawn(generator, seeds, spreads)
        mean, between = mean_over_seeds(first, counts), seeds_difference(first, second, counts)
        means += mean.low <= 2.0 <= mean.high
        differences += between.low <= 0.0 <= between.high
    assert means >= 272
    assert differences >= 272


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_skewed_seeds(seeds: int) -> None:
    """Seeds vary by a log-normal factor of 40 %, examples by a gamma distribution of shape 2; the mean is 0.7 nats.

    On the plain scale it was 96.3 % (2 seeds), 94.7 % (3) and 93.0 % (5), and the interval reached below zero in 234,
    104 and 1 of 300 studies; on the log scale it is 97.3 %, 96.0 % and 94.0 %.
    """
    generator, covered = np.random.default_rng(seeds), 0
    for _ in range(300):
        counts = generator.integers(5, 40, size=48)
        examples = generator.gamma(2, 0.35, size=48)
        factors = np.exp(0.4 * generator.standard_normal((seeds, 1)) - 0.08)
        found = mean_over_seeds(examples * factors * counts, counts)
        covered += found.low <= 0.7 <= found.high
        assert found.low > 0
    assert covered >= 274  # 285 are expected; three standard deviations are 11
