"""The tasks of an evaluation: a task file with its rows, and what judges an answer.

--tasks gsm8k=test.jsonl.gz            a task of this package on a file: it has no data of its own
--tasks mine.yaml                      a file of the user's, which names its data
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from peft_study.config import EvaluationConfig
from peft_study.errors import ConfigError, DataError, first_line, nearest
from peft_study.evaluation.questions import Question, read_questions, read_worked
from peft_study.evaluation.scoring import METRICS
from peft_study.evaluation.task_file import TaskConfig, read_task_file

BUILT_IN = Path(__file__).with_name("tasks_builtin")
LM_EVAL = "lm_eval:"
"""How the tasks of lm-eval begin, which are none of these (`harness`)."""


@dataclass(frozen=True, slots=True)
class EvaluationTask:
    """A task with its rows' file.

    Attributes:
        name, config: of the task.
        data: file of its rows.
        examples: file of worked examples; None: there are none.
        function: its metric, where that is a function of the user's.
    """

    name: str
    config: TaskConfig
    data: Path
    examples: Path | None = None
    function: Callable[..., Any] | None = None

    def judge(self, output: str, question: Question) -> float | None:
        """Returns whether a generated answer is right, or a share of it; None where that cannot be said.

        Raises:
            ConfigError: when its metric is a function that fails, or that returns something else.
        """
        metric = self.config.metric
        if self.function is None:
            return METRICS[metric](output, question.gold, self.config.pattern)
        remedy = "correct it; the answers are kept, and --rescore judges them again"
        try:
            takes_row = len(inspect.signature(self.function).parameters) > 2
            given = (output, question.gold, question.row) if takes_row else (output, question.gold)
            found = self.function(*given)
        except ConfigError:
            raise
        except Exception as error:
            what = f"metric {metric} failed on row {question.id}: {first_line(error)}"
            raise ConfigError(what, where=self.name, remedy=remedy) from error
        if found is None:
            return None
        try:
            value = float(found) if not isinstance(found, str) else math.nan
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value <= 1:
            what = f"metric {metric} returned {str(found)[:60]!r} for row {question.id}"
            remedy = "return True, False, a number from 0 to 1, or None where it cannot be judged"
            raise ConfigError(what, where=self.name, remedy=remedy)
        return value

    def questions(self, limit: int | None = None) -> list[Question]:
        """Returns the rows, at most `limit`: those that lie evenly over the file.

        Raises:
            DataError: when the file holds none, or a row lacks a column that the task names.
        """
        found = read_questions(self.config, self.data)
        if limit is not None and limit < len(found):
            found = [found[place * len(found) // limit] for place in range(limit)]
        return found

    def worked_examples(self, count: int) -> list[Question]:
        """Returns the first rows of the examples' file that have an answer, `count` of them.

        Raises:
            DataError: when the file has fewer, or a row lacks a column that the task names.
        """
        if self.examples is None:
            return []
        found = read_worked(self.config, self.examples, count)
        if len(found) < count:
            remedy = "give a file with more rows, or fewer --shots"
            raise DataError(f"has {len(found)} rows with an answer", where=str(self.examples), remedy=remedy)
        return found


def task_names() -> dict[str, Path]:
    """Returns the names of the tasks of this package, each with its file."""
    found: dict[str, Path] = {}
    for path in sorted(BUILT_IN.glob("*.yaml")):
        names = yaml.safe_load(path.read_text(encoding="utf-8")).get("names", ())
        found |= dict.fromkeys((path.stem, *names), path)
    return found


def find_tasks(config: EvaluationConfig) -> list[EvaluationTask]:
    """Returns the tasks of an evaluation with their files; those of lm-eval are not among them.

    Raises:
        ConfigError, DataError: as `find_task`; when worked examples are of another task, or a task is given twice.
    """
    own = [spec for spec in config.tasks if not spec.startswith(LM_EVAL)]
    found = [find_task(spec, config.examples.get(_split_spec(spec)[0])) for spec in own]
    names = [task.name for task in found]
    for name in config.examples:
        if name not in names:
            raise ConfigError(f"examples of {name}, which is none of the tasks", remedy=nearest(name, names))
    others = [spec for spec in config.tasks if spec.startswith(LM_EVAL)]
    for name, count in Counter([*names, *others]).items():
        if count > 1:
            raise ConfigError(f"task {name} is given twice", remedy="give one file, or a task file with another name")
    return found


def _split_spec(spec: str) -> tuple[str, Path | None, str]:
    """Returns a task's name, its own file, if it is no task of this package, and the file of rows, if given."""
    given, _, data = (spec, "", "") if Path(spec).is_file() else spec.partition("=")
    if given.endswith((".yaml", ".yml")):
        return Path(given).stem, Path(given), data
    return given, None, data


def find_task(spec: str, examples: str | None = None) -> EvaluationTask:
    """Returns the task of ``NAME=FILE`` or of a task file.

    Args:
        spec: as above.
        examples: file of worked examples, instead of the one that the task file names.

    Raises:
        ConfigError: when there is no such task, or its file or its metric is wrong.
        DataError: when its rows are not there.
    """
    name, own, data = _split_spec(spec)
    if own is None:
        known = task_names()
        if name not in known:
            raise ConfigError(f"unknown task {name!r}", remedy=f"{nearest(name, known)}, or give a task file (.yaml)")
        own = known[name]
    elif not own.is_file():
        raise ConfigError("no such task file", where=str(own))
    config = read_task_file(own)
    if not data and config.data is None:
        raise ConfigError(f"task {name} has no data of its own", remedy=f"give its file of rows: --tasks {name}=FILE")
    path = Path(data) if data else own.parent / str(config.data)
    worked = Path(examples) if examples else None if config.examples is None else own.parent / config.examples
    if worked is not None and not config.has_answers:
        raise ConfigError(f"task {name} takes no worked examples: it measures a loss", remedy="leave them out")
    for file, what in ((path, "the rows"), (worked, "worked examples")):
        if file is not None and not file.exists():
            raise DataError("no such file", where=str(file), remedy=f"give {what} of task {name}")
    return EvaluationTask(name, config, path, worked, _function(config.metric, name, own.parent))


def _function(metric: str, task: str, folder: Path) -> Callable[..., Any] | None:
    """Returns the metric that is a function, of a module beside the task file, that is installed, or in this folder."""
    module, colon, name = metric.partition(":")
    if not colon:
        return None
    remedy = "give MODULE:FUNCTION of (output, gold) or (output, gold, row), in a module beside the task file"
    try:
        with _importing(folder):
            own = folder / f"{module}.py"
            loaded = _loaded(own) if own.is_file() else importlib.import_module(module)
        found: Callable[..., Any] = getattr(loaded, name)
    except Exception as error:  # noqa: BLE001  (whatever a module of the user's may raise)
        raise ConfigError(f"metric {metric}: {first_line(error)}", where=task, remedy=remedy) from None
    if not callable(found):
        raise ConfigError(f"metric {metric} is no function", where=task, remedy=remedy)
    return found


def _loaded(path: Path) -> ModuleType:
    """Returns the module of a file, read now: another task may have another module of the same name beside it."""
    name = f"{path.stem} of {path.parent.resolve()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@contextmanager
def _importing(folder: Path) -> Iterator[None]:
    """Lets modules be found in a folder, and in the current one, after all others."""
    before = list(sys.path)
    sys.path += [str(folder.resolve()), str(Path.cwd())]
    try:
        yield
    finally:
        sys.path[:] = before
