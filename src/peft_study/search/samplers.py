"""What to try next: Optuna through ask and tell, one Optuna study a method, one writer.

Optuna keeps no state of a sampler, and a study that is loaded again with the same seed repeats its first suggestions.
So a sampler is made anew for every trial, from (seed of the search, method, number of the trial): what is suggested
depends on nothing but that and the trials told before.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from peft_study.config import Choices, Dimension, MethodSpace, cells
from peft_study.errors import ConfigError, OutputError
from peft_study.search.trials import TrialRecord
from peft_study.seeds import key
from peft_study.statistics import loss_value

Result = TypeVar("Result")
Values = dict[str, Any]
Bounds = Mapping[str, tuple[float, float]]

STARTUP = 10
"""Trials before a sampler that models the space has something to learn from; they are quasi-random."""
RETRY_SECONDS = (0.5, 1, 2, 4, 8, 16, 30)
"""Waits before a database that does not answer is given up."""


_STATES = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "running": TrialState.RUNNING}


class Suggestions:
    """The Optuna study of one method.

    Args:
        storage: of all methods.
        name: of the Optuna study.
        method: the method's name in the study, part of the seed.
        space: filled.
        sampler: ``tpe``, ``random``, ``grid``, ``quasi_random`` or ``gp``.
        seed: of the search.

    Raises:
        OutputError: the database cannot be reached.
    """

    def __init__(
        self, storage: optuna.storages.BaseStorage, name: str, method: str, space: MethodSpace, sampler: str, seed: int
    ) -> None:
        self._storage, self._method, self._space = storage, method, space
        self._sampler, self._seed = sampler, seed
        self._dimensions = space.dimensions()
        self._tried: dict[int, Mapping[str, Any]] = {}
        self._study = reliably(
            lambda: optuna.create_study(
                storage=storage, study_name=name, direction="minimize", load_if_exists=True, sampler=_Design(dict)
            )
        )
        self._remember()

    def adopt(self, trials: Sequence[TrialRecord], counts_N: npt.NDArray[np.int64]) -> None:
        """Adds the trials that a method has had so far and that are not in this study: it began for a changed space.

        Args:
            trials: in the order of their numbers.
            counts_N: supervised tokens of each held-out example.
        """
        self._tried = {number: trial.settings for number, trial in enumerate(trials)}
        for trial in trials[len(self._trials) :]:
            params = {n: _label(v) for n, v in trial.values.items() if n in self._dimensions}
            distributions = {n: self._around(n, value) for n, value in params.items()}
            fits = {n: v for n, v in params.items() if _fits(distributions[n], v)}
            losses = {step: loss_value(sums_N, counts_N) for step, sums_N in trial.sums.items()}
            state = _STATES.get(trial.status, TrialState.FAIL)
            frozen = optuna.trial.create_trial(
                state=state,
                value=losses[max(losses)] if state == TrialState.COMPLETE else None,
                params=fits,
                distributions={name: distributions[name] for name in fits},
                intermediate_values=losses,
            )
            reliably(functools.partial(self._study.add_trial, frozen))
        if len(trials) > len(self._trials):
            self._remember()

    def _remember(self) -> None:
        """Keeps what is in the database: asking it each time reads every trial under way, which with 64 of them took
        more than half of the scheduler's time (docs/scale.md)."""
        self._trials = reliably(lambda: list(self._study.get_trials(deepcopy=False)))
        self._told = {trial.number for trial in self._trials if trial.state.is_finished()}
        self._steps = {trial.number: set(trial.intermediate_values) for trial in self._trials}

    def ask(self, number: int, bounds: Bounds) -> Values:
        """Returns the values of the trial of that number: those in the database, where it was asked for before.

        A grid gives a cell that was not tried, under these settings and fixed values, by a trial of a lower number.

        Args:
            number: from 0, without gaps.
            bounds: of dimensions whose range is not the space's own.
        """
        if number >= len(self._trials) or not set(self._trials[number].params) >= set(self._dimensions):
            self._make(number, bounds)
        values = self._decoded(self._trials[number].params)
        self._tried[number] = self._space.flat(values)
        return values

    def _make(self, number: int, bounds: Bounds) -> None:
        """Has a trial's values chosen, and keeps its row."""
        distributions = {name: self._distribution(name, d, bounds) for name, d in self._dimensions.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of experimental settings
            self._study.sampler = self._fresh_sampler(number, distributions)
            row = reliably(lambda: self._suggest(number, distributions))
        frozen = reliably(lambda: self._storage.get_trial(row))
        self._trials[number:] = [frozen]
        self._steps[number] = set()

    def _suggest(self, number: int, distributions: Mapping[str, BaseDistribution]) -> int:
        """Makes the row of a trial, or fills up one that a kill or a lost connection left half made; returns its id."""
        study = self._study
        try:
            row = self._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
            trial = optuna.trial.Trial(study, row)
        except KeyError:
            trial = study.ask()
        if trial.number != number:
            raise OutputError(
                f"has trial {trial.number} of {self._method} where {number} was expected: another process writes to it",
                where="storage",
                remedy="give each study a database, or a folder, of its own",
            )
        # what Study.ask does with distributions; a value that is there already comes back as it is
        for name, distribution in distributions.items():
            trial._suggest(name, distribution)
        return trial._trial_id

    def report(self, number: int, step: int, value: float) -> None:
        """Notes a held-out loss on the way."""
        if number not in self._told and step not in self._steps[number]:
            row = self._trials[number]._trial_id
            reliably(lambda: self._storage.set_trial_intermediate_value(row, step, value))
            self._steps[number].add(step)

    def tell(self, number: int, status: str, value: float | None, attributes: Mapping[str, Any]) -> None:
        """Notes how a trial ended.

        Args:
            number: of the trial.
            status: finished, pruned, or anything else, which is a failure.
            value: held-out loss after the last step, of a finished trial.
            attributes: shown beside it.
        """
        if number in self._told:
            return
        row = self._trials[number]._trial_id
        state = _STATES.get(status, TrialState.FAIL)
        values = [value] if state == TrialState.COMPLETE and value is not None else None
        # written already, and only the answer was lost: then it was tried again
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            for name, what in attributes.items():
                reliably(functools.partial(self._storage.set_trial_user_attr, row, name, what))
            reliably(lambda: self._storage.set_trial_state_values(row, state, values))
        self._told.add(number)

    def _distribution(self, name: str, dimension: Dimension, bounds: Bounds) -> BaseDistribution:
        if isinstance(dimension, Choices):
            return CategoricalDistribution([_label(choice) for choice in dimension.choices])
        low, high = bounds.get(name, (dimension.low, dimension.high))
        if self._space.whole(name):
            return IntDistribution(math.ceil(low), math.floor(high), log=dimension.log)
        return FloatDistribution(low, high, log=dimension.log)

    def _around(self, name: str, value: Any) -> BaseDistribution:
        """Returns a dimension's distribution, as wide as it takes to hold the value."""
        dimension = self._dimensions[name]
        if isinstance(dimension, Choices) or isinstance(value, str):
            return self._distribution(name, dimension, {})
        bounds = (min(dimension.low, value), max(dimension.high, value))
        return self._distribution(name, dimension, {name: bounds})

    def _decoded(self, params: Mapping[str, Any]) -> Values:
        values: Values = dict(params)
        for name, dimension in self._dimensions.items():
            if isinstance(dimension, Choices):
                values[name] = next(c for c in dimension.choices if _label(c) == params[name])
        return values

    def _fresh_sampler(self, number: int, space: Mapping[str, BaseDistribution]) -> optuna.samplers.BaseSampler:
        # a 31-bit seed: scikit-learn's and numpy's legacy generators take no more
        seed = int(np.random.default_rng(key(self._seed, "sampler", self._method, number)).integers(2**31))
        whole = int(np.random.default_rng(key(self._seed, "design", self._method)).integers(2**31))
        if self._sampler == "grid":
            cell = self._untried_cell(number, whole)
            return _Design(lambda: cell)
        if self._sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if self._sampler == "quasi_random" or number < STARTUP:
            return _Design(lambda: _sobol_point(space, number, whole))
        if self._sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True, constant_liar=True)

    def _untried_cell(self, number: int, seed: int) -> Values:
        """Returns the first cell, in an order that the seed gives, that no trial of a lower number has had."""
        grid = cells(self._space)
        tried = [settings for before, settings in self._tried.items() if before < number]
        order = (grid[index] for index in np.random.default_rng(seed).permutation(len(grid)))
        cell = next(cell for cell in order if self._space.flat(cell) not in tried)
        return {name: _label(value) for name, value in cell.items()}


