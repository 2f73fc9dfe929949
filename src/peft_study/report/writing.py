"""Writes reports: as HTML, as Markdown, JSON or CSV, or as pictures of the charts."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any, Literal

from peft_study.errors import ConfigError
from peft_study.report import page_sections
from peft_study.report.cards import Card, cards
from peft_study.report.chart_data import Charts
from peft_study.report.evidence import plain
from peft_study.report.page_values import shown
from peft_study.report.page_words import Words
from peft_study.report.pages import LIMITS, VERDICT, page_of, pair_note, study_names, study_pairs
from peft_study.report.results import columns, flat, summary
from peft_study.report.view import RunView, StudyView, view_of
from peft_study.statistics import Estimate
from peft_study.storage.files import atomic_writer, finite, json_text, made_folder

View = StudyView | RunView
Format = Literal["html", "md", "json", "csv", "svg", "png"]
"""Of a report."""


def views_of(paths: Sequence[Path]) -> list[View]:
    """Returns what there is to say about the studies or the run in some folders.

    Args:
        paths: none: the current folder, or the only study under ``runs/``.

    Raises:
        OutputError: when one of them is neither, or its files are damaged.
        ConfigError: when a run stands beside another folder.
    """
    views = [view_of(path) for path in paths] if paths else [view_of(None)]
    if len(views) > 1:
        for path, view in zip(paths, views, strict=True):
            if isinstance(view, RunView):
                remedy = "give it alone, or studies only"
                raise ConfigError("is a single run, which stands beside no other", where=str(path), remedy=remedy)
    return views


def folder_of(view: View) -> Path:
    """Returns the folder of a study or run."""
    return view.folder.path if isinstance(view, StudyView) else view.status.folder.path


def default_page(views: Sequence[View], lang: str) -> Path:
    """Returns where a page goes: into the folder it is about, of several studies into the current one."""
    suffix = "html" if lang == "en" else f"{lang}.html"
    return Path(f"comparison.{suffix}") if len(views) > 1 else folder_of(views[0]) / f"report.{suffix}"


def write_page(views: Sequence[View], lang: str = "en", path: Path | None = None) -> Path:
    """Writes the page of a study, a run or several studies, and returns its path.

    Args:
        views: of which.
        lang: ``en`` or ``zh``.
        path: of the file; None: `default_page`.

    Raises:
        ConfigError: when the language is not known.
        OutputError: when the file cannot be written.
    """
    text = page_of(views, lang)
    path = path or default_page(views, lang)
    with made_folder(path.parent), atomic_writer(path) as file:
        file.write(text)
    return path


def try_page(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Writes the page of a study or run that has just ended; where that fails, warns and returns None.

    What was trained is not to be lost for its report.
    """
    try:
        return write_page([view_of(folder)])
    except Exception as error:  # noqa: BLE001  (of any kind: the study is finished, and is to end as finished)
        say(f"WARNING: the report was not written ({error}); `peft-study report {folder}` tries again")
        return None


def text_of(views: Sequence[View], form: str, lang: str = "en") -> str:
    """Returns a report as Markdown, JSON or CSV (a row a trial, or a held-out loss of a run)."""
    if form == "json":
        values = [_values(view) for view in views]
        whole: Any = values[0]
        if len(values) > 1:
            whole = {
                "studies": values,
                "pairs": finite([_pair_values(found) for found in study_pairs(_studies(views))]),
            }
        return f"{json_text(whole, indent=1, ensure_ascii=False)}\n"
    return _csv(views) if form == "csv" else _markdown(views, Words(lang))


def write_pictures(views: Sequence[View], form: str, folder: Path) -> list[Path]:
    """Writes a picture of each chart into a folder and returns their paths.

    Raises:
        ConfigError: when there is no chart.
        OutputError: when they cannot be written.
    """
    from peft_study.report.charts import save

    found = _charts(views)
    if not found:
        where = ", ".join(str(folder_of(view)) for view in views)
        raise ConfigError("has no chart: nothing was measured yet", where=where, remedy="ask again later")
    paths = []
    with made_folder(folder):
        for name, chart in found.items():
            paths.append(folder / f"{name}.{form}")
            save(chart, paths[-1])
    return paths


def _charts(views: Sequence[View]) -> Charts:
    if len(views) == 1:
        return views[0].charts
    names = study_names(_studies(views))
    return {
        f"{name}-{key}": chart for name, view in zip(names, views, strict=True) for key, chart in view.charts.items()
    }


def _studies(views: Sequence[View]) -> list[StudyView]:
    return [view for view in views if isinstance(view, StudyView)]


def _values(view: View) -> dict[str, Any]:
    if isinstance(view, RunView):
        status = view.status
        return {
            "run": str(status.folder.path),
            "state": status.state,
            "reason": status.reason,
            "config": status.config.model_dump(mode="json"),
            "held_out": _curve(view),
            "record": dict(view.environment),
        }
    results = view.results
    return {
        "study": str(view.folder.path),
        "state": view.status.state,
        "reason": view.status.reason,
        "config": view.record.config.model_dump(mode="json"),
        "results": None if results is None else finite(summary(results)),
        "findings": plain(view.findings),
        "costs": {method: asdict(cost) for method, cost in view.costs.items()},
        "trials": [] if results is None else [flat(row) for row in results.rows],
        "record": dict(view.environment),
    }


