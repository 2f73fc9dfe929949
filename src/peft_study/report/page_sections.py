"""The sections of a study's page below the answer: the table of trials, the protocol, the environment, the answers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
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


_HEADS = (
    "trial",
    "kind",
    "status",
    "rate",
    "others",
    "dev",
    "minus_base",
    "test",
    "steps",
    "tokens",
    "seconds",
    "reason",
)
_NUMBERS = ("rate", "dev", "minus_base", "test", "steps", "tokens", "seconds")


@dataclass(frozen=True, slots=True)
class TrialTable:
    """The table of trials.

    Attributes:
        heads: keys of the columns in which a trial has something, and those of them with `numbers`.
        rows: at most `MOST_ROWS`, in the order in which the trials began; of `all` trials.
        methods, statuses: that a reader may choose.
    """

    heads: tuple[str, ...]
    numbers: tuple[str, ...]
    rows: tuple[TableRow, ...]
    all: int
    methods: tuple[str, ...]
    statuses: tuple[str, ...]


def table(results: Results, config: StudyConfig, t: Words) -> TrialTable:
    """Returns the table of a study's trials."""
    places_of = {method: number for number, method in enumerate(results.methods)}
    rows = [_table_row(row, config, t, places_of.get(row.trial.method)) for row in chosen(results.rows)]
    there = [number for number in range(len(_HEADS)) if any(row.cells[number].text for row in rows)]
    return TrialTable(
        tuple(_HEADS[number] for number in there),
        _NUMBERS,
        tuple(replace(row, cells=tuple(row.cells[number] for number in there)) for row in rows),
        len(results.rows),
        tuple(dict.fromkeys(row.method for row in rows)),
        tuple(dict.fromkeys(row.status for row in rows)),
    )


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
    sources = ", ".join(
        f"{shortened(str(s.path), 200)}" + ("" if s.take == 1 else f" ({s.take:g})") for s in config.data.train
    )
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
        *([_choice(view, t)] if finals.best else []),
        t("p_intervals"),
        *([t("p_groups")] if finals.best else []),
    ]
    return said


def _thousands(number: object) -> str:
    return f"{number:,}" if isinstance(number, int) else "?"


def _choice(view: StudyView, t: Words) -> str:
    by = view.record.state.winner_by
    return t("p_choice") if by is None else t("p_choice_task", task=shortened(by, 200))


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


def environment(record: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns what the record holds by its parts, a name and a value each; not where the base lies on this machine."""
    alone = {name: value for name, value in record.items() if not isinstance(value, Mapping)}
    parts = {**({"record": alone} if alone else {}), **{n: v for n, v in record.items() if isinstance(v, Mapping)}}
    return [
        (part, [(name, value) for name, value in flattened(values) if (part, name) != ("base", "path")])
        for part, values in parts.items()
    ]


@dataclass(frozen=True, slots=True)
class FindingGroup:
    """Findings about one method, or about the study: their texts with the names of the trials behind them."""

    place: int | None
    lines: tuple[tuple[str, str, str], ...]


def findings(view: StudyView, t: Words, topics: Collection[str]) -> list[FindingGroup]:
    """Returns the findings on some topics, by method: a text, how many trials are behind it, and their names."""
    places_of = {} if view.results is None else {m: number for number, m in enumerate(view.results.methods)}
    groups: dict[str | None, list[tuple[str, str, str]]] = {}
    for each in view.findings:
        if each.topic in topics:
            count = len(each.trials)
            said = "" if not count else t("behind_one") if count == 1 else t("behind", n=f"{count:,}")
            groups.setdefault(each.method, []).append(
                (each.text[t.lang], said, shortened(", ".join(each.trials), 2000))
            )
    return [FindingGroup(places_of.get(method or ""), tuple(lines)) for method, lines in groups.items()]


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """What one system said to a prompt, with its loss of the reference."""

    system: str
    text: str
    loss: str
    place: int | None


@dataclass(frozen=True, slots=True)
class ShownExample:
    """A held-out prompt with the reference and the answers."""

    title: str
    messages: tuple[tuple[str, str], ...]
    reference: str
    answers: tuple[ShownAnswer, ...]


def examples(view: StudyView, t: Words) -> list[ShownExample]:
    """Returns the prompts with the answers of base and finalists; none where they were not kept."""
    if view.answers is None or view.results is None:
        return []
    places_of = {f.name: view.results.methods.index(f.method) for f in view.results.finalists}
    found = []
    for row in view.answers.rows:
        title = ", ".join(str(part) for part in (row.source, row.id or f"#{row.example}") if part)
        said = tuple(
            ShownAnswer(
                t("untouched") if system == "none" else system,
                shortened(row.answers.get(system, "")),
                t("loss", loss=_plain(row.losses.get(system))),
                places_of.get(system),
            )
            for system in view.answers.systems
        )
        messages = tuple((str(m["role"]), shortened(str(m["content"]))) for m in row.prompt)
        found.append(ShownExample(shortened(title, 200), messages, shortened(row.reference), said))
    return found


def _plain(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.2f}"
