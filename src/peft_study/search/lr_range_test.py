"""The learning rate range test: many rates for a few steps; those that cannot be right are cut off.

range test   1e-5   3e-5   1e-4   3e-4   1e-3   3e-3   1e-2
             does not move |  learns               | diverges
                    ^ new low                 ^ new high
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_study.config import METHODS, Choices, MethodSpace, Range, StudyConfig
from peft_study.methods.registry import is_exclusive
from peft_study.search.trials import TrialRecord
from peft_study.statistics import Counts, difference

TEST_SHARE = 0.1
"""Share of the search's steps that automatic range tests may cost."""


def test_rates(space: MethodSpace) -> tuple[float, ...]:
    """Returns the rates of a range test, two a decade; none where the rate is not searched over a log range."""
    rate = space.dimensions().get("learning_rate")
    if not isinstance(rate, Range) or not rate.log:
        return ()
    count = max(3, round(2 * math.log10(rate.high / rate.low)) + 1)
    return tuple(float(f"{r:.3g}") for r in np.geomspace(rate.low, rate.high, count))


def planned(config: StudyConfig, steps: int) -> dict[str, tuple[float, ...]]:
    """Returns the rates of the range tests, by method; a method that is not there has none.

    `auto` is decided once for all methods: that some had a test and others none would be no equal search. The Bayesian
    search needs none: its first trials are such a test.

    Args:
        config: filled.
        steps: optimizer steps of a trial.
    """
    search = config.search
    tests = {name: test_rates(space) for name, space in config.methods.items() if not is_exclusive(space.kind)}
    tests = {name: rates for name, rates in tests.items() if rates}
    cost = search.range_steps * sum(len(rates) for rates in tests.values())
    cheap = cost <= TEST_SHARE * steps * sum(config.trials(name) for name in tests)
    wanted = search.range_test == "auto" and cheap and search.sampler != "bayesian"
    return tests if search.range_test is True or wanted else {}


def central(space: MethodSpace) -> dict[str, Any]:
    """Returns values in the middle of every dimension: the method's own default where it is among the choices."""
    values = {}
    for name, dimension in space.dimensions().items():
        field = METHODS[space.kind].model_fields.get(name)
        if isinstance(dimension, Choices):
            default = field.default if field is not None else None
            middle = dimension.choices[len(dimension.choices) // 2]
            values[name] = default if default in dimension.choices else middle
        else:
            middle = (
                math.sqrt(dimension.low * dimension.high) if dimension.log else (dimension.low + dimension.high) / 2
            )
            values[name] = round(middle) if space.whole(name) else middle
    return values


def verdict(
    rates: Sequence[float], trials: Sequence[TrialRecord], counts_N: Counts
) -> tuple[tuple[float, float] | None, str]:
    """Returns the range that a range test leaves (None: all of it), and its result in words.

    Left out are rates above the highest that neither diverged nor ended worse than it began, and rates below the
    highest that does not move the loss yet; that one stays, because it may do so in more steps.

    Args:
        rates: ascending.
        trials: of each rate.
        counts_N: supervised tokens of each held-out example.
    """
    moves = [_movement(trial, counts_N) for trial in trials]
    learning = [i for i, move in enumerate(moves) if move == "learns"]
    if not learning:
        return (
            None,
            f"range test: no rate of {rates[0]:g} to {rates[-1]:g} learned anything in so few steps; none was left out",
        )
    low = max(0, learning[0] - 1)
    high = learning[-1]
    still_right = [i for i in range(high + 1, len(rates)) if moves[i] == "still"]
    high = still_right[-1] if still_right else high
    if low == high:  # a range needs two ends: take the next tested rate, the upper one if there is one
        low, high = (low, high + 1) if high + 1 < len(rates) else (low - 1, high)
    said = []
    if low > 0:
        said.append(f"{rates[low - 1]:g} and below do not move the loss")
    if high < len(rates) - 1:
        said.append(f"{rates[high + 1]:g} and above make it worse")
    if not said:
        return None, f"range test: every rate of {rates[0]:g} to {rates[-1]:g} is worth trying"
    return (rates[low], rates[high]), f"range test: {', '.join(said)}; searched: {rates[low]:g} to {rates[high]:g}"


def _movement(trial: TrialRecord, counts_N: Counts) -> str:
    if trial.last is None or trial.start is None:
        return "worse"
    change = difference(trial.last, trial.start, counts_N)
    if not change.excludes_zero():
        return "still"
    return "learns" if change.high < 0 else "worse"
