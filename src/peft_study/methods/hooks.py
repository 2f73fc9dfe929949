"""Where adapted linear layers of the shared base receive their updates.

Plain linear layers get a forward of ours (methods/low_rank.py); other kinds (quantised, transposed) carry a hook that
adds to what they computed. For every row the engine says which span of it belongs to which adapter:

    row:    |  trial 0: [0, 310)  |  trial 1: [310, 540)  |  trial 2: [540, 1024)  |
    y[span] += scale * B A dropout(x[span])     with the A and B of the span's own adapter
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from peft_study.errors import ModelError
from peft_study.methods import low_rank
from peft_study.methods.base import Adapter
from peft_study.methods.dropout import DropoutKey, keep_mask
from peft_study.methods.low_rank import Group, SpanUpdate


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, end) of the row, all of one adapter; `keys` is empty in evaluation, where nothing is dropped."""

    start: int
    end: int
    adapter: Adapter
    keys: tuple[DropoutKey, ...] = ()


class LinearHooks:
    """The hooks of one base model; layers are hooked when an adapter first needs them."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._hooked: set[str] = set()
        self._spans: Sequence[Span] = ()
        self._tokens = 0
        self._ends: dict[tuple[int, ...], Tensor] = {}

    def ensure(self, names: Sequence[str]) -> None:
        """Hooks the layers of these names that are not hooked yet."""
        for name in names:
            if name in self._hooked:
                continue
            module = self._modules[name]
            if type(module) is nn.Linear:  # a subclass may compute something else
                module.forward = partial(self._linear, name, module, module.forward)  # type: ignore[method-assign]
            else:
                module.register_forward_hook(partial(self._add, name))
            self._hooked.add(name)

    @contextmanager
    def row(self, spans: Sequence[Span]) -> Iterator[None]:
        """Makes the spans those of the row that is being computed; backward belongs inside (recomputation)."""
        self._spans = [span for span in spans if span.adapter.adapted_modules()]
        self._tokens = spans[-1].end if spans else 0
        try:
            yield
        finally:
            self._spans = ()
            self._ends.clear()

    def _linear(self, name: str, module: nn.Linear, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        groups = self._updates(name, x)
        if not groups:
            return forward(x)
        if module.weight.requires_grad or x.dtype != module.weight.dtype:
            return low_rank.add(x, forward(x), groups)
        return low_rank.linear(x, module.weight, module.bias, groups)

    def _add(self, name: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        groups = self._updates(name, inputs[0])
        return low_rank.add(inputs[0], output, groups) if groups else output

    def _updates(self, name: str, x: Tensor) -> list[Group]:
        """Returns the updates of the layer in the row that is being computed."""
        found: list[SpanUpdate] = []
        if self._spans and x.numel() != self._tokens * x.shape[-1]:
            what = f"its layer {name} does not see one vector a token of the row, so that no trial's part can be told"
            raise ModelError(what, remedy="leave it out of target_modules")
        for span in self._spans:
            update = span.adapter.linear_update(name)
            if update is None:
                continue
            mask_LI = _mask(name, span, x)
            if mask_LI is not None:  # in float32, which a mask of the inputs' type would not be
                update = replace(update, scale=update.scale / (1 - span.adapter.dropout))
            found.append(SpanUpdate(span.start, span.end, update, mask_LI))
        return low_rank.grouped(found, x, partial(self._ends_of, x.device))

    def _ends_of(self, device: torch.device, ends: tuple[int, ...]) -> Tensor:
        """Returns where spans end, copied to the device once a row, without waiting: every layer asks."""
        if ends not in self._ends:
            host = torch.tensor(ends, dtype=torch.int32, pin_memory=device.type == "cuda")
            self._ends[ends] = host.to(device, non_blocking=True)
        return self._ends[ends]


def _mask(name: str, span: Span, x: Tensor) -> Tensor | None:
    """Returns the dropout mask (L, I) of the span at the layer, or None where nothing is dropped."""
    if span.adapter.dropout <= 0 or not span.keys:
        return None
    masks = [keep_mask(key, name, span.adapter.dropout, x) for key in span.keys]
    return masks[0] if len(masks) == 1 else torch.cat(masks)
