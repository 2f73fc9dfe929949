"""From a command line to typed arguments: ours, those of ``accelerate launch`` before them, and a YAML file of ours.

argv --argparse--> the names that were given --> FinetuneArguments, ExtraArguments
                   a YAML file of arguments --^  LaunchArguments   (a flag counts before the file)

One parser knows ours and accelerate's, which come from accelerate's own parser. The launch arguments start no processes
here, but they decide numbers: the size of the batch, the precision, and the clipping that DeepSpeed does by default.
Where accelerate or torchrun did start this program, the environment has the same values.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft_study.compat.arguments import ExtraArguments, FinetuneArguments
from peft_study.errors import ConfigError, UserError, nearest
from peft_study.storage.yaml_file import load_yaml, parse_value

PATIENCE = 3
"""Held-out losses in a row without a lower one, after which ``--early_stopping`` ends a run."""
DEEPSPEED_CLIPPING = 1.0
"""What accelerate fills in for DeepSpeed's "gradient_clipping": "auto" (accelerate 0.31, accelerator.py:1621)."""

# The original always loads in bf16; "auto" does where the device computes in it (a CPU may be 100 times slower).
_DTYPES = {"bf16": "auto", "fp16": "float16", "no": "auto"}
_USED = frozenset({"num_processes", "mixed_precision", "gradient_clipping", "cpu", "config_file", "quiet"})
_TRUE = frozenset({"yes", "true", "t", "y", "1"})
_FALSE = frozenset({"no", "false", "f", "n", "0"})
_NEGATIVE = re.compile(r"-(?:\d|\.\d|inf|nan)", re.IGNORECASE)
_ARGUMENTS = frozenset(item.name for kind in (FinetuneArguments, ExtraArguments) for item in dataclasses.fields(kind))


@dataclass(frozen=True)
class LaunchArguments:
    """What was given of accelerate's launch arguments.

    Attributes:
        values: argument name to value, only of those that were given.
        script: the path of the user's training script, which is not run.
        settings: the content of accelerate's own ``--config_file``.
        started: processes that a launcher started, including this one.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    script: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    started: int = 1

    def get(self, name: str) -> Any:
        """Returns a value of the command line, or else of accelerate's configuration file."""
        return self.values.get(name, self.settings.get(name))

    @property
    def processes(self) -> int:
        """Processes over all machines, at least 1: those that were started, or else those that were asked for."""
        return self.started if self.started > 1 else int(self.get("num_processes") or 1)

    @property
    def dtype(self) -> str | None:
        """The precision that ``mixed_precision`` asks for; None where it is not given or not available (fp8)."""
        return _DTYPES.get(str(self.get("mixed_precision")))

    @property
    def clip_norm(self) -> float | None:
        """The gradient norm at which DeepSpeed would have clipped; None: no DeepSpeed, or no clipping."""
        asked = self.values.get("use_deepspeed") or self.values.get("deepspeed_config_file")
        if not asked and self.settings.get("distributed_type") != "DEEPSPEED":
            return None
        plugin = self.settings.get("deepspeed_config") or {}
        file = self.values.get("deepspeed_config_file") or plugin.get("deepspeed_config_file")
        norm = self.values.get("gradient_clipping", _deepspeed_file(file).get("gradient_clipping"))
        norm = plugin.get("gradient_clipping") if norm is None else norm
        if not isinstance(norm, (int, float)):
            return DEEPSPEED_CLIPPING
        return float(norm) if norm > 0 else None

    def effective_batch_size(self, per_device: int, accumulation: int) -> int:
        """Returns the examples of one optimizer step over all processes."""
        return per_device * accumulation * self.processes

    def notes(self) -> list[str]:
        """Returns a line that names the ignored arguments, or no line."""
        ignored = [f"--{name}" for name in self.values if name not in _USED]
        if self.values.get("mixed_precision") == "fp8":
            ignored.append("--mixed_precision fp8")
        if self.script is not None:
            ignored.append(f"the script {self.script}")
        who = f"{self.started} processes train here" if self.started > 1 else "one process trains here"
        return [f"{who}; ignored of `accelerate launch`: {', '.join(ignored)}"] if ignored else []


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
    """Parses the words after ``peft-study finetune``; ``finetune.to_run`` checks the values.

    Args:
        argv: the words.
        environ: the variables in which a launcher says how it started this process.

    Raises:
        ConfigError: an unknown argument or a value of the wrong type, with the flag and the remedy.
    """
    flags, words = _parsed(argv)
    file = script = None
    for word in words:
        if word.startswith("-") and not _NEGATIVE.match(word):
            raise _unknown(word.partition("=")[0])
        if file is None and word.endswith((".yaml", ".yml")):
            file = Path(word)
        elif script is None and (word.endswith(".py") or "module" in flags):
            script = word
        else:
            remedy = "arguments are written --name value; one YAML file of arguments may come first"
            raise ConfigError(f"unexpected value {word!r}", remedy=remedy)
    flags.pop("nondefault", None)  # accelerate's own list of what was given
    launch = {name: flags.pop(name) for name in list(flags) if name not in _ARGUMENTS}
    if file is not None:
        # after a YAML file the original separates the items of a list with commas
        lists = {name: ",".join(value).split(",") for name, value in flags.items() if isinstance(value, list)}
        flags = {**_from_yaml(file), **flags, **lists}
    originals = {name: value for name, value in flags.items() if hasattr(FinetuneArguments, name)}
    ours = {name: value for name, value in flags.items() if name not in originals}
    return Command(
        FinetuneArguments(**originals), ExtraArguments(**ours), _launch(launch, script, environ), frozenset(flags)
    )


