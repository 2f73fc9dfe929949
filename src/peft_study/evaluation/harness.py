"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness) on our packed base with an adapter: ``lm_eval:hellaswag``.

lm-eval reads the task's data, writes its prompts and judges the answers; the model's side of it is here.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_study.engine.row import RowRunner
from peft_study.errors import ConfigError, DataError, first_line
from peft_study.evaluation.answer_files import Row
from peft_study.evaluation.systems import System
from peft_study.evaluation.tasks import LM_EVAL
from peft_study.storage.files import read_text

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_METRICS = "acc", "exact_match", "prompt_level_strict_acc", "em", "f1", "word_perplexity"
"""Of a task's metrics the first of these is its score; of another task, the one that it names first."""

_PERPLEXITIES = "word_perplexity", "byte_perplexity", "bits_per_byte"


class HarnessTask:
    """A task, or a group of tasks, of lm-eval.

    Args:
        spec: ``lm_eval:NAME``, or ``lm_eval:FILE.yaml`` for a task file in lm-eval's form.
        chat: put the questions into the chat template.
        limit: the first so many questions; None: all.

    Raises:
        ConfigError: when lm-eval is not installed, or knows no such task.
    """

    def __init__(self, spec: str, *, chat: bool, limit: int | None) -> None:
        name, self._file = spec.removeprefix(LM_EVAL), ""
        if name.endswith((".yaml", ".yml")):
            path = Path(name)
            if not path.is_file():
                raise ConfigError("no such task file", where=name)
            self._file = read_text(path)
            self._manager = _task_manager()(include_path=str(path.parent.resolve()), include_defaults=False)
            entries = self._manager.task_index.items()
            files = {Path(entry.yaml_path).resolve(): key for key, entry in entries if entry.yaml_path}
            name = files.get(path.resolve(), "")
            if not name:
                raise ConfigError("is no task file of lm-eval", where=str(path), remedy="it names a task: `task: NAME`")
        else:
            self._manager = _own_tasks()
            if name not in self._manager.all_tasks:
                close = difflib.get_close_matches(name, self._manager.all_tasks, n=1)
                remedy = f"did you mean {close[0]!r}?" if close else "`lm_eval ls tasks` lists them"
                raise ConfigError(f"lm-eval knows no task {name!r}", remedy=remedy)
        self.name, self._chat, self._limit = name, chat, limit

    @property
    def plan(self) -> dict[str, Any]:
        """What its answers depend on."""
        return {"file": self._file, "chat": self._chat, "limit": self._limit}

    def takes(self, system: System) -> bool:
        """Returns whether a system takes part: lm-eval has its own worked examples, and system turns only in chats."""
        return not system.shots and (system.instruction is None or self._chat)

    @property
    def leaves(self) -> list[str]:
        """Names of the tasks that it consists of; their data is loaded.

        Raises:
            DataError: when it is not on this machine and cannot be loaded.
        """
        return list(self._loaded["tasks"])

    def rows(self, runner: RowRunner, system: System) -> list[Row]:
        """Returns a row a question: prompt, output, gold and score; of a task with several filters a row for each.

        Raises:
            DataError: when the task's data is not on this machine and cannot be loaded.
        """
        import lm_eval

        from peft_study.evaluation.language_model import PackedLanguageModel

        began = time.perf_counter()
        group = self._loaded["groups"].get(self.name)
        with _quiet():
            found = lm_eval.simple_evaluate(
                PackedLanguageModel(runner, system),
                tasks=list(self._loaded["tasks"].values()) if group is None else [group],
                limit=self._limit,
                bootstrap_iters=0,
                system_instruction=system.instruction,
                apply_chat_template=self._chat,
                task_manager=self._manager,
            )
        assert found is not None
        samples = found["samples"]
        seconds = (time.perf_counter() - began) / max(1, sum(map(len, samples.values())))
        rows = [row for task, each in samples.items() for row in _rows(task, each, system.name, seconds)]
        return [{**row, "of": len(rows)} for row in rows]

    @functools.cached_property
    def _loaded(self) -> Any:
        """Its tasks and groups by name, with their data: read once for all systems."""
        with _refusals(self.name), _quiet():
            return self._manager.load([self.name])


def refuse_overlap(tasks: Sequence[HarnessTask]) -> None:
    """Refuses two tasks of lm-eval that have one in common; loads their data.

    Raises:
        ConfigError: with the name.
        DataError: when data is not on this machine and cannot be loaded.
    """
    names = Counter(name for task in tasks for name in task.leaves)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise ConfigError(f"lm-eval's task {twice} is asked twice", where="tasks", remedy="name it once")


def _task_manager() -> type[TaskManager]:
    """Returns lm-eval's class that finds tasks.

    Raises:
        ConfigError: when lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        remedy = "run: pip install 'peft-study[lm-eval]'"
        raise ConfigError("tasks of lm-eval need lm-eval, which is not installed", remedy=remedy) from None
    found: type[TaskManager] = TaskManager
    return found


@functools.cache
def _own_tasks() -> TaskManager:
    """Returns what finds lm-eval's own tasks: its 15,000 names take a few seconds to list, once."""
    return _task_manager()()


@contextmanager
def _refusals(task: str) -> Iterator[None]:
    """Says what is missing where the task's data, or a package that it needs, is not there."""
    try:
        yield
    except ImportError as error:
        what = f"lm-eval's task {task} needs a package: {first_line(error)}"
        raise ConfigError(what, remedy="install it") from error
    except (OSError, ValueError, RuntimeError) as error:  # as datasets and the hub raise them
        what = f"the data of lm-eval's task {task} could not be loaded ({first_line(error)})"
        remedy = "load it once where the hub can be reached, and take the folder HF_HOME with you"
        raise DataError(what, remedy=remedy) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what lm-eval, git and the hub write to stderr out of the display: errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere, contextlib.redirect_stderr(io.StringIO()):  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _rows(task: str, samples: Sequence[Row], system: str, seconds: float) -> Iterator[Row]:
    several = len({sample["filter"] for sample in samples}) > 1
    for sample in samples:
        metrics = sample["metrics"]
        metric = next((name for name in _METRICS if name in metrics), metrics[0])
        row = {
            "task": f"{LM_EVAL}{task}/{sample['filter']}" if several else f"{LM_EVAL}{task}",
            "system": system,
            "id": str(sample["doc_id"]),
            "prompt": sample["arguments"][0][0],
            "output": str(sample["filtered_resps"]),
            "gold": str(sample["target"]),
            "metric": metric,
            "seconds": round(seconds, 4),
        }
        value = sample[metric]
        if metric in _PERPLEXITIES:  # a log-likelihood, and the words or bytes it is over
            yield {**row, "loss": -float(value[0]), "tokens": int(value[1]), "source": ""}
        elif isinstance(value, (bool, int, float, np.number)):
            yield {**row, "score": float(value)}
        else:
            what = f"lm-eval's task {task} is judged by {metric}, which says nothing of a single answer"
            raise ConfigError(what, remedy="ask another task")
