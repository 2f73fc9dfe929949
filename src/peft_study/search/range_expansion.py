"""A best value at the edge of its range moves that end outwards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from peft_study.config import MethodSpace, Range
from peft_study.search.trials import StudyState, TrialRecord, best_first

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


def at_edge(value: float, bounds: tuple[float, float], *, log: bool) -> str | None:
    """Returns ``low`` or ``high`` where a value lies in the outermost part of a range, else None."""
    low, high, here = (math.log(x) for x in (*bounds, value)) if log else (*bounds, value)
    share = (here - low) / (high - low)
    return "low" if share < EDGE else "high" if share > 1 - EDGE else None


def widened(state: StudyState, method: str, space: MethodSpace) -> Widened | None:
    """Returns the range of a method that is to be widened now, if there is one."""
    finished = best_first(state.present(method))
    if len(finished) < ENOUGH or state.fresh.get(method):
        return None
    best = finished[0]
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