def usage() -> str:
    """Returns the help text: every argument with its default and meaning."""
    return str(_hf_parser().format_help())


def options() -> Mapping[str, argparse.Action]:
    """Returns every option that ``parse`` knows, ours and accelerate's, with its action."""
    return MappingProxyType(_parser()._option_string_actions)


def _hf_parser() -> Any:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        [FinetuneArguments, ExtraArguments],
        prog="peft-study finetune",
        description="One fine-tuning run, with the arguments of open-instruct's finetune.py; those of `accelerate "
        "launch` may stand there too.",
        add_help=False,
        allow_abbrev=False,  # what is short for one side may be a name of the other
        exit_on_error=False,
    )
    for action in parser._actions:
        if action.dest == "early_stopping":
            action.nargs, action.type, action.metavar = "?", _patience, "PATIENCE"
    return parser


@cache
def _parser() -> Any:
    """Returns the parser of our and accelerate's arguments; its result has only those that were given."""
    from accelerate.commands.launch import launch_command_parser

    parser = _hf_parser()
    parser._negative_number_matcher = _NEGATIVE  # argparse (3.11) takes -1e-4 and -inf for options
    for action in parser._actions:
        if action.dest == "dataset_mixer":
            action.type = _mapping
        elif action.nargs == "?" and action.type is not _patience:
            action.type = _truth
    for action in launch_command_parser()._actions:
        # gradient_accumulation_steps, which both have, means the same in both
        if action.option_strings and action.dest not in {"help", *_ARGUMENTS}:
            parser._add_action(action)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser


