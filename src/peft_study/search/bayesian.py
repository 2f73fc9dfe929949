"""Bayesian search: what a model of the losses says is worth trying next, and what it recommends so far.

default rate, other rates --> losses at rungs and ends --> surrogate --> the setting that may improve most
                                                                     --> recommendation: best rate, between, how sure
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_study.config import MethodSpace, Range, cells, grid_size
from peft_study.search.design import Bounds, Values, decoded, distributions, sobol_points
from peft_study.search.lr_range_test import central
from peft_study.search.prior import RatePrior
from peft_study.search.surrogate import Surrogate
from peft_study.search.trials import Recommendation, TrialRecord
from peft_study.statistics import Counts

Array = npt.NDArray[np.float64]

POINTS, LINES, RATES = 512, 3, 33
"""Candidates: points of the space; lines of this many rates through the middle and through the best trials."""
PRIOR_WEIGHT = 3.0
"""Of the prior's logarithm at the first trial; it falls as one over their number (piBO)."""
DEFAULTS_FIRST = 3
"""Trials that vary the learning rate alone, with the other settings at their defaults."""
NEAR = 0.1
"""What lies so near to a trial would tell nothing new: decades of the rate, shares of other ranges."""
DRAWS, SURE = 1000, 0.9
"""Curves that are drawn from the model for a recommendation, and how sure its interval and its distance are."""


