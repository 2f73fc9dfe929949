"""What a method's trials say about settings that were not tried: loss as a function of settings and steps.

A Gaussian process (scikit-learn) over the logarithm of the dev loss. Its inputs are the settings, with the decimal
logarithm of the learning rate, and the share of the steps at which a loss was measured; so it learns from the rungs of
stopped trials too, and how the best rate moves with the budget.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_study.config import Choices, MethodSpace
from peft_study.search.trials import TrialRecord
from peft_study.statistics import Counts, loss_value

Values = Mapping[str, Any]
Array = npt.NDArray[np.float64]

WORST = 1.1
"""Losses are cut at so many times that of the method's start: how bad a diverged trial is says nothing more."""
FITTED_FROM = 6
"""Settings that were measured before the length scales are fitted; with fewer the likelihood runs to their bounds."""


@dataclass(frozen=True, slots=True)
class _Column:
    """One input of the model: a dimension, or one choice of several without an order.

    Attributes:
        name: of the dimension.
        log: take the decimal logarithm.
        low: its least value.
        scale: what differences are divided by.
        choice: of a dimension without an order, in a tuple: 1 where the value is this, else 0.
        reach: length scale to begin with, and its bounds.
    """

    name: str
    log: bool
    low: float
    scale: float
    choice: tuple[Any] | None
    reach: tuple[float, float, float]

    def of(self, values: Values) -> float:
        """Returns the number of a setting; earlier trials may lie outside the range, or have no number (null)."""
        value = values[self.name]
        if self.choice is not None:
            return float(value == self.choice[0])
        number = float(value) if isinstance(value, (int, float)) else self.low
        return (math.log10(max(number, self.low / 10)) if self.log else number) / self.scale


RATE_REACH, OTHER_REACH, STEPS_REACH = (0.5, 0.25, 2.0), (1.0, 0.5, 10.0), (4.0, 2.5, 10.0)
"""Length scales of the rate (decades), of other settings (their whole range), of the steps (factors of 3)."""
WIDE = 4
"""Lists of numbers whose ends lie this many times apart are taken on the log scale."""


def _columns(space: MethodSpace) -> list[_Column]:
    found = []
    for name, dimension in space.dimensions().items():
        if isinstance(dimension, Choices):
            numbers = dimension.sorted_numbers
            if len(dimension.choices) == 1:
                continue
            if not numbers:
                found += [_Column(name, False, 0.0, 1.0, (choice,), OTHER_REACH) for choice in dimension.choices]
                continue
            log = numbers[0] > 0 and numbers[-1] >= WIDE * numbers[0]
        else:
            numbers, log = [dimension.low, dimension.high], dimension.log
        if name == "learning_rate" and numbers[0] > 0:
            found.append(_Column(name, True, numbers[0], 1.0, None, RATE_REACH))
        else:
            low, high = (math.log10(end) if log else end for end in (numbers[0], numbers[-1]))
            found.append(_Column(name, log, numbers[0], high - low or 1.0, None, OTHER_REACH))
    return found


