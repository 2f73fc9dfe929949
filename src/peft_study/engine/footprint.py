"""How much memory a row takes, from the base's shapes: known before any weight is loaded.

A row runs forward and backward on two bases without weights (model/weightless.py), of one and two layers, and on rows
of two lengths, and the bytes that live at a time are counted:

    peak = constant + tokens x (at the model's ends + layers x of a layer)
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_study.config import MethodConfig, PrefixTuningConfig, PromptTuningConfig
from peft_study.data.conversation import Example
from peft_study.engine.engine import Engine
from peft_study.engine.memory import trial_bytes
from peft_study.engine.row import sample_item
from peft_study.errors import ModelError, OutputError
from peft_study.methods.base import Adapter
from peft_study.methods.prompt_tuning import PromptAdapter
from peft_study.methods.registry import create, size
from peft_study.model.load import Base
from peft_study.model.weightless import Outline
from peft_study.storage.cache_dir import cache_root, numbers_digest
from peft_study.storage.files import atomic_writer, made_folder

_EXAMPLE = 256
"""Tokens of each example in a row, without virtual ones."""
_SHORT, _LONG = 2, 4
"""Examples of the rows: enough for a whole chunk of logits (model/head.py)."""
_MOST_VIRTUAL = 512
"""Virtual tokens in a row that is counted: those of a setting with millions would take minutes to place."""
_SHARE, _CONSTANT = 1.08, 110 * 2**20
"""Of a CPU: what the allocator wastes, and buffers of matrix products, which no operation shows; fitted to measured
peaks of three models (benchmarks/fit.py)."""
QUANTISED = {"int8": 1.0, "nf4": 0.5 + 1 / 64}
"""Bytes of a number of a quantised layer; in nf4 64 share a scale of a byte."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that a setting takes beside the base.

    Attributes:
        trial: that its adapter, gradients and optimizer keep while it is in a slot.
        virtual: not bytes, but tokens that stand in the row before each example.
        constant: of a row, whatever its length, and
        a_token: of each token in it, virtual ones included.
    """

    trial: int
    virtual: int
    constant: float
    a_token: float

    def row(self, tokens: int) -> int:
        """Returns the bytes of a row of so many tokens at its peak."""
        return round(self.constant + self.a_token * tokens)


@dataclass(frozen=True, slots=True)
class Footprints:
    """Bytes that a base and settings on it take.

    Attributes:
        weights: of the base, by precision: its own, int8 and nf4.
        methods: of each setting.
    """

    weights: dict[str, int]
    methods: dict[str, Footprint]


def count(base: Outline, methods: Mapping[str, MethodConfig], *, recompute: bool) -> Footprints:
    """Returns what a base and settings take; what was counted once is read from the cache.

    Args:
        base: the model.
        methods: the settings, by name.
        recompute: whether layers are computed again in the backward pass.

    Returns:
        Of the settings those that fit the model.
    """
    shape = {name: value for name, value in base.config.to_dict().items() if not name.startswith("_")}
    asked = {name: method.model_dump(mode="json") for name, method in methods.items()}
    parts = [shape, str(base.placement), asked, recompute, numbers_digest()]
    digest = hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
    path = cache_root() / "footprints" / f"{digest[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_text())
        return Footprints(kept["weights"], {name: Footprint(**values) for name, values in kept["methods"].items()})
    found = _counted(base, methods, recompute=recompute)
    with contextlib.suppress(OSError, OutputError), made_folder(path.parent), atomic_writer(path) as file:
        file.write(json.dumps(asdict(found)))
    return found


def _counted(outline: Outline, methods: Mapping[str, MethodConfig], *, recompute: bool) -> Footprints:
    weights, few = _with_layers(outline, 1, methods, (_SHORT, _LONG), recompute=recompute)
    weights_of_two, more = _with_layers(outline, 2, methods, (_LONG,), recompute=recompute)

    def whole(one: float, two: float) -> float:
        return one + (outline.layers - 1) * (two - one)

    share, further = (_SHARE, _CONSTANT) if outline.placement.device.type == "cpu" else (1.0, 0)
    found = {}
    for name, (trial, (short, long)) in few.items():
        trial_of_two, (deep,) = more[name]
        constant = long - (long - short) / (_LONG - _SHORT) * _LONG
        a_token = (whole(long, deep) - constant) / _tokens(methods[name], _LONG)
        method = methods[name]
        virtual = method.tokens if isinstance(method, PromptTuningConfig) else 0
        trial = round(whole(trial, trial_of_two))
        found[name] = Footprint(trial, virtual, constant * share + further, a_token * share)
    return Footprints({p: round(whole(one, weights_of_two[p])) for p, one in weights.items()}, found)


def _with_layers(
    outline: Outline, layers: int, methods: Mapping[str, MethodConfig], lengths: Sequence[int], *, recompute: bool
) -> tuple[dict[str, int], dict[str, tuple[int, list[int]]]]:
    """Returns the bytes of the weights by precision, and of each setting: of a trial, and of rows of examples."""
    with outline.base(layers) as base:
        weights = {name: _weights(base, a_number) for name, a_number in {outline.precision: None, **QUANTISED}.items()}
        engine = Engine(base, gradient_checkpointing=recompute)
        found = {}
        for name, method in methods.items():
            with contextlib.suppress(ModelError):  # what does not fit the model is told when it is loaded
                found[name] = trial_bytes(method, base), _peaks(engine, method, lengths)
    return weights, found


def _weights(base: Base, a_number: float | None) -> int:
    """Returns the bytes of the weights, where a number of a linear layer takes so many; None: as it is."""
    whole = sum(parameter.nbytes for parameter in base.model.parameters())
    if a_number is None:
        return whole
    linear = [m.weight for m in base.model.modules() if isinstance(m, nn.Linear) and m is not base.head]
    return round(whole - sum(weight.nbytes - weight.numel() * a_number for weight in linear))


def _peaks(engine: Engine, method: MethodConfig, lengths: Sequence[int]) -> list[int]:
    method = _as_counted(method)
    adapter = weightless_adapter(method, engine.base)
    # a prefix keeps its table once more, with a gradient: the trial's, not the row's
    kept = 0 if adapter.exclusive else size(method, engine.base).kept
    adapter.attach()
    try:
        return [_peak(engine, adapter, examples) - kept for examples in lengths]
    finally:
        adapter.detach()


def _as_counted(method: MethodConfig) -> MethodConfig:
    """Returns the setting without what makes no difference to a row: how a prefix begins, and what makes its table."""
    if isinstance(method, PrefixTuningConfig):
        return method.model_copy(
            update={"tokens": min(method.tokens, _MOST_VIRTUAL), "init": "zero", "projection": False}
        )
    if isinstance(method, PromptTuningConfig):
        return method.model_copy(update={"tokens": min(method.tokens, _MOST_VIRTUAL)})
    return method


def _tokens(method: MethodConfig, examples: int) -> int:
    """Returns the tokens of a row of so many examples."""
    method = _as_counted(method)
    return examples * (_EXAMPLE + (method.tokens if isinstance(method, PromptTuningConfig) else 0))


def weightless_adapter(method: MethodConfig, base: Base) -> Adapter:
    """Returns an adapter of a base without weights."""
    if isinstance(method, PromptTuningConfig):  # its initialisations look at the weights
        return PromptAdapter(method, torch.zeros(method.tokens, base.hidden))
    return create(method, base, None, 0)


def _peak(engine: Engine, adapter: Adapter, examples: int) -> int:
    text = np.zeros(_EXAMPLE, dtype=np.int32)
    items = [sample_item(adapter, Example(text, np.arange(len(text)) > 0))] * examples
    trained = list(adapter.parameters().values())
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    there = [*engine.base.model.parameters(), *engine.base.model.buffers(), *trained, *(p.grad for p in trained)]
    collects = gc.isenabled()
    gc.collect()
    gc.disable()  # else the peak depends on when garbage that refers to itself is collected
    try:
        with _Live(there) as live, engine.runner.row(items) as result:
            if result.total.requires_grad:
                result.total.backward()
    finally:
        if collects:
            gc.enable()
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, as long as they live.

    Args:
        but: tensors that were there before.
    """

    def __init__(self, but: Sequence[Any]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._bytes: dict[int, int] = {}
        self._before = {tensor.untyped_storage()._cdata for tensor in but}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        number = storage._cdata
        if number in self._before or number in self._bytes:
            return
        self._bytes[number] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, number)

    def _gone(self, number: int) -> None:
        self.now -= self._bytes.pop(number, 0)
