"""One trial of a run while it is in the engine: its measurements and its files."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from peft_study.config import LoggingConfig, TrialSettings
from peft_study.engine.checkpoint import Checkpoint
from peft_study.engine.guards import Trainable, count_trainable
from peft_study.engine.trial import StepReport, Trial
from peft_study.methods.peft_files import note_encoding
from peft_study.methods.registry import create, starts_as_base
from peft_study.statistics import Losses, difference, mean_loss
from peft_study.storage.environment import peak_memory
from peft_study.storage.files import atomic_folder
from peft_study.storage.metrics import MetricsWriter
from peft_study.storage.run_dir import RunFolder
from peft_study.training.best_step import BestStep
from peft_study.training.session import Session

BASE_LOSS_STEPS = 50
"""At so many steps of a run at most, the base's loss on the same batch is measured: each costs a forward pass."""


class Watcher(Protocol):
    """Receives the progress of trials."""

    def say(self, line: str, share: float | None = None, /) -> None:
        """Receives lines for the user and work that takes time, as `Say`."""

    def counted(self, trial: Trial, trainable: Trainable) -> None:
        """Receives the parameter counts, before step 1."""

    def stepped(self, trial: Trial, report: StepReport, base_loss: float | None) -> None:
        """Receives each optimizer step; `base_loss` is the untouched base's on the batch, where it was measured."""

    def evaluated(self, trial: Trial, loss: float, minus_base: float) -> None:
        """Receives each held-out loss, and its difference from the untouched base's."""


Ending = Literal["finished", "pruned", "diverged", "failed"]