class _Design(optuna.samplers.BaseSampler):
    """Takes the point of a fixed design: a function of the trial's number alone."""

    def __init__(self, point: Callable[[], Values]) -> None:
        self._point = point

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: Any) -> Values:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self._point()[param_name]


def _sobol_point(space: Mapping[str, BaseDistribution], number: int, seed: int) -> Values:
    """Returns point `number` of a scrambled Sobol sequence (scipy), stretched over the space.

    Optuna's own QMCSampler draws at random until a first trial has ended, which with many slots is the whole design.
    """
    from scipy.stats import qmc

    if not space:
        return {}
    sequence = qmc.Sobol(len(space), scramble=True, rng=np.random.default_rng(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that balance needs a power of two: there are as many points as trials
        point = sequence.random(number + 1)[number]
    return {name: _stretched(d, float(u)) for (name, d), u in zip(space.items(), point, strict=True)}


def _stretched(distribution: BaseDistribution, u: float) -> Any:
    """Returns the value at the share `u` of a distribution's range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[min(int(u * len(distribution.choices)), len(distribution.choices) - 1)]
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    low, high = distribution.low, distribution.high
    if isinstance(distribution, IntDistribution):
        low, high = (low - 0.5, high + 0.5) if distribution.log is False else (low, high + 1)
        value = low * (high / low) ** u if distribution.log else low + u * (high - low)
        whole = math.floor(value) if distribution.log else round(value)
        return min(max(whole, distribution.low), distribution.high)
    value = low * (high / low) ** u if distribution.log else low + u * (high - low)
    return min(max(value, low), high)


def _fits(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except ValueError:  # no choice of it
        return False


def _label(choice: Any) -> Any:
    """Returns what stands for a choice in Optuna's database, which holds scalars only."""
    return choice if choice is None or isinstance(choice, (bool, int, float, str)) else json.dumps(choice)


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """Returns Optuna's database at an SQLAlchemy URL; it is made where there is none.

    Raises:
        ConfigError: when its driver is not installed, or the URL is none.
        OutputError: when it cannot be reached.
    """
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        return reliably(lambda: optuna.storages.RDBStorage(url), where=_without_password(url))
    except ImportError as error:
        remedy = "pip install 'psycopg[binary]' and write postgresql+psycopg://..." if "postgres" in url else None
        raise ConfigError(
            f"its driver is not installed ({error})", where=_without_password(url), remedy=remedy
        ) from error
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise ConfigError(
            f"is no database URL ({str(error).splitlines()[0]})",
            where=f"storage {_without_password(url)}",
            remedy="write sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/NAME",
        ) from error


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.split('://')[0]}://...@{tail}" if at else url


def reliably(call: Callable[[], Result], *, where: str = "storage", waits: Sequence[float] | None = None) -> Result:
    """Returns what a call of the database gives, trying again where it cannot be reached.

    Raises:
        OutputError: when it cannot be reached for a minute; the study goes on from its checkpoint.
    """
    from sqlalchemy.exc import DBAPIError

    for wait in (*(RETRY_SECONDS if waits is None else waits), None):
        try:
            return call()
        except (optuna.exceptions.StorageInternalError, DBAPIError) as error:
            cause = str(error.__cause__ or error).strip().splitlines()[0]
            if wait is None:
                raise OutputError(
                    f"the database cannot be used ({cause})",
                    where=where,
                    remedy="see that it is reachable and its disk not full, then run the same command again: "
                    "nothing is lost",
                ) from error
            time.sleep(wait)
    raise AssertionError("unreachable")