class BayesianSearch:
    """The search of one method; everything is a function of the trials given.

    Args:
        space: filled.
        counts_N: supervised tokens of each held-out example.
        prior: of the best rate; None: the rate is fixed.
        seed: of the candidates.
    """

    def __init__(self, space: MethodSpace, counts_N: Counts, prior: RatePrior | None, seed: int) -> None:
        self._space, self._counts_N, self._prior, self._seed = space, counts_N, prior, seed
        self._known: tuple[Any, Surrogate] | None = None

    def surrogate(self, trials: Sequence[TrialRecord]) -> Surrogate:
        """Returns the model of the losses; the last one is kept for as long as nothing new was measured."""
        state = [(trial.name, trial.status, len(trial.sums)) for trial in trials]
        if self._known is None or self._known[0] != state:
            self._known = state, Surrogate(self._space, trials, self._counts_N)
        return self._known[1]

    def suggest(self, trials: Sequence[TrialRecord], bounds: Bounds) -> Values:
        """Returns the candidate with the largest expected improvement, weighted by the prior of its rate.

        The prior's weight fades as trials come in: Hvarfner et al. 2022, "piBO", arXiv:2204.11051. The first trial has
        the prior's rate, and the middle of every other dimension.

        Args:
            trials: all searched trials of the method.
            bounds: of dimensions whose range is not the space's own; the candidate lies in them.
        """
        model, tried = self.surrogate(trials), [trial.settings.flat for trial in trials]
        inside = [c for c in self.candidates(trials, bounds) if all(a <= c[n] <= b for n, (a, b) in bounds.items())]
        untried = [candidate for candidate in inside if self._space.flat(candidate) not in tried]
        apart_C = model.apart(untried, tried)
        # where every setting was tried, one is tried again
        candidates = [c for c, apart in zip(untried, apart_C, strict=True) if apart > NEAR] or untried or inside
        running = [trial.settings.flat for trial in trials if trial.status == "running"]
        best = 0.0 if model.empty else float(model.predict(tried)[0].min())
        mean_C, spread_C = model.with_pending(running, candidates)
        score_C = _log_expected_improvement(mean_C, spread_C, best)
        if self._prior is not None:
            centre_C = np.array([self._prior.centre(self._space.flat(candidate)) for candidate in candidates])
            away_C = (np.log10([c["learning_rate"] for c in candidates]) - centre_C) / self._prior.decades
            score_C -= PRIOR_WEIGHT / (1 + len(trials)) * away_C**2 / 2
        if len(trials) < DEFAULTS_FIRST:
            defaults = {name: value for name, value in central(self._space).items() if name != "learning_rate"}
            score_C -= 1e3 * np.array([sum(c[n] != value for n, value in defaults.items()) for c in candidates])
        return candidates[int(np.argmax(score_C))]

    def recommended(self, trials: Sequence[TrialRecord], bounds: Bounds) -> Recommendation | None:
        """Returns the setting with the least loss that can be promised: mean plus one standard deviation.

        What was stopped, diverged or failed is not recommended. None where nothing was measured yet.
        """
        model = self.surrogate(trials)
        if model.empty:
            return None
        good = [self._values(trial) for trial in trials if trial.status in ("running", "finished")]
        tried = [self._values(trial) for trial in trials]
        candidates = [*good, *(c for c in self.candidates(trials, bounds) if c not in tried)]
        if not candidates:
            return None
        mean_C, covariance_CC = model.predict(candidates)
        chosen = int(np.argmin(mean_C + np.sqrt(np.maximum(np.diag(covariance_CC), 0.0))))
        losses_DC = np.exp(_draws(mean_C, covariance_CC))
        within = float(np.quantile(losses_DC[:, chosen] - losses_DC.min(axis=1), SURE))
        values = candidates[chosen]
        return Recommendation(values, self._between(model, values, bounds), within)

    def _between(self, model: Surrogate, values: Values, bounds: Bounds) -> tuple[float, float] | None:
        rates = self._rates(bounds)
        if not rates:
            return None
        mean_R, covariance_RR = model.predict([{**values, "learning_rate": rate} for rate in rates])
        best_D = np.array(rates)[_draws(mean_R, covariance_RR).argmin(axis=1)]
        low, high = np.quantile(best_D, [(1 - SURE) / 2, (1 + SURE) / 2], method="nearest")
        return min(float(low), values["learning_rate"]), max(float(high), values["learning_rate"])

    def candidates(self, trials: Sequence[TrialRecord], bounds: Bounds) -> list[Values]:
        """Returns all cells of a grid, else points of the space and rates with the settings of the best trials."""
        if grid_size(self._space) is not None:
            return cells(self._space)
        space = distributions(self._space, bounds)
        found = [decoded(self._space, point) for point in sobol_points(space, POINTS, self._seed)]
        lines = [central(self._space), *map(self._values, self._best(trials))]
        return found + [{**line, "learning_rate": rate} for line in lines for rate in self._rates(bounds)]

    def _values(self, trial: TrialRecord) -> Values:
        """Returns a trial's values of the searched dimensions, also of one from before a change of the space."""
        return {name: trial.settings.flat[name] for name in self._space.dimensions()}

    def _rates(self, bounds: Bounds) -> list[float]:
        rate = self._space.dimensions().get("learning_rate")
        if not isinstance(rate, Range):
            return [] if rate is None else rate.sorted_numbers
        low, high = bounds.get("learning_rate", (rate.low, rate.high))
        spaced = np.geomspace(low, high, RATES) if rate.log else np.linspace(low, high, RATES)
        return [float(r) for r in np.clip(spaced, low, high)]

    def _best(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        model, there = self.surrogate(trials), [trial for trial in trials if trial.status != "failed"]
        if model.empty or not there:
            return []
        mean_C, _ = model.predict([trial.settings.flat for trial in there])
        return [there[index] for index in np.argsort(mean_C, kind="stable")[:LINES]]


def _log_expected_improvement(mean_C: Array, spread_C: Array, best: float) -> Array:
    """Returns the log of the expected improvement on a least value (Jones et al. 1998)."""
    from scipy.stats import norm

    z_C = (best - mean_C) / spread_C
    found: Array = np.log(np.maximum(spread_C * (z_C * norm.cdf(z_C) + norm.pdf(z_C)), 1e-300))
    return found


def _draws(mean_C: Array, covariance_CC: Array) -> Array:
    """Returns DRAWS functions of the model at C points: (DRAWS, C)."""
    draws = np.random.default_rng(0)
    values_DC: Array = draws.multivariate_normal(mean_C, covariance_CC, DRAWS, method="eigh", check_valid="ignore")
    return values_DC
