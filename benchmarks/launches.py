"""Device operations of one row and the steps that it completes, by number of trials: what a card has to launch.

    python benchmarks/launches.py

Nothing is timed: operations are counted on a two-layer model on CPU, with the paths that a card takes (one attention
kernel for all lengths, the model's own norms). Views do not count, an operator counts as what it launches: one. The row
is the same 64 examples, shared by 1 to 64 trials, each of which completes its batch and takes an AdamW step. Rows of
`launches.jsonl` have the operations forward, backward and of the optimizer, and how often the host waits for a value
inside the row. `launches.png` has them beside those of the oldest rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from worlds import METHODS, adapter_of, examples_of_length, open_world, vocabulary_of

from peft_study.config import LoraConfig, MethodConfig, TrainingConfig
from peft_study.engine.engine import Engine
from peft_study.engine.trial import Trial
from peft_study.methods import low_rank
from peft_study.model import attention
from peft_study.model.load import Base

EXAMPLES, LENGTH = 64, 16
"""Of the row, and tokens of each."""
COUNTS = 1, 4, 16, 64
_FREE = ("empty", "new_empty", "detach", "alias", "lift_fresh", "is_same_size", "sym_size", "set_")
_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


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
            bounds = cu_seq_q.tolist(), cu_seq_k.tolist()
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


def operations(base: Base, chosen: Sequence[MethodConfig], count: Counter[str]) -> dict[str, Any]:
    """Returns the operations of the second row of some trials: the first makes the optimizer's state."""
    batch = EXAMPLES // len(chosen)
    engine = Engine(base, row_tokens=EXAMPLES * (LENGTH + 40))
    training = TrainingConfig(learning_rate=LEARNING_RATE, steps=3, batch_size=batch)
    examples = examples_of_length(batch, LENGTH, vocabulary_of(base))
    for number, config in enumerate(chosen):
        engine.admit(Trial(f"trial {number}", adapter_of(config, base, number), training, examples))
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
            patch.object(engine, "_run", noted("row", run)),
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


def main(words: list[str] | None = None) -> None:
    """Counts every kind and number of trials."""
    parser = arguments(__doc__, "launches")
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    options = parser.parse_args(words)
    rows, count = Rows(options), Counter[str]()
    with as_on_a_card(count):
        base = open_world("tiny", "cpu").base()
        for kind in ("equal", "unequal", "mixed"):
            for number in options.counts:
                rows.add(row="launches", trials=kind, count=number, **operations(base, settings(kind, number), count))
    pictures.launches(read_rows(rows.path), rows.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
