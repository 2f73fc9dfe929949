"""One device's part of a study: an engine with its slots, driven by commands, answering with reports."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_study.config import DataConfig, EvaluationConfig, LoggingConfig, MethodConfig, StudyConfig, TrialSettings
from peft_study.doctor.diagnosis import Diagnosis
from peft_study.doctor.observations import Observations
from peft_study.engine import checkpoint
from peft_study.engine.guards import Trainable
from peft_study.engine.row import DoesNotFit
from peft_study.engine.trial import StepReport, Trial
from peft_study.methods.peft_format import load_adapter
from peft_study.methods.reference import NoAdapter
from peft_study.methods.registry import is_exclusive
from peft_study.search.space_check import diagnose_spaces
from peft_study.statistics import Losses, TokenCounts
from peft_study.storage.held_out import HeldOut
from peft_study.training.answers import answer_rows, whole_model
from peft_study.training.cost import TrialCost, measure_costs
from peft_study.training.evaluation import evaluate_trained
from peft_study.training.loop import Commands, Slots, TrialEvent
from peft_study.training.session import Session, describe
from peft_study.training.trial_run import TrialPlan


@dataclass(frozen=True, slots=True)
class Facts:
    """What the scheduler must know of model and data.

    Attributes:
        train_lengths: tokens of each training row.
        counts_N, base_N: supervised tokens of each dev example, and the untouched base's summed losses of them.
        test_counts_N: supervised tokens of each test example.
        record: what the numbers are computed from.
        notes: lines the user should see once.
        seen, diagnosis: what the doctor sees of the study before it begins, and says.
    """

    train_lengths: npt.NDArray[np.int64]
    counts_N: TokenCounts
    base_N: Losses
    test_counts_N: TokenCounts
    record: dict[str, dict[str, object]]
    notes: tuple[str, ...]
    seen: Observations
    diagnosis: Diagnosis

    @property
    def examples(self) -> HeldOut:
        """The part of it that the study's folder keeps."""
        return HeldOut(self.counts_N, self.base_N, self.test_counts_N)


@dataclass(frozen=True, slots=True)
class Pace:
    """Where a trial in a slot stands: its last optimizer step of `total`, with loss and data tokens of its batch.

    `all_tokens` are the data tokens of all its steps.
    """

    step: int
    total: int
    loss: float
    tokens: int
    all_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """The answer to commands.

    Attributes:
        events: of trials, in order.
        room: free slots; 0 while a trial must be alone.
        running: names of the trials in the slots.
        paces: of the trials that took a step.
        lines: for the user.
        trainable: parameter counts of trials that began.
        lost: trials of a dead worker, which must be entered again.
    """

    events: Sequence[TrialEvent]
    room: int
    running: tuple[str, ...]
    paces: Mapping[str, Pace]
    lines: Sequence[str]
    trainable: Mapping[str, Trainable]
    lost: tuple[str, ...] = ()


class _Collector:
    """Collects progress of the slots for the next report."""

    def __init__(self) -> None:
        self.paces: dict[str, Pace] = {}
        self.lines: list[str] = []
        self.trainable: dict[str, Trainable] = {}

    def say(self, line: str, share: float | None = None, /) -> None:
        if share is None:
            self.lines.append(line)

    def counted(self, trial: Trial, trainable: Trainable) -> None:
        self.trainable[trial.name] = trainable

    def stepped(self, trial: Trial, report: StepReport, base_loss: float | None) -> None:
        before = self.paces.get(trial.name)
        tokens = report.tokens + (before.tokens if before else 0)
        self.paces[trial.name] = Pace(report.step, trial.total_steps, report.loss, tokens, trial.tokens)

    def evaluated(self, trial: Trial, loss: float, minus_base: float) -> None:
        pass  # the event has the losses


