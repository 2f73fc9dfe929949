"""Prints what an evaluation found: a table a task, best first, and what answers cost; they fit 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft_study.display.terminal import console, table
from peft_study.evaluation.scores import most_frequent
from peft_study.statistics import Estimate

if TYPE_CHECKING:
    from rich.table import Table

    from peft_study.evaluation.scores import EvaluationResult, Score


MOST_LETTERS = 24
"""Of a system's name in a table."""


def print_evaluation(found: EvaluationResult) -> None:
    """Prints scores and costs."""
    for scores in found.tables:
        task, source = scores[0].task, scores[0].source
        shown = _losses(scores) if scores[0].metric == "loss" else _accuracies(scores)
        shown.title = task if source is None else f"{task}, source {source}"
        console().print(shown)
    if found.costs:
        console().print(_costs(found))


def _accuracies(scores: Sequence[Score]) -> Table:
    by_length = any(score.normalised for score in scores)
    name = "right, %" if scores[0].metric == "accuracy" else "mean score, %"
    names = ["#", "system", name, "against the base", *(["by length"] if by_length else [])]
    shown = table(names, left=["system"])
    for score in scores:
        cells = [*_names(score), _percent(score.value, ".1f"), _percent(score.minus_base, "+.1f")]
        if by_length:
            cells.append("" if score.normalised is None else f"{100 * score.normalised.value:.1f}")
        shown.add_row(*cells)
    shown.caption = _judged(scores)
    return shown


def _names(score: Score) -> tuple[str, str]:
    return "" if score.group is None else str(score.group), _short(score.system)


def _short(system: str) -> str:
    """Returns a system's name as a table of 80 columns can hold it: its end tells it from the others."""
    return system if len(system) <= MOST_LETTERS else f"...{system[3 - MOST_LETTERS :]}"


def _percent(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return ""
    return Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high).text(form)


def _judged(scores: Sequence[Score]) -> str:
    judged = {score.judged for score in scores}
    numbers = f"{min(judged)}" if len(judged) == 1 else f"{min(judged)} to {max(judged)}"
    unjudged = max(score.unjudged for score in scores)
    more = f"; {unjudged} could not be judged" if unjudged else ""
    if (constant := most_frequent(scores)) is not None:
        more += f"; the most frequent answer every time: {100 * constant:.1f} %"
    return f"of {numbers} answers, 95 % intervals{more};\nwithin a #, no system differs significantly from the best"


def _losses(scores: Sequence[Score]) -> Table:
    shown = table(["#", "system", "loss", "against the base"], left=["system"])
    for score in scores:
        value, minus = score.value, score.minus_base
        shown.add_row(
            *_names(score), "" if value is None else value.text(".3f"), "" if minus is None else minus.text("+.3f")
        )
    unjudged = max(score.unjudged for score in scores)
    more = f"; {unjudged} have nothing to measure" if unjudged else ""
    unit = "word" if scores[0].task.startswith("lm_eval:") else "token"
    shown.caption = f"nats a {unit}, on {scores[0].judged} rows, 95 % intervals{more}"
    return shown


def _costs(found: EvaluationResult) -> Table:
    names = ["system", "prompt tokens", "first token", "tokens/s", "cache"]
    shown = table(names, left=["system"], title="an answer, alone")
    for system, cost in found.costs.items():
        shown.add_row(_short(system), *cost.cells)
    return shown
