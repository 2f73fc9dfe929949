"""The process of one tracker: reads JSON lines from its parent, and calls the tool's package.

``python -m peft_study.training.tracker_process NAME FOLDER GROUP ID``

What belongs to one step comes in several messages and is logged together, so that a process that is killed has logged
a step whole or not at all. What goes wrong is printed, a line, for the parent to show.
"""

from __future__ import annotations

import contextvars
import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from filelock import FileLock

from peft_study.errors import first_line

PROJECT = "peft-study"
"""The project (of mlflow: the experiment), unless the tool's own variable names another."""
ALONE_SECONDS = 120
"""What is left after a kill of the parent is sent for so long at most."""
_FLUSH_SECONDS = 5.0
_LONGEST = 500  # characters of a text; mlflow refuses more than 6000 in a parameter


class Tool(Protocol):
    """What each tracker does with the runs of a study; `run` is NAME-ID, which is unique in its project."""

    def begin(self, name: str, run: str, settings: Mapping[str, Any]) -> int:
        """Begins a run, or continues it, and returns the last step that it has; -1 without one."""

    def log(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Logs all measurements of a step."""

    def end(self, name: str, status: str, last: tuple[int, Mapping[str, float]], result: Mapping[str, Any]) -> None:
        """Ends a run, whose last step has these measurements left to be logged."""


class Wandb:
    """Weights & Biases: online, or with ``WANDB_MODE=offline`` into files below the study's folder."""

    def __init__(self, folder: Path, group: str | None) -> None:
        import wandb

        self._wandb, self._folder, self._group = wandb, os.environ.get("WANDB_DIR") or str(folder), group
        self._runs: dict[str, Any] = {}

    def begin(self, name: str, run: str, settings: Mapping[str, Any]) -> int:
        """Begins a run, or continues the one of this id."""
        self._runs[name] = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=self._group,
            name=name,
            id=run,
            resume="allow",
            reinit="create_new",  # trials run side by side
            dir=self._folder,
            config=dict(settings),
            settings=self._wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
        return int(self._runs[name].starting_step) - 1

    def log(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Logs a step."""
        self._runs[name].log(dict(values), step=step)

    def end(self, name: str, status: str, last: tuple[int, Mapping[str, float]], result: Mapping[str, Any]) -> None:
        """Writes the result into the summary."""
        run = self._runs.pop(name)
        if last[1]:
            run.log(dict(last[1]), step=last[0])
        run.summary.update({f"result/{key}": value for key, value in result.items()})
        run.finish(exit_code=0 if status in ("finished", "pruned") else 1)


class Trackio:
    """Trackio: a local database (``TRACKIO_DIR``), or the Space or server that its variables name."""

    def __init__(self, folder: Path, group: str | None) -> None:
        import trackio

        self._trackio, self._group = trackio, group
        self._runs: dict[str, Any] = {}
        self._begun: dict[str, tuple[str, dict[str, Any]]] = {}

    def begin(self, name: str, run: str, settings: Mapping[str, Any]) -> int:
        """Begins a run, or continues the one of this name, which for trackio is its identity."""
        self._begun[name] = run, dict(settings)
        self._runs[name] = self._open(run, settings)
        # the package has no public way to ask for it
        return int(getattr(self._runs[name], "_next_step", 0)) - 1

    def _open(self, run: str, config: Mapping[str, Any]) -> Any:
        # in a context of its own, because init ends the run that is current in the caller's: trials run side by side
        return contextvars.Context().run(
            self._trackio.init,
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run,
            group=self._group,
            resume="allow",
            config=dict(config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Logs a step."""
        self._runs[name].log(dict(values), step=step)

    def end(self, name: str, status: str, last: tuple[int, Mapping[str, float]], result: Mapping[str, Any]) -> None:
        """Writes the result into the settings: trackio has no other place, and takes them with the next step only."""
        self._runs.pop(name).finish()
        run, settings = self._begun.pop(name)
        if last[0] < 0:
            return
        again = self._open(run, {**settings, **{f"result/{key}": value for key, value in result.items()}})
        again.log(dict(last[1]), step=last[0])
        again.finish()


class Mlflow:
    """MLflow: the server or database of ``MLFLOW_TRACKING_URI``; a study is the parent of its trials."""

    def __init__(self, folder: Path, group: str | None) -> None:
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        self._entities, self._client, self._group = entities, MlflowClient(), group
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        self._experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._runs: dict[str, str] = {}
        self._waiting: dict[str, list[Any]] = {}
        self._flushed_at = time.monotonic()

    def _find(self, name: str, run: str, tags: Mapping[str, str]) -> str:
        """Returns the id of the run with this tag, which is created where there is none."""
        key = "peft_study.id"
        found = self._client.search_runs([self._experiment], f"tags.`{key}` = '{run}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        made = self._client.create_run(self._experiment, tags={**tags, key: run}, run_name=name)
        return str(made.info.run_id)

    def begin(self, name: str, run: str, settings: Mapping[str, Any]) -> int:
        """Begins a run, or continues the one with this tag."""
        tags = {}
        if self._group is not None:
            parent = self._find(self._group, run.rpartition("-")[2], {})
            self._client.set_terminated(parent, "FINISHED")  # it only holds the trials together
            tags = {"mlflow.parentRunId": parent, "group": self._group}
        own = self._runs[name] = self._find(name, run, tags)
        self._client.update_run(own, status="RUNNING")
        params = [self._entities.Param(key, str(value)) for key, value in settings.items()]
        self._client.log_batch(own, params=params)
        self._waiting[name] = []
        keys = self._client.get_run(own).data.metrics
        curves = [self._client.get_metric_history(own, key) for key in keys if not key.startswith("result/")]
        return max((metric.step for curve in curves for metric in curve), default=-1)

    def log(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Keeps a step, and sends all that was kept every few seconds: each call is a request to the server."""
        now = int(time.time() * 1000)
        self._waiting[name] += [self._entities.Metric(key, value, now, step) for key, value in values.items()]
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            for other in self._runs:
                self._flush(other)
            self._flushed_at = time.monotonic()

    def _flush(self, name: str) -> None:
        kept, self._waiting[name] = self._waiting[name], []
        for start in range(0, len(kept), 1000):  # the most that a call takes
            self._client.log_batch(self._runs[name], metrics=kept[start : start + 1000])

    def end(self, name: str, status: str, last: tuple[int, Mapping[str, float]], result: Mapping[str, Any]) -> None:
        """Writes the result as metrics, its texts as tags."""
        step, values = last
        self.log(name, step, values)
        self._flush(name)
        own = self._runs.pop(name)
        there = self._client.get_run(own).data.metrics
        for key, value in result.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                if there.get(f"result/{key}") != value:  # every value that is logged becomes a point
                    self._client.log_metric(own, f"result/{key}", value, step=max(0, step))
            else:
                self._client.set_tag(own, f"result/{key}", str(value))
        self._client.set_terminated(own, _MLFLOW_STATUS.get(status, "FAILED"))


_MLFLOW_STATUS = {"finished": "FINISHED", "pruned": "KILLED", "interrupted": "KILLED"}
TOOLS: dict[str, Callable[[Path, str | None], Tool]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


class _Runs:
    """The runs under way: what they have logged, and what is left of the step that they are at."""

    def __init__(self, tool: Tool, own: str) -> None:
        self._tool, self._own = tool, own
        self._had: dict[str, int] = {}  # the last step of an earlier process
        self._last: dict[str, tuple[int, dict[str, float]]] = {}

    def begin(self, name: str, settings: Mapping[str, Any]) -> None:
        plain = {key: value[:_LONGEST] if isinstance(value, str) else value for key, value in settings.items()}
        had = self._tool.begin(name, f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)}-{self._own}", plain)
        self._had[name], self._last[name] = had, (had, {})

    def log(self, name: str, step: int, values: Mapping[str, float]) -> None:
        if step <= self._had[name]:
            return
        before, left = self._last[name]
        if step > before and left:
            self._tool.log(name, before, left)
            left = {}
        self._last[name] = step, {**left, **values}

    def end(self, name: str, status: str, result: Mapping[str, Any]) -> None:
        last = self._last.pop(name)
        plain = {key: value[:_LONGEST] if isinstance(value, str) else value for key, value in result.items()}
        self._tool.end(name, status, last, plain)

    def close(self, *, whole: bool) -> None:
        """Ends the runs under way; `whole`: all that belongs to their last steps has come."""
        for name, (step, _) in list(self._last.items()):
            if not whole:
                self._last[name] = (step - 1, {})  # the step is logged when it is repeated
            self.end(name, "interrupted", {"status": "interrupted"})


def serve(tool: Tool, own: str, lines: Iterable[str]) -> None:
    """Does what the lines say, until one says to close, or they end, as after a kill of the parent."""
    runs, whole = _Runs(tool, own), False
    for line in lines:
        if not line.endswith("\n"):  # the parent was killed while it wrote
            break
        what, *arguments = json.loads(line)
        if what == "close":
            whole = True
            break
        getattr(runs, what)(*arguments)
    if not whole:
        signal.alarm(ALONE_SECONDS)  # nobody else ends this process where the network hangs
    runs.close(whole=whole)


def main(name: str, folder: str, group: str, own: str) -> int:
    """Serves the parent; what the tool itself prints is dropped, its first warning and its error are passed on."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end of its input ends it, after the last of it is sent
    said = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    _pass_on_warnings(said, name)
    try:
        # after a kill, the process before may still be sending what the next one then asks the tool for
        with FileLock(Path(folder) / f".{name}.lock"):
            serve(TOOLS[name](Path(folder), group or None), own, sys.stdin)
    except Exception as error:  # noqa: BLE001 -- whatever a tool raises, the run must go on
        print(first_line(error), file=said)
        return 1
    return 0


def _pass_on_warnings(said: TextIO, name: str) -> None:
    """Prints the tool's own warnings: trackio raises nothing, and only warns that something was not written."""

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
        if issubclass(category, UserWarning) and name in Path(filename).parts:
            print(first_line(UserWarning(str(message))), file=said)

    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = show  # type: ignore[assignment]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
