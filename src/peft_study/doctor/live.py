"""A live model, before somebody's own training loop: what trains, how, on what.

model, arguments, tokenizer, batches  ──►  Observations
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_study.doctor.batches import count_batches, is_spread, losses_before, supervised_padding, unigram_loss
from peft_study.doctor.observations import (
    AdapterState,
    DataCounts,
    LossCurve,
    Observations,
    ParameterCounts,
    UsedSettings,
)
from peft_study.errors import ConfigError

_WRAPPERS = ("module", "_orig_mod", "pretrained_model")
"""Attributes that hold the model itself: DDP and DeepSpeed, torch.compile, TRL's value heads."""
_BASE_CHILDREN = ("base_layer", "original_module", "base_model", "model")
"""Children of peft's modules that belong to the base; all others are the adapter's."""
_OF_FILES = ("embeddings", "base_found", "differences")
_SAMPLE = 65_536
"""Numbers of a tensor that are looked at for `unmoved`."""


def observe_model(
    model: Any, *, batches: Sequence[Any] | None = None, arguments: Any = None, tokenizer: Any = None
) -> Observations:
    """Returns what can be seen of a model before its training.

    Args:
        model: of transformers or peft, wrapped or not (DDP, torch.compile, TRL).
        batches: a few batches of the data loader: input_ids, labels, attention_mask, position_ids.
        arguments: `transformers.TrainingArguments`, a class of TRL made from it, or a mapping with names of theirs.
        tokenizer: of the data; without it BOS and end tokens are not checked.

    Raises:
        ConfigError: the model is no torch module.
    """
    model = unwrapped(model)
    if isinstance(batches, Mapping):
        batches = [batches]
    if batches is not None and not isinstance(batches, Sequence):
        raise ConfigError(f"batches is a {type(batches).__name__}", remedy="give a list of batches")
    batches = None if batches is None else [_tensors(batch) for batch in batches]
    configs = _configurations(model)
    counts = count_parameters(model, configs)
    settings = _settings(model, configs, counts, arguments)
    reasons = {"adapter.untouched": ("the run has not begun", "训练还没有开始")}
    reasons |= {f"adapter.{name}": ("no adapter file was read", "没有读取适配器文件") for name in _OF_FILES}
    if arguments is None:
        reasons["settings"] = ("no training arguments were given", "没有给出训练参数")
    counts, why = _with_unmoved(model, counts, settings.learning_rate, settings.optimizer, arguments)
    if why:
        reasons["parameters.unmoved"] = why
    data, curve = None, None
    if batches:
        data, curve = _look_at(model, batches, arguments, tokenizer, settings, reasons)
    return Observations(
        stage="before",
        settings=settings,
        parameters=counts,
        data=data,
        curve=curve,
        adapter=adapter_state(model),
        reasons=reasons,
    )


def _tensors(batch: Any) -> Any:
    """Returns a batch with its lists as tensors, where they are even."""
    if not isinstance(batch, Mapping):
        return batch
    try:
        return {name: torch.as_tensor(value) if isinstance(value, list) else value for name, value in batch.items()}
    except (TypeError, ValueError):
        return batch


def unwrapped(model: Any) -> Any:
    """Returns the model of transformers or peft inside a wrapper; the model itself where there is none."""
    from peft import PeftModel
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}", remedy="give a model of transformers or peft")
    while not isinstance(model, (PreTrainedModel, PeftModel)):
        inner = next((getattr(model, name, None) for name in _WRAPPERS if hasattr(model, name)), None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def count_parameters(model: Any, configs: Mapping[str, Any]) -> ParameterCounts:
    """Returns what trains; a tied weight counts once.

    Args:
        model: unwrapped.
        configs: of the adapters it has.
    """
    trained_biases = any(getattr(config, "bias", "none") not in (None, "none") for config in configs.values())
    base = trainable = adapter = adapter_trainable = 0
    first = None
    for name, parameter, own in _owned(model):
        size = _numbers(parameter)
        if own or (trained_biases and parameter.requires_grad and name.endswith("bias")):
            adapter += size
            adapter_trainable += size * parameter.requires_grad
        else:
            base += size
            trainable += size * parameter.requires_grad
            if parameter.requires_grad and first is None:
                first = name
    return ParameterCounts(
        base=base,
        base_trainable=trainable,
        adapter=adapter,
        adapter_trainable=adapter_trainable,
        first_unexpected=first if adapter else None,
        unattached=None if adapter else _unattached(),
        own_base=not configs and trainable > 0,
    )


def _owned(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Yields name and parameter, each once, and whether it is an adapter's own.

    peft wraps a layer of the base: what it adds lies beside the child that holds the layer itself.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str, own: bool) -> Iterator[tuple[str, nn.Parameter, bool]]:
        ours = type(module).__module__.startswith("peft.")
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}{name}", parameter, own or ours
        # the base first: peft keeps references to parts of it, such as the embedding table
        for name, child in sorted(module.named_children(), key=lambda item: item[0] not in _BASE_CHILDREN):
            yield from walk(child, f"{prefix}{name}.", name not in _BASE_CHILDREN if ours else own)

    yield from walk(model, "", False)


