"""Runs a study: opens model, data and folder, gives the workers commands, and writes journal and results.

scheduler --commands--> worker (engine, slots) --report--> journal, scheduler --commands--> ...
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from peft_study.config import EvaluationConfig, StudyConfig, TrainingConfig
from peft_study.engine.checkpoint import Checkpoint
from peft_study.errors import ConfigError, Interrupted, OutputError
from peft_study.evaluation.evaluate import check_tasks
from peft_study.evaluation.scores import EVALUATION, read_scores
from peft_study.methods.registry import is_exclusive
from peft_study.model.in_memory import ModelInMemory
from peft_study.report.costs import costs
from peft_study.report.findings import Finding, find, plain
from peft_study.report.results import Results, collect, summary, write_rows
from peft_study.report.writing import try_page
from peft_study.search.budget import steps_of
from peft_study.search.samplers import export
from peft_study.search.scheduler import Scheduler
from peft_study.search.trials import StudyState, TrialRecord, final_seeds
from peft_study.storage import held_out
from peft_study.storage.environment import environment
from peft_study.storage.journal import Journal
from peft_study.storage.study_dir import StudyFolder
from peft_study.study.callbacks import Callback, Callbacks
from peft_study.study.clock import StudyClock
from peft_study.study.closing import forget, keep_answers, keep_costs, keep_evaluation
from peft_study.study.dry_run import study_memory
from peft_study.study.recommend import Recommended, Scale, write_recommended
from peft_study.training import checkup
from peft_study.training.interrupt import StopRequest
from peft_study.training.loop import Commands, Ended
from peft_study.training.session import Say, refuse_other_inputs, timed
from peft_study.training.trial_run import TrialPlan
from peft_study.workers.backend import Backend
from peft_study.workers.local import LocalBackend
from peft_study.workers.pool import WorkerPool
from peft_study.workers.subprocesses import SubprocessLauncher
from peft_study.workers.worker import Facts, Report


@dataclass(frozen=True, slots=True)
class FinishedStudy:
    """A finished study: folder, results, findings, recommended longer runs, and its page where it has one."""

    folder: Path
    results: Results
    findings: tuple[Finding, ...]
    recommended: tuple[Recommended, ...]
    report: Path | None


class StudyWatcher(Protocol):
    """Receives the progress of a study."""

    def say(self, line: str, share: float | None = None, /) -> None:
        """Shows a line to the user, or work that takes time, as `Say`."""

    def planned(self, config: StudyConfig, state: StudyState, slots: int) -> None:
        """Shows the plan, and what earlier starts have done of it."""

    def reported(self, report: Report, state: StudyState) -> None:
        """Receives each report of a worker, after the scheduler has seen it."""

    def ended(self, trial: TrialRecord, facts: Facts) -> None:
        """Receives each trial that has ended."""


def run_study(
    config: StudyConfig,
    given: Any,
    watcher: StudyWatcher,
    stop: StopRequest,
    *,
    overwrite: bool = False,
    go_on: bool = False,
    callbacks: Sequence[Callback] = (),
    in_memory: ModelInMemory | None = None,
) -> FinishedStudy:
    """Runs or resumes a study and returns its results.

    Args:
        config: as the user wrote it.
        given: the same as plain values, kept in the folder.
        watcher: receives the progress.
        stop: checked between rows.
        overwrite: delete another study in the output folder.
        go_on: the study file changed; add trials under the new one.
        callbacks: hear of each trial, and may stop it or the study.
        in_memory: a base in memory, instead of the one that the configuration names.

    Raises:
        ConfigError: when a model in memory is to be trained by other processes.
        OutputError: when the output folder holds another study, or another process writes to it.
        Interrupted: when asked to stop; a checkpoint was written.
    """
    config = config.filled()
    folder = StudyFolder(config.output)
    folder.check(config, overwrite=overwrite, go_on=go_on)
    check_tasks(config)
    only_read = not overwrite and (folder.run.status() or ("", ""))[0] == "finished"
    chosen = choose_backend(config, folder, watcher.say, overwrite=overwrite, in_memory=in_memory)
    if in_memory is None and config.ray is None and not only_read:
        memory = study_memory(config)
        if memory is not None:
            memory.tell(watcher.say)
    # locked first: a folder in use, or one that cannot be written, is refused before model and data are loaded
    with folder.run.locked(), chosen as backend:
        changes = folder.check(config, overwrite=overwrite, go_on=go_on)
        if not overwrite:
            refuse_other_inputs(backend.facts.record, folder.run)
        _refuse_impossible(config, backend.facts)
        if not changes:
            folder.claim(config, given, overwrite=overwrite)
        folder.run.set_status("running")
        try:
            heard = Callbacks(callbacks, backend.facts)
            finished = _Study(config, folder, backend, watcher, heard, changes).run(stop, given)
        except BaseException as error:
            folder.run.end(error)
            raise
        folder.run.set_status("finished")
    return replace(finished, report=try_page(folder.path, watcher.say))  # it says that the study has finished


def _refuse_impossible(config: StudyConfig, facts: Facts) -> None:
    """Refuses a budget below one step before anything is written."""
    for data_seed in (config.training.data_seed, *final_seeds(config)):
        steps_of(config.training.model_copy(update={"data_seed": data_seed}), config.budget.tokens, facts.train_lengths)


def choose_backend(
    config: StudyConfig, folder: StudyFolder, say: Say, *, overwrite: bool, in_memory: ModelInMemory | None = None
) -> Backend:
    """Returns the backend of a study: this process, processes of this machine, or Ray actors.

    A study begun with several workers resumes in multi-worker mode, even with one: its journal is ahead of each of
    their checkpoints.

    Raises:
        ConfigError: when there are fewer devices than workers, Ray is not installed, or the model is in memory.
    """
    several = config.workers > 1 or (folder.had_pool and not overwrite)
    if in_memory is not None and (several or config.ray is not None):
        where, what = "ray" if config.ray is not None else "workers", "a model in memory is trained in one process"
        raise ConfigError(what, where=where, remedy="leave it out, or save the model and give its folder")
    if config.ray is not None:
        from peft_study.workers.ray_cluster import RayLauncher

        return WorkerPool(config, folder, say, RayLauncher(config.ray, config.model))
    if several:
        return WorkerPool(config, folder, say, SubprocessLauncher(config.workers, config.model))
    return LocalBackend(config, folder, say, in_memory)


class _Study:
    """A running study."""

    def __init__(
        self,
        config: StudyConfig,
        folder: StudyFolder,
        backend: Backend,
        watcher: StudyWatcher,
        callbacks: Callbacks,
        changes: Sequence[str],
    ) -> None:
        self._config, self._folder, self._backend, self._watcher = config, folder, backend, watcher
        self._callbacks = callbacks
        self._clock: StudyClock | None = None
        self._facts = backend.facts
        for note in (*self._facts.notes, *checkup.lines(self._facts.diagnosis)):
            watcher.say(note)
        checkup.keep(folder.run, self._facts.seen, self._facts.diagnosis)
        folder.run.write_record({**environment(), **self._facts.record})
        held_out.keep(folder.run, self._facts.examples)
        self._journal = Journal(folder.journal)
        self._waiting: list[tuple[TrialRecord, Checkpoint | None]] = []
        self._exported_at = time.monotonic()
        self._counted: dict[tuple[int | None, int, int, int], int] = {}
        decided = [checkpoint.decided for checkpoint in backend.checkpoints()]
        self._elapsed_before = max((d["seconds"] for d in decided), default=0.0)
        if backend.replays:
            # what came after the checkpoint is repeated bit by bit, so that no number depends on a kill
            self._journal.truncate(decided[0]["events"] if decided else 0)
        self._changes = changes
        if changes:
            self._elapsed_before = 0.0
            folder.optuna.unlink(missing_ok=True)  # choices of another space cannot be added to it
            forget(folder)
            methods = sorted(
                {change.split(".")[1].split(":")[0] for change in changes if change.startswith("methods.")}
            )
            event = {"event": "continued", "changes": list(changes), "methods": methods}
            self._journal.append([{**event, "time": time.time()}])
        self._scheduler = Scheduler(config, self._journal, self._steps, self._facts.counts_N)
        self._started = time.monotonic()
        self._only_read = self._scheduler.finished  # no time goes into a study that is finished
        limit, tokens = config.budget.minutes, float(self._facts.train_lengths.mean())
        if limit is not None:
            self._clock = StudyClock(config, 60 * limit, self._elapsed_before, tokens, watcher.say)

    def run(self, stop: StopRequest, given: Any) -> FinishedStudy:
        """Runs all trials to their end, measures the test part, and writes the results."""
        state, backend = self._scheduler.state, self._backend
        trials = sum(self._config.trials(method) for method in self._scheduler.methods)
        self._watcher.planned(self._config, state, backend.settle(trials))
        reports = backend.start({trial.name: self._plan(trial) for trial in state.running()})
        there = {name for _, report in reports for name in (*report.running, *(event.name for event in report.events))}
        self._queue(trial.name for trial in state.running() if trial.name not in there)
        if self._changes:
            # the checkpoint with the change comes before the file: a kill in between needs --continue again
            backend.save(self._decided())
            self._folder.take_over(self._config, given)
        for worker, report in reports:
            self._take(worker, report)
        stop.heeded = True
        while not self._scheduler.finished:
            stopping = stop.asked
            if stopping and backend.quiet:
                backend.save(self._decided())
                self._export()
                running = sum(1 for _ in state.running())
                raise Interrupted(
                    f"stopped with {running} trials running and {len(state.trials) - running} ended, "
                    "with a checkpoint; the same command (without --overwrite) resumes there"
                )
            for worker, report in backend.reports():
                self._take(worker, report, stopping=stopping)
        self._choose_by_task()
        self._open_test()
        decided = self._decided()
        backend.conclude(decided)
        self._export()
        results = collect(self._config, state, self._facts.examples, self._folder)
        write_rows(results, self._folder)
        self._close(results, stop)
        found = find(self._config, state, self._facts.examples, results, costs(self._folder.path))
        self._folder.run.write("results.json", summary(results))
        self._folder.run.write("findings.json", plain(found))
        recommended = write_recommended(
            self._config, state, results, found, self._folder.path, self._scale(results, decided["seconds"])
        )
        return FinishedStudy(self._folder.path, results, found, recommended, None)

    def _close(self, results: Results, stop: StopRequest) -> None:
        """Measures what only the report needs; the same command measures later what a stop leaves out."""
        folder, state, backend, say = self._folder, self._scheduler.state, self._backend, self._watcher.say
        if not stop.asked:
            keep_costs(folder, state, results, backend, say)
        if not stop.asked:
            keep_answers(self._config, folder, state, self._facts.examples, results, backend, say)
        if not stop.asked:
            keep_evaluation(self._config, folder, state, results, backend, say)

    def _scale(self, results: Results, seconds: float) -> Scale:
        """Returns what longer runs depend on; the study took so many seconds, in all its starts."""
        trained, record, data = sum(results.tokens.values()), self._facts.record["data"], self._config.data
        in_a_file = isinstance(data.held_out if data.test is None else data.test, str)
        rows = int(str(record["available_rows"])) + (0 if in_a_file else int(str(record["test_rows"] or 0)))
        return Scale(
            rows,
            float(self._facts.train_lengths.mean()),
            seconds / trained if trained else None,
        )

    def _steps(self, training: TrainingConfig) -> int:
        """Returns a trial's steps; a budget of tokens is counted once for each order of the data."""
        key = training.steps, training.epochs, training.batch_size, training.data_seed
        if key not in self._counted:
            self._counted[key] = steps_of(training, self._config.budget.tokens, self._facts.train_lengths)
        return self._counted[key]

    def _take(self, worker: str, report: Report, *, stopping: bool = False) -> None:
        """Handles a report and gives the worker its next commands; while stopping, no trial enters."""
        trials = self._scheduler.state.trials
        ending = [trials[event.name] for event in report.events if isinstance(event, Ended)]
        ending = [trial for trial in ending if trial.status == "running"]
        leave = self._scheduler.receive(report.events)
        leave |= self._stopped_by_callbacks(report)
        for trial in ending:
            self._folder.trial(trial.name).set_status(trial.status, trial.reason)
            self._watcher.ended(trial, self._facts)
        minutes = self._config.logging.checkpoint_minutes
        if ending and minutes is not None and time.monotonic() - self._exported_at > 60 * minutes:
            self._export()
        self._queue(report.lost)
        if self._clock is not None and self._clock.search_is_over(report, self._scheduler.state):
            self._scheduler.time_is_up()
        begun: list[TrialPlan] = []
        if not stopping:
            staying = set(report.running) - set(leave)
            begun = self._begin(report.room + len(leave), empty=not staying)
        commands = Commands(enter=begun, leave=leave, decided=self._decided())
        self._backend.send(worker, None if stopping and not leave else commands)
        self._watcher.reported(report, self._scheduler.state)

    def _stopped_by_callbacks(self, report: Report) -> dict[str, str]:
        """Returns the trials that callbacks stop, with the reasons; all that run where the study is to end."""
        stops, reason = self._callbacks.reported(report, self._scheduler.state)
        if reason is not None:
            self._scheduler.stop(reason)
        if (stopped := self._scheduler.state.stopped) is not None:
            stops = {**dict.fromkeys(report.running, f"the study was ended: {stopped}"), **stops}
        return {name: why for name, why in stops.items() if name in report.running}

    def _queue(self, names: Iterable[str]) -> None:
        """Queues trials that no worker is running; they resume from the newest checkpoint that holds them."""
        held: dict[str, tuple[int, Checkpoint]] = {}
        running = [name for name in names if self._scheduler.state.trials[name].status == "running"]
        for checkpoint in self._backend.checkpoints() if running else ():
            for name, step in zip(checkpoint.trials, checkpoint.steps, strict=True):
                if name not in held or step > held[name][0]:
                    held[name] = (step, checkpoint)
        for name in running:
            self._waiting.append((self._scheduler.state.trials[name], held[name][1] if name in held else None))

    def _begin(self, room: int, *, empty: bool) -> list[TrialPlan]:
        """Returns the trials that enter now: queued ones first, then new ones."""
        found: list[TrialPlan] = []
        waiting, self._waiting = self._waiting, []
        for trial, checkpoint in waiting:
            alone = is_exclusive(trial.settings.method.method)
            if room > 0 and (not alone or (empty and not found)):
                found.append(self._plan(trial, checkpoint))
                room = 0 if alone else room - 1
            else:
                self._waiting.append((trial, checkpoint))
        return found + [self._plan(trial) for trial in self._scheduler.next(room, empty=empty and not found)]

    def _plan(self, trial: TrialRecord, checkpoint: Checkpoint | None = None) -> TrialPlan:
        folder = self._folder.claim_trial(trial.name, self._config, trial.settings)
        return TrialPlan(trial.name, trial.settings, folder, self._config.logging.evaluate_every, checkpoint)

    def _export(self) -> None:
        """Updates `optuna.db`; an error is only shown, because the study does not need the file."""
        try:
            export(self._folder.optuna, self._scheduler.samplers, self._scheduler.state)
        except OutputError as error:
            self._watcher.say(str(error))
        self._exported_at = time.monotonic()

    def _decided(self) -> Mapping[str, Any]:
        return {"events": len(self._journal), "seconds": self._elapsed()}

    def _elapsed(self) -> float:
        return self._elapsed_before + (0.0 if self._only_read else time.monotonic() - self._started)

    def _choose_by_task(self) -> None:
        """Has the finals answer the task that chooses the winner, once, before the test part is opened."""
        state, task = self._scheduler.state, self._config.finals.task
        if task is None or state.winner is None or state.winner_by is not None or state.test:
            return
        finals = [t for m in self._scheduler.methods for t in state.of(m, "final") if t.last is not None]
        trained = [(t.name, t.settings.method, self._folder.trial(t.name).adapter) for t in finals]
        with timed(self._watcher.say, f"asking {len(trained)} finals the task that chooses the winner"):
            folder = self._folder.path / f"{EVALUATION}-dev"
            self._backend.evaluate(EvaluationConfig(tasks=(task,)), folder, trained)
        kept = read_scores(folder)
        assert kept is not None
        scores = [score for score in kept.scores if score.source is None and score.value is not None]
        found = {score.system: -score.to_minimise for score in scores}
        self._scheduler.chosen(scores[0].task if scores else task, found)

    def _open_test(self) -> None:
        """Measures the finalists on the test part, once, after the winner is chosen."""
        state = self._scheduler.state
        if state.test:
            return
        finals = [t for m in self._scheduler.methods for t in state.of(m, "final") if t.last is not None]
        trained = [(t.name, t.settings.method, self._folder.trial(t.name).adapter) for t in finals]
        if trained:
            with timed(self._watcher.say, f"opening the test part for {len(trained)} finalists"):
                self._scheduler.opened(self._backend.test(trained))
