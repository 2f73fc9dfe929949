"""The adapted layer by hand equals autograd's, adds where it should, and keeps each adapter to its span."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from peft_study.methods import low_rank
from peft_study.methods.base import LowRank
from peft_study.methods.low_rank import SpanUpdate

T, I, O = 11, 6, 5  # noqa: E741


def spans(*, masked: bool) -> list[SpanUpdate]:
    generator = torch.Generator().manual_seed(0)

    def update(rank: int, scale: float) -> LowRank:
        A, B = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((rank, I), (O, rank)))
        return LowRank(A.requires_grad_(), B.requires_grad_(), scale)

    mask = (torch.rand(4, I, generator=generator, dtype=torch.float64) > 0.5).double() * 2
    return [SpanUpdate(1, 5, update(3, 0.5), mask if masked else None), SpanUpdate(7, 11, update(2, 2.0))]


def layer() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(I, O, dtype=torch.float64).requires_grad_(False)


def plain(x: Tensor, base: nn.Linear, given: list[SpanUpdate]) -> Tensor:
    y = base(x)
    out = [y[0]]
    for span in given:
        inputs = x[0, span.start : span.end] if span.mask_LI is None else x[0, span.start : span.end] * span.mask_LI
        change = span.update.scale * inputs @ span.update.A.T @ span.update.B.T
        out.append(torch.cat([torch.zeros(span.start, O), change, torch.zeros(T - span.end, O)]))
    return torch.stack(out).sum(0)[None]


def run(way: str, x: Tensor, base: nn.Linear, given: list[SpanUpdate]) -> Tensor:
    if way == "linear":
        return low_rank.linear(x, base.weight, base.bias, given)
    y = base(x)
    return low_rank.add(x, y if way == "add" else y.view(1, T, O), given)


def leaves(x: Tensor, given: list[SpanUpdate]) -> list[Tensor]:
    return [x, *(matrix for span in given for matrix in (span.update.A, span.update.B))]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", ["linear", "add", "add to a view"])
def test_output_and_gradients_are_autograds(way: str, masked: bool) -> None:
    given, base = spans(masked=masked), layer()
    x = torch.randn(1, T, I, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found, expected = run(way, x, base, given), plain(x, base, given)
    assert torch.allclose(found, expected, atol=1e-12)
    weight = torch.randn(found.shape, dtype=found.dtype)
    ours = torch.autograd.grad((found * weight).sum(), leaves(x, given))
    theirs = torch.autograd.grad((expected * weight).sum(), leaves(x, given))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_inputs_without_gradient_and_frozen_matrices_get_none() -> None:
    given, base = spans(masked=False), layer()
    given[0].update.A.requires_grad_(False)
    x = torch.randn(1, T, I, dtype=torch.float64)
    low_rank.linear(x, base.weight, None, given).sum().backward()
    assert x.grad is None
    assert given[0].update.A.grad is None
    assert given[0].update.B.grad is not None


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("way", ["linear", "add"])
def test_what_is_not_finite_stays_in_its_span(way: str, poison: float) -> None:
    given, base = spans(masked=True), layer()
    x = torch.randn(1, T, I, dtype=torch.float64).requires_grad_()
    healthy = run(way, x, base, given)
    well = torch.autograd.grad(healthy.sum(), leaves(x, given))
    with torch.no_grad():
        given[0].update.B.fill_(poison)
    sick = run(way, x, base, given)
    gradients = torch.autograd.grad(sick.sum(), leaves(x, given))
    others = torch.ones(T, dtype=torch.bool)
    others[1:5] = False
    assert not sick[0, 1:5].isfinite().any()
    assert torch.equal(sick[0, others], healthy[0, others])
    assert torch.equal(gradients[0][0, others], well[0][0, others])
    for a, b in zip(gradients[3:], well[3:], strict=True):
        assert torch.equal(a, b)