@dataclass(frozen=True, slots=True)
class TrialPlan:
    """A trial to be run.

    Attributes:
        name: unique among the run's trials.
        settings: what it trains with.
        folder: claimed by the caller.
        evaluate_every: steps between measurements of the held-out losses; None: only at the rungs and the end.
        checkpoint: to resume from; None: the trial starts at step 0.
        patience: of early stopping; None: it trains to its last step, whose adapter is kept.
    """

    name: str
    settings: TrialSettings
    folder: RunFolder
    evaluate_every: int | None = None
    checkpoint: Checkpoint | None = None
    patience: int | None = None

    @property
    def start(self) -> str | None:
        """Key of the held-out losses before step 1: trials that differ in their rates alone share them.

        None where they are not measured.
        """
        if not self.settings.measure_start:
            return None
        method = self.settings.method
        if starts_as_base(method.method):
            return "base"
        return f"{method.model_dump_json()} {self.settings.training.seed}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a trial.

    Attributes:
        status, reason: finished, or why not.
        start_N, end_N: summed held-out losses of each example before step 1 and at the end (None: not measured); with
            early stopping those of the best step instead of the last one's.
        best_step: with early stopping; None without it, or where none was measured.
        trainable: parameter counts; None where the trial could not be made.
        steps, tokens: optimizer steps and data tokens.
        virtual_tokens: of the method, beside them.
        seconds: from its entry, or the resume, to its end, with the rows of its neighbours.
    """

    status: Ending
    reason: str | None
    start_N: Losses | None = None
    end_N: Losses | None = None
    best_step: int | None = None
    trainable: Trainable | None = None
    steps: int = 0
    tokens: int = 0
    virtual_tokens: int = 0
    seconds: float = 0.0


class TrialRun:
    """A trial in its slot, with its files.

    Args:
        plan: of the trial.
        session: shared by all trials.
        logging: intervals of logging.
        watcher: receives the progress.
    """

    def __init__(self, plan: TrialPlan, session: Session, logging: LoggingConfig, watcher: Watcher) -> None:
        self.plan, self._session, self._logging, self._watcher = plan, session, logging, watcher
        training = plan.settings.training
        adapter = create(plan.settings.method, session.base, session.material, training.seed)
        self.trial = Trial(plan.name, adapter, training, session.train, scales_loss=session.base.placement.scales_loss)
        self.trainable = count_trainable(session.base, adapter)
        self._started = time.perf_counter()
        self._metrics: MetricsWriter | None = None
        self._start_N: Losses | None = None
        self.last_N: Losses | None = None
        # the base's own losses are measured before an exclusive method changes the base
        self._base_N = session.base_held_out.of(range(len(session.held_out)))
        self._counts_N = session.held_out.counts()
        writes = session.processes.writes
        self.best = None if plan.patience is None else BestStep(plan.patience, plan.folder, writes=writes)

    def begin(self, start_N: Losses | None, *, from_step: int | None) -> None:
        """Opens the files.

        Args:
            start_N: held-out losses before step 1; None: not measured.
            from_step: of a resumed trial; None: it is new.
        """
        self._start_N = start_N
        self._watcher.counted(self.trial, self.trainable)
        if self._session.processes.writes:
            folder = self.plan.folder
            folder.write("parameters.json", asdict(self.trainable))
            events = folder.path / "tensorboard" if self._logging.tensorboard else None
            self._metrics = MetricsWriter(folder.metrics, events, from_step=from_step)
        if from_step is None and self.best is not None:
            self.best.clear()
        if from_step is None and start_N is not None:
            self.log_held_out(start_N)

    @property
    def ended(self) -> bool:
        """True after its last step, or when early stopping ends it."""
        return self.trial.finished or (self.best is not None and self.best.stops)

    @property
    def evaluation_due(self) -> bool:
        """True where the held-out losses are due now."""
        step, every = self.trial.step, self.plan.evaluate_every
        return self.trial.finished or step in self.plan.settings.rungs or (every is not None and step % every == 0)

    def log(self, report: StepReport) -> None:
        """Logs an optimizer step."""
        trial, session, base_loss = self.trial, self._session, None
        # an exclusive trial has changed the base, so the base's loss can no longer be measured
        if self._logging.base_loss and not trial.adapter.exclusive:
            stride = max(1, trial.total_steps // BASE_LOSS_STEPS)
            if report.step % stride == 0 or report.step == 1:
                sums = session.base_train.of(report.examples)
                base_loss = float(sums.sum()) / max(report.supervised, 1)
        self._watcher.stepped(trial, report, base_loss)
        if self._metrics is not None and (report.step % self._logging.log_every == 0 or trial.finished):
            self._metrics.write(
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
                peak_memory_bytes=peak_memory(session.base.device),
                skipped=report.skipped,
            )

    def log_held_out(self, sums_N: Losses) -> None:
        """Logs the held-out losses; with early stopping, writes the adapter where they are the lowest so far."""
        self.last_N = sums_N
        best = None
        if self.best is not None and self.trial.step > 0:
            best = self.best.seen(self.trial.step, sums_N)
            if best:
                self._save(self.plan.folder.best)
        loss = mean_loss(sums_N, self._counts_N)
        above = difference(sums_N, self._base_N, self._counts_N)
        if self._metrics is not None:
            self._metrics.write(
                "held_out",
                self.trial.step,
                loss=loss.value,
                loss_low=loss.low,
                loss_high=loss.high,
                minus_base=above.value,
                minus_base_low=above.low,
                minus_base_high=above.high,
                examples=len(sums_N),
                **({} if best is None else {"best": best}),
            )
        self._watcher.evaluated(self.trial, loss.value, above.value)

    def save_adapter(self) -> None:
        """Writes the adapter, or the best step's; an exclusive trial must still be in its slot."""
        if self.best is not None:
            self.best.keep()
        else:
            self._save(self.plan.folder.adapter)

    def _save(self, folder: Path) -> None:
        if self._session.processes.writes and self.trial.parameters:
            with atomic_folder(folder) as place:
                self.trial.adapter.save(place, self._session.base)
                note_encoding(place, self._session.encoder.template_text, add_bos=self._session.add_bos)

    def outcome(self, status: Ending, end_N: Losses | None, reason: str | None = None) -> Outcome:
        """Returns the end of the trial."""
        trial = self.trial
        return Outcome(
            status,
            reason,
            start_N=self._start_N,
            end_N=end_N,
            best_step=None if self.best is None else self.best.step,
            trainable=self.trainable,
            steps=trial.step,
            tokens=trial.tokens,
            virtual_tokens=getattr(self.plan.settings.method, "tokens", 0) * trial.order.seen(trial.step),
            seconds=time.perf_counter() - self._started,
        )

    def close(self) -> None:
        """Closes the files."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
