"""Where a method's rates are looked for: a cheap test cuts off what cannot be, a best value at the edge moves it out.

range test   1e-5   3e-5   1e-4   3e-4   1e-3   3e-3   1e-2
             does not move |  learns               | diverges
                    ^ new low                 ^ new high
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_study.config import METHODS, Choices, MethodSpace, Range, StudyConfig
from peft_study.methods.registry import is_exclusive
from peft_study.search.trials import StudyState, TrialRecord
from peft_study.statistics import difference

TEST_SHARE = 0.1
"""Share of the search's steps that automatic range tests may cost."""
EDGE = 0.1
"""A best value in this outer share of a (log) range is at its edge."""
ENOUGH = 4
"""Finished trials before an edge is believed."""
WIDEN_STEP, WIDEN_LIMIT = 10**0.5, 10.0
"""An end moves by half a decade at a time, and by one decade at most beyond the range that was asked for."""


@dataclass(frozen=True, slots=True)
class Widened:
    """A range with an end moved outwards: the new bounds, the part that was added, and why."""

    dimension: str
    bounds: tuple[float, float]
    added: tuple[float, float]
    note: str


def test_rates(space: MethodSpace) -> tuple[float, ...]:
    """Returns the rates of a range test, two a decade; none where the rate is not searched over a log range."""
    rate = space.dimensions().get("learning_rate")
    if not isinstance(rate, Range) or not rate.log:
        return ()
    count = max(3, round(2 * math.log10(rate.high / rate.low)) + 1)
    return tuple(float(f"{r:.3g}") for r in np.geomspace(rate.low, rate.high, count))


