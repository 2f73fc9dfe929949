"""Sends runs to experiment trackers, each in a process of its own, so that no network and no disk can hold up a run.

    Trackers --begin, log, end, as JSON lines--> process of wandb | trackio | mlflow --> the tool's own package
             <--the first thing that went wrong--

A trial of a study is a run of the group that has the study's name. The id of a run is made of its name and of a number
in trackers.json of the folder: a study that resumes continues its runs, and one that starts again makes new ones.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import peft_study
from peft_study.config import TrainConfig, TrialSettings
from peft_study.engine.guards import Trainable
from peft_study.engine.trial import StepReport, Trial
from peft_study.errors import ConfigError
from peft_study.statistics import Estimate
from peft_study.storage.run_dir import RunFolder
from peft_study.training.session import Say
from peft_study.training.trial_run import Watcher

CLOSING = 30.0
"""Seconds that a tracker may take at the end of a run to send what is left."""
_FILE = "trackers.json"
_PACKAGES = {"mlflow": "mlflow-skinny"}
"""What is installed where it has another name than the tracker; the whole `mlflow` serves as well."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers whose package is not installed.

    Raises:
        ConfigError: with the command that installs the first one.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        # a folder of that name, as the tools themselves make them, is found as a package without a file
        if spec is None or spec.origin is None:
            remedy = f"pip install {_PACKAGES.get(name, name)}"
            raise ConfigError(f"{name} is not installed", where="logging.trackers", remedy=remedy)


class Trackers:
    """The trackers of a run or a study. What goes wrong in one is said once; nothing is raised, and nothing waits.

    Args:
        names: some of wandb, trackio and mlflow.
        folder: of the run or study; it must be claimed when the first run begins.
        say: receives the warnings.
        group: name of the study; None: a single run.

    Raises:
        ConfigError: when a package is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, say: Say, group: str | None = None) -> None:
        check_trackers(names)
        self.names = tuple(dict.fromkeys(names))
        self._folder, self._say, self._group = folder, say, group
        self._links: list[_Link] | None = None

    def begin(self, name: str, settings: Mapping[str, Any]) -> None:
        """Begins a run, or continues it."""
        self._send("begin", name, settings)

    def log(self, name: str, step: int, values: Mapping[str, float | None]) -> None:
        """Logs measurements after an optimizer step; steps that the tool already has are not logged again."""
        self._send("log", name, step, _there(values))

    def end(self, name: str, status: str, values: Mapping[str, Any]) -> None:
        """Ends a run: how, and its result. One that ended may begin again to get more results."""
        self._send("end", name, status, _there({"status": status, **values}))

    def close(self) -> None:
        """Waits until everything is sent, `CLOSING` seconds at most; runs that have not ended are interrupted."""
        until = time.monotonic() + CLOSING
        for link in self._links or ():
            link.send(["close"])
        for link in self._links or ():
            link.close(until)
        self._links = None

    def _send(self, *message: Any) -> None:
        if self._links is None and self.names:
            self._links = [_Link(name, self._folder, self._group, self._id(), self._say) for name in self.names]
        for link in self._links or ():
            link.send(message)

    def _id(self) -> str:
        """Returns what tells this folder's runs from others of the same names."""
        folder = RunFolder(self._folder)
        found = folder.read_if_there(_FILE)
        if found is None:
            found = {"id": secrets.token_hex(4)}
            folder.write(_FILE, found)
        return str(found["id"])


def _there(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class TrackedWatcher:
    """The watcher of a single run, whose measurements go to trackers, too."""

    def __init__(self, watcher: Watcher, trackers: Trackers, config: TrainConfig) -> None:
        self.say = watcher.say
        self._watcher, self._trackers, self._name = watcher, trackers, config.output.resolve().name
        settings = TrialSettings(method=config.method, training=config.training)
        self._settings = {"kind": "finetune", "model": config.model.name, **settings.flat}

    def counted(self, trial: Trial, trainable: Trainable) -> None:
        """As of `Watcher`: the run begins."""
        self._watcher.counted(trial, trainable)
        self._trackers.begin(self._name, self._settings)

    def stepped(self, trial: Trial, report: StepReport, base_loss: float | None) -> None:
        """As of `Watcher`."""
        self._watcher.stepped(trial, report, base_loss)
        self._trackers.log(self._name, report.step, {"train/loss": report.loss, "train/tokens": trial.tokens})

    def evaluated(self, trial: Trial, loss: float, minus_base: float) -> None:
        """As of `Watcher`."""
        self._watcher.evaluated(trial, loss, minus_base)
        self._trackers.log(self._name, trial.step, {"dev/loss": loss, "dev/minus_base": minus_base})

    def end(self, diverged: str | None, dev: Estimate | None, minus_base: Estimate | None) -> None:
        """Ends the run with its result; `diverged` says why it ended early."""
        result = {
            "reason": diverged,
            "dev": None if dev is None else dev.value,
            "dev_minus_base": None if minus_base is None else minus_base.value,
        }
        self._trackers.end(self._name, "diverged" if diverged else "finished", result)

    def close(self) -> None:
        """Closes the trackers."""
        self._trackers.close()


class _Link:
    """A connection to the process of one tracker, which never blocks."""

    def __init__(self, name: str, folder: Path, group: str | None, own: str, say: Say) -> None:
        self._name, self._say, self._told = name, say, False
        self._waiting = bytearray()
        source = str(Path(peft_study.__file__).parents[1])
        path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            # -P: a folder of the tool's name in the current one is not its package
            [sys.executable, "-P", "-m", f"{__package__}.tracker_process", name, str(folder), group or "", own],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,  # its end tells the child that this process has ended
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is for this process alone
        )
        for pipe in (self._input, self._output):
            os.set_blocking(pipe.fileno(), False)

    @property
    def _input(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def send(self, message: Sequence[Any]) -> None:
        """Sends a message, now or with a later one where the process is busy."""
        if not self._input.closed:
            self._waiting += json.dumps(message, default=str).encode() + b"\n"
            self._flush()

    def close(self, until: float) -> None:
        """Waits for the end of the process, and kills it where that takes too long."""
        while self._waiting and not self._input.closed and time.monotonic() < until:
            self._flush()
            time.sleep(0.01)
        with contextlib.suppress(OSError):
            self._input.close()
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._warn(f"has not taken everything after {CLOSING:.0f} s, and was stopped")
        self._listen()
        self._output.close()

    def _flush(self) -> None:
        self._listen()
        try:
            while self._waiting:
                del self._waiting[: os.write(self._input.fileno(), self._waiting)]
        except BlockingIOError:
            pass
        except OSError:  # it has ended, and has said why
            self._listen()
            self._warn("ended")
            self._waiting.clear()
            with contextlib.suppress(OSError):
                self._input.close()

    def _listen(self) -> None:
        if said := self._output.read():
            self._warn(said.decode(errors="replace").strip().splitlines()[0])

    def _warn(self, what: str) -> None:
        if not self._told:
            self._told = True
            self._say(f"warning: {self._name}: {what.rstrip('.')}; the run goes on, and nothing more is said of it")
