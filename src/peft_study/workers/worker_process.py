"""Worker process: serves calls from the scheduler: a session and an engine in a process or Ray actor of their own.

    pool: call(method, arguments) --> worker: open, begin, then advance, advance, ..., save, test --> pool: Answer

A worker writes to the folders of its trials and to its own folder of checkpoints. The journal, Optuna's database and
the study's other files are the scheduler's.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from peft_study.config import StudyConfig
from peft_study.engine.memory import Room
from peft_study.errors import OutputError, UserError
from peft_study.search.space_check import check_spaces, largest
from peft_study.storage.study_dir import basis
from peft_study.training import slot_count
from peft_study.training.interrupt import STOP_SIGNALS
from peft_study.training.session import Session, describe, open_session, unheard
from peft_study.training.slot_count import Capacity
from peft_study.workers.worker import Facts, Worker, facts


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call returned, or the user's mistake or the traceback that it ended with."""

    value: Any = None
    error: UserError | None = None
    defect: str | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """What a worker answers once model and data are loaded.

    Attributes:
        where: machine and process.
        record: what its numbers are computed from.
        facts: what the scheduler must know; of the first worker only.
        free: bytes of memory that this worker may use; None: unknown.
    """

    where: str
    record: dict[str, dict[str, object]]
    facts: Facts | None
    free: int | None


class WorkerProcess:
    """Serves calls: its own `open` and `begin`, then those of `Worker`."""

    _session: Session
    _config: StudyConfig
    _worker: Worker

    def answer(self, method: str, arguments: Sequence[Any]) -> Answer:
        """Calls a method and returns its answer or its error."""
        try:
            target = self if method in ("open", "begin") else self._worker
            return Answer(getattr(target, method)(*arguments))
        except UserError as error:
            return Answer(error=error)
        except Exception:  # noqa: BLE001  (the scheduler raises it where the user sees it)
            return Answer(defect=traceback.format_exc())

    def where(self) -> str:
        """Returns the machine and process."""
        return f"process {os.getpid()} on {socket.gethostname()}"

    def open(self, settings: str, folder: str, sharing: int, first: Opened | None) -> Opened:
        """Loads model and data.

        Args:
            settings: of the filled study, as JSON.
            folder: the scheduler's current folder, for relative paths.
            sharing: workers that share one machine's memory.
            first: what the first worker answered; None: this is the first, which checks that every method fits and
                returns the facts.
        """
        if Path(folder).is_dir():
            os.chdir(folder)
        self._config = config = StudyConfig.model_validate_json(settings)
        session = open_session(config.model, config.data, config.training, unheard, test=True)
        # the first worker measures the free memory before the others load
        may_recompute = config.training.gradient_checkpointing == "auto"
        free = None if first is None else first.free
        room = Room(session.engine, free=free, sharing=sharing, recomputes=may_recompute)
        self._session = session = replace(session, room=room)
        found = None
        if first is None:
            notes = check_spaces(session, config)
            found = facts(session, config)
            found = replace(found, notes=(*found.notes, *notes))
        return Opened(self.where(), describe(session), found, room.free)

    def begin(self, checkpoints: Path, threads: int, trials: int, capacity: Capacity | None) -> Capacity:
        """Gives the engine its slots and row budget, and returns them.

        Args:
            checkpoints: this worker's folder, ``STUDY/checkpoints/worker-N``, made by the scheduler.
            threads: of torch.
            trials: expected for this worker.
            capacity: what the first worker measured; None: this is the first.

        Raises:
            OutputError: when this machine does not see the study's folder.
        """
        if not checkpoints.is_dir():
            raise OutputError(
                f"{self.where()} does not see {checkpoints.parents[1]}",
                where=checkpoints.name,
                remedy="give an output folder that all machines see (docs/scale.md)",
            )
        config, session = self._config, self._session
        torch.set_num_threads(threads)
        if capacity is None:
            settings = list(largest(config).values())
            capacity = slot_count.found(session, settings, trials=trials, wanted=config.slots)
        capacity = replace(capacity, threads=threads)
        slot_count.use(session, capacity)
        self._worker = Worker(session, config.logging, checkpoints=checkpoints, identity=basis(config))
        return capacity


def main() -> None:
    """Answers calls from the pipe whose number is the first argument, until it closes.

    Ctrl-C and SIGTERM reach all processes of a job; only the scheduler answers them, and has this one save first.
    Standard input is a pipe held by the scheduler: when it closes, this process exits at once, even amid a row, which
    frees the device.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_the_scheduler, daemon=True).start()
    connection, worker = Connection(int(sys.argv[1])), WorkerProcess()
    while True:
        try:
            method, arguments = connection.recv()
            connection.send(worker.answer(method, arguments))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _exit_with_the_scheduler() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)  # a row may take minutes; a checkpoint being written is whole or not there
