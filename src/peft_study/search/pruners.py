"""Which trials are stopped early: at rungs, against the method's other trials, and never inside the noise.

    steps   |----------|--------------------|------------------------------------------------------------| total
          warm-up    total/9             total/3                                                        end
                     rung 1: best third    rung 2: best third of those that came so far
                     continues             continues

Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943) in its asynchronous form (Li et al. 2018,
arXiv:1810.05934), as Optuna's SuccessiveHalvingPruner has it: a trial continues where its loss is among the best
1/reduction of all that reached the rung before it. On top of that the loss must be worse than that of the last one kept
by more than the noise: the 95 % interval of their difference, paired by held-out example, must lie above zero.

`unlikely` is another rule: a trial stops where the model of the method's losses gives it a small chance to end as the
best. It needs no others at the same rung, and learns from the ends of trials how losses at a rung go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from peft_study.search.surrogate import Surrogate
from peft_study.search.trials import TrialRecord
from peft_study.statistics import Losses, difference

RUNGS = 2
"""Times a trial is judged at most."""
CHANCE = 0.1
"""A trial that is less likely than this to end as its method's best stops."""
STARTUP = 5
"""Trials the median rule waits for, as Optuna's MedianPruner does."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a trial should stop: the trial it is compared with, and by how much it is worse (nats a token)."""

    against: str
    worse: float
    low: float

    def __str__(self) -> str:
        return f"worse than {self.against} by {self.worse:.4f} (95 %: at least {self.low:.4f})"


class Pruner(Protocol):
    """Decides at a rung whether a trial stops."""

    def judge(self, name: str, reached: Mapping[str, Losses], counts_N: npt.NDArray[np.int64]) -> Verdict | None:
        """Returns why the trial stops, or None.

        Args:
            name: of the trial.
            reached: held-out losses at this rung of all trials of its method that came to it, its own among them.
            counts_N: supervised tokens of each held-out example.
        """


@dataclass(frozen=True, slots=True)
class SuccessiveHalving:
    """Keeps the best 1/reduction of those that came to a rung."""

    reduction: int

    def judge(self, name: str, reached: Mapping[str, Losses], counts_N: npt.NDArray[np.int64]) -> Verdict | None:
        """Compares with the last trial that is kept."""
        order = _ranked(reached)
        cutoff = order[max(len(order) // self.reduction, 1) - 1]
        return _verdict(name, cutoff, reached, counts_N)


@dataclass(frozen=True, slots=True)
class Median:
    """Stops what is worse than the median of the others."""

    def judge(self, name: str, reached: Mapping[str, Losses], counts_N: npt.NDArray[np.int64]) -> Verdict | None:
        """Compares with the trial at the median (of an even number, the worse of the two in the middle)."""
        others = _ranked({other: sums for other, sums in reached.items() if other != name})
        if len(others) < STARTUP:
            return None
        return _verdict(name, others[len(others) // 2], reached, counts_N)


@dataclass(frozen=True, slots=True)
class Never:
    """Runs everything to the end."""

    def judge(self, _name: str, _reached: Mapping[str, Losses], _counts_N: npt.NDArray[np.int64]) -> Verdict | None:
        """Stops nothing."""
        return None


def unlikely(
    trial: TrialRecord, group: Sequence[TrialRecord], step: int, model: Surrogate, counts_N: npt.NDArray[np.int64]
) -> str | None:
    """Returns why a trial should stop, where it would hardly end below the best of the others; else None.

    The chance is the surrogate's, with the noise of the dev rows where both were measured at the same step.

    Args:
        trial: that came to a rung.
        group: its method's trials that may still end well.
        step: the rung.
        model: of the method's losses, with what was measured there.
        counts_N: supervised tokens of each held-out example.
    """
    from scipy.stats import norm

    others = [other for other in group if other.name != trial.name and any(other.sums)]
    if not others:
        return None
    mean_C, covariance_CC = model.predict([trial.settings.flat, *(other.settings.flat for other in others)])
    best = 1 + int(np.argmin(mean_C[1:]))
    variance = covariance_CC[0, 0] + covariance_CC[best, best] - 2 * covariance_CC[0, best]
    other = others[best - 1]
    if step in other.sums:
        apart_N = trial.sums[step] - other.sums[step]
        if apart_N.sum() <= 0:  # better here: how both go on is a guess
            return None
        variance += apart_N.var() * len(apart_N) / float(other.sums[step].sum()) ** 2
    chance = float(norm.cdf((mean_C[best] - mean_C[0]) / max(variance, 1e-12) ** 0.5))
    if chance >= CHANCE:
        return None
    return f"a chance of {chance:.1%} to end below {other.name}"


def pruner(kind: str, reduction: int) -> Pruner:
    """Returns the rule of that name: ``successive_halving``, ``median`` or ``none``."""
    rules: dict[str, Pruner] = {
        "successive_halving": SuccessiveHalving(reduction),
        "median": Median(),
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


def _ranked(reached: Mapping[str, Losses]) -> Sequence[str]:
    return sorted(reached, key=lambda name: float(reached[name].sum()))


def _verdict(name: str, cutoff: str, reached: Mapping[str, Losses], counts_N: npt.NDArray[np.int64]) -> Verdict | None:
    if float(reached[name].sum()) <= float(reached[cutoff].sum()):
        return None
    found = difference(reached[name], reached[cutoff], counts_N)
    return Verdict(cutoff, found.value, found.low) if found.low > 0 else None
