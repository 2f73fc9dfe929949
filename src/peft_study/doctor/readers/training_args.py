"""Training arguments of other tools as settings, from a JSON or YAML file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from peft_study.doctor.readers.adapter_config import method_settings
from peft_study.errors import DataError, first_line

BESIDE = ("training_args.json", "training_args.yaml", "training_args.yml")
_NAMES: dict[str, tuple[str, ...]] = {
    "learning_rate": ("learning_rate", "lr", "peak_lr"),
    "optimizer": ("optim", "optimizer", "optimizer_type", "optimizer_name"),
    "schedule": ("lr_scheduler_type", "lr_scheduler", "scheduler", "schedule", "lr_schedule"),
    "warmup_steps": ("warmup_steps", "num_warmup_steps", "lr_warmup_steps"),
    "warmup_ratio": ("warmup_ratio", "warmup_fraction"),
    "total_steps": ("max_steps", "max_train_steps", "total_steps", "num_training_steps", "train_steps"),
    "micro_batch": ("per_device_train_batch_size", "micro_batch_size", "train_micro_batch_size_per_gpu"),
    "batch_size": ("batch_size", "train_batch_size", "global_batch_size"),
    "accumulation": ("gradient_accumulation_steps", "grad_accum", "accumulate_grad_batches", "accumulation_steps"),
    "devices": ("world_size", "num_processes", "n_gpu", "num_gpus", "devices"),
    "clip_norm": (
        "max_grad_norm", "clip_grad_norm", "gradient_clipping", "grad_norm_clip", "gradient_clip_val", "clip_norm",
        "max_norm",
    ),
    "weight_decay": ("weight_decay", "wd"),
    "method": ("peft_type", "adapter", "peft_method", "finetuning_type", "method"),
    "rank": ("lora_r", "lora_rank", "r", "rank", "peft_lora_r"),
    "alpha": ("lora_alpha", "peft_lora_alpha"),
    "tokens": ("num_virtual_tokens", "prompt_tokens", "num_prompt_tokens"),
    "reduce_loss": ("reduce_loss",),
}  # fmt: skip
_FLAGS = {"use_lora": "lora", "use_qlora": "lora", "use_peft": "lora", "use_dora": "lora"}
_METHODS = {"qlora": "lora", "dora": "lora"}
_DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16", "half": "float16"}
_LARGEST = 1 << 22


def read_training_args(path: Path, *, total_steps: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """Returns settings of `UsedSettings`, and what has to be said of them.

    Args:
        path: JSON or YAML with the names of transformers, TRL, open-instruct, axolotl or like ones.
        total_steps: of the run, where its log tells them.

    Raises:
        DataError: it cannot be read, or holds no names and values.
    """
    remedy = "give JSON or YAML with learning_rate, warmup_steps, per_device_train_batch_size, ..."
    try:
        if path.is_dir() or path.suffix in (".bin", ".pt", ".pkl") or path.stat().st_size > _LARGEST:
            raise DataError("is no file of training arguments", where=str(path), remedy=remedy)
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path), remedy=remedy) from error
    except (ValueError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"is neither JSON nor YAML: {first_line(error)}", where=str(path), remedy=remedy) from error
    if not isinstance(found, dict):
        raise DataError("holds no names and values", where=str(path), remedy=remedy)
    return settings_of(found, total_steps=total_steps)


def settings_of(arguments: Mapping[str, Any], *, total_steps: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """Returns settings of `UsedSettings` that training arguments tell, and what has to be said of them.

    Args:
        arguments: by name; those of parts, such as ``peft_config``, count too.
        total_steps: of the run, where its log tells them.
    """
    plain = _plain(arguments)
    given = {what: value for what, names in _NAMES.items() if (value := _first(plain, names)) is not None}
    numbers = {what: number for what in given if (number := _number(given[what])) is not None}
    odd = [what for what in ("learning_rate", "total_steps", "batch_size") if what in given and what not in numbers]
    found: dict[str, Any] = {name: numbers[name] for name in ("learning_rate", "weight_decay") if name in numbers}
    for name in ("optimizer", "schedule"):
        if isinstance(given.get(name), str) and given[name]:
            found[name] = given[name].rpartition(".")[2].lower()
    if numbers.get("total_steps", 0) > 0:
        found["total_steps"] = int(numbers["total_steps"])
    found |= _warmup(numbers, total_steps or found.get("total_steps"))
    batch, notes = _batch(numbers)
    found |= batch
    if "clip_norm" in given or any(name in plain for name in _NAMES["clip_norm"]):
        clip = numbers.get("clip_norm", 0.0)
        found["clip_norm"] = clip if clip > 0 else math.inf
    if given.get("reduce_loss") in ("mean", "sum"):
        found["mean_of_means"] = given["reduce_loss"] == "mean" and numbers.get("accumulation", 1) > 1
    found |= _method(plain, given, numbers)
    dtype = next((name for key, name in _DTYPES.items() if _true(plain.get(key))), None)
    dtype = dtype or _DTYPES.get(str(plain.get("mixed_precision", "")).lower())
    if dtype is not None:
        found["compute_dtype"] = dtype
    return found, [*notes, *(f"{what} is {given[what]!r}, which is no number: it is left out" for what in odd)]


def _plain(arguments: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """Returns arguments and those of their parts in one dictionary; the outer ones win."""
    inner: dict[str, Any] = {}
    for value in arguments.values():
        if isinstance(value, dict) and depth < 4:
            inner |= _plain(value, depth + 1)
    outer = {str(name): value for name, value in arguments.items() if not isinstance(value, dict)}
    return inner | outer


def _first(plain: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((plain[name] for name in names if plain.get(name) not in (None, "")), None)


def _number(value: Any) -> float | None:
    """Returns a number; of a text, too: YAML takes 1e-4 for one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _true(value: Any) -> bool:
    return value is True or (isinstance(value, str) and value.lower() in ("true", "yes", "1"))


