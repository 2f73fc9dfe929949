"""Which trials are stopped early: at rungs, against the method's other trials, and never inside the noise.

    steps   |----------|--------------------|------------------------------------------------------------| total
          warm-up    total/9             total/3                                                        end
                     rung 1: best third    rung 2: best third of those that came so far
                     continues             continues

Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943) in its asynchronous form (Li et al. 2018,
arXiv:1810.05934), as Optuna's SuccessiveHalvingPruner has it: a trial continues where its loss is among the best
1/reduction of all that reached the rung before it. On top of that the loss must be worse than that of the last one kept
by more than the noise: the 95 % interval of their difference, paired by held-out example, must lie above zero.

`Unlikely` is another rule: a trial stops where the model of the method's losses gives it a small chance to end as the
best. It needs no others at the same rung, and learns from the ends of trials how losses at a rung go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from peft_study.search.surrogate import Surrogate
from peft_study.search.trials import TrialRecord
from peft_study.statistics import Counts, difference

RUNGS = 2
"""Times a trial is judged at most."""
CHANCE = 0.1
"""A trial that is less likely than this to end as its method's best stops."""
STARTUP = 5
"""Trials the median rule waits for, as Optuna's MedianPruner does."""


class Pruner(Protocol):
    """Decides at a rung whether a trial stops."""

    def judge(self, trial: TrialRecord, others: Sequence[TrialRecord], step: int, counts_N: Counts) -> str | None:
        """Returns why the trial stops, or None.

        Args:
            trial: that came to the rung.
            others: its method's trials that may still end well.
            step: the rung.
            counts_N: supervised tokens of each held-out example.
        """


@dataclass(frozen=True, slots=True)
class SuccessiveHalving:
    """Keeps the best 1/reduction of those that came to a rung."""

    reduction: int

    def judge(self, trial: TrialRecord, others: Sequence[TrialRecord], step: int, counts_N: Counts) -> str | None:
        """Compares with the last trial that is kept."""
        order = _ranked([trial, *others], step)
        return _worse(trial, order[max(len(order) // self.reduction, 1) - 1], step, counts_N)


@dataclass(frozen=True, slots=True)
class Median:
    """Stops what is worse than the median of the others."""

    def judge(self, trial: TrialRecord, others: Sequence[TrialRecord], step: int, counts_N: Counts) -> str | None:
        """Compares with the trial at the median (of an even number, the worse of the two in the middle)."""
        order = _ranked(others, step)
        return None if len(order) < STARTUP else _worse(trial, order[len(order) // 2], step, counts_N)


@dataclass(frozen=True, slots=True)
class Unlikely:
    """Stops what will hardly end below the best of the others.

    The chance is the model's, with the noise of the dev rows where both were measured at the same step.

    Args:
        model: returns what is known of a method's losses.
    """

    model: Callable[[str], Surrogate]

    def judge(self, trial: TrialRecord, others: Sequence[TrialRecord], step: int, counts_N: Counts) -> str | None:
        """Compares with the trial of the least expected loss."""
        from scipy.stats import norm

        others = [other for other in others if any(other.sums)]
        if not others:
            return None
        settings = [trial.settings.flat, *(other.settings.flat for other in others)]
        mean_C, covariance_CC = self.model(trial.method).predict(settings)
        best = 1 + int(np.argmin(mean_C[1:]))
        variance = covariance_CC[0, 0] + covariance_CC[best, best] - 2 * covariance_CC[0, best]
        other = others[best - 1]
        if step in other.sums:
            apart_N = trial.sums[step] - other.sums[step]
            if apart_N.sum() <= 0:  # better here: how both go on is a guess
                return None
            variance += apart_N.var() * len(apart_N) / float(other.sums[step].sum()) ** 2
        chance = float(norm.cdf((mean_C[best] - mean_C[0]) / max(variance, 1e-12) ** 0.5))
        return None if chance >= CHANCE else f"a chance of {chance:.1%} to end below {other.name}"


@dataclass(frozen=True, slots=True)
class Never:
    """Runs everything to the end."""

    def judge(self, _trial: TrialRecord, _others: Sequence[TrialRecord], _step: int, _counts_N: Counts) -> str | None:
        """Stops nothing."""
        return None


def pruner(kind: str, reduction: int, model: Callable[[str], Surrogate]) -> Pruner:
    """Returns the rule of that name: ``successive_halving``, ``median``, ``probability`` or ``none``.

    Args:
        kind: its name.
        reduction: successive halving keeps one in so many.
        model: returns what is known of a method's losses.
    """
    rules: dict[str, Pruner] = {
        "successive_halving": SuccessiveHalving(reduction),
        "median": Median(),
        "probability": Unlikely(model),
        "none": Never(),
    }
    return rules[kind]


def rungs(total: int, reduction: int, warmup_end: int) -> tuple[int, ...]:
    """Returns the optimizer steps at which trials are judged, in order: total / reduction^k, all after the warm-up.

    There are two at most: what a trial is worth cannot be seen in the first hundredth of its steps, whose rates have
    hardly acted, and every rung costs a pass over the held-out examples.

    Args:
        total: steps of a trial.
        reduction: ratio of neighbouring rungs.
        warmup_end: the last step of the longest warm-up of the method's space.
    """
    steps = {round(total / reduction**k) for k in range(1, RUNGS + 1)}
    return tuple(sorted(step for step in steps if warmup_end < step < total and step >= 1))


def _ranked(trials: Sequence[TrialRecord], step: int) -> Sequence[TrialRecord]:
    return sorted((t for t in trials if step in t.sums), key=lambda t: float(t.sums[step].sum()))


def _worse(trial: TrialRecord, cutoff: TrialRecord, step: int, counts_N: Counts) -> str | None:
    if float(trial.sums[step].sum()) <= float(cutoff.sums[step].sum()):
        return None
    found = difference(trial.sums[step], cutoff.sums[step], counts_N)
    if found.low <= 0:
        return None
    return f"worse than {cutoff.name} by {found.value:.4f} (95 %: at least {found.low:.4f})"
