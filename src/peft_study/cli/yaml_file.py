"""Reading a study file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from peft_study.errors import ConfigError


def load_yaml(path: Path) -> dict[str, Any]:
    """Returns the settings in a YAML file.

    Raises:
        ConfigError: when it is missing, is no YAML (with its line), or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise ConfigError(f"cannot be read ({reason})", where=str(path), remedy="give a YAML file") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ConfigError("is not valid YAML", where=f"{path}{line}", remedy="mend the line") from error
    if not isinstance(values, dict):
        raise ConfigError("is not a mapping of settings", where=str(path), remedy="write `key: value` lines")
    return values


def override(values: dict[str, Any], path: str, value: Any) -> None:
    """Sets ``a.b`` in nested settings where a value was given on the command line."""
    if value is None:
        return
    *parents, last = path.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError("is not a mapping of settings", where=parent, remedy="write `key: value` lines")
        values = inner
    values[last] = value
