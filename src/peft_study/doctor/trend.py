"""Where a noisy loss is, how sure that is, and whether it rises: robust, and adapted to the noise of the series itself.

P points of a series
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from peft_study.doctor.observations import Floats, LossCurve

MOST_POINTS = 400
"""A longer series is averaged down to about so many points."""
MANY_POINTS = 60
"""From so many on, second differences give the noise to a fifth."""
LEAST_POINTS = 4
"""Of fewer, the noise cannot be told from the trend."""


@dataclass(frozen=True, slots=True)
class Level:
    """Mean of a part of a series, with its standard error."""

    value: float
    error: float

    def above(self, other: Level) -> float:
        """Returns how many standard errors this level lies above another one."""
        error = math.hypot(self.error, other.error)
        gap = self.value - other.value
        return gap / error if error > 0 else math.copysign(math.inf, gap) if gap else 0.0


@dataclass(frozen=True, slots=True)
class Climb:
    """The largest rise from the lowest level so far: `size` nats up to `peak`, beginning at `step`.

    `sudden`: half of it comes within one window.
    """

    size: float
    errors: float
    step: int
    before: float
    peak: float
    peak_step: int
    sudden: bool


@dataclass(frozen=True, slots=True)
class Series:
    """A loss by step, without gaps.

    Attributes:
        steps, values: P points.
        noise: standard deviation of a point about the level where it lies.
        inflation: by which the variance of a mean is larger than that of independent points.
        base: level of the untouched base, where its loss on the same examples is known: then the batches' own
            difficulty is taken out of the values.
    """

    steps: Floats
    values: Floats
    noise: float
    inflation: float
    base: float | None = None

    @property
    def paired(self) -> bool:
        """True where the batches' own difficulty is taken out."""
        return self.base is not None

    def __len__(self) -> int:
        return len(self.values)

    def level(self, first: int, end: int) -> Level:
        """Returns the level of points first to end (exclusive)."""
        part = self.values[max(first, 0) : end]
        cut = len(part) // 10
        value = float(np.sort(part)[cut : len(part) - cut].mean())
        return Level(value, self.noise * math.sqrt(self.inflation / len(part)))

    @property
    def start(self) -> Level:
        """Where it begins: the first twentieth, at least 3 points."""
        return self.level(0, min(max(3, len(self) // 20), len(self)))

    @property
    def end(self) -> Level:
        """Where it ends: the last fifth, at least 3 points."""
        return self.level(len(self) - max(3, len(self) // 5), len(self))

    @property
    def lowest(self) -> Level:
        """The lowest level of a tenth of the points, at least 3."""
        width = min(max(3, len(self) // 10), len(self))
        levels = [self.level(first, first + width) for first in range(len(self) - width + 1)]
        return min(levels, key=lambda level: level.value)

    def quarters(self) -> tuple[Level, Level]:
        """Returns the levels of the first and of the last quarter."""
        width = max(1, len(self) // 4)
        return self.level(0, width), self.level(len(self) - width, len(self))

    def direction(self) -> float:
        """Returns in standard errors how much later points lie above earlier ones (Mann-Kendall); below 0: it falls."""
        from scipy.stats import kendalltau

        number = len(self)
        if number < LEAST_POINTS or np.ptp(self.values) == 0:
            return 0.0
        tau = float(kendalltau(np.arange(number), self.values).statistic)
        spread = math.sqrt(2 * (2 * number + 5) / (9 * number * (number - 1)) * self.inflation)
        return tau / spread

    def falls(self) -> bool:
        """True where it falls for sure: from quarter to quarter, from its start, or from point to point."""
        first, last = self.quarters()
        return first.above(last) > 3 or self.start.above(self.end) > 4 or self.direction() < -3

    def climb(self, width: int) -> Climb | None:
        """Returns the largest rise of levels of `width` points; None where there are too few."""
        count = len(self) - width + 1
        if count <= width:
            return None
        windows = np.lib.stride_tricks.sliding_window_view(self.values, width)
        levels = np.median(windows, axis=1) if width < 8 else windows.mean(axis=1)
        lows = np.minimum.accumulate(levels)[: count - width]
        rises = levels[width:] - lows
        place = int(rises.argmax())
        low = int(levels[: place + 1].argmin())
        peak = place + width
        begin, jump = self._jump(low, peak, width)
        # a median's error is 1.25 times a mean's
        error = self.noise * math.sqrt(2 * self.inflation / width) * (1.25 if width < 8 else 1.0)
        size = float(rises[place])
        errors = size / error if error > 0 else (math.inf if size > 0 else 0.0)
        peak_step = int(self.steps[peak + width // 2])
        sudden = jump >= size / 2
        return Climb(size, errors, int(self.steps[begin]), float(levels[low]), float(levels[peak]), peak_step, sudden)

    def _jump(self, low: int, peak: int, width: int) -> tuple[int, float]:
        """Returns the point at which the level jumps between two neighbouring windows, and by how much at most."""
        rises = []
        for point in range(low + 1, min(peak + width, len(self))):
            before, after = self.values[max(0, point - width) : point], self.values[point : point + width]
            rises.append(float(np.median(after) - np.median(before)))
        best = max(rises)
        # the first point of the rise, not the one where both windows fit best
        point = low + 1 + next(place for place, rise in enumerate(rises) if rise >= 0.5 * best or rise == best)
        half = float(np.median(self.values[max(0, point - width) : point])) + best / 2
        above = np.flatnonzero(self.values[point : peak + width] >= half)
        return point + (int(above[0]) if len(above) else 0), best


def series_of(steps: Floats, values: Floats, *, base: float | None = None) -> Series | None:
    """Returns a series of its finite points, averaged down where there are many; None where there are too few.

    Args:
        steps, values: S points.
        base: as of `Series`.
    """
    kept = np.isfinite(values) & np.isfinite(steps)
    steps, values = steps[kept], values[kept]
    if len(values) < LEAST_POINTS:
        return None
    if len(values) >= 2 * MOST_POINTS:
        width = len(values) // MOST_POINTS
        used = len(values) // width * width
        steps = steps[-used:].reshape(-1, width).mean(axis=1)
        values = values[-used:].reshape(-1, width).mean(axis=1)
    noise, inflation = _noise(values)
    return Series(steps, values, noise, inflation, base)


def training_series(curve: LossCurve) -> Series | None:
    """Returns the training loss of a run; with the base's loss on the same examples, the batches' own part taken out.

    Then the values are the difference from the base plus the base's median, so that they are read as losses.
    """
    if curve.minus_base is not None and len(curve.minus_base) == len(curve.loss):
        with np.errstate(invalid="ignore"):  # infinity less infinity
            base = curve.loss - curve.minus_base
        known = np.isfinite(base)
        # of a long run the base's loss is measured every few steps alone
        if known.sum() >= 8:
            middle = float(np.median(base[known]))
            return series_of(curve.steps[known], curve.minus_base[known] + middle, base=middle)
    return series_of(curve.steps, curve.loss)


def held_out_fall(curve: LossCurve) -> float:
    """Returns the fall of the held-out loss from its first value to its least, as a share; 0 where not known."""
    losses = curve.held_out_loss
    known = losses[np.isfinite(losses)] if losses is not None else np.empty(0)
    if len(known) < 2 or known[0] <= 0:
        return 0.0
    return float((known[0] - known.min()) / known[0])


def _noise(values: Floats) -> tuple[float, float]:
    """Returns the standard deviation of a point about its level, and the inflation of a mean's variance.

    The level is a running median: of a series that only falls it is the series itself, so that a trend is no noise.
    """
    number = len(values)
    if number < 8:
        seconds = np.diff(values, 2)
        return float(np.sqrt(np.mean(seconds**2) / 6)), 1.0
    half = max(3, number // 8)
    rest = np.array([_residual(values, place, half) for place in range(1, number - 1)])
    # a median of few points lies nearer to its own middle point than the level does
    few = 1 + 0.6 / (2 * half + 1)
    middle = 1.4826 * float(np.median(np.abs(rest - np.median(rest))))
    # where the trend is steep, the running median follows the points; second differences do not. Of a
    # short series they are few and vary, so they count for a little less
    seconds = np.diff(values, 2)
    bent = 1.4826 * float(np.median(np.abs(seconds - np.median(seconds)))) / math.sqrt(6)
    spread = few * max(middle, 0.6 * float(rest.std()), (1.0 if number >= MANY_POINTS else 0.8) * bent)
    if rest.std() == 0:
        return 0.0, 1.0
    lag = float(np.corrcoef(rest[:-1], rest[1:])[0, 1]) if np.ptp(rest[:-1]) and np.ptp(rest[1:]) else 0.0
    # of a short series the correlation is estimated too low (Kendall 1954)
    lag = min(max(lag + (1 + 4 * max(lag, 0.0)) / number, 0.0), 0.8)
    return spread, (1 + lag) / (1 - lag)


def _residual(values: Floats, place: int, half: int) -> float:
    reach = min(half, place, len(values) - 1 - place)
    return float(values[place] - np.median(values[place - reach : place + reach + 1]))
