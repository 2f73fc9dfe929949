"""From a `peft` configuration to a method's settings; a field that asks for what is not trained here is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft_study.errors import ConfigError

_NAMES = {
    "LORA": ("lora", {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}),
    "PREFIX_TUNING": ("prefix_tuning", {"num_virtual_tokens": "tokens", "prefix_projection": "projection"}),
    "PROMPT_TUNING": ("prompt_tuning", {"num_virtual_tokens": "tokens", "prompt_tuning_init_text": "init_text"}),
}
_OWN = {
    "LORA": ("target_modules",),
    "PREFIX_TUNING": ("encoder_hidden_size", "init_weights"),
    "PROMPT_TUNING": ("prompt_tuning_init",),
}
"""Fields that are read in functions of their own."""
_FREE = {
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    # the shape of the model, which `get_peft_model` fills in, and a tokenizer that the base's own stands for
    *("token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules", "tokenizer_name_or_path"),
    *("tokenizer_kwargs", "runtime_config"),
}
"""Fields that do not change what is trained."""


def is_peft_config(value: Any) -> bool:
    """True for a configuration of the `peft` library."""
    return hasattr(value, "peft_type") and dataclasses.is_dataclass(value)


def from_peft(config: Any, model_type: str) -> dict[str, Any]:
    """Returns a method's settings, as a study file has them.

    Args:
        config: a ``LoraConfig``, ``PrefixTuningConfig`` or ``PromptTuningConfig`` of `peft`.
        model_type: of the base (``llama``): where LoRA names no modules, `peft` chooses them by it.

    Raises:
        ConfigError: naming the field that asks for what is not trained here.
    """
    kind, where = str(getattr(config.peft_type, "value", config.peft_type)), type(config).__name__
    if kind not in _NAMES:
        raise ConfigError(
            f"{kind} is not trained here", where=where, remedy="give LORA, PREFIX_TUNING or PROMPT_TUNING"
        )
    method, names = _NAMES[kind]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in names or field.name in _OWN[kind] or field.name in _FREE:
            continue
        if field.name == "task_type" and getattr(value, "value", value) in (None, "CAUSAL_LM"):
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value != default:
            what = f"{value!r} is not trained here"
            raise ConfigError(what, where=f"{where}.{field.name}", remedy=f"leave it at {default!r}")
    settings = {ours: value for theirs, ours in names.items() if (value := getattr(config, theirs)) is not None}
    own = {"lora": _lora, "prefix_tuning": _prefix, "prompt_tuning": _prompt}[method]
    return {"method": method, **settings, **own(config, model_type)}


def _lora(config: Any, model_type: str) -> dict[str, Any]:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOSEN

    targets = config.target_modules
    if targets is None:
        if model_type not in CHOSEN:
            what = f"None leaves the choice to peft, which has none for {model_type!r} models"
            raise ConfigError(what, where="LoraConfig.target_modules", remedy="name them, or give 'all-linear'")
        targets = CHOSEN[model_type]
    if isinstance(targets, str) and targets != "all-linear":
        what = f"{targets!r} is a pattern"
        raise ConfigError(what, where="LoraConfig.target_modules", remedy="give a list of names, or 'all-linear'")
    return {"target_modules": targets if isinstance(targets, str) else sorted(targets)}


def _prefix(config: Any, _model_type: str) -> dict[str, Any]:
    # `peft` draws a prefix at random unless asked for zeros, and so does this setting, far above the base's loss
    hidden = {"projection_hidden": config.encoder_hidden_size} if config.encoder_hidden_size is not None else {}
    return {"init": "zero" if config.init_weights == "zero" else "random", **hidden}


def _prompt(config: Any, _model_type: str) -> dict[str, Any]:
    init = str(getattr(config.prompt_tuning_init, "value", config.prompt_tuning_init))
    ours = {"TEXT": "text", "RANDOM": "random", "SAMPLE_VOCAB": "vocab"}
    if init not in ours:
        raise ConfigError(
            f"{init!r} is unknown",
            where="PromptTuningConfig.prompt_tuning_init",
            remedy="give TEXT, RANDOM or SAMPLE_VOCAB",
        )
    return {"init": ours[init]}
