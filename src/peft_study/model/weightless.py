"""A base without weights: its shapes alone, on which a row can run before anything is loaded.

Its tensors are torch's fake ones: every operation gives a tensor of the right shape, and computes nothing. A model of a
few layers is enough where what is asked for grows evenly with them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from peft_study.errors import ModelError, first_line
from peft_study.model import attention
from peft_study.model.cpu import norm
from peft_study.model.head import head_transform
from peft_study.model.load import Base, hub_options, hub_refusal, resolve_model, shape, without_dropout
from peft_study.model.precision import Placement
from peft_study.model.proof import Proof


@dataclass(frozen=True, slots=True)
class Outline:
    """What is known of a base without its weights.

    Attributes:
        config: of the model.
        make: returns the model of a configuration, in the precision of `placement`.
        placement: device and precision that it will have.
        proof: what holds of its rows; before it is loaded, that they pack.
    """

    config: Any
    make: Callable[[Any], Any]
    placement: Placement
    proof: Proof

    @property
    def precision(self) -> str:
        """Name of the precision that its weights come in."""
        return self.placement.dtype_name

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    @contextmanager
    def base(self, layers: int) -> Iterator[Base]:
        """Yields a base of so many layers without weights; whatever runs on it belongs inside the block."""
        attention.register()
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = self.make(_of_layers(self.config, layers))
            yield _based(self, model.requires_grad_(False).eval())


def outline(
    name: str, placement: Placement, *, revision: str | None = None, trust_remote_code: bool = False
) -> Outline:
    """Returns the outline of a folder, hub id or embedded name, from its configuration; arguments as of `load_base`.

    Raises:
        ModelError: when there is no configuration of a causal language model.
    """
    from transformers import AutoConfig

    path = resolve_model(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, **hub_options(path)}
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = f"no configuration of a model could be read ({first_line(error)})"
        remedy = "give a folder that holds config.json, or a hub id"
        raise hub_refusal(error, name) or ModelError(what, where=name, remedy=remedy) from error
    return outline_of_shape(config, placement, trust_remote_code=trust_remote_code)


def outline_of_shape(config: Any, placement: Placement, *, trust_remote_code: bool = False) -> Outline:
    """Returns the outline of a model of this configuration.

    Args:
        config: of transformers.
        placement: device and precision.
        trust_remote_code: run code that ships with the model.
    """
    from transformers import AutoModelForCausalLM

    def make(config: Any) -> Any:
        return AutoModelForCausalLM.from_config(
            config, dtype=placement.dtype, attn_implementation=attention.NAME, trust_remote_code=trust_remote_code
        )

    packs = Proof(True, True, True, config.get_text_config().num_hidden_layers, 0.0, 0.0, 0.0)
    return Outline(config, make, placement, packs)


def outline_of(base: Base) -> Outline:
    """Returns the outline of a base that is loaded."""

    def make(config: Any) -> Any:
        return type(base.model)._from_config(
            config, dtype=base.dtype, attn_implementation=base.model.config._attn_implementation
        )

    return Outline(base.model.config, make, base.placement, base.proof)


def _of_layers(config: Any, layers: int) -> Any:
    """Returns the configuration with so many layers; what it lists by layer is cut."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config


def _based(of: Outline, model: Any) -> Base:
    """Returns the base of a model without weights."""
    text = model.config.get_text_config()
    without_dropout(model)
    if of.placement.device.type == "cpu":
        norm.install(model, compare=False)
    return Base(
        model=model,
        tokenizer=None,
        path="",
        digest="",
        origin=None,
        quantization=None,
        # what runs on it runs as on CPU, whatever the device
        placement=Placement(model.device, of.placement.dtype),
        transform=head_transform(text),
        proof=replace(of.proof, attending_layers=min(of.proof.attending_layers, text.num_hidden_layers)),
        **shape(text),
        positions=None,
        context=None,
        attention=attention.NAME,
        name=type(model).__name__,
    )
