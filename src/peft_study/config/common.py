"""What all settings share: strictness, and errors that name the field, the value and the nearest valid key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from peft_study.errors import ConfigError, nearest

Location = Sequence[int | str]


class Strict(BaseModel):
    """Base of all settings: unknown keys are errors, values cannot be reassigned, infinities and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


def validate(
    kind: type[Model], values: Any, *, where: str, place: Callable[[Location], str | None] | None = None
) -> Model:
    """Builds settings from plain values.

    Args:
        kind: the settings class.
        values: what a YAML file or a command line said.
        where: file or command, named in the error.
        place: returns where a setting stands in the file, such as ``line 7``.

    Raises:
        ConfigError: with the first bad field, its value, and the nearest valid key for an unknown one.
    """
    if not isinstance(values, dict):
        raise ConfigError("is not a mapping of settings", where=where, remedy="write `key: value` lines")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        location = first["loc"]
        line = place(location) if place else None
        path = ".".join(str(part) for part in _written(values, location))
        at = ", ".join(part for part in (where, line, path) if part)
        if first["type"] == "extra_forbidden":
            key = str(location[-1])
            raise ConfigError(
                f"unknown key {key!r}", where=at, remedy=nearest(key, _siblings(kind, values, location))
            ) from None
        raise ConfigError(said(error), where=at) from None


def said(error: ValidationError) -> str:
    """Returns the first complaint with the value it is about."""
    first = error.errors()[0]
    value = "" if first["type"] == "missing" else f" (value: {first['input']!r})"
    message = first["msg"].removeprefix("Value error, ")
    return message if message.endswith(")") and first["type"] == "value_error" else f"{message}{value}"


def _written(values: Any, location: Location) -> list[int | str]:
    """Returns the path as the user wrote it: pydantic's also names the chosen members of unions."""
    path: list[int | str] = []
    for number, part in enumerate(location):
        inner = isinstance(values, dict) and part in values
        if inner or number == len(location) - 1:
            path.append(part)
        values = values[part] if inner else values
    return path


def _siblings(kind: type[BaseModel], values: Any, location: Location) -> list[str]:
    """Returns the valid keys beside the unknown one that pydantic found at `location`."""
    from peft_study.config.methods import METHODS
    from peft_study.config.space import SPACES

    fields = kind.model_fields
    in_space = "methods" in fields
    for part in location[:-1]:
        if part in METHODS:
            fields = (SPACES if in_space else METHODS)[str(part)].model_fields
            continue
        inner = fields[part].annotation if part in fields else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            fields = inner.model_fields
    return [name for name in fields if in_space or name != "method"]
