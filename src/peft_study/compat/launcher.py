"""accelerate's launch arguments, which stand before the script's own in ``accelerate launch ... finetune.py ...``.

    argv --split--> CommandLineParts: tokens for our parser | LaunchArguments | the YAML file

Their names and how many values each takes come from accelerate's own parser. Written behind ``peft-study finetune``
they start no processes; what they say about the numbers counts: the batch they make together, the precision, and the
clipping that DeepSpeed does without being asked. Where accelerate or torchrun really started this program, they told it
the same through the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from peft_study.errors import ConfigError, nearest

# The one name that accelerate and the original share. It means the same in both, and ours takes it.
SHARED = frozenset({"gradient_accumulation_steps"})

# accelerate fills DeepSpeed's "gradient_clipping": "auto" with this (accelerate 0.31, accelerator.py:1621).
DEEPSPEED_CLIPPING = 1.0

# the original loads in bf16 whatever is said; auto does where the device computes in it (a CPU may be 100 times slower)
_DTYPES = {"bf16": "auto", "fp16": "float16", "no": "auto"}
_USED = frozenset({"num_processes", "mixed_precision", "gradient_clipping", "cpu", "config_file"})
_TRUE = frozenset({"yes", "true", "t", "y", "1"})
_BOOLS = _TRUE | {"no", "false", "f", "n", "0"}
_NEGATIVE = re.compile(r"-(?:\d|\.\d|inf|nan)", re.IGNORECASE)


@dataclass(frozen=True)
class LaunchArguments:
    """What was given of accelerate's launch arguments.

    Attributes:
        values: argument name to value, only of those that were given.
        script: the path of the user's training script, which is not run.
        settings: the content of accelerate's own ``--config_file``.
        started: processes that a launcher really started, this one among them.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    script: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    started: int = 1

    def _value(self, name: str) -> Any:
        return self.values.get(name, self.settings.get(name))

    @property
    def processes(self) -> int:
        """Processes over all machines, at least 1: those that were started, or else those that were asked for."""
        return self.started if self.started > 1 else int(self._value("num_processes") or 1)

    @property
    def dtype(self) -> str | None:
        """The precision that ``mixed_precision`` asks for; None where it is not given or not available (fp8)."""
        return _DTYPES.get(str(self._value("mixed_precision")))

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed would have run the training."""
        asked = self.values.get("use_deepspeed") or self.values.get("deepspeed_config_file")
        return bool(asked) or self.settings.get("distributed_type") == "DEEPSPEED"

    @property
    def clip_norm(self) -> float | None:
        """The gradient norm at which the launcher would have clipped; None: not at all."""
        if not self.uses_deepspeed:
            return None
        plugin = self.settings.get("deepspeed_config") or {}
        file = self.values.get("deepspeed_config_file") or plugin.get("deepspeed_config_file")
        said = self.values.get("gradient_clipping", _deepspeed_file(file).get("gradient_clipping"))
        said = plugin.get("gradient_clipping") if said is None else said
        if not isinstance(said, (int, float)):
            return DEEPSPEED_CLIPPING
        return float(said) if said > 0 else None

    def effective_batch_size(self, per_device: int, accumulation: int) -> int:
        """Returns the examples of one optimizer step over all processes."""
        return per_device * accumulation * self.processes

    def notes(self) -> list[str]:
        """Returns what is ignored, in one line, or no line."""
        ignored = [f"--{name}" for name in self.values if name not in _USED]
        if self.values.get("mixed_precision") == "fp8":
            ignored.append("--mixed_precision fp8")
        if self.script is not None:
            ignored.append(f"the script {self.script}")
        who = f"{self.started} processes train here" if self.started > 1 else "one process trains here"
        return [f"{who}; ignored of `accelerate launch`: {', '.join(ignored)}"] if ignored else []


@dataclass
class CommandLineParts:
    """A command line taken apart.

    Attributes:
        ours: tokens for our parser, single values joined to their option with ``=``.
        given: names of our arguments that were given.
        launch: option names and texts of accelerate's.
        config: the YAML file of arguments.
        script: the user's training script.
    """

    ours: list[str] = field(default_factory=list)
    given: set[str] = field(default_factory=set)
    launch: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    script: str | None = None


@cache
def launch_options() -> dict[str, argparse.Action]:
    """Returns accelerate's launch options, each with the action that says how many values it takes."""
    from accelerate.commands.launch import launch_command_parser

    actions = launch_command_parser()._option_string_actions
    return {name: action for name, action in actions.items() if action.dest != "help"}


def split(argv: Sequence[str], ours: Mapping[str, argparse.Action]) -> CommandLineParts:
    """Takes a command line apart into our arguments and accelerate's; where both know a name, it is ours.

    Names are taken whole, never abbreviated: what is short for one side may be a name of the other.

    Args:
        argv: the command line behind ``peft-study finetune``.
        ours: our options, each with its action.

    Raises:
        ConfigError: an unknown argument, or a value that belongs to none.
    """
    theirs = launch_options()
    parts = CommandLineParts()
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name, joined, value = token.partition("=")
        if not _is_option(token):
            _positional(token, parts)
        elif name in ours:
            _take_ours(name, value if joined else None, ours[name], tokens, parts)
        elif name in theirs:
            action = theirs[name]
            if not joined and action.nargs is None:
                if not tokens or _is_option(tokens[0]):
                    raise ConfigError("needs a value", where=name, remedy="as for `accelerate launch`")
                value = tokens.pop(0)
            _store(name, value, action, parts)
        else:
            raise _unknown(name, [*ours, *theirs])
    return parts


