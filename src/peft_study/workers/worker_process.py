"""Worker process: serves calls from the scheduler: a session and an engine in a process or Ray actor of their own.

    pool: call(method, arguments) --> worker: open, begin, then follow, follow, ..., save, test --> pool: Answer

Nothing here writes to the journal, to Optuna's database or to the study's own files: only to the folders of the trials
it has, and to its own checkpoints. A worker that does not see the study's folder sends what it wrote with its answers.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from peft_study.config import MethodConfig, StudyConfig
from peft_study.engine.memory import Room
from peft_study.errors import OutputError, UserError
from peft_study.search.space_check import check_spaces, largest
from peft_study.statistics import Losses
from peft_study.storage.files import AtomicFiles
from peft_study.storage.run_dir import RunFolder
from peft_study.storage.study_dir import basis
from peft_study.training import slot_count
from peft_study.training.loop import Commands
from peft_study.training.session import Session, describe, open_session
from peft_study.training.slot_count import Capacity
from peft_study.workers.checkpoints import WorkerCheckpoints
from peft_study.workers.worker import Facts, Report, Worker, facts

Files = dict[str, bytes]
"""Contents by path below the folder of all trials."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call returned; or the user's mistake, or the defect's traceback, that it ended with."""

    value: Any = None
    error: UserError | None = None
    defect: str | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """A worker with its model and data: where it runs, what its numbers are computed from, lines for the user, its
    share of the memory in bytes; the first one also tells the scheduler's facts."""

    where: str
    record: dict[str, dict[str, object]]
    lines: tuple[str, ...]
    facts: Facts | None
    free: int | None


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is.

    Attributes:
        name: of no other worker of this study, before or after.
        output: the study's folder, absolute.
        study: its name below the URL of checkpoints.
        token: to be read where a folder is shared.
        threads: of torch.
        trials: that fall to this worker.
        capacity: what the first worker settled; None: this is the first.
    """

    name: str
    output: Path
    study: str
    token: str
    threads: int
    trials: int
    capacity: Capacity | None


@dataclass(frozen=True, slots=True)
class Begun:
    """What a worker has: slots and row budget, and whether it sees the study's folder."""

    capacity: Capacity
    sees: bool


@dataclass(frozen=True, slots=True)
class Followed:
    """A report, and the files written meanwhile where the study's folder is not seen."""

    report: Report
    files: Files


