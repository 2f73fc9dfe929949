"""Memory: how much trials can have, and how much a setting takes, estimated before anything is allocated.

free beside the base = margin + a row's activations + slots x (16 bytes a trained number, what an adapter keeps)
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peft_study.config import MethodConfig
from peft_study.data.conversation import Example
from peft_study.doctor.observations import Observations, UsedSettings
from peft_study.doctor.rule import examine
from peft_study.doctor.rules.costs import MARGIN
from peft_study.engine.engine import Engine
from peft_study.engine.row import fill_rows, said_whose, sample_item
from peft_study.engine.trial import Examples
from peft_study.errors import ModelError
from peft_study.methods.base import Adapter
from peft_study.methods.registry import create, size, smallest
from peft_study.model.cpu.allocator import give_back_freed_memory
from peft_study.model.load import Base
from peft_study.storage.environment import resident

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux keeps a container's limits (version 2)."""

_BYTES_A_PARAMETER = 16
"""A float32 value with its gradient and AdamW's two moments."""

_CUT = 1 / 4
"""Share of a row below which layers are computed again rather than rows cut further: a third more time is then less."""

_TRIED_TOKENS = 64
"""Tokens of the row that shows what the backward pass keeps of each."""


@dataclass(frozen=True, slots=True)
class MemoryProbe:
    """Result of a probe row, in bytes.

    Attributes:
        free: before the row, with the base loaded; None where the system does not say.
        activations: peak that a full row added.
        slot: cost of the largest adapter in a slot.
        fits: slots by these figures, at least 1; None where `free` is not known.
    """

    free: int | None
    activations: int
    slot: int
    fits: int | None


def trial_bytes(method: MethodConfig, base: Base) -> int:
    """Returns the bytes that a trial of this setting keeps while it is in a slot.

    Raises:
        ModelError: when the method does not fit the model.
    """
    found = size(method, base)
    return _BYTES_A_PARAMETER * found.trained + found.kept


class Room:
    """The memory that the trials of an engine can have, and what settings take of it.

    Args:
        engine: without trials; its base is loaded.
        free: bytes, where another worker of the same kind has measured them.
        sharing: workers that share the memory of this machine's CPU; each loads the base and has a share of the rest.
        recomputes: whether the engine may turn to computing layers again where settings or rows do not fit without.
    """

    def __init__(self, engine: Engine, *, free: int | None = None, sharing: int = 1, recomputes: bool = False) -> None:
        self._engine = engine
        self._may_recompute = recomputes
        self._a_token: dict[str, float] = {}  # by setting, as JSON
        self.free = available(engine.base.device) if free is None else free
        """Bytes beside the base; None where the system does not say."""
        if free is None and self.free is not None and engine.base.device.type == "cpu" and sharing > 1:
            own = resident("VmRSS") or 0
            self.free = max(0, (self.free + own) // sharing - own)

    def slot(self, method: MethodConfig) -> int:
        """Returns the bytes that a trial of this setting keeps while it is in a slot."""
        return trial_bytes(method, self._engine.base)

    def row(self, method: MethodConfig, tokens: int) -> int:
        """Returns the bytes that a row of so many tokens, virtual ones included, holds for its backward pass at least.

        Raises:
            ModelError: when the method does not fit the model.
        """
        small = smallest(method)
        key = small.model_dump_json()
        if key not in self._a_token:
            self._a_token[key] = self._held_a_token(create(small, self._engine.base, None, 0))
        return math.ceil(self._a_token[key] * tokens)

    def refuse(self, method: MethodConfig, longest: int) -> None:
        """Refuses a setting where the memory is known not to hold it with one example in a row.

        Args:
            method: the setting.
            longest: tokens of the longest example.

        Raises:
            ModelError: with what it needs and what is free.
        """
        found = size(method, self._engine.base)
        if self.free is None or not found.trained:
            return
        need = self.need(method, longest)
        most = self.free * (1 - MARGIN)
        if need > most and self._recomputes_if(lambda: self.need(method, longest) <= most):
            need = self.need(method, longest)
        remedy = found.remedy
        if (row := need - self.slot(method)) > 0:
            of_it = f"{row / 2**30:,.1f} GB of it for a row of {longest + found.row_tokens:,} tokens"
            remedy = f"{of_it}; {remedy}, a lower max_length, or gradient_checkpointing"
        seen = Observations(settings=UsedSettings(method=found.name, memory_bytes=need, free_bytes=self.free))
        examine(seen, checks=("memory",)).refuse(ModelError, remedy=remedy)

    def need(self, method: MethodConfig, longest: int) -> int:
        """Returns the bytes that a setting takes at least, with one example in a row.

        Args:
            method: the setting.
            longest: tokens of the longest example.

        Raises:
            ModelError: when the method does not fit the model.
        """
        found, slot = size(method, self._engine.base), self.slot(method)
        # where the trial alone is too large, no row has to be tried
        if not found.trained or (self.free is not None and slot > self.free * (1 - MARGIN)):
            return slot
        return slot + self.row(method, longest + found.row_tokens)

    def cut_rows(self, methods: Sequence[MethodConfig]) -> None:
        """Makes the engine's rows smaller where what a full one holds is known not to fit beside one trial."""
        trained = [method for method in methods if size(method, self._engine.base).trained]
        if self.free is None or not trained:
            return
        before = self._engine.row_tokens
        most = self._most_tokens(trained)
        if most < before * _CUT and self._recomputes_if(lambda: self._most_tokens(trained) > most):
            most = self._most_tokens(trained)
        if most < before:
            self._engine.row_tokens = max(1, int(most))
            warnings.warn(
                f"rows of {before:,} tokens do not fit into the {self.free / 2**30:,.1f} GB of memory that are free "
                f"beside the base: they are cut to {self._engine.row_tokens:,} tokens",
                stacklevel=2,
            )

    def _most_tokens(self, trained: Sequence[MethodConfig]) -> float:
        """Returns the tokens of the longest row that fits beside one trial of any of these settings."""
        assert self.free is not None
        return min((self.free * (1 - MARGIN) - self.slot(m)) / (self.row(m, 1000) / 1000) for m in trained)

    def _recomputes_if(self, fits: Callable[[], bool]) -> bool:
        """Lets the engine compute layers again, if it may, does not yet, and that makes it fit; returns whether."""
        if not self._may_recompute or self._engine.recomputes:
            return False
        for recompute in (True, False):
            self._engine.recompute(recompute)
            self._a_token.clear()
            if recompute and fits():
                warnings.warn(
                    "rows do not fit into the memory: layers are computed again in the backward pass, which takes "
                    "about a third more time (gradient_checkpointing: auto)",
                    stacklevel=3,
                )
                return True
        return False

    def _held_a_token(self, adapter: Adapter) -> float:
        """Returns the bytes that a short row's forward pass keeps for the backward pass, a token of it."""
        base, held = self._engine.base, dict[int, int]()
        weights = [*base.model.parameters(), *base.model.buffers(), *adapter.parameters().values()]
        state = {tensor.untyped_storage().data_ptr() for tensor in weights}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in state:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        text = np.zeros(min(_TRIED_TOKENS, (base.positions or _TRIED_TOKENS) - 1), dtype=np.int32)
        item = sample_item(adapter, Example(text, np.arange(len(text)) > 0))
        # the hooks see every tensor while all are still held, so that no address is there twice
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), self._engine.runner.row([item]):
            pass
        total = sum(held.values()) / item.row_length
        if self._engine.recomputes:  # what enters each layer is kept where hooks do not see it
            total += base.layers * base.hidden * base.dtype.itemsize
        return total


