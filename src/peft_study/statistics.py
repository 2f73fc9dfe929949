"""Held-out losses with their noise."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 4000
LEAST_RESAMPLED, LEAST_RESAMPLED_LOG, MOST_RESAMPLED = 8, 24, 1000
"""Numbers of examples that are resampled. Of fewer, many resamples have no spread to be divided by (on the log scale,
of 8 skewed examples, the interval would be 3.9 times as wide for 1 % more coverage); of more, the skew is gone."""
MOST_ALIKE = 1e-3
"""Share of resamples without a spread up to which the others stand for all."""
FEW_EXAMPLES = 64
"""Below so many, an interval over examples is too narrow to pass over in silence."""

LEAST_SOURCES = 20
"""From so many sources of the held-out examples on, whole sources are resampled; an interval over fewer is too wide."""

Losses = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Supervised tokens of each held-out example, and which examples may depend on each other.

    Attributes:
        tokens_N: of each example.
        sources_N: the number of each example's source, from 0 without a gap; None where it is not known.
    """

    tokens_N: npt.NDArray[np.int64]
    sources_N: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.tokens_N)

    def sum(self) -> int:
        """Returns the supervised tokens of all examples."""
        return int(self.tokens_N.sum())

    @property
    def sources(self) -> int | None:
        """How many sources there are; None where that is not known."""
        return None if self.sources_N is None else len(np.unique(self.sources_N))

    def units(self, sums_N: Losses) -> tuple[Losses, Losses]:
        """Returns sums and tokens of what is resampled: sources, where there are enough of them, or examples."""
        if self.sources_N is None or (self.sources or 0) < LEAST_SOURCES:
            return sums_N, self.tokens_N.astype(np.float64)
        sums_U, tokens_U = (np.bincount(self.sources_N, weights=each) for each in (sums_N, self.tokens_N))
        return sums_U.astype(np.float64), tokens_U.astype(np.float64)


Counts = TokenCounts | npt.NDArray[np.int64]
"""Supervised tokens of each example: a plain array where every example stands for itself."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval: a loss or difference in nats a supervised token, or a share between 0 and 1.

    The loss of a single example has no interval: its ends are infinite.
    """

    value: float
    low: float
    high: float

    @property
    def bounded(self) -> bool:
        """True where there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def excludes_zero(self) -> bool:
        """True where zero lies outside the interval."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return self.text(".3f")

    def text(self, form: str) -> str:
        """Returns the value and its interval, each number in a form such as ``+.4f``."""
        ends = f"[{self.low:{form}}, {self.high:{form}}]" if self.bounded else "[no interval]"
        return f"{self.value:{form}} {ends}"

    def phrase(self, form: str = ".3f") -> str:
        """Returns the interval as part of a sentence."""
        return f"95 % {self.low:{form}} to {self.high:{form}}" if self.bounded else "no interval: a single example"


def mean_loss(sums_N: Losses, counts_N: Counts) -> Estimate:
    """Returns the loss a supervised token, with an interval on the log scale from resampling examples.

    Tokens of one example depend on each other, so examples are resampled, not tokens; and so may examples of one
    source, so whole sources are, where `counts_N` tells of `LEAST_SOURCES` and more (as in all functions below).

    Args:
        sums_N: summed token loss of each example, in nats.
        counts_N: supervised tokens of each example.
    """
    return _ratio(sums_N, counts_N, log=True)


def loss_value(sums_N: Losses, counts_N: Counts) -> float:
    """Returns the loss a supervised token, in nats, without its interval; arguments as of `mean_loss`."""
    return float(sums_N.sum() / counts_N.sum())


def difference(sums_N: Losses, others_N: Losses, counts_N: Counts) -> Estimate:
    """Returns how much the first loss is above the second, paired by example, with its interval."""
    return _ratio(sums_N - others_N, counts_N)


def _ratio(numerators_N: Losses, counts_N: Counts, *, log: bool = False) -> Estimate:
    """Returns sum(numerators) / sum(counts) with its interval over units; `log`: on the log scale, for a loss."""
    value = float(numerators_N.sum() / counts_N.sum())
    if not np.isfinite(value) or len(counts_N) < 2:
        return Estimate(value, -math.inf, math.inf)
    below, above = _Studentised(*_units(numerators_N, counts_N), log=log).distances(1 - CONFIDENCE)
    if log and value > 0:
        return Estimate(value, value * math.exp(-below), value * math.exp(min(above, 50.0)))
    return Estimate(value, value - below, value + above)


def _units(numerators_N: Losses, counts_N: Counts) -> tuple[Losses, Losses]:
    if isinstance(counts_N, TokenCounts):
        return counts_N.units(numerators_N)
    return numerators_N, counts_N.astype(np.float64)


