"""Tasks: which question a row asks, what the right answer is, and how an answer is judged.

A task is a small YAML file. Those of this package have no data of their own: the user gives the file of rows.

    --tasks gsm8k=test.jsonl.gz            a task of this package on a file
    --tasks mine.yaml                      a file of the user's, which names its data

generated    the answer is judged by a metric         exact, number, contains, regex, module:function
choice       the likeliest of some texts is taken     choice
loss         nats a token; there is no right answer   loss (conversations), text_loss (plain texts)
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from peft_study.config import EvaluationConfig, SettingError, Strict, validate
from peft_study.data.conversation import Conversation
from peft_study.data.readers import RawRow
from peft_study.data.sources import open_sources
from peft_study.data.stream import read_conversations
from peft_study.errors import ConfigError, DataError, first_line, nearest
from peft_study.evaluation.scoring import METRICS
from peft_study.storage.files import read_text

BUILT_IN = Path(__file__).with_name("tasks_builtin")
CHOICE = "choice"
"""The metric of a task whose answer is the likeliest of some texts; nothing is generated."""
LM_EVAL = "lm_eval:"
"""How the tasks of lm-eval begin, which are none of these (`harness`)."""
LOSS, TEXT_LOSS = "loss", "text_loss"
"""Metrics without a right answer: the loss of conversations' supervised tokens, and of plain texts."""


