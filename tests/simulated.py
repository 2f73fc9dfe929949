"""A study without a model: trials follow curves that are made up, one step a turn, a few of them side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_study.config import StudyConfig, validate
from peft_study.search.budget import steps_of
from peft_study.search.scheduler import Scheduler
from peft_study.search.trials import TrialRecord
from peft_study.storage.journal import Journal
from peft_study.training.loop import Ended, Evaluated, TrialEvent
from peft_study.training.trial_run import Outcome

EXAMPLES = 32
COUNTS = np.full(EXAMPLES, 10, dtype=np.int64)
BASE = 2.0
SPREAD = np.random.default_rng(0).normal(0, 3, EXAMPLES)
LENGTHS = np.full(400, 50, dtype=np.int64)

Curve = Callable[[TrialRecord, float], float | None]
"""Dev loss of a trial at a share of its steps; None: it diverges there."""


def study(**sections: Any) -> StudyConfig:
    values: dict[str, Any] = {
        "model": {"name": "m"},
        "data": {"train": "d"},
        "training": {"steps": 90, "batch_size": 4},
        "methods": {"lora": {}},
        "search": {"range_test": False},
        "output": "o",
    }
    return validate(StudyConfig, {**values, **sections}, where="test").filled()


def valley(best: float, *, depth: float = 1.0) -> Curve:
    """Losses that fall from the base's towards a valley around the best rate, half a nat higher a decade away."""

    def curve(trial: TrialRecord, share: float) -> float:
        rate = trial.values.get("learning_rate", best)
        away = abs(math.log10(rate / best))
        seed = 0.001 * (trial.seed or 0)
        return BASE - share * max(0.0, depth - 0.5 * away) + seed

    return curve


def losses(level: float) -> npt.NDArray[np.float64]:
    return 10 * level + SPREAD


class World:
    """A scheduler with the trials that it started.

    Attributes:
        scheduler, config: of the study.
        most: trials that were under way at once.
        order: names in the order in which they began.
    """

    def __init__(self, config: StudyConfig, folder: Path, curves: Mapping[str, Curve], *, slots: int = 4) -> None:
        self.config, self._folder, self._curves, self._slots = config, folder, curves, slots
        self.journal = Journal(folder / "journal.jsonl")
        self.scheduler = Scheduler(config, self.journal, lambda t: steps_of(t, config.budget.tokens, LENGTHS), COUNTS)
        self._at = dict.fromkeys((trial.name for trial in self.scheduler.state.running()), 0)
        self.most = 0
        self.order: list[str] = []

    def changed(self, config: StudyConfig, *methods: str) -> World:
        """Returns the study under a changed file, as `--continue` goes on with it.

        Args:
            config: the new one.
            methods: those whose space changed.
        """
        self.journal.append([{"event": "continued", "changes": ["methods: changed"], "methods": list(methods)}])
        return World(config, self._folder, self._curves, slots=self._slots)

    def run(self, *, until: Callable[[World], bool] = lambda _w: False) -> World:
        """Plays until the scheduler is finished."""
        events: list[TrialEvent] = []
        while not self.scheduler.finished and not until(self):
            leave = self.scheduler.receive(events)
            for name in leave:
                del self._at[name]
            events = [Ended(name, Outcome("pruned", reason, steps=0)) for name, reason in leave.items()]
            self.scheduler.receive(events)
            events = []
            for trial in self.scheduler.next(self._slots - len(self._at), empty=not self._at):
                self.order.append(trial.name)
                events += [Evaluated(trial.name, 0, losses(BASE))]
                if trial.kind == "reference":
                    events.append(Ended(trial.name, Outcome("finished", None)))
                else:
                    self._at[trial.name] = 0
            self.most = max(self.most, len(self._at))
            for name in list(self._at):
                events += self._step(name)
        return self

    def _step(self, name: str) -> list[TrialEvent]:
        trial = self.scheduler.state.trials[name]
        setting = trial.settings
        total = setting.training.steps
        assert total is not None
        self._at[name] += 1
        step = self._at[name]
        level = self._curves[trial.method](trial, step / total)
        if level is None:
            del self._at[name]
            return [Ended(name, Outcome("diverged", f"the loss became nan at step {step}", steps=step))]
        if step not in setting.rungs and step < total:
            return []
        events: list[TrialEvent] = [Evaluated(name, step, losses(level))]
        if step == total:
            del self._at[name]
            events.append(Ended(name, Outcome("finished", None, steps=step, tokens=step * 200)))
        return events
