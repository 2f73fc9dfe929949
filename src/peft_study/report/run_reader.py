"""Reads single runs (`peft-study finetune`) in any state, also while another process trains; nothing is written."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from peft_study.config import TrainConfig, validate
from peft_study.errors import UserError
from peft_study.report.status import RunState, disk, state_of
from peft_study.report.study_reader import RUNS, estimate, is_study, read_study, sizes
from peft_study.statistics import Estimate
from peft_study.storage import metrics
from peft_study.storage.run_dir import RunFolder
from peft_study.storage.study_dir import Owner, owner

_RECENT = 20
"""Logged steps whose median is the speed."""


@dataclass(frozen=True, slots=True)
class HeldOutPoint:
    """The held-out loss after a step, and how far it lies above the untouched base's.

    `best`: with early stopping, the lowest up to there; None without.
    """

    step: int
    loss: Estimate
    minus_base: Estimate
    best: bool | None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A single run as its folder tells it.

    Attributes:
        folder, config: of it.
        state, reason: `killed`: its process ended without writing why; `unclear`: it began on another machine.
        owner: who trains it.
        resume: the command that resumes it; None where it runs, has ended, or was not begun by `peft-study finetune`.
        began: when its last process had loaded model and data, and `elapsed` since, up to now or the last measurement.
        step, total: optimizer steps written down, and in all (None: the run was killed before it knew).
        checkpoint: step of the newest checkpoint.
        loss: of the last logged batch, in nats a token.
        speed: data tokens a second, of late.
        curve: held-out losses.
        files: below its folder, with their sizes in bytes.
        disk: bytes by part of the folder.
    """

    folder: RunFolder
    config: TrainConfig
    state: RunState
    reason: str | None
    owner: Owner | None
    resume: str | None
    began: datetime | None
    elapsed: timedelta | None
    step: int
    total: int | None
    checkpoint: int | None
    loss: float | None
    speed: float | None
    curve: tuple[HeldOutPoint, ...]
    files: dict[str, int]
    disk: dict[str, int]

    @property
    def kept(self) -> HeldOutPoint | None:
        """The held-out loss of the adapter: the best so far with early stopping, else the last."""
        best = [point for point in self.curve if point.best] or self.curve
        return best[-1] if best else None


@dataclass(frozen=True, slots=True)
class Entry:
    """A run or a study in a folder of several.

    Attributes:
        path: of it.
        what: its method; of a study all of them.
        state: as of `RunStatus`, or `unreadable`: of another version, or damaged.
        progress: optimizer steps of a run, trials of a study.
        run: None for a study.
    """

    path: Path
    what: str
    state: str
    progress: str
    run: RunStatus | None


def is_run(path: Path) -> bool:
    """Returns whether a single run lies in a folder: no study, and no trial of one."""
    values = RunFolder(path).read_if_there("config.resolved.json") if path.is_dir() else None
    above = path.resolve().parent
    return isinstance(values, dict) and "method" in values and not (above.name == "trials" and is_study(above.parent))


def read_run(path: Path) -> RunStatus:
    """Reads the run in a folder, which `is_run`.

    Raises:
        OutputError: when another version of this program wrote it, or its files are damaged.
    """
    folder = RunFolder(path)
    folder.refuse_other_version()
    values = folder.read("config.resolved.json")
    config = validate(TrainConfig, values, where=str(path / "config.resolved.json"))
    writer = owner(folder)
    state, reason = state_of(folder, writer)
    record = folder.record() or {}
    records = metrics.read(folder.metrics)
    train = [each for each in records if each["event"] == "train"]
    began = datetime.fromisoformat(record["date"]) if "date" in record else None
    rows, training = record.get("data", {}).get("train_rows"), config.training
    total = training.steps or (None if rows is None else training.epochs * math.ceil(rows / training.batch_size))
    stopped = state in ("killed", "interrupted", "failed")
    speeds = [each["tokens_per_second"] for each in train[-_RECENT:] if each["tokens_per_second"]]
    found = [int(each.parent.name[5:]) for each in folder.checkpoints.glob("step_*/checkpoint.json")]
    files = sizes(path)
    return RunStatus(
        folder,
        config,
        state,
        reason,
        writer,
        _resume(folder.read_if_there("config.given.json"), config, path) if stopped else None,
        began,
        None if began is None else _elapsed(folder, began, state),
        max((each["step"] for each in records), default=0),
        total,
        max(found, default=None),
        train[-1]["loss"] if train else None,
        statistics.median(speeds) if speeds else None,
        tuple(_point(each) for each in records if each["event"] == "held_out"),
        files,
        disk(files),
    )


def list_folder(path: Path | None) -> tuple[Entry, ...]:
    """Returns the runs and studies in a folder: those directly below it, or itself where it is a run.

    Args:
        path: None: the current folder where it is a run, else ``runs/`` where no study lies in it.
    """
    if path is None:
        studies = is_study(Path()) or any(is_study(below) for below in RUNS.glob("*"))
        path = Path() if studies or is_run(Path()) else RUNS
        if studies:
            return ()
    if is_run(path):
        return (_entry(path),)
    if is_study(path) or not path.is_dir():
        return ()
    return tuple(_readable(below) for below in sorted(path.iterdir()) if is_run(below) or is_study(below))


def _readable(path: Path) -> Entry:
    try:
        return _entry(path)
    except UserError:
        return Entry(path, "-", "unreadable", "-", None)


def _entry(path: Path) -> Entry:
    if is_run(path):
        run = read_run(path)
        progress = str(run.step) if run.total is None else f"{run.step}/{run.total}"
        return Entry(path, run.config.method.method, run.state, progress, run)
    study = read_study(path)
    ended = sum(trial.status not in ("running", "interrupted") for trial in study.state.trials.values())
    state, _ = state_of(study.folder.run, study.owner)
    return Entry(path, f"study of {', '.join(study.config.methods)}", state, f"{ended} trials", None)


def _point(record: Mapping[str, Any]) -> HeldOutPoint:
    loss, above = (
        estimate(record[name], record[f"{name}_low"], record[f"{name}_high"]) for name in ("loss", "minus_base")
    )
    return HeldOutPoint(record["step"], loss, above, record.get("best"))


def _elapsed(folder: RunFolder, began: datetime, state: RunState) -> timedelta:
    end = datetime.now(UTC)
    if state not in ("running", "unclear"):
        times = [path.stat().st_mtime for path in (folder.metrics, folder.path / "status.json") if path.exists()]
        end = datetime.fromtimestamp(max(times), UTC)
    return max(end - began, timedelta())


def _resume(given: Any, config: TrainConfig, path: Path) -> str | None:
    """Returns the command line of a run's settings: its arguments, and what the launcher's made of the others.

    The launcher's arguments are not kept, as they may hold secrets, but what they change is in the settings.
    """
    if not isinstance(given, dict) or "model_name_or_path" not in given:
        return None
    training, model = config.training, config.model
    device, steps = given.get("per_device_train_batch_size", 8), given.get("gradient_accumulation_steps", 1)
    made: dict[str, Any] = {
        "num_processes": None if device * steps == training.batch_size else training.batch_size // (device * steps),
        "clip_grad_norm": training.clip_norm,
        "dtype": None if model.dtype == "auto" else model.dtype,
        "device": None if model.device == "auto" else model.device,
    }
    words = ["peft-study", "finetune"]
    for name, value in {**made, **given, "output_dir": str(path)}.items():
        if name == "overwrite_output_dir" or value is None:
            continue
        words.append(f"--{name}")
        if value is not True:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            words += map(str, values)
    return shlex.join(words)
