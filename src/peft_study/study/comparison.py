"""A small study: every method over its own learning rates, trials side by side on one base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from peft_study.config import MethodSpace, StudyConfig, TrainConfig
from peft_study.engine import checkpoint
from peft_study.study.capacity import settle
from peft_study.study.record import environment
from peft_study.study.session import Session, check_methods, describe, open_session, refuse_other_inputs
from peft_study.study.single import with_rate
from peft_study.study.slots import Slots
from peft_study.study.stop import StopRequest
from peft_study.study.store import RunFolder, Status, identity
from peft_study.study.trial_run import Job, Outcome, Watcher

Losses = npt.NDArray[np.float64]
_RESULT = "result.json"


@dataclass(frozen=True, slots=True)
class TrialResult:
    """One row of the comparison.

    Attributes:
        method, learning_rate: the setting (no rate for the untouched base).
        status, reason: how it ended.
        sums_N: summed held-out loss of each example after the last step, in nats; None where it did not finish.
        start_N: the same before step 1.
        trainable: numbers that train.
        seconds: wall time.
    """

    method: str
    learning_rate: float | None
    status: Status
    reason: str | None
    sums_N: Losses | None
    start_N: Losses | None
    trainable: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows, with what they are measured against.

    Attributes:
        results: in the order of the configuration.
        base_N: the untouched base's summed losses, and
        counts_N: the supervised tokens, of each held-out example.
    """

    results: tuple[TrialResult, ...]
    base_N: Losses
    counts_N: npt.NDArray[np.int64]


class StudyWatcher(Watcher, Protocol):
    """Who is told how a study goes."""

    def planned(self, names: list[str]) -> None:
        """Receives the names of all trials before the first."""

    def ended(self, name: str, result: TrialResult) -> None:
        """Receives how a trial ended."""


def trial_name(method: str, rate: float | None) -> str:
    """Returns a trial's name, which is also its folder's."""
    return method if rate is None else f"{method}-{rate:g}"


def compare(
    config: StudyConfig, given: Any, watcher: StudyWatcher, stop: StopRequest, *, overwrite: bool = False
) -> Comparison:
    """Runs every setting and returns the rows; an unfinished study of the same settings is gone on with.

    Raises:
        OutputError: when the output folder holds another study.
        Interrupted: when asked to stop; a checkpoint was written.
    """
    folder = RunFolder(config.output)
    remedy = "replace it with --overwrite, or give another output folder"
    folder.check(config, overwrite=overwrite, remedy=remedy)
    session = open_session(config.model, config.data, config.training, watcher.say)
    check_methods(session, [space.settings for space in config.methods], config.training.seed)
    if folder.check(config, overwrite=overwrite, remedy=remedy):
        refuse_other_inputs(session, folder)
    folder.claim(config, given, overwrite=overwrite, remedy=remedy)
    folder.set_status("running")
    try:
        comparison = _Study(config, folder, session, watcher).run(stop)
    except BaseException as error:
        folder.end(error)
        raise
    folder.set_status("finished")
    checkpoint.prune(folder.checkpoints, keep=1)  # the last one: all have ended, and no tensors
    return comparison


class _Study:
    """The trials of a study, their folders and results."""

    def __init__(self, config: StudyConfig, folder: RunFolder, session: Session, watcher: StudyWatcher) -> None:
        self._config, self._folder, self._session, self._watcher = config, folder, session, watcher
        self._plan = {
            trial_name(space.settings.method, rate): (space, rate) for space in config.methods for rate in _rates(space)
        }

    def run(self, stop: StopRequest) -> Comparison:
        """Runs what has not ended yet, and returns all rows."""
        session, watcher = self._session, self._watcher
        for note in session.notes:
            watcher.say(note)
        self._folder.write_record({**environment(), **describe(session)})
        watcher.planned(list(self._plan))
        resume = checkpoint.newest(self._folder.checkpoints)
        done = resume.decided["done"] if resume else []
        jobs = [self._job(name, done) for name in self._plan]
        for name in done:
            watcher.ended(name, _read(RunFolder(self._place(name))))
        if len(done) < len(jobs):
            news = settle(session, self._folder, jobs, self._config.slots)
            if news:
                watcher.say(news)
        slots = Slots(
            session,
            self._config.logging,
            watcher,
            stop,
            checkpoints=self._folder.checkpoints,
            identity=identity(self._config),
        )
        slots.run(jobs, self._ended, resume=resume)
        results = [_read(job.folder) for job in jobs]
        held_out = session.held_out
        return Comparison(tuple(results), session.base_held_out.of(range(len(held_out))), held_out.counts())

    def _place(self, name: str) -> Path:
        return self._folder.path / "trials" / name

    def _job(self, name: str, done: Sequence[str]) -> Job:
        """Claims a trial's folder; a result from after the last checkpoint is computed again, with the others'."""
        space, rate = self._plan[name]
        config = self._config
        trial = TrainConfig(
            model=config.model,
            data=config.data,
            method=space.settings,
            training=with_rate(config.training, rate),
            logging=config.logging,
            output=self._place(name),
        )
        own = RunFolder(trial.output)
        # the study's claim covers its trials: a folder of a trial can only be of these settings
        own.claim(trial, trial.model_dump(mode="json"), overwrite=False, remedy="give another output folder")
        if name not in done:
            (own.path / _RESULT).unlink(missing_ok=True)
        return Job(name, trial.method, trial.training, own)

    def _ended(self, job: Job, outcome: Outcome) -> None:
        space, rate = self._plan[job.name]
        status: Status = "diverged" if outcome.diverged else "finished"
        values = {
            "method": space.settings.method,
            "learning_rate": rate,
            "status": status,
            "reason": outcome.diverged,
            "sums": None if outcome.end_N is None else outcome.end_N.tolist(),
            "start": outcome.start_N.tolist(),
            "trainable": outcome.trainable.trainable,
            "by_module": outcome.trainable.by_module,
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            "seconds": outcome.seconds,
        }
        job.folder.write(_RESULT, values)
        job.folder.set_status(status, outcome.diverged)
        self._watcher.ended(job.name, _read(job.folder))


def _rates(space: MethodSpace) -> tuple[float | None, ...]:
    return (None,) if space.settings.learning_rates is None else space.learning_rates


def _read(folder: RunFolder) -> TrialResult:
    values = folder.read(_RESULT)
    return TrialResult(
        values["method"],
        values["learning_rate"],
        values["status"],
        values["reason"],
        None if values["sums"] is None else np.array(values["sums"]),
        np.array(values["start"]),
        values["trainable"],
        values["seconds"],
    )
