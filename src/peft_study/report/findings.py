"""The findings of a study, each with its noise, its seeds, its limits and the trials behind it.

Two settings are told apart only where the 95 % interval of their difference, paired by held-out example, excludes zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft_study.config import Range, StudyConfig
from peft_study.report import setting_findings
from peft_study.report.cost_findings import cost, pareto
from peft_study.report.evidence import (
    Finding,
    best_finals,
    diverged,
    full_budget,
    label,
    names,
    numbers,
    plain,
    searched,
)
from peft_study.report.limit_findings import limits, untested
from peft_study.report.responses import Response, responses
from peft_study.report.results import Finalist, Results, Row
from peft_study.report.wording import (
    LANGUAGES,
    Text,
    interval,
    joined,
    listed,
    same,
    say,
    setting,
    title,
    with_interval,
)
from peft_study.search.trials import Recommendation, StudyState, TrialRecord
from peft_study.statistics import Estimate
from peft_study.storage.held_out import HeldOut

__all__ = ["LANGUAGES", "MAIN", "TOPICS", "Finding", "find", "plain", "recommendation", "texts"]

MAIN = (
    "base",
    "search",
    "final",
    "recommendation",
    "range",
    "edge",
    "never_learned",
    "diverged",
    "cost",
    "winner",
    "ranking",
    "pruning",
    "limits",
)
"""Topics that a study ends with on the terminal; all of them are in findings.json and the report."""
TOPICS = (*MAIN, "sensitivity", "pareto", "untested")


def find(
    config: StudyConfig,
    state: StudyState,
    examples: HeldOut,
    results: Results,
    costs: Mapping[str, Any],
    curves: Sequence[Response] | None = None,
) -> tuple[Finding, ...]:
    """Returns what a study has found so far.

    Args:
        config: filled.
        state: its trials.
        examples: held out.
        results: of these (`collect`).
        costs: what each method costs (`report.costs`); empty where it was not measured.
        curves: of `responses`, where the caller has them.
    """
    found = [_base(state, results)]
    curves = responses(config, state, examples) if curves is None else curves
    for method in results.methods:
        found += _search(config, state, results, method)
        found += _finals(config, state, results, method)
        if method in state.recommended:
            found.append(recommendation(method, state))
        found += setting_findings.ranges(config, state, examples, method)
        found += setting_findings.edges(config, state, results, method)
        found += setting_findings.sensitivity(config, curves, state, method)
        found += setting_findings.never_learned(config, results, method)
        found += setting_findings.divergence(config, results, method)
        found += cost(state, results, costs, method)
        found += untested(config, method)
    found += pareto(config, state, results, costs)
    found += _order(config, state, results)
    if results.pruning.pruned or results.pruning.audited:
        found.append(_pruning(config, state, results))
    return (*found, *untested(config, None), *limits(config, state, examples, results))


def texts(findings: Iterable[Finding], language: str = "en", topics: Sequence[str] = MAIN) -> list[str]:
    """Returns the sentences of findings on some topics, in one of `LANGUAGES`."""
    return [finding.text[language] for finding in findings if finding.topic in topics]


def _base(state: StudyState, results: Results) -> Finding:
    loss = results.base_dev
    text = say(
        "base", loss=f"{loss.value:.3f}", interval=interval(loss), examples=say("examples", n=results.dev_examples)
    )
    values = {
        "dev": numbers(loss),
        "test": numbers(results.base_test),
        "dev_examples": results.dev_examples,
        "test_examples": results.test_examples,
    }
    return Finding("base", None, text, names(t for t in state.trials.values() if t.kind == "reference"), values)


def _search(config: StudyConfig, state: StudyState, results: Results, method: str) -> list[Finding]:
    """Returns the best setting of a method's search, what did not end, and how its ranges and budget were changed."""
    own, full = searched(results, method), full_budget(state, method)
    trials = names(row.trial for row in own)
    counts: dict[str, int] = {}
    for row in own:
        counts[row.trial.status] = counts.get(row.trial.status, 0) + 1
    values: dict[str, Any] = {"tried": len(own), "statuses": counts}
    if not full:
        found = [Finding("search", method, _no_search(own, method), trials, values)]
    else:
        best = next(row for row in own if row.trial.name == full[0].name)
        values |= {
            "best": best.trial.name,
            "settings": best.settings,
            "dev": numbers(best.dev),
            "minus_base": numbers(best.minus_base),
            "untuned": state.untuned(method, config),
        }
        found = [Finding("search", method, _best(config, results, own, best, values), trials, values)]
    for name, (low, high) in state.bounds.get(method, {}).items():
        dimension = config.methods[method].dimensions().get(name)
        if not isinstance(dimension, Range):
            continue
        ends = {"low": low, "high": high, "before_low": dimension.low, "before_high": dimension.high}
        key = "moved" if low < dimension.low or high > dimension.high else "cut"
        text = say(key, method=title(method), name=name, **{end: same(float(value)) for end, value in ends.items()})
        found.append(Finding("search", method, text, trials, {"setting": name, **ends}))
    if state.settled(method, config):
        known = {"within": state.recommended[method].within, "stop": config.search.stop}
        found.append(Finding("search", method, say("settled", method=title(method)), trials, known))
    return found


