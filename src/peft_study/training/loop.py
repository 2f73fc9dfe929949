"""The trials of a run on their way through the engine's slots.

    commands --enter--> in a slot --row, row, row--> events: evaluated | ended --> the caller decides --> commands
                          |  held-out losses of all that are due, in the same rows
                          +-- checkpoint of all slots at once, when all events have been answered

The caller decides what enters and what leaves; nothing here knows why.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peft_study.config import LoggingConfig
from peft_study.engine import checkpoint
from peft_study.engine.engine import StepEvent
from peft_study.engine.row import DoesNotFit
from peft_study.errors import OutputError, UserError
from peft_study.statistics import Losses
from peft_study.training.fitting import refuse_unfit, room_for
from peft_study.training.session import Session
from peft_study.training.trial_run import Ending, Outcome, TrialPlan, TrialRun, Watcher

CHECKPOINT_SHARE = 0.05
"""Writing checkpoints by the clock may take this share of the time at most."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The held-out losses of a trial after a step (0: before the first); `sums_N` in nats, summed over each example."""

    name: str
    step: int
    sums_N: Losses


@dataclass(frozen=True, slots=True)
class Ended:
    """A trial that is no longer in the engine."""

    name: str
    outcome: Outcome


TrialEvent = Evaluated | Ended


@dataclass(frozen=True, slots=True)
class Commands:
    """Commands for the time before the next row.

    Attributes:
        enter: trials to start or resume, in order; there must be room.
        leave: trials to stop, with the reason.
        decided: JSON values kept in a checkpoint made now.
    """

    enter: Sequence[TrialPlan] = ()
    leave: Mapping[str, str] = field(default_factory=dict)
    decided: Mapping[str, Any] = field(default_factory=dict)