class _Studentised:
    """The studentised bootstrap of a ratio of sums over examples or sources (Efron & Tibshirani 1993, section 12.5).

    Each resample's distance from the value is divided by the resample's own standard error, the delta method's. Of
    skewed losses that covers what BCa and percentiles do not: with 24 examples 94 % in place of 90 %. scipy's
    `bootstrap` does not have it. Where examples are too few or many to be resampled, the distances are Student's.

    Args:
        numerators_N: of each example or source.
        counts_N: its supervised tokens.
        log: take the logarithm of the ratio, which must be positive; else the log scale is left alone.
    """

    def __init__(self, numerators_N: Losses, counts_N: Losses, *, log: bool) -> None:
        number = len(counts_N)
        moments = np.stack([numerators_N, counts_N, numerators_N**2, numerators_N * counts_N, counts_N**2])
        value, error = _delta(moments.sum(1))
        log = log and bool(value > 0)
        self.error = float(error / value if log else error)
        self.freedom = number - 1
        self._distances: Losses | None = None
        if self.error <= 1e-12 * max(1.0, abs(float(value))):  # every example has the same ratio
            self.error = 0.0
        elif (LEAST_RESAMPLED_LOG if log else LEAST_RESAMPLED) <= number <= MOST_RESAMPLED:
            values, errors = _delta(moments @ _drawn(number))
            with np.errstate(divide="ignore", invalid="ignore"):
                found = np.log(values / value) / (errors / values) if log else (values - value) / errors
            known = found[np.isfinite(found)]
            # a resample in which all examples are alike has no error: where there are many such, those that have one
            # all lie on one side, and Student's distances are taken
            if len(known) >= (1 - MOST_ALIKE) * len(found):
                self._distances = np.sort(known)

    def distances(self, alpha: float) -> tuple[float, float]:
        """Returns how far below and above the value the interval ends that misses the truth with probability alpha."""
        if self.error == 0:
            return 0.0, 0.0
        if self._distances is None or not len(self._distances):
            from scipy.stats import t

            # the delta method divides by the number of examples, Student by one less
            half = float(t.isf(alpha / 2, self.freedom)) * self.error * math.sqrt(1 + 1 / self.freedom)
            return half, half
        low, high = np.quantile(self._distances, [alpha / 2, 1 - alpha / 2])
        return max(0.0, float(high)) * self.error, max(0.0, -float(low)) * self.error


@functools.lru_cache(maxsize=2)
def _drawn(number: int) -> Losses:
    """Returns how often each example is in each resample, kept for a study's two parts: drawing takes the longest."""
    drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=RESAMPLES)
    return np.ascontiguousarray(drawn.T, dtype=np.float64)


def _delta(sums: Losses) -> tuple[Losses, Losses]:
    """Returns a ratio and its standard error by the delta method, from the sums of a, b, a², ab and b²."""
    value = sums[0] / sums[1]
    squares = sums[2] - 2 * value * sums[3] + value**2 * sums[4]
    return value, np.sqrt(np.maximum(squares, 0)) / sums[1]


def mean_over_seeds(sums_SN: Losses, counts_N: Counts) -> Estimate:
    """Returns the mean loss over seeds, with a 95 % interval that counts examples and seeds.

    The two half-widths are added as the sides of a right angle, on the log scale: a loss is positive, and so is its
    interval. (Added on the plain scale, intervals over 2 seeds reached below zero in a third of studies and more.) That
    of the seeds is Student's, of the logarithm's standard error, which is the mean's divided by the mean: of 3, 4.3
    standard errors (with a normal 1.96, intervals over 2 or 3 seeds covered 82 to 89 %). Each has its own quantile; one
    quantile for both, with the degrees of freedom of Welch and Satterthwaite, covered 87 to 93 % with 2 seeds, which
    often agree by chance. This way it is 94 to 97 % (tests/test_seeds.py). With one seed, what seeds vary is
    not known and left out.

    Args:
        sums_SN: summed token loss of each seed and example, in nats.
        counts_N: supervised tokens of each example.
    """
    estimate, losses_S = mean_loss(sums_SN.mean(0), counts_N), _of_seeds(sums_SN, counts_N)
    if not estimate.bounded or not estimate.value > 0:
        return estimate
    half = _half_width(losses_S) / estimate.value
    if half == 0:
        return estimate
    below = math.log(estimate.value / estimate.low) if estimate.low > 0 else math.inf
    above = math.log(estimate.high / estimate.value)
    return Estimate(
        estimate.value,
        estimate.value * math.exp(-math.hypot(below, half)),
        estimate.value * math.exp(math.hypot(above, half)),
    )


def seeds_difference(sums_SN: Losses, others_SN: Losses, counts_N: Counts) -> Estimate:
    """Returns how much the first mean over seeds is above the second, paired by example; seeds count as above.

    The seeds' degrees of freedom are Welch's: two methods need not vary alike.
    """
    paired = difference(sums_SN.mean(0), others_SN.mean(0), counts_N)
    half = _half_width(_of_seeds(sums_SN, counts_N), _of_seeds(others_SN, counts_N))
    if half == 0:
        return paired
    below, above = paired.value - paired.low, paired.high - paired.value
    return Estimate(paired.value, paired.value - math.hypot(below, half), paired.value + math.hypot(above, half))


