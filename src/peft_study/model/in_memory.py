"""A base that the caller has loaded: it is used where it lies, and given back as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

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
        ModelError: when it carries an adapter, is no causal language model on one device, or has no tokenizer.
    """
    name = model.name_or_path or type(model).__name__
    if hasattr(model, "peft_config"):
        raise ModelError("carries an adapter", where=name, remedy="give the base model alone")
    if model.get_output_embeddings() is None:
        raise ModelError("is no causal language model", where=name, remedy="load it with AutoModelForCausalLM")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ModelError("is spread over several devices", where=name, remedy="put it on one")
    if tokenizer is None and not model.name_or_path:
        raise ModelError("names no folder to load a tokenizer from", where=name, remedy="give tokenizer=...")
    return ModelInMemory(
        model, load_tokenizer(model.name_or_path) if tokenizer is None else check_tokenizer(tokenizer, name)
    )


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """Gives a model back as it was: what `wrap` changes in it is undone at the end of the block."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = [(module, module.training, module.__dict__.get("forward")) for module in model.modules()]
    dropouts = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    loaded_with = model.config._attn_implementation  # type: ignore[union-attr]
    try:
        yield
    finally:
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        for module, mode, forward in modules:
            module.training = mode
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward
        for dropout, share in dropouts:
            dropout.p = share
        model.set_attn_implementation(loaded_with)  # type: ignore[operator]


def borrow(given: ModelInMemory) -> Base:
    """Makes a Base of a model in memory, on its device and in its precision; see `lent`."""
    parameter = next(given.model.parameters())
    path = str(given.model.name_or_path or "")
    quantization = "nf4" if getattr(given.model, "is_loaded_in_4bit", False) else None
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
    """Returns the sha256 over the names and values of a model's weights."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
