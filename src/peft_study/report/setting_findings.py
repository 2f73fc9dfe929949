"""What a method's settings do: which are as good as the best, which matter, lie at an edge, do not learn or diverge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_study.config import Choices, Range, StudyConfig
from peft_study.report.evidence import (
    Finding,
    at,
    best_finals,
    diverged,
    full_budget,
    names,
    numbers,
    positions,
    searched,
)
from peft_study.report.responses import IMPORTANCE_FROM, Response
from peft_study.report.results import Results, Row
from peft_study.report.wording import Text, interval, joined, listed, same, say, title
from peft_study.search import range_expansion
from peft_study.search.trials import StudyState, TrialRecord
from peft_study.statistics import Estimate, difference
from peft_study.storage.held_out import HeldOut

FEW = 6
"""Values that a sentence lists one by one; of more it gives the ends."""


def ranges(config: StudyConfig, state: StudyState, examples: HeldOut, method: str) -> list[Finding]:
    """Returns which values of each setting are as good as the best within noise.

    A value is judged by the best trial that ran to its end there. It counts where the 95 % interval of the difference
    from the method's best, paired by example, holds zero, and so does every value between: a value at which trials were
    only stopped or diverged parts them.
    """
    dimensions, full = config.methods[method].dimensions(), full_budget(state, method)
    if not dimensions or not full or len(state.of(method, "search")) < 2 or len(examples.counts_N) < 2:
        return []
    if len(full) < 2:
        return [Finding("range", method, say("range_unknown", method=title(method)), names(full), {"full": 1})]
    alone = len(dimensions) == 1
    parts, values, behind = list[Text](), {}, dict[str, None]()
    for name, dimension in dimensions.items():
        groups = positions(full, name, dimension, bins=not alone)
        good = _as_good(groups, full[0], examples)
        if isinstance(dimension, Range) or dimension.sorted_numbers:
            lost = [at(t, name) for t in state.of(method, "search") if t.status == "pruned" or diverged(t)]
            parting = alone or isinstance(dimension, Choices)
            good = _around(groups, good, full[0], name, lost if parting else [])
        kept = [group for group, is_good in zip(groups, good, strict=True) if is_good]
        there = [trial for group in kept for trial in group]
        if not there:  # the best is of an earlier space
            continue
        tried = list(dict.fromkeys(at(trial, name) for trial in there))
        parts.append(_range_part(name, dimension, tried, len(there)))
        values[name] = {"low": tried[0], "high": tried[-1], "values": tried, "trials": len(there)}
        behind |= dict.fromkeys(names(there))
    others = say("range_others") if not alone else say("nothing")
    text = say("range", method=title(method), ranges=joined(parts), trials=say("trials", n=len(full)), others=others)
    return [Finding("range", method, text, tuple(behind), {"full": len(full), "settings": values})] if parts else []


def _as_good(groups: Sequence[Sequence[TrialRecord]], best: TrialRecord, examples: HeldOut) -> list[bool]:
    assert best.last is not None
    found = []
    for group in groups:
        own = min(group, key=lambda trial: (trial is not best, trial.last is None or trial.last.sum()))
        assert own.last is not None
        found.append(not difference(own.last, best.last, examples.counts_N).excludes_zero())
    return found


def _around(
    groups: Sequence[Sequence[TrialRecord]], good: Sequence[bool], best: TrialRecord, name: str, lost: Sequence[Any]
) -> list[bool]:
    """Returns which values are as good without a break from the best's; `lost`: values at which trials did not end."""
    middle = next((place for place, group in enumerate(groups) if any(trial is best for trial in group)), None)
    kept = [False] * len(groups)
    if middle is None:
        return kept
    kept[middle] = True
    for step in (1, -1):
        place = middle + step
        while 0 <= place < len(groups) and good[place]:
            left, right = sorted((place, place - step))
            low: Any = at(groups[left][-1], name)
            high: Any = at(groups[right][0], name)
            if any(low < value < high for value in lost):
                break
            kept[place] = True
            place += step
    return kept


def _range_part(name: str, dimension: Range | Choices, tried: Sequence[Any], trials: int) -> Text:
    if len(tried) == 1:
        values = say("only", value=same(tried[0]))
    elif isinstance(dimension, Range) or len(tried) > FEW:
        values = say("from_to", low=same(tried[0]), high=same(tried[-1]))
    else:
        values = listed([same(value) for value in tried])
    return say("range_part", values=say("at", name=name, values=values), trials=say("trials", n=trials))


