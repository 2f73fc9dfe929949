"""Held-out losses with their noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 4000
FEW_EXAMPLES = 64
"""Below so many, an interval over examples is too narrow to pass over in silence."""

Losses = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over supervised tokens, in nats a token, and its 95 % interval over examples.

    A single example has no interval: its ends are infinite.
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


def few_examples(count: int) -> str | None:
    """Returns what to know about intervals over so few held-out examples; None where they are enough.

    The figures are measured: 1,000 draws of losses that follow a gamma distribution of shape 1 to 4, and 5 to 39
    tokens an example.
    """
    if count >= FEW_EXAMPLES:
        return None
    return (
        f"{count} held-out row{'' if count == 1 else 's'}: 95 % intervals over so few are too narrow; of skewed losses "
        "they cover about 85 % with 8 rows, 90 % with 24 and 92 to 94 % with 64"
    )


def mean_loss(sums_N: Losses, counts_N: npt.NDArray[np.int64]) -> Estimate:
    """Returns the loss a supervised token, with an interval from resampling examples.

    Tokens of one example depend on each other, so examples are resampled, not tokens.

    Args:
        sums_N: summed token loss of each example, in nats.
        counts_N: supervised tokens of each example.
    """
    return _ratio(sums_N, counts_N)


def loss_value(sums_N: Losses, counts_N: npt.NDArray[np.int64]) -> float:
    """Returns the loss a supervised token, in nats, without its interval; arguments as of `mean_loss`."""
    return float(sums_N.sum() / counts_N.sum())


def difference(sums_N: Losses, others_N: Losses, counts_N: npt.NDArray[np.int64]) -> Estimate:
    """Returns how much the first loss is above the second, paired by example, with its interval."""
    return _ratio(sums_N - others_N, counts_N)


def _ratio(numerators_N: Losses, counts_N: npt.NDArray[np.int64]) -> Estimate:
    """Returns sum(numerators) / sum(counts) with scipy's bias-corrected bootstrap interval."""
    from scipy.stats import bootstrap

    def statistic(numerators: Losses, counts: Losses, axis: int = -1) -> Losses:
        total: Losses = numerators.sum(axis=axis) / counts.sum(axis=axis)
        return total

    counts = counts_N.astype(np.float64)
    value = float(statistic(numerators_N, counts))
    if not np.isfinite(value) or len(counts) < 2:
        return Estimate(value, float("-inf"), float("inf"))
    # where every example has the same ratio no resample differs, and BCa would divide by that spread
    if np.allclose(numerators_N, value * counts, rtol=1e-12, atol=1e-12):
        return Estimate(value, value, value)
    interval = bootstrap(
        (numerators_N, counts),
        statistic,
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        # BCa's jackknife takes memory with the square of the examples, and matters only where they are few
        method="BCa" if len(counts) <= 1000 else "percentile",
        batch=100,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def mean_over_seeds(sums_SN: Losses, counts_N: npt.NDArray[np.int64]) -> Estimate:
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


def seeds_difference(sums_SN: Losses, others_SN: Losses, counts_N: npt.NDArray[np.int64]) -> Estimate:
    """Returns how much the first mean over seeds is above the second, paired by example; seeds count as above.

    The seeds' degrees of freedom are Welch's: two methods need not vary alike.
    """
    paired = difference(sums_SN.mean(0), others_SN.mean(0), counts_N)
    half = _half_width(_of_seeds(sums_SN, counts_N), _of_seeds(others_SN, counts_N))
    if half == 0:
        return paired
    below, above = paired.value - paired.low, paired.high - paired.value
    return Estimate(paired.value, paired.value - math.hypot(below, half), paired.value + math.hypot(above, half))


def _of_seeds(sums_SN: Losses, counts_N: npt.NDArray[np.int64]) -> Losses:
    losses: Losses = sums_SN.sum(1) / counts_N.sum()
    return losses


def _half_width(*losses_S: Losses) -> float:
    """Returns Student's half-width of a mean over seeds, or of the difference of two; 0 where seeds say nothing."""
    from scipy.stats import t

    variances = [
        (float(np.var(losses, ddof=1)) / len(losses), len(losses) - 1) for losses in losses_S if len(losses) > 1
    ]
    of_seeds = sum(variance for variance, _ in variances)
    if of_seeds == 0:
        return 0.0
    freedom = of_seeds**2 / sum(variance**2 / degrees for variance, degrees in variances)
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * of_seeds**0.5


def duration(seconds: float) -> str:
    """Returns a time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def short(value: object) -> str:
    """Returns a setting's value in words: a number with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
