"""Prints what an evaluation found: a table a task, best first, and what answers cost; they fit 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from peft_study.display.terminal import console, table

if TYPE_CHECKING:
    from rich.table import Table

    from peft_study.evaluation.evaluate import EvaluationResult
    from peft_study.evaluation.scores import Score


def print_evaluation(found: EvaluationResult) -> None:
    """Prints scores and costs."""
    for (task, source), group in groupby(found.scores, key=lambda score: (score.task, score.source)):
        scores = sorted(group, key=lambda score: (score.group or 0, _worst_last(score)))
        shown = _losses(scores) if scores[0].metric == "loss" else _accuracies(scores)
        shown.title = task if source is None else f"{task}, source {source}"
        console().print(shown)
    if found.costs:
        console().print(_costs(found))


def _worst_last(score: Score) -> float:
    if score.value is None:
        return float("inf")
    return score.value.value if score.metric == "loss" else -score.value.value


def _accuracies(scores: Sequence[Score]) -> Table:
    by_length = any(score.normalised for score in scores)
    names = ["group", "system", "right", "95 %", "against the base", *(["by length"] if by_length else [])]
    shown = table(names, left=["system"])
    for score in scores:
        value, minus = score.value, score.minus_base
        cells = [
            "" if score.group is None else str(score.group),
            score.system,
            "" if value is None else f"{100 * value.value:.1f} %",
            "" if value is None else f"{100 * value.low:.1f} to {100 * value.high:.1f}",
            "" if minus is None else _points(minus.value, minus.low, minus.high),
        ]
        if by_length:
            cells.append("" if score.normalised is None else f"{100 * score.normalised.value:.1f} %")
        shown.add_row(*cells)
    shown.caption = _judged(scores)
    return shown


def _points(value: float, low: float, high: float) -> str:
    ends = f" [{100 * low:+.1f}, {100 * high:+.1f}]" if abs(low) < 1e9 and abs(high) < 1e9 else ""
    return f"{100 * value:+.1f}{ends}"


def _judged(scores: Sequence[Score]) -> str:
    judged = {score.judged for score in scores}
    numbers = f"{min(judged)}" if len(judged) == 1 else f"{min(judged)} to {max(judged)}"
    unjudged = max(score.unjudged for score in scores)
    more = f"; {unjudged} could not be judged" if unjudged else ""
    return f"of {numbers} answers{more}; systems of one group cannot be told from its best"


def _losses(scores: Sequence[Score]) -> Table:
    shown = table(["group", "system", "loss", "95 %", "against the base"], left=["system"])
    for score in scores:
        value, minus = score.value, score.minus_base
        shown.add_row(
            "" if score.group is None else str(score.group),
            score.system,
            "" if value is None else f"{value.value:.4f}",
            "" if value is None else f"{value.low:.4f} to {value.high:.4f}",
            "" if minus is None else minus.text("+.4f"),
        )
    shown.caption = f"nats a token, on {scores[0].judged} rows"
    return shown


def _costs(found: EvaluationResult) -> Table:
    names = ["system", "prompt tokens", "first token", "tokens/s", "cache"]
    shown = table(names, left=["system"], title="an answer, alone")
    for system, cost in found.costs.items():
        shown.add_row(
            system,
            str(cost.prompt_tokens),
            f"{1000 * cost.first_token:.0f} ms",
            f"{cost.tokens_per_second:.1f}",
            f"{cost.cache_bytes / 2**20:.2f} MiB",
        )
    return shown
