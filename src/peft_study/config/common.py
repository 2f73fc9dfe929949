"""What all settings share: strictness, and errors that name the field, the value and the nearest valid key.

A complaint comes up through pydantic to `validate`, which tells the file, the line and the path:

    a validator of ours   raises SettingError(what, inside the value, remedy)  ┐
    a check of pydantic   notes location, type and input                       ┴─ complaint ── validate ── ConfigError
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from peft_study.errors import ConfigError, nearest

Location = Sequence[int | str]
Place = Callable[[Location], str | None]
"""Tells where a setting was written (``study.yaml, line 7``, ``--steps``), or None where nobody can say."""

_SHOWN = 100
"""Characters of a bad value that an error repeats."""
_SHOULD_BE = "Input should be "


class SettingError(ValueError):
    """What is wrong with a setting, as its validator tells it.

    Args:
        what: what is wrong.
        inside: the rest of the way to the culprit, from the value that is being validated.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, inside: Location = (), remedy: str | None = None) -> None:
        self.what, self.inside, self.remedy = what, tuple(inside), remedy
        super().__init__(what if remedy is None else f"{what}; {remedy}")


class Strict(BaseModel):
    """Base of all settings: unknown keys and empty texts are errors, values are not reassigned, NaN is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def valid_keys(cls) -> Iterable[str]:
        """Returns the keys among which the nearest to an unknown one is looked for."""
        return cls.model_fields

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        """Refuses an unknown key before a required one is missed (it often is that one, mistyped), and empty texts."""
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                remedy = nearest(str(key), cls.valid_keys())
                raise SettingError(f"unknown key {str(key)!r}", inside=(key,), remedy=remedy)
            # an empty path would be taken for the current folder
            if isinstance(values[key], str) and not values[key].strip():
                raise SettingError("is empty", inside=(key,), remedy="give a value, or leave it out")
        return values


Model = TypeVar("Model", bound=BaseModel)


def validate(kind: type[Model], values: Any, *, where: str, place: Place | None = None) -> Model:
    """Builds settings from plain values.

    Args:
        kind: the settings class.
        values: what a YAML file or a command line said.
        where: file or command, named in the error.
        place: tells more closely where a setting stands, and is named instead of `where`.

    Raises:
        ConfigError: with the first bad field, its value, and the nearest valid key for an unknown one.
    """
    if not isinstance(values, dict):
        raise ConfigError("is not a mapping of settings", where=where, remedy="write `key: value` lines")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = complaint(error, values)
        at = (place(found.inside) if place else None) or where
        path = ".".join(str(part) for part in found.inside)
        raise ConfigError(found.what, where=f"{at}, {path}" if path else at, remedy=found.remedy) from None


def complaint(error: ValidationError, values: Any) -> SettingError:
    """Returns the first complaint about `values`: what is wrong with which value, and where inside them."""
    first, *others = error.errors()
    path = _written(values, first["loc"], missing=first["type"] == "missing")
    ours = first.get("ctx", {}).get("error")
    if isinstance(ours, SettingError):
        return SettingError(ours.what, inside=(*path, *ours.inside), remedy=ours.remedy)
    if first["type"] in ("model_type", "dict_type"):
        what = "is empty" if first["input"] is None else f"{_short(first['input'])} is not a mapping of settings"
        return SettingError(what, inside=path, remedy="write `key: value` lines")
    if first["type"] == "too_short" and not first["input"]:
        return SettingError("is empty", inside=path, remedy="give at least one")
    what = first["msg"].removeprefix("Value error, ")
    # each member of a union complains: all that may stand there is named at once
    for other in others:
        if what.startswith(_SHOULD_BE) and _written(values, other["loc"]) == path:
            what += f" or {other['msg'].removeprefix(_SHOULD_BE)}"
    tells_value = first["type"] != "missing" and not isinstance(first["input"], (dict, BaseModel))
    names = re.findall("'([^']+)'", what) if first["type"] == "literal_error" else []
    remedy = nearest(str(first["input"]), names) if names else None
    what += f" (value: {_short(first['input'])})" if tells_value else ""
    return SettingError(what, inside=path, remedy=remedy)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _written(values: Any, location: Location, *, missing: bool = False) -> tuple[int | str, ...]:
    """Returns a location as the user wrote it: pydantic's also names the chosen members of unions.

    Args:
        values: what the user wrote.
        location: pydantic's.
        missing: its last part is not among the values.
    """
    path: list[int | str] = []
    for part in location[:-1] if missing else location:
        if isinstance(values, dict):
            # a name may be a number in YAML, and is a text here
            names = {str(name): name for name in values}
            if str(part) in names:
                path.append(str(part))
                values = values[names[str(part)]]
        elif isinstance(values, (list, tuple)) and isinstance(part, int):
            path.append(part)
            values = values[part]
    return (*path, location[-1]) if missing else tuple(path)
