"""The pages of a report: of a study, of a single run, of several studies side by side."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from peft_study.config import StudyConfig, TrainConfig
from peft_study.report import page_sections
from peft_study.report.cards import Card, Pairs, cards, command, verdict_of
from peft_study.report.chart_data import Charts
from peft_study.report.charts import colours, paired
from peft_study.report.checks import checks
from peft_study.report.findings import TOPICS
from peft_study.report.page import render
from peft_study.report.page_tasks import tasks
from peft_study.report.page_values import Shown, Strip, flattened, shortened, shown, strips
from peft_study.report.page_words import Words
from peft_study.report.study_pair import StudyPair, pair
from peft_study.report.view import RunView, StudyView
from peft_study.statistics import Estimate, duration

_FIGURES = {"curves": "learning_curves", "rates": "learning_rate", "responses": "response-", "pareto": "pareto-"}
"""Sections with charts, and how the charts' names begin."""
VERDICT, LIMITS = ("winner", "ranking"), ("limits", "untested")
"""Topics of the findings that stand in sections of their own."""


def page_of(views: Sequence[StudyView | RunView], lang: str = "en") -> str:
    """Returns the page of a study or a run, in any state, or of several studies.

    Args:
        views: one, or several studies.
        lang: ``en`` or ``zh``.

    Raises:
        ConfigError: when the language is not known.
    """
    t = Words(lang)
    first = views[0]
    if len(views) > 1:
        return _studies([view for view in views if isinstance(view, StudyView)], t)
    return _study(first, t) if isinstance(first, StudyView) else _run(first, t)


def _study(view: StudyView, t: Words) -> str:
    results, config = view.results, view.record.config
    others = [topic for topic in TOPICS if topic not in (*VERDICT, *LIMITS)]
    figures = [(key, [name for name in view.charts if name.startswith(start)]) for key, start in _FIGURES.items()]
    figures = [(key, names) for key, names in figures if names]
    values = {
        "view": view,
        "subtitle": _subtitle(view, t),
        "verdict": [each.text[t.lang] for each in view.findings if each.topic in VERDICT],
        "cards": cards(view, t),
        "findings": page_sections.findings(view, t, others),
        "figures": figures,
        "tasks": tasks(view, t),
        "answers": page_sections.examples(view, t),
        "answers_note": _answers_note(view, t),
        "trials": None if results is None else page_sections.table(results, config, t),
        "limits": page_sections.findings(view, t, LIMITS),
        "checks": checks(view.folder.path, t, study=True),
        "protocol": page_sections.protocol(view, t),
        "environment": page_sections.environment(view.environment),
    }
    order = (
        "answer",
        "findings",
        *_FIGURES,
        "tasks",
        "answers",
        "trials",
        "checks",
        "limits",
        "protocol",
        "environment",
    )
    there = {"answer": True, **values, **dict(figures)}
    values["sections"] = [key for key in order if there.get(key)]
    return render("study.html.jinja", t, f"{view.name} – peft-study", view.charts, values)


def _subtitle(view: StudyView, t: Words) -> str:
    status, methods = view.status, ", ".join(view.record.config.methods)
    return _line(shortened(methods, 300), view.record.config, status.state, view.record.began, status.elapsed, t)


def _line(
    what: str,
    config: StudyConfig | TrainConfig,
    state: str,
    began: datetime | None,
    elapsed: timedelta | None,
    t: Words,
) -> str:
    """Returns what was trained, on which model and data, and when; of an unfinished one the page tells the state."""
    parts = [
        what,
        shortened(config.model.name, 100),
        ", ".join(shortened(str(source.path), 100) for source in config.data.train),
        *([t("state_finished")] if state == "finished" else []),
        *([began.strftime("%Y-%m-%d %H:%M UTC")] if began else []),
        *([t("took", time=duration(elapsed.total_seconds()))] if elapsed else []),
    ]
    return " · ".join(parts)


def _answers_note(view: StudyView, t: Words) -> str:
    answers = view.answers
    if answers is None:
        return ""
    winner = next((system for system in answers.systems if system != "none"), "-")
    return t("answers_note", tokens=answers.max_new_tokens, rows=len(answers.rows), winner=winner)


@dataclass(frozen=True, slots=True)
class StudyColumn:
    """A study beside others: its name, what it was made of, and its methods' cards."""

    name: str
    subtitle: str
    view: StudyView
    cards: tuple[Card, ...]
    verdict: tuple[str, ...]
    report: str


@dataclass(frozen=True, slots=True)
class PairSection:
    """Two studies' differences: a note, a row a difference, and the chart's name; or why there are none."""

    note: str
    rows: tuple[tuple[str, Shown | None, str, str], ...]
    chart: str | None


