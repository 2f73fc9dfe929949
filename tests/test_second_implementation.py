"""Each statistic against a second implementation: the `evalstats` package, scipy, statsmodels, or a plain loop."""

from __future__ import annotations

import itertools
import math
import random

import evalstats
import numpy as np
import numpy.typing as npt
import pytest
import statsmodels.api as sm
from evalstats.core.resampling import clopper_pearson_ci
from scipy import stats

from peft_study.evaluation.accuracies import accuracy, accuracy_difference, mcnemar
from peft_study.statistics import (
    Losses,
    TokenCounts,
    chance_of_equals,
    difference,
    holm,
    mean_loss,
    smallest_difference,
)

ONES = np.ones(60, dtype=np.int64)


def scores(systems: int) -> Losses:
    """Returns skewed losses of some systems on 60 examples of one token each: evalstats knows no token counts."""
    generator = np.random.default_rng(0)
    shared = generator.gamma(2, 0.5, size=60)
    return np.stack([shared + 0.1 * (generator.gamma(1, 1, size=60) - 1) + 0.015 * i for i in range(systems)])


def of_evalstats(one: Losses, other: Losses, confidence: float = 0.95) -> tuple[float, float, float]:
    """Returns the difference of two systems with its studentised interval, of 40,000 resamples."""
    found = evalstats.pairwise_differences(
        np.stack([one, other]),
        0,
        1,
        method="bootstrap_t",
        ci=confidence,
        n_bootstrap=40_000,
        rng=np.random.default_rng(1),
    )
    return found.point_diff, found.ci_low, found.ci_high


def test_differences_have_the_interval_of_evalstats() -> None:
    for one, other in itertools.combinations(scores(4), 2):
        found, (value, low, high) = difference(one, other, ONES), of_evalstats(one, other)
        assert found.value == pytest.approx(value)
        assert found.low == pytest.approx(low, abs=0.04 * (high - low))
        assert found.high == pytest.approx(high, abs=0.04 * (high - low))


def test_an_interval_of_evalstats_ends_at_zero_at_our_p_value() -> None:
    """Its own p-value counts distances to both sides, so of skewed losses it is not what its interval says."""
    seen = 0
    for one, other in itertools.combinations(scores(4), 2):
        chance = chance_of_equals(one[None], other[None], ONES)
        usual = difference(one, other, ONES)
        _, low, high = of_evalstats(one, other, 1 - chance)
        assert min(abs(low), abs(high)) < 0.03 * (usual.high - usual.low)
        seen += 0.001 < chance < 0.5
    assert seen >= 3


def test_holms_correction_is_that_of_evalstats() -> None:
    def chances(correction: str) -> list[float]:
        found = evalstats.all_pairwise(
            scores(4),
            list("abcd"),
            method="bootstrap_t",
            correction=correction,
            rng=np.random.default_rng(1),
            n_bootstrap=2000,
            simultaneous_ci=False,
            p_test="ci",
        )
        return [result.p_value for result in found.results.values()]

    assert len(chances("none")) == 6
    assert holm(chances("none")) == pytest.approx(chances("holm"))
    assert chances("none") != chances("holm")


@pytest.mark.parametrize("log", [True, False])
def test_a_ratio_of_sums_has_the_interval_of_a_plain_loop(log: bool) -> None:
    """Examples of unequal length, resampled one by one; four standard deviations of the loop's own ends are 4 %."""
    generator, drawn = np.random.default_rng(2), random.Random(3)
    counts = generator.integers(5, 40, size=30)
    sums = counts * generator.gamma(2, 0.5, size=30)

    def ratio(rows: list[int]) -> tuple[float, float]:
        total = sum(int(counts[i]) for i in rows)
        value = sum(float(sums[i]) for i in rows) / total
        return value, math.sqrt(sum((float(sums[i]) - value * int(counts[i])) ** 2 for i in rows)) / total

    value, error = ratio(list(range(30)))
    resampled = [ratio(drawn.choices(range(30), k=30)) for _ in range(10_000)]
    if log:
        distances = sorted(math.log(v / value) / (e / v) for v, e in resampled)
        low, high = (value * math.exp(-distances[i] * error / value) for i in (9750, 250))
    else:
        distances = sorted((v - value) / e for v, e in resampled)
        low, high = (value - distances[i] * error for i in (9750, 250))
    found = mean_loss(sums, counts) if log else difference(sums, np.zeros(30), counts)
    assert found.value == pytest.approx(value)
    assert found.low == pytest.approx(low, abs=0.04 * (high - low))
    assert found.high == pytest.approx(high, abs=0.04 * (high - low))


def test_sources_have_the_cluster_robust_error_of_statsmodels() -> None:
    """Of 1,200 sources the interval is Student's, so that its half-width gives the standard error exactly."""
    generator = np.random.default_rng(4)
    source = np.repeat(np.arange(1200), generator.integers(1, 6, size=1200))
    counts = generator.integers(5, 40, size=len(source))
    sums = counts * (generator.normal(0.1, 0.3, size=1200)[source] + generator.normal(0, 0.2, size=len(source)))
    model = sm.WLS(sums / counts, np.ones(len(source)), weights=counts)
    fitted = model.fit(cov_type="cluster", cov_kwds={"groups": source, "use_correction": False})
    found = difference(sums, np.zeros(len(source)), TokenCounts(counts, source))
    half = stats.t.isf(0.025, 1199) * fitted.bse[0] * math.sqrt(1200 / 1199)
    assert (found.value, found.low, found.high) == pytest.approx(
        (fitted.params[0], fitted.params[0] - half, fitted.params[0] + half)
    )


