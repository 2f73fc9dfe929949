"""Curves with a known truth for the tests of the rules on runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from peft_study.doctor.diagnosis import Diagnosis, Problem
from peft_study.doctor.observations import LossCurve, Observations, UsedSettings
from peft_study.doctor.rule import RULES, examine

Floats = npt.NDArray[np.float64]


def noise(points: int, spread: float, *, seed: int = 0, correlation: float = 0.0) -> Floats:
    """Returns noise of a standard deviation, each point correlated with the one before."""
    draws = np.random.default_rng(seed).standard_normal(points) * spread * np.sqrt(1 - correlation**2)
    values = np.zeros(points)
    for place in range(points):
        values[place] = draws[place] + (correlation * values[place - 1] if place else 0.0)
    return values


def falling(points: int = 100, *, start: float = 2.0, end: float = 1.0, speed: float = 5.0) -> Floats:
    """Returns a loss that falls, fast at first."""
    part = np.arange(points) / max(points - 1, 1)
    return end + (start - end) * (np.exp(-speed * part) - np.exp(-speed)) / (1 - np.exp(-speed))


def seen(loss: Any, *, settings: UsedSettings | None = None, stage: str = "after", **curve: Any) -> Observations:
    """Returns observations of a curve that has a point a step, unless `steps` says otherwise."""
    values = np.asarray(loss, dtype=np.float64)
    steps = np.asarray(curve.pop("steps", np.arange(1, len(values) + 1)), dtype=np.float64)
    found = LossCurve(steps=steps, loss=values, **curve)
    done = int(steps[-1]) if len(steps) else 0
    return Observations(stage=stage, steps_done=done, settings=settings or UsedSettings(), curve=found)


def wrong(observed: Observations) -> list[str]:
    """Returns the errors and warnings, the worst first."""
    return [problem.check for problem in examine(observed, kinds=("run",)).problems if problem.level != "note"]


def all_checks(observed: Observations) -> list[str]:
    """Returns every check that says something."""
    return [problem.check for problem in examine(observed, kinds=("run",)).problems]


def one(check: str, observed: Observations) -> Problem | None:
    """Returns what a single rule says, whatever other rules say."""
    examine(observed, checks=[])  # loads the rules
    rule = RULES[check]
    diagnosis: Diagnosis = examine(observed, checks=[rule.name])
    return diagnosis.problems[0] if diagnosis.problems else None
