"""A base that the caller has loaded: it is used where it lies, and given back as it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_study.errors import ModelError
from peft_study.model.load import MEMORY, Base, check_tokenizer, load_tokenizer, wrap
from peft_study.model.precision import Placement


class ModelInMemory(NamedTuple):
    """A causal language model that the caller has loaded, and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def name(self) -> str:
        """What stands in the configuration instead of a path."""
        return f"{MEMORY}{self.model.name_or_path or type(self.model).__name__}"


def in_memory(model: Any, tokenizer: Any = None) -> ModelInMemory:
    """Returns a model of the caller's with its tokenizer, or with the one of the folder it was loaded from.

    Raises:
        ModelError: when it carries an adapter, is no causal language model on one device and in one
            precision, or has no tokenizer.
    """
    refuse_adapter(model)
    if not isinstance(model, PreTrainedModel):
        what = f"an object of type {type(model).__name__} is no model"
        raise ModelError(what, where="model", remedy="give a folder, a hub id, or a causal language model in memory")
    name = model.name_or_path or type(model).__name__
    if model.get_output_embeddings() is None:
        raise ModelError("is no causal language model", where=name, remedy="load it with AutoModelForCausalLM")
    devices = {parameter.device.type for parameter in model.parameters()}
    if "meta" in devices:
        raise ModelError("has no weights (they are on the meta device)", where=name, remedy="load them")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ModelError("is spread over several devices", where=name, remedy="put it on one")
    matrices = (m.weight.dtype for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding)))
    precisions = sorted({str(dtype).removeprefix("torch.") for dtype in matrices if dtype.is_floating_point})
    if len(precisions) > 1:
        remedy = "give it one: model.to(torch.bfloat16), or float32"
        raise ModelError(f"has matrices in {' and in '.join(precisions)}", where=name, remedy=remedy)
    if tokenizer is None and not model.name_or_path:
        raise ModelError("names no folder to load a tokenizer from", where=name, remedy="give tokenizer=...")
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        return ModelInMemory(model, load_tokenizer(str(tokenizer or model.name_or_path)))
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        what = f"an object of type {type(tokenizer).__name__} is no tokenizer"
        raise ModelError(what, where="tokenizer", remedy="give one of transformers, or its folder")
    return ModelInMemory(model, check_tokenizer(tokenizer, name))


def refuse_adapter(model: Any) -> None:
    """Refuses a model that carries an adapter of PEFT: what comes next would be trained, or answer, on top of it.

    Raises:
        ModelError: naming the remedy.
    """
    if getattr(model, "peft_config", None):
        name = getattr(model, "name_or_path", None) or type(model).__name__
        remedy = "take it off (unload() of the PeftModel), or give another base"
        raise ModelError("carries an adapter", where=name, remedy=remedy)


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """Gives a model back as it was: what `wrap`, the engine and PEFT change in it is undone at the end of the block.

    Weights are no part of it: nothing but a trial of all weights changes them, and it puts them back itself.
    """
    refuse_adapter(model)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # an attribute of a module: its mode, its forward, a dropout's share, recomputation; its parts; and hooks
    modules = [
        (module, dict(module.__dict__), dict(module._modules), set(module._forward_hooks)) for module in model.modules()
    ]
    loaded_with = model.config._attn_implementation  # type: ignore[union-attr]
    try:
        yield
    finally:
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        for module, attributes, parts, hooks in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._modules.clear()  # PEFT puts its layers in the place of the model's
            module._modules.update(parts)
            for hook in set(module._forward_hooks) - hooks:
                del module._forward_hooks[hook]
        model.set_attn_implementation(loaded_with)  # type: ignore[operator]


def borrow(given: ModelInMemory) -> Base:
    """Makes a Base of a model in memory, on its device and in its precision; see `lent`."""
    parameter = next(given.model.parameters())
    path = str(given.model.name_or_path or "")
    loaded_in = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}
    quantization = next((name for name, flag in loaded_in.items() if getattr(given.model, flag, False)), None)
    base = wrap(
        given.model,
        given.tokenizer,
        Placement(parameter.device, given.model.dtype),
        path=path,
        quantization=quantization,
    )
    base.name, base.digest = path or given.name, weights_digest(given.model)
    return base


def weights_digest(model: nn.Module) -> str:
    """Returns the sha256 over a model's configuration, and the names and values of its weights."""
    total = hashlib.sha256()
    config = {n: v for n, v in model.config.to_dict().items() if not n.startswith("_")}  # type: ignore[union-attr,operator]
    total.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
