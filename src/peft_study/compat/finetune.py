"""From the original's arguments to this program's settings, with a note for each argument that works differently here.

    Command --to_run--> Run: TrainConfig | what to do with an output folder in use | notes and warnings

| original | here |
|---|---|
| per device x accumulation x processes | ``training.batch_size``; the engine cuts it into rows |
| ``reduce_loss mean``: mean of the micro-batches' means | mean over the supervised tokens of the whole batch |
| ``reduce_loss sum`` | sum over the batch / (accumulation x processes), which is what accelerate makes of it |
| ``max_train_samples``: the first rows | a random draw; the Tulu mixture lies ordered by source |
| no method flag | full fine-tuning, with a loud warning |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from peft_study.compat.arguments import NO_EFFECT, FinetuneArguments
from peft_study.compat.command_line import Command
from peft_study.config import Tracker, TrainConfig, validate
from peft_study.data.formats import parse_mapping
from peft_study.errors import ConfigError, UserError, nearest

_DATA = ("train_file", "dataset_name", "dataset_mixer", "dataset_mixer_list")
_FLAGS = {"use_lora": "lora", "use_prefix_tuning": "prefix_tuning", "use_prompt_tuning": "prompt_tuning"}
_LORA = {"lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}

_OURS = get_args(Tracker)

_Bound = tuple[str, Callable[[Any], bool], str]
_BOUNDS: tuple[_Bound, ...] = (
    ("at least 1", lambda value: value >= 1, "num_train_epochs max_train_steps per_device_train_batch_size"),
    ("at least 1", lambda value: value >= 1, "gradient_accumulation_steps max_train_samples max_seq_length"),
    ("at least 1", lambda value: value >= 1, "preprocessing_num_workers logging_steps eval_steps row_tokens lora_rank"),
    ("at least 1", lambda value: value >= 1, "early_stopping"),
    ("a finite number above 0", lambda value: 0 < value < math.inf, "learning_rate lora_alpha"),
    ("a finite number of at least 0", lambda value: 0 <= value < math.inf, "weight_decay"),
    ("at least 0", lambda value: value >= 0, "seed"),
    ("at least 0 (0: the method's default)", lambda value: value >= 0, "num_virtual_tokens"),
    ("between 0 and 1", lambda value: 0 <= value <= 1, "warmup_ratio"),
    ("at least 0 and below 1", lambda value: 0 <= value < 1, "lora_dropout"),
    ("above 0, or -1 for off", lambda value: value == -1 or 0 <= value < math.inf, "clip_grad_norm"),
    ("at least 1, or -1 for all", lambda value: value == -1 or value >= 1, "keep_last_n_checkpoints"),
    (
        "a number of steps above 0, or 'epoch'",
        lambda value: value == "epoch" or (value.isdecimal() and int(value) >= 1),
        "checkpointing_steps",
    ),
)
"""What a value must be, its test, and the arguments; None always passes, as it means "left out"."""

_PLACES = ("output_dir", "resume_from_checkpoint", "held_out", "chat_template_name", "chat_template")
"""An empty one, as from an unset variable, would mean the current folder, or nothing at all."""


@dataclass(frozen=True)
class Run:
    """What ``peft-study finetune`` starts.

    Attributes:
        config: the settings of the run.
        resume_from: checkpoint folder to continue from; None: none was asked for.
        overwrite: whether another run in the output folder is replaced.
        notes: one line each, to be printed once: what is ignored, what means something else here.
        warnings: one line each, to be printed loudly.
    """

    config: TrainConfig
    resume_from: Path | None
    overwrite: bool
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def to_run(command: Command) -> Run:
    """Turns a parsed command line into a run.

    Raises:
        ConfigError: a value or combination that cannot be used.
    """
    for complaints in (_about_values, _about_the_method, _about_combinations):
        for argument, what, remedy in complaints(command):
            raise ConfigError(what, where=argument and f"--{argument}", remedy=remedy)
    arguments, extra = command.arguments, command.extra
    rate = arguments.learning_rate if "learning_rate" in command.given else None
    every = arguments.checkpointing_steps
    resumed = arguments.resume_from_checkpoint
    values = {
        "model": _model(command),
        "data": _data(command),
        "method": _method(command),
        "training": _training(command, rate),
        "logging": {
            "log_every": arguments.logging_steps or 1,
            "evaluate_every": extra.eval_steps,
            "checkpoint_every": every if every in (None, "epoch") else int(every),
            "keep_checkpoints": arguments.keep_last_n_checkpoints,
            "tensorboard": arguments.with_tracking and "none" not in _trackers(arguments),
            "trackers": [name for name in _trackers(arguments) if name in _OURS] if arguments.with_tracking else [],
        },
        "early_stopping": extra.early_stopping,
        "output": Path(arguments.output_dir),
    }
    return Run(
        config=validate(TrainConfig, values, where="peft-study finetune"),
        resume_from=None if resumed is None else Path(resumed),
        overwrite=arguments.overwrite_output_dir,
        notes=tuple(_notes(command)),
        warnings=tuple(_warnings(_method_name(arguments))),
    )


def given_arguments(command: Command) -> dict[str, Any]:
    """Returns the arguments that were given, for the run's record; the launcher's may hold secrets and stay out."""
    both = {**dataclasses.asdict(command.arguments), **dataclasses.asdict(command.extra)}
    return {name: value for name, value in both.items() if name in command.given}


def pointed(error: UserError, command: Command) -> UserError:
    """Returns an error about a setting (``data.held_out``) with the argument that gave it instead."""
    template = "chat_template_name" if command.extra.chat_template is None else "chat_template"
    arguments = {"data.chat_template": template, "data.held_out": "held_out", "logging.trackers": "report_to"}
    setting, comma, rest = (error.where or "").partition(",")
    if setting not in arguments:
        return error
    return type(error)(error.what, where=f"--{arguments[setting]}{comma}{rest}", remedy=error.remedy)


_Complaints = Iterator[tuple[str | None, str, str | None]]
"""Argument, what is wrong, remedy: the first is the error."""


def _about_values(command: Command) -> _Complaints:
    """Yields what is wrong with single values."""
    from accelerate.utils import LoggerType

    values = {**vars(command.arguments), **vars(command.extra)}
    for name in _PLACES:
        if values[name] is not None and not values[name].strip():
            yield name, "is empty", "give a value, or leave it out"
    for need, holds, names in _BOUNDS:
        for name in names.split():
            if values[name] is not None and not holds(values[name]):
                yield name, f"{values[name]} is not {need}", f"give a value that is {need}"
    trackers = {str(kind.value) for kind in LoggerType} | {"all", "none"}
    for tracker in _trackers(command.arguments):
        if tracker not in trackers:
            yield "report_to", f"unknown tracker {tracker!r}", nearest(tracker, trackers)


def _about_the_method(command: Command) -> _Complaints:
    """Yields what is wrong with the method's flags together."""
    arguments, extra = command.arguments, command.extra
    flags = [flag for flag in _FLAGS if getattr(arguments, flag)]
    flag = flags[0] if flags else None
    if len(flags) > 1:
        said = " and ".join(f"--{flag}" for flag in flags)
        remedy = f"keep one of them, or compare them with `peft-study run` (the original would take --{flag})"
        yield None, f"{said} are given, but a run trains one method", remedy
    if arguments.use_qlora and flag is None:
        yield "use_qlora", "a 4-bit base goes with --use_lora", "add --use_lora"
    if arguments.use_qlora and flag != "use_lora":
        yield "use_qlora", f"a 4-bit base goes with --use_lora, not with --{flag}", "leave out --use_qlora"
    if extra.prefix_init is not None and flag != "use_prefix_tuning":
        yield "prefix_init", "goes with --use_prefix_tuning only", "leave out --prefix_init"
    if extra.prompt_init is not None and flag != "use_prompt_tuning":
        yield "prompt_init", "goes with --use_prompt_tuning only", "leave out --prompt_init"
    if extra.init_text is not None:
        init, remedy = extra.prefix_init or extra.prompt_init, "leave it out, or give a text and init 'text'"
        if flag in (None, "use_lora"):
            yield "init_text", "goes with --use_prefix_tuning or --use_prompt_tuning only", "leave it out"
        if init not in (None, "text"):
            yield "init_text", f"has no effect with init {init!r}", remedy
        if not extra.init_text.strip():
            yield "init_text", "is empty", remedy