def _no_search(own: Sequence[Row], method: str) -> Text:
    if not own:
        return say("search_none", method=title(method))
    reasons = [row.trial.reason for row in own if row.trial.reason]
    if reasons:
        why = say("reason", reason=reasons[0])
    else:
        why = say("not_finite") if any(diverged(row.trial) for row in own) else say("under_way")
    return say("search_lost", method=title(method), n=len(own), reason=why)


def _best(config: StudyConfig, results: Results, own: Sequence[Row], best: Row, values: Mapping[str, Any]) -> Text:
    assert best.dev is not None
    assert best.minus_base is not None
    more = []
    if best.minus_base.low > 0:
        more.append(say("best_is_worse"))
    elif not best.minus_base.excludes_zero():
        more.append(say("best_is_alike"))
    if values["untuned"]:
        more.append(say("untuned"))
    more += _unfinished(config, own, best.trial.method)
    rank = say("only_setting") if len(own) == 1 else say("best_of", settings=say("settings", n=len(own)))
    return say(
        "search",
        method=title(best.trial.method),
        setting=label(best.settings, config, best.trial.method),
        rank=rank,
        loss=f"{best.dev.value:.3f}",
        interval=interval(best.dev),
        examples=say("examples", n=results.dev_examples),
        more=joined(more, "nothing"),
    )


def _unfinished(config: StudyConfig, own: Sequence[Row], method: str) -> list[Text]:
    """Returns what was stopped early and what failed; what diverged is a finding of its own."""
    bare = list(config.methods[method].dimensions()) == ["learning_rate"]
    said = []
    for key, status in (("stopped_early", "pruned"), ("failed", "failed")):
        members = [row for row in own if row.trial.status == status and not diverged(row.trial)]
        if members:
            few = bare and len(members) <= setting_findings.FEW
            rates = [same(row.settings["learning_rate"]) for row in members]
            said.append(say(key, n=len(members), which=listed(rates) if few else say("others", n=len(members))))
    return said


def _finals(config: StudyConfig, state: StudyState, results: Results, method: str) -> list[Finding]:
    own = [final for final in results.finalists if final.method == method]
    best = best_finals(results).get(method) or (own[0] if own else None)
    if best is None:
        return []
    trials = state.finals_of(method, best.number)
    values = {
        "setting": best.name,
        "settings": best.settings,
        "dev": numbers(best.dev),
        "dev_of_seeds": list(best.dev_of_seeds),
        "failed": best.failed,
        "test": numbers(best.test),
        "test_minus_base": numbers(best.test_minus_base),
    }
    return [Finding("final", method, _final_text(best, trials), names(trials), values)]


def _final_text(best: Finalist, trials: Sequence[TrialRecord]) -> Text:
    seeds, method = len(best.dev_of_seeds), title(best.method)
    if best.failed:
        return say("final_lost", method=method, n=best.failed, seeds=seeds + best.failed)
    if best.dev is None or any(trial.status in ("running", "interrupted") for trial in trials):
        return say("final_pending", method=method)
    if not math.isfinite(best.dev.value):
        return say("final_not_finite", method=method, seeds=say("new_seeds", n=seeds))
    spread = test = say("nothing")
    if seeds > 1:
        spread = say("by_seed", low=f"{min(best.dev_of_seeds):.3f}", high=f"{max(best.dev_of_seeds):.3f}")
    if best.test is not None and best.test_minus_base is not None:
        test = say("test_loss", test=with_interval(best.test), against=_against_base(best.test_minus_base))
    seeds_text = say("new_seeds", n=seeds)
    return say("final", method=method, seeds=seeds_text, dev=with_interval(best.dev), spread=spread, test=test)


def _against_base(above: Estimate) -> Text:
    if not above.excludes_zero():
        return say("like_base", by=f"{above.value:+.3f}", interval=interval(above, "+.3f"))
    low, high = sorted((abs(above.low), abs(above.high)))
    by = Estimate(abs(above.value), low, high)
    return say("below_base" if above.value < 0 else "above_base", by=f"{by.value:.3f}", interval=interval(by))


