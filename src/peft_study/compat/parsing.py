"""From a command line to typed arguments: flags, a YAML file, or a YAML file with overrides.

argv --launcher.split--> our tokens --HfArgumentParser--> FinetuneArguments, ExtraArguments
                         a YAML file --_from_yaml-------^  (flags win over the file)
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from peft_study.compat.arguments import ExtraArguments, FinetuneArguments
from peft_study.compat.launcher import LaunchArguments, launch_arguments, split
from peft_study.errors import ConfigError, nearest
from peft_study.storage.files import read_text

_KINDS = {"int": "a whole number", "float": "a number", "string_to_bool": "True or False"}


@dataclass(frozen=True)
class Command:
    """A parsed ``peft-study finetune`` command line.

    Attributes:
        arguments: the original's arguments.
        extra: ours.
        launch: accelerate's.
        given: names of ``arguments`` and ``extra`` that the command line or the YAML file gives.
    """

    arguments: FinetuneArguments
    extra: ExtraArguments
    launch: LaunchArguments
    given: frozenset[str]


def parse(argv: Sequence[str], environ: Mapping[str, str] = MappingProxyType({})) -> Command:
    """Parses what stands behind ``peft-study finetune``; values are checked by ``checks.check``.

    Args:
        argv: the words.
        environ: the variables in which a launcher says how it started this process.

    Raises:
        ConfigError: an unknown argument or a value of the wrong type, with the flag and the remedy.
    """
    parser = _parser()
    parts = split(argv, _options())
    file = _from_yaml(Path(parts.config)) if parts.config is not None else {}
    try:
        arguments, extra = parser.parse_args_into_dataclasses(parts.ours, look_for_args_file=False)
    except argparse.ArgumentError as error:
        raise _wrong(error) from None
    flags = {name: _value(arguments, extra, name) for name in parts.given}
    if parts.config is not None:
        # behind a YAML file the original separates the items of a list with commas
        flags = {
            name: [item for text in value for item in text.split(",")] if isinstance(value, list) else value
            for name, value in flags.items()
        }
    merged = {**file, **flags}
    return Command(
        _filled(FinetuneArguments(), merged),
        _filled(ExtraArguments(), merged),
        launch_arguments(parts, environ),
        frozenset(merged),
    )


def usage() -> str:
    """Returns the help text: every argument with its default and meaning."""
    return str(_parser().format_help())


@cache
def _parser() -> Any:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        [FinetuneArguments, ExtraArguments],
        prog="peft-study finetune",
        description="One fine-tuning run, with the arguments of open-instruct's finetune.py; those of `accelerate "
        "launch` may stand there too.",
        add_help=False,
        exit_on_error=False,
    )
    for action in parser._actions:
        if action.dest == "dataset_mixer":
            action.type = _mapping
    return parser


@cache
def _options() -> dict[str, argparse.Action]:
    return dict(_parser()._option_string_actions)


def _filled(defaults: Any, values: dict[str, Any]) -> Any:
    names = {item.name for item in dataclasses.fields(defaults)}
    return dataclasses.replace(defaults, **{name: value for name, value in values.items() if name in names})


def _value(arguments: FinetuneArguments, extra: ExtraArguments, name: str) -> Any:
    return getattr(arguments, name) if hasattr(arguments, name) else getattr(extra, name)


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"invalid mapping value: {text!r}")
    return found


def _wrong(error: argparse.ArgumentError) -> ConfigError:
    """Turns argparse's complaint into one that names flag, value and remedy."""
    flag = str(error.argument_name).split("/")[0]
    typed = re.fullmatch(r"invalid (\w+) value: (.*)", error.message)
    if typed:
        return ConfigError(
            f"{typed[2]} is not {_KINDS.get(typed[1], f'a {typed[1]}')}", where=flag, remedy="fix the value"
        )
    if "Truthy value expected" in error.message:
        said = re.search(r"got (\S+)", error.message)
        return ConfigError(
            f"{said[1] if said else 'its value'!r} is not True or False",
            where=flag,
            remedy=f"write {flag}, {flag} True or {flag} False",
        )
    if "ignored explicit argument" in error.message:
        return ConfigError("takes no value", where=flag, remedy=f"write {flag} alone")
    return ConfigError("needs a value", where=flag, remedy=f"write {flag} VALUE")


def _from_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file of arguments, each converted to its argument's type.

    YAML reads ``1e-4`` as text, and so did the original; the type of the argument decides here.
    """
    text = read_text(path)
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError("is not valid YAML", where=f"{path}{line}", remedy="write `name: value` lines") from error
    if not isinstance(found, dict):
        raise ConfigError("is not a mapping of arguments", where=str(path), remedy="write `name: value` lines")
    actions = {action.dest: action for action in _options().values() if action.nargs != 0}
    values: dict[str, Any] = {}
    for name, value in found.items():
        if name not in actions:
            raise ConfigError(f"unknown argument {name!r}", where=str(path), remedy=nearest(str(name), actions))
        if value is not None:
            values[name] = _converted(value, actions[name], f"{path}, {name}")
    return values


def _converted(value: Any, action: argparse.Action, where: str) -> Any:
    """Converts one YAML value by the action of its argument."""
    convert: Callable[[str], Any] = action.type if callable(action.type) else str
    wrong = ConfigError(
        f"{value!r} is not {_KINDS.get(convert.__name__, 'a usable value')}", where=where, remedy="fix the value"
    )
    if action.nargs == "+":
        items = value if isinstance(value, list) else str(value).split(",")
        return [str(item).strip() for item in items]
    if isinstance(value, dict):
        if convert is not _mapping:
            raise wrong
        return value
    if isinstance(value, list):
        raise wrong
    try:
        return convert(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        raise wrong from None
