"""A PEFT configuration as plain values: the settings in it, and what the weights beside it contradict.

R rank of LoRA     I, O inputs and outputs of a layer
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

_INITS = {"SAMPLE_VOCAB": "vocab"}
_TOGETHER = ({"q_proj", "k_proj", "v_proj"},)
"""Layers that a model has together or not at all."""
_LORA = ("lora", "adalora")


def method_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of `UsedSettings` that a PEFT configuration tells.

    Args:
        config: of adapter_config.json, or `to_dict` of a configuration.
    """
    method = config.get("peft_type")
    init = config.get("prompt_tuning_init", config.get("init_weights"))
    if isinstance(init, bool) or init is None:
        init = config.get("init_lora_weights")
    values = {
        "method": None if method is None else _word(method).lower(),
        "rank": _integer(config.get("r")),
        "alpha": config.get("lora_alpha") if isinstance(config.get("lora_alpha"), (int, float)) else None,
        "tokens": _integer(config.get("num_virtual_tokens")),
        "init": _INITS.get(_word(init), _word(init).lower()) if isinstance(init, str) else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _word(value: Any) -> str:
    """Returns a name without its enumeration's, as LORA of PeftType.LORA."""
    return str(getattr(value, "value", value)).rpartition(".")[2]


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def differences(
    config: Mapping[str, Any], shapes: Shapes, base: Path | None
) -> tuple[tuple[str, ...] | None, tuple[str, str] | None]:
    """Returns what configuration, weights and base contradict, a line each; None, and why, where it is not known.

    Args:
        config: of adapter_config.json.
        shapes: of the weights by name.
        base: folder of the base, where it is at hand.
    """
    method = _word(config.get("peft_type")).lower()
    sizes = _base_sizes(base)
    if method in _LORA:
        found = [*_ranks(config, shapes, method), *_targets(config, shapes), *_layers(shapes, _base_shapes(base))]
    elif method in ("prompt_tuning", "p_tuning", "prefix_tuning"):
        found = list(_prompt(config, shapes, sizes, prefix=method == "prefix_tuning"))
    else:
        return None, (f"not known for {method}", f"不了解 {method}")
    return tuple(found), None


def _ranks(config: Mapping[str, Any], shapes: Shapes, method: str) -> Iterator[str]:
    """Yields layers whose A or B has another rank than the configuration says, or that lack one of the two."""
    rank = config.get("init_r") if method == "adalora" else config.get("r")
    patterns = config.get("rank_pattern") or {}
    pairs: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        match = re.fullmatch(r"(.*)\.lora_([AB])(?:\.weight)?", name)
        if match and len(shape) >= 2:
            pairs.setdefault(match[1], {})[match[2]] = shape[0] if match[2] == "A" else shape[1]
    if not pairs and not any("lora_" in name for name in shapes):
        yield f"config: {method.upper()}; weights: no lora_A and lora_B"
    for layer, found in pairs.items():
        if len(found) < 2:
            yield f"config: LORA; weights: only lora_{next(iter(found))} of {_short(layer)}"
        elif method == "lora" and isinstance(rank, int):
            wanted = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), rank)
            if {*found.values()} != {wanted}:
                yield f"config: r={wanted}; weights: rank {found['A']} of {_short(layer)}"


def _targets(config: Mapping[str, Any], shapes: Shapes) -> Iterator[str]:
    """Yields target modules that the weights lack, and layers of the weights that are no target."""
    targets = config.get("target_modules")
    layers = {match[1] for name in shapes if (match := re.match(r"(.*)\.lora_[AB]\b", name))}
    if not isinstance(targets, (list, tuple)) or not layers:
        return
    names = {layer.rpartition(".")[2] for layer in layers}
    stray = sorted(
        _short(layer)
        for layer in layers
        if not any(layer == target or layer.endswith(f".{target}") for target in targets)
    )
    if stray and not config.get("target_parameters"):
        yield f"config: target_modules={', '.join(sorted(targets))}; weights: {stray[0]} (+{len(stray) - 1})"
    for group in _TOGETHER:
        absent = sorted((group & set(targets)) - names)
        if names & group and absent:
            yield f"config: target_modules names {', '.join(absent)}; weights: none of {', '.join(absent)}"


def _layers(shapes: Shapes, base: Shapes) -> Iterator[str]:
    """Yields layers whose sizes, or which themselves, the base does not have."""
    if not base:
        return
    for name, shape in shapes.items():
        match = re.fullmatch(r"base_model\.model\.(.*)\.lora_(A|B)\.weight", name)
        if match is None:
            continue
        sizes = base.get(f"{match[1]}.weight") or base.get(f"{match[1]}.weight".removeprefix("model."))
        if sizes is None:
            if len({key.partition(".")[0] for key in base} & {"model", "lm_head"}):  # named as transformers does
                yield f"weights: {match[1]}; base: no such layer"
        elif len(sizes) == 2 and len(shape) == 2:
            part = shape[1] if match[2] == "A" else shape[0]
            # GPT-2 keeps its layers as (I, O)
            if part not in sizes:
                yield f"weights: lora_{match[2]} {shape[0]} x {shape[1]} of {match[1]}; base: {sizes[0]} x {sizes[1]}"


def _prompt(config: Mapping[str, Any], shapes: Shapes, base: Mapping[str, int], *, prefix: bool) -> Iterator[str]:
    """Yields sizes of a prompt or prefix that differ from the configuration's, and those from the base's."""
    shape = shapes.get("prompt_embeddings")
    if shape is None or len(shape) != 2:
        yield f"config: {config['peft_type']}; weights: no prompt_embeddings"
        return
    tokens, width, layers = (_integer(config.get(n)) for n in ("num_virtual_tokens", "token_dim", "num_layers"))
    stacks = _integer(config.get("num_transformer_submodules")) or 1
    if tokens and shape[0] != tokens * stacks:
        yield f"config: num_virtual_tokens={tokens}; weights: {shape[0]}"
    if not prefix and width and shape[1] != width:
        yield f"config: token_dim={width}; weights: {shape[1]}"
    if prefix and layers and width and shape[1] != layers * 2 * width:
        yield f"config: num_layers={layers}, token_dim={width}; weights: width {shape[1]}"
    wanted = {"num_layers": base.get("layers"), "token_dim": base.get("keys" if prefix else "width")}
    for name, value in (("num_layers", layers), ("token_dim", width)):
        if value and wanted[name] and value != wanted[name] and (prefix or name == "token_dim"):
            yield f"config: {name}={value}; base: {wanted[name]}"


def _short(layer: str) -> str:
    return layer.removeprefix("base_model.model.")


def _base_sizes(base: Path | None) -> dict[str, int]:
    """Returns layers, width and width of the keys of all heads, from the base's config.json."""
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8")) if base else {}
    except (OSError, ValueError):
        return {}
    config = config.get("text_config") or config
    width = _integer(config.get("hidden_size")) or _integer(config.get("n_embd"))
    heads = _integer(config.get("num_attention_heads")) or _integer(config.get("n_head"))
    found = {"layers": _integer(config.get("num_hidden_layers")) or _integer(config.get("n_layer")), "width": width}
    if width and heads:
        a_head = _integer(config.get("head_dim")) or width // heads
        found["keys"] = a_head * (_integer(config.get("num_key_value_heads")) or heads)
    return {name: value for name, value in found.items() if value}


def _base_shapes(base: Path | None) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the base's weights by name, from the headers of its safetensors files."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(base.glob("*.safetensors")) if base else ():
        try:
            with safe_open(path, framework="np") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return {}
    return found