def _curve(view: RunView) -> list[dict[str, Any]]:
    rows = []
    for point in view.status.curve:
        row: dict[str, Any] = {"step": point.step}
        for name, each in (("loss", point.loss), ("minus_base", point.minus_base)):
            row |= {name: each.value, f"{name}_low": each.low, f"{name}_high": each.high}
        rows.append(finite(row))
    return rows


def _pair_values(found: Any) -> dict[str, Any]:
    differences = [
        {"label": each.label, "method": each.method, **asdict(each.difference)} for each in found.differences
    ]
    return {"first": found.first, "second": found.second, "part": found.part, "differences": differences}


def _csv(views: Sequence[View]) -> str:
    text = io.StringIO()
    if isinstance(views[0], RunView):
        names: list[str] = ["step", "loss", "loss_low", "loss_high", "minus_base", "minus_base_low", "minus_base_high"]
        rows = _curve(views[0])
    else:
        studies = _studies(views)
        names = [*(["study"] if len(studies) > 1 else []), *columns()]
        rows = [
            {**({"study": name} if len(studies) > 1 else {}), **flat(row)}
            for name, view in zip(study_names(studies), studies, strict=True)
            for row in (view.results.rows if view.results else ())
        ]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(views: Sequence[View], t: Words) -> str:
    lines: list[str] = []
    if len(views) > 1:
        lines += [f"# {t('studies')}", ""]
        for found in study_pairs(_studies(views)):
            lines += [_md(pair_note(found, t)), ""]
            rows = [(each.label, _cell(each.difference, t)) for each in found.differences]
            lines += _table((t("method"), t("differences")), rows)
    for view in views:
        lines += _study_markdown(view, t) if isinstance(view, StudyView) else _run_markdown(view, t)
    return "\n".join(lines)


def _study_markdown(view: StudyView, t: Words) -> list[str]:
    lines = [f"# {t('study')} {_md(view.name)}", ""]
    if view.status.state != "finished":
        lines += [f"**{t(f'state_{view.status.state}')}** {_md(view.status.reason or '')}".rstrip(), ""]
    said: dict[str, list[str]] = {"answer": [], "findings": [], "limits": []}
    for each in view.findings:
        key = "answer" if each.topic in VERDICT else "limits" if each.topic in LIMITS else "findings"
        said[key].append(f"- {_md(each.text[t.lang])}")
    found = cards(view, t)
    lines += [f"## {t('answer')}", "", *(said["answer"] or [t("no_trials")]), ""]
    heads = ("method", "settings", "test", "minus_base", "trainable")
    lines += _table([t(key) for key in heads], [_card_row(card, t) for card in found])
    lines += [f"## {t('findings')}", "", *said["findings"], ""] if said["findings"] else []
    if view.results is not None:
        trials = page_sections.table(view.results, view.record.config, t)
        rows = [tuple(cell.text for cell in row.cells) for row in trials.rows]
        lines += [f"## {t('trials')}", "", t("losses_note"), "", *_table([t(key) for key in trials.heads], rows)]
    lines += [f"## {t('limits')}", "", *said["limits"], ""] if said["limits"] else []
    lines += [f"## {t('protocol')}", ""]
    lines += [f"{number}. {_md(line)}" for number, line in enumerate(page_sections.protocol(view, t), start=1)]
    return [*lines, ""]


def _card_row(card: Card, t: Words) -> tuple[str, ...]:
    loss = "-" if card.loss is None else f"{card.loss.value} {card.loss.ends} ({t(card.part)})"
    above = "-" if card.against is None else f"{card.against.value} {card.against.ends}"
    settings = ", ".join(f"{name} {value}" for name, value in card.settings)
    costs = dict(card.costs)
    return card.method, settings, loss, above, costs.get(t("trainable"), "-")


def _run_markdown(view: RunView, t: Words) -> list[str]:
    status = view.status
    lines = [f"# {t('run')} {_md(view.name)}", ""]
    if status.state != "finished":
        lines += [f"**{t(f'state_{status.state}')}** {_md(status.reason or '')}".rstrip(), ""]
    rows = [(f"{p.step:,}", _cell(p.loss, t, sign=False), _cell(p.minus_base, t, sign=True)) for p in status.curve]
    return [*lines, *_table((t("step"), t("held_out_loss"), t("minus_base")), rows)]


def _cell(estimate: Estimate, t: Words, *, sign: bool = True) -> str:
    found = shown(estimate, t, sign=sign)
    return "-" if found is None else f"{found.value} {found.ends}".strip()


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [heads, ["---"] * len(heads), *rows]
    return [*(f"| {' | '.join(_md(cell) for cell in line)} |" for line in lines), ""]


def _md(text: str) -> str:
    """Returns a text that Markdown shows as it is: no HTML, no markup, one line."""
    text = escape(" ".join(text.split()), quote=False)
    for sign in "\\`*_[]|":
        text = text.replace(sign, f"\\{sign}")
    return text
