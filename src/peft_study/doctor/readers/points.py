"""Values of a log by step: put in order, and averaged down while they come, so that a log of any length fits.

P points of a series, as rows of step, value, place in the log, logged values that it averages
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MOST_POINTS = 30_000
"""Of a series; of a longer log each point is the mean of 2, 4, 8, ... logged values."""
_LEADERS = ("loss", "minus_base", "held_out_loss", "accuracy")
_STEP, _VALUE, _PLACE, _WEIGHT = range(4)
_MANY_FALLS, _FALLS, _SHORT = 0.05, 3, 3
"""More falls of the step than this share and number, or pieces shorter than this: the log is unordered, not resumed."""


class Points:
    """The values of a log.

    Attributes:
        resumed: last steps before the run was taken up again.
        runs: that the log holds; the last one is kept.
        unordered: whether steps came in no order.
        repeated: steps that are there more than once, and
        averaged: whether their mean is taken (of devices or micro-batches), or the later value.
        dropped: points of earlier runs, and steps that a resumed run did again.
    """

    def __init__(self) -> None:
        self.resumed: list[int] = []
        self.runs, self.dropped, self.repeated = 1, 0, 0
        self.unordered = False
        self.averaged: bool | None = None
        self._coming: dict[tuple[str, ...], list[tuple[float, ...]]] = {}
        self._kept: dict[str, Floats] = {}
        self._place, self._waiting = 0, 0

    def add(self, step: float, values: Mapping[str, float]) -> None:
        """Adds what one row holds.

        Args:
            step: of the row.
            values: by what they are.
        """
        self._place += 1
        self._waiting += 1
        self._coming.setdefault(tuple(values), []).append((step, self._place, *values.values()))
        if self._waiting >= MOST_POINTS:
            self._settle()

    def series(self) -> dict[str, tuple[Floats, Floats]]:
        """Returns steps and values of each series, in rising order of steps."""
        self._settle()
        return {what: (points[:, _STEP], points[:, _VALUE]) for what, points in self._kept.items()}

    def _settle(self) -> None:
        """Puts what came in order, without what a later start did again, and averages where there is too much."""
        pieces = {what: [points] for what, points in self._kept.items()}
        for names, rows in self._coming.items():
            table = np.array(rows, dtype=np.float64)
            for column, what in enumerate(names, start=2):
                piece = np.column_stack((table[:, 0], table[:, column], table[:, 1], np.ones(len(table))))
                pieces.setdefault(what, []).append(piece)
        self._coming, self._waiting = {}, 0
        whole = {what: _in_order(several) for what, several in pieces.items()}
        leader = next((what for what in _LEADERS if what in whole), None)
        cuts = self._cuts(whole[leader]) if leader else []
        for what, points in whole.items():
            for before, place, step, whole_run in cuts:
                between = (points[:, _PLACE] > before) & (points[:, _STEP] <= step)
                again = (points[:, _PLACE] < place) & ~between & (whole_run | (points[:, _STEP] >= step))
                self.dropped += int(again.sum()) if what == leader else 0
                points = points[~again]
            points = points[np.argsort(points[:, _STEP], kind="stable")]
            self._kept[what] = averaged(self._once(points, count=what == leader))

    def _cuts(self, points: Floats) -> list[tuple[float, float, float, bool]]:
        """Returns where the log goes back: place before, place after, step after, and whether a new run begins."""
        steps, places = points[:, _STEP], points[:, _PLACE]
        falls = np.flatnonzero(np.diff(steps) < 0) + 1
        if not len(falls):
            return []
        if len(falls) > max(_FALLS, _MANY_FALLS * len(steps)) or len(steps) < _SHORT * (len(falls) + 1):
            self.unordered = True
            return []
        cuts, alive = [], np.ones(len(steps), dtype=bool)
        for at, end in zip(falls, [*falls[1:], len(steps)], strict=True):
            step, after = steps[at], steps[at:end]
            before = steps[:at][alive[:at]]
            old = before[before >= step]
            if len(old) <= 2 and after.max() > before.max() and not np.isin(old, after).any():
                self.unordered = True  # two lines that changed places
                continue
            anew = bool(step <= before.min())
            alive[:at] &= ~(anew | (steps[:at] >= step))
            if anew:
                self.runs += 1
                self.resumed.clear()
            else:
                self.resumed.append(int(before[before < step].max()))
            cuts.append((float(places[at - 1]), float(places[at]), float(step), anew))
        return cuts

    def _once(self, points: Floats, *, count: bool) -> Floats:
        """Returns each step once: the later value, or the mean where most steps are there more than once."""
        first = np.flatnonzero(np.diff(points[:, _STEP], prepend=-np.inf) > 0)
        extra = len(points) - len(first)
        if not extra:
            return points
        last = np.append(first[1:], len(points)) - 1
        if count:
            several = int((last > first).sum())
            self.repeated += several
            if self.averaged is None:
                self.averaged = 2 * several > len(first)
            if several <= _FALLS and not self.averaged:  # the step at which a run stopped and went on
                self.resumed += [int(points[at, _STEP]) for at in first[last > first]]
        found = points[last]
        if self.averaged or (points[:, _WEIGHT] > 1).any():
            found[:, _VALUE] = _means(points[:, _VALUE], np.ones(len(points)), first)
        return found


def _in_order(pieces: list[Floats]) -> Floats:
    """Returns pieces as one, what came first first."""
    whole = np.concatenate(pieces)
    return whole if len(pieces) == 1 else whole[np.argsort(whole[:, _PLACE], kind="stable")]


def averaged(points: Floats) -> Floats:
    """Returns at most `MOST_POINTS` points: means of 2, 4, 8, ... logged values each, as few as do."""
    weights = points[:, _WEIGHT]
    widest = float(weights.max(initial=1.0))
    if len(points) <= MOST_POINTS and widest == 1:
        return points
    # what comes after the first averaging is averaged alike
    width = max(widest, 2.0 ** np.ceil(np.log2(weights.sum() / MOST_POINTS)))
    group = (np.cumsum(weights) - weights) // width
    first = np.flatnonzero(np.diff(group, prepend=-1) > 0)
    found = points[np.append(first[1:], len(points)) - 1]
    found[:, _VALUE] = _means(points[:, _VALUE], weights, first)
    found[:, _WEIGHT] = np.add.reduceat(weights, first)
    return found


def _means(values: Floats, weights: Floats, first: npt.NDArray[np.int64]) -> Floats:
    """Returns weighted means of groups, without what is no number; NaN where there is none."""
    good = np.isfinite(values)
    sums = np.add.reduceat(np.where(good, values, 0.0) * weights, first)
    counts = np.add.reduceat(np.where(good, weights, 0.0), first)
    return np.where(counts > 0, sums / np.maximum(counts, 1e-300), np.nan)


def aligned(steps: Floats, series: tuple[Floats, Floats] | None, *, between: bool) -> Floats | None:
    """Returns a series at other steps; NaN where it has no value; None where it has none at all.

    Args:
        steps: wanted.
        series: its steps and values.
        between: values between two points are their mixture: of a rate, and of means over many steps.
    """
    if series is None or not len(steps) or not len(series[0]):
        return None
    at = np.searchsorted(series[0], steps).clip(0, len(series[0]) - 1)
    found = np.where(series[0][at] == steps, series[1][at], np.nan)
    if between:
        found = np.where(series[0][at] == steps, found, np.interp(steps, *series, left=np.nan, right=np.nan))
    return found if np.isfinite(found).any() else None
