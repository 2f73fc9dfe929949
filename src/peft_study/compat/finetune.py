"""From the original's arguments to this program's settings, saying once whatever means something else here.

    Command --check--> to_run --> Run: TrainConfig | what to do with an output folder in use | notes and warnings

| original | here |
|---|---|
| per device x accumulation x processes | ``training.batch_size``; how it is cut into rows is not the user's concern |
| ``reduce_loss mean``: mean of the micro-batches' means | mean over the supervised tokens of the whole batch |
| ``reduce_loss sum`` | sum over the batch / (accumulation x processes), which is what accelerate makes of it |
| ``max_train_samples``: the first rows | a random draw; the Tulu mixture lies ordered by source |
| no method flag | full fine-tuning, said loudly |
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_study.compat.arguments import FinetuneArguments
from peft_study.compat.checks import check, method_of, trackers
from peft_study.compat.parsing import Command
from peft_study.config import METHODS, TrainConfig, validate
from peft_study.data.formats import parse_mapping
from peft_study.errors import ConfigError, UserError

_PLAIN_METHOD_ARGUMENTS = {
    "lora": ("lora_rank", "lora_alpha", "lora_dropout"),
    "soft": ("num_virtual_tokens",),
}

# Accepted, and without an effect here; why, as it is said to the user.
_WITHOUT_MEANING = {
    "hub upload": ("push_to_hub", "hf_entity", "hf_repo_id", "hf_repo_revision", "hf_repo_url", "save_to_hub"),
    "Beaker": ("try_launch_beaker_eval_jobs", "hf_metadata_dataset"),
    "chosen by the device": ("use_flash_attn", "use_slow_tokenizer", "low_cpu_mem_usage", "fused_optimizer"),
    "32-bit optimizer states": ("use_8bit_optimizer",),
    "no auxiliary loss here": ("load_balancing_loss", "load_balancing_weight"),
    "one process": ("timeout",),
    "tokens are cached by content": ("overwrite_cache",),
    "the mixture is not written": ("dataset_mix_dir",),
}


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
    check(command)
    arguments, extra = command.arguments, command.extra
    rate = arguments.learning_rate if "learning_rate" in command.given else None
    values = {
        "model": _model(command),
        "data": _data(command),
        "method": _method(command),
        "training": _training(command, rate),
        "logging": {
            "log_every": arguments.logging_steps or 1,
            "evaluate_every": extra.eval_steps,
            "checkpoint_every": _checkpoint_every(arguments.checkpointing_steps),
            "keep_checkpoints": arguments.keep_last_n_checkpoints,
            "tensorboard": arguments.with_tracking and "none" not in trackers(arguments),
        },
        "output": Path(arguments.output_dir),
    }
    return Run(
        config=validate(TrainConfig, values, where="peft-study finetune"),
        resume_from=_checkpoint(arguments),
        overwrite=arguments.overwrite_output_dir,
        notes=tuple(_notes(command)),
        warnings=tuple(_warnings(method_of(arguments), rate)),
    )


def said(command: Command) -> dict[str, Any]:
    """Returns the arguments that were given, for the run's record; the launcher's may hold secrets and stay out."""
    both = {**dataclasses.asdict(command.arguments), **dataclasses.asdict(command.extra)}
    return {name: value for name, value in both.items() if name in command.given}


def pointed(error: UserError, command: Command) -> UserError:
    """Returns an error about a setting (``data.held_out``) with the argument that gave it instead."""
    template = "chat_template_name" if command.extra.chat_template is None else "chat_template"
    arguments = {"data.chat_template": template, "data.held_out": "held_out"}
    setting, comma, rest = (error.where or "").partition(",")
    if setting not in arguments:
        return error
    return type(error)(error.what, where=f"--{arguments[setting]}{comma}{rest}", remedy=error.remedy)


def _model(command: Command) -> dict[str, Any]:
    arguments, extra = command.arguments, command.extra
    name = arguments.model_name_or_path
    if arguments.config_name not in (None, name):
        raise ConfigError(
            f"{arguments.config_name!r} is not the model's own", where="--config_name", remedy="leave it out"
        )
    if arguments.tokenizer_revision not in (None, arguments.model_revision):
        raise ConfigError(
            f"{arguments.tokenizer_revision!r} is not the revision of the model",
            where="--tokenizer_revision",
            remedy="download that tokenizer and name its folder with --tokenizer_name",
        )
    launched = "cpu" if command.launch.values.get("cpu") else "auto"
    return {
        "name": name,
        "tokenizer": arguments.tokenizer_name if arguments.tokenizer_name != name else None,
        "revision": arguments.model_revision,
        "device": extra.device if "device" in command.given else launched,
        "dtype": extra.dtype if "dtype" in command.given else command.launch.dtype or "auto",
        "quantization": "nf4" if arguments.use_qlora else None,
        "trust_remote_code": arguments.trust_remote_code,
    }


def _data(command: Command) -> dict[str, Any]:
    arguments, extra = command.arguments, command.extra
    if arguments.dataset_config_name is not None:
        raise ConfigError(
            f"configuration {arguments.dataset_config_name!r} of a hub data set cannot be chosen here",
            where="--dataset_config_name",
            remedy="download it, run `peft-study data convert` and give the result as --train_file",
        )
    template: str | None = arguments.chat_template_name
    if extra.chat_template is not None:
        if "chat_template_name" in command.given:
            raise ConfigError("goes without --chat_template_name", where="--chat_template", remedy="keep one of them")
        template = None if extra.chat_template == "own" else extra.chat_template
    values: dict[str, Any] = {
        "train": _sources(arguments),
        "mapping": parse_mapping(extra.map),
        "max_length": arguments.max_seq_length,
        "chat_template": template,
        "add_bos": arguments.add_bos,
        "limit": arguments.max_train_samples,
        "workers": arguments.preprocessing_num_workers,
    }
    if extra.held_out is not None:
        values["held_out"] = _held_out(extra.held_out)
    return values


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
    for name, said in mixture:
        try:
            amount = math.nan if isinstance(said, bool) else float(said)
        except (TypeError, ValueError):
            amount = math.nan
        if not (math.isfinite(amount) and amount > 0):
            raise ConfigError(
                f"{said!r} of {name!r} is not a number above 0",
                where=flag,
                remedy="give a share (at most 1) or a count of rows",
            )
        if str(name) in amounts:
            raise ConfigError(f"{name!r} is named twice", where=flag, remedy="name each data set once")
        amounts[str(name)] = amount
    if max(amounts.values()) > 1 and min(amounts.values()) <= 1:
        raise ConfigError(
            "shares and counts are mixed",
            where=flag,
            remedy="give shares of at most 1 for all data sets, or counts above 1 for all",
        )
    return [{"path": name, "take": amount} for name, amount in amounts.items()]


def _held_out(text: str) -> float | str:
    """Reads a number of rows, a share, or a path."""
    try:
        number = float(text)
    except ValueError:
        if not Path(text).exists():
            raise ConfigError(
                f"{text!r} is neither a number nor a file",
                where="--held_out",
                remedy="give rows (64), a share (0.05) or a file of rows",
            ) from None
        return text
    if not math.isfinite(number) or number <= 0 or (number > 1 and number != int(number)):
        raise ConfigError(
            f"{text} is neither a number of rows nor a share above 0", where="--held_out", remedy="give e.g. 64 or 0.05"
        )
    return number


def _method(command: Command) -> dict[str, Any]:
    arguments, extra = command.arguments, command.extra
    method = method_of(arguments)
    values: dict[str, Any] = {"method": method}
    if method == "lora":
        values |= {
            "rank": arguments.lora_rank,
            "alpha": arguments.lora_alpha,
            "dropout": arguments.lora_dropout,
        }
    elif method != "full":
        init = extra.prefix_init if method == "prefix_tuning" else extra.prompt_init
        said = {"tokens": arguments.num_virtual_tokens or None, "init": init, "init_text": extra.init_text}
        values |= {name: value for name, value in said.items() if value is not None}
    return values


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
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "seed": arguments.seed,
        "data_seed": arguments.seed,
        "row_tokens": extra.row_tokens,
    }


def _checkpoint_every(text: str | None) -> int | str | None:
    return int(text) if text is not None and text != "epoch" else text


def _checkpoint(arguments: FinetuneArguments) -> Path | None:
    if arguments.resume_from_checkpoint is None:
        return None
    path = Path(arguments.resume_from_checkpoint)
    if not path.is_dir():
        raise ConfigError(
            f"{str(path)!r} is not a folder",
            where="--resume_from_checkpoint",
            remedy="name a checkpoint folder, or leave it out to start anew",
        )
    if arguments.overwrite_output_dir:
        raise ConfigError(
            "goes without --overwrite_output_dir, which starts anew",
            where="--resume_from_checkpoint",
            remedy="keep one of them",
        )
    return path


def _notes(command: Command) -> list[str]:
    """Returns what is ignored and what differs from the original, a line each."""
    arguments, launch, given = command.arguments, command.launch, command.given
    notes = launch.notes()
    ignored = _ignored(command)
    if ignored:
        notes.append(f"accepted without effect: {'; '.join(ignored)}")
    if launch.processes > 1:
        device, steps = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
        count = launch.processes
        shared = launch.started > 1
        who = f"{count} processes share each batch" if shared else f"one process trains on the batch of all {count}"
        notes.append(
            f"{who}: {device} x {steps} x {count} = {launch.effective_batch_size(device, steps)} examples a step"
        )
    if launch.clip_norm is not None and "clip_grad_norm" not in given:
        notes.append(f"gradients are clipped at {launch.clip_norm:g}, as DeepSpeed would (--clip_grad_norm -1: off)")
    if arguments.reduce_loss == "mean":
        notes.append("the loss is the mean over the supervised tokens of the whole batch, however it is cut up")
    else:
        divisor = arguments.gradient_accumulation_steps * launch.processes
        notes.append(f"the loss is the sum over the batch / {divisor} accumulation steps, logged per token beside it")
    if arguments.max_train_samples is not None:
        notes.append(f"--max_train_samples draws {arguments.max_train_samples} rows at random, not the first ones")
    unavailable = [name for name in trackers(arguments) if name not in ("all", "none", "tensorboard")]
    if arguments.with_tracking and unavailable:
        notes.append(f"--report_to {' '.join(unavailable)}: written to metrics.jsonl and TensorBoard instead")
    return notes


def _ignored(command: Command) -> list[str]:
    """Returns, by reason, the arguments that were given another value than their default and have no effect."""
    arguments = command.arguments
    defaults = {item.name: item.default for item in dataclasses.fields(FinetuneArguments)}
    groups = dict(_WITHOUT_MEANING)
    method = method_of(arguments)
    if method != "lora":
        groups["not LoRA"] = _PLAIN_METHOD_ARGUMENTS["lora"]
    if method in ("lora", "full"):
        groups["no virtual tokens"] = _PLAIN_METHOD_ARGUMENTS["soft"]
    groups["no W&B here"] = ("wandb_entity",)
    lines = []
    for reason, names in groups.items():
        given = [f"--{n}" for n in names if n in command.given and getattr(arguments, n) != defaults[n]]
        if given:
            lines.append(f"{', '.join(given)} ({reason})")
    return lines


def _warnings(method: str, rate: float | None) -> list[str]:
    """Returns what is likely to spoil the run."""
    lines = []
    if method == "full":
        lines.append(
            "no method flag is given: ALL weights of the model are trained (full fine-tuning, as in the original); "
            "for an adapter add --use_lora, --use_prefix_tuning or --use_prompt_tuning"
        )
    rates = METHODS[method].learning_rates
    if rate is not None and rates is not None and not rates.low < rate < rates.high:
        side = "low" if rate <= rates.low else "high"
        lines.append(
            f"--learning_rate {rate:g} is {side} for {method.replace('_', ' ')}: its range is {rates.low:g} to "
            f"{rates.high:g}, its default {rates.default:g} (used when --learning_rate is left out)"
        )
    return lines