def recommendation(method: str, state: StudyState) -> Finding:
    """Returns the setting that the model of a method's losses recommends, and how well it is known."""
    known: Recommendation = state.recommended[method]
    said = []
    for name, value in known.values.items():
        text = setting(name, value)
        if name == "learning_rate" and known.rates is not None and known.rates[0] < known.rates[1]:
            text = say("rates", setting=text, low=same(known.rates[0]), high=same(known.rates[1]))
        said.append(text)
    within = say("within", within=f"{known.within:.2g}") if known.within > 0 else say("within_nothing")
    text = say("recommendation", method=title(method), settings=joined(said, "comma"), within=within)
    values = {"settings": known.values, "rates": None if known.rates is None else list(known.rates)}
    trials = [trial for trial in state.of(method, "search") if trial.sums]
    return Finding("recommendation", method, text, names(trials), {**values, "within": known.within})


def _order(config: StudyConfig, state: StudyState, results: Results) -> list[Finding]:
    """Returns the winner, and the ranking in groups that cannot be told apart."""
    found = []
    if results.finalists:
        found.append(_winner(config, state, results))
    if sum(len(group) for group in results.groups) > 1:
        ranked = [final for group in results.groups for final in group]
        trials = [trial for final in ranked for trial in state.finals_of(final.method, final.number)]
        values = {
            "part": _part(results),
            "groups": [[final.name for final in group] for group in results.groups],
            "smallest": None if results.smallest is None else list(results.smallest),
            "examples": results.test_examples if results.on_test else results.dev_examples,
        }
        found.append(Finding("ranking", None, _ranking(results), names(trials), values))
    return found


def _winner(config: StudyConfig, state: StudyState, results: Results) -> Finding:
    winner = next((final for final in results.finalists if final.winner), None)
    finals = [t for method in results.methods for t in state.of(method, "final")]
    if winner is None:
        return Finding("winner", None, say("no_winner"), names(finals), {"winner": None})
    seeds, more = len(winner.dev_of_seeds), []
    group = next((group for group in results.groups if winner in group), ())
    close = list(dict.fromkeys(final.method for final in group if final.method != winner.method))
    if seeds < 3:
        more.append(say("lead"))
    if close:
        methods = listed([title(method) for method in close])
        more.append(say("close", part=say(_part(results)), methods=methods))
    if winner.test_minus_base is not None and winner.test_minus_base.low > 0:
        more.append(say("winner_is_worse"))
    text = say(
        "winner",
        by=say("by_loss") if results.winner_by is None else say("by_task", task=results.winner_by),
        seeds=say("new_seeds", n=seeds),
        method=title(winner.method),
        setting=label(winner.settings, config, winner.method),
        more=joined(more, "nothing"),
    )
    values = {
        "winner": winner.name,
        "task": results.winner_by,
        "settings": winner.settings,
        "seeds": seeds,
        "dev": numbers(winner.dev),
        "alike": close,
    }
    return Finding("winner", winner.method, text, names(finals), values)


def _part(results: Results) -> str:
    return "test" if results.on_test else "dev"


def _ranking(results: Results) -> Text:
    groups = []
    for group in results.groups:
        methods = listed([_final_name(final, results) for final in group])
        groups.append(say("alike", methods=methods) if len(group) > 1 else methods)
    smallest = say("nothing")
    if results.smallest is not None:
        count = results.test_examples if results.on_test else results.dev_examples
        now, later = (f"{value:.2g}" for value in results.smallest)
        smallest = say("smallest", examples=say("examples", n=count), now=now, more=4 * count, later=later)
    return say("ranking", part=say(_part(results)), groups=joined(groups, "then"), smallest=smallest)


def _final_name(final: Finalist, results: Results) -> Text:
    several = sum(other.method == final.method for group in results.groups for other in group) > 1
    return same(final.name) if several else title(final.method)


def _pruning(config: StudyConfig, state: StudyState, results: Results) -> Finding:
    pruning = results.pruning
    more = say("unchecked")
    if pruning.audited:
        wrong = say("wrong_some", n=pruning.wrong, all=pruning.audited) if pruning.wrong else say("wrong_none")
        more = say("audited", n=pruning.audited, wrong=wrong)
    trials = [t for m in config.searched for t in state.of(m, "search") if t.status == "pruned" or t.audited]
    values = {"pruned": pruning.pruned, "audited": pruning.audited, "wrong": pruning.wrong}
    return Finding("pruning", None, say("pruning", n=pruning.pruned, more=more), names(trials), values)