def _numbers(parameter: Tensor) -> int:
    whole = int(getattr(parameter, "ds_numel", 0)) or parameter.numel()  # DeepSpeed keeps a part in each process
    if type(parameter).__name__ == "Params4bit":  # two numbers a byte
        return whole * 2 * parameter.element_size()
    return whole


def _configurations(model: Any) -> dict[str, Any]:
    configs = getattr(model, "peft_config", None)
    return dict(configs) if isinstance(configs, Mapping) else {}


def _unattached() -> str | None:
    """Returns the class of a PEFT configuration that was made in this process, but never given to a model.

    peft writes the model's name into a configuration when it is attached, also an empty one; what was loaded from a
    folder has a name too. A copy of an attached configuration is told by its values.
    """
    from peft import PeftConfig

    made = [thing for thing in gc.get_objects() if issubclass(type(thing), PeftConfig)]
    never = [config for config in made if config.base_model_name_or_path is None]
    if not never:
        return None
    gc.collect()  # models that nobody holds any more
    attached: list[dict[str, Any]] = []
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module):
            # peft keeps those of prompts under the second name
            held = vars(thing).get("peft_config") or vars(thing).get("_peft_config")
            attached += [_values(config) for config in held.values()] if isinstance(held, Mapping) else []
    left = [config for config in never if not any(_is_part(_values(config), held) for held in attached)]
    return type(left[-1]).__name__ if left else None


