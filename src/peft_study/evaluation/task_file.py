"""A task file: a small YAML file that says what a row asks, what the right answer is, and how an answer is judged.

generated    the answer is judged by a metric         exact, number, contains, regex, module:function
choice       the likeliest of some texts is taken     choice
loss         nats a token; there is no right answer   loss (conversations), text_loss (plain texts)
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from peft_study.config import SettingError, Strict, validate
from peft_study.errors import nearest
from peft_study.evaluation.scoring import METRICS
from peft_study.storage.yaml_file import load_yaml

CHOICE = "choice"
"""The metric of a task whose answer is the likeliest of some texts; nothing is generated."""
LOSS, TEXT_LOSS = "loss", "text_loss"
"""Metrics without a right answer: the loss of conversations' supervised tokens, and of plain texts."""


class TaskConfig(Strict):
    """A task file.

    Texts may name columns of a row in braces: ``"{question}"``; those of a choice also ``{label}`` and ``{text}``.
    """

    about: str | None = Field(None, description="what it is")
    names: tuple[str, ...] = Field((), description="other names of the task: of data sets whose rows have this form")
    data: str | None = Field(None, description="file of rows, beside the task file; any form that `data convert` reads")
    examples: str | None = Field(None, description="file of worked examples: rows of the same form, or training data")
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

    @property
    def generates(self) -> bool:
        """True where the model writes an answer; False where losses tell."""
        return self.metric not in (CHOICE, LOSS, TEXT_LOSS)


def read_task_file(path: Path) -> TaskConfig:
    """Reads a task file.

    Raises:
        ConfigError: naming file, line or key, and remedy.
    """
    file = load_yaml(path)
    return validate(TaskConfig, file.values, where=str(path), place=file.place)
