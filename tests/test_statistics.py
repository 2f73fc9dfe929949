"""Estimates against hand-made numbers, an independent bootstrap, and their promised coverage."""

from __future__ import annotations

import numpy as np
import pytest

from peft_study.statistics import Estimate, difference, mean_loss


def test_the_mean_is_over_tokens_not_over_examples() -> None:
    assert mean_loss(np.array([2.0, 30.0]), np.array([1, 9])).value == pytest.approx(3.2)


def test_interval_is_that_of_an_independent_bootstrap() -> None:
    generator = np.random.default_rng(3)
    counts = generator.integers(5, 40, size=200)
    sums = generator.gamma(4, 0.3, size=200) * counts
    drawn = np.random.default_rng(7).integers(0, 200, size=(20_000, 200))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    found = mean_loss(sums, counts)
    width = high - low
    assert found.low == pytest.approx(low, abs=0.08 * width)
    assert found.high == pytest.approx(high, abs=0.08 * width)


def test_interval_covers_what_it_says() -> None:
    generator, truth, hits = np.random.default_rng(0), 1.5, 0
    for _ in range(200):
        counts = generator.integers(5, 40, size=64)
        sums = counts * (truth + generator.normal(0, 0.4, size=64))
        found = mean_loss(sums, counts)
        hits += found.low <= truth <= found.high
    assert 178 <= hits <= 199  # 95 % of 200 is 190; three standard deviations are 9


def test_pairing_finds_what_two_intervals_hide() -> None:
    generator = np.random.default_rng(1)
    counts = np.full(64, 20)
    base = 20 * generator.normal(2, 0.8, size=64)
    better = base - 20 * generator.normal(0.05, 0.02, size=64)
    alone, other = mean_loss(better, counts), mean_loss(base, counts)
    assert alone.high > other.low
    assert difference(better, base, counts).excludes_zero()
    assert not difference(base, base, counts).excludes_zero()


def test_equal_ratios_and_single_examples() -> None:
    assert mean_loss(np.array([2.0, 4.0]), np.array([1, 2])) == Estimate(2.0, 2.0, 2.0)
    alone = mean_loss(np.array([3.0]), np.array([2]))
    assert (alone.value, alone.low, alone.high) == (1.5, -np.inf, np.inf)
    assert not np.isfinite(mean_loss(np.array([np.nan, 1.0]), np.array([1, 1])).value)