def _is_part(values: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    return all(whole.get(name) == value for name, value in values.items())


def _values(config: Any) -> dict[str, Any]:
    """Returns a configuration's values without those that peft sets when it is attached."""
    set_later = ("base_model_name_or_path", "inference_mode", "revision", "target_modules")
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return {name: value for name, value in values.items() if name not in set_later and value is not None}


def _settings(model: Any, configs: Mapping[str, Any], counts: ParameterCounts, arguments: Any) -> UsedSettings:
    from peft_study.doctor.readers.adapter_config import method_settings
    from peft_study.doctor.readers.training_args import settings_of

    values: dict[str, Any] = {}
    if configs:
        active = getattr(model, "active_adapter", None)
        active = active() if callable(active) else active
        config = configs.get(active) if isinstance(active, str) else None
        values = method_settings((config or next(iter(configs.values()))).to_dict())
    elif counts.base_trainable > counts.base / 2:
        values = {"method": "full"}
    trained = _most_common_dtype(p for p in model.parameters() if p.requires_grad)
    computed = _most_common_dtype(model.parameters())
    if isinstance(arguments, Mapping):
        values |= settings_of(arguments)[0]
    elif arguments is not None:
        if not hasattr(arguments, "learning_rate"):
            what = f"arguments is a {type(arguments).__name__}"
            raise ConfigError(what, remedy='give TrainingArguments, or a mapping such as {"learning_rate": 1e-4}')
        computed = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else computed
        values |= _argument_values(model, arguments)
    return UsedSettings(**{"parameter_dtype": trained, "compute_dtype": computed} | values)


def _most_common_dtype(parameters: Iterator[Tensor]) -> str | None:
    sizes: dict[str, int] = {}
    for parameter in parameters:
        name = str(parameter.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + parameter.numel()
    return max(sizes, key=lambda name: sizes[name]) if sizes else None


def _argument_values(model: Any, arguments: Any) -> dict[str, Any]:
    """Returns the settings that training arguments tell."""
    steps = arguments.max_steps if arguments.max_steps > 0 else None
    accumulation = arguments.gradient_accumulation_steps
    clip = arguments.max_grad_norm
    return {
        "learning_rate": arguments.learning_rate,
        "optimizer": str(getattr(arguments.optim, "value", arguments.optim)),
        "schedule": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        "warmup_steps": arguments.get_warmup_steps(steps) if steps else None,
        "total_steps": steps,
        "batch_size": arguments.train_batch_size * accumulation * arguments.world_size,
        "accumulation": accumulation,
        "mean_of_means": accumulation > 1 and not _takes_token_count(model),
        "clip_norm": clip if clip else math.inf,
        "weight_decay": arguments.weight_decay,
    }


def _takes_token_count(model: Any) -> bool:
    """True where the loss is the mean over the tokens of a whole step: transformers gives the model their number."""
    import inspect

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    accepts = getattr(inner, "accepts_loss_kwargs", None)
    if accepts is not None:
        return bool(accepts)
    parameters = inspect.signature(type(inner).forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _with_unmoved(
    model: nn.Module, counts: ParameterCounts, rate: float | None, optimizer: str | None, arguments: Any
) -> tuple[ParameterCounts, tuple[str, str] | None]:

    if rate is None or optimizer is None:
        return counts, ("the learning rate is not known", "不知道学习率")
    if "adam" not in optimizer or "bf16" in optimizer or "4bit" in optimizer:
        return counts, (f"not known for the optimizer {optimizer}", f"不了解优化器 {optimizer}")
    if getattr(arguments, "deepspeed", None):
        return counts, ("DeepSpeed keeps float32 copies of the weights", "DeepSpeed 保留 float32 的权重副本")
    return dataclasses.replace(counts, unmoved=unmoved_share(model, rate)), None


def unmoved_share(model: nn.Module, rate: float) -> float | None:
    """Returns the share of the numbers that train which a step of AdamW rounds back to what they were.

    A step of AdamW changes a number by about the rate, and seldom by more. A number w of a dtype with p bits has
    neighbours at 2^(floor(log2 |w|) + 1 - p), and a change below half of that is lost.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.numel()]
    total = sum(parameter.numel() for parameter in trainable)
    if not total or not rate > 0:
        return None
    unmoved = 0.0
    for parameter in trainable:
        if (
            is_spread(parameter)
            or not parameter.is_floating_point()
            or parameter.dtype in (torch.float32, torch.float64)
        ):
            continue
        sample = parameter.detach().reshape(-1)[:: math.ceil(parameter.numel() / _SAMPLE)].float()
        half_spacing = torch.exp2(torch.floor(torch.log2(sample.abs()))) * torch.finfo(parameter.dtype).eps / 2
        unmoved += float((half_spacing > rate).float().mean()) * parameter.numel()
    return unmoved / total


def _look_at(
    model: Any,
    batches: Sequence[Any],
    arguments: Any,
    tokenizer: Any,
    settings: UsedSettings,
    reasons: dict[str, tuple[str, str]],
) -> tuple[DataCounts | None, LossCurve | None]:
    """Returns what batches tell: counts, and losses before the first step."""
    from peft_study.doctor.batches import Ends, as_rows

    rows = as_rows(batches, pad=getattr(tokenizer, "pad_token_id", None))
    if not rows:
        reasons["data"] = ("the batches hold no input_ids and labels", "批次里没有 input_ids 和 labels")
        return None, None
    reasons |= {
        f"data.{name}": ("not seen in batches", "从批次中看不到")
        for name in ("truncated", "duplicates", "overlap", "largest_source", "template", "held_out_rows")
    }
    data = count_batches(
        rows,
        ends=Ends.of(tokenizer, model),
        max_length=getattr(arguments, "max_length", None),
        virtual_tokens=settings.tokens,
        positions=_positions(model),
        context=_context(model),
        decoder_only=not getattr(getattr(model, "config", None), "is_encoder_decoder", False),
    )
    data = dataclasses.replace(data, padding=supervised_padding(batches))
    start, base, why = losses_before(model, batches, has_adapter=settings.method not in (None, "full"))
    if why:
        reasons["curve.start_loss"] = reasons["curve.base_loss"] = why
    empty = np.empty(0)
    curve = LossCurve(steps=empty, loss=empty, start_loss=start, base_loss=base, unigram_loss=unigram_loss(rows))
    return data, curve


def _positions(model: nn.Module) -> int | None:
    """Returns the rows of a table of position embeddings; None where positions are computed."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("wpe", "embed_positions", "position_embeddings"):
            rows = getattr(module, "num_embeddings", None)
            return None if rows is None else int(rows) - int(getattr(module, "offset", 0))
    return None


def _context(model: Any) -> int | None:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "max_position_embeddings", None)


def adapter_state(model: Any, start: Mapping[str, Tensor] | None = None) -> AdapterState:
    """Returns the state of the numbers that train: NaN, and whether they differ from the start of the run.

    Args:
        model: wrapped or not.
        start: of `fingerprint`, taken before the first step.
    """
    trainable = _trainable(model)
    # a finite sum is quick to tell, and enough
    odd = {name: tensor for name, tensor in trainable.items() if not bool(torch.isfinite(tensor.sum()))}
    bad = tuple(name for name, tensor in odd.items() if not bool(torch.isfinite(tensor).all()))
    now = fingerprint(model)
    same = None
    if start and now.keys() == start.keys():
        same = all(torch.equal(now[name], start[name]) for name in now)
    return AdapterState(untouched=same, bad=bad)


def fingerprint(model: Any) -> dict[str, Tensor]:
    """Returns up to 4,096 numbers of each tensor that trains."""
    return {
        name: tensor.reshape(-1)[:: math.ceil(tensor.numel() / 4096)].to("cpu", copy=True)
        for name, tensor in _trainable(model).items()
    }


def _trainable(model: Any) -> dict[str, Tensor]:
    """Returns the tensors that train and lie whole in this process: FSDP and tensor parallelism spread others."""
    return {
        name: parameter.detach()
        for name, parameter in unwrapped(model).named_parameters()
        if parameter.requires_grad and parameter.numel() and not is_spread(parameter)
    }
