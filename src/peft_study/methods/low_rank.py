"""The product of an adapted linear layer: y + scale * dropout(x) A^T B^T on spans of the row, backward pass by hand.

Updates are added into the layer's output where it lies, and their gradients into the base's, so nothing is copied or
joined. Of what a span computes only its x and hidden_LR are kept. No product spans two adapters: on a card that has
grouped products, neighbouring spans of like rank share the call, each with its own matrices.

Shape legend: T tokens of the row, L of a span or group, S spans of a group, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_study.errors import out_of_memory
from peft_study.methods.base import LowRank


@dataclass(frozen=True, slots=True)
class SpanUpdate:
    """An update of tokens [start, end) of the row; `mask_LI` is False where dropout drops an input of it."""

    start: int
    end: int
    update: LowRank
    mask_LI: Tensor | None = None

    @property
    def stacked_rank(self) -> int:
        """The rank with which its matrices stand in a stack: see `stacked_rank`."""
        return stacked_rank(self.update.A.shape[0])


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring spans that share the calls of their products; of a single span `ends_S` is None.

    Attributes:
        spans: one after another, without a gap; of several, none has a mask.
        ends_S: int32, where each ends, counted from the first one's start.
    """

    spans: tuple[SpanUpdate, ...]
    ends_S: Tensor | None = None

    @property
    def slice(self) -> slice:
        """Its tokens."""
        return slice(self.spans[0].start, self.spans[-1].end)

    def without_masks(self) -> Group:
        """Returns the group without its masks."""
        if self.spans[0].mask_LI is None:
            return self
        return replace(self, spans=tuple(replace(span, mask_LI=None) for span in self.spans))

    @property
    def scales(self) -> list[float]:
        """The scale of each span."""
        return [span.update.scale for span in self.spans]


def stacked_rank(rank: int) -> int:
    """Returns the next power of two, at least 8: rows of a grouped product begin at multiples of 16 bytes.

    Matrices of a lower rank stand in a stack with zeros, which change no sum. 0 where there is no update.
    """
    return max(8, 1 << (rank - 1).bit_length()) if rank else 0


def grouped(spans: Sequence[SpanUpdate], x: Tensor, ends_of: Callable[[tuple[int, ...]], Tensor]) -> list[Group]:
    """Returns the spans in groups, where the device has grouped products; else each by itself.

    Args:
        spans: in row order.
        x: input of the layer.
        ends_of: returns ends as a tensor on the device.
    """
    joined: list[list[SpanUpdate]] = []
    even = bool(spans) and all(size % 8 == 0 for size in (x.shape[-1], len(spans[0].update.B)))  # as `stacked_rank`
    serves = even and len(spans) > 1 and grouped_products_serve(x.device, x.dtype)
    for span in spans:
        last = joined[-1][-1] if joined else None
        together = (
            serves
            and last is not None
            and last.end == span.start
            and last.stacked_rank == span.stacked_rank
            and last.mask_LI is None
            and span.mask_LI is None
        )
        if together:
            joined[-1].append(span)
        else:
            joined.append([span])
    return [
        Group(tuple(own), ends_of(tuple(span.end - own[0].start for span in own)) if len(own) > 1 else None)
        for own in joined
    ]


