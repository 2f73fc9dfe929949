"""Workers as processes of this machine: one a GPU, or on CPU each with its share of the threads.

Each is a fresh interpreter, not a fork or a multiprocessing child: its environment (visible GPU, OpenMP threads) is set
before it loads torch, and the user's script is not imported again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

import peft_study
from peft_study.config import ModelConfig
from peft_study.errors import ConfigError
from peft_study.training.interrupt import STOP_SIGNALS
from peft_study.workers.backend import WorkerDied
from peft_study.workers.worker_process import Answer

RESTARTS = 3
_DIED = (EOFError, BrokenPipeError, ConnectionResetError)
_PROGRAM = ("-c", "from peft_study.workers.worker_process import main; main()")


class SubprocessLauncher:
    """Processes of this machine.

    Args:
        count: number of processes.
        model: with the device.

    Raises:
        ConfigError: when there are fewer GPUs than processes.
    """

    restarts = RESTARTS

    def __init__(self, count: int, model: ModelConfig) -> None:
        self.count = count
        self._gpus: list[str] | None = None
        if model.device in ("auto", "cuda") and torch.cuda.is_available():
            self._gpus = visible_gpus()
            if count > len(self._gpus):
                there = f"{len(self._gpus)} GPU{'s' if len(self._gpus) > 1 else ''}"
                remedy = f"give at most {len(self._gpus)}: many trials share a GPU in one worker"
                raise ConfigError(f"{count} workers, but {there}", where="--workers", remedy=remedy)
        elif count > 1 and model.device in ("auto", "mps") and torch.backends.mps.is_available():
            raise ConfigError(f"{count} workers, but 1 GPU", where="--workers", remedy="leave it out")
        self.threads = max(1, torch.get_num_threads() // count)
        self.sharing = count if self._gpus is None else 1
        self._links: list[ProcessLink] = []

    def __enter__(self) -> SubprocessLauncher:
        return self

    def __exit__(self, *_error: object) -> None:
        for link in self._links:
            link.end()

    def open(self, place: int) -> ProcessLink:
        """Starts a process."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        source = str(Path(peft_study.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        if self._gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[place]
        link = ProcessLink(environment)
        self._links.append(link)
        return link

    def wait(self, links: Sequence[Any]) -> list[ProcessLink]:
        """Waits until some processes answered or died."""
        ready = wait([link.connection for link in links])
        return [link for link in links if link.connection in ready]


class ProcessLink:
    """A connection to one process."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.connection, theirs = Pipe()
        # a child is born with its parent's mask: a signal sent to all processes of a job must not end one that has not
        # come to ignoring it, which takes the seconds of its imports
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, *_PROGRAM, str(theirs.fileno())],
                env=environment,
                stdin=subprocess.PIPE,  # its end tells the child that this process has ended
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is for this process alone
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()

    def call(self, method: str, *arguments: Any) -> None:
        """Sends a call."""
        try:
            self.connection.send((method, arguments))
        except _DIED as error:
            raise self._died() from error

    def answer(self) -> Answer:
        """Waits for its answer."""
        try:
            answer: Answer = self.connection.recv()
        except _DIED as error:
            raise self._died() from error
        return answer

    def end(self) -> None:
        """Kills the process, if it is still there."""
        self._process.kill()
        self._process.wait()
        self.connection.close()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _died(self) -> WorkerDied:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        code = self._process.returncode
        if code is not None and code < 0:
            return WorkerDied(
                f"{signal.Signals(-code).name}{', as where memory ran out' if code == -signal.SIGKILL else ''}"
            )
        return WorkerDied(f"exit code {code}")


def visible_gpus() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