class Worker:
    """Executes commands with one engine.

    Args:
        session: with slots and row budget set.
        logging: how often things are written.
        checkpoints: folder of this worker's checkpoints.
        identity: digest of what its trials' numbers depend on.
    """

    def __init__(self, session: Session, logging: LoggingConfig, *, checkpoints: Path, identity: str) -> None:
        self.session = session
        self._collector = _Collector()
        self._slots = Slots(
            session, logging, self._collector, checkpoints=checkpoints, identity=identity, tolerant=True
        )

    def resume(self, found: checkpoint.Checkpoint, plans: Mapping[str, TrialPlan]) -> Report:
        """Resumes from a checkpoint of this worker's engine."""
        return self._report(self._slots.resume(found, plans))

    def advance(self, commands: Commands, seconds: float = 0.0) -> Report:
        """Runs the commands and then rows until there is an event, or the time is over; one row at least."""
        end = time.monotonic() + seconds
        events = self._slots.advance(commands)
        while not events and self._slots.running and time.monotonic() < end:
            events = self._slots.advance(Commands(decided=commands.decided))
        return self._report(events)

    def save(self, decided: Mapping[str, Any]) -> None:
        """Writes a checkpoint."""
        self._slots.save(decided)

    def close(self) -> None:
        """Empties the engine."""
        self._slots.close()

    def test(self, trained: Sequence[tuple[str, MethodConfig, Path]]) -> dict[str, Losses]:
        """Returns the summed losses of each test example, in nats, of trained adapters and of the untouched base.

        Args:
            trained: name, setting and adapter folder of each; one with an example that does not fit into the memory is
                left out, with a warning.

        Raises:
            ModelError: when an adapter cannot be read.
        """
        session = self.session
        assert session.test is not None
        assert session.base_test is not None
        everything = range(len(session.test))
        sums = {"none": session.base_test.of(everything)}
        session.base_test.save()
        beside = [entry for entry in trained if not is_exclusive(entry[1].method)]
        adapters = {name: load_adapter(folder, session.base) for name, _, folder in beside}
        while adapters:
            try:
                losses = session.engine.losses(list(adapters.values()), session.test, everything)
            except DoesNotFit as error:
                name = next(name for name, adapter in adapters.items() if adapter is error.adapter)
                warnings.warn(f"{name} has no test loss: {error}", stacklevel=2)
                del adapters[name]
            else:
                sums |= dict(zip(adapters, losses, strict=True))
                break
        for name, method, folder in trained:
            if is_exclusive(method.method):
                with whole_model(session, method, folder):
                    try:
                        sums[name] = session.engine.losses([NoAdapter()], session.test, everything)[0]
                    except DoesNotFit as error:
                        warnings.warn(f"{name} has no test loss: {error}", stacklevel=2)
        return sums

    def costs(self, settings: Mapping[str, TrialSettings]) -> dict[str, TrialCost]:
        """Returns what a trial of each setting costs; no trial may be running here."""
        return measure_costs(self.session, settings)

    def answers(
        self,
        data: DataConfig,
        systems: Sequence[tuple[str, MethodConfig, Path]],
        examples: Sequence[int],
        max_new_tokens: int,
    ) -> list[dict[str, Any]]:
        """Returns test rows with the answers of base and adapters, as `answer_rows`; no trial may be running here."""
        return answer_rows(self.session, data, systems, examples, max_new_tokens)

    def evaluate(
        self, config: EvaluationConfig, folder: Path, systems: Sequence[tuple[str, MethodConfig, Path]]
    ) -> None:
        """Asks base and adapters tasks, as `evaluate_trained`; no trial may be running here."""
        evaluate_trained(self.session, config, folder, systems)

    def _report(self, events: Sequence[TrialEvent]) -> Report:
        new, slots = self._collector, self._slots
        report = Report(events, slots.room(), slots.running, dict(new.paces), tuple(new.lines), dict(new.trainable))
        new.paces, new.lines, new.trainable = {}, [], {}
        return report


def facts(session: Session, config: StudyConfig) -> Facts:
    """Returns what the scheduler must know of a session with a test part.

    Args:
        session: with model and data.
        config: of the filled study.
    """
    assert session.test is not None
    return Facts(
        session.train.lengths(),
        session.held_out.counts(),
        session.base_held_out.of(range(len(session.held_out))),
        session.test.counts(),
        describe(session),
        session.notes,
        *diagnose_spaces(session, config),
    )