def _about_combinations(command: Command) -> _Complaints:
    """Yields what is wrong with the arguments of model, data and output together."""
    arguments, extra = command.arguments, command.extra
    if arguments.lr_scheduler_type == "constant_with_warmup" and arguments.warmup_ratio == 0:
        what = "0 leaves constant_with_warmup without its warm-up"
        yield "warmup_ratio", what, "give e.g. 0.03, or --lr_scheduler_type constant"
    sources = [f"--{name}" for name in _DATA if getattr(arguments, name)]
    if len(sources) != 1:
        what = f"{' and '.join(sources)} are given, but one source is used" if sources else "no training data"
        yield None, what, f"give exactly one of {', '.join(f'--{name}' for name in _DATA)}"
    if not arguments.model_name_or_path:
        yield "model_name_or_path", "no base model", "name a folder, a hub id, or smollm2-135m-instruct"
    if arguments.config_name not in (None, arguments.model_name_or_path):
        yield "config_name", f"{arguments.config_name!r} is not the model's own", "leave it out"
    if arguments.tokenizer_revision not in (None, arguments.model_revision):
        what = f"{arguments.tokenizer_revision!r} is not the revision of the model"
        yield "tokenizer_revision", what, "download that tokenizer and name its folder with --tokenizer_name"
    if (name := arguments.dataset_config_name) is not None:
        remedy = "download it, run `peft-study data convert` and give the result as --train_file"
        yield "dataset_config_name", f"configuration {name!r} of a hub data set cannot be chosen here", remedy
    if extra.chat_template is not None and "chat_template_name" in command.given:
        yield "chat_template", "goes without --chat_template_name", "keep one of them"
    if (folder := arguments.resume_from_checkpoint) is not None:
        if not Path(folder).is_dir():
            yield "resume_from_checkpoint", f"{folder!r} is not a folder", "name a checkpoint folder, or leave it out"
        if arguments.overwrite_output_dir:
            what = "goes without --overwrite_output_dir, which starts from step 0"
            yield "resume_from_checkpoint", what, "keep one of them"


