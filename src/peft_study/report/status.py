"""How a study stands: what `peft-study status` tells."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import Literal

from peft_study.report.study_reader import Study, progress, sizes
from peft_study.search.trials import best_first
from peft_study.statistics import Estimate, difference, mean_loss
from peft_study.storage.study_dir import Owner

PARTS = ("checkpoints", "adapters", "event files", "everything else")


@dataclass(frozen=True, slots=True)
class Best:
    """The best setting of a method's search so far: one seed, chosen among several."""

    name: str
    dev: Estimate
    minus_base: Estimate


@dataclass(frozen=True, slots=True)
class MethodStatus:
    """How a method stands.

    Attributes:
        method: name of its space.
        to_come: settings that its search has not begun.
        counts: settings of its search by status.
        range_tests: rates of its range test that have ended, of those that have begun.
        finals: retrained settings with their seeds that have finished, of those that are to come in all.
        best: of its search, so far.
    """

    method: str
    to_come: int
    counts: dict[str, int]
    range_tests: tuple[int, int]
    finals: tuple[int, int]
    best: Best | None


@dataclass(frozen=True, slots=True)
class StudyStatus:
    """How a study stands.

    Attributes:
        state: `killed`: its process ended without a word; `unclear`: it began on another machine.
        reason: of an interruption or failure.
        owner: who runs it.
        go_on: the command that goes on with it; None where it runs or has finished.
        began: when; None where it was killed before.
        elapsed: since then, up to now or its end, pauses included.
        base: dev loss of the untouched base.
        methods: in the order of the file.
        under_way: name, steps taken, steps in all.
        winner: name of the winning setting, once chosen.
        disk: bytes by part of the folder.
    """

    state: Literal["running", "unclear", "killed", "interrupted", "failed", "finished"]
    reason: str | None
    owner: Owner | None
    go_on: str | None
    began: datetime | None
    elapsed: timedelta | None
    base: Estimate | None
    methods: tuple[MethodStatus, ...]
    under_way: tuple[tuple[str, int, int | None], ...]
    winner: str | None
    disk: dict[str, int]


def study_status(study: Study) -> StudyStatus:
    """Returns how a study stands."""
    state, reason = _state(study)
    path = study.folder.path
    given = shlex.quote(str(path / "config.given.json"))
    stopped = state not in ("running", "unclear", "finished")
    winner = study.state.winner
    return StudyStatus(
        state,
        reason,
        study.owner,
        f"peft-study run {given} -o {shlex.quote(str(path))}" if stopped else None,
        study.began,
        _elapsed(study, state),
        None if study.examples is None else mean_loss(study.examples.base_N, study.examples.counts_N),
        tuple(_method(study, name) for name in study.config.searched),
        _under_way(study),
        None if winner is None else f"{winner[0]}-{winner[1]:03d}",
        _disk(study),
    )


def _state(
    study: Study,
) -> tuple[Literal["running", "unclear", "killed", "interrupted", "failed", "finished"], str | None]:
    if study.owner is not None:
        return "running" if study.owner.certain else "unclear", None
    status, reason = study.folder.run.status() or ("running", None)
    if status == "finished" or status == "failed" or status == "interrupted":
        return status, reason
    return "killed", None


def _elapsed(study: Study, state: str) -> timedelta | None:
    if study.began is None:
        return None
    end = datetime.now(UTC)
    if state != "running":
        written = [study.folder.path / name for name in ("journal.jsonl", "status.json")]
        times = [path.stat().st_mtime for path in written if path.exists()]
        end = datetime.fromtimestamp(max(times), UTC) if times else study.began
    return max(end - study.began, timedelta())


def _method(study: Study, method: str) -> MethodStatus:
    state, config, examples = study.state, study.config, study.examples
    searched, tests = state.of(method, "search"), state.of(method, "range_test")
    finals, all_finals = state.finals(method, config)
    best = None
    for trial in best_first(searched)[:1]:
        assert trial.last is not None
        assert examples is not None
        counts_N = examples.counts_N
        best = Best(trial.name, mean_loss(trial.last, counts_N), difference(trial.last, examples.base_N, counts_N))
    return MethodStatus(
        method,
        0 if state.deadline else state.due(method, config) - len(state.present(method)),
        dict(Counter(trial.status for trial in searched)),
        (sum(t.status not in ("running", "interrupted") for t in tests), len(tests)),
        (sum(t.status == "finished" for t in finals), all_finals),
        best,
    )


def _under_way(study: Study) -> tuple[tuple[str, int, int | None], ...]:
    return tuple(
        (trial.name, progress(study, trial), trial.settings.training.steps)
        for trial in study.state.trials.values()
        if trial.status in ("running", "interrupted")
    )


def _disk(study: Study) -> dict[str, int]:
    found = dict.fromkeys(PARTS, 0)
    for name, size in sizes(study.folder.path).items():
        parts = PurePosixPath(name).parts
        part = (
            "checkpoints"
            if parts[0] == "checkpoints"
            else "adapters"
            if "adapter" in parts
            else "event files"
            if "tensorboard" in parts
            else "everything else"
        )
        found[part] += size
    return found