def chance_of_equals(sums_SN: Losses, others_SN: Losses, counts_N: Counts) -> float:
    """Returns the p-value of "no difference": the least alpha whose interval, as of `seeds_difference`, excludes zero.

    Below 1 / RESAMPLES, where there are no resamples, it goes on as Student's does. It is 1 for a single example.
    """
    from scipy.optimize import brentq
    from scipy.stats import t

    paired_N = sums_SN.mean(0) - others_SN.mean(0)
    value = float(paired_N.sum() / counts_N.sum())
    if value == 0 or not math.isfinite(value) or len(counts_N) < 2:
        return 1.0
    examples = _Studentised(*_units(paired_N, counts_N), log=False)
    error, freedom = _seeds_error(_of_seeds(sums_SN, counts_N), _of_seeds(others_SN, counts_N))

    def half(alpha: float) -> float:
        of_seeds = float(t.isf(alpha / 2, freedom)) * error if error else 0.0
        return math.hypot(examples.distances(alpha)[0 if value > 0 else 1], of_seeds)

    least = 1 / RESAMPLES
    if abs(value) >= half(least) > 0:
        of_all = freedom if error else examples.freedom
        return 2 * float(t.sf(t.isf(least / 2, of_all) * abs(value) / half(least), of_all))
    if half(1.0) >= abs(value):
        return 1.0
    return float(brentq(lambda alpha: abs(value) - half(alpha), least, 1.0, xtol=1e-5)) if half(least) else least


def holm(chances: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number (Holm 1979): with all of them below 0.05, one false in 20 studies."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(chances, method="holm")[1]] if len(chances) else []


def told_apart(number: int, chance: Callable[[int, int], float]) -> list[list[int]]:
    """Parts settings or systems, best first, where one is told from the first of the group before.

    They are told apart where the chance that they are equal, corrected for all pairs, is below 5 %.

    Args:
        number: of what is parted; the groups hold places from 0.
        chance: the p-value of "the two at these places are equal".
    """
    pairs = list(itertools.combinations(range(number), 2))
    chances = dict(zip(pairs, holm([chance(first, second) for first, second in pairs]), strict=True))
    groups: list[list[int]] = []
    for place in range(number):
        if groups and chances[groups[-1][0], place] >= 1 - CONFIDENCE:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def smallest_difference(sums_N: Losses, others_N: Losses, counts_N: Counts, examples: int) -> float:
    """Returns the difference in nats a token that so many examples show with a power of 80 %; paired, alpha 5 %.

    Args:
        sums_N, others_N: summed token loss of each held-out example, of two settings whose differences vary as usual.
        counts_N: supervised tokens of each example.
        examples: of the held-out part that is asked about; where sources are resampled, with as many sources more.
    """
    from statsmodels.stats.power import TTestPower

    paired_U, counts_U = _units(sums_N - others_N, counts_N)
    residuals = paired_U - paired_U.sum() / counts_U.sum() * counts_U
    spread = float(np.std(residuals, ddof=1)) / float(counts_U.mean())
    units = examples * len(counts_U) / len(counts_N)
    return spread * float(TTestPower().solve_power(nobs=units, alpha=1 - CONFIDENCE, power=POWER))


def _of_seeds(sums_SN: Losses, counts_N: Counts) -> Losses:
    losses: Losses = sums_SN.sum(1) / counts_N.sum()
    return losses


def _half_width(*losses_S: Losses) -> float:
    """Returns Student's half-width of a mean over seeds, or of the difference of two; 0 where seeds say nothing."""
    from scipy.stats import t

    error, freedom = _seeds_error(*losses_S)
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * error if error else 0.0


def _seeds_error(*losses_S: Losses) -> tuple[float, float]:
    """Returns the standard error of a mean over seeds, or of the difference of two, and its degrees of freedom."""
    variances = [
        (float(np.var(losses, ddof=1)) / len(losses), len(losses) - 1) for losses in losses_S if len(losses) > 1
    ]
    of_seeds = sum(variance for variance, _ in variances)
    if of_seeds == 0:
        return 0.0, 1.0
    return of_seeds**0.5, of_seeds**2 / sum(variance**2 / degrees for variance, degrees in variances)


def duration(seconds: float) -> str:
    """Returns a time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size_text(size: float) -> str:
    """Returns a number of bytes in the unit that suits it."""
    for unit, least in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= least:
            return f"{size / least:.3g} {unit}" if size < 999.5 * least else f"{size / least:,.0f} {unit}"
    return f"{size:,.0f} B"


def short(value: object) -> str:
    """Returns a setting's value in words: a number with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
