"""Reads a study in any state, also while another process runs it; nothing is written or locked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from peft_study.config import StudyConfig
from peft_study.errors import ConfigError, OutputError, nearest
from peft_study.report.results import Row, row_of
from peft_study.search.trials import State, StudyState, TrialRecord
from peft_study.statistics import Estimate
from peft_study.storage import held_out, journal, metrics
from peft_study.storage.held_out import HeldOut
from peft_study.storage.study_dir import Owner, StudyFolder, owner

RUNS = Path("runs")
"""Where a study is looked for when none is named and the current folder is none."""
Order = Literal["began", "name", "method", "status", "dev", "steps", "tokens", "seconds"]
ORDERS: tuple[str, ...] = get_args(Order)
STATES: tuple[str, ...] = get_args(State)


@dataclass(frozen=True, slots=True)
class StudyRecord:
    """A study as its folder tells it.

    Attributes:
        folder, config, state: of it; unfinished trials are `interrupted` where no process runs the study.
        examples: held out; None where it was killed before it wrote them, so it has no trials.
        began: when its first start had loaded model and data.
        owner: who runs it.
    """

    folder: StudyFolder
    config: StudyConfig
    state: StudyState
    examples: HeldOut | None
    began: datetime | None
    owner: Owner | None


@dataclass(frozen=True, slots=True)
class Details:
    """Everything about one trial.

    Attributes:
        row: its numbers.
        curve: steps and dev losses.
        files: below its folder, with their sizes in bytes.
    """

    row: Row
    curve: tuple[tuple[int, Estimate], ...]
    files: dict[str, int]


def find_study(path: Path | None) -> StudyFolder:
    """Returns the folder of the study that is meant.

    Args:
        path: of the folder; None: the current folder where it is a study, else the only one under ``runs/``.

    Raises:
        OutputError: when there is none, or several under ``runs/``.
    """
    if path is not None:
        if not path.exists():
            raise OutputError("there is no such folder", where=str(path), remedy="give the output folder of a study")
        if not path.is_dir():
            raise OutputError("is a file", where=str(path), remedy="give the output folder of the study")
        return StudyFolder(path)
    if is_study(Path()):
        return StudyFolder(Path())
    found = sorted(folder for folder in RUNS.glob("*") if is_study(folder)) if RUNS.is_dir() else []
    if len(found) == 1:
        return StudyFolder(found[0])
    if found:
        names = ", ".join(str(folder) for folder in found[:6]) + (", ..." if len(found) > 6 else "")
        what = f"there are {len(found)} studies under runs/: {names}"
        raise OutputError(what, remedy="say which one; `peft-study list runs` tells about all")
    raise OutputError("there is no study here or under runs/", remedy="give the output folder of a study")


def read_study(path: Path | None) -> StudyRecord:
    """Reads a study.

    Raises:
        OutputError: when there is none, it has another schema, or its files are damaged.
        ConfigError: when its settings cannot be used.
    """
    folder = find_study(path)
    config = folder.config()
    writer = owner(folder.run)
    state = _folded(folder)
    kept = held_out.kept(folder.run)
    if kept is None and state.trials:
        raise OutputError(
            "examples.json is missing", where=str(folder.path), remedy="put it back, or run the study again"
        )
    if writer is None:
        for trial in state.running():
            trial.status = "interrupted"
    return StudyRecord(folder, config, state, kept[0] if kept else None, kept[1] if kept else None, writer)


def find_trials(names: Sequence[str], study: Path | None) -> tuple[StudyRecord, tuple[TrialRecord, ...]]:
    """Returns a study and some of its trials.

    Args:
        names: of the trials, or the paths of their folders, STUDY/trials/NAME; a path gives the study for all of them.
        study: the study's folder, or None as in `find_study`.

    Raises:
        OutputError: as in `read_study`.
        ConfigError: when there is no such trial, or they are of two studies: their examples may differ.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if path.parent.name == "trials":
            if study is not None:
                raise ConfigError("the path already gives the study", where=name, remedy="leave out -s, or give a name")
            found.append(path.parent.parent)
            if found[0].resolve() != found[-1].resolve():
                raise ConfigError("trials of two studies are not compared", where=name, remedy="give two of one study")
        elif len(path.parts) != 1:
            raise ConfigError("is no path of a trial", where=name, remedy="give its name, or STUDY/trials/NAME")
    opened = read_study(found[0] if found else study)
    return opened, tuple(_trial(opened, Path(name).name) for name in names)