class Slots:
    """An engine with its trials, one row at a time.

    Args:
        session: shared by the trials.
        logging: intervals of logging and checkpoints.
        watcher: receives the progress.
        checkpoints: folder of the run's checkpoints.
        identity: of the run's settings, kept in them.
        tolerant: a trial that cannot be made, or that does not fit into the memory, ends as failed; else its error
            ends the run.
    """

    def __init__(
        self,
        session: Session,
        logging: LoggingConfig,
        watcher: Watcher,
        *,
        checkpoints: Path,
        identity: str,
        tolerant: bool = False,
    ) -> None:
        self._session, self._logging, self._watcher = session, logging, watcher
        self._checkpoints, self._identity, self._tolerant = checkpoints, identity, tolerant
        self._engine = session.engine
        self._running: dict[str, TrialRun] = {}
        self._steps_done = 0  # optimizer steps of the trials that have ended
        # held-out losses before step 1, by what decides them; the base's own are known and kept on disk
        self._initial = {"base": session.base_held_out.of(range(len(session.held_out)))}
        session.base_held_out.save()
        self._saved_at = time.monotonic()
        self._save_seconds = 0.0
        self._ended_since = False  # a trial ended after the last checkpoint
        self._marks: dict[str, int] = {}  # steps of each trial here when a checkpoint was last due by steps

    @property
    def running(self) -> tuple[str, ...]:
        """Names of the trials in the slots."""
        return tuple(self._running)

    @property
    def steps(self) -> int:
        """Optimizer steps of all trials so far: the number of a checkpoint."""
        return self._steps_done + sum(run.trial.step for run in self._running.values())

    def room(self) -> int:
        """Returns how many trials could enter now; one that changes the base needs all slots."""
        engine = self._engine
        assert engine.slots is not None
        alone = any(trial.adapter.exclusive for trial in engine.trials)
        return 0 if alone else engine.slots - len(engine.trials)

    def resume(self, found: checkpoint.Checkpoint, plans: Mapping[str, TrialPlan]) -> list[TrialEvent]:
        """Puts the engine where the checkpoint was, and returns the events of trials that had taken their last step.

        Args:
            found: the checkpoint.
            plans: by name; those of its trials must be among them.
        """
        self._steps_done = found.decided["slots"]["steps_done"]
        runs = {name: self._new(plans[name]) for name in found.trials}
        checkpoint.load(self._engine, found, {name: run.trial for name, run in runs.items()})
        self._running = runs
        marks = found.decided["slots"].get("marks", {})
        for run in runs.values():
            self._resume(run, found)
            self._marks[run.plan.name] = marks.get(run.plan.name, run.trial.step)
        return self._evaluate([run for run in runs.values() if run.ended], {}, resumed=True)

    def _resume(self, run: TrialRun, found: checkpoint.Checkpoint) -> None:
        """Opens the files of a trial that is in its slot again."""
        initial = found.decided["slots"]["initial"]
        self._initial |= {key: np.array(values) for key, values in initial.items() if key not in self._initial}
        if run.best is not None:
            run.best.restore(found, found.decided["slots"].get("best"))
        self._watcher.say(f"{run.plan.name}: resumes at step {run.trial.step} of {run.trial.total_steps}")
        start = run.plan.start
        run.begin(None if start is None else self._initial[start], from_step=run.trial.step)

    def where(self) -> str:
        """Returns a line on how far a stopped run came."""
        trials = [run.trial for run in self._running.values()]
        if len(trials) == 1:
            return f"stopped at step {trials[0].step} of {trials[0].total_steps} of {trials[0].name}"
        return f"stopped with {len(trials)} trials under way"

    def advance(self, commands: Commands) -> list[TrialEvent]:
        """Runs the commands and, if they cause no events, one row; returns the events. Writes a checkpoint when due."""
        events: list[TrialEvent] = []
        for name, reason in commands.leave.items():
            if (run := self._running.get(name)) is not None:
                events.append(self._end(run, "pruned", run.last_N, reason))
        events += self._enter(commands.enter)
        if events:
            return events
        if self._steps_due() or self._clock_due() or self._end_due():
            self.save(commands.decided)
        if not self._running:
            return []
        try:
            step_events = self._engine.step()
        except DoesNotFit as error:
            return [self._fail(self._run_of(error), error)]
        return self._after(step_events, commands.decided)

    def save(self, decided: Mapping[str, Any]) -> None:
        """Writes a checkpoint; all events must have been answered."""
        if not self._session.processes.writes:
            return
        started = time.monotonic()
        self._session.base_train.save()  # what numbers after the checkpoint may draw on
        initial = {key: sums_N.tolist() for key, sums_N in self._initial.items() if key != "base"}
        own: dict[str, Any] = {"steps_done": self._steps_done, "initial": initial, "marks": self._marks}
        beside = None
        for run in self._running.values():  # early stopping is for a single run
            if run.best is not None and run.best.step is not None:
                own["best"], beside = run.best.state(), run.plan.folder.best
        decided = {**decided, "slots": own}
        checkpoint.save(self._engine, self._checkpoints, self.steps, self._identity, decided, beside)
        checkpoint.prune(self._checkpoints, self._logging.keep_checkpoints)
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - started
        self._ended_since = False

    def close(self) -> None:
        """Empties the slots and closes all files; the trials in them can be resumed from the last checkpoint."""
        for run in list(self._running.values()):
            with contextlib.suppress(OutputError):  # a full disk refuses the last flush once more
                run.close()
            self._engine.evict(run.trial)
        self._running.clear()
        with contextlib.suppress(OutputError):
            self._session.base_train.save()

    def _new(self, plan: TrialPlan) -> TrialRun:
        refuse_unfit(self._session, plan.settings.method)  # trying it could end the whole study
        return TrialRun(plan, self._session, self._logging, self._watcher)

    def _enter(self, plans: Sequence[TrialPlan]) -> list[TrialEvent]:
        """Gives each a slot, and measures the losses before step 1 of all that start and want them, together."""
        events: list[TrialEvent] = []
        entering: list[tuple[str, TrialRun]] = []
        for plan in plans:
            try:
                with room_for(self._session, plan.settings.method):
                    run = self._new(plan)
                    resumed = plan.checkpoint is not None and self._restore(run, plan.checkpoint)
                    if run.trial.parameters and not resumed:
                        self._engine.admit(run.trial)
            except UserError as error:
                if not self._tolerant or isinstance(error, OutputError):
                    raise
                events.append(Ended(plan.name, Outcome("failed", str(error))))
                continue
            self._running[plan.name] = run
            self._marks[plan.name] = run.trial.step
            if resumed:
                events += self._evaluate([run] if run.trial.finished else [], {}, resumed=True)
            elif plan.start is None:
                run.begin(None, from_step=None)
            else:
                entering.append((plan.start, run))
        unknown = {start: run for start, run in entering if start not in self._initial}
        losses, failed = self._held_out(list(unknown.values()))
        self._initial |= {start: losses[run.plan.name] for start, run in unknown.items() if run.plan.name in losses}
        for start, run in entering:
            if start not in self._initial:
                events.append(self._end(run, "failed", None, failed[unknown[start].plan.name]))
                continue
            start_N = self._initial[start]
            run.begin(start_N, from_step=None)
            events.append(Evaluated(run.plan.name, 0, start_N))
            if not run.trial.parameters:  # the untouched base: there is nothing to train
                events.append(self._end(run, "finished", start_N))
        return events

    def _restore(self, run: TrialRun, found: checkpoint.Checkpoint) -> bool:
        """Resumes a trial from another engine's checkpoint; one whose files are damaged restarts."""
        try:
            checkpoint.load_one(self._engine, found, run.trial)
        except OutputError as error:
            self._watcher.say(f"{run.plan.name}: restarts ({error.what}: {error.where})")
            return False
        self._resume(run, found)
        return True

    def _after(self, step_events: Sequence[StepEvent], decided: Mapping[str, Any]) -> list[TrialEvent]:
        """Logs the steps that a row completed, and evaluates all trials that are due together."""
        events: list[TrialEvent] = []
        due = []
        for step_event in step_events:
            run = self._running[step_event.trial.name]
            if step_event.failed is not None:
                events.append(self._fail(run, step_event.failed))
            elif step_event.report is None:
                events.append(self._end(run, "diverged", None, step_event.diverged))
            else:
                run.log(step_event.report)
                if run.evaluation_due and not step_event.report.skipped:
                    due.append(run)
        return events + self._evaluate(due, decided)

    def _evaluate(
        self, due: Sequence[TrialRun], decided: Mapping[str, Any], *, resumed: bool = False
    ) -> list[TrialEvent]:
        """Returns the events of these trials' held-out losses; those of a resumed trial are in its files already."""
        events: list[TrialEvent] = []
        losses, failed = self._held_out(due)
        for run in due:
            if run.plan.name in failed:
                events.append(self._end(run, "failed", None, failed[run.plan.name]))
                continue
            step, sums_N = run.trial.step, losses[run.plan.name]
            if not np.isfinite(sums_N).all():
                reason = f"the held-out loss became {sums_N.sum()} after step {step}"
                events.append(self._end(run, "diverged", None, reason))
                continue
            if not resumed:
                run.log_held_out(sums_N)
            events.append(Evaluated(run.plan.name, step, sums_N))
            if run.ended:
                if not self._tolerant and self._steps_due():  # a single run's last checkpoint holds its trial
                    self.save(decided)
                if run.plan.settings.keep:
                    run.save_adapter()
                events.append(self._end(run, "finished", sums_N if run.best is None else run.best.sums_N))
        return events

    def _held_out(self, runs: Sequence[TrialRun]) -> tuple[dict[str, Losses], dict[str, str]]:
        """Returns the losses of these trials, and the reasons of those with an example that does not fit, by name."""
        rows, fitting, failed = self._session.held_out, list(runs), dict[str, str]()
        while fitting:
            try:
                losses = self._engine.losses([run.trial.adapter for run in fitting], rows, range(len(rows)))
            except DoesNotFit as error:
                if not self._tolerant:
                    raise
                run = self._run_of(error)
                failed[run.plan.name] = f"held-out rows: {error}"
                fitting.remove(run)
            else:
                return dict(zip((run.plan.name for run in fitting), losses, strict=True)), failed
        return {}, failed

    def _run_of(self, error: DoesNotFit) -> TrialRun:
        return next(run for run in self._running.values() if run.trial.adapter is error.adapter)

    def _fail(self, run: TrialRun, error: UserError) -> Ended:
        if not self._tolerant:
            raise error
        return self._end(run, "failed", None, str(error))

    def _end(self, run: TrialRun, status: Ending, end_N: Losses | None, reason: str | None = None) -> Ended:
        run.close()
        if run.trial in self._engine.trials:
            self._engine.evict(run.trial)
        self._running.pop(run.plan.name, None)
        self._marks.pop(run.plan.name, None)
        self._steps_done += run.trial.step
        self._ended_since = True
        return Ended(run.plan.name, run.outcome(status, end_N, reason))

    def _steps_due(self) -> bool:
        """True when any trial has taken `checkpoint_every` steps since the last time, or since it entered.

        A checkpoint holds all slots: the trial with the most steps sets the interval, which checkpoints made for other
        reasons do not shift.
        """
        every = self._logging.checkpoint_every
        if every is None:
            return False
        for name, run in self._running.items():
            own = run.trial.order.steps_per_epoch if every == "epoch" else every
            if run.trial.step - self._marks[name] >= own:
                self._marks = {name: run.trial.step for name, run in self._running.items()}
                return True
        return False

    def _clock_due(self) -> bool:
        minutes = self._logging.checkpoint_minutes
        if minutes is None or self._logging.checkpoint_every is not None or not self._running:
            return False
        return time.monotonic() - self._saved_at >= max(60 * minutes, self._save_seconds / CHECKPOINT_SHARE)

    def _end_due(self) -> bool:
        """True where a kill would lose a trial that ended, and saving is cheap."""
        return self._ended_since and time.monotonic() - self._saved_at >= self._save_seconds / CHECKPOINT_SHARE
