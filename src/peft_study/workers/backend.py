"""What the scheduler needs of workers: the interfaces of backends, launchers and links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from peft_study.config import EvaluationConfig, MethodConfig, TrialSettings
from peft_study.engine import checkpoint
from peft_study.statistics import Losses
from peft_study.training.cost import TrialCost
from peft_study.training.loop import Commands
from peft_study.training.trial_run import TrialPlan
from peft_study.workers.worker import Facts, Report
from peft_study.workers.worker_process import Answer

Trained = Sequence[tuple[str, MethodConfig, Path]]


class WorkerDied(Exception):
    """A worker's process or actor died; the message says how."""


class Link(Protocol):
    """A connection to one worker."""

    def call(self, method: str, *arguments: Any) -> None:
        """Starts a call of a method; its answer must be read before the next call.

        Raises:
            WorkerDied: when it is dead.
        """

    def answer(self) -> Answer:
        """Waits for the answer to the call.

        Raises:
            WorkerDied: when it is dead.
        """

    def end(self) -> None:
        """Kills the worker."""


class Launcher(AbstractContextManager["Launcher"], Protocol):
    """Starts workers.

    Attributes:
        count: number of devices, each a place for one worker.
        threads: of each worker.
        sharing: most workers that share the memory of one machine; 1 where each has its own device.
        restarts: of a place's worker after it died.
    """

    count: int
    threads: int
    sharing: int
    restarts: int

    def open(self, place: int) -> Link:
        """Starts a worker at a place, from 0, without waiting for it."""

    def wait(self, links: Sequence[Link]) -> Sequence[Link]:
        """Waits until some links have an answer or are dead, and returns those.

        Raises:
            ProcessError: when none of the workers can be started.
        """


class Backend(AbstractContextManager["Backend"], Protocol):
    """Runs the trials of a study.

    Attributes:
        facts: of model and data.
        replays: True where a checkpoint covers the whole study, so that a resume repeats what came after it.
    """

    facts: Facts
    replays: bool

    @property
    def quiet(self) -> bool:
        """True where no worker is executing commands."""

    def checkpoints(self) -> Sequence[checkpoint.Checkpoint]:
        """Returns the newest checkpoint of each worker."""

    def settle(self, trials: int) -> int:
        """Sets slots, row budget and threads, and returns the slots of all workers; the folder must be claimed."""

    def start(self, plans: Mapping[str, TrialPlan]) -> Sequence[tuple[str, Report]]:
        """Starts or resumes work, and returns the first reports.

        Args:
            plans: of the running trials, by name; a backend that replays resumes those of its checkpoint.
        """

    def send(self, worker: str, commands: Commands | None) -> None:
        """Gives a worker its next commands after a report; None: it waits."""

    def reports(self) -> Sequence[tuple[str, Report]]:
        """Waits for reports; each must be answered with commands.

        Raises:
            ProcessError: when no worker is left.
        """

    def save(self, decided: Mapping[str, Any]) -> None:
        """Has every worker write a checkpoint; the backend must be quiet."""

    def conclude(self, decided: Mapping[str, Any]) -> None:
        """Saves or removes checkpoints at the end of a study, when no trial is running."""

    def test(self, trained: Trained) -> dict[str, Losses]:
        """Returns the test losses of trained adapters and of the untouched base (``none``), by example."""

    def costs(self, settings: Mapping[str, TrialSettings]) -> dict[str, TrialCost]:
        """Returns what a trial of each of these settings costs, when no trial is running."""

    def answers(self, systems: Trained, examples: Sequence[int], max_new_tokens: int) -> list[dict[str, Any]]:
        """Returns test rows with the answers of base and adapters, as `answer_rows`, when no trial is running."""

    def evaluate(self, config: EvaluationConfig, folder: Path, systems: Trained) -> None:
        """Asks base and adapters tasks, as `evaluate_trained`, when no trial is running."""