def test_the_smallest_difference_has_the_power_of_the_noncentral_t() -> None:
    one, other = scores(2)
    found = smallest_difference(one, other, ONES, 48)
    shift = found / np.std(one - other, ddof=1) * math.sqrt(48)
    limit = stats.t.isf(0.025, 47)
    assert stats.nct.sf(limit, 47, shift) + stats.nct.cdf(-limit, 47, shift) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize("number", [1, 10, 50, 200])
def test_accuracies_have_the_exact_interval_of_scipy_and_evalstats(number: int) -> None:
    for successes in range(number + 1):
        found = accuracy(successes, number)
        exact = stats.binomtest(successes, number).proportion_ci(0.95, method="exact")
        assert (found.value, found.low, found.high) == pytest.approx((successes / number, exact.low, exact.high))
        assert (found.low, found.high) == pytest.approx(clopper_pearson_ci(successes, number, 0.05))


def test_accuracies_by_hand() -> None:
    """None of 10: the truth above which even that has a chance of 2.5 % is 1 - 0.025^(1/10)."""
    assert (accuracy(0, 10).low, accuracy(0, 10).high) == pytest.approx((0, 1 - 0.025**0.1))
    assert (accuracy(10, 10).low, accuracy(10, 10).high) == pytest.approx((0.025**0.1, 1))


@pytest.mark.parametrize(("number", "mean", "normal"), [(10, 0.983, 0.183), (50, 0.968, 0.635), (200, 0.960, 0.874)])
def test_accuracies_are_covered_whatever_the_truth(number: int, mean: float, normal: float) -> None:
    """Over all outcomes, for truths of 2 % to 98 %: never below 95 %; of the normal interval the least is far below."""
    k = np.arange(number + 1)
    found = [accuracy(int(successes), number) for successes in k]
    half = 1.96 * np.sqrt(k * (number - k) / number**3)

    def coverage(low_K: Losses, high_K: Losses) -> npt.NDArray[np.float64]:
        truths = np.linspace(0.02, 0.98, 193)
        return np.array([stats.binom.pmf(k, number, p)[(low_K <= p) & (p <= high_K)].sum() for p in truths])

    exact = coverage(np.array([e.low for e in found]), np.array([e.high for e in found]))
    theirs = coverage(k / number - half, k / number + half)
    assert exact.min() >= 0.95
    assert exact.mean() == pytest.approx(mean, abs=0.001)
    assert theirs.min() == pytest.approx(normal, abs=0.001)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [((36, 12, 2, 0), 0.0569, 0.3404), ((36, 14, 0, 0), 0.1528, 0.4167), ((50, 0, 0, 50), -0.0192, 0.0192)],
)
def test_differences_of_paired_shares_are_newcombes(table: tuple[int, ...], low: float, high: float) -> None:
    """Both right, the first alone, the second alone, neither; 36, 12, 2, 0 is an example of Newcombe (1998)."""
    first = np.repeat([True, True, False, False], table)
    second = np.repeat([True, False, True, False], table)
    found, turned = accuracy_difference(first, second), accuracy_difference(second, first)
    assert found.value == pytest.approx((table[1] - table[2]) / sum(table))
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize(("own", "other", "together"), [(0.5, 0.5, 0.6), (0.1, 0.4, 0.0), (0.05, 0.1, 0.2)])
def test_differences_of_paired_shares_are_covered(own: float, other: float, together: float) -> None:
    draw, number, covered = np.random.default_rng(0), 50, 0
    for _ in range(600):
        hidden = draw.multivariate_normal([0, 0], [[1, together], [together, 1]], size=number)
        found = accuracy_difference(hidden[:, 0] < stats.norm.ppf(own), hidden[:, 1] < stats.norm.ppf(other))
        covered += found.low <= own - other <= found.high
    assert 0.93 <= covered / 600 <= 0.995


def test_mcnemar_counts_what_one_system_alone_answers() -> None:
    """6 against 1: 2 x (1 + 7) / 128; that both answer 20 more, and neither 5, changes nothing."""
    first = np.array([True] * 6 + [False] + [True] * 20 + [False] * 5)
    second = np.array([False] * 6 + [True] + [True] * 20 + [False] * 5)
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(0.125)
    assert mcnemar(first[:7], second[:7]) == pytest.approx(0.125)
    assert mcnemar(first, first) == 1.0


@pytest.mark.parametrize("alone", [1, 6, 15, 40])
def test_mcnemar_is_scipys_test_of_a_fair_coin(alone: int) -> None:
    """And in all it is below 5 % where nothing differs in at most 5 % of outcomes."""
    false = 0.0
    for won in range(alone + 1):
        first = np.arange(alone) < won
        chance = mcnemar(first, ~first)
        assert chance == pytest.approx(stats.binomtest(won, alone).pvalue)
        false += stats.binom.pmf(won, alone, 0.5) * (chance < 0.05)
    assert false <= 0.05
