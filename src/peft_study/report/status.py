"""The state of a study, for `peft-study status`."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import Literal

from peft_study.report.results import Row, row_of
from peft_study.report.study_reader import StudyRecord, progress, sizes
from peft_study.search.trials import best_first
from peft_study.statistics import Estimate, mean_loss
from peft_study.storage.run_dir import RunFolder
from peft_study.storage.study_dir import Owner

_PARTS = {"checkpoints": "checkpoints", "adapter": "adapters", "tensorboard": "event files"}
"""What a folder of that name holds."""
RunState = Literal["running", "unclear", "killed", "interrupted", "failed", "diverged", "finished"]


@dataclass(frozen=True, slots=True)
class MethodStatus:
    """The state of a method.

    Attributes:
        method: name of its space.
        to_come: settings that its search has not begun.
        counts: settings of its search by status.
        range_tests: rates of its range test that have ended, of those that have begun.
        finals: that have finished, of all that are planned.
        best: setting of its search so far: one seed, chosen among several.
    """

    method: str
    to_come: int
    counts: dict[str, int]
    range_tests: tuple[int, int]
    finals: tuple[int, int]
    best: Row | None


@dataclass(frozen=True, slots=True)
class StudyStatus:
    """The state of a study.

    Attributes:
        state: `killed`: its process ended without writing why; `unclear`: it began on another machine.
        reason: of an interruption or failure.
        resume: the command that resumes it; None where it runs or has finished.
        elapsed: since it began, up to now or its end, pauses included; None where it was killed before.
        base: dev loss of the untouched base.
        methods: in the order of the file.
        unfinished: of each trial that has not ended: name, steps taken, steps in all.
        disk: bytes by part of the folder.
    """

    state: RunState
    reason: str | None
    resume: str | None
    elapsed: timedelta | None
    base: Estimate | None
    methods: tuple[MethodStatus, ...]
    unfinished: tuple[tuple[str, int, int | None], ...]
    disk: dict[str, int]


def study_status(study: StudyRecord) -> StudyStatus:
    """Returns the state of a study."""
    state, reason = state_of(study.folder.run, study.owner)
    path = study.folder.path
    given = shlex.quote(str(path / "config.given.json"))
    stopped = state not in ("running", "unclear", "finished")
    return StudyStatus(
        state,
        reason,
        f"peft-study run {given} -o {shlex.quote(str(path))}" if stopped else None,
        _elapsed(study, state),
        None if study.examples is None else mean_loss(study.examples.base_N, study.examples.counts_N),
        tuple(_method(study, name) for name in study.config.searched),
        tuple(
            (trial.name, progress(study, trial), trial.settings.training.steps)
            for trial in study.state.trials.values()
            if trial.status in ("running", "interrupted")
        ),
        disk(sizes(path)),
    )


def state_of(folder: RunFolder, writer: Owner | None) -> tuple[RunState, str | None]:
    """Returns the state of a study or a single run, and its reason; `writer`: the process that writes to it."""
    if writer is not None:
        return "running" if writer.certain else "unclear", None
    status, reason = folder.status() or ("running", None)
    if status == "running" or status == "pruned":
        return "killed", None
    return status, reason


def _elapsed(study: StudyRecord, state: str) -> timedelta | None:
    if study.began is None:
        return None
    end = datetime.now(UTC)
    if state != "running":
        written = [study.folder.path / name for name in ("journal.jsonl", "status.json")]
        times = [path.stat().st_mtime for path in written if path.exists()]
        end = datetime.fromtimestamp(max(times), UTC) if times else study.began
    return max(end - study.began, timedelta())


def _method(study: StudyRecord, method: str) -> MethodStatus:
    state, config = study.state, study.config
    searched, tests = state.of(method, "search"), state.of(method, "range_test")
    finals, all_finals = state.finals(method, config)
    best = best_first(searched)
    return MethodStatus(
        method,
        state.to_come(method, config, state.due(method, config)),
        dict(Counter(trial.status for trial in searched)),
        (sum(t.status not in ("running", "interrupted") for t in tests), len(tests)),
        (sum(t.status == "finished" for t in finals), all_finals),
        row_of(best[0], state, study.examples, study.folder) if best and study.examples is not None else None,
    )


def disk(files: Mapping[str, int]) -> dict[str, int]:
    """Returns the bytes of the parts of a study's or run's folder, from those of its files (`sizes`)."""
    found = dict.fromkeys([*_PARTS.values(), "everything else"], 0)
    for name, size in files.items():
        folders = [folder for folder in _PARTS if folder in PurePosixPath(name).parts]
        found[_PARTS[folders[0]] if folders else "everything else"] += size
    return found