def _trackers(arguments: FinetuneArguments) -> list[str]:
    """Returns the names in ``report_to``, which may be one text, also with commas, or a list."""
    items = [arguments.report_to] if isinstance(arguments.report_to, str) else arguments.report_to
    return [name.strip() for item in items for name in item.split(",") if name.strip()]


def _method_name(arguments: FinetuneArguments) -> str:
    """Returns the method's name in the configuration: the flagged one, or full fine-tuning as in the original."""
    return next((name for flag, name in _FLAGS.items() if getattr(arguments, flag)), "full")


def _model(command: Command) -> dict[str, Any]:
    arguments, extra = command.arguments, command.extra
    launched = "cpu" if command.launch.values.get("cpu") else "auto"
    return {
        "name": arguments.model_name_or_path,
        "tokenizer": arguments.tokenizer_name if arguments.tokenizer_name != arguments.model_name_or_path else None,
        "revision": arguments.model_revision,
        "device": extra.device if "device" in command.given else launched,
        "dtype": extra.dtype if "dtype" in command.given else command.launch.dtype or "auto",
        "quantization": "nf4" if arguments.use_qlora else None,
        "trust_remote_code": arguments.trust_remote_code,
    }


def _data(command: Command) -> dict[str, Any]:
    arguments, extra = command.arguments, command.extra
    template = arguments.chat_template_name if extra.chat_template is None else extra.chat_template
    return {
        "train": _sources(arguments),
        "mapping": parse_mapping(extra.map),
        "max_length": arguments.max_seq_length,
        "chat_template": None if extra.chat_template == "own" else template,
        "add_bos": arguments.add_bos,
        "limit": arguments.max_train_samples,
        "workers": arguments.preprocessing_num_workers,
        "held_out": _held_out(extra.held_out),
    }


def _sources(arguments: FinetuneArguments) -> list[dict[str, Any]]:
    """Returns the data sources, shares for shares and counts for counts."""
    plain = arguments.train_file or arguments.dataset_name
    if plain:
        return [{"path": plain}]
    if arguments.dataset_mixer:
        flag, mixture = "--dataset_mixer", list(arguments.dataset_mixer.items())
    else:
        flag, items = "--dataset_mixer_list", arguments.dataset_mixer_list or []
        if len(items) % 2:
            raise ConfigError(f"{len(items)} values are not pairs", where=flag, remedy="write DATASET SHARE ...")
        mixture = list(zip(items[::2], items[1::2], strict=True))
    amounts: dict[str, float] = {}
    for name, value in mixture:
        try:
            amount = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            amount = math.nan
        if not 0 < amount < math.inf:
            what = f"{value!r} of {name!r} is not a number above 0"
            raise ConfigError(what, where=flag, remedy="give a share (at most 1) or a count of rows")
        if str(name) in amounts:
            raise ConfigError(f"{name!r} is named twice", where=flag, remedy="name each data set once")
        amounts[str(name)] = amount
    if max(amounts.values()) > 1 and min(amounts.values()) <= 1:
        remedy = "give shares of at most 1 for all data sets, or counts above 1 for all"
        raise ConfigError("shares and counts are mixed", where=flag, remedy=remedy)
    return [{"path": name, "take": amount} for name, amount in amounts.items()]


