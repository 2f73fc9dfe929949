"""Levels, noise and rises of a series, against series whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from run_curves import falling, noise

from peft_study.doctor.observations import LossCurve
from peft_study.doctor.trend import Level, held_out_fall, series_of, training_series


def test_the_noise_is_that_of_the_points_and_not_the_trend() -> None:
    for spread in (0.02, 0.2):
        series = series_of(np.arange(200.0), 5 + falling(200) + noise(200, spread))
        assert series is not None
        assert series.noise == pytest.approx(spread, rel=0.25)
        assert series.inflation < 1.5
    exact = series_of(np.arange(50.0), falling(50))
    assert exact is not None
    assert exact.noise == 0


def test_correlated_noise_widens_a_level() -> None:
    errors = []
    for correlation in (0.0, 0.6):
        series = series_of(np.arange(400.0), 2 + noise(400, 0.1, correlation=correlation))
        assert series is not None
        errors.append(series.level(0, 100).error)
    # the variance of a mean of AR(1) noise is (1 + 0.6) / (1 - 0.6) = 4 times as large
    assert 1.5 < errors[1] / errors[0] < 2.5


def test_levels_are_compared_in_standard_errors() -> None:
    assert Level(2.0, 0.3).above(Level(1.0, 0.4)) == pytest.approx(2.0)
    assert Level(1.0, 0.0).above(Level(1.0, 0.0)) == 0.0
    assert Level(2.0, 0.0).above(Level(1.0, 0.0)) == np.inf


def test_flat_noise_neither_falls_nor_rises_more_than_chance() -> None:
    told = 0
    for seed in range(100):
        series = series_of(np.arange(80.0), 2 + noise(80, 0.2, seed=seed))
        assert series is not None
        told += series.falls() or abs(series.direction()) > 3
    assert told <= 3


def test_a_climb_is_found_where_it_begins() -> None:
    values = np.concatenate([falling(30, end=1.5), np.full(20, 1.9)]) + noise(50, 0.02)
    series = series_of(np.arange(1.0, 51.0), values)
    assert series is not None
    climb = series.climb(4)
    assert climb is not None
    assert climb.step == 31
    assert climb.size == pytest.approx(0.4, abs=0.05)
    assert climb.sudden
    assert climb.errors > 10
    slow = series_of(np.arange(50.0), np.linspace(1, 2, 50) + noise(50, 0.02))
    assert slow is not None
    assert (found := slow.climb(4)) is not None
    assert not found.sudden


def test_holes_are_left_out_and_long_logs_averaged() -> None:
    values = 2 + noise(2000, 0.1)
    values[::3] = np.nan
    series = series_of(np.arange(2000.0), values)
    assert series is not None
    assert 400 <= len(series) < 800
    assert np.isfinite(series.values).all()
    assert series_of(np.arange(3.0), np.ones(3)) is None
    assert series_of(np.arange(9.0), np.full(9, np.nan)) is None


def test_the_base_takes_the_batches_own_part_out() -> None:
    hard = noise(60, 0.5)
    curve = LossCurve(steps=np.arange(60.0), loss=2.5 + hard - 0.01 * np.arange(60), minus_base=-0.01 * np.arange(60.0))
    series = training_series(curve)
    assert series is not None
    assert series.paired
    assert series.base == pytest.approx(2.5, abs=0.2)
    assert series.noise < 0.01
    plain = training_series(LossCurve(steps=curve.steps, loss=curve.loss))
    assert plain is not None
    assert not plain.paired
    assert plain.noise > 0.3


def test_the_fall_of_a_held_out_loss() -> None:
    curve = LossCurve(steps=np.arange(2.0), loss=np.ones(2), held_out_loss=np.array([2.0, np.nan, 1.5, 1.8]))
    assert held_out_fall(curve) == pytest.approx(0.25)
    assert held_out_fall(LossCurve(steps=np.arange(2.0), loss=np.ones(2))) == 0
