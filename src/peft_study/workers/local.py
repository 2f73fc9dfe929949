"""One worker in this process.

Its checkpoint has the number of the journal's lines, so everything since then is repeated after a kill, bit by bit.
With several workers (workers/pool.py) the journal is kept, and each trial resumes from the newest checkpoint with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_study.config import EvaluationConfig, StudyConfig, TrialSettings
from peft_study.engine import checkpoint
from peft_study.model.in_memory import ModelInMemory
from peft_study.search.space_check import check_spaces, largest
from peft_study.statistics import Losses
from peft_study.storage.study_dir import StudyFolder, basis
from peft_study.training.cost import TrialCost
from peft_study.training.loop import Commands
from peft_study.training.session import Say, measure_base, open_session
from peft_study.training.slot_count import settle
from peft_study.training.trial_run import TrialPlan
from peft_study.workers.backend import Trained
from peft_study.workers.worker import Report, Worker, facts


class LocalBackend:
    """One worker, in this process."""

    replays = True

    def __init__(
        self, config: StudyConfig, folder: StudyFolder, say: Say, in_memory: ModelInMemory | None = None
    ) -> None:
        self._config, self._folder, self._say, self._in_memory = config, folder, say, in_memory
        self._commands: Commands | None = None

    def __enter__(self) -> LocalBackend:
        config = self._config
        self._session = open_session(
            config.model, config.data, config.training, self._say, test=True, in_memory=self._in_memory
        )
        for note in check_spaces(self._session, config):
            self._say(note)
        measure_base(self._session, self._say)
        self._worker = Worker(
            self._session, config.logging, checkpoints=self._folder.checkpoints, identity=basis(config)
        )
        self.facts = facts(self._session, config)
        return self

    def __exit__(self, *_error: object) -> None:
        self._worker.close()

    @property
    def quiet(self) -> bool:
        """True where there are no commands."""
        return self._commands is None

    def checkpoints(self) -> list[checkpoint.Checkpoint]:
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
        """Resumes from the checkpoint, if there is one."""
        found = self.checkpoints()
        report = self._worker.resume(found[0], plans) if found else self._worker.advance(Commands())
        return [("here", report)]

    def send(self, _worker: str, commands: Commands | None) -> None:
        """Keeps the commands until the next report is asked for."""
        self._commands = commands

    def reports(self) -> list[tuple[str, Report]]:
        """Runs the commands, then one row."""
        commands, self._commands = self._commands, None
        return [("here", self._worker.advance(commands or Commands()))]

    def save(self, decided: Mapping[str, Any]) -> None:
        """Writes a checkpoint."""
        self._worker.save(decided)

    def conclude(self, decided: Mapping[str, Any]) -> None:
        """Writes a checkpoint: without it, all since the last one would happen again."""
        self._worker.save(decided)

    def test(self, trained: Trained) -> dict[str, Losses]:
        """Measures the test part."""
        return self._worker.test(trained)

    def costs(self, settings: Mapping[str, TrialSettings]) -> dict[str, TrialCost]:
        """Measures what trials cost."""
        return self._worker.costs(settings)

    def answers(self, systems: Trained, examples: Sequence[int], max_new_tokens: int) -> list[dict[str, Any]]:
        """Has base and adapters answer."""
        return self._worker.answers(self._config.data, systems, examples, max_new_tokens)

    def evaluate(self, config: EvaluationConfig, folder: Path, systems: Trained) -> None:
        """Asks base and adapters tasks."""
        self._worker.evaluate(config, folder, systems)
