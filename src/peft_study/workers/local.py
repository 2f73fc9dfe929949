"""The workers of a study, as the scheduler sees them: orders in, reports out.

`LocalCrew` is one worker in this process; its cut carries the study's decisions, so that after a kill everything since
happens again, to the last bit. A crew of several (workers/pool.py) goes on from what the journal says instead, each trial
from its own place in the newest cut that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from peft_study.config import Choices, MethodConfig, MethodSpace, Range, StudyConfig
from peft_study.engine import checkpoint
from peft_study.errors import ConfigError, UserError
from peft_study.methods.registry import is_exclusive
from peft_study.search.lr_range_test import central
from peft_study.storage.study_dir import StudyFolder, basis
from peft_study.training.loop import Commands
from peft_study.training.session import Say, Session, check_methods, open_session, past_context
from peft_study.training.slot_count import Typical, settle
from peft_study.training.trial_run import TrialPlan
from peft_study.workers.worker import Facts, Report, Worker, facts

Losses = npt.NDArray[np.float64]
Trained = Sequence[tuple[str, MethodConfig, Path]]


class Backend(Protocol):
    """Who runs the trials.

    Attributes:
        facts: of model and data.
        replays: True where a cut holds the whole study, and what came after it happens again.
    """

    facts: Facts
    replays: bool

    def __enter__(self) -> Backend: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def quiet(self) -> bool:
        """True where no worker has orders that it has not reported on."""

    def cuts(self) -> Sequence[checkpoint.Found]:
        """Returns the newest checkpoints; of several that hold a trial, the one with most of its steps counts."""

    def settle(self, trials: int) -> int:
        """Fixes slots, row budget and threads, once the folder is claimed; returns the slots of all workers."""

    def start(self, plans: Mapping[str, TrialPlan]) -> Sequence[tuple[str, Report]]:
        """Returns a first report of workers that are there; one that replays has put the trials of its cut back.

        Args:
            jobs: of the trials under way, by name.
        """

    def order(self, worker: str, commands: Commands | None) -> None:
        """Gives a worker that has reported its next orders; None: it waits."""

    def reports(self) -> Sequence[tuple[str, Report]]:
        """Waits for reports; each is to be answered with orders.

        Raises:
            ProcessError: when no worker is left.
        """

    def save(self, decided: Mapping[str, Any]) -> None:
        """Has every worker write a checkpoint; the crew must be quiet."""

    def conclude(self, decided: Mapping[str, Any]) -> None:
        """Leaves what a start after the study's end needs: nothing is under way."""

    def test(self, trained: Trained) -> dict[str, Losses]:
        """Returns the losses of each test example, of trained adapters and of the untouched base (``none``)."""


class LocalBackend:
    """One worker, in this process."""

    replays = True

    def __init__(self, config: StudyConfig, folder: StudyFolder, say: Say) -> None:
        self._config, self._folder, self._say = config, folder, say
        self._commands: Commands | None = None

    def __enter__(self) -> LocalBackend:
        config = self._config
        self._session = open_session(config.model, config.data, config.training, self._say, test=True)
        for note in check_spaces(self._session, config):
            self._say(note)
        self._worker = Worker(
            self._session, config.logging, checkpoints=self._folder.checkpoints, identity=basis(config)
        )
        self.facts = facts(self._session)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.close()

    @property
    def quiet(self) -> bool:
        """True where there are no orders."""
        return self._commands is None

    def cuts(self) -> list[checkpoint.Found]:
        """Returns the newest checkpoint of these settings, if there is one."""
        return [c for c in checkpoint.find(self._folder.checkpoints) if c.identity == basis(self._config)][-1:]

    def settle(self, trials: int) -> int:
        """Fixes the engine's slots, row budget and threads."""
        settings = list(largest(self._config).values())
        note = settle(self._session, self._folder.run, settings, trials=trials, wanted=self._config.slots)
        if note:
            self._say(note)
        assert self._session.engine.slots is not None
        return self._session.engine.slots

    def start(self, plans: Mapping[str, TrialPlan]) -> list[tuple[str, Report]]:
        """Goes on from the cut, if there is one."""
        cuts = self.cuts()
        report = self._worker.resume(cuts[0], plans) if cuts else self._worker.follow(Commands())
        return [("here", report)]

    def order(self, _worker: str, commands: Commands | None) -> None:
        """Keeps the orders until the next report is asked for."""
        self._commands = commands

    def reports(self) -> list[tuple[str, Report]]:
        """Follows the orders, by one row."""
        commands, self._commands = self._commands, None
        return [("here", self._worker.follow(commands or Commands()))]

    def save(self, decided: Mapping[str, Any]) -> None:
        """Writes a checkpoint."""
        self._worker.save(decided)

    def conclude(self, decided: Mapping[str, Any]) -> None:
        """Writes a checkpoint: without it, all since the last one would happen again."""
        self._worker.save(decided)

    def test(self, trained: Trained) -> dict[str, Losses]:
        """Measures the test part."""
        return self._worker.test(trained)


def largest(config: StudyConfig) -> dict[str, Typical]:
    """Returns the largest setting of each method of a filled study: what slots are measured with."""
    found = {}
    for method, space in config.methods.items():
        if space.kind == "none":
            continue
        values = central(space)
        for name, dimension in space.dimensions().items():
            if isinstance(dimension, Range):
                values[name] = int(dimension.high) if space.whole(name) else dimension.high
            elif dimension.sorted_numbers:
                values[name] = dimension.sorted_numbers[-1]
        found[method] = Typical(space.settings(values), space.training(values, config.training))
    return found


def tried(space: MethodSpace) -> list[MethodConfig]:
    """Returns the middle setting of a method, and with each choice and the ends of each range of whole numbers."""
    middle = central(space)
    settings = [space.settings(middle)]
    for dimension, choices in space.dimensions().items():
        if isinstance(choices, Choices):
            settings += [space.settings({**middle, dimension: choice}) for choice in choices.choices]
        elif space.whole(dimension):
            settings += [space.settings({**middle, dimension: int(end)}) for end in (choices.low, choices.high)]
    return list(dict.fromkeys(settings))


def check_spaces(session: Session, config: StudyConfig) -> list[str]:
    """Makes each method's adapters of the middle setting, of every choice and of the ends of ranges, once.

    Returns a note for each method of which some settings cannot be made: they will be rows that failed. So is all of a
    reference that does not fit, such as full fine-tuning, beside methods that do.

    Raises:
        ConfigError: naming the method of which none fits this base or data, and why.
    """
    notes, fitting, refused = [], list[MethodConfig](), dict[str, UserError]()
    for name, space in config.methods.items():
        failed, settings = [], tried(space)
        for setting in settings:
            try:
                check_methods(session, [setting], config.training.seed)
                fitting.append(setting)
            except UserError as error:
                failed.append(error)
        if len(failed) == len(settings):
            refused[name] = failed[0]
        elif failed:
            notes.append(f"methods.{name}: some settings of its space cannot be made ({failed[0].what})")
    for name, why in refused.items():
        if not is_exclusive(config.methods[name].kind) or all(setting.method == "none" for setting in fitting):
            raise ConfigError(why.what, where=f"methods.{name}", remedy=why.remedy) from why
        notes.append(f"{name} will be a row that failed: {why}")
    if warning := past_context(session, fitting):
        notes.append(warning)
    return notes
