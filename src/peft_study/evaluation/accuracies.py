"""Shares of right answers with their noise: of one system, and of two on the same questions."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from peft_study.statistics import CONFIDENCE, Estimate

Flags = npt.NDArray[np.bool_]


def accuracy(successes: int, number: int) -> Estimate:
    """Returns the share of successes with its exact 95 % interval (Clopper & Pearson 1934), for any number of trials.

    It never covers less than 95 %: on average 98 % of 10 trials, 96.8 % of 50, 96 % of 200. The normal interval, of the
    central limit theorem, is too narrow below a few hundred (Bowyer et al. 2025, arXiv 2503.01747): for some truths it
    covers 18, 64 and 87 % (tests/test_second_implementation.py), and where all succeed it has no width.

    Args:
        successes: 0 to `number`.
        number: of trials that do not depend on each other, at least 1.
    """
    from statsmodels.stats.proportion import proportion_confint

    assert 0 <= successes <= number
    assert number > 0
    low, high = proportion_confint(successes, number, alpha=1 - CONFIDENCE, method="beta")
    return Estimate(successes / number, float(low), float(high))


def accuracy_difference(first_N: Flags, second_N: Flags) -> Estimate:
    """Returns how much more accurate the first of two systems is on the same examples, with its 95 % interval.

    Newcombe's interval of a difference of paired shares (1998, Statistics in Medicine 17:2635, method 10): Wilson's
    intervals of both, squared and added, with the correlation of the pairs. It stays within -1 and 1, and has a width
    where both systems agree everywhere. Neither statsmodels nor scipy has one for pairs.

    Args:
        first_N, second_N: whether each answered each example rightly; at least one.
    """
    from statsmodels.stats.proportion import proportion_confint

    assert first_N.shape == second_N.shape
    number = len(first_N)
    both, neither = int(np.sum(first_N & second_N)), int(np.sum(~first_N & ~second_N))
    ways = [int(first_N.sum()), int(second_N.sum())]
    (low, high), (other_low, other_high) = (
        proportion_confint(right, number, alpha=1 - CONFIDENCE, method="wilson") for right in ways
    )
    own, other = (right / number for right in ways)
    scale = math.sqrt(math.prod(right * (number - right) for right in ways))
    product = both * neither - (ways[0] - both) * (ways[1] - both)
    corrected = max(product - number / 2, 0) if product > 0 else product
    share = corrected / scale if scale else 0.0

    def distance(first: float, second: float) -> float:
        return math.sqrt(max(0.0, first**2 - 2 * share * first * second + second**2))

    value = own - other
    return Estimate(
        value, value - distance(own - low, other_high - other), value + distance(high - own, other - other_low)
    )


def mcnemar(first_N: Flags, second_N: Flags) -> float:
    """Returns the exact p-value of "equally accurate" for two systems on the same examples (McNemar 1947).

    Only the examples that one alone answers count: of these, each is as likely the first's as the second's. It is the
    pair to `accuracy` (arXiv 2503.01747 on why no normal approximation); 1 where the systems agree everywhere.

    Args:
        first_N, second_N: whether each answered each example rightly.
    """
    from statsmodels.stats.contingency_tables import mcnemar as test

    assert first_N.shape == second_N.shape
    table = [[np.sum((first_N == a) & (second_N == b)) for b in (True, False)] for a in (True, False)]
    return float(min(1.0, test(table, exact=True).pvalue))
