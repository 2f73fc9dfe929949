"""Two studies side by side: how far apart their best settings are, where both were measured on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from peft_study.report.charts import PairedDifference
from peft_study.report.evidence import best_finals
from peft_study.report.results import Finalist
from peft_study.report.view import StudyView
from peft_study.statistics import Losses, seeds_difference


@dataclass(frozen=True, slots=True)
class StudyPair:
    """Two studies.

    Attributes:
        first, second: their names.
        part: that was compared, and its `rows`.
        differences: first minus second, of each method's best final and of the winners.
        why: where there are none, the key of the reason.
    """

    first: str
    second: str
    part: Literal["test", "dev"]
    rows: int
    differences: tuple[PairedDifference, ...]
    why: str | None


def pair(first: StudyView, second: StudyView, names: Sequence[str]) -> StudyPair:
    """Compares two studies on the test rows where both opened the same, else on the dev rows."""
    own = [view.environment.get("data", {}) for view in (first, second)]
    why = "why_unknown"
    for part, digest in (("test", "test_digest"), ("dev", "held_out_digest")):
        digests = [data.get(digest) for data in own]
        if None in digests:
            continue
        why = "why_rows"
        if digests[0] == digests[1]:
            why = "why_finals"
            if found := _differences(first, second, test=part == "test"):
                rows = len(_counts(first, test=part == "test"))
                return StudyPair(names[0], names[1], "test" if part == "test" else "dev", rows, found, None)
    return StudyPair(names[0], names[1], "dev", 0, (), why)


def _differences(first: StudyView, second: StudyView, *, test: bool) -> tuple[PairedDifference, ...]:
    if first.results is None or second.results is None:
        return ()
    counts_N = _counts(first, test=test)
    others_N = _counts(second, test=test)
    if len(counts_N) != len(others_N) or counts_N.sum() != others_N.sum():
        return ()
    best = [best_finals(view.results) for view in (first, second) if view.results is not None]
    both = [(method, best[0][method], best[1][method]) for method in best[0] if method in best[1]]
    winners = [next((f for f in found.values() if f.winner), None) for found in best]
    if winners[0] is not None and winners[1] is not None and winners[0].method != winners[1].method:
        both.append((f"{winners[0].method} / {winners[1].method}", winners[0], winners[1]))
    found = []
    for label, one, other in both:
        one_SN, other_SN = _losses(first, one, test=test), _losses(second, other, test=test)
        if one_SN is not None and other_SN is not None:
            found.append(PairedDifference(label, one.method, seeds_difference(one_SN, other_SN, counts_N)))
    return tuple(found)


def _counts(view: StudyView, *, test: bool) -> Any:
    assert view.record.examples is not None
    return view.record.examples.test_counts_N if test else view.record.examples.counts_N


def _losses(view: StudyView, final: Finalist, *, test: bool) -> Losses | None:
    """Returns a final's losses, seed by example; None where one of its seeds has none."""
    state = view.record.state
    trials = state.finals_of(final.method, final.number)
    sums = [state.test.get(trial.name) if test else trial.last for trial in trials]
    there = [each for each in sums if each is not None]
    return np.stack(there) if there and len(there) == len(sums) else None