def study_pairs(views: Sequence[StudyView]) -> list[StudyPair]:
    """Returns every two of some studies, compared."""
    named = list(zip(views, study_names(views), strict=True))
    return [pair(one, other, (a, b)) for (one, a), (other, b) in itertools.combinations(named, 2)]


def _studies(views: Sequence[StudyView], t: Words) -> str:
    names = study_names(views)
    methods = list(dict.fromkeys(method for view in views for method in view.record.config.searched))
    charts: Charts = {}
    pairs = []
    for number, found in enumerate(study_pairs(views)):
        name = f"paired-{number}"
        if found.differences:
            charts[name] = paired(found.differences, found.first, found.second, colours(methods), found.part)
        pairs.append(_pair_section(found, name, t))
    columns = [
        StudyColumn(
            name,
            _subtitle(view, t),
            view,
            tuple(cards(view, t)),
            tuple(each.text[t.lang] for each in view.findings if each.topic in VERDICT),
            command("report", view.folder.path),
        )
        for name, view in zip(names, views, strict=True)
    ]
    heading = " / ".join(names)
    values = {"columns": columns, "pairs": pairs, "heading": heading}
    return render("studies.html.jinja", t, f"{heading} – peft-study", charts, values)


def study_names(views: Sequence[StudyView]) -> list[str]:
    """Returns the names of studies: of those whose folders have one name, the paths."""
    names = [view.name for view in views]
    return [str(view.folder.path) if names.count(name) > 1 else name for name, view in zip(names, views, strict=True)]


def pair_note(found: StudyPair, t: Words) -> str:
    """Returns what the differences of two studies are, or why there are none."""
    if found.why is not None:
        return t("not_comparable", first=found.first, second=found.second, why=t(found.why))
    return t("paired_note", first=found.first, second=found.second, rows=found.rows, part=t(f"part_{found.part}"))


def _pair_section(found: StudyPair, chart: str, t: Words) -> PairSection:
    rows = tuple(
        (
            each.label,
            shown(each.difference, t, sign=True),
            t("told" if each.difference.excludes_zero() else "not_told"),
            _better(found, each.difference.value) if each.difference.excludes_zero() else "",
        )
        for each in found.differences
    )
    return PairSection(pair_note(found, t), rows, chart if rows else None)


def _better(found: StudyPair, difference: float) -> str:
    return found.first if difference < 0 else found.second


def _run(view: RunView, t: Words) -> str:
    status, config = view.status, view.status.config
    kept = status.kept
    curve = [
        (
            f"{point.step:,}",
            shown(point.loss, t),
            shown(point.minus_base, t, sign=True),
            point is kept and bool(point.best),
        )
        for point in status.curve
    ]
    settings = [
        (name, list(flattened(getattr(config, name).model_dump(mode="json", exclude_none=True))))
        for name in ("method", "training", "data", "model")
    ]
    values = {
        "view": view,
        "subtitle": _line(config.method.method, config, status.state, status.began, status.elapsed, t),
        "card_": _run_card(view, t),
        "curve": curve,
        "settings": settings,
        "checks": checks(status.folder.path, t, study=False),
        "environment": page_sections.environment(view.environment),
    }
    order = {
        "answer": True,
        "training": view.charts,
        "curve": curve,
        "checks": values["checks"],
        "settings": True,
        "environment": view.environment,
    }
    values["sections"] = [key for key, there in order.items() if there]
    return render("run.html.jinja", t, f"{view.name} – peft-study", view.charts, values)


def _run_card(view: RunView, t: Words) -> Card | None:
    """Returns the card of a run's adapter; None before its first held-out loss."""
    status, kept = view.status, view.status.kept
    if kept is None:
        return None
    base = kept.loss.value - kept.minus_base.value
    first = shown(status.curve[0].loss, t)
    verdict, mood = verdict_of(kept.minus_base)
    folder, method = status.folder, status.config.method.method
    commands: list[tuple[str, str]] = []
    if folder.adapter.is_dir():
        commands.append((t("use"), command("chat", folder.adapter)))
        if method == "lora":
            commands.append((t("merge"), command("merge", folder.adapter, "-o", f"{folder.path}_merged")))
    settings: Pairs = tuple(flattened(status.config.method.model_dump(mode="json")))
    drawn: dict[str, Strip] = strips({"": kept.loss}, Estimate(base, base, base))
    return Card(
        method,
        0,
        (),
        False,
        None,
        (
            ("learning_rate", f"{status.config.training.learning_rate or 0:.4g}"),
            (t("before"), first.value if first else "-"),
        ),
        settings,
        "held_out_loss",
        shown(kept.loss, t),
        shown(kept.minus_base, t, sign=True),
        f"{base:.2f}",
        verdict,
        mood,
        f"{t('step').lower()} {kept.step:,}",
        drawn.get(""),
        (),
        tuple(commands),
    )
