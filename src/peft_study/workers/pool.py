"""Several workers, each with an engine of its own, in processes of this machine or on a Ray cluster.

    a worker: opening --model and data are loaded--> beginning --slots are set--> idle <--commands | report--> busy
              dead, from any state --> its trials resume elsewhere from their last checkpoints
                                   --> its place gets a new worker with a new name, a few times

The first worker starts alone: it fills the caches of tokens and base losses for the others, and measures the slots that
all use. The others load while it trains.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from peft_study.config import EvaluationConfig, StudyConfig, TrialSettings
from peft_study.engine import checkpoint
from peft_study.errors import OutputError, PeftStudyError, ProcessError
from peft_study.statistics import Losses
from peft_study.storage.study_dir import StudyFolder, basis
from peft_study.training import slot_count
from peft_study.training.cost import TrialCost
from peft_study.training.loop import Commands
from peft_study.training.session import Say, refuse_other_inputs, timed
from peft_study.training.slot_count import Capacity
from peft_study.training.trial_run import TrialPlan
from peft_study.workers.backend import Launcher, Link, Trained, WorkerDied
from peft_study.workers.worker import Facts, Report
from peft_study.workers.worker_process import Answer, Opened

REPORT_SECONDS = 0.5
"""A worker without events reports its progress, and asks for commands, at least this often."""
REPORTS_A_SECOND = 50
"""With many workers the interval grows, to this many reports in all: each takes the scheduler a millisecond or two."""

State = Literal["opening", "beginning", "idle", "busy"]


@dataclass(slots=True)
class _Handle:
    """One worker as the pool sees it.

    Attributes:
        link: to its process.
        place: number of its device.
        name: ``worker-N``; empty until it begins.
        state: which call it is answering; idle: none.
        trials: in its slots, as of its last report and commands.
    """

    link: Link
    place: int
    name: str = ""
    state: State = "opening"
    trials: set[str] = field(default_factory=set)


class WorkerPool:
    """Several workers.

    Args:
        config: filled.
        folder: of the study.
        say: receives lines for the user.
        launcher: starts the workers.
    """

    replays = False

    def __init__(self, config: StudyConfig, folder: StudyFolder, say: Say, launcher: Launcher) -> None:
        self._config, self._folder, self._say, self._launcher = config, folder, say, launcher
        self._workers: list[_Handle] = []
        self._deaths: dict[int, int] = {}
        self._trials = 1
        self._capacity: Capacity | None = None
        self._first_opened: Opened | None = None

    def __enter__(self) -> WorkerPool:
        self._launcher.__enter__()
        try:
            workers, threads = _counted(self._launcher.count, "worker"), _counted(self._launcher.threads, "thread")
            with timed(self._say, f"{workers}, each with {threads}; the first one loads {self._config.model.name}"):
                self._open(0)
                opened: Opened = self._first_answer()
            self._first_opened = replace(opened, facts=None)
            assert opened.facts is not None
            self.facts: Facts = opened.facts
        except BaseException:
            self._launcher.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if kind is None or issubclass(kind, PeftStudyError):
            self._close()
        self._launcher.__exit__(None, None, None)

    @property
    def quiet(self) -> bool:
        """True where no worker is at work; those that are still loading do not count."""
        return not any(worker.state == "busy" for worker in self._workers)

    def checkpoints(self) -> list[checkpoint.Checkpoint]:
        """Returns the newest checkpoint of every worker there ever was, and of one process that ran the study alone."""
        top = self._folder.checkpoints
        newest = [checkpoint.newest(folder) for folder in (top, *sorted(top.glob("worker-*")))]
        return [found for found in newest if found is not None and found.identity == basis(self._config)]

    def settle(self, trials: int) -> int:
        """Has the first worker measure how many slots it can hold, and writes that down for all."""
        self._trials = math.ceil(trials / self._launcher.count)
        self._capacity = before = slot_count.kept(self._folder.run)
        first = self._workers[0]
        self._begin(first)
        capacity: Capacity = self._first_answer()
        first.state = "idle"
        self._capacity = replace(capacity, threads=self._launcher.threads, workers=self._launcher.count)
        if before is None:
            self._say(f"{slot_count.sentence(self._capacity)}, in each worker")
        elif note := slot_count.differs(before, self._config.slots):
            self._say(note)
        slot_count.keep(self._folder.run, self._capacity)
        return self._capacity.slots * self._launcher.count

    def start(self, plans: Mapping[str, TrialPlan]) -> list[tuple[str, Report]]:
        """Starts the other workers, and removes checkpoints that no trial needs any more."""
        needed = {found.folder.parent.name for found in self.checkpoints() if set(found.trials) & set(plans)}
        self._sweep(needed | {worker.name for worker in self._workers})
        for place in range(1, self._launcher.count):
            self._open(place)
        return [(self._workers[0].name, _free())]

    def send(self, name: str, commands: Commands | None) -> None:
        """Sends a worker its commands; one with neither trials nor commands stays idle."""
        worker = next((worker for worker in self._workers if worker.name == name), None)
        if worker is None or commands is None:  # None: it died, and its last report left no room
            return
        if not (worker.trials or commands.enter or commands.leave):
            return
        worker.trials |= {plan.name for plan in commands.enter}
        worker.state = "busy"
        self._call(worker, "advance", commands, max(REPORT_SECONDS, self._launcher.count / REPORTS_A_SECOND))

    def reports(self) -> list[tuple[str, Report]]:
        """Waits for answers of workers that train or load, and returns their reports.

        Where a report has events or lost trials, workers without trials report as well: there may be one for them.
        """
        idle = [worker for worker in self._workers if worker.state == "idle" and not worker.trials]
        waited = {id(worker.link): worker for worker in self._workers if worker.state != "idle"}
        if not waited:
            what = "no worker has anything to do" if idle else "no worker is left"
            raise ProcessError(
                f"{what} ({sum(self._deaths.values())} died)",
                where=str(self._folder.path),
                remedy="see why they died (usually memory ran out: fewer --slots or --workers); the same command "
                "resumes from their last checkpoints",
            )
        ready = self._launcher.wait([worker.link for worker in waited.values()])
        found = [report for link in ready if (report := self._receive(waited[id(link)])) is not None]
        if any(report.events or report.lost for _, report in found):
            found += [(worker.name, _free()) for worker in idle]
        return found

    def save(self, decided: Mapping[str, Any]) -> None:
        """Has every worker with trials write a checkpoint; one that dies meanwhile has its earlier ones."""
        saving = [worker for worker in self._workers if worker.state == "idle" and worker.trials]
        for worker in saving:
            self._call(worker, "save", decided)
        for worker in saving:
            try:
                _value(worker.link.answer())
            except WorkerDied as died:
                self._say(f"{worker.name} died before its last checkpoint ({died})")

    def conclude(self, decided: Mapping[str, Any]) -> None:
        """Removes the checkpoints of all workers: the journal has everything."""
        self._sweep(set())

    def test(self, trained: Trained) -> dict[str, Losses]:
        """Has one worker measure the test part; where it dies, the next one."""
        losses: dict[str, Losses] = self._by_one("test", trained)
        return losses

    def costs(self, settings: Mapping[str, TrialSettings]) -> dict[str, TrialCost]:
        """Has one worker measure what trials cost."""
        costs: dict[str, TrialCost] = self._by_one("costs", settings)
        return costs

    def answers(self, systems: Trained, examples: Sequence[int], max_new_tokens: int) -> list[dict[str, Any]]:
        """Has one worker answer with base and adapters."""
        rows: list[dict[str, Any]] = self._by_one("answers", self._config.data, systems, examples, max_new_tokens)
        return rows

    def evaluate(self, config: EvaluationConfig, folder: Path, systems: Trained) -> None:
        """Has one worker ask base and adapters tasks."""
        self._by_one("evaluate", config, folder, systems)

    def _by_one(self, method: str, *arguments: Any) -> Any:
        """Returns what a call of an idle worker returns; where it dies, of the next one."""
        while True:
            worker = next((worker for worker in self._workers if worker.state == "idle"), None)
            if worker is None:
                self.reports()  # of one that is loading
                continue
            self._call(worker, method, *arguments)
            try:
                return _value(worker.link.answer())
            except WorkerDied as died:
                self._say(self._replace_dead(worker, died).lines[0])

    def _sweep(self, kept: set[str]) -> None:
        for folder in self._folder.checkpoints.glob("worker-*"):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _open(self, place: int) -> None:
        worker = _Handle(self._launcher.open(place), place)
        self._workers.append(worker)
        settings, folder = self._config.model_dump_json(), str(Path.cwd())
        self._call(worker, "open", settings, folder, self._launcher.sharing, self._first_opened)

    def _begin(self, worker: _Handle) -> None:
        checkpoints = self._folder.claim_worker()
        worker.name, worker.state = checkpoints.name, "beginning"
        self._call(worker, "begin", checkpoints, self._launcher.threads, self._trials, self._capacity)

    def _first_answer(self) -> Any:
        """Returns what the first worker answers; without it the study cannot start."""
        first = self._workers[0]
        self._launcher.wait([first.link])
        try:
            return _value(first.link.answer())
        except WorkerDied as died:
            raise ProcessError(
                f"the first worker died ({died})",
                where=str(self._folder.path),
                remedy="read its own message above, if there is one; usually memory ran out",
            ) from died

    def _call(self, worker: _Handle, method: str, *arguments: Any) -> None:
        with contextlib.suppress(WorkerDied):  # waiting for the answer raises it again
            worker.link.call(method, *arguments)

    def _receive(self, worker: _Handle) -> tuple[str, Report] | None:
        """Takes a worker's answer and returns its report, if the answer was to commands or makes it ready for them."""
        try:
            value = _value(worker.link.answer())
        except WorkerDied as died:
            return worker.name, self._replace_dead(worker, died)
        if worker.state == "opening":
            self._refuse_other_inputs(value)
            self._begin(worker)
            return None
        if worker.state == "beginning":
            worker.state = "idle"
            return worker.name, _free()
        report: Report = value
        worker.state, worker.trials = "idle", set(report.running)
        if self._launcher.count > 1:
            # one free slot at a time, so that trials are spread over the workers; a trial that enters is an event, and
            # its worker is asked again at once
            report = replace(report, room=min(report.room, 1))
        return worker.name, report

    def _replace_dead(self, worker: _Handle, died: WorkerDied) -> Report:
        """Starts a new worker in a dead one's place, and returns a report that its trials are lost."""
        self._workers.remove(worker)
        worker.link.end()
        line = f"{worker.name or 'a worker that was loading'} died ({died})"
        if worker.trials:
            line += f"; resuming {_counted(len(worker.trials), 'trial')} from the last checkpoint"
        deaths = self._deaths[worker.place] = self._deaths.get(worker.place, 0) + 1
        if deaths <= self._launcher.restarts:
            self._open(worker.place)
        else:
            line += f"; it died {deaths} times and is not restarted"
        return replace(_free(), room=0, lines=(line,), lost=tuple(sorted(worker.trials)))

    def _refuse_other_inputs(self, opened: Opened) -> None:
        """Refuses a worker whose machine has another model or other data under the same name."""
        try:
            refuse_other_inputs(opened.record, self._folder.run)
        except OutputError as error:
            raise OutputError(
                f"{opened.where} has other inputs than the first worker: {error.what.partition(', ')[2]}",
                where=error.where,
                remedy="give all machines the same model and data",
            ) from error

    def _close(self) -> None:
        """Has idle workers close their files."""
        for worker in self._workers:
            if worker.state == "idle":
                with contextlib.suppress(WorkerDied):
                    worker.link.call("close")
                    worker.link.answer()


def _free() -> Report:
    """Returns the report of a worker without trials."""
    return Report((), 1, (), {}, (), {})


def _value(answer: Answer) -> Any:
    """Returns what a worker's call returned, or raises what it raised."""
    if answer.error is not None:
        raise answer.error
    if answer.defect is not None:
        raise RuntimeError(f"in a worker:\n{answer.defect}")
    return answer.value


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
