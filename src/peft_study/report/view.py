"""Everything that a report says about a study or a single run, read from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_study.report.answers import Answers, answers
from peft_study.report.chart_data import Charts, charts_of, run_charts
from peft_study.report.costs import MethodCost, costs
from peft_study.report.evidence import Finding
from peft_study.report.findings import find
from peft_study.report.responses import responses
from peft_study.report.results import Results, collect
from peft_study.report.run_reader import RunStatus, is_run, read_run
from peft_study.report.status import StudyStatus, study_status
from peft_study.report.study_reader import StudyRecord, read_study
from peft_study.storage.study_dir import StudyFolder


@dataclass(frozen=True, slots=True)
class StudyView:
    """One study.

    Attributes:
        record, status: as its folder tells them.
        results: None where it ended before its first trial.
        findings: with the trials behind them.
        costs: by method; empty where they were not measured.
        answers: to held-out prompts; None where there are none.
        charts: by name, in the report's order.
        environment: of record.json; empty where it is not there.
    """

    record: StudyRecord
    status: StudyStatus
    results: Results | None
    findings: tuple[Finding, ...]
    costs: Mapping[str, MethodCost]
    answers: Answers | None
    charts: Charts
    environment: Mapping[str, Any]

    @property
    def folder(self) -> StudyFolder:
        """Of the study."""
        return self.record.folder

    @property
    def name(self) -> str:
        """The last part of the folder's path."""
        return self.folder.path.resolve().name


@dataclass(frozen=True, slots=True)
class RunView:
    """One run of `finetune`; attributes as of `StudyView`."""

    status: RunStatus
    charts: Charts
    environment: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The last part of the folder's path."""
        return self.status.folder.path.resolve().name


def view_of(path: Path | None) -> StudyView | RunView:
    """Returns what a report says about the study or run in a folder, whatever its state.

    Args:
        path: None: the current folder, or the only study under ``runs/``.

    Raises:
        OutputError: when there is none, or its files are damaged.
    """
    if is_run(path or Path()):
        run = read_run(path or Path())
        return RunView(run, run_charts(run), run.folder.record() or {})
    return study_view(read_study(path))


def study_view(record: StudyRecord, results: Results | None = None) -> StudyView:
    """Returns what a report says about a study; `results`: where the caller has collected them."""
    environment = record.folder.run.record() or {}
    status = study_status(record)
    if record.examples is None:
        return StudyView(record, status, None, (), {}, None, {}, environment)
    results = results or collect(record.config, record.state, record.examples, record.folder)
    folder = record.folder.path
    measured = costs(folder)
    curves = responses(record.config, record.state, record.examples)
    found = find(record.config, record.state, record.examples, results, measured, curves)
    charts = charts_of(record, results, curves, measured)
    return StudyView(record, status, results, found, measured, answers(folder), charts, environment)