class TaskConfig(Strict):
    """A task file.

    Texts may name columns of a row in braces: ``"{question}"``; those of a choice also ``{label}`` and ``{text}``.
    """

    about: str | None = Field(None, description="what it is")
    names: tuple[str, ...] = Field((), description="other names of the task: of data sets whose rows have this form")
    data: str | None = Field(None, description="file of rows, beside the task file; any form that `data convert` reads")
    examples: str | None = Field(None, description="file of worked examples, rows of the same form")
    prompt: str | None = Field(None, description="what the user asks, from the row's columns; of text_loss the text")
    system: str | None = Field(None, description="what the system turn says")
    answer: str = Field("{answer}", description="the right answer, from the row's columns")
    metric: str = Field(description="exact, number, contains, regex, choice, module:function, loss or text_loss")
    pattern: str | None = Field(None, description="of regex: what its first group finds last is compared")
    choices: str | tuple[str, ...] | None = Field(
        None, description="of choice: a column with a list or a mapping of labels, or the texts themselves"
    )
    choices_pattern: str | None = Field(
        None, description="of choice: its first group finds the texts in the prompt, with / between them"
    )
    choice: str = Field("{text}", description="of choice: what is scored")
    max_new_tokens: int = Field(256, ge=1, description="tokens an answer may have")

    @field_validator("pattern", "choices_pattern")
    @classmethod
    def _has_a_group(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise SettingError(f"is no regular expression: {error}") from None
            if groups < 1:
                raise SettingError("has no group", remedy="put what is looked for in parentheses")
        return value

    @model_validator(mode="after")
    def _fits(self) -> TaskConfig:
        known = (*METRICS, CHOICE, LOSS, TEXT_LOSS)
        if self.metric not in known and ":" not in self.metric:
            raise SettingError(
                f"unknown metric {self.metric!r}", inside=("metric",), remedy=nearest(self.metric, known)
            )
        if self.metric == "regex" and self.pattern is None:
            raise SettingError("metric regex needs a pattern", inside=("pattern",))
        if (self.metric == CHOICE) != (self.choices is not None or self.choices_pattern is not None):
            what = "needs choices or choices_pattern" if self.metric == CHOICE else "has no choices"
            raise SettingError(f"metric {self.metric} {what}", inside=("metric",))
        if (self.metric == LOSS) != (self.prompt is None):
            what = "takes whole conversations" if self.metric == LOSS else f"metric {self.metric} needs it"
            raise SettingError(what, inside=("prompt",), remedy="leave it out" if self.metric == LOSS else "add it")
        return self

    @property
    def has_answers(self) -> bool:
        """True where an answer is right or wrong; False where the loss is all."""
        return self.metric not in (LOSS, TEXT_LOSS)


@dataclass(frozen=True, slots=True)
class Question:
    """A row of a task.

    Attributes:
        id: the row's, else its number; with its place where another row has the same.
        turns: system turn, if any, and the user's; of a plain text its text.
        gold: the right answer; empty where the row has none.
        choices: texts of which the likeliest is taken; empty where the answer is generated.
        gold_choice: place of the right one; None where the row does not say.
        conversation: of metric loss the whole row; else None.
        row: its columns, for a metric that is a function.
    """

    id: str
    turns: tuple[tuple[str, str], ...]
    gold: str
    choices: tuple[str, ...] = ()
    gold_choice: int | None = None
    conversation: Conversation | None = None
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def answered(self) -> str | None:
        """What a worked example says: the right choice, or the row's answer; None where it has none."""
        if self.choices:
            return None if self.gold_choice is None else self.choices[self.gold_choice]
        return self.gold or None


@dataclass(frozen=True, slots=True)
class EvaluationTask:
    """A task with its rows' file, and that of its worked examples, if any."""

    name: str
    config: TaskConfig
    data: Path
    examples: Path | None = None

    @property
    def generates(self) -> bool:
        """True where the model writes an answer; False where losses tell."""
        return self.config.metric not in (CHOICE, LOSS, TEXT_LOSS)

    def judge(self, output: str, question: Question) -> bool | None:
        """Returns whether a generated answer is right; None where that cannot be said.

        Raises:
            ConfigError: when its metric is a function that cannot be imported, or that fails.
        """
        metric = self.config.metric
        if metric in METRICS:
            return METRICS[metric](output, question.gold, self.config.pattern)
        function = self._function()
        try:
            takes_row = len(inspect.signature(function).parameters) > 2
            found = function(output, question.gold, question.row) if takes_row else function(output, question.gold)
        except ConfigError:
            raise
        except Exception as error:
            what = f"metric {metric} failed on row {question.id}: {first_line(error)}"
            remedy = "correct it; the answers are kept, and --rescore judges them again"
            raise ConfigError(what, where=self.name, remedy=remedy) from error
        return None if found is None else bool(found)

    def _function(self) -> Callable[..., Any]:
        """Returns the metric that is a function, ``module:function``."""
        module, _, name = self.config.metric.partition(":")
        try:
            found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            what = f"metric {self.config.metric}: {first_line(error)}"
            remedy = "give MODULE:FUNCTION of (output, gold) or (output, gold, row) that can be imported from here"
            raise ConfigError(what, where=self.name, remedy=remedy) from None
        return found

    def questions(self, limit: int | None = None) -> list[Question]:
        """Returns the rows, at most `limit`: those that lie evenly over the file.

        Raises:
            DataError: when the file holds none, or a row lacks a column that the task names.
        """
        found = self._read(self.data)
        known = Counter(question.id for question in found)
        found = [q if known[q.id] == 1 else replace(q, id=f"{q.id}#{place}") for place, q in enumerate(found)]
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
        found = [question for question in self._read(self.examples) if question.answered is not None][:count]
        if len(found) < count:
            remedy = "give a file with more rows, or fewer --shots"
            raise DataError(f"has {len(found)} rows with an answer", where=str(self.examples), remedy=remedy)
        return found

    def _read(self, path: Path) -> list[Question]:
        if self.config.metric == LOSS:
            found = [Question(row.id, (), "", conversation=row) for row in read_conversations([str(path)])]
        else:
            sources = open_sources([str(path)])
            found = [_question(self, row) for source in sources for row in source.rows(lambda _share: None)]
        if not found:
            raise DataError("holds no rows", where=str(path))
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
    found = [
        find_task(spec, config.examples.get(_name_of(spec))) for spec in config.tasks if not spec.startswith("lm_eval:")
    ]
    names = [task.name for task in found]
    for name in config.examples:
        if name not in names:
            remedy = nearest(name, names) or f"one of {', '.join(names)}"
            raise ConfigError(f"examples of {name}, which is none of the tasks", remedy=remedy)
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"task {name} is given twice", remedy="give one file, or a task file with another name")
    return found


def _name_of(spec: str) -> str:
    name = spec.partition("=")[0]
    return Path(name).stem if name.endswith((".yaml", ".yml")) else name


