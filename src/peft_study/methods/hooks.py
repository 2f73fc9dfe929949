"""Where adapted linear layers of the shared base receive their updates.

Each adapted layer carries one forward hook. For every row the engine says which span of it belongs to which adapter:

    row:    |  trial 0: [0, 310)  |  trial 1: [310, 540)  |  trial 2: [540, 1024)  |
    y[span] += scale * B A dropout(x[span])     with the A and B of the span's own adapter
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from peft_study.methods.base import Adapter, LowRank
from peft_study.methods.dropout import keep_mask


@dataclass(frozen=True, slots=True)
class DropoutKey:
    """What a dropout mask depends on beside the module: one example of the span, with its tokens in the row."""

    seed: int
    step: int
    example: int
    length: int


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

    def ensure(self, names: Sequence[str]) -> None:
        """Hooks the layers of these names that are not hooked yet."""
        for name in names:
            if name not in self._hooked:
                self._modules[name].register_forward_hook(partial(self._update, name))
                self._hooked.add(name)

    @contextmanager
    def row(self, spans: Sequence[Span]) -> Iterator[None]:
        """Makes the spans those of the row that is being computed; backward belongs inside (recomputation)."""
        self._spans = [span for span in spans if span.adapter.adapted_modules()]
        try:
            yield
        finally:
            self._spans = ()

    def _update(self, name: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self._spans:
            return output
        x_TI, y_TO = inputs[0].flatten(0, -2), output.flatten(0, -2)
        pieces, end = [], 0
        for span in self._spans:
            update = span.adapter.linear_update(name)
            if update is None:
                continue
            if span.start > end:
                pieces.append(y_TO[end : span.start])
            pieces.append(_updated(name, span, update, x_TI[span.start : span.end], y_TO[span.start : span.end]))
            end = span.end
        if not pieces:
            return output
        if end < len(y_TO):
            pieces.append(y_TO[end:])
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view_as(output)


def _updated(name: str, span: Span, update: LowRank, x_LI: Tensor, y_LO: Tensor) -> Tensor:
    """Returns y + scale * dropout(x) A^T B^T in y's precision; products accumulate in float32 inside the kernels."""
    if span.adapter.dropout > 0 and span.keys:
        masks = [
            keep_mask(
                seed=key.seed,
                step=key.step,
                example=key.example,
                module=name,
                length=key.length,
                width=x_LI.shape[1],
                probability=span.adapter.dropout,
                like=x_LI,
            )
            for key in span.keys
        ]
        x_LI = x_LI * (masks[0] if len(masks) == 1 else torch.cat(masks))
    hidden_LR = x_LI.to(y_LO.dtype) @ update.A.to(y_LO.dtype).t()
    return torch.addmm(y_LO, hidden_LR, update.B.to(y_LO.dtype).t(), alpha=update.scale)