class WorkerProcess:
    """One worker, away from the scheduler."""

    _session: Session
    _config: StudyConfig
    _worker: Worker
    _cuts: WorkerCheckpoints
    _trials: Path
    _outbox: Outbox | None = None
    _sent = 0

    def answer(self, method: str, arguments: Sequence[Any]) -> Answer:
        """Calls a method; an error is an answer, too."""
        try:
            return Answer(getattr(self, method)(*arguments))
        except UserError as error:
            return Answer(error=error)
        except Exception:  # noqa: BLE001  (a defect is told where the user is)
            return Answer(defect=traceback.format_exc())

    def where(self) -> str:
        """Returns the machine and process."""
        return f"process {os.getpid()} on {socket.gethostname()}"

    def open(self, settings: str, folder: str, sharing: int, first: Opened | None) -> Opened:
        """Loads model and data.

        Args:
            settings: of the filled study, as JSON.
            folder: the scheduler's current one, for paths that are relative to it.
            sharing: workers on one machine's memory.
            first: what the first worker answered; None: this is it, and it checks that every method fits, and tells the
                facts.
        """
        if Path(folder).is_dir():
            os.chdir(folder)
        lines: list[str] = []
        self._config = config = StudyConfig.model_validate_json(settings)
        session = open_session(config.model, config.data, config.training, lines.append, test=True)
        # while the first one is loaded, the memory that the others are going to take is still free
        room = Room(session.engine, free=None if first is None else first.free, sharing=sharing)
        self._session = session = replace(session, room=room)
        told = None
        if first is None:
            notes = check_spaces(session, config)
            told = facts(session)
            told = replace(told, notes=(*told.notes, *notes))
        return Opened(self.where(), describe(session), tuple(lines), told, room.free)

    def begin(self, assignment: Assignment) -> Begun:
        """Takes up the work: settles or takes over the engine's capacity, finds its folders.

        Raises:
            OutputError: where the checkpoints' place is not shared.
        """
        config, session = self._config, self._session
        self._cuts = WorkerCheckpoints(
            assignment.output / "checkpoints", config.checkpoints, assignment.study, basis(config)
        )
        if not self._cuts.sees_token(assignment.token):
            raise OutputError(
                f"{self.where()} does not see {config.checkpoints or assignment.output}",
                where=assignment.name,
                remedy="give an output folder that all machines see, or a folder or URL that they reach as checkpoints",
            )
        sees = WorkerCheckpoints(assignment.output / "checkpoints", None, assignment.study, "").sees_token(
            assignment.token
        )
        if sees:
            self._trials = assignment.output / "trials"
        else:
            self._trials = Path(tempfile.mkdtemp(prefix="peft-study-trials-"))
            self._outbox = Outbox(self._trials)
        torch.set_num_threads(assignment.threads)
        found = assignment.capacity
        if found is None:
            settings = list(largest(config).values())
            found = slot_count.found(session, settings, trials=assignment.trials, wanted=config.slots)
        found = replace(found, threads=assignment.threads)
        slot_count.use(session, found)
        self._worker = Worker(
            session,
            config.logging,
            checkpoints=self._cuts.folder(assignment.name),
            identity=basis(config),
            kept=lambda path: self._keep(assignment.name, path),
        )
        return Begun(found, sees)

    def follow(self, commands: Commands, files: Files, seconds: float) -> Followed:
        """Runs commands, then rows until there is an event, or the time has passed."""
        self._receive(files)
        for plan in commands.enter:  # claimed by the scheduler, where this machine may not see it
            (self._trials / plan.name).mkdir(parents=True, exist_ok=True)
        enter = [
            replace(
                plan,
                folder=RunFolder(self._trials / plan.name),
                cut=None if plan.cut is None else self._cuts.fetch(plan.cut),
            )
            for plan in commands.enter
        ]
        report = self._worker.follow(replace(commands, enter=enter), seconds)
        return Followed(report, self._outbox.changed() if self._outbox else {})

    def save(self, decided: Mapping[str, Any]) -> None:
        """Writes a checkpoint."""
        self._worker.save(decided)

    def test(self, trained: Sequence[tuple[str, MethodConfig]], files: Files) -> dict[str, Losses]:
        """Measures the test part."""
        self._receive(files)
        return self._worker.test([(name, method, RunFolder(self._trials / name).adapter) for name, method in trained])

    def close(self) -> None:
        """Empties the engine and removes what lies here for no one else."""
        if hasattr(self, "_worker"):
            self._worker.close()
            self._cuts.close()
        if self._outbox is not None:
            shutil.rmtree(self._trials, ignore_errors=True)

    def _keep(self, name: str, path: Path) -> None:
        self._cuts.send(name, path, self._sent)
        self._sent += 1

    def _receive(self, files: Files) -> None:
        write_files(self._trials, files)
        if self._outbox is not None:
            self._outbox.changed()  # what came from there need not go back


class Outbox:
    """The files below a folder that changed since they were last asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: dict[str, tuple[int, int]] = {}

    def changed(self) -> Files:
        """Returns the contents of new and changed files; those that are still being written do not count."""
        found: Files = {}
        for path in self._root.rglob("*"):
            name = str(path.relative_to(self._root))
            if not path.is_file() or any(part.startswith(".") for part in Path(name).parts):
                continue
            state = path.stat()
            if self._seen.get(name) != (state.st_mtime_ns, state.st_size):
                self._seen[name] = (state.st_mtime_ns, state.st_size)
                found[name] = path.read_bytes()
        return found


def read_files(root: Path, folder: Path) -> Files:
    """Returns the contents of the files in `folder`, by their path below `root`."""
    return {str(p.relative_to(root)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_files(root: Path, files: Files) -> None:
    """Writes files below `root`, each whole or not at all."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with AtomicFiles() as atomic:
            atomic.open(root / name).write(content)


def main() -> None:
    """Answers calls that come through the pipe whose number is the first argument, until it closes.

    A terminal's Ctrl-C, or a SIGTERM to all processes of a job, is the scheduler's to answer: it has this one save
    first. Standard input is a pipe that the scheduler holds: when it ends, by whatever way, this process does at once,
    even amid a row, and the device is free.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_scheduler, daemon=True).start()
    connection, worker = Connection(int(sys.argv[1])), WorkerProcess()
    while True:
        try:
            method, arguments = connection.recv()
            connection.send(worker.answer(method, arguments))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _end_with_the_scheduler() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)  # the main thread may be amid a row for minutes; a checkpoint under way is whole or not there
