"""Runs one trial from its first step to its saved adapter, writing everything down."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from peft_study.config import LoggingConfig, MethodConfig, TrainingConfig
from peft_study.data.atomic import atomic_folder
from peft_study.engine import checkpoint
from peft_study.engine.engine import Event
from peft_study.engine.guards import Trainable, count_trainable
from peft_study.engine.heldout import example_losses
from peft_study.engine.trial import StepReport, Trial
from peft_study.evaluate.statistics import difference, mean_loss
from peft_study.methods import create
from peft_study.methods.peft_format import note_encoding
from peft_study.study.metrics import MetricsWriter
from peft_study.study.record import peak_memory
from peft_study.study.session import Session
from peft_study.study.stop import Interrupted, StopRequest
from peft_study.study.store import RunFolder

BASE_LOSS_STEPS = 50
"""Training steps of a run at which the base's loss on the same batch is measured at most: each costs a forward pass."""

Losses = npt.NDArray[np.float64]


class Watcher(Protocol):
    """Who is told how a trial goes."""

    def say(self, line: str) -> None:
        """Receives a line for the user."""

    def counted(self, trial: Trial, trainable: Trainable) -> None:
        """Receives what trains, before step 1."""

    def stepped(self, trial: Trial, report: StepReport, base_loss: float | None) -> None:
        """Receives each optimizer step; `base_loss` is the untouched base's on the batch, where it was measured."""

    def evaluated(self, trial: Trial, loss: float, minus_base: float) -> None:
        """Receives each held-out loss, and how far it is above the untouched base's."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended.

    Attributes:
        diverged: the reason, where its numbers stopped being finite.
        start_N, end_N: summed held-out losses of each example before step 1 and after the last step (None: diverged).
        trainable: parameter counts.
        steps, tokens, seconds: what it took; tokens are data tokens.
    """

    diverged: str | None
    start_N: Losses
    end_N: Losses | None
    trainable: Trainable
    steps: int
    tokens: int
    seconds: float


