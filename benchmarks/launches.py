"""Device operations of one row and the steps that it completes, by number of trials: what a card has to launch.

    python benchmarks/launches.py

Nothing is timed: operations are counted on a two-layer model on CPU, with the paths that a card takes (one attention
kernel for all lengths, the model's own norms). Views do not count, an operator counts as what it launches: one. The row
is the same 64 examples, shared by 1 to 64 trials, each of which completes its batch and takes an AdamW step. Rows of
`launches.jsonl` have the operations forward, backward and of the optimizer, and how often the host waits for a value:
once, for the losses, when the device has all its work. Rows `shape` have the operations of the row alone, without those
of the optimizer, of models of 1 and 8 billion parameters in bfloat16: counted on tensors that have shapes and no
numbers, with one and two layers, from which those of all layers follow. `launches.png` has the first kind beside
those of the oldest rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pictures
import torch
import torch.nn.functional as F
from common import Rows, arguments, read_rows
from peers import LEARNING_RATE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from worlds import METHODS, adapter_of, examples_of_length, open_world, shape_of, vocabulary_of

from peft_study.config import LoraConfig, MethodConfig, TrainingConfig
from peft_study.engine.engine import Engine
from peft_study.engine.footprint import weightless_adapter
from peft_study.engine.row import RowResult
from peft_study.engine.trial import Trial
from peft_study.methods import Adapter, low_rank
from peft_study.model import attention
from peft_study.model.load import Base
from peft_study.model.precision import Placement
from peft_study.model.weightless import Outline, outline_of_shape

EXAMPLES, LENGTH = 64, 16
"""Of the row, and tokens of each."""
COUNTS = 1, 4, 16, 64
_FREE = ("empty", "new_empty", "detach", "alias", "lift_fresh", "is_same_size", "sym_size", "set_")
_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
_READS = ("cpu", "tolist", "numpy")
"""Methods that wait on a card and are no operators on CPU."""
_VALUES = Tensor.tolist


class Launches(TorchDispatchMode):
    """Counts operators that are no views, and those that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        views = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
        if name in _WAITS:
            self.waits[name] += 1
        if func.namespace == "aten" and not any(views) and not name.startswith(_FREE):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class _Varlen(torch.autograd.Function):
    """Stands in for the card's kernel: counted as one operator forward, and as one backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bounds: Any, scale: float, count: Any) -> Tensor:
        count["varlen"] += 1
        ctx.count, ctx.bounds, ctx.scale = count, bounds, scale
        ctx.save_for_backward(query, key, value)
        with _disable_current_modes():
            return _attend(query, key, value, bounds, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.count["varlen"] += 1
        with _disable_current_modes(), torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out = _attend(*inputs, ctx.bounds, ctx.scale)
            return (*torch.autograd.grad(out, inputs, gradients[0]), None, None, None)


def _attend(query: Tensor, key: Tensor, value: Tensor, bounds: tuple[list[int], list[int]], scale: float) -> Tensor:
    pieces = []
    groups = query.shape[1] // key.shape[1]
    for (q0, q1), (k0, k1) in zip(*(pairwise(ends) for ends in bounds), strict=True):
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
        parts = [query[q0:q1], *(x[k0:k1].repeat_interleave(groups, dim=1) for x in (key, value))]
        heads = [part.transpose(0, 1) for part in parts]
        pieces.append(F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(pieces)


class _Shapes(torch.autograd.Function):
    """Stands in for the card's kernel on tensors without numbers."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, count: Any) -> Tensor:
        count["varlen"] += 1
        ctx.count = count
        ctx.save_for_backward(query, key, value)
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.count["varlen"] += 1
        return (*(torch.empty_like(x) for x in ctx.saved_tensors), None)


@contextmanager
def as_on_a_card(count: Counter[str]) -> Iterator[None]:
    """Makes attention take the card's path; norms are the model's own where `wrap` ran inside."""

    def varlen(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float = 1.0,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        num_splits: int | None = None,
    ) -> Tensor:
        with _disable_current_modes():
            bounds = _VALUES(cu_seq_q), _VALUES(cu_seq_k)
        out: Tensor = _Varlen.apply(query, key, value, bounds, scale, count)
        return out

    attention._varlen_options.cache_clear()
    with (
        patch.object(attention, "varlen_attn", varlen),
        patch.object(attention, "_varlen_serves", lambda *_: True),
        patch.object(low_rank, "grouped_products_serve", lambda *_: True),
        patch("peft_study.model.cpu.norm.install", lambda _model: None),
    ):
        yield
    attention._varlen_options.cache_clear()


