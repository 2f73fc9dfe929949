"""How the dev loss answers to each setting of a method's search: a curve, and the setting's share of the variance.

Only trials of the search that ran to their end enter; of those that were stopped, diverged or failed the loss after the
whole budget is not known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_study.config import Choices, Range, StudyConfig
from peft_study.report.evidence import at, full_budget, names, positions
from peft_study.search.trials import StudyState, TrialRecord, value_of
from peft_study.statistics import CONFIDENCE, Estimate, mean_over_seeds
from peft_study.storage.held_out import HeldOut

IMPORTANCE_FROM = 30
"""Trials that importances take: of fewer, their intervals span nearly all of 0 to 1."""
TREES, TREE_TRIALS, MOST_TRIALS = 100, 300, 1000
"""Resamples of the trials, each with a tree; trials in a resample and in all, at most."""
FACTOR = 8
"""Choices that differ by this factor or more are drawn on a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class ResponsePoint:
    """The trials at one value, or in a bin of neighbouring values.

    Attributes:
        value: of the setting; of a bin its middle.
        low, high: least and greatest value in it.
        loss: mean dev loss in nats a token, with the interval over examples and trials.
        trials: names.
    """

    value: float | str | bool
    low: float | str | bool
    high: float | str | bool
    loss: Estimate
    trials: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Response:
    """One setting of one method.

    Attributes:
        method, setting: which.
        log: its values belong on a logarithmic axis.
        points: in the order of the values.
        importance: share of the variance of the logarithm of the loss in which the setting takes part, 0 to 1, with its
            interval over trials; None below `IMPORTANCE_FROM` trials, or where it is the only setting.
    """

    method: str
    setting: str
    log: bool
    points: tuple[ResponsePoint, ...]
    importance: Estimate | None


def responses(config: StudyConfig, state: StudyState, examples: HeldOut) -> tuple[Response, ...]:
    """Returns a curve for each searched setting of each method that has a trial which ran to its end."""
    found = []
    for method in config.searched:
        trials, dimensions = full_budget(state, method), config.methods[method].dimensions()
        if not trials:
            continue
        shares = importances(trials, dimensions)
        for name, dimension in dimensions.items():
            log = _is_log(name, dimension, trials)
            groups = positions(trials, name, dimension, bins=True)
            points = tuple(_point(group, name, examples, log=log) for group in groups)
            found.append(Response(method, name, log, points, shares.get(name)))
    return tuple(found)


def _point(trials: Sequence[TrialRecord], name: str, examples: HeldOut, *, log: bool) -> ResponsePoint:
    losses = mean_over_seeds(np.stack([t.last for t in trials if t.last is not None]), examples.counts_N)
    values: list[Any] = [at(trial, name) for trial in trials]
    low, high = values[0], values[-1]
    if low == high:
        return ResponsePoint(low, low, high, losses, names(trials))
    middle = math.exp(sum(map(math.log, values)) / len(values)) if log else sum(values) / len(values)
    return ResponsePoint(middle, low, high, losses, names(trials))


def _is_log(name: str, dimension: Range | Choices, trials: Sequence[TrialRecord]) -> bool:
    values = [at(trial, name) for trial in trials]
    if not all(isinstance(value, (int, float)) and value > 0 for value in values):
        return False
    if isinstance(dimension, Range):
        return dimension.log
    found = dimension.sorted_numbers
    return bool(found) and found[0] > 0 and (name == "learning_rate" or found[-1] >= FACTOR * found[0])


def importances(trials: Sequence[TrialRecord], dimensions: dict[str, Range | Choices]) -> dict[str, Estimate]:
    """Returns the share of the variance that each setting takes part in; nothing for too few trials.

    A tree is fitted to each bootstrap resample of the trials, and the values of one setting are permuted among the
    trials that it has not seen; half of what its squared error grows by, divided by the variance, is Jansen's estimate
    of the total effect (Saltelli et al. 2010, table 2). The interval holds 95 % of the trees.
    Of few trials a tree sees part of what there is, and the shares come out too small: of 30, half.

    Args:
        trials: of one method, with finite losses.
        dimensions: its searched settings.
    """
    if len(trials) < IMPORTANCE_FROM or len(dimensions) < 2:
        return {}
    if len(trials) > MOST_TRIALS:
        chosen = np.random.default_rng(0).choice(len(trials), MOST_TRIALS, replace=False)
        trials = [trials[place] for place in np.sort(chosen)]
    losses = np.log([value_of(trial) for trial in trials])
    if not np.var(losses) > 0:
        return {}
    columns = [_encoded([at(t, n) for t in trials], log=_is_log(n, d, trials)) for n, d in dimensions.items()]
    shares = _shares(np.stack(columns, 1), losses)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(shares, [tail, 100 - tail], axis=0)
    return {
        name: Estimate(float(shares[:, place].mean()), float(low[place]), float(high[place]))
        for place, name in enumerate(dimensions)
    }


def _encoded(values: Sequence[float | str | bool], *, log: bool) -> npt.NDArray[np.float64]:
    """Returns a setting's values as numbers; of texts their place in the alphabet, which a tree can split."""
    if any(isinstance(value, str) for value in values):
        order = sorted({str(value) for value in values})
        return np.array([order.index(str(value)) for value in values], dtype=np.float64)
    found = np.array(values, dtype=np.float64)
    return np.log(found) if log else found


def _shares(settings_TD: npt.NDArray[np.float64], losses_T: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the share of each setting by each tree, cut to 0 to 1."""
    from sklearn.ensemble import RandomForestRegressor

    number, least, generator = len(losses_T), min(len(losses_T), TREE_TRIALS), np.random.default_rng(0)
    forest = RandomForestRegressor(TREES, min_samples_leaf=2, max_samples=least, random_state=0)
    forest.fit(settings_TD, losses_T)
    found = []
    for tree, seen in zip(forest.estimators_, forest.estimators_samples_, strict=True):
        unseen = np.setdiff1d(np.arange(number), seen)[:TREE_TRIALS]
        if len(unseen) < 2:
            continue
        # scikit-learn's permutation_importance checks its arguments at each call: 10 times as long
        settings_UD, errors = settings_TD[unseen].astype(np.float32), []
        order = generator.permutation(len(unseen))
        for column in (None, *range(settings_UD.shape[1])):
            permuted_UD = settings_UD.copy()
            if column is not None:
                permuted_UD[:, column] = settings_UD[order, column]
            errors.append(np.mean((tree.predict(permuted_UD, check_input=False) - losses_T[unseen]) ** 2))
        found.append((np.array(errors[1:]) - errors[0]) / 2 / np.var(losses_T))
    return np.clip(np.array(found), 0.0, 1.0)