def probe(engine: Engine, adapter: Adapter, examples: Examples) -> int:
    """Runs one full row forward and backward, and returns the bytes of its peak; a row that does not fit is halved.

    Args:
        engine: without trials; its `row_tokens` may become smaller.
        adapter: whose row it is.
        examples: training data to fill the row with.

    Raises:
        DoesNotFit: when a single example does not fit.
    """
    assert not engine.trials, "the probe has the device to itself"
    activations = engine.retried(lambda: _row_peak(engine, adapter, examples))
    for parameter in adapter.parameters().values():
        parameter.grad = None
    return activations


def measured(free: int | None, activations: int, slot: int) -> MemoryProbe:
    """Returns how many slots fit, at least one."""
    slot = max(1, slot)
    fits = None if free is None else max(1, int((free * (1 - MARGIN) - activations) // slot))
    return MemoryProbe(free, activations, slot, fits)


def _row_peak(engine: Engine, adapter: Adapter, examples: Examples) -> int:
    forever = (sample_item(adapter, examples[number % len(examples)]) for number in count())
    items = next(fill_rows(forever, engine.row_tokens, packs=engine.base.proof.packs))
    device = engine.base.device
    with peak_above(device) as peak, said_whose(items, device), engine.runner.row(items) as result:
        if result.total.requires_grad:
            result.total.backward()
    return peak[0]


def available(device: torch.device) -> int | None:
    """Returns the bytes that could still be taken on the device: a container's limit counts; None: not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch holds and does not use is free to it
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    free = int(lines["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        left = int((CGROUP / "memory.max").read_text()) - int((CGROUP / "memory.current").read_text())
        free = min(free, left + _file_cache())
    return free


def _file_cache() -> int:
    """Returns the bytes of files that a container's use counts and that the system gives back when they are needed."""
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


@contextlib.contextmanager
def peak_above(device: torch.device) -> Iterator[list[int]]:
    """Yields a list that holds, after the block, the bytes by which the block's peak was above its beginning."""
    found = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device) - before
        return
    give_back_freed_memory()  # what the block takes again of it would not be seen
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    before = resident("VmRSS") or 0
    yield found
    found[0] = max(0, (resident("VmHWM") or 0) - before)
