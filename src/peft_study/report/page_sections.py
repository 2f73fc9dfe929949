"""The sections of a study's page below the answer: the table of trials, the protocol, the environment, the answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_study.config import Choices, Range, StudyConfig
from peft_study.report.page_values import flattened, setting, shortened, shown
from peft_study.report.page_words import Words
from peft_study.report.results import Results, Row
from peft_study.report.view import StudyView
from peft_study.search.trials import best_first
from peft_study.statistics import Estimate

MOST_ROWS, MOST_FAILED = 1000, 200
"""Rows of the table, and those of them for trials that failed or diverged."""
_REASON = 300
"""Letters of a reason that the table shows."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of the table: its text, and the number that it is sorted by where that is no text."""

    text: str
    value: float | None = None
    kind: str = "number"


@dataclass(frozen=True, slots=True)
class TableRow:
    """A trial in the table."""

    method: str
    status: str
    place: int | None
    cells: tuple[Cell, ...]


HEADS = ("trial", "kind", "status", "rate", "others", "dev", "minus_base", "test", "steps", "tokens", "seconds", "reason")
"""Keys of the table's heads."""


def table(results: Results, config: StudyConfig, t: Words) -> list[TableRow]:
    """Returns the rows of the table, at most `MOST_ROWS`, in the order in which the trials began."""
    places_of = {method: number for number, method in enumerate(results.methods)}
    return [_table_row(row, config, t, places_of.get(row.trial.method)) for row in chosen(results.rows)]


