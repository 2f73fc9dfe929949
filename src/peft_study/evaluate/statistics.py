"""Held-out losses with their noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
NORMAL = 1.959964
"""Standard errors on each side of a normal 95 % interval."""
RESAMPLES = 4000

Losses = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over supervised tokens, in nats a token, and its 95 % interval over examples."""

    value: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """True where zero lies outside the interval."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_loss(sums_N: Losses, counts_N: npt.NDArray[np.int64]) -> Estimate:
    """Returns the loss a supervised token, with an interval from resampling examples.

    Tokens of one example depend on each other, so examples are resampled, not tokens.

    Args:
        sums_N: summed token loss of each example, in nats.
        counts_N: supervised tokens of each example.
    """
    return _ratio(sums_N, counts_N)


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

    The variance is that of the mean over examples (of the seeds' mean) plus that of the mean over seeds; with one seed
    the second is not known and left out. Of few seeds the second is itself uncertain, so the interval is Student's,
    with the degrees of freedom of Welch and Satterthwaite: 3 seeds that differ by much more than the noise of the
    examples give 2, and an interval 2.2 times as wide as the normal one, which covered 82 to 89 % with 2 or 3 seeds
    (tests/evaluate/test_seeds.py).

    Args:
        sums_SN: summed token loss of each seed and example, in nats.
        counts_N: supervised tokens of each example.
    """
    return _with_seeds(mean_loss(sums_SN.mean(0), counts_N), _of_seeds(sums_SN, counts_N))


def seeds_difference(sums_SN: Losses, others_SN: Losses, counts_N: npt.NDArray[np.int64]) -> Estimate:
    """Returns how much the first mean over seeds is above the second, paired by example; seeds count as above."""
    paired = difference(sums_SN.mean(0), others_SN.mean(0), counts_N)
    return _with_seeds(paired, _of_seeds(sums_SN, counts_N), _of_seeds(others_SN, counts_N))


def _of_seeds(sums_SN: Losses, counts_N: npt.NDArray[np.int64]) -> Losses:
    losses: Losses = sums_SN.sum(1) / counts_N.sum()
    return losses


def _with_seeds(estimate: Estimate, *losses_S: Losses) -> Estimate:
    """Returns the estimate with its interval widened by what the seeds' means vary."""
    from scipy.stats import t

    known = [losses for losses in losses_S if len(losses) > 1]
    variances = [float(np.var(losses, ddof=1)) / len(losses) for losses in known]
    of_seeds = sum(variances)
    of_examples = ((estimate.high - estimate.low) / (2 * NORMAL)) ** 2
    if of_seeds == 0 or not np.isfinite(of_examples):
        return estimate
    # the examples' interval is right as it is, so their variance counts as known: it has no term in the divisor
    uncertain = sum(v**2 / (len(losses) - 1) for v, losses in zip(variances, known, strict=True))
    freedom = (of_examples + of_seeds) ** 2 / uncertain
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, freedom))
    below, above = ((side / NORMAL) ** 2 for side in (estimate.value - estimate.low, estimate.high - estimate.value))
    return Estimate(
        estimate.value,
        estimate.value - quantile * (below + of_seeds) ** 0.5,
        estimate.value + quantile * (above + of_seeds) ** 0.5,
    )
