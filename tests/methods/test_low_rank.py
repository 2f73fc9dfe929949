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
CARD_T, CARD_I, CARD_O = 40, 8, 16
"""Tokens of a row on a card, inputs and outputs."""


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


def ends_of(ends: tuple[int, ...]) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def run(way: str, x: Tensor, base: nn.Linear, given: list[SpanUpdate]) -> Tensor:
    groups = low_rank.grouped(given, x, ends_of)
    if way == "linear":
        return low_rank.linear(x, base.weight, base.bias, groups)
    y = base(x)
    return low_rank.add(x, y if way == "add" else y.view(1, T, O), groups)


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
    run("linear", x, base, given).sum().backward()
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


def on_a_card(dropout: bool = False) -> list[SpanUpdate]:
    """Returns neighbours of ranks 3, 8 and 5 (stacked as 8), of 9 and 16 (as 16), a gap, and one alone."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for start, end, rank, scale in (
        (2, 5, 3, 0.5),
        (5, 6, 8, 2.0),
        (6, 16, 5, 1.0),
        (16, 21, 9, 0.25),
        (21, 30, 16, 1.5),
        (32, 40, 16, 1.0),
    ):
        A, B = (torch.randn(shape, generator=generator) for shape in ((rank, CARD_I), (CARD_O, rank)))
        update = LowRank(A.requires_grad_(), B.requires_grad_(), scale)
        mask = torch.full((end - start, CARD_I), 2.0) if dropout and start == 5 else None
        found.append(SpanUpdate(start, end, update, mask))
    return found


@pytest.fixture
def grouped_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the path of a card: torch computes grouped products on CPU, too."""
    monkeypatch.setattr(low_rank, "grouped_products_serve", lambda *_: True)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.usefixtures("grouped_products")
def test_neighbours_of_like_rank_share_their_products(dropout: bool) -> None:
    x = torch.randn(1, CARD_T, CARD_I)
    groups = low_rank.grouped(on_a_card(dropout), x, ends_of)
    assert [len(group.spans) for group in groups] == ([1, 1, 1, 2, 1] if dropout else [3, 2, 1])
    assert [None if g.ends_S is None else g.ends_S.tolist() for g in groups][-2:] == [[5, 14], None]


@pytest.mark.parametrize("way", ["linear", "add"])
def test_grouped_products_are_those_of_each_span(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    given, base = on_a_card(), nn.Linear(CARD_I, CARD_O).requires_grad_(False)
    x, weight = torch.randn(1, CARD_T, CARD_I).requires_grad_(), torch.randn(1, CARD_T, CARD_O)
    found = []
    for serves in (False, True):
        monkeypatch.setattr(low_rank, "grouped_products_serve", lambda *_, serves=serves: serves)
        y = run(way, x, base, given)
        found.append([y, *torch.autograd.grad((y * weight).sum(), leaves(x, given))])
    for one, together in zip(*found, strict=True):
        torch.testing.assert_close(together, one, rtol=1e-5, atol=1e-5)
    for gradient in found[1][2:]:
        assert gradient.untyped_storage().nbytes() == gradient.nbytes, "it keeps the gradients of its whole group"


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.usefixtures("grouped_products")
def test_what_is_not_finite_stays_in_its_span_of_a_group(poison: float) -> None:
    torch.manual_seed(1)
    given, base = on_a_card(), nn.Linear(CARD_I, CARD_O).requires_grad_(False)
    x = torch.randn(1, CARD_T, CARD_I).requires_grad_()
    well = run("linear", x, base, given)
    expected = torch.autograd.grad(well.sum(), leaves(x, given))
    with torch.no_grad():
        given[1].update.A.fill_(poison)
        given[1].update.B.fill_(poison)
    sick = run("linear", x, base, given)
    found = torch.autograd.grad(sick.sum(), leaves(x, given))
    others = torch.ones(CARD_T, dtype=torch.bool)
    others[5:6] = False
    assert torch.equal(sick[0, others], well[0, others])
    assert torch.equal(found[0][0, others], expected[0][0, others])
    for number, (a, b) in enumerate(zip(found[1:], expected[1:], strict=True)):
        assert torch.equal(a, b) == (number not in (2, 3)), number