def chosen(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows that the table shows: all, or base, finals, some failures, and the best of each method."""
    if len(rows) <= MOST_ROWS:
        return list(rows)
    kept = {row.trial.name for row in rows if row.trial.kind in ("reference", "final")}
    failed = [row.trial.name for row in rows if row.trial.status in ("failed", "diverged")]
    kept |= set(failed[:MOST_FAILED])
    by_method: dict[str, list[str]] = {}
    for trial in best_first(row.trial for row in rows):
        by_method.setdefault(trial.method, []).append(trial.name)
    ranks = sorted((rank, name) for names in by_method.values() for rank, name in enumerate(names))
    others = [name for _, name in ranks] + [row.trial.name for row in rows]
    for name in others:
        if len(kept) >= MOST_ROWS:
            break
        kept.add(name)
    return [row for row in rows if row.trial.name in kept][:MOST_ROWS]


def _table_row(row: Row, config: StudyConfig, t: Words, place: int | None) -> TableRow:
    trial = row.trial
    rate = row.settings.get("learning_rate")
    space = config.methods.get(trial.method)
    names = [name for name in (space.dimensions() if space else ()) if name != "learning_rate"]
    others = ", ".join(f"{name} {setting(row.settings[name])}" for name in names if name in row.settings)
    facts = trial.facts
    seconds = facts.get("seconds")
    return TableRow(
        trial.method,
        trial.status,
        place,
        (
            Cell(shortened(trial.name, _REASON), kind="name"),
            Cell(t(f"kind_{trial.kind}"), kind="text"),
            Cell(t(f"status_{trial.status}"), kind="text"),
            Cell("" if rate is None else setting(rate), rate),
            Cell(shortened(others, _REASON), kind="text"),
            _loss(row.dev, t),
            _loss(row.minus_base if trial.kind != "reference" else None, t, sign=True),
            _loss(row.test, t),
            _count(facts.get("steps")),
            _count(facts.get("tokens")),
            Cell("" if seconds is None else f"{seconds:.1f}", seconds),
            Cell(shortened(trial.reason or "", _REASON), kind="long"),
        ),
    )


def _loss(estimate: Estimate | None, t: Words, *, sign: bool = False) -> Cell:
    found = shown(estimate, t, sign=sign)
    if found is None or estimate is None:
        return Cell("")
    value = estimate.value if math.isfinite(estimate.value) else None
    return Cell(f"{found.value} {found.ends}".strip(), value)


def _count(number: int | None) -> Cell:
    return Cell("" if number is None else f"{number:,}", number)


def protocol(view: StudyView, t: Words) -> list[str]:
    """Returns how the study was done, in about ten lines."""
    config, data = view.record.config, view.environment.get("data", {})
    dtype = view.environment.get("base", {}).get("dtype")
    training, finals, examples = config.training, config.finals, view.record.examples
    dev = len(examples.counts_N) if examples else data.get("held_out_rows") or "?"
    test = len(examples.test_counts_N) if examples else data.get("test_rows") or "?"
    sources = ", ".join(f"{shortened(str(s.path), 200)}" + ("" if s.take == 1 else f" ({s.take:g})") for s in config.data.train)
    trials = sorted({config.trials(method) for method in config.searched})
    said = [
        t("p_model", model=shortened(config.model.name, 200), dtype=f" ({dtype})" if dtype else ""),
        t("p_data", sources=sources, train=_thousands(data.get("train_rows")), dev=dev, test=test),
        t("p_loss"),
        " ".join(_space(config, method, t) for method in config.searched),
        t("p_budget", trials=" / ".join(map(str, trials)), steps=_steps(config, t), batch=training.batch_size),
        t("p_training", schedule=training.schedule, clip=setting(training.clip_norm)),
        t("p_search", sampler=config.search.sampler, pruner=config.search.pruner, audit=f"{config.search.audit:.0%}"),
        t("p_finals", best=finals.best, seeds=finals.seeds) if finals.best else t("p_no_finals"),
        *([t("p_choice")] if finals.best else []),
        t("p_intervals"),
        *([t("p_groups")] if finals.best else []),
    ]
    return said


def _thousands(number: object) -> str:
    return f"{number:,}" if isinstance(number, int) else "?"


def _steps(config: StudyConfig, t: Words) -> str:
    if config.training.steps is not None:
        return t("p_steps", n=f"{config.training.steps:,}")
    if config.budget.tokens is not None:
        return t("p_tokens", n=f"{config.budget.tokens:,}")
    return t("p_epochs", n=config.training.epochs)


def _space(config: StudyConfig, method: str, t: Words) -> str:
    dimensions = config.methods[method].dimensions()
    if not dimensions:
        return t("p_fixed", method=method)
    return t("p_space", method=method, space="; ".join(f"{name} {_values(d)}" for name, d in dimensions.items()))


def _values(dimension: Range | Choices) -> str:
    if isinstance(dimension, Range):
        return f"{setting(dimension.low)} – {setting(dimension.high)}{' (log)' if dimension.log else ''}"
    return ", ".join(setting(value) for value in dimension.choices)


def environment(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns what the record holds, a value a row; not where the base lies on this machine."""
    return [(path, value) for path, value in flattened(record) if path != "base.path"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one system said to a prompt, with its loss of the reference."""

    system: str
    text: str
    loss: str
    place: int | None


@dataclass(frozen=True, slots=True)
class Example:
    """A held-out prompt with the reference and the answers."""

    title: str
    messages: tuple[tuple[str, str], ...]
    reference: str
    answers: tuple[Answer, ...]


def examples(view: StudyView, t: Words) -> list[Example]:
    """Returns the prompts with the answers of base and finalists; none where they were not kept."""
    if view.answers is None or view.results is None:
        return []
    places_of = {f"{f.method}-{f.number:03d}": view.results.methods.index(f.method) for f in view.results.finalists}
    found = []
    for row in view.answers.rows:
        title = ", ".join(str(part) for part in (row.source, row.id or f"#{row.example}") if part)
        said = tuple(
            Answer(
                t("untouched") if system == "none" else system,
                shortened(row.answers.get(system, "")),
                t("loss", loss=_plain(row.losses.get(system))),
                places_of.get(system),
            )
            for system in view.answers.systems
        )
        messages = tuple((str(m["role"]), shortened(str(m["content"]))) for m in row.prompt)
        found.append(Example(shortened(title, 200), messages, shortened(row.reference), said))
    return found


def _plain(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.2f}"