def _held_out(text: str | None) -> float | str | None:
    """Returns a number of rows, a share, or a path."""
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        if Path(text).exists():
            return text
        what, remedy = f"{text!r} is neither a number nor a file", "give rows (64), a share (0.05) or a file of rows"
        raise ConfigError(what, where="--held_out", remedy=remedy) from None
    if not 0 < number < math.inf or (number > 1 and number != int(number)):
        what = f"{text} is neither a number of rows nor a share above 0"
        raise ConfigError(what, where="--held_out", remedy="give e.g. 64 or 0.05")
    return number


def _method(command: Command) -> dict[str, Any]:
    arguments, extra = command.arguments, command.extra
    method = _method_name(arguments)
    if method == "lora":
        return {"method": method, **{setting: getattr(arguments, name) for name, setting in _LORA.items()}}
    soft = {
        "tokens": arguments.num_virtual_tokens or None,
        "init": extra.prefix_init or extra.prompt_init,
        "init_text": extra.init_text,
    }
    given = {} if method == "full" else {name: value for name, value in soft.items() if value is not None}
    return {"method": method, **given}


def _training(command: Command, rate: float | None) -> dict[str, Any]:
    arguments, extra, launch = command.arguments, command.extra, command.launch
    clip = arguments.clip_grad_norm if "clip_grad_norm" in command.given else launch.clip_norm
    return {
        "learning_rate": rate,
        "steps": arguments.max_train_steps,
        "epochs": arguments.num_train_epochs,
        "batch_size": launch.effective_batch_size(
            arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
        ),
        "schedule": arguments.lr_scheduler_type,
        "warmup_ratio": arguments.warmup_ratio,
        "weight_decay": arguments.weight_decay,
        "clip_norm": clip if clip and clip > 0 else None,
        "reduce_loss": arguments.reduce_loss,
        # each process divides its sum by the accumulation steps, then the gradients are averaged over processes
        "sum_divisor": arguments.gradient_accumulation_steps * launch.processes,
        "gradient_checkpointing": arguments.gradient_checkpointing or "auto",
        "seed": arguments.seed,
        "data_seed": arguments.seed,
        "row_tokens": extra.row_tokens,
    }


def _notes(command: Command) -> Iterator[str]:
    """Yields what is ignored and what differs from the original, a line each."""
    arguments, launch = command.arguments, command.launch
    device, steps, count = (
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
        launch.processes,
    )
    yield from launch.notes()
    if ignored := _ignored(command):
        yield f"accepted without effect: {'; '.join(ignored)}"
    if count > 1:
        batch = f"{device} x {steps} x {count} = {launch.effective_batch_size(device, steps)} examples a step"
        if launch.started > 1:
            yield f"{count} processes share each batch: {batch}"
        else:
            command_line = f"torchrun --nproc_per_node {count} -m peft_study finetune ..."
            yield f"one process trains on the batch of all {count}: {batch}; to use {count} GPUs: {command_line}"
    if launch.clip_norm is not None and "clip_grad_norm" not in command.given:
        yield f"gradients are clipped at {launch.clip_norm:g}, as DeepSpeed would (--clip_grad_norm -1: off)"
    if arguments.reduce_loss == "mean":
        yield "the loss is the mean over the supervised tokens of the whole batch, however it is cut up"
    else:
        yield f"the loss is the sum over the batch / {steps * count} accumulation steps, logged per token beside it"
    if arguments.max_train_samples is not None:
        yield f"--max_train_samples draws {arguments.max_train_samples} rows at random, not the first ones"
    others = [name for name in _trackers(arguments) if name not in ("all", "none", "tensorboard", *_OURS)]
    if arguments.with_tracking and others:
        yield f"--report_to {' '.join(others)}: written to metrics.jsonl and TensorBoard instead"


def _ignored(command: Command) -> list[str]:
    """Returns, by reason, the arguments that were given another value than their default and have no effect."""
    arguments = command.arguments
    reasons = {item.name: item.metadata["help"] for item in dataclasses.fields(FinetuneArguments)}
    reasons = {name: text.removeprefix(NO_EFFECT) for name, text in reasons.items() if text.startswith(NO_EFFECT)}
    method = _method_name(arguments)
    if method != "lora":
        reasons |= dict.fromkeys(_LORA, "not LoRA")
    if method in ("lora", "full"):
        reasons["num_virtual_tokens"] = "no virtual tokens"
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if name in command.given and getattr(arguments, name) != getattr(FinetuneArguments, name):
            groups.setdefault(reason, []).append(f"--{name}")
    return [f"{', '.join(names)} ({reason})" for reason, names in groups.items()]


def _warnings(method: str) -> Iterator[str]:
    """Yields what is likely to spoil the run."""
    if method == "full":
        yield (
            "no method flag is given: ALL weights of the model are trained (full fine-tuning, as in the original); "
            "for an adapter add --use_lora, --use_prefix_tuning or --use_prompt_tuning"
        )
