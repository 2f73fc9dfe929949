"""Everything that a report says about one study, read from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_study.report.chart_data import Charts, charts_of
from peft_study.report.results import Results, collect
from peft_study.report.status import StudyStatus, study_status
from peft_study.report.study_reader import StudyRecord
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
    findings: tuple[Any, ...]
    costs: Mapping[str, Any]
    answers: Any | None
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


def view_of(record: StudyRecord) -> StudyView:
    """Returns what a report says about a study in any state."""
    environment = record.folder.run.record() or {}
    status = study_status(record)
    if record.examples is None:
        return StudyView(record, status, None, (), {}, None, {}, environment)
    results = collect(record.config, record.state, record.examples, record.folder)
    found = _findings(record, results)
    charts = charts_of(record, results, (), {})
    return StudyView(record, status, results, found, {}, None, charts, environment)


def _findings(record: StudyRecord, results: Results) -> tuple[Any, ...]:
    from types import SimpleNamespace

    from peft_study.report.findings import sentences

    topics = {"winner": "winner", "ranking": "ranking"}
    return tuple(
        SimpleNamespace(topic=topics.get(text.split(" ")[0], "search"), method=None, text={"en": text, "zh": text}, trials=())
        for text in sentences(record.config, record.state, record.examples, results)
    )