def sensitivity(config: StudyConfig, curves: Sequence[Response], state: StudyState, method: str) -> list[Finding]:
    """Returns how the mean dev loss answers to each setting, and how important each is, where enough trials tell."""
    found = []
    own = [curve for curve in curves if curve.method == method]
    for curve in own:
        if len(curve.points) < 2:
            continue
        best, worst = (chosen(curve.points, key=lambda point: point.loss.value) for chosen in (min, max))
        said: dict[str, Any] = {}
        for which, point in (("best", best), ("worst", worst)):
            said[which] = (
                same(point.low)
                if point.low == point.high
                else say("from_to", low=same(point.low), high=same(point.high))
            )
            value, trials = f"{point.loss.value:.3f}", say("trials", n=len(point.trials))
            said[f"{which}_loss"] = say("mean_of", value=value, interval=interval(point.loss), trials=trials)
        importance = say("nothing")
        if (share := curve.importance) is not None:
            in_percent = Estimate(100 * share.value, 100 * share.low, 100 * share.high)
            importance = say("importance", share=f"{in_percent.value:.0f}", interval=interval(in_percent, ".0f"))
        others = say("others_vary") if len(own) > 1 else say("nothing")
        text = say(
            "sensitivity", method=title(method), name=curve.setting, others=others, importance=importance, **said
        )
        points = [{"value": p.value, "low": p.low, "high": p.high, "loss": numbers(p.loss)} for p in curve.points]
        values = {"setting": curve.setting, "points": points, "importance": numbers(curve.importance)}
        found.append(Finding("sensitivity", method, text, tuple(n for p in curve.points for n in p.trials), values))
    full = full_budget(state, method)
    if full and len(own) > 1 and len(full) < IMPORTANCE_FROM:
        text = say("no_importance", method=title(method), n=len(full), least=IMPORTANCE_FROM)
        found.append(Finding("sensitivity", method, text, names(full), {"full": len(full), "least": IMPORTANCE_FROM}))
    return found


def edges(config: StudyConfig, state: StudyState, results: Results, method: str) -> list[Finding]:
    """Returns which values of the method's best final, or else of its search's best, lie at the end of their range."""
    final = best_finals(results).get(method)
    full = full_budget(state, method)
    if len(state.of(method, "search")) < 2 or (final is None and not full):
        return []
    best = full[0] if final is None else state.setting(method, final.number)
    at_edge = range_expansion.edges(best.values, config.methods[method], state.bounds.get(method, {}))
    return [
        Finding(
            "edge",
            method,
            say(f"edge_{edge}", method=title(method), name=name, value=same(best.values[name])),
            names([best]),
            {"setting": name, "value": best.values[name], "edge": edge},
        )
        for name, edge in at_edge.items()
    ]


def never_learned(config: StudyConfig, results: Results, method: str) -> list[Finding]:
    """Returns the trials that ran to their end no better than the untouched base, and at which values."""
    full = [row for row in searched(results, method) if row.trial.last is not None and not diverged(row.trial)]
    idle = [row for row in full if row.minus_base is not None and row.minus_base.high >= 0 and row.minus_base.bounded]
    if not idle:
        return []
    worse = sum(row.minus_base is not None and row.minus_base.low > 0 for row in idle)
    where, values = _where(config, method, idle)
    text = say(
        "never_learned",
        method=title(method),
        n=len(idle),
        settings=say("settings", n=len(full)),
        where=where,
        worse=say("worse_than_base", n=worse) if worse else say("nothing"),
    )
    values = {"settings": values, "count": len(idle), "worse": worse, "full": len(full)}
    return [Finding("never_learned", method, text, names(row.trial for row in idle), values)]


def divergence(config: StudyConfig, results: Results, method: str) -> list[Finding]:
    """Returns the trials of a method's search that diverged, and at which values."""
    own = searched(results, method)
    lost = [row for row in own if diverged(row.trial)]
    if not lost:
        return []
    where, values = _where(config, method, lost)
    text = say("diverged", method=title(method), n=len(lost), settings=say("settings", n=len(own)), where=where)
    values = {"settings": values, "count": len(lost), "tried": len(own)}
    return [Finding("diverged", method, text, names(row.trial for row in lost), values)]


def _where(config: StudyConfig, method: str, rows: Sequence[Row]) -> tuple[Text, dict[str, Any]]:
    """Returns the values of each searched setting that some trials had, in words and as lists."""
    parts, values = [], {}
    for name in config.methods[method].dimensions() or ("learning_rate",):
        tried = list(dict.fromkeys(at(row.trial, name) for row in rows))
        tried.sort(key=lambda value: (isinstance(value, str), value))
        if len(tried) <= FEW or isinstance(tried[-1], str):
            said = listed([same(value) for value in tried[:FEW]])
        else:
            said = say("from_to", low=same(tried[0]), high=same(tried[-1]))
        parts.append(say("at", name=name, values=said))
        values[name] = tried
    return joined(parts, "comma"), values