def find_task(spec: str, examples: str | None = None) -> EvaluationTask:
    """Returns the task of ``NAME=FILE`` or of a task file.

    Args:
        spec: as above.
        examples: file of worked examples, instead of the one that the task file names.

    Raises:
        ConfigError: when there is no such task, or its file is wrong.
        DataError: when its rows are not there.
    """
    given, _, data = spec.partition("=")
    own, name = Path(given), _name_of(spec)
    if own.suffix in (".yaml", ".yml"):
        if not own.is_file():
            raise ConfigError("no such task file", where=given)
    else:
        known = task_names()
        if name not in known:
            remedy = nearest(name, known) or f"one of {', '.join(known)}, or a task file (.yaml)"
            raise ConfigError(f"unknown task {name!r}", remedy=remedy)
        own = known[name]
    try:
        values = yaml.safe_load(read_text(own))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"is no YAML: {first_line(error)}", where=f"{own}{at}") from None
    config = validate(TaskConfig, values, where=str(own))
    if not data and config.data is None:
        raise ConfigError(f"task {name} has no data of its own", remedy=f"give its file of rows: --tasks {name}=FILE")
    path = Path(data) if data else own.parent / str(config.data)
    worked = Path(examples) if examples else None if config.examples is None else own.parent / config.examples
    for file, what in ((path, "the rows"), (worked, "worked examples")):
        if file is not None and not file.exists():
            raise DataError("no such file", where=str(file), remedy=f"give {what} of task {name}")
    return EvaluationTask(name, config, path, worked)


def _question(task: EvaluationTask, row: RawRow) -> Question:
    if row.broken is not None:
        raise row.broken
    config, values = task.config, row.values
    assert config.prompt is not None
    prompt = _filled(config.prompt, values, row)
    turns = [("system", config.system)] if config.system else []
    gold = _filled(config.answer, values, row, missing="").strip()
    identity = str(values.get("id", row.row))
    if config.metric != CHOICE:
        return Question(identity, (*turns, ("user", prompt)), gold, row=values)
    found = _choices(config, prompt, row)
    choices = tuple(_filled(config.choice, {**values, "label": a, "text": text}, row) for a, text in found.items())
    return Question(identity, (*turns, ("user", prompt)), gold, choices, _place(gold, found))


def _choices(config: TaskConfig, prompt: str, row: RawRow) -> dict[str, str]:
    """Returns a row's choices by their labels."""
    found: Any = config.choices
    if config.choices_pattern is not None:
        match = re.search(config.choices_pattern, prompt)
        if match is None:
            remedy = "correct choices_pattern, or the row"
            raise DataError("its prompt has no choices that choices_pattern finds", where=row.where, remedy=remedy)
        found = tuple(text.strip() for text in match[1].split("/"))
    elif isinstance(found, str):
        if found not in row.values:
            raise DataError(f"has no column {found!r}", where=row.where, remedy=_columns(row))
        found = row.values[found]
    if not isinstance(found, Mapping) and (not isinstance(found, (list, tuple)) or len(found) < 2):
        raise DataError("has no list of two choices or more", where=row.where)
    return _labelled(found)


def _labelled(choices: Mapping[Any, Any] | Sequence[Any]) -> dict[str, str]:
    """Returns choices by their labels: A, B, ... where they have none."""
    if not isinstance(choices, Mapping):
        choices = {chr(ord("A") + place): text for place, text in enumerate(choices)}
    return {str(label): str(text) for label, text in choices.items() if text is not None}


def _place(gold: str, choices: Mapping[str, str]) -> int | None:
    """Returns the place of the right choice: by its label, its text, or its number from 0."""
    for names in (list(choices), list(choices.values())):
        if gold in names:
            return names.index(gold)
    return int(gold) if gold.isdecimal() and int(gold) < len(choices) else None


def _filled(text: str, values: Mapping[str, Any], row: RawRow, missing: str | None = None) -> str:
    """Returns a text with the columns that it names in braces; a column that is not there is `missing`, if given."""

    def column(match: re.Match[str]) -> str:
        value = values.get(match[1])
        if value is None and missing is None:
            raise DataError(f"has no column {match[1]!r}", where=row.where, remedy=_columns(row))
        return str(missing) if value is None else _shown(value)

    return re.sub(r"\{(\w+)\}", column, text)


def _shown(value: Any) -> str:
    """Returns a value as a prompt has it: choices with their letters, a line each."""
    if isinstance(value, (list, tuple, Mapping)):
        return "\n".join(f"({label}) {text}" for label, text in _labelled(value).items())
    return str(value)


def _columns(row: RawRow) -> str:
    return f"its columns are {', '.join(row.values)}"