def _warmup(numbers: Mapping[str, float], total: int | None) -> dict[str, int]:
    """Returns the warm-up in steps; of transformers 5, `warmup_steps` below 1 is a share."""
    steps, share = numbers.get("warmup_steps", 0.0), numbers.get("warmup_ratio")
    if 0 < steps < 1:
        steps, share = 0.0, steps
    if steps >= 1:
        return {"warmup_steps": int(steps)}
    if share:
        return {"warmup_steps": math.ceil(share * total)} if total else {}
    return {"warmup_steps": 0} if "warmup_steps" in numbers or share is not None else {}


def _batch(numbers: Mapping[str, float]) -> tuple[dict[str, int], list[str]]:
    accumulation = int(numbers.get("accumulation", 1)) or 1
    found = {"accumulation": accumulation} if "accumulation" in numbers or "micro_batch" in numbers else {}
    if "micro_batch" in numbers:
        devices = int(numbers.get("devices", 0))
        size = int(numbers["micro_batch"]) * accumulation * max(devices, 1)
        notes = [] if devices > 0 else [f"batch size {size}: one device is assumed"]
        return {**found, "batch_size": size}, notes
    if numbers.get("batch_size", 0) >= 1:
        found["batch_size"] = int(numbers["batch_size"])
    return found, []


def _method(plain: Mapping[str, Any], given: Mapping[str, Any], numbers: Mapping[str, float]) -> dict[str, Any]:
    found = method_settings(plain)
    name = given.get("method")
    if "method" not in found:
        flag = next((method for key, method in _FLAGS.items() if _true(plain.get(key))), None)
        name = name.lower() if isinstance(name, str) else flag
        if name is not None:
            found["method"] = _METHODS.get(name, name)
    for what in ("rank", "tokens"):
        if numbers.get(what, 0) >= 1 and ("method" in found or what == "tokens"):
            found.setdefault(what, int(numbers[what]))
    if "alpha" in numbers and "method" in found:
        found.setdefault("alpha", numbers["alpha"])
    return found
