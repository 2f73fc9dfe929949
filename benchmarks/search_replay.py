"""Searches replayed on measured curves: one after another, Ray Tune's ASHA, and when each would recommend well.

A search is a list of what was seen when: (seconds, cell, step, dev loss). What it would recommend at a moment follows:

    highest    the least dev loss among what has reached the highest step that anything has reached
    finished   the least dev loss among what has come to the last step; before that nothing
"""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from search_grid import Curves

Rule = Literal["highest", "finished"]
RULES: tuple[Rule, ...] = ("highest", "finished")
NEVER = math.inf


@dataclass(frozen=True, slots=True)
class Seen:
    """A dev loss became known, seconds after the command was given."""

    at: float
    cell: str
    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class Search:
    """One search: what it saw, when all was over, and what it recommended from when on, if it does so by itself."""

    seen: Sequence[Seen]
    over: float
    recommends: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a system.

    Attributes:
        start_up: once.
        overhead: of each trial, beside training and evaluation.
        token: of training.
        dev_token: of evaluation.
        concurrent: trials at a time.
    """

    start_up: float
    overhead: float
    token: float
    dev_token: float
    concurrent: int = 1


def one_after_another(curves: Curves, order: Sequence[str], costs: Costs) -> Search:
    """Replays the grid in that order, each cell to its end."""
    clock, seen = costs.start_up, []
    for name in order:
        cell = curves.cells[name]
        clock += costs.overhead + costs.token * curves.tokens_between(0, cell.steps)
        clock += costs.dev_token * curves.dev_tokens
        if cell.status == "finished":
            seen.append(Seen(clock, name, curves.steps, cell.loss(curves.steps)))
    return Search(seen, clock)


class _Trial:
    """What Ray Tune's scheduler asks of a trial."""

    def __init__(self, name: str) -> None:
        self.trial_id = name


def asha(curves: Curves, order: Sequence[str], costs: Costs) -> Search:
    """Replays the grid under Ray Tune's own scheduler class, on a clock of ours; its rungs are those of our study."""
    from ray.tune.schedulers import AsyncHyperBandScheduler

    rungs = (*curves.rungs, curves.steps)
    reduction = round(rungs[1] / rungs[0]) if len(rungs) > 1 else 3
    assert all(rungs[0] * reduction**k == rung for k, rung in enumerate(rungs)), f"Ray Tune cannot have rungs {rungs}"
    scheduler = AsyncHyperBandScheduler(
        time_attr="step",
        metric="loss",
        mode="min",
        max_t=curves.steps,
        grace_period=rungs[0],
        reduction_factor=reduction,
    )
    waiting, turn = list(order), itertools.count()
    heap: list[tuple[float, int, str, int]] = []  # when a trial has been judged at which of the rungs
    seen, over = list[Seen](), 0.0

    def train(name: str, begin: float, rung: int) -> None:
        tokens = curves.tokens_between(rungs[rung - 1] if rung else 0, rungs[rung])
        at = begin + costs.token * tokens + costs.dev_token * curves.dev_tokens
        heapq.heappush(heap, (at, next(turn), name, rung))

    def start(at: float) -> None:
        name = waiting.pop(0)
        scheduler.on_trial_add(None, _Trial(name))
        train(name, at + costs.overhead, 0)

    for _ in range(min(costs.concurrent, len(waiting))):
        start(costs.start_up)
    while heap:
        over, _, name, rung = heapq.heappop(heap)
        step, loss = rungs[rung], curves.cells[name].loss(rungs[rung])
        if math.isfinite(loss):
            seen.append(Seen(over, name, step, loss))
        if scheduler.on_trial_result(None, _Trial(name), {"step": step, "loss": loss}) == "CONTINUE":
            train(name, over, rung + 1)
        elif waiting:
            start(over)
    return Search(seen, over)


def recommended(seen: Iterable[Seen], rule: Rule, last: int) -> list[tuple[float, str]]:
    """Returns what a search would recommend from when on: (seconds, cell), one entry a change.

    Args:
        seen: in the order of time.
        rule: by which.
        last: the last step of a trial.
    """
    changes: list[tuple[float, str]] = []
    best: Seen | None = None
    for new in seen:
        if rule == "finished" and new.step < last:
            continue
        if best is None or new.step > best.step or (new.step == best.step and new.loss < best.loss):
            best = new
            if not changes or changes[-1][1] != new.cell:
                changes.append((new.at, new.cell))
    return changes


def good_from(changes: Sequence[tuple[float, str]], good: frozenset[str]) -> tuple[float, float]:
    """Returns when a good cell is recommended first, and from when on for good; `NEVER` where it is not."""
    first = next((at for at, cell in changes if cell in good), NEVER)
    stays = NEVER
    for at, cell in reversed(changes):
        if cell not in good:
            break
        stays = at
    return first, stays


def changes_of(search: Search, curves: Curves, rule: Rule) -> Sequence[tuple[float, str]]:
    """Returns what a search recommends from when on: by itself, else by the rule."""
    return search.recommends or recommended(search.seen, rule, curves.steps)


def times(search: Search, curves: Curves, rule: Rule) -> dict[str, float]:
    """Returns a search's times to a good recommendation, by rule, and its whole time."""
    first, stays = good_from(changes_of(search, curves, rule), curves.good())
    return {"first": first, "stays": stays, "whole": search.over}


def regrets(searches: Sequence[Search], curves: Curves, rule: Rule, seconds: Sequence[float]) -> list[list[float]]:
    """Returns quartiles (25 %, 50 %, 75 %) over searches of the regret of what is recommended, at each time.

    Before anything is recommended a search recommends the worst cell.
    """
    worst = max(curves.regret(name) for name in curves.cells if math.isfinite(curves.cells[name].test))
    all_changes = [changes_of(search, curves, rule) for search in searches]
    found: list[list[float]] = []
    for at in seconds:
        there = []
        for changes in all_changes:
            before = [cell for when, cell in changes if when <= at]
            there.append(min(curves.regret(before[-1]), worst) if before else worst)
        found.append([round(float(value), 4) for value in np.quantile(there, (0.25, 0.5, 0.75))])
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Returns median and range over the seeds; None stands for never."""
    named = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    found: dict[str, Any] = {key: round(v, 1) if math.isfinite(v) else None for key, v in named.items()}
    return {**found, "reached": sum(map(math.isfinite, values)), "seeds": len(values)}


def factor(theirs: Sequence[float], ours: Sequence[float]) -> float | None:
    """Returns their median time divided by ours; None where either does not get there in most of its searches."""
    above, below = statistics.median(theirs), statistics.median(ours)
    return round(above / below, 2) if math.isfinite(above) and math.isfinite(below) and below > 0 else None
