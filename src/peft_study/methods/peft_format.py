"""Loads adapters in PEFT's format, whoever saved them (`peft_files` writes them)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from peft_study.config import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from peft_study.errors import ModelError
from peft_study.methods.base import Adapter
from peft_study.methods.lora import LoraAdapter, target_shapes
from peft_study.methods.peft_files import CONFIG, WEIGHTS, base_mismatch, read_config
from peft_study.methods.prefix_tuning import PrefixAdapter
from peft_study.methods.prompt_tuning import PromptAdapter
from peft_study.model.load import Base

# settings of PEFT's LoRA that change the function and that this package does not compute
_UNKNOWN_LORA = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "lora_bias",
)
# initialisations that also change the base's weights, so that the adapter alone is not the model that was trained
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def load_adapter(folder: Path, base: Base) -> Adapter:
    """Loads a LoRA, prefix tuning or prompt tuning adapter in PEFT's format, whoever saved it.

    Raises:
        ModelError: when it is another method, uses settings that are not computed here, or does not fit the base.
    """
    values = read_config(folder)
    mismatch = base_mismatch(folder, base.digest)
    if mismatch:
        warnings.warn(mismatch, stacklevel=2)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        remedy = "only safetensors are loaded; save it again"
        raise ModelError(f"{WEIGHTS} cannot be read", where=str(folder), remedy=remedy) from error
    readers = {"LORA": _read_lora, "PREFIX_TUNING": _read_prefix, "PROMPT_TUNING": _read_prompt}
    kind = str(values.get("peft_type"))
    if kind not in readers:
        raise ModelError(f"method {kind} is not one of {', '.join(readers)}", where=str(folder))
    try:
        return readers[kind](folder, values, tensors, base)
    except (KeyError, ValueError) as error:  # a setting that is missing, or out of its range
        what = f"{CONFIG} cannot be used ({str(error).splitlines()[0]})"
        raise ModelError(what, where=str(folder), remedy="export the adapter again") from error


def _read_lora(folder: Path, values: dict[str, Any], tensors: dict[str, Tensor], base: Base) -> Adapter:
    used = [name for name in _UNKNOWN_LORA if values.get(name)]
    if values.get("bias", "none") != "none":
        used.append("bias")
    if str(values.get("init_lora_weights")).startswith(_BASE_CHANGING_INITS):
        used.append(f"init_lora_weights={values['init_lora_weights']}")
    if used:
        raise ModelError(f"LoRA with {', '.join(used)} is not supported", where=str(folder))
    targets = values["target_modules"]
    config = LoraConfig(
        rank=values["r"],
        alpha=values["lora_alpha"],
        dropout=values.get("lora_dropout", 0.0),
        rslora=values.get("use_rslora", False),
        target_modules="all-linear" if isinstance(targets, str) else tuple(targets or ()),
    )
    names = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in tensors}
    shapes = {name: shape for name, shape in target_shapes(base.model, "all-linear").items() if name in names}
    adapter = LoraAdapter(config, shapes, base.device, seed=0)
    ours = {f"{name}.lora_{x}": f"base_model.model.{name}.lora_{x}.weight" for name in names for x in "AB"}
    unread = sorted(set(tensors) - set(ours.values()))
    if unread:
        raise ModelError(f"LoRA with {unread[0]} is not supported", where=str(folder))
    return _fill(folder, adapter, {name: tensors.get(theirs) for name, theirs in ours.items()})


def _read_prefix(folder: Path, values: dict[str, Any], tensors: dict[str, Tensor], base: Base) -> Adapter:
    config = PrefixTuningConfig(tokens=values["num_virtual_tokens"], init="zero")
    adapter = PrefixAdapter.create(config, base, None, seed=0)
    return _fill(folder, adapter, {"table": tensors.get("prompt_embeddings")})


def _read_prompt(folder: Path, values: dict[str, Any], tensors: dict[str, Tensor], base: Base) -> Adapter:
    config = PromptTuningConfig(tokens=values["num_virtual_tokens"])
    adapter = PromptAdapter(config, torch.zeros(config.tokens, base.hidden, device=base.device))
    return _fill(folder, adapter, {"embeddings": tensors.get("prompt_embeddings")})


@torch.no_grad()
def _fill(folder: Path, adapter: Adapter, tensors: dict[str, Tensor | None]) -> Adapter:
    """Copies loaded tensors into the adapter; every parameter must be there, in its shape."""
    parameters = adapter.parameters()
    for name in sorted(set(parameters) | set(tensors)):
        found = tensors.get(name)
        if name not in parameters or found is None or found.shape != parameters[name].shape:
            remedy = "load the base it was trained on"
            raise ModelError(f"does not fit this base at {name}", where=str(folder), remedy=remedy)
        parameters[name].copy_(found)
    return adapter
