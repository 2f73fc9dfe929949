"""The trials of a study in experiment trackers, each as a run of one group, through a callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_study.config import StudyConfig
from peft_study.report.study_reader import read_study
from peft_study.search.trials import setting_name
from peft_study.study.callbacks import Callback, LiveTrial
from peft_study.training.session import Say
from peft_study.training.trackers import Trackers

if TYPE_CHECKING:
    from peft_study.report.study_result import StudyResult


class TrackerCallback(Callback):
    """Sends what a study does to the trackers of its ``logging.trackers``.

    Args:
        config: of the study.
        say: receives a warning for each tracker that fails.

    Raises:
        ConfigError: when the package of a tracker is not installed.
    """

    def __init__(self, config: StudyConfig, say: Say) -> None:
        self._model = config.model.name
        self._trackers = Trackers(config.logging.trackers, config.output, say, config.output.resolve().name)

    def on_trial_begin(self, trial: LiveTrial) -> None:
        """Begins a run with the trial's settings."""
        self._begin(trial.name, trial.method, trial.kind, trial.settings)

    def _begin(self, name: str, space: str, kind: str, settings: dict[str, Any]) -> None:
        self._trackers.begin(name, {"kind": kind, "space": space, "model": self._model, **settings})

    def on_step(self, trial: LiveTrial) -> None:
        """Logs loss and data tokens."""
        self._trackers.log(trial.name, trial.step, {"train/loss": trial.loss, "train/tokens": trial.tokens})

    def on_evaluate(self, trial: LiveTrial) -> None:
        """Logs the held-out loss."""
        self._trackers.log(trial.name, trial.step, {"dev/loss": trial.dev, "dev/minus_base": trial.dev_minus_base})

    def on_trial_end(self, trial: LiveTrial) -> None:
        """Ends the run with the trial's result."""
        result = {"reason": trial.reason, "dev": trial.dev, "dev_minus_base": trial.dev_minus_base}
        self._trackers.end(trial.name, trial.status, result)

    def on_study_end(self, result: StudyResult) -> None:
        """Adds the test losses of the finals, and marks the trials of the winning setting."""
        if not self._trackers.names:
            return
        trials, best = read_study(result.folder).state.trials, result.best
        for row in result.trials_dataframe().to_dict("records"):
            name, winner = row["name"], best is not None and setting_name(row["method"], row["number"]) == best.name
            if row["kind"] == "final" or (row["kind"] == "search" and winner):
                self._begin(name, row["method"], row["kind"], trials[name].settings.flat)
                values = {key: _plain(row[key]) for key in ("reason", "dev", "dev_minus_base", "test")}
                self._trackers.end(name, row["status"], {**values, "winner": winner})

    def close(self) -> None:
        """Waits until everything is sent; trials that have not ended are interrupted."""
        self._trackers.close()


def _plain(value: Any) -> Any:
    """Returns a value of a table, in which a missing number is not a number."""
    return None if value != value else value
