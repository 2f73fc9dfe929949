"""The product of an adapted linear layer: y + scale * dropout(x) A^T B^T on spans of the row, backward pass by hand.

Updates are added into the layer's output where it lies, and their gradients into the base's, so nothing is copied or
joined. Of what a span computes only its x and hidden_LR are kept. No product spans two adapters.

Shape legend: T tokens of the row, L of a span, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_study.methods.base import LowRank


@dataclass(frozen=True, slots=True)
class SpanUpdate:
    """An update of tokens [start, end) of the row; `mask_LI` is what dropout multiplies its inputs by."""

    start: int
    end: int
    update: LowRank
    mask_LI: Tensor | None = None


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, spans: Sequence[SpanUpdate]) -> Tensor:
    """Returns (..., T, O): the frozen layer's output with the updates in it."""
    assert not weight_OI.requires_grad, "the base is frozen"
    return _apply(x, None, weight_OI, bias_O, spans)


def add(x: Tensor, y: Tensor, spans: Sequence[SpanUpdate]) -> Tensor:
    """Adds the updates to a layer's output y (..., T, O), in place unless it is a view, and returns it."""
    # autograd would copy the whole of what a view looks at
    return _apply(x, y.clone() if y._is_view() else y, None, None, spans)


def _apply(
    x: Tensor, y: Tensor | None, weight_OI: Tensor | None, bias_O: Tensor | None, spans: Sequence[SpanUpdate]
) -> Tensor:
    pairs = [matrix for span in spans for matrix in (span.update.A, span.update.B)]
    out: Tensor = _Adapted.apply(x, y, weight_OI, bias_O, tuple(spans), *pairs)
    return out


class _Adapted(torch.autograd.Function):
    """Either computes the frozen layer itself (weight given), or adds to its output (y given)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        weight_OI: Tensor | None,
        bias_O: Tensor | None,
        spans: tuple[SpanUpdate, ...],
        *pairs: Tensor,
    ) -> Tensor:
        if y is None:
            assert weight_OI is not None
            y = F.linear(x, weight_OI, bias_O)
        else:
            ctx.mark_dirty(y)
        x_TI, y_TO = x.flatten(0, -2), y.flatten(0, -2)
        saved = []
        for span, A, B in zip(spans, pairs[::2], pairs[1::2], strict=True):
            A_RI, B_OR = A.to(y.dtype), B.to(y.dtype)
            hidden_LR = _inputs(x_TI, span, y.dtype) @ A_RI.t()
            y_TO[span.start : span.end].addmm_(hidden_LR, B_OR.t(), alpha=span.update.scale)
            saved += [A_RI, B_OR, hidden_LR]
        ctx.spans, ctx.dtype = spans, y.dtype
        ctx.save_for_backward(x, weight_OI, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_y = gradients[0]
        x, weight_OI, *saved = ctx.saved_tensors
        x_TI, d_y_TO = x.flatten(0, -2), d_y.flatten(0, -2)
        wanted = ctx.needs_input_grad
        d_x_TI: Tensor | None = None
        if wanted[0]:
            d_x_TI = torch.zeros_like(x_TI) if weight_OI is None else d_y_TO @ weight_OI
        d_pairs: list[Tensor | None] = []
        for number, span in enumerate(ctx.spans):
            A_RI, B_OR, hidden_LR = saved[3 * number : 3 * number + 3]
            d_y_LO = d_y_TO[span.start : span.end]
            d_hidden_LR = (d_y_LO @ B_OR).mul_(span.update.scale)
            if wanted[5 + 2 * number]:
                d_A = d_hidden_LR.t() @ _inputs(x_TI, span, ctx.dtype)
                d_pairs.append(d_A.to(span.update.A.dtype))
            else:
                d_pairs.append(None)
            if wanted[6 + 2 * number]:
                d_B_RO = (hidden_LR.t() @ d_y_LO).to(span.update.B.dtype)
                d_pairs.append(d_B_RO.mul_(span.update.scale).t().contiguous())
            else:
                d_pairs.append(None)
            if d_x_TI is not None:
                span_LI = d_x_TI[span.start : span.end]
                if span.mask_LI is not None:
                    span_LI.add_((d_hidden_LR @ A_RI).mul_(span.mask_LI))
                elif span_LI.dtype == A_RI.dtype:
                    span_LI.addmm_(d_hidden_LR, A_RI)
                else:
                    span_LI.add_(d_hidden_LR @ A_RI)
        d_x = None if d_x_TI is None else d_x_TI.view_as(x)
        return d_x, d_y if wanted[1] else None, None, None, None, *d_pairs


def _inputs(x_TI: Tensor, span: SpanUpdate, dtype: torch.dtype) -> Tensor:
    """Returns the span's inputs (L, I) as the update sees them; a mask is applied again rather than kept applied."""
    x_LI = x_TI[span.start : span.end]
    return (x_LI if span.mask_LI is None else x_LI * span.mask_LI).to(dtype)
