"""Attention by hand on CPU equals plain attention of each segment, gradients included, and keeps to its segment."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peft_study.model.cpu import causal
from peft_study.model.cpu.causal import Piece

H, G, D = 6, 2, 8


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """One segment, all keys: (H, L, D) x (G, K, D)."""
    key, value = (x.repeat_interleave(H // G, dim=0) for x in (key, value))
    queries, keys = query.shape[1], key.shape[1]
    rank, index = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    allowed = index <= rank
    if window is not None:
        allowed &= index > rank - window
    scores = (query @ key.transpose(1, 2) * scale).masked_fill(~allowed, -math.inf)
    return scores.softmax(-1) @ value


def inputs(tokens: int, prefixes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, H, D), (tokens, G, D), (tokens, G, D)]
    made = [torch.randn(s, generator=generator, dtype=torch.float64).transpose(0, 1) for s in shapes]  # as models do
    made += [torch.randn(2, G, p, D, generator=generator, dtype=torch.float64) for p in prefixes]
    return [x.to(dtype).requires_grad_() for x in made]


def expected(pieces: list[Piece], tensors: list[Tensor], scale: float, window: int | None) -> Tensor:
    query, key, value, *prefixes = tensors
    out = []
    for piece in pieces:
        own = slice(piece.start, piece.end)
        keys, values = key[:, own], value[:, own]
        if piece.prefix is not None:
            keys, values = (
                torch.cat([b, x], dim=1) for b, x in zip(prefixes[piece.prefix], (keys, values), strict=True)
            )
        out.append(plain(query[:, own], keys, values, scale, window))
    return torch.cat(out, dim=1).transpose(0, 1)


PIECES = [Piece(0, 5, None), Piece(5, 6, 0), Piece(6, 30, 1), Piece(30, 52, 0), Piece(52, 60, None)]


@pytest.mark.parametrize("window", [None, 1, 4, 16])
@pytest.mark.parametrize(("block", "kept"), [(128, 512), (7, 512), (7, 10), (1, 0)])
def test_output_and_gradients_are_those_of_plain_attention(
    window: int | None, block: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal, "BLOCK", block)
    monkeypatch.setattr(causal, "KEPT", kept)
    tensors = inputs(60, (3, 9))
    out = causal.attend(*tensors[:3], PIECES, tensors[3:], 0.3, window)
    reference = expected(PIECES, tensors, 0.3, window)
    assert torch.allclose(out, reference, atol=1e-12)
    weight = torch.randn(out.shape, dtype=out.dtype)
    found = torch.autograd.grad((out * weight).sum(), tensors)
    for ours, theirs in zip(found, torch.autograd.grad((reference * weight).sum(), tensors), strict=True):
        # several blocks of a segment are summed in float32
        assert torch.allclose(ours, theirs, atol=1e-6, rtol=1e-6)


def test_bfloat16_is_as_near_as_its_rounding() -> None:
    tensors = inputs(300, (), torch.bfloat16)
    pieces = [Piece(0, 290, None), Piece(290, 300, None)]
    out = causal.attend(*tensors, pieces, [], 0.35)
    reference = expected(pieces, [x.detach().double() for x in tensors], 0.35, None)
    assert (out.double() - reference).norm() < 1e-2 * reference.norm()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("sick", range(5))
def test_what_is_not_finite_stays_in_its_segment(poison: float, sick: int) -> None:
    tensors = inputs(60, (3, 9))
    healthy = causal.attend(*tensors[:3], PIECES, tensors[3:], 0.3)
    well = torch.autograd.grad(healthy.sum(), tensors)
    own = slice(PIECES[sick].start, PIECES[sick].end)
    for number in range(3):
        poisoned = [x.detach().clone().requires_grad_() for x in tensors]
        with torch.no_grad():
            poisoned[number][:, own] = poison
        out = causal.attend(*poisoned[:3], PIECES, poisoned[3:], 0.3)
        others = torch.ones(60, dtype=torch.bool)
        others[own] = False
        assert torch.equal(out[others], healthy[others])
        gradients = torch.autograd.grad(out.sum(), poisoned)
        for found, before in zip(gradients[:3], well[:3], strict=True):
            assert torch.equal(found[:, others], before[:, others])


def test_tokens_see_no_later_token() -> None:
    tensors = [x.detach() for x in inputs(20, ())]
    before = causal.attend(*tensors, [Piece(0, 20, None)], [], 0.3)
    tensors[1][:, 11:] += 1.0
    after = causal.attend(*tensors, [Piece(0, 20, None)], [], 0.3)
    assert torch.equal(before[:11], after[:11])
    assert not torch.equal(before[11:], after[11:])


def test_values_may_be_narrower_than_keys() -> None:
    query, key, value = inputs(60, ())
    value = value.detach()[..., :5].clone().requires_grad_()
    pieces = [Piece(0, 25, None), Piece(25, 60, None)]
    out, reference = causal.attend(query, key, value, pieces, [], 0.3), expected(pieces, [query, key, value], 0.3, None)
    assert out.shape == (60, H, 5)
    for ours, theirs in zip(
        torch.autograd.grad(out.sum(), [query, key, value]),
        torch.autograd.grad(reference.sum(), [query, key, value]),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)