def settings(kind: str, count: int) -> list[MethodConfig]:
    """Returns the settings of trials: equal LoRA, LoRA of unequal ranks, or the three methods in turn."""
    if kind == "equal":
        return [LoraConfig(rank=8)] * count
    if kind == "unequal":
        return [LoraConfig(rank=(4, 8, 16, 32)[number % 4]) for number in range(count)]
    return [list(METHODS.values())[number % len(METHODS)] for number in range(count)]


def _admitted(base: Base, adapters: Sequence[Adapter]) -> Engine:
    """Returns an engine with a trial for each adapter; together their batches are the examples of one row."""
    batch = EXAMPLES // len(adapters)
    engine = Engine(base, row_tokens=EXAMPLES * (LENGTH + 40))
    training = TrainingConfig(learning_rate=LEARNING_RATE, steps=3, batch_size=batch)
    examples = examples_of_length(batch, LENGTH, vocabulary_of(base))
    for number, adapter in enumerate(adapters):
        engine.admit(Trial(f"trial {number}", adapter, training, examples))
    return engine


@contextmanager
def _reads_counted(waits: Counter[str]) -> Iterator[None]:
    """Counts the calls of `_READS`."""

    def counted(name: str) -> Callable[..., Any]:
        read = getattr(Tensor, name)

        def call(tensor: Tensor, *given: Any, **how: Any) -> Any:
            waits[name] += 1
            return read(tensor, *given, **how)

        return call

    with ExitStack() as patches:
        for name in _READS:
            patches.enter_context(patch.object(Tensor, name, counted(name)))
        yield


def operations(base: Base, chosen: Sequence[MethodConfig], count: Counter[str]) -> dict[str, Any]:
    """Returns the operations of the second row of some trials: the first makes the optimizer's state."""
    engine = _admitted(base, [adapter_of(config, base, number) for number, config in enumerate(chosen)])
    engine.step()
    parts: dict[str, int] = {}
    count.clear()
    with Launches() as launches:
        run, backward = engine._run, Tensor.backward

        def noted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any, **how: Any) -> Any:
                before = launches.found.total() + count.total()
                found = work(*given, **how)
                parts[name] = parts.get(name, 0) + launches.found.total() + count.total() - before
                return found

            return call

        with (
            patch.object(Tensor, "backward", noted("backward", backward)),
            patch.object(engine, "_run", noted("row", _reads_counted(launches.waits)(run))),
        ):
            events = engine.step()
    assert len(events) == len(chosen), "every trial took its step"
    total = launches.found.total() + count.total()
    return {
        "operations": total,
        "forward": parts["row"] - parts["backward"],
        "backward": parts["backward"],
        "optimizer": total - parts["row"],
        "waits": launches.waits.total(),
        "most": dict((launches.found + count).most_common(6)),
    }


def operations_of_shape(model: str, chosen: Sequence[MethodConfig]) -> int:
    """Returns the operations of a row, forward and backward, on a model of this shape with all its layers."""
    outline = outline_of_shape(shape_of(model), Placement(torch.device("cuda"), torch.bfloat16))
    one, two = (_row_of_layers(outline, layers, chosen) for layers in (1, 2))
    return one + (outline.layers - 1) * (two - one)


def _row_of_layers(outline: Outline, layers: int, chosen: Sequence[MethodConfig]) -> int:
    count = Counter[str]()

    def varlen(query: Tensor, key: Tensor, value: Tensor, *_given: Any, **_how: Any) -> Tensor:
        out: Tensor = _Shapes.apply(query, key, value, count)
        return out

    with as_on_a_card(count), patch.object(attention, "varlen_attn", varlen), outline.base(layers) as base:
        engine = _admitted(base, [weightless_adapter(config, base) for config in chosen])
        filled = engine._taken()
        with Launches() as launches, patch.object(RowResult, "item_losses", [0.0] * EXAMPLES):
            engine._run(filled)
    return launches.found.total() + count.total()


def main(words: list[str] | None = None) -> None:
    """Counts every kind and number of trials."""
    parser = arguments(__doc__, "launches")
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--shapes", nargs="*", default=["llama-1b", "llama-8b"], help="models of these shapes, too")
    options = parser.parse_args(words)
    rows, count = Rows(options), Counter[str]()
    with as_on_a_card(count):
        base = open_world("tiny", "cpu").base()
        for kind in ("equal", "unequal", "mixed"):
            for number in options.counts:
                rows.add(row="launches", trials=kind, count=number, **operations(base, settings(kind, number), count))
    for model in options.shapes:
        for kind in ("equal", "mixed"):
            for number in options.counts:
                found = operations_of_shape(model, settings(kind, number))
                rows.add(row="shape", model=model, trials=kind, count=number, operations=found)
    pictures.launches(read_rows(rows.path), rows.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
