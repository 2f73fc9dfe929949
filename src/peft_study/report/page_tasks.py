"""The section of tasks on a study's page: scores with intervals and groups, costs, answers that were won and lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_study.evaluation.answer_files import Row
from peft_study.evaluation.scores import BASE, EVALUATION, AnswerCost, Score, most_frequent, read_scores, table_of
from peft_study.evaluation.tasks import LM_EVAL
from peft_study.report.page_sections import ShownAnswer, ShownExample
from peft_study.report.page_values import shortened
from peft_study.report.page_words import Words
from peft_study.report.view import StudyView
from peft_study.statistics import Estimate

EXAMPLES = 2
"""Questions of a task that the page shows where the best adapter wins, and as many where it loses."""


@dataclass(frozen=True, slots=True)
class TaskTable:
    """A task, or what answers cost: a table whose first cells are names, and questions with all answers.

    Attributes:
        title, note: above it.
        heads: of the columns.
        rows: the place of the system's method for its colour, and the cells.
        examples: won and lost.
    """

    title: str
    note: str
    heads: tuple[str, ...]
    rows: tuple[tuple[int | None, tuple[str, ...]], ...]
    examples: tuple[ShownExample, ...] = ()


def tasks(view: StudyView, t: Words) -> list[TaskTable]:
    """Returns the tasks that a study's adapters were asked; none where there are none (yet)."""
    folder = view.folder.path / EVALUATION
    kept = read_scores(folder)
    if kept is None or view.results is None:
        return []
    places = {f.name: view.results.methods.index(f.method) for f in view.results.finalists}
    found = []
    for scores in kept.tables:
        examples = _examples(folder, scores, places, t) if scores[0].metric == "accuracy" else []
        found.append(_table(scores, places, t, tuple(examples)))
    return [*found, *([_costs(kept.costs, places, t)] if kept.costs else [])]


def _table(
    scores: Sequence[Score], places: Mapping[str, int], t: Words, examples: tuple[ShownExample, ...]
) -> TaskTable:
    first = scores[0]
    share = first.metric != "loss"
    by_length = any(score.normalised for score in scores)
    heads = [t("group"), t("system"), t(f"metric_{first.metric}"), t("minus_base"), t("p_value")]
    rows = []
    for score in scores:
        cells = [
            "" if score.group is None else str(score.group),
            t("untouched") if score.system == BASE else score.system,
            _text(score.value, t, share=share),
            _text(score.minus_base, t, share=share, sign="+"),
            "" if score.p_value is None else f"{score.p_value:.2g}",
        ]
        if by_length:
            cells.append("" if score.normalised is None else f"{100 * score.normalised.value:.1f} %")
        rows.append((places.get(score.system), tuple(cells)))
    unjudged = max(score.unjudged for score in scores)
    kind = "perplexity" if not share and first.task.startswith(LM_EVAL) else first.metric
    note = t(f"task_{kind}_note", rows=max(score.judged for score in scores)) + " " + t("task_groups")
    if unjudged:
        note += " " + t("task_unjudged", rows=unjudged)
    if (constant := most_frequent(scores)) is not None:
        note += " " + t("task_constant", share=f"{100 * constant:.1f}")
    title = first.task if first.source is None else f"{first.task}: {first.source}"
    return TaskTable(title, note, (*heads, *([t("by_length")] if by_length else [])), tuple(rows), examples)


def _text(estimate: Estimate | None, t: Words, *, share: bool, sign: str = "") -> str:
    if estimate is None:
        return ""
    form, scale, unit = (f"{sign}.1f", 100.0, " %") if share else (f"{sign}.4f", 1.0, "")
    value = f"{scale * estimate.value:{form}}{unit}"
    if not estimate.bounded:
        return value
    ends = t("ends", low=f"{scale * estimate.low:{form}}", high=f"{scale * estimate.high:{form}}")
    return f"{value} ({ends})"


def _examples(folder: Path, scores: Sequence[Score], places: Mapping[str, int], t: Words) -> list[ShownExample]:
    """Returns questions that the best adapter alone answers rightly, then those that the base alone does."""
    best = next((score.system for score in scores if score.system in places), None)
    path = folder / table_of(scores[0].task)
    if best is None or not path.exists():
        return []
    import pyarrow
    import pyarrow.parquet as pq

    by_question: dict[str, dict[str, Row]] = {}
    try:
        table = pq.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError):  # damaged: the scores are there all the same
        return []
    for row in table:
        by_question.setdefault(row["id"], {})[row["system"]] = row
    both = [rows for rows in by_question.values() if rows.keys() >= {best, BASE}]
    won = [rows for rows in both if rows[best]["score"] == 1 and rows[BASE]["score"] == 0]
    lost = [rows for rows in both if rows[BASE]["score"] == 1 and rows[best]["score"] == 0]
    systems = [score.system for score in scores]
    return [
        _example(rows, [name for name in systems if name in rows], places, t(key, winner=best), t)
        for key, group in (("task_won", won), ("task_lost", lost))
        for rows in group[:EXAMPLES]
    ]


def _example(
    rows: Mapping[str, Row], systems: Sequence[str], places: Mapping[str, int], title: str, t: Words
) -> ShownExample:
    first = rows[systems[0]]
    said = tuple(
        ShownAnswer(
            t("untouched") if name == BASE else name,
            shortened(rows[name]["output"] or ""),
            _verdict(rows[name]["score"], t),
            places.get(name),
        )
        for name in systems
    )
    shown = shortened(f"{title}: {first['id']}", 200)
    return ShownExample(shown, (("user", shortened(first["prompt"])),), shortened(first["gold"]), said)


def _verdict(score: float | None, t: Words) -> str:
    """Returns a word for a score, or the share that a metric of the user's gave."""
    if score is None:
        return t("not_judged")
    return t("right") if score == 1 else t("wrong") if score == 0 else f"{score:.0%}"


def _costs(costs: Mapping[str, AnswerCost], places: Mapping[str, int], t: Words) -> TaskTable:
    heads = "system", "prompt_tokens", "first_token", "tokens_per_second", "cache"
    rows = tuple(
        (places.get(system), (t("untouched") if system == BASE else system, *cost.cells))
        for system, cost in costs.items()
    )
    return TaskTable(t("answer_costs"), t("answer_costs_note"), tuple(t(head) for head in heads), rows)