class TrialRunner:
    """Runs trials of one session, one after another.

    Args:
        session: what they share.
        logging: how often things are written.
        watcher: is told.
        stop: asked between steps.
    """

    def __init__(self, session: Session, logging: LoggingConfig, watcher: Watcher, stop: StopRequest) -> None:
        self._session, self._logging, self._watcher, self._stop = session, logging, watcher, stop
        self._counts_N = session.held_out.counts()
        # held-out losses at step 0 by initialisation: trials that differ in their rates alone share them
        self._initial: dict[str, Losses] = {}

    def run(
        self,
        name: str,
        method: MethodConfig,
        training: TrainingConfig,
        folder: RunFolder,
        *,
        identity: str,
        resume: checkpoint.Found | None = None,
    ) -> Outcome:
        """Trains the trial and saves its adapter into the folder.

        Args:
            name: unique among the run's trials.
            method, training: the setting; the learning rate is filled in.
            folder: claimed by the caller.
            identity: of the run's settings, kept in checkpoints.
            resume: where to go on from.
        """
        started, session = time.perf_counter(), self._session
        adapter = create(method, session.base, session.material, training.seed)
        trial = Trial(name, adapter, training, session.train, scales_loss=session.base.placement.scales_loss)
        trainable = count_trainable(session.base, adapter)
        self._watcher.counted(trial, trainable)
        folder.write("parameters.json", asdict(trainable))
        # the base's own losses are measured before an exclusive method changes the base
        base_N = session.base_held_out.of(range(len(session.held_out)))
        session.base_held_out.save()
        tensorboard = folder.path / "tensorboard" if self._logging.tensorboard else None
        with MetricsWriter(folder.metrics, tensorboard, from_step=resume.step if resume else 0) as metrics:
            session.engine.admit(trial)
            try:
                start_N = self._start_losses(trial, method)
                if resume is None:
                    self._tell(trial, metrics, start_N, base_N)
                else:
                    checkpoint.load(trial, resume)
                    self._watcher.say(f"{name}: goes on from step {trial.step} of {trial.total_steps}")
                diverged: str | None = None
                end_N: Losses | None = start_N
                if trial.optimizer is not None:
                    diverged, end_N = self._train(trial, metrics, folder, identity, base_N)
                if diverged is None and adapter.parameters():
                    with atomic_folder(folder.adapter) as place:
                        adapter.save(place, session.base)
                        note_encoding(place, session.encoder.template_text, add_bos=session.add_bos)
            finally:
                if trial in session.engine.trials:
                    session.engine.evict(trial)
        session.base_train.save()
        return Outcome(
            diverged,
            start_N,
            end_N,
            trainable,
            trial.step,
            trial.tokens,
            time.perf_counter() - started,
        )

    def _train(
        self, trial: Trial, metrics: MetricsWriter, folder: RunFolder, identity: str, base_N: Losses
    ) -> tuple[str | None, Losses | None]:
        """Steps until the budget is used up; returns why it diverged, if it did, and the held-out losses at the end."""
        every = self._logging.evaluate_every or max(1, trial.total_steps // 4)
        saving = self._checkpoint_interval(trial)
        while not trial.finished:
            for event in self._session.engine.step():
                if event.diverged:
                    return event.diverged, None
                self._log(trial, event, metrics)
                if trial.step % every == 0 and not trial.finished:
                    self._tell(trial, metrics, self._losses(trial), base_N)
                if saving and trial.step % saving == 0:
                    self._save(trial, folder, identity)
            if self._stop.asked and not trial.finished:
                self._save(trial, folder, identity)
                raise Interrupted(
                    f"stopped at step {trial.step} of {trial.total_steps} of {trial.name}, with a checkpoint; "
                    "the same command goes on from there"
                )
        end_N = self._losses(trial)
        self._tell(trial, metrics, end_N, base_N)
        return None, end_N

    def _checkpoint_interval(self, trial: Trial) -> int:
        every = self._logging.checkpoint_every
        return trial.order.steps_per_epoch if every == "epoch" else int(every or 0)

    def _save(self, trial: Trial, folder: RunFolder, identity: str) -> None:
        checkpoint.save(trial, folder.checkpoints, identity)
        checkpoint.prune(folder.checkpoints, self._logging.keep_checkpoints)

    def _log(self, trial: Trial, event: Event, metrics: MetricsWriter) -> None:
        report = event.report
        base_loss = None
        # an exclusive trial has changed the base, so the base's loss can no longer be measured
        if self._logging.base_loss and not trial.adapter.exclusive:
            stride = max(1, trial.total_steps // BASE_LOSS_STEPS)
            if report.step % stride == 0 or report.step == 1:
                sums = self._session.base_train.of(report.examples)
                base_loss = float(sums.sum()) / max(report.supervised, 1)
        self._watcher.stepped(trial, report, base_loss)
        if report.step % self._logging.log_every == 0 or trial.finished:
            metrics.write(
                "train",
                report.step,
                loss=report.loss,
                reduced_loss=report.reduced_loss,
                loss_minus_base=None if base_loss is None else report.loss - base_loss,
                learning_rate=report.learning_rate,
                gradient_norm=report.gradient_norm,
                tokens=report.tokens,
                supervised_tokens=report.supervised,
                tokens_per_second=report.tokens / report.seconds,
                peak_memory_bytes=peak_memory(self._session.base.device),
                skipped=report.skipped,
            )

    def _start_losses(self, trial: Trial, method: MethodConfig) -> Losses:
        """Returns the held-out losses of a trial that has taken no step, measured once an initialisation."""
        start = f"{method.model_dump_json()} {trial.training.seed}"
        if start not in self._initial:
            self._initial[start] = self._losses(trial)
        return self._initial[start]

    def _losses(self, trial: Trial) -> Losses:
        """Returns the summed held-out loss of each example."""
        engine, rows = self._session.engine, self._session.held_out
        return example_losses(engine.runner, trial.adapter, rows, range(len(rows)), engine.row_tokens)

    def _tell(self, trial: Trial, metrics: MetricsWriter, sums_N: Losses, base_N: Losses) -> None:
        """Writes down the held-out losses and tells the watcher."""
        loss, above = mean_loss(sums_N, self._counts_N), difference(sums_N, base_N, self._counts_N)
        metrics.write(
            "held_out",
            trial.step,
            loss=loss.value,
            loss_low=loss.low,
            loss_high=loss.high,
            minus_base=above.value,
            minus_base_low=above.low,
            minus_base_high=above.high,
            examples=len(sums_N),
        )
        self._watcher.evaluated(trial, loss.value, above.value)
