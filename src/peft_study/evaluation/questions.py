"""The questions of a task: its rows, with the prompt, the right answer, and what may be chosen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from peft_study.data.conversation import Conversation
from peft_study.data.formats import detect_format, to_conversation
from peft_study.data.readers import RawRow
from peft_study.data.sources import open_sources
from peft_study.data.stream import read_conversations
from peft_study.errors import DataError
from peft_study.evaluation.task_file import CHOICE, LOSS, TaskConfig

_COLUMN = re.compile(r"\{(\w[\w .-]*)\}")
"""A column that a text of a task names; some data sets have names of several words."""
_HUB_FORM = {"text": list, "label": list}
"""Choices of ARC, OpenBookQA and CommonsenseQA on the hub."""


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


def read_questions(config: TaskConfig, path: Path) -> list[Question]:
    """Returns the rows of a file as questions; no two have one id.

    Raises:
        DataError: when it holds none, or a row lacks a column that the task names.
    """
    if config.metric == LOSS:
        found = [Question(row.id, (), "", conversation=row) for row in read_conversations([str(path)])]
    else:
        found = [_question(config, row) for row in _rows(path)]
    if not found:
        raise DataError("holds no rows", where=str(path))
    counts = Counter(question.id for question in found)
    taken = set(counts)
    for place, question in enumerate(found):
        if counts[question.id] > 1:
            name = f"{question.id}#{place}"
            while name in taken:
                name += "#"
            taken.add(name)
            found[place] = replace(question, id=name)
    return found


def read_worked(config: TaskConfig, path: Path, count: int) -> list[Question]:
    """Returns the first rows of a file that have an answer, at most `count`; conversations are as good as task rows.

    Raises:
        DataError: when a row before the last of them lacks a column that the task names, or is no conversation.
    """
    questions = (_worked(config, row) for row in _rows(path))
    return list(islice((question for question in questions if question.answered is not None), count))


def _rows(path: Path) -> Iterator[RawRow]:
    for source in open_sources([str(path)]):
        yield from source.rows(lambda _share: None)


def _worked(config: TaskConfig, row: RawRow) -> Question:
    """Returns a worked example: a row of the task, or of a conversation the first question with its answer."""
    of_task = all(name in row.values for name in _COLUMN.findall(f"{config.prompt}{config.answer}"))
    if of_task or detect_format(row.values) is None:  # of neither form, or broken: says what is wrong
        return _question(config, row)
    found = to_conversation(row.values, row_id=str(row.row), default_source="", where=row.where)
    roles = [turn.role for turn in found.messages]
    place = roles.index("assistant")
    if roles[:place].count("user") != 1:
        raise DataError("does not begin with a question and its answer", where=row.where)
    asked = found.messages[roles.index("user")].content
    return Question(found.id, (("user", asked),), found.messages[place].content.strip())


def _question(config: TaskConfig, row: RawRow) -> Question:
    if row.broken is not None:
        raise row.broken
    values = row.values
    assert config.prompt is not None
    prompt = _filled(config.prompt, values, row)
    turns = [("system", _filled(config.system, values, row))] if config.system else []
    gold = _filled(config.answer, values, row, missing="").strip()
    identity = _text(values.get("id", row.row))
    if config.metric != CHOICE:
        return Question(identity, (*turns, ("user", prompt)), gold, row=values)
    found = _choices(config, prompt, row)
    choices = tuple(_filled(config.choice, {**values, "label": a, "text": text}, row) for a, text in found.items())
    if not all(choices):
        raise DataError("has a choice without text", where=row.where)
    return Question(identity, (*turns, ("user", prompt)), gold, choices, _place(config, values, gold, found))


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
        column = found
        if (found := row.values.get(column)) is None:
            raise _no_column(column, row)
    else:
        found = tuple(_filled(text, row.values, row) for text in found or ())
    labelled = _labelled(found) if isinstance(found, (Mapping, list, tuple)) else {}
    if len(labelled) < 2:
        raise DataError("has no list of two choices or more", where=row.where)
    if any(isinstance(choice, (Mapping, list)) for choice in labelled.values()):
        raise DataError("has choices that are lists themselves", where=row.where, remedy="give texts")
    return {label: _text(choice) for label, choice in labelled.items()}


def _labelled(choices: Mapping[Any, Any] | Sequence[Any]) -> dict[str, Any]:
    """Returns choices by their labels: A, B, ... where they have none."""
    if isinstance(choices, Mapping) and {key: type(value) for key, value in choices.items()} == _HUB_FORM:
        choices = dict(zip(choices["label"], choices["text"], strict=False))
    if not isinstance(choices, Mapping):
        choices = {chr(ord("A") + place): text for place, text in enumerate(choices)}
    return {_text(label): text for label, text in choices.items() if text is not None}


def _place(config: TaskConfig, values: Mapping[str, Any], gold: str, choices: Mapping[str, str]) -> int | None:
    """Returns the place of the right choice: by its label, its text, either in another case, or its number from 0.

    A number that is no text, as MMLU's rows have it on the hub, counts among the choices of a list, empty ones too; but
    where the choices are numbers themselves, it is one of them.
    """
    column = _COLUMN.fullmatch(config.answer)
    number = values.get(column[1]) if column else None
    listed = values.get(config.choices) if isinstance(config.choices, str) else config.choices
    is_one = isinstance(listed, (list, tuple)) and any(type(c) is int and c == number for c in listed)
    if isinstance(number, int) and not isinstance(number, bool) and str(number) not in choices and not is_one:
        label = chr(ord("A") + number) if 0 <= number < 26 else ""
        return list(choices).index(label) if label in choices else None
    for names in (list(choices), list(choices.values())):
        if gold in names:
            return names.index(gold)
    for names in (list(choices), list(choices.values())):
        same = [place for place, name in enumerate(names) if name.casefold() == gold.casefold()]
        if len(same) == 1:
            return same[0]
    return int(gold) if gold.isdecimal() and int(gold) < len(choices) else None


def _filled(text: str, values: Mapping[str, Any], row: RawRow, missing: str | None = None) -> str:
    """Returns a text with the columns that it names in braces; a column that is not there is `missing`, if given."""

    def column(match: re.Match[str]) -> str:
        value = values.get(match[1])
        if value is None and missing is None:
            raise _no_column(match[1], row)
        return str(missing) if value is None else _shown(value)

    return _COLUMN.sub(column, text)


def _shown(value: Any) -> str:
    """Returns a value as a prompt has it: choices with their letters, a line each."""
    if isinstance(value, (list, tuple, Mapping)):
        return "\n".join(f"({label}) {_text(text)}" for label, text in _labelled(value).items())
    return _text(value)


def _text(value: Any) -> str:
    """Returns a value as text that can be written: half of a surrogate pair, which JSON may hold, is replaced."""
    return str(value).encode("utf-8", "replace").decode("utf-8")


def _no_column(name: str, row: RawRow) -> DataError:
    if name in row.values:
        return DataError(f"column {name!r} is empty", where=row.where, remedy="fill it, or leave the row out")
    return DataError(f"has no column {name!r}", where=row.where, remedy=f"its columns are {', '.join(row.values)}")
