"""Who runs the trials of a study: what one worker here, processes of this machine and Ray actors have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from peft_study.config import MethodConfig
from peft_study.engine import checkpoint
from peft_study.statistics import Losses
from peft_study.training.loop import Commands
from peft_study.training.trial_run import TrialPlan
from peft_study.workers.worker import Facts, Report
from peft_study.workers.worker_process import Answer

Trained = Sequence[tuple[str, MethodConfig, Path]]


class WorkerDied(Exception):
    """The process or actor behind a link is dead; says how it died."""


class Link(Protocol):
    """The way to one worker: a call, then its answer."""

    def call(self, method: str, *arguments: Any) -> None:
        """Has the worker call a method; one call at a time.

        Raises:
            WorkerDied: it is dead.
        """

    def answer(self) -> Answer:
        """Waits for the answer to the call.

        Raises:
            WorkerDied: it is dead.
        """

    def end(self) -> None:
        """Ends the worker at once, whatever it does."""


class Launcher(Protocol):
    """Starts workers.

    Attributes:
        count: of the devices: places for a worker.
        threads: of each worker.
        sharing: workers, at most, that share the memory of one machine; 1 where each has a device of its own.
        restarts: how often a place's worker is started again after it died.
    """

    count: int
    threads: int
    sharing: int
    restarts: int

    def __enter__(self) -> Launcher: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def open(self, place: int) -> Link:
        """Starts a worker on a device, from 0; it may be long in coming."""

    def wait(self, links: Sequence[Link]) -> Sequence[Link]:
        """Waits until some of the links have an answer, or are dead, and returns those.

        Raises:
            ProcessError: when none of them ever will.
        """


class Backend(Protocol):
    """Who runs the trials.

    Attributes:
        facts: of model and data.
        replays: True where a checkpoint holds the whole study, and what came after it happens again.
    """

    facts: Facts
    replays: bool

    def __enter__(self) -> Backend: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def quiet(self) -> bool:
        """True where no worker has commands that it has not reported on."""

    def checkpoints(self) -> Sequence[checkpoint.Checkpoint]:
        """Returns the newest checkpoints; of several that hold a trial, the one with most of its steps counts."""

    def settle(self, trials: int) -> int:
        """Fixes slots, row budget and threads, once the folder is claimed; returns the slots of all workers."""

    def start(self, plans: Mapping[str, TrialPlan]) -> Sequence[tuple[str, Report]]:
        """Returns a first report of workers that are there; one that replays has put the trials of its checkpoint back.

        Args:
            plans: of the trials under way, by name.
        """

    def send(self, worker: str, commands: Commands | None) -> None:
        """Gives a worker that has reported its next commands; None: it waits."""

    def reports(self) -> Sequence[tuple[str, Report]]:
        """Waits for reports; each is to be answered with commands.

        Raises:
            ProcessError: when no worker is left.
        """

    def save(self, decided: Mapping[str, Any]) -> None:
        """Has every worker write a checkpoint; the backend must be quiet."""

    def conclude(self, decided: Mapping[str, Any]) -> None:
        """Leaves what a start after the study's end needs: nothing is under way."""

    def test(self, trained: Trained) -> dict[str, Losses]:
        """Returns the losses of each test example, of trained adapters and of the untouched base (``none``)."""