class Surrogate:
    """The model of one method.

    Args:
        space: filled.
        trials: searched trials of the method; those without a measured loss say nothing.
        counts_N: supervised tokens of each held-out example.
    """

    def __init__(self, space: MethodSpace, trials: Sequence[TrialRecord], counts_N: Counts) -> None:
        self._columns = _columns(space)
        known = [measured(trial, counts_N) for trial in trials]
        starts = [loss_value(trial.start, counts_N) for trial in trials if trial.start is not None]
        finite = [loss for losses in known for loss in losses.values() if math.isfinite(loss)]
        worst = WORST * min(starts) if starts else max(finite, default=1.0)
        points = [
            (self._inputs(trial.settings.flat, share), math.log(max(min(loss, worst), 1e-12)))
            for trial, losses in zip(trials, known, strict=True)
            for share, loss in losses.items()
        ]
        self._inputs_MD = np.array([inputs for inputs, _ in points]).reshape(len(points), len(self._columns) + 1)
        self._logs_M = np.array([log for _, log in points])
        self._mean = float(self._logs_M.mean()) if points else 0.0
        self._spread = max(float(self._logs_M.std()), 1e-3) if len(points) > 1 else 1.0
        self._model = self._fitted(self._inputs_MD, self._logs_M, optimise=sum(map(bool, known)) >= FITTED_FROM)

    @property
    def empty(self) -> bool:
        """True where nothing was measured yet."""
        return not len(self._logs_M)

    def apart(self, candidates: Sequence[Values], settings: Sequence[Values]) -> Array:
        """Returns how far each candidate lies from the nearest of some settings: (C,).

        The largest difference in any dimension counts: decades of the rate, shares of other ranges.
        """
        if not settings:
            return np.full(len(candidates), np.inf)
        if not candidates:
            return np.zeros(0)
        ours_CD, theirs_PD = (np.array([self._inputs(v, 1.0) for v in some]) for some in (candidates, settings))
        found: Array = np.abs(ours_CD[:, None] - theirs_PD[None]).max(axis=2).min(axis=1)
        return found

    def predict(self, settings: Sequence[Values], share: float = 1.0) -> tuple[Array, Array]:
        """Returns mean and covariance of the log of the loss (nats a token) of C settings: (C,) and (C, C).

        Args:
            settings: values of the searched dimensions, or more.
            share: of the steps; 1: at the end of the budget.
        """
        return self._predicted(self._model, settings, share)

    def with_pending(self, settings: Sequence[Values], candidates: Sequence[Values]) -> tuple[Array, Array]:
        """Returns mean and standard deviation for candidates, as if some settings under way had ended as expected.

        Ginsbourger et al. 2010, "Kriging is well-suited to parallelize optimization" (the believer).
        """
        model = self._model
        if settings:
            mean_P, _ = self.predict(settings)
            inputs_PD = np.array([self._inputs(values, 1.0) for values in settings])
            model = self._fitted(
                np.concatenate([self._inputs_MD, inputs_PD]),
                np.concatenate([self._logs_M, mean_P]),
                optimise=False,
                kernel=self._model.kernel_ if not self.empty else None,
            )
        mean_C, covariance_CC = self._predicted(model, candidates, 1.0)
        return mean_C, np.sqrt(np.maximum(np.diag(covariance_CC), 1e-12))

    def _predicted(self, model: Any, settings: Sequence[Values], share: float) -> tuple[Array, Array]:
        inputs = np.array([self._inputs(values, share) for values in settings]).reshape(len(settings), -1)
        mean_C, covariance_CC = model.predict(inputs, return_cov=True)
        noise = getattr(model, "kernel_", model.kernel).k2.noise_level  # which predictions of scikit-learn include
        covariance_CC = covariance_CC - noise * np.eye(len(inputs))
        return mean_C.reshape(-1) * self._spread + self._mean, covariance_CC * self._spread**2

    def _inputs(self, values: Values, share: float) -> list[float]:
        return [*(column.of(values) for column in self._columns), math.log(share) / math.log(3)]

    def _fitted(self, inputs_MD: Array, logs_M: Array, *, optimise: bool, kernel: Any = None) -> Any:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        if kernel is None:
            reaches = [*(column.reach for column in self._columns), STEPS_REACH]
            kernel = ConstantKernel(1.0, (0.1, 30)) * Matern(
                [start for start, _, _ in reaches], [(low, high) for _, low, high in reaches], nu=2.5
            ) + WhiteKernel(1e-3, (1e-5, 1e-2))
        model = GaussianProcessRegressor(kernel, alpha=1e-8, optimizer="fmin_l_bfgs_b" if optimise else None)
        if not len(logs_M):
            return model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of length scales that end at a bound
            return model.fit(inputs_MD, (logs_M - self._mean) / self._spread)


def measured(trial: TrialRecord, counts_N: Counts) -> dict[float, float]:
    """Returns a trial's losses (nats a token) by share of its steps, at its rungs and its end.

    A diverged trial has an infinite loss at the end; a failed one says nothing.
    """
    total = trial.settings.training.steps or max(trial.sums, default=1)
    steps = {*trial.settings.rungs, total}
    losses = {step / total: loss_value(sums_N, counts_N) for step, sums_N in trial.sums.items() if step in steps}
    if trial.status == "failed":
        return {}
    return {**losses, 1.0: math.inf} if trial.status == "diverged" else losses
