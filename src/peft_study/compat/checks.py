"""Checks of the arguments' values and of their combinations, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

from peft_study.compat.arguments import ExtraArguments, FinetuneArguments
from peft_study.compat.parsing import Command
from peft_study.config import (
    Device,
    Dtype,
    PrefixTuningConfig,
    PromptTuningConfig,
    Schedule,
)
from peft_study.errors import ConfigError, nearest

DATA_ARGUMENTS = ("train_file", "dataset_name", "dataset_mixer", "dataset_mixer_list")
METHOD_ARGUMENTS = {
    "use_lora": "lora",
    "use_prefix_tuning": "prefix_tuning",
    "use_prompt_tuning": "prompt_tuning",
}

# argument: (what it must be, how that is tested); None always passes, it means "left out"
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "learning_rate": ("a finite number above 0", lambda value: math.isfinite(value) and value > 0),
    "weight_decay": ("a finite number of at least 0", lambda value: math.isfinite(value) and value >= 0),
    "warmup_ratio": ("between 0 and 1", lambda value: 0 <= value <= 1),
    "clip_grad_norm": (
        "above 0, or -1 for off",
        lambda value: value in (-1, 0) or (math.isfinite(value) and value > 0),
    ),
    "lora_rank": ("at least 1", lambda value: value >= 1),
    "lora_alpha": ("a finite number above 0", lambda value: math.isfinite(value) and value > 0),
    "lora_dropout": ("at least 0 and below 1", lambda value: 0 <= value < 1),
    "num_virtual_tokens": ("at least 0 (0: the method's default)", lambda value: value >= 0),
    "keep_last_n_checkpoints": ("at least 1, or -1 for all", lambda value: value == -1 or value >= 1),
    "seed": ("at least 0", lambda value: value >= 0),
    "checkpointing_steps": (
        "a number of steps above 0, or 'epoch'",
        lambda value: value == "epoch" or (value.isdecimal() and int(value) >= 1),
    ),
    **{
        name: ("at least 1", lambda value: value >= 1)
        for name in (
            "num_train_epochs",
            "max_train_steps",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_train_samples",
            "max_seq_length",
            "preprocessing_num_workers",
            "logging_steps",
            "eval_steps",
            "row_tokens",
        )
    },
}

_PLACES = ("output_dir", "resume_from_checkpoint", "held_out", "chat_template_name", "chat_template")
"""An empty one, as of a variable that is not set, would be taken for the current folder, or for none."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "lr_scheduler_type": get_args(Schedule),
    "reduce_loss": ("mean", "sum"),
    "device": get_args(Device),
    "dtype": get_args(Dtype),
    "prefix_init": get_args(PrefixTuningConfig.model_fields["init"].annotation),
    "prompt_init": get_args(PromptTuningConfig.model_fields["init"].annotation),
}


def check(command: Command) -> None:
    """Checks values and combinations.

    Raises:
        ConfigError: the first that cannot be used, with flag, value and remedy.
    """
    for arguments in (command.arguments, command.extra):
        _check_values(arguments)
    _check_warmup(command.arguments)
    _check_trackers(trackers(command.arguments))
    _check_method(command)
    _check_data(command.arguments)
    if not command.arguments.model_name_or_path:
        raise ConfigError(
            "no base model", where="--model_name_or_path", remedy="name a folder, a hub id, or smollm2-135m-instruct"
        )


def trackers(arguments: FinetuneArguments) -> list[str]:
    """Returns the names in ``report_to``, which may be one text, also with commas, or a list."""
    said = arguments.report_to
    items = [said] if isinstance(said, str) else said
    return [name.strip() for item in items for name in item.split(",") if name.strip()]


def method_of(arguments: FinetuneArguments) -> str:
    """Returns the method's name in the configuration: the flagged one, or full fine-tuning as in the original."""
    return next((name for flag, name in METHOD_ARGUMENTS.items() if getattr(arguments, flag)), "full")


def _check_values(arguments: FinetuneArguments | ExtraArguments) -> None:
    for name in _PLACES:
        value = getattr(arguments, name, None)
        if value is not None and not value.strip():
            raise ConfigError("is empty", where=f"--{name}", remedy="give a value, or leave it out")
    for name, (need, holds) in _RULES.items():
        value = getattr(arguments, name, None)
        if value is not None and not holds(value):
            raise ConfigError(f"{value} is not {need}", where=f"--{name}", remedy=f"give a value that is {need}")
    for name, choices in _CHOICES.items():
        value = getattr(arguments, name, None)
        if value is not None and value not in choices:
            raise ConfigError(f"unknown value {value!r}", where=f"--{name}", remedy=nearest(value, choices))


def _check_warmup(arguments: FinetuneArguments) -> None:
    if arguments.lr_scheduler_type == "constant_with_warmup" and arguments.warmup_ratio == 0:
        raise ConfigError(
            "0 leaves constant_with_warmup without its warm-up",
            where="--warmup_ratio",
            remedy="give e.g. 0.03, or --lr_scheduler_type constant",
        )


def _check_trackers(names: list[str]) -> None:
    from accelerate.utils import LoggerType

    state = {str(kind.value) for kind in LoggerType} | {"all", "none"}
    for name in names:
        if name not in state:
            raise ConfigError(f"unknown tracker {name!r}", where="--report_to", remedy=nearest(name, state))


def _check_method(command: Command) -> None:
    arguments, extra = command.arguments, command.extra
    flags = [flag for flag in METHOD_ARGUMENTS if getattr(arguments, flag)]
    if len(flags) > 1:
        raise ConfigError(
            f"{' and '.join(f'--{flag}' for flag in flags)} are given, but a run trains one method",
            remedy=f"keep one of them, or compare them with `peft-study run` (the original would take --{flags[0]})",
        )
    if arguments.use_qlora and flags != ["use_lora"]:
        other = f", not with --{flags[0]}" if flags else ""
        raise ConfigError(
            f"a 4-bit base goes with --use_lora{other}",
            where="--use_qlora",
            remedy="add --use_lora" if not flags else "leave out --use_qlora",
        )
    for name, flag in (("prefix_init", "use_prefix_tuning"), ("prompt_init", "use_prompt_tuning")):
        if getattr(extra, name) is not None and flags != [flag]:
            raise ConfigError(f"goes with --{flag} only", where=f"--{name}", remedy=f"leave out --{name}")
    if extra.init_text is None:
        return
    if flags not in (["use_prefix_tuning"], ["use_prompt_tuning"]):
        raise ConfigError(
            "goes with --use_prefix_tuning or --use_prompt_tuning only", where="--init_text", remedy="leave it out"
        )
    init = extra.prefix_init if flags == ["use_prefix_tuning"] else extra.prompt_init
    if init not in (None, "text") or not extra.init_text.strip():
        said = f"has no effect with init {init!r}" if init not in (None, "text") else "is empty"
        raise ConfigError(said, where="--init_text", remedy="leave it out, or give a text and init 'text'")


def _check_data(arguments: FinetuneArguments) -> None:
    given = [name for name in DATA_ARGUMENTS if getattr(arguments, name)]
    if len(given) != 1:
        said = " and ".join(f"--{name}" for name in given)
        raise ConfigError(
            f"{said} are given, but one source is used" if given else "no training data",
            remedy=f"give exactly one of {', '.join(f'--{name}' for name in DATA_ARGUMENTS)}",
        )
