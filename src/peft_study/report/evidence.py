"""A finding with its evidence, and the trials of a study that findings are made of."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peft_study.config import TRAINING_DIMENSIONS, Choices, Range, StudyConfig
from peft_study.report.results import Finalist, Results, Row
from peft_study.report.wording import Text, joined, setting
from peft_study.search.trials import StudyState, TrialRecord, value_of
from peft_study.statistics import Estimate
from peft_study.storage.files import finite

BIN = 5
"""Trials in a bin of a range's values: Student's interval of fewer is very wide."""
MOST_BINS = 10


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a study says.

    Attributes:
        topic: what it is about: one of `findings.TOPICS`.
        method: which it is about; None: the study.
        text: a sentence in each language, by ``en`` and ``zh``.
        trials: names of the trials behind it.
        values: the same as plain values; losses in nats a supervised token, an interval as value, low, high.
    """

    topic: str
    method: str | None
    text: Text
    trials: tuple[str, ...]
    values: dict[str, Any]


def plain(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Returns findings as JSON values, with None for what is no finite number."""
    values: list[dict[str, Any]] = finite([asdict(finding) for finding in findings])
    return values


def numbers(estimate: Estimate | None) -> dict[str, float] | None:
    """Returns an estimate as plain values."""
    return None if estimate is None else asdict(estimate)


def names(trials: Iterable[TrialRecord]) -> tuple[str, ...]:
    """Returns the names of trials."""
    return tuple(trial.name for trial in trials)


def searched(results: Results, method: str) -> list[Row]:
    """Returns the trials of a method's search."""
    return [row for row in results.rows if row.trial.method == method and row.trial.kind == "search"]


def full_budget(state: StudyState, method: str) -> list[TrialRecord]:
    """Returns the trials of a method's search that ran to their end with a finite loss, least first."""
    ended = [t for t in state.of(method, "search") if t.last is not None and math.isfinite(value_of(t))]
    return sorted(ended, key=value_of)


def diverged(trial: TrialRecord) -> bool:
    """Returns whether a trial diverged, or ended with a loss that is no finite number."""
    return trial.status == "diverged" or (trial.last is not None and not math.isfinite(value_of(trial)))


def best_finals(results: Results) -> dict[str, Finalist]:
    """Returns the best final of each method, the winner first, then those that are ranked.

    Those without a finite loss are left out.
    """
    found: dict[str, Finalist] = {}
    for final in results.winner_first:
        if final.dev is not None and math.isfinite(final.dev.value) and not final.failed:
            found.setdefault(final.method, final)
    return found


def at(trial: TrialRecord, name: str) -> float | str | bool:
    """Returns the value that a trial had for a setting; a list of names as one text."""
    own = trial.settings.training if name in TRAINING_DIMENSIONS else trial.settings.method
    value = getattr(own, name, None)
    if isinstance(value, (bool, int, float, str)):
        return value
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else json.dumps(value)


def label(settings: dict[str, Any], config: StudyConfig, method: str) -> Text:
    """Returns what was searched with its values, named as in the study file."""
    own = list(config.methods[method].dimensions()) or ["learning_rate"]
    return joined((setting(name, settings.get(name)) for name in own), "comma")


def positions(
    trials: Sequence[TrialRecord], name: str, dimension: Range | Choices, *, bins: bool
) -> list[list[TrialRecord]]:
    """Returns trials by their value of a setting, in the order of the values (of a list without numbers, the list's).

    Args:
        trials: any.
        name, dimension: the setting, and what was searched of it.
        bins: put neighbouring values of a range together, about `BIN` trials in a bin.
    """
    groups: dict[Any, list[TrialRecord]] = {}
    for trial in trials:
        groups.setdefault(at(trial, name), []).append(trial)
    if isinstance(dimension, Choices) and not dimension.sorted_numbers:
        order = [", ".join(map(str, c)) if isinstance(c, (list, tuple)) else c for c in dimension.choices]
        return [groups[v] for v in sorted(groups, key=lambda v: order.index(v) if v in order else len(order))]
    # a trial of an earlier space may have no number there
    ordered = [groups[value] for value in sorted(value for value in groups if not isinstance(value, str))]
    if isinstance(dimension, Choices) or not bins or len(ordered) < 2 * BIN:
        return ordered
    flat = [trial for group in ordered for trial in group]
    count = min(MOST_BINS, len(flat) // BIN)
    ends = [round(len(flat) * number / count) for number in range(count + 1)]
    return [flat[begin:end] for begin, end in itertools.pairwise(ends)]
