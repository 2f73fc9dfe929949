"""Runs the trials of a run through the engine's slots: as one leaves, the next enters at the next row.

waiting --begin--> in a slot --row, row, row--> finished | diverged --end--> the caller
                       |  held-out losses of all that are due, in the same rows
                       +-- checkpoint of all slots at once, between two rows
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_study.config import LoggingConfig
from peft_study.engine import checkpoint
from peft_study.engine.engine import Event
from peft_study.engine.trial import Trial
from peft_study.errors import OutputError
from peft_study.methods.registry import is_exclusive
from peft_study.study.session import Session
from peft_study.study.stop import Interrupted, StopRequest
from peft_study.study.trial_run import Job, Losses, Outcome, TrialRun, Watcher

Ended = Callable[[Job, Outcome], None]

CHECKPOINT_SHARE = 0.05
"""Writing checkpoints by the clock may take this share of the time at most."""


class Slots:
    """The trials of one run on their way through the engine.

    Args:
        session: what they share.
        logging: how often things are written.
        watcher: is told.
        stop: asked between rows.
        checkpoints: folder of the run's checkpoints.
        identity: of the run's settings, kept in them.
    """

    def __init__(
        self,
        session: Session,
        logging: LoggingConfig,
        watcher: Watcher,
        stop: StopRequest,
        *,
        checkpoints: Path,
        identity: str,
    ) -> None:
        self._session, self._logging, self._watcher, self._stop = session, logging, watcher, stop
        self._checkpoints, self._identity = checkpoints, identity
        self._engine = session.engine
        self._running: dict[str, TrialRun] = {}
        self._done: list[str] = []
        self._steps_done = 0  # optimizer steps of the trials that have ended
        self._initial: dict[str, Losses] = {}  # held-out losses before step 1, by what decides them
        self._saved_at = time.monotonic()
        self._save_seconds = 0.0
        self._mark = 0
        self._several = False

    def run(self, jobs: Sequence[Job], ended: Ended, *, resume: checkpoint.Found | None = None) -> None:
        """Runs the jobs; those that change the base come last, each alone.

        Args:
            jobs: all of the run; those that had ended at the checkpoint are passed by.
            ended: receives each job that ends.
            resume: the cut to go on from.

        Raises:
            Interrupted: when asked to stop; a checkpoint was written.
        """
        waiting = sorted(jobs, key=lambda job: is_exclusive(job.method))
        self._several = len(jobs) > 1
        held_out = self._session.base_held_out
        held_out.of(range(len(self._session.held_out)))
        held_out.save()
        try:
            if resume is not None:
                self._resume(resume, {job.name: job for job in waiting}, ended)
                waiting = [job for job in waiting if job.name not in {*self._done, *self._running}]
            while waiting or self._running:
                self._enter(waiting, ended)
                if self._running:
                    self._after(self._engine.step(), ended)
                self._checkpoint(unfinished=bool(waiting or self._running))
        finally:
            for run in list(self._running.values()):
                with contextlib.suppress(OutputError):  # a full disk refuses the last flush once more
                    run.close()
                self._engine.evict(run.trial)
            self._running.clear()
        self._session.base_train.save()

    def _resume(self, found: checkpoint.Found, jobs: Mapping[str, Job], ended: Ended) -> None:
        self._done, self._steps_done = list(found.decided["done"]), found.decided["steps_done"]
        self._initial = {key: np.array(values) for key, values in found.decided["initial"].items()}
        runs = {name: self._new(jobs[name]) for name in found.trials}
        checkpoint.load(self._engine, found, {name: run.trial for name, run in runs.items()})
        self._running = runs
        for run in runs.values():
            self._watcher.say(f"{run.job.name}: goes on from step {run.trial.step} of {run.trial.total_steps}")
            run.begin(self._initial[run.job.start], from_step=run.trial.step)
        self._mark = self._progress_mark()
        self._evaluate([run for run in runs.values() if run.trial.finished], ended, told=True)

    def _new(self, job: Job) -> TrialRun:
        return TrialRun(job, self._session, self._logging, self._watcher)

    def _enter(self, waiting: list[Job], ended: Ended) -> None:
        """Fills the free slots from the front of the queue, and measures the losses before step 1 of all at once."""
        entering: list[TrialRun] = []
        while waiting and self._engine.has_room(exclusive=is_exclusive(waiting[0].method)):
            run = self._new(waiting.pop(0))
            entering.append(run)
            if run.trial.parameters:
                self._engine.admit(run.trial)
                self._running[run.job.name] = run
        unknown = {run.job.start: run for run in entering if run.job.start not in self._initial}
        losses = self._held_out([run.trial for run in unknown.values()])
        self._initial |= dict(zip(unknown, losses, strict=True))
        for run in entering:
            start_N = self._initial[run.job.start]
            run.begin(start_N, from_step=None)
            if not run.trial.parameters:  # the untouched base: there is nothing to train
                run.tell(start_N)
                self._end(run, run.outcome(start_N), ended)

    def _after(self, events: Sequence[Event], ended: Ended) -> None:
        """Writes down what a row completed, evaluates all that are due together, and lets go of those that ended."""
        due = []
        for event in events:
            run = self._running[event.trial.name]
            if event.report is None:
                self._end(run, run.outcome(None, event.diverged), ended)
                continue
            run.log(event.report)
            if run.evaluation_due and not event.report.skipped:
                due.append(run)
        self._evaluate(due, ended)

    def _evaluate(self, due: Sequence[TrialRun], ended: Ended, *, told: bool = False) -> None:
        losses = self._held_out([run.trial for run in due])
        for run, sums_N in zip(due, losses, strict=True):
            if not np.isfinite(sums_N).all():
                reason = f"the held-out loss became {sums_N.sum()} after step {run.trial.step}"
                self._end(run, run.outcome(None, reason), ended)
                continue
            if not told:
                run.tell(sums_N)
            if run.trial.finished:
                if not self._several:  # a checkpoint that was asked for at the last step is one of the trial, too
                    self._save_at_mark()
                run.save_adapter()
                self._end(run, run.outcome(sums_N), ended)

    def _held_out(self, trials: Sequence[Trial]) -> list[Losses]:
        rows = self._session.held_out
        return self._engine.evaluate(trials, rows, range(len(rows))) if trials else []

    def _end(self, run: TrialRun, outcome: Outcome, ended: Ended) -> None:
        run.close()
        if run.trial in self._engine.trials:
            self._engine.evict(run.trial)
        self._running.pop(run.job.name, None)
        self._done.append(run.job.name)
        self._steps_done += run.trial.step
        ended(run.job, outcome)

    def _checkpoint(self, *, unfinished: bool) -> None:
        """Saves where it is time to, and stops where that was asked."""
        if unfinished and self._stop_asked():
            self._save()
            raise Interrupted(f"stopped {self._where()}, with a checkpoint; the same command goes on from there")
        # a cut without trials in the slots costs next to nothing, so one is made whenever nothing is under way
        if not self._save_at_mark() and (self._clock_due() if self._running else self._several):
            self._save()

    def _save_at_mark(self) -> bool:
        mark, before = self._progress_mark(), self._mark
        self._mark = mark
        if mark != before:
            self._save()
        return mark != before

    def _stop_asked(self) -> bool:
        return bool(self._session.processes.total([float(self._stop.asked)])[0])

    def _where(self) -> str:
        if len(self._running) == 1 and not self._done:
            trial = next(iter(self._running.values())).trial
            return f"at step {trial.step} of {trial.total_steps} of {trial.name}"
        return f"with {len(self._running)} trials under way and {len(self._done)} ended"

    def _steps(self) -> int:
        """Returns the optimizer steps of all trials so far: the number of a checkpoint."""
        return self._steps_done + sum(run.trial.step for run in self._running.values())

    def _progress_mark(self) -> int:
        """Returns a number that changes each time every slot has taken `checkpoint_every` steps more."""
        every = self._logging.checkpoint_every
        if every is None or not self._running:
            return self._mark
        if every == "epoch":
            every = max(run.trial.order.steps_per_epoch for run in self._running.values())
        return self._steps() // (every * len(self._running))

    def _clock_due(self) -> bool:
        minutes = self._logging.checkpoint_minutes
        if minutes is None or self._logging.checkpoint_every is not None:
            return False
        return time.monotonic() - self._saved_at >= max(60 * minutes, self._save_seconds / CHECKPOINT_SHARE)

    def _save(self) -> None:
        if not self._session.processes.writes:
            return
        started = time.monotonic()
        self._session.base_train.save()  # what the cut's later numbers may draw on
        decided: dict[str, Any] = {
            "done": self._done,
            "steps_done": self._steps_done,
            "initial": {key: sums_N.tolist() for key, sums_N in self._initial.items()},
        }
        checkpoint.save(self._engine, self._checkpoints, self._steps(), self._identity, decided)
        checkpoint.prune(self._checkpoints, self._logging.keep_checkpoints)
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - started
