"""Several workers, each with an engine of its own, in processes of this machine or on a Ray cluster.

    member: opening --model and data are loaded--> beginning --capacity, folders--> idle <--commands | report--> busy
          dead, from anywhere --> its trials are lost, to go on elsewhere from their last checkpoints
                              --> its place gets a new worker, with a new name, a few times

The first worker is started alone: it fills the caches of tokens and base losses that the others then find, and measures
the capacity that all work with. The others join while it is at work.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

from peft_study.config import StudyConfig
from peft_study.engine.checkpoint import Found
from peft_study.errors import OutputError, PeftStudyError, ProcessError
from peft_study.statistics import Losses
from peft_study.storage.files import atomic_writer
from peft_study.storage.study_dir import TEAM, StudyFolder, basis
from peft_study.training import slot_count
from peft_study.training.loop import Commands
from peft_study.training.session import Say, refuse_other_inputs
from peft_study.training.slot_count import Capacity
from peft_study.training.trial_run import TrialPlan
from peft_study.workers.backend import Launcher, Link, Trained, WorkerDied
from peft_study.workers.checkpoints import WorkerCheckpoints, open_place
from peft_study.workers.worker import Facts, Report
from peft_study.workers.worker_process import (
    Answer,
    Assignment,
    Begun,
    Files,
    Followed,
    Opened,
    read_files,
    write_files,
)

PACE_SECONDS = 0.5
"""Workers without events report their progress this often, and notice a stop; but
"""
PACES_A_SECOND = 50
"""of all workers together, the scheduler hears no more reports than these: each costs it a millisecond or two."""

State = Literal["opening", "beginning", "idle", "busy"]


@dataclass(slots=True)
class _Member:
    """One worker as the pool knows it.

    Attributes:
        link, place: to its process; the device it has.
        name: of the worker; empty until it begins.
        state: what it is at.
        sees: the study's folder is visible to it.
        trials: in its slots, as of its last report and commands.
    """

    link: Link
    place: int
    name: str = ""
    state: State = "opening"
    sees: bool = True
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
        self._members: list[_Member] = []
        self._deaths: dict[int, int] = {}
        self._token = secrets.token_hex(16)
        self._trials = 1
        self._capacity: Capacity | None = None
        self._places: WorkerCheckpoints | None = None
        self._opened: Opened | None = None

    def __enter__(self) -> WorkerPool:
        if self._config.checkpoints is not None:
            open_place(self._config.checkpoints)  # a mistake in it makes no folder
        self._launcher.__enter__()
        try:
            workers, threads = _counted(self._launcher.count, "worker"), _counted(self._launcher.threads, "thread")
            self._say(f"{workers}, each with {threads}; the first one loads {self._config.model.name}")
            self._open(0)
            self._opened = opened = self._first("open")
            assert opened.facts is not None
            self.facts: Facts = opened.facts
        except BaseException as error:
            self._launcher.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, PeftStudyError):
            self._close()
        self._launcher.__exit__(kind, error, trace)
        if self._places is not None:
            self._places.close()

    @property
    def quiet(self) -> bool:
        """True where no worker is at work; those that are still loading do not count."""
        return not any(member.state == "busy" for member in self._members)

    @property
    def _cuts(self) -> WorkerCheckpoints:
        """The checkpoints, once the study's folder is claimed."""
        if self._places is None:
            local = self._folder.checkpoints.resolve()
            study, identity = self._book()["study"], basis(self._config)
            self._places = WorkerCheckpoints(local, self._config.checkpoints, study, identity)
            WorkerCheckpoints(local, None, study, identity).leave_token(self._token)
            self._places.leave_token(self._token)
        return self._places

    def cuts(self) -> list[Found]:
        """Returns the newest checkpoint of every worker there ever was."""
        return self._cuts.find()

    def settle(self, trials: int) -> int:
        """Has the first worker measure what it can hold, and keeps that for all."""
        self._trials = math.ceil(trials / self._launcher.count)
        self._capacity = before = slot_count.kept(self._folder.run)
        member = self._members[0]
        self._begin(member)
        begun: Begun = self._first("begin")
        self._begun(member, begun)
        self._capacity = slot_count.with_share(begun.capacity, self._launcher.threads, self._launcher.count)
        if before is None:
            self._say(f"{slot_count.sentence(self._capacity)}, in each worker")
        elif note := slot_count.differs(before, self._config.slots):
            self._say(note)
        slot_count.keep(self._folder.run, self._capacity)
        return self._capacity.slots * self._launcher.count

    def start(self, plans: Mapping[str, TrialPlan]) -> list[tuple[str, Report]]:
        """Lets the other workers come, and removes checkpoints that no trial needs any more."""
        self._cuts.sweep(cut for cut in self.cuts() if set(cut.trials) & set(plans))
        for place in range(1, self._launcher.count):
            self._open(place)
        return [(self._members[0].name, self._free())]

    def order(self, worker: str, commands: Commands | None) -> None:
        """Sends a worker its commands; one with neither trials nor commands is idle."""
        member = next((member for member in self._members if member.name == worker), None)
        if member is None or commands is None:
            return  # it died: its last report said so, and left no room
        if not (member.trials or commands.enter or commands.leave):
            return
        member.trials |= {plan.name for plan in commands.enter}
        member.state = "busy"
        files = {} if member.sees else self._luggage([plan.name for plan in commands.enter if plan.cut is not None])
        self._call(member, "follow", commands, files, max(PACE_SECONDS, self._launcher.count / PACES_A_SECOND))

    def reports(self) -> list[tuple[str, Report]]:
        """Waits until something is heard of a worker that is at work or coming.

        Where that is more than how far trials are, those without trials report as well: there may be one for them.
        """
        idle = [member for member in self._members if member.state == "idle" and not member.trials]
        waited = [member for member in self._members if member.state != "idle"]
        if not waited:
            self._nobody("no worker is left" if not idle else "no worker has anything to do")
        by_link = {id(member.link): member for member in waited}
        ready = [by_link[id(link)] for link in self._launcher.wait([member.link for member in waited])]
        found = [report for member in ready if (report := self._heard(member)) is not None]
        if any(report.events or report.lost for _, report in found):
            found += [(member.name, self._free()) for member in idle]
        return found

    def save(self, decided: Mapping[str, Any]) -> None:
        """Has every worker with trials write a checkpoint; one that dies meanwhile has its earlier ones."""
        saving = [member for member in self._members if member.state == "idle" and member.trials]
        for member in saving:
            self._call(member, "save", decided)
        for member in saving:
            try:
                _value(member.link.answer())
            except WorkerDied as died:
                self._say(f"{member.name} died before its last checkpoint ({died})")

    def conclude(self, decided: Mapping[str, Any]) -> None:
        """Removes all checkpoints: the journal says everything."""
        self._cuts.sweep(())

    def test(self, trained: Trained) -> dict[str, Losses]:
        """Has one worker measure the test part; where it dies, the next one."""
        adapters = [(name, method) for name, method, _ in trained]
        while True:
            member = next((member for member in self._members if member.state == "idle"), None)
            if member is None:
                self.reports()  # of one that is coming
                continue
            files = {} if member.sees else self._luggage([name for name, _ in adapters])
            try:
                member.link.call("test", adapters, files)
                losses: dict[str, Losses] = _value(member.link.answer())
            except WorkerDied as died:
                self._say(self._lost(member, died).lines[0])
                continue
            return losses

    # -- workers that start -------------------------------------------------------------------------------------------

    def _open(self, place: int) -> None:
        member = _Member(self._launcher.open(place), place)
        self._members.append(member)
        first = None if self._opened is None else replace(self._opened, facts=None)
        self._call(member, "open", self._config.model_dump_json(), str(Path.cwd()), self._launcher.sharing, first)

    def _begin(self, member: _Member) -> None:
        book = self._book()
        member.name, member.state = f"worker-{book['next']}", "beginning"
        self._write_book({**book, "next": book["next"] + 1})
        share = self._launcher.threads, self._trials, self._capacity
        self._call(
            member, "begin", Assignment(member.name, self._folder.path.resolve(), book["study"], self._token, *share)
        )

    def _begun(self, member: _Member, begun: Begun) -> None:
        member.state, member.sees = "idle", begun.sees

    def _first(self, doing: str) -> Any:
        """Returns what the first worker answers, without which there is no study."""
        member = self._members[0]
        self._launcher.wait([member.link])
        try:
            return _value(member.link.answer())
        except WorkerDied as died:
            raise ProcessError(
                f"the first worker died ({died})",
                where=doing,
                remedy="its own message says why, if it had the time; memory that ran out is the usual cause",
            ) from died

    def _book(self) -> dict[str, Any]:
        """Returns the number of the next worker, and the name that makes this study's checkpoints its own."""
        study = f"{self._folder.path.resolve().name}-{self._token[:12]}"
        return self._folder.run.read_if_there(TEAM) or {"next": 0, "study": study}

    def _write_book(self, values: dict[str, Any]) -> None:
        with atomic_writer(self._folder.path / TEAM) as file:
            file.write(json.dumps(values))

    # -- workers at work ---------------------------------------------------------------------------------------------

    def _call(self, member: _Member, method: str, *arguments: Any) -> None:
        with contextlib.suppress(WorkerDied):  # the pipe is closed: waiting for its answer tells
            member.link.call(method, *arguments)

    def _heard(self, member: _Member) -> tuple[str, Report] | None:
        """Takes an answer in; returns what the scheduler should know of it."""
        try:
            value = _value(member.link.answer())
        except WorkerDied as died:
            return member.name, self._lost(member, died)
        if member.state == "opening":
            opened: Opened = value
            self._refuse_other_inputs(opened)
            self._begin(member)
            return None
        if member.state == "beginning":
            self._begun(member, value)
            return member.name, self._free()
        followed: Followed = value
        write_files(self._folder.path / "trials", followed.files)
        member.state, member.trials = "idle", set(followed.report.running)
        return member.name, self._one_at_a_time(followed.report)

    def _free(self) -> Report:
        """Returns the report of a worker without trials."""
        return Report((), 1, (), {}, (), {})

    def _one_at_a_time(self, report: Report) -> Report:
        """Shows one free slot of several, so that the trials there are spread over the workers.

        A trial that enters is an event, and its worker is asked again at once.
        """
        return report if self._launcher.count == 1 else replace(report, room=min(report.room, 1))

    def _lost(self, member: _Member, died: WorkerDied) -> Report:
        """Requeues a dead worker's trials and restarts it."""
        self._members.remove(member)
        member.link.end()
        name = member.name or "a worker that was loading"
        going = _counted(len(member.trials), "trial")
        trials = f"; its {going} will go on from the last checkpoint" if member.trials else ""
        deaths = self._deaths[member.place] = self._deaths.get(member.place, 0) + 1
        if deaths <= self._launcher.restarts:
            self._open(member.place)
        else:
            trials += f"; it died {deaths} times and is not started again"
        return Report((), 0, (), {}, (f"{name} died ({died}){trials}",), {}, tuple(sorted(member.trials)))

    def _refuse_other_inputs(self, opened: Opened) -> None:
        """Stops a study whose machines have different models or data under one name."""
        try:
            refuse_other_inputs(opened.record, self._folder.run)
        except OutputError as error:
            raise OutputError(
                f"{opened.where} has other inputs than the first worker: {error.what.partition(', ')[2]}",
                where=error.where,
                remedy="give all machines the same model and data",
            ) from error

    def _luggage(self, names: Sequence[str]) -> Files:
        """Returns the files of trials for a worker that does not see them."""
        root = self._folder.path / "trials"
        return {name: content for trial in names for name, content in read_files(root, root / trial).items()}

    def _nobody(self, what: str) -> NoReturn:
        deaths = sum(self._deaths.values())
        raise ProcessError(
            f"{what} ({deaths} died)",
            where=str(self._folder.path),
            remedy="see why they died (memory that ran out is the usual cause: fewer --slots or --workers); the same "
            "command goes on from their last checkpoints",
        )

    def _close(self) -> None:
        """Lets the workers that have nothing to do close their files."""
        for member in self._members:
            if member.state == "idle":
                with contextlib.suppress(WorkerDied):
                    member.link.call("close")
                    member.link.answer()


def _value(answer: Answer) -> Any:
    """Returns what a worker's call returned, or raises what it raised."""
    if answer.error is not None:
        raise answer.error
    if answer.defect is not None:
        raise RuntimeError(f"in a worker:\n{answer.defect}")
    return answer.value


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