@functools.cache
def grouped_products_serve(device: torch.device, dtype: torch.dtype) -> bool:
    """True where torch has a kernel of grouped products and it computes what products one by one do.

    On CPU torch computes them one by one, and makes a copy of the result that the loop here does without.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    # elsewhere torch makes them one by one, and waits for the ends of the spans each time
    if torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return False
    draw = torch.Generator().manual_seed(0)
    x_LI, A_SRI = (torch.randn(*shape, generator=draw).to(device, dtype) for shape in ((24, 16), (3, 8, 16)))
    ends, starts = (3, 4, 24), (0, 3, 4)
    try:
        ends_S = torch.tensor(ends, dtype=torch.int32, device=device)
        found_LR = F.grouped_mm(x_LI, A_SRI.mT, offs=ends_S)
        found_LI = F.grouped_mm(found_LR, A_SRI, offs=ends_S)
        found_SRI = F.grouped_mm(found_LR.t(), x_LI, offs=ends_S)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        return False  # a build without the kernel
    spans = [slice(*span) for span in zip(starts, ends, strict=True)]
    one_LR = torch.cat([x_LI[span] @ A_RI.t() for span, A_RI in zip(spans, A_SRI, strict=True)])
    one_LI = torch.cat([one_LR[span] @ A_RI for span, A_RI in zip(spans, A_SRI, strict=True)])
    one_SRI = torch.stack([one_LR[span].t() @ x_LI[span] for span in spans])
    pairs = ((found_LR, one_LR), (found_LI, one_LI), (found_SRI, one_SRI))
    return all(torch.allclose(found, one, rtol=2e-2, atol=0.5) for found, one in pairs)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, groups: Sequence[Group]) -> Tensor:
    """Returns (..., T, O): the frozen layer's output with the updates in it."""
    assert not weight_OI.requires_grad, "the base is frozen"
    return _apply(x, None, weight_OI, bias_O, groups)


def add(x: Tensor, y: Tensor, groups: Sequence[Group]) -> Tensor:
    """Adds the updates to a layer's output y (..., T, O), in place unless it is a view, and returns it."""
    # autograd would copy the whole of what a view looks at
    return _apply(x, y.clone() if y._is_view() else y, None, None, groups)


def _apply(
    x: Tensor, y: Tensor | None, weight_OI: Tensor | None, bias_O: Tensor | None, groups: Sequence[Group]
) -> Tensor:
    pairs = [matrix for group in groups for span in group.spans for matrix in (span.update.A, span.update.B)]
    out: Tensor = _Adapted.apply(x, y, weight_OI, bias_O, tuple(groups), *pairs)
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
        groups: tuple[Group, ...],
        *_pairs: Tensor,
    ) -> Tensor:
        if y is None:
            assert weight_OI is not None
            y = F.linear(x, weight_OI, bias_O)
        else:
            ctx.mark_dirty(y)
        x_TI, y_TO = x.flatten(0, -2), y.flatten(0, -2)
        saved = list[Tensor | None]()
        for group in groups:
            add_to = _add_span if group.ends_S is None else _add_group
            saved += add_to(x_TI[group.slice], y_TO[group.slice], group)
        # masks are saved as tensors: what stands elsewhere stays in memory where layers are computed again
        ctx.groups = tuple(group.without_masks() for group in groups)
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
        for number, group in enumerate(ctx.groups):
            back = _span_gradients if group.ends_S is None else _group_gradients
            first = 5 + len(d_pairs)
            own = wanted[first : first + 2 * len(group.spans)]
            d_x_LI = None if d_x_TI is None else d_x_TI[group.slice]
            kept = saved[4 * number : 4 * number + 4]
            d_pairs += back(x_TI[group.slice], d_y_TO[group.slice], d_x_LI, group, kept, own)
        d_x = None if d_x_TI is None else d_x_TI.view_as(x)
        return d_x, d_y if wanted[1] else None, None, None, None, *d_pairs


def _add_span(x_LI: Tensor, y_LO: Tensor, group: Group) -> list[Tensor | None]:
    (span,) = group.spans
    A_RI, B_OR = span.update.A.to(y_LO.dtype), span.update.B.to(y_LO.dtype)
    hidden_LR = _inputs(x_LI, span.mask_LI, y_LO.dtype) @ A_RI.t()
    y_LO.addmm_(hidden_LR, B_OR.t(), alpha=span.update.scale)
    return [A_RI, B_OR, hidden_LR, span.mask_LI]


