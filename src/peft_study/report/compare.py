"""Two trials of one study against each other, on the same held-out examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_study.errors import ConfigError
from peft_study.report.results import settings_of
from peft_study.report.study_reader import StudyRecord
from peft_study.search.trials import TrialRecord
from peft_study.statistics import Estimate, Losses, mean_over_seeds, seeds_difference


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two.

    Attributes:
        name: as it was asked for.
        seeds: that are compared: one trial, or a finalist's; 0 for the untouched base.
        dev, test: losses, nats a token; test is None where it was not opened or measured.
    """

    name: str
    seeds: int
    dev: Estimate
    test: Estimate | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two trials differ in.

    Attributes:
        first, second: the two.
        dev, test: how far the first's loss is above the second's, paired by example.
        settings: those that differ: name -> (first's, second's); None where a method has no such setting.
        notes: limits of the comparison.
    """

    first: Side
    second: Side
    dev: Estimate
    test: Estimate | None
    settings: dict[str, tuple[Any, Any]]
    notes: tuple[str, ...]


def compare(study: StudyRecord, first: TrialRecord, second: TrialRecord) -> Comparison:
    """Compares two trials.

    Settings of the search that were both retrained are compared as means over the finals' seeds; else the two trials
    themselves are. The untouched base has no seed and can be compared with either.

    Raises:
        ConfigError: when one of them has no value, or both are the same.
    """
    if first is second:
        raise ConfigError(f"both arguments name {first.name}", remedy="give two trials")
    examples = study.examples
    assert examples is not None
    pair = (first, second)
    finals = [_retrained(study, trial) for trial in pair]
    over_seeds = all(found or trial.kind == "reference" for found, trial in zip(finals, pair, strict=True))
    chosen = [found if over_seeds and found else [trial] for found, trial in zip(finals, pair, strict=True)]
    notes = [
        f"{trial.name} was retrained with new seeds, {other.name} was not: the trials of the search are compared"
        for trial, other, found in ((first, second, finals[0]), (second, first, finals[1]))
        if not over_seeds and found and other.kind == "search"
    ]
    dev = [np.stack([_value(study, trial) for trial in trials]) for trials in chosen]
    tests = [_test(study, trials) for trials in chosen]
    sides = [
        Side(
            trial.name,
            0 if trial.kind == "reference" else len(dev_SN),
            mean_over_seeds(dev_SN, examples.counts_N),
            None if test_SN is None else mean_over_seeds(test_SN, examples.test_counts_N),
        )
        for trial, dev_SN, test_SN in zip(pair, dev, tests, strict=True)
    ]
    one, other = settings_of(first), settings_of(second)
    return Comparison(
        sides[0],
        sides[1],
        seeds_difference(dev[0], dev[1], examples.counts_N),
        None if tests[0] is None or tests[1] is None else seeds_difference(tests[0], tests[1], examples.test_counts_N),
        {name: (one.get(name), other.get(name)) for name in {**one, **other} if one.get(name) != other.get(name)},
        (*notes, *_about_seeds(chosen)),
    )


def sentences(found: Comparison) -> list[str]:
    """Returns the result of a comparison in sentences."""
    parts = (("dev", found.dev), ("test", found.test))
    return [*(_verdict(found, above, part) for part, above in parts if above is not None), *found.notes]


def _verdict(found: Comparison, above: Estimate, part: str) -> str:
    first, second = ("the untouched base" if s.name == "none" else s.name for s in (found.first, found.second))
    if not above.excludes_zero():
        return f"on the {part} part {first} and {second} cannot be told apart ({above} nats a token)"
    better, worse = (first, second) if above.value < 0 else (second, first)
    low, high = sorted((abs(above.low), abs(above.high)))
    by = f"{abs(above.value):.3f} [{low:.3f}, {high:.3f}] nats a token"
    return f"on the {part} part {better} is better than {worse} by {by}"


def _retrained(study: StudyRecord, trial: TrialRecord) -> list[TrialRecord]:
    """Returns a searched setting's finals where all of them have ended; else nothing.

    Raises:
        ConfigError: when one of them did not finish: the mean over the others would be too good.
    """
    if trial.kind != "search" or trial.number not in study.state.finalists.get(trial.method, ()):
        return []
    finals = study.state.finals_of(trial.method, trial.number)
    if len(finals) < study.config.finals.seeds or any(t.status in ("running", "interrupted") for t in finals):
        return []
    lost = [t for t in finals if t.last is None]
    if lost:
        raise ConfigError(
            f"{trial.name}: {len(lost)} of its {len(finals)} seeds did not finish ({lost[0].name}: {lost[0].reason})",
            remedy="compare single seeds by their names",
        )
    return finals


def _value(study: StudyRecord, trial: TrialRecord) -> Losses:
    if trial.kind == "reference":
        assert study.examples is not None
        return study.examples.base_N
    if trial.last is None:
        what = {"running": "is still running", "interrupted": "was interrupted"}.get(trial.status, f"{trial.status}")
        verb = "" if what.startswith(("is", "was", "diverged", "failed")) else "was "
        reason = f" ({trial.reason})" if trial.reason else ""
        raise ConfigError(f"{trial.name} {verb}{what}{reason}, so it has no final loss", remedy="give a finished trial")
    return trial.last


def _test(study: StudyRecord, trials: list[TrialRecord]) -> npt.NDArray[np.float64] | None:
    sums = [study.state.test[t.name] for t in trials if t.name in study.state.test]
    return np.stack(sums) if len(sums) == len(trials) else None


def _about_seeds(chosen: list[list[TrialRecord]]) -> list[str]:
    trained = [trials for trials in chosen if trials[0].kind != "reference"]
    if any(len(trials) > 1 for trials in trained):
        return []
    seeds = [trials[0].seed for trials in trained]
    if len(set(seeds)) > 1:
        return [
            f"one seed each, and not the same (seeds {seeds[0]} and {seeds[1]}): part of the difference is from that"
        ]
    return [f"one seed each (seed {seeds[0]}): the interval is over examples only, another seed may reverse the result"]