def launch_arguments(parts: CommandLineParts, environ: Mapping[str, str]) -> LaunchArguments:
    """Builds the launch arguments of a command line, reading accelerate's configuration file where one is named.

    Args:
        parts: of the command line.
        environ: where a launcher left what it was told; the command line wins.

    Raises:
        ConfigError: the configuration file cannot be read, the number of processes is below 1, or another number was
            started than the command line says.
    """
    path = parts.launch.get("config_file")
    values = {**_told_by_launcher(environ), **parts.launch}
    size = environ.get("WORLD_SIZE", "1")
    started = int(size) if size.isdigit() else 1
    launch = LaunchArguments(values, parts.script, {} if path is None else _settings(path), started)
    said = launch._value("num_processes")
    if said is not None and (isinstance(said, bool) or not isinstance(said, int) or said < 1):
        raise ConfigError(f"{said!r} is not a whole number above 0", where="--num_processes", remedy="leave it out")
    if said is not None and started > 1 and said != started:
        raise ConfigError(
            f"{said} is said, but the launcher started {started} processes",
            where="--num_processes",
            remedy="give it to the launcher alone",
        )
    return launch


def _told_by_launcher(environ: Mapping[str, str]) -> dict[str, Any]:
    """Returns the launch arguments that accelerate hands to its processes in the environment (accelerate 1.15)."""
    values: dict[str, Any] = {}
    precision = environ.get("ACCELERATE_MIXED_PRECISION")
    if precision in ("bf16", "fp16", "fp8"):  # "no" is what it says where nothing was asked for
        values["mixed_precision"] = precision
    if environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE:
        values["cpu"] = True
    if environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in _TRUE:
        values["use_deepspeed"] = True
        file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if file and file.lower() != "none":
            values["deepspeed_config_file"] = file
        with contextlib.suppress(ValueError):
            values["gradient_clipping"] = float(environ.get("ACCELERATE_GRADIENT_CLIPPING", ""))
    return values


def _is_option(token: str) -> bool:
    return token.startswith("-") and not _NEGATIVE.match(token)


def _unknown(name: str, options: Sequence[str]) -> ConfigError:
    """The error for a name that nobody knows. Without a near one it names the help, as there are some 180."""
    said = "--" + name.lstrip("-").replace("-", "_")
    state = [option for option in options if option.startswith("--") and "-" not in option[2:]]
    remedy = nearest(said, state)
    if not remedy.startswith("did you mean"):
        remedy = "`peft-study finetune --help` lists them"
    return ConfigError(f"unknown argument {name!r}", remedy=remedy)


def _positional(token: str, parts: CommandLineParts) -> None:
    """Files a token that no option claimed."""
    if token.endswith((".yaml", ".yml")) and parts.config is None:
        parts.config = token
    elif parts.script is None and (token.endswith(".py") or "module" in parts.launch):
        parts.script = token
    else:
        raise ConfigError(
            f"unexpected value {token!r}",
            remedy="arguments are written --name value; one YAML file of arguments may come first",
        )


def _take_ours(
    name: str, value: str | None, action: argparse.Action, tokens: list[str], parts: CommandLineParts
) -> None:
    """Moves one of our options with its values from ``tokens`` to ``parts``."""
    parts.given.add(action.dest)
    if value is not None or action.nargs == 0:
        parts.ours.append(name if value is None else f"{name}={value}")
    elif action.nargs == "?":
        # argparse would take any next word; a script's path behind `--use_lora` is not a value of it
        parts.ours.append(f"{name}={tokens.pop(0)}" if tokens and tokens[0].lower() in _BOOLS else name)
    elif action.nargs == "+":
        parts.ours.append(name)
        while tokens and not _is_option(tokens[0]):
            parts.ours.append(tokens.pop(0))
    elif tokens and not _is_option(tokens[0]):
        parts.ours.append(f"{name}={tokens.pop(0)}")
    else:
        parts.ours.append(name)


def _store(name: str, value: str, action: argparse.Action, parts: CommandLineParts) -> None:
    """Puts one launch argument, converted and checked as accelerate does, into ``parts``."""
    if action.nargs == 0:
        parts.launch[action.dest] = True
        return
    try:
        # argparse allows any callable, also a registered name; accelerate uses callables only
        converted = action.type(value) if callable(action.type) else value
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        kind = getattr(action.type, "__name__", "value")
        raise ConfigError(f"{value!r} is not of type {kind}", where=name, remedy="as for `accelerate launch`") from None
    if action.choices and converted not in action.choices:
        raise ConfigError(f"unknown value {value!r}", where=name, remedy=nearest(value, map(str, action.choices)))
    parts.launch[action.dest] = converted


def _settings(path: str) -> dict[str, Any]:
    """Reads accelerate's configuration file (YAML, of which JSON is a part)."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path!r} cannot be read as accelerate's configuration",
            where="--config_file",
            remedy="name the file that `accelerate config` wrote, or leave it out",
        )
    return found


def _deepspeed_file(path: str | None) -> dict[str, Any]:
    """Reads DeepSpeed's configuration; one that is not there or not JSON says nothing, as DeepSpeed does not run."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