def _parsed(words: Sequence[str], where: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Returns the arguments in some words by name, and the words that belong to none; `where` is named in errors."""
    known = options()
    # argparse would take any next word for the value of a switch, such as the script's path after --use_lora
    joined = [
        f"{word}=True" if word in known and known[word].nargs == "?" and not _is_value(word, after) else word
        for word, after in zip(words, [*words[1:], ""], strict=False)
    ]
    try:
        found, rest = _parser().parse_known_args(joined)
        for name, value in vars(found).items():
            if value == []:  # argparse (3.11) makes this of --name=--
                raise argparse.ArgumentError(known[f"--{name}"], "expected one argument")
    except argparse.ArgumentError as error:
        raise _refused(error, where) from None
    return vars(found), rest


def _refused(error: argparse.ArgumentError, where: str | None) -> ConfigError:
    """Returns argparse's complaint as one that names flag, value and remedy."""
    flag = str(error.argument_name).split("/")[0]
    kinds = {
        "_patience": "a whole number",
        "int": "a whole number",
        "float": "a number",
        "_truth": "True or False",
        "_mapping": "a mapping",
    }
    remedy = f"write {flag} VALUE"
    if found := re.fullmatch(r"invalid (.+) value: (.*)", error.message, re.DOTALL):
        what, remedy = f"{found[2]} is not {kinds.get(found[1], 'a usable value')}", "fix the value"
        if found[1] == "_truth":
            remedy = f"write {flag}, {flag} True or {flag} False"
    elif found := re.match(r"invalid choice: (.*) \(choose from", error.message, re.DOTALL):
        what, remedy = (
            f"unknown value {found[1]}",
            nearest(found[1].strip("'\""), map(str, options()[flag].choices or ())),
        )
    elif "ignored explicit argument" in error.message:
        what, remedy = "takes no value", f"write {flag} alone"
    else:
        what = "needs a value"
    return ConfigError(what, where=where or flag, remedy=remedy)


def _unknown(name: str) -> ConfigError:
    """Returns the error for an unknown name; with no similar one it points to the help, as there are some 180."""
    known = [option for option in options() if option.startswith("--") and "-" not in option[2:]]
    remedy = nearest("--" + name.lstrip("-").replace("-", "_"), known)
    if not remedy.startswith("did you mean"):
        remedy = "`peft-study finetune --help` lists them"
    return ConfigError(f"unknown argument {name!r}", remedy=remedy)


def _truth(text: str) -> bool:
    if text.lower() not in _TRUE | _FALSE:
        raise ValueError
    return text.lower() in _TRUE


def _patience(text: str) -> int | None:
    """Returns the number of ``--early_stopping``: `PATIENCE` for the switch alone, None where it is switched off."""
    if text.lower() in (_TRUE | _FALSE) - {"0", "1"}:
        return PATIENCE if text.lower() in _TRUE else None
    return int(text)


def _is_value(switch: str, word: str) -> bool:
    """Returns whether the word after a switch is its value."""
    number = switch.replace("-", "_") == "__early_stopping" and re.fullmatch(r"-?[\d.]+", word)
    return bool(number) or word.lower() in _TRUE | _FALSE


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = parse_value(text, "")
    except ConfigError:
        found = None
    if not isinstance(found, dict):
        raise ValueError
    return found


def _from_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML or JSON file of arguments. Its values are parsed as the command line's words are."""
    values: dict[str, Any] = {}
    for name, value in load_yaml(path).values.items():
        where = f"{path}, {name}"
        if name not in _ARGUMENTS:
            raise ConfigError(f"unknown argument {name!r}", where=str(path), remedy=nearest(str(name), _ARGUMENTS))
        action = options()[f"--{name}"]
        if value is None:
            continue
        if isinstance(value, dict) and action.type is _mapping:
            values[name] = value
        elif isinstance(value, dict) or (isinstance(value, list) and action.nargs != "+"):
            raise ConfigError(f"{value!r} is not a single value", where=where, remedy="fix the value")
        elif action.nargs == "+":
            items = value if isinstance(value, list) else str(value).split(",")
            values[name] = [str(item).strip() for item in items]
        else:
            values |= _parsed([f"--{name}={value}"], where)[0]
    return values


def _launch(given: dict[str, Any], script: str | None, environ: Mapping[str, str]) -> LaunchArguments:
    """Returns the launch arguments of the command line, accelerate's configuration file and the environment."""
    try:
        settings = load_yaml(Path(given["config_file"])).values if "config_file" in given else {}
    except UserError as error:
        raise error.within("--config_file") from None
    size = environ.get("WORLD_SIZE", "1")
    started = int(size) if size.isdigit() else 1
    launch = LaunchArguments({**_told_by_launcher(environ), **given}, script, settings, started)
    asked = launch.get("num_processes")
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
        raise ConfigError(f"{asked!r} is not a whole number above 0", where="--num_processes", remedy="leave it out")
    if asked is not None and started > 1 and asked != started:
        raise ConfigError(
            f"{asked} are asked for, but the launcher started {started} processes",
            where="--num_processes",
            remedy="give it to the launcher alone",
        )
    return launch


def _told_by_launcher(environ: Mapping[str, str]) -> dict[str, Any]:
    """Returns the launch arguments that accelerate hands to its processes in the environment (accelerate 1.15)."""
    values: dict[str, Any] = {}
    precision = environ.get("ACCELERATE_MIXED_PRECISION")
    if precision in ("bf16", "fp16", "fp8"):  # "no" stands there where nothing was asked for
        values["mixed_precision"] = precision
    if environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE:
        values["cpu"] = True
    if environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in _TRUE:
        values["use_deepspeed"] = True
        file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if file.lower() not in ("", "none"):
            values["deepspeed_config_file"] = file
        with contextlib.suppress(ValueError):
            values["gradient_clipping"] = float(environ.get("ACCELERATE_GRADIENT_CLIPPING", ""))
    return values


def _deepspeed_file(path: str | None) -> dict[str, Any]:
    """Reads DeepSpeed's configuration. A missing or damaged file counts as empty, as DeepSpeed is not run."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
