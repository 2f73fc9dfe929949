"""What each method costs, and which methods no other one beats in both quality and cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_study.config import StudyConfig
from peft_study.report.evidence import Finding, best_finals, full_budget, names
from peft_study.report.results import Results
from peft_study.report.wording import Text, joined, listed, same, say, title
from peft_study.search.trials import StudyState
from peft_study.statistics import size_text

MEASURES = {"trainable": False, "adapter_bytes": False, "peak_bytes": False, "tokens_per_second": True}
"""Costs that quality is set against: name -> more is better."""


def cost(state: StudyState, results: Results, costs: Mapping[str, Any], method: str) -> list[Finding]:
    """Returns what a method costs: what was measured at the end of the study, else what its trials tell.

    Args:
        state, results: of the study.
        costs: `MethodCost` by method, of ``cost.json``; none where the study has not ended.
        method: of the file.
    """
    measured, facts = costs.get(method), _facts(state, results, method)
    values: dict[str, Any] = dict.fromkeys(
        ("setting", "adapter_bytes", "peak_bytes", "tokens_per_second", "row_tokens")
    )
    values |= {"trainable": facts.get("trainable"), "data_tokens": results.tokens[method]}
    if measured is not None:
        values |= {name: getattr(measured, name) for name in (*MEASURES, "setting", "row_tokens")}
    parts: list[Text] = []
    if values["trainable"] is not None:
        parts.append(say("trainable", n=values["trainable"]))
    parts += [say(n, size=same(size_text(values[n]))) for n in ("adapter_bytes", "peak_bytes") if values[n] is not None]
    if values["tokens_per_second"] is not None:
        parts.append(say("tokens_per_second", speed=values["tokens_per_second"], n=values["row_tokens"]))
    parts.append(say("data_tokens", n=values["data_tokens"]))
    trained = [trial for trial in state.trials.values() if trial.method == method]
    return [
        Finding("cost", method, say("cost", method=title(method), parts=joined(parts, "comma")), names(trained), values)
    ]


def _facts(state: StudyState, results: Results, method: str) -> dict[str, Any]:
    """Returns what the best final's search trial measured, or else the best of the search, or any that ended."""
    final, full = best_finals(results).get(method), full_budget(state, method)
    if final is not None:
        return state.setting(method, final.number).facts
    ended = [trial for trial in state.of(method, "search") if trial.facts.get("trainable") is not None]
    return full[0].facts if full else ended[0].facts if ended else {}


def pareto(config: StudyConfig, state: StudyState, results: Results, costs: Mapping[str, Any]) -> list[Finding]:
    """Returns for each cost which methods are on the front of mean loss of the best final and that cost.

    A method is dominated where another has no higher loss at no higher cost, and one of the two is lower; losses count
    as they were measured, told apart or not.
    """
    best = best_finals(results)
    on_test = bool(best) and all(final.test is not None for final in best.values())
    found = []
    for measure, more_is_better in MEASURES.items():
        points: dict[str, tuple[float, float]] = {}
        for method in config.searched:
            if method not in best:
                continue
            loss = best[method].test if on_test else best[method].dev
            price = cost(state, results, costs, method)[0].values[measure]
            if loss is not None and price is not None:
                points[method] = loss.value, -price if more_is_better else price
        if len(points) > 1:
            found.append(_front(state, best, points, measure, "test" if on_test else "dev"))
    return found


def _front(
    state: StudyState, best: Mapping[str, Any], points: Mapping[str, tuple[float, float]], measure: str, part: str
) -> Finding:
    beaten = {}
    for method, (loss, price) in points.items():
        better = [
            other
            for other, (its_loss, its_price) in points.items()
            if its_loss <= loss and its_price <= price and (its_loss, its_price) != (loss, price)
        ]
        if better:
            beaten[method] = min(better, key=lambda other: points[other][0])
    front = [method for method in points if method not in beaten]
    said = [say("dominated", method=title(method), by=title(by)) for method, by in beaten.items()]
    text = say(
        "pareto",
        part=say(part),
        cost=say(f"cost_{measure}"),
        front=say("on_front", n=len(front), methods=listed([title(method) for method in front])),
        dominated=joined(said, "nothing"),
    )
    trials = [t for method in points for t in state.finals_of(method, best[method].number)]
    shown = {method: {"loss": loss, "cost": abs(price)} for method, (loss, price) in points.items()}
    values = {"part": part, "cost": measure, "points": shown, "front": front, "dominated": beaten}
    return Finding("pareto", None, text, names(trials), values)
