"""Reports as HTML pages: of a study, of a single run, of several studies; and where they are written."""

from __future__ import annotations

import html
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_study.errors import ConfigError
from peft_study.report.cards import cards
from peft_study.report.page import render
from peft_study.report.page_sections import HEADS, environment, examples, protocol, table
from peft_study.report.page_values import shortened
from peft_study.report.page_words import LANGUAGES, Words, words
from peft_study.report.study_reader import read_study
from peft_study.report.view import StudyView, view_of
from peft_study.statistics import duration
from peft_study.storage.files import atomic_writer

FILE = {"en": "report.html", "zh": "report.zh.html"}
"""A report's name in the folder of its study or run, by language."""
_NUMBERS = ("rate", "dev", "minus_base", "test", "steps", "tokens", "seconds")
_FIGURES = {
    "curves": ("learning_curves",),
    "rates": ("learning_rate",),
    "responses": ("response-",),
    "pareto": ("pareto-",),
}
"""Sections with charts, and how the charts' names begin."""
_VERDICT, _LIMITS = ("winner", "ranking"), ("limits", "untested")


def study_page(view: StudyView, lang: str) -> str:
    """Returns the page of a study in any state.

    Raises:
        ConfigError: when the language is not known.
    """
    t = _words(lang)
    results, config = view.results, view.record.config
    rows = [] if results is None else table(results, config, t)
    count = 0 if results is None else len(results.rows)
    figures = [
        (key, [name for name in view.charts if name.startswith(begins)]) for key, begins in _FIGURES.items()
    ]
    figures = [(key, names) for key, names in figures if names]
    shown = examples(view, t)
    said = {
        "verdict": [f.text[lang] for f in view.findings if f.topic in _VERDICT],
        "findings": [f.text[lang] for f in view.findings if f.topic not in (*_VERDICT, *_LIMITS)],
        "limits": [f.text[lang] for f in view.findings if f.topic in _LIMITS],
        "protocol": protocol(view, t),
        "environment": environment(view.environment),
    }
    there = {"findings": said["findings"], "answers": shown, "trials": rows, "limits": said["limits"]}
    there |= {"environment": said["environment"], **dict(figures)}
    order = ("answer", "findings", *_FIGURES, "answers", "trials", "limits", "protocol", "environment")
    values = {
        **said,
        "view": view,
        "subtitle": _subtitle(view, t),
        "sections": [key for key in order if key in ("answer", "protocol") or there.get(key)],
        "cards": cards(view, t),
        "figures": figures,
        "examples": shown,
        "answers_note": _answers_note(view, t) if shown else "",
        "rows": rows,
        "thinned": t("thinned", shown=len(rows), all=f"{count:,}") if len(rows) < count else "",
        "heads": HEADS,
        "numbers": _NUMBERS,
        "methods": list(dict.fromkeys(row.method for row in rows)),
        "statuses": list(dict.fromkeys(row.status for row in rows)),
        "footer": t("written", version=importlib.metadata.version("peft-study")),
    }
    return render("study.html.jinja", lang, f"{view.name} – peft-study", view.charts, values)


def _subtitle(view: StudyView, t: Words) -> str:
    config, elapsed = view.record.config, view.status.elapsed
    parts = [
        ", ".join(config.methods),
        shortened(config.model.name, 100),
        ", ".join(shortened(str(source.path), 100) for source in config.data.train),
        *([t("state_finished")] if view.status.state == "finished" else []),
        *([view.record.began.strftime("%Y-%m-%d %H:%M UTC")] if view.record.began else []),
        *([t("took", time=duration(elapsed.total_seconds()))] if elapsed else []),
    ]
    return " · ".join(parts)


def _answers_note(view: StudyView, t: Words) -> str:
    answers = view.answers
    assert answers is not None
    winner = next((system for system in answers.systems if system != "none"), "-")
    return t("answers_note", tokens=answers.max_new_tokens, rows=len(answers.rows), winner=winner)


def _words(lang: str) -> Words:
    if lang not in LANGUAGES:
        raise ConfigError(f"unknown language {lang!r}", where="lang", remedy=f"give one of {', '.join(LANGUAGES)}")
    return words(lang)
