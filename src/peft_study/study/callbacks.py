"""What a caller from Python hears of a study, and how it stops a trial or the whole study.

report of a worker --Callbacks--> on_trial_begin | on_step | on_evaluate | on_trial_end
                                    trial.stop(why), trial.stop_study(why) --> scheduler, journal
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_study.errors import ConfigError
from peft_study.search.trials import StudyState
from peft_study.statistics import loss_value
from peft_study.training.loop import Ended, Evaluated
from peft_study.workers.worker import Facts, Report

if TYPE_CHECKING:
    from peft_study.report.study_result import StudyResult


_ASKED = "a callback asked for it"


@dataclass(slots=True)
class LiveTrial:
    """A trial as a callback sees it.

    Attributes:
        name, method, kind: ``lora-003``, ``lora``; ``reference``, ``range_test``, ``search`` or ``final``.
        settings: every setting of its method, and the optimizer's searched ones.
        step, total_steps: optimizer steps taken, and planned.
        tokens: data tokens of these steps.
        loss: of the last batch, nats a supervised token; None before step 1.
        dev: held-out loss when it was last measured, nats a supervised token.
        dev_minus_base: the same minus the untouched base's.
        status, reason: ``running``, or how it ended.
    """

    name: str
    method: str
    kind: str
    settings: dict[str, Any]
    step: int = 0
    total_steps: int | None = None
    tokens: int = 0
    loss: float | None = None
    dev: float | None = None
    dev_minus_base: float | None = None
    status: str = "running"
    reason: str | None = None
    _stop: str | None = None
    _stop_study: str | None = None

    def stop(self, reason: str = "") -> None:
        """Ends this trial before its next step, as pruned; its reason goes into the journal."""
        self._stop = str(reason or _ASKED)

    def stop_study(self, reason: str = "") -> None:
        """Ends the study: running trials stop, nothing new begins, and the results are those there are."""
        self._stop_study = str(reason or _ASKED)


class Callback:
    """Base class of callbacks: override what you need."""

    def on_trial_begin(self, trial: LiveTrial) -> None:
        """Called when a trial is in its slot."""

    def on_step(self, trial: LiveTrial) -> None:
        """Called after optimizer steps; several workers report every second or so, with the last step."""

    def on_evaluate(self, trial: LiveTrial) -> None:
        """Called after each held-out loss."""

    def on_trial_end(self, trial: LiveTrial) -> None:
        """Called when a trial has finished, or was stopped, diverged or failed."""

    def on_study_end(self, result: StudyResult) -> None:
        """Called once, when the results are written."""


def check_callbacks(callbacks: Any) -> None:
    """Refuses what is no sequence of callbacks.

    Raises:
        ConfigError: naming the first that is none.
    """
    several = isinstance(callbacks, (list, tuple))
    for callback in callbacks if several else [callbacks]:
        if not (several and isinstance(callback, Callback)):
            what = f"{callback!r} is no {'callback' if several else 'list of callbacks'}"
            remedy = "give a list of objects whose classes inherit from peft_study.Callback"
            raise ConfigError(what, where="callbacks", remedy=remedy)


class Callbacks:
    """Tells callbacks what a report says, and collects what they stop.

    Args:
        callbacks: in the order in which they are called.
        facts: of the data, for the held-out losses.
    """

    def __init__(self, callbacks: Sequence[Callback], facts: Facts) -> None:
        self._callbacks, self._facts = tuple(callbacks), facts
        self._trials: dict[str, LiveTrial] = {}

    def reported(self, report: Report, state: StudyState) -> tuple[dict[str, str], str | None]:
        """Tells what a report says.

        Args:
            report: of a worker, after the scheduler has seen it.
            state: of the study.

        Returns:
            The running trials to stop with the reason of each, and the reason to stop the study, or None.
        """
        if not self._callbacks:
            return {}, None
        told: list[LiveTrial] = []
        for name, pace in report.paces.items():
            trial = self._trial(name, state)
            trial.step, trial.total_steps, trial.loss = pace.step, pace.total, pace.loss
            trial.tokens = pace.all_tokens
            told.append(self._tell("on_step", trial))
        for event in report.events:
            trial = self._trial(event.name, state)
            if isinstance(event, Evaluated):
                counts_N = self._facts.counts_N
                trial.step, trial.dev = event.step, loss_value(event.sums_N, counts_N)
                trial.dev_minus_base = trial.dev - loss_value(self._facts.base_N, counts_N)
                told.append(self._tell("on_evaluate", trial))
            elif isinstance(event, Ended):
                trial.status, trial.reason = event.outcome.status, event.outcome.reason
                told.append(self._tell("on_trial_end", self._trials.pop(event.name)))
        stops = {t.name: f"stopped by a callback: {t._stop}" for t in told if t._stop and t.status == "running"}
        return stops, next((t._stop_study for t in told if t._stop_study), None)

    def _trial(self, name: str, state: StudyState) -> LiveTrial:
        """Returns the live view of a trial, and tells of its beginning when it is first seen."""
        if name not in self._trials:
            record = state.trials[name]
            total = None if record.kind == "reference" else record.settings.training.steps
            live = LiveTrial(name, record.method, record.kind, record.settings.flat, total_steps=total)
            self._trials[name] = live
            self._tell("on_trial_begin", live)
        return self._trials[name]

    def _tell(self, what: str, trial: LiveTrial) -> LiveTrial:
        for callback in self._callbacks:
            getattr(callback, what)(trial)
        return trial