def _trial(study: StudyRecord, name: str) -> TrialRecord:
    """Returns a trial by its name."""
    trials = study.state.trials
    if name in trials:
        return trials[name]
    where = str(study.folder.path)
    if not trials:
        raise ConfigError(f"has no trials yet, so none named {name!r}", where=where)
    remedy = nearest(name, trials)
    if len(trials) > 12 and "?" not in remedy:
        remedy = "`peft-study list` names them"
    raise ConfigError(f"has no trial {name!r}", where=where, remedy=remedy)


def rows(
    study: StudyRecord, *, method: str | None = None, status: str | None = None, sort: str | None = None
) -> tuple[Row, ...]:
    """Returns trials with their numbers.

    Args:
        study: whose.
        method: only those of this one (name of its space, or ``none``).
        status: only those with this status.
        sort: one of `ORDERS`; least first, trials without a value last.

    Raises:
        ConfigError: when one of these is unknown.
    """
    for given, valid, what in (
        (method, {*study.config.methods, *(t.method for t in study.state.trials.values())}, "--method"),
        (status, STATES, "--status"),
        (sort, ORDERS, "--sort"),
    ):
        if given is not None and given not in valid:
            raise ConfigError(f"unknown {given!r}", where=what, remedy=nearest(given, valid))
    if study.examples is None:
        return ()
    chosen = (
        trial
        for trial in study.state.trials.values()
        if method in (None, trial.method) and status in (None, trial.status)
    )
    found = [row_of(trial, study.state, study.examples, study.folder) for trial in chosen]
    return tuple(found if sort in (None, "began") else sorted(found, key=lambda row: _key(row, sort or "")))


def _key(row: Row, sort: str) -> tuple[bool, Any]:
    if sort == "dev":
        return row.dev is None, row.dev.value if row.dev else 0
    if sort in ("name", "method", "status"):
        return False, getattr(row.trial, sort)
    value = row.trial.facts.get(sort)
    return value is None, value or 0


def details(study: StudyRecord, trial: TrialRecord) -> Details:
    """Returns everything about one trial."""
    assert study.examples is not None
    folder = study.folder.trial(trial.name)
    curve = [
        (record["step"], estimate(record["loss"], record["loss_low"], record["loss_high"]))
        for record in metrics.read(folder.metrics)
        if record["event"] == "held_out"
    ]
    return Details(row_of(trial, study.state, study.examples, study.folder), tuple(curve), sizes(folder.path))


def estimate(value: float | None, low: float | None, high: float | None) -> Estimate:
    """Returns an estimate from metrics.jsonl, where null means a number that is not finite."""
    return Estimate(
        math.nan if value is None else value, -math.inf if low is None else low, math.inf if high is None else high
    )


def progress(study: StudyRecord, trial: TrialRecord) -> int:
    """Returns the optimizer steps that a trial under way has written down."""
    records = metrics.read(study.folder.trial(trial.name).metrics)
    return max((record["step"] for record in records), default=0)


def sizes(folder: Path) -> dict[str, int]:
    """Returns the files below a folder with their sizes in bytes; those that vanish meanwhile are left out.

    A further name of the same file takes no room.
    """
    found, linked = {}, set()
    for path in sorted(folder.rglob("*")):
        try:
            if path.is_file():
                stat = path.stat()
                found[path.relative_to(folder).as_posix()] = 0 if stat.st_ino in linked else stat.st_size
                if stat.st_nlink > 1:
                    linked.add(stat.st_ino)
        except OSError:
            continue
    return found


def _folded(folder: StudyFolder) -> StudyState:
    state = StudyState()
    for number, event in enumerate(journal.read(folder.journal), start=1):
        try:
            state.apply(event)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise OutputError(
                f"line {number} is damaged",
                where=str(folder.journal),
                remedy="put the file back, or start a new study",
            ) from error
    return state


def is_study(folder: Path) -> bool:
    """Returns whether a folder is the output folder of a study."""
    values = StudyFolder(folder).run.read_if_there("config.resolved.json")
    return isinstance(values, dict) and "methods" in values
