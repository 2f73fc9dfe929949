"""What to try next, one sampler a method; and the copy of the search that optuna-dashboard shows.

Optuna keeps no state of a sampler, so a sampler and a study in memory are made for every suggestion: it depends on the
seed of the search, the method, and the method's earlier trials as the journal has them, and on nothing else.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from peft_study.config import Choices, MethodSpace, cells
from peft_study.errors import OutputError, first_line
from peft_study.search.bayesian import BayesianSearch
from peft_study.search.design import Bounds, Values, decoded, distributions, fits, label, sobol_points
from peft_study.search.prior import RatePrior
from peft_study.search.trials import StudyState, TrialRecord
from peft_study.seeds import key
from peft_study.statistics import Counts, loss_value

STARTUP = 10
"""Trials before a sampler that models the space has something to learn from; they are quasi-random."""

_STATES = {
    "finished": TrialState.COMPLETE,
    "diverged": TrialState.COMPLETE,  # as the worst of all values: the sampler is to keep away from there
    "pruned": TrialState.PRUNED,
    "running": TrialState.RUNNING,
}


class SpaceSampler:
    """Suggests the settings of one method.

    Args:
        method: its name in the study, part of the seed.
        space: filled.
        sampler: ``bayesian``, ``tpe``, ``random``, ``grid``, ``quasi_random`` or ``gp``.
        seed: of the search.
        counts_N: supervised tokens of each held-out example.
        prior: of the best rate, for ``bayesian``.

    Attributes:
        bayesian: the model of the method's losses, whichever the sampler is.
    """

    def __init__(
        self,
        method: str,
        space: MethodSpace,
        sampler: str,
        seed: int,
        counts_N: Counts,
        prior: RatePrior | None = None,
    ) -> None:
        self._method, self._space, self._sampler, self._seed = method, space, sampler, seed
        self._counts_N = counts_N
        self._design = int(np.random.default_rng(key(seed, "design", method)).integers(2**31))
        self.bayesian = BayesianSearch(space, counts_N, prior, self._design)
        self._dimensions = space.dimensions()
        # trials in Optuna's form, kept for as long as the distributions stay the same
        self._kept: dict[tuple[str, str, int], FrozenTrial] = {}
        self._kept_for: dict[str, BaseDistribution] = {}

    def suggest(self, trials: Sequence[TrialRecord], bounds: Bounds, fresh: Bounds) -> Values:
        """Returns the values of the next trial.

        A grid gives a cell that none of the trials had, under these settings and fixed values.

        Args:
            trials: all searched trials of the method, in the order of their numbers.
            bounds: of dimensions whose range is not the space's own.
            fresh: the parts of ranges in which this trial must lie.
        """
        number = len(trials)
        # a 31-bit seed: scikit-learn's and numpy's legacy generators take no more
        seed = int(np.random.default_rng(key(self._seed, "sampler", self._method, number)).integers(2**31))
        if self._sampler == "grid":
            return self._untried_cell(trials)
        if self._sampler == "bayesian":
            return self.bayesian.suggest(trials, {**bounds, **fresh})
        space = distributions(self._space, {**bounds, **fresh})
        if self._sampler == "quasi_random" or (self._sampler != "random" and number < STARTUP):
            return decoded(self._space, sobol_points(space, number + 1, self._design)[number])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of experimental settings
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            study = optuna.create_study(direction="minimize", sampler=self._model(seed))
            study.add_trials(self.frozen(trials, bounds))
            return decoded(self._space, study.ask(space).params)

    def frozen(self, trials: Sequence[TrialRecord], bounds: Bounds) -> list[FrozenTrial]:
        """Returns trials in Optuna's form; arguments as of `suggest`.

        All have the same distributions, wide enough for every value: Optuna's models drop a dimension whose
        distribution differs between trials.
        """
        wide = dict(bounds)
        for name, dimension in self._dimensions.items():
            if isinstance(dimension, Choices):
                continue
            low, high = bounds.get(name, (dimension.low, dimension.high))
            values = [t.values[name] for t in trials if isinstance(t.values.get(name), (int, float))]
            values = [value for value in values if value > 0 or not dimension.log]
            wide[name] = (min([low, *values]), max([high, *values]))
        spaces = distributions(self._space, wide)
        if spaces != self._kept_for:
            self._kept, self._kept_for = {}, spaces
        found = []
        for trial in trials:
            state = trial.name, trial.status, len(trial.sums)
            if state not in self._kept:
                self._kept[state] = self._frozen(trial, spaces)
            found.append(self._kept[state])
        return found

    def _frozen(self, trial: TrialRecord, spaces: Mapping[str, BaseDistribution]) -> FrozenTrial:
        params = {n: label(v) for n, v in trial.values.items() if n in spaces}
        params = {n: v for n, v in params.items() if fits(spaces[n], v)}  # not all that an earlier space had
        losses = {step: loss_value(sums_N, self._counts_N) for step, sums_N in trial.sums.items()}
        state = _STATES.get(trial.status, TrialState.FAIL)
        value = None
        if state == TrialState.COMPLETE:
            value = math.inf if trial.last is None else loss_value(trial.last, self._counts_N)
        return optuna.trial.create_trial(
            state=state,
            value=value,
            params=params,
            distributions={name: spaces[name] for name in params},
            intermediate_values=losses,
            user_attrs={"name": trial.name, "status": trial.status, "reason": trial.reason},
        )

    def _model(self, seed: int) -> optuna.samplers.BaseSampler:
        if self._sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if self._sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True, constant_liar=True)

    def _untried_cell(self, trials: Sequence[TrialRecord]) -> Values:
        """Returns the first cell that no trial had, in an order that the seed gives."""
        grid = cells(self._space)
        tried = [trial.settings.flat for trial in trials]
        order = (grid[index] for index in np.random.default_rng(self._design).permutation(len(grid)))
        return next(cell for cell in order if self._space.flat(cell) not in tried)


def export(path: Path, samplers: Mapping[str, SpaceSampler], state: StudyState) -> None:
    """Adds the searched trials that ended since the last call to an SQLite file for optuna-dashboard.

    Args:
        path: of the file, made where there is none; every method has an Optuna study in it.
        samplers: by method.
        state: of the study.

    Raises:
        OutputError: when it cannot be written.
    """
    from sqlalchemy.exc import DatabaseError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}")
        for method, sampler in samplers.items():
            study = optuna.create_study(storage=storage, study_name=method, load_if_exists=True)
            there = {trial.user_attrs["name"] for trial in study.get_trials(deepcopy=False)}
            trials = sampler.frozen(state.of(method, "search"), state.bounds.get(method, {}))
            study.add_trials(t for t in trials if t.state.is_finished() and t.user_attrs["name"] not in there)
        storage.engine.dispose()
    except (optuna.exceptions.StorageInternalError, DatabaseError, KeyError, ValueError) as error:
        raise OutputError(
            f"cannot be written ({first_line(error.__cause__ or error)})",
            where=str(path),
            remedy="delete it: it is made again from the journal",
        ) from error
