"""From a method's configuration to its adapter."""

from __future__ import annotations

from typing import Any

from peft_study.config import MethodConfig, PromptTuningConfig
from peft_study.errors import ConfigError
from peft_study.methods.base import Adapter, Material, Size
from peft_study.methods.lora import LoraAdapter
from peft_study.methods.prefix_tuning import PrefixAdapter
from peft_study.methods.prompt_tuning import PromptAdapter
from peft_study.methods.reference import FullAdapter, NoAdapter
from peft_study.model.load import Base

_CLASSES: dict[str, Any] = {
    cls.method: cls for cls in (LoraAdapter, PrefixAdapter, PromptAdapter, NoAdapter, FullAdapter)
}


def create(config: MethodConfig, base: Base, material: Material | None, seed: int) -> Adapter:
    """Makes a trial's adapter.

    Args:
        config: the method and its settings.
        base: the model it is made for.
        material: tokens of the training data, for initialisations that use them.
        seed: the trial's; the same seed gives the same adapter.

    Raises:
        ModelError: when the method does not fit the model.
        ConfigError: when the data is too small for the initialisation.
    """
    try:
        return _CLASSES[config.method].create(config, base, material, seed)
    except ValueError as error:
        raise ConfigError(str(error), where=config.method, remedy="use fewer tokens, or another init") from error


def size(config: MethodConfig, base: Base) -> Size:
    """Returns what a trial's adapter would take; nothing is allocated.

    Raises:
        ModelError: when the base has no linear layer of the names that LoRA is to adapt.
    """
    found: Size = _CLASSES[config.method].size(config, base)
    return found


def smallest(config: MethodConfig) -> MethodConfig:
    """Returns the setting with one column or token; of methods that have neither, a prompt of one token."""
    if config.method == "lora":
        return config.model_copy(update={"rank": 1})
    if config.method == "prefix_tuning":
        return config.model_copy(update={"tokens": 1, "init": "random", "projection": False})
    return PromptTuningConfig(tokens=1, init="random")


def starts_as_base(method: str) -> bool:
    """True where the method changes no loss before step 1."""
    return bool(_CLASSES[method].starts_as_base)


def is_exclusive(method: str) -> bool:
    """True where the method changes the base itself, so that its trials run alone."""
    return bool(_CLASSES[method].exclusive)