def planned(config: StudyConfig, steps: int) -> dict[str, tuple[float, ...]]:
    """Returns the rates of the range tests, by method; a method that is not there has none.

    `auto` is decided once for all methods: that some had a test and others none would be no equal search.

    Args:
        config: filled.
        steps: optimizer steps of a trial.
    """
    search = config.search
    tests = {name: test_rates(space) for name, space in config.methods.items() if not is_exclusive(space.kind)}
    tests = {name: rates for name, rates in tests.items() if rates}
    cost = search.range_steps * sum(len(rates) for rates in tests.values())
    cheap = cost <= TEST_SHARE * steps * sum(config.trials(name) for name in tests)
    return tests if search.range_test is True or (search.range_test == "auto" and cheap) else {}


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
    rates: Sequence[float], trials: Sequence[TrialRecord], counts_N: npt.NDArray[np.int64]
) -> tuple[tuple[float, float] | None, str]:
    """Returns the bounds that a range test leaves (None: all of them), and what it showed.

    Cut off are the rates above the highest that neither diverged nor ended worse than it began, and those below the
    highest that still does not move; what moves little in a few steps may move in many, so that one stays.

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
            f"range test: no rate of {rates[0]:g} to {rates[-1]:g} learned anything in so few steps; none was cut off",
        )
    low = max(0, learning[0] - 1)
    high = learning[-1]
    still_right = [i for i in range(high + 1, len(rates)) if moves[i] == "still"]
    high = still_right[-1] if still_right else high
    if low == high:  # a range has two ends: the next rate that was tried, upwards if there is one
        low, high = (low, high + 1) if high + 1 < len(rates) else (low - 1, high)
    said = []
    if low > 0:
        said.append(f"{rates[low - 1]:g} and below do not move the loss")
    if high < len(rates) - 1:
        said.append(f"{rates[high + 1]:g} and above make it worse")
    if not said:
        return None, f"range test: every rate of {rates[0]:g} to {rates[-1]:g} is worth trying"
    return (rates[low], rates[high]), f"range test: {', '.join(said)}; searched: {rates[low]:g} to {rates[high]:g}"


def _movement(trial: TrialRecord, counts_N: npt.NDArray[np.int64]) -> str:
    if trial.last is None or trial.start is None:
        return "worse"
    change = difference(trial.last, trial.start, counts_N)
    if not change.excludes_zero():
        return "still"
    return "learns" if change.high < 0 else "worse"


def at_edge(value: float, bounds: tuple[float, float], *, log: bool) -> str | None:
    """Returns ``low`` or ``high`` where a value lies in the outermost part of a range, else None."""
    low, high, here = (math.log(x) for x in (*bounds, value)) if log else (*bounds, value)
    share = (here - low) / (high - low)
    return "low" if share < EDGE else "high" if share > 1 - EDGE else None


def widened(state: StudyState, method: str, space: MethodSpace) -> Widened | None:
    """Returns the range of a method that is to be widened now, if there is one."""
    finished = [t for t in state.present(method) if t.last is not None]
    if len(finished) < ENOUGH or state.fresh.get(method):
        return None
    best = min(finished, key=value_of)
    for name, dimension in space.dimensions().items():
        # of other settings (dropout, warm-up) the ends are limits of what makes sense
        movable = isinstance(dimension, Range) and (name == "learning_rate" or space.whole(name))
        if not isinstance(dimension, Range) or not movable or not dimension.log or name not in best.values:
            continue
        bounds = state.bounds.get(method, {}).get(name, (dimension.low, dimension.high))
        edge = at_edge(best.values[name], bounds, log=True)
        if edge == "high" and dimension.high <= bounds[1] < dimension.high * WIDEN_LIMIT * 0.999:
            top = min(bounds[1] * WIDEN_STEP, dimension.high * WIDEN_LIMIT)
            found = _moved(space, name, best, (bounds[0], top), (bounds[1], top))
        elif edge == "low" and dimension.low >= bounds[0] > dimension.low / WIDEN_LIMIT * 1.001:
            bottom = max(bounds[0] / WIDEN_STEP, dimension.low / WIDEN_LIMIT)
            found = _moved(space, name, best, (bottom, bounds[1]), (bottom, bounds[0]))
        else:
            continue
        if found is not None:
            return found
    return None


def value_of(trial: TrialRecord) -> float:
    """Returns the summed held-out loss after the last step of a finished trial: what settings are ranked by."""
    assert trial.last is not None
    return float(trial.last.sum())


def _moved(
    space: MethodSpace, name: str, best: TrialRecord, bounds: tuple[float, float], added: tuple[float, float]
) -> Widened | None:
    if space.whole(name):
        whole = (max(1, math.floor(added[0])), math.floor(added[1]))
        if whole[0] >= whole[1]:
            return None
        bounds, added = (max(1, math.floor(bounds[0])), math.floor(bounds[1])), whole
    where = f"{bounds[0]:.3g} to {bounds[1]:.3g}"
    note = f"{name}: the best so far, {best.values[name]:.3g}, lies at the edge; widened to {where}"
    return Widened(name, bounds, added, note)


def edges(values: dict[str, Any], space: MethodSpace, bounds: dict[str, tuple[float, float]]) -> dict[str, str]:
    """Returns which values of a best setting lie at the end of what was tried: dimension -> low or high."""
    found = {}
    for name, dimension in space.dimensions().items():
        if name not in values:  # of an earlier space
            continue
        if isinstance(dimension, Range):
            low, high = bounds.get(name, (dimension.low, dimension.high))
            # a value of an earlier space may lie anywhere, also where there is no logarithm
            inside = low * (1 - 1e-9) <= values[name] <= high * (1 + 1e-9)
            edge = at_edge(values[name], (low, high), log=dimension.log) if inside else None
        else:
            numbers = dimension.sorted_numbers
            edge = None
            if len(numbers) > 1 and values[name] in (numbers[0], numbers[-1]):
                edge = "low" if values[name] == numbers[0] else "high"
        if edge and values[name] != 0:  # nothing lies below no warm-up, no decay, no dropout
            found[name] = edge
    return found