def _span_gradients(
    x_LI: Tensor,
    d_y_LO: Tensor,
    d_x_LI: Tensor | None,
    group: Group,
    saved: Sequence[Any],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    (span,), (A_RI, B_OR, hidden_LR, mask_LI) = group.spans, saved
    d_hidden_LR = (d_y_LO @ B_OR).mul_(span.update.scale)
    d_A_RI = d_B_OR = None
    if wanted[0]:
        d_A_RI = (d_hidden_LR.t() @ _inputs(x_LI, mask_LI, B_OR.dtype)).to(span.update.A.dtype)
    if wanted[1]:
        d_B_RO = (hidden_LR.t() @ d_y_LO).to(span.update.B.dtype)
        d_B_OR = d_B_RO.mul_(span.update.scale).t().contiguous()
    if d_x_LI is not None:
        if mask_LI is not None:
            d_x_LI.add_((d_hidden_LR @ A_RI).mul_(mask_LI))
        elif d_x_LI.dtype == A_RI.dtype:
            d_x_LI.addmm_(d_hidden_LR, A_RI)
        else:
            d_x_LI.add_(d_hidden_LR @ A_RI)
    return [d_A_RI, d_B_OR]


def _add_group(x_LI: Tensor, y_LO: Tensor, group: Group) -> list[Tensor | None]:
    updates = [span.update for span in group.spans]
    rank = group.spans[0].stacked_rank
    A_SRI = torch.stack([_wider(update.A, rank, dim=0) for update in updates]).to(y_LO.dtype)
    scaled = torch._foreach_mul([_wider(update.B, rank, dim=1) for update in updates], group.scales)
    B_SOR = torch.stack(list(scaled)).to(y_LO.dtype)
    hidden_LR = F.grouped_mm(x_LI.to(y_LO.dtype), A_SRI.mT, offs=group.ends_S)
    y_LO.add_(F.grouped_mm(hidden_LR, B_SOR.mT, offs=group.ends_S))
    return [A_SRI, B_SOR, hidden_LR, None]


def _group_gradients(
    x_LI: Tensor,
    d_y_LO: Tensor,
    d_x_LI: Tensor | None,
    group: Group,
    saved: Sequence[Any],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    A_SRI, B_SOR, hidden_LR, _ = saved
    d_y_LO, x_LI = d_y_LO.contiguous(), x_LI.to(B_SOR.dtype)
    d_hidden_LR = F.grouped_mm(d_y_LO, B_SOR, offs=group.ends_S)
    if d_x_LI is not None:
        d_x_LI.add_(F.grouped_mm(d_hidden_LR, A_SRI, offs=group.ends_S))
    if not any(wanted):
        return [None] * len(wanted)
    kind = group.spans[0].update.A.dtype
    d_A_SRI = F.grouped_mm(d_hidden_LR.t(), x_LI, offs=group.ends_S).to(kind)
    d_B_SOR = F.grouped_mm(d_y_LO.t(), hidden_LR, offs=group.ends_S).to(kind)
    views, factors = list[Tensor](), list[float]()
    for span, d_A_RI, d_B_OR in zip(group.spans, d_A_SRI.unbind(), d_B_SOR.unbind(), strict=True):
        rank = span.update.A.shape[0]
        views += [d_A_RI[:rank], d_B_OR[:, :rank]]
        factors += [1.0, span.update.scale]
    # out of place: a gradient that looks at the group's would keep it in memory as long as its trial's batch takes
    return list(torch._foreach_mul(views, factors))


def _wider(matrix: Tensor, rank: int, *, dim: int) -> Tensor:
    """Returns the matrix with zeros up to a rank along a dimension."""
    missing = rank - matrix.shape[dim]
    if not missing:
        return matrix
    return F.pad(matrix, (0, 0, 0, missing) if dim == 0 else (0, missing))


def _inputs(x_LI: Tensor, mask_LI: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns the inputs of a span (L, I) as the update sees them; a mask is applied again rather than kept applied."""
    return (x_LI if mask_LI is None else x_LI * mask_LI).to(dtype)
