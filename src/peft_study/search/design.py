"""The space of a method as Optuna's distributions, and points spread evenly over it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from peft_study.config import Choices, MethodSpace

Values = dict[str, Any]
Bounds = Mapping[str, tuple[float, float]]


def distributions(space: MethodSpace, bounds: Bounds) -> dict[str, BaseDistribution]:
    """Returns a distribution a searched dimension.

    Args:
        space: filled.
        bounds: of dimensions whose range is not the space's own.
    """
    found: dict[str, BaseDistribution] = {}
    for name, dimension in space.dimensions().items():
        if isinstance(dimension, Choices):
            found[name] = CategoricalDistribution([label(choice) for choice in dimension.choices])
            continue
        low, high = bounds.get(name, (dimension.low, dimension.high))
        if space.whole(name):
            found[name] = IntDistribution(math.ceil(low), math.floor(high), log=dimension.log)
        else:
            found[name] = FloatDistribution(low, high, log=dimension.log)
    return found


def decoded(space: MethodSpace, params: Mapping[str, Any]) -> Values:
    """Returns Optuna's values with the choices that their labels stand for."""
    values: Values = dict(params)
    for name, dimension in space.dimensions().items():
        if isinstance(dimension, Choices):
            values[name] = next(c for c in dimension.choices if label(c) == params[name])
    return values


def sobol_points(space: Mapping[str, BaseDistribution], count: int, seed: int) -> list[Values]:
    """Returns the first points of a scrambled Sobol sequence (scipy), stretched over the space.

    Optuna's own QMCSampler draws at random until a first trial has ended, which with many slots is the whole design.
    """
    from scipy.stats import qmc

    if not space:
        return [{}] * count
    sequence = qmc.Sobol(len(space), scramble=True, rng=np.random.default_rng(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that balance needs a power of two: there are as many points as trials
        points = sequence.random(count)
    return [{name: stretched(d, float(u)) for (name, d), u in zip(space.items(), p, strict=True)} for p in points]


def stretched(distribution: BaseDistribution, u: float) -> Any:
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


def fits(distribution: BaseDistribution, value: Any) -> bool:
    """Returns whether a value lies in a distribution."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return isinstance(value, (int, float)) and distribution.low <= value <= distribution.high


def label(choice: Any) -> Any:
    """Returns what stands for a choice in Optuna's database, which holds scalars only."""
    return choice if choice is None or isinstance(choice, (bool, int, float, str)) else json.dumps(choice)
