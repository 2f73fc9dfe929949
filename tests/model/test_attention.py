"""Segment attention against a naive loop over queries, keys and heads."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_study.model import attention
from peft_study.model.attention import Segment, SegmentLayout, segment_attention

HEADS, KV_HEADS, SIZE = 4, 2, 8


def naive(
    query_HTD: Tensor,
    key_GTD: Tensor,
    value_GTD: Tensor,
    layout: SegmentLayout,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One query at a time, from the definition; returns (T, H, D)."""
    rows = []
    for segment in layout.segments:
        for i in range(segment.start, segment.end):
            heads = []
            for h in range(HEADS):
                g = h // (HEADS // KV_HEADS)
                keys = [(key_GTD[g, j], value_GTD[g, j]) for j in range(segment.start, i + 1)]
                if segment.slot in layout.prefixes:
                    prefix = layout.prefixes[segment.slot][layer]
                    keys = [(prefix[0, g, p], prefix[1, g, p]) for p in range(prefix.shape[2])] + keys
                if window is not None:
                    keys = keys[-window:]
                scores = torch.stack([query_HTD[h, i] @ key * scale for key, _ in keys])
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                heads.append(scores.softmax(0) @ torch.stack([value for _, value in keys]))
            rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("fused", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    prefix=st.integers(0, 5),
    window=st.one_of(st.none(), st.integers(1, 14)),
    softcap=st.one_of(st.none(), st.just(0.7)),
    scaling=st.one_of(st.none(), st.just(0.5)),
    seed=st.integers(0, 1000),
)
def test_attention_and_its_gradients_are_the_definition(
    fused: bool,
    lengths: list[int],
    prefix: int,
    window: int | None,
    softcap: float | None,
    scaling: float | None,
    seed: int,
) -> None:
    """With plain products (short segments on CPU) and with the fused kernel; slots 0 and 1, a prefix in slot 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    total, segments, start = sum(lengths), [], 0
    for number, length in enumerate(lengths):
        segments.append(Segment(start, start + length, slot=number % 2))
        start += length
    stack = draw(2, 2, KV_HEADS, prefix, SIZE)
    layout = SegmentLayout(tuple(segments), {1: stack} if prefix else {})
    query, key, value = draw(HEADS, total, SIZE), draw(KV_HEADS, total, SIZE), draw(KV_HEADS, total, SIZE)
    with pytest.MonkeyPatch.context() as patch:
        if fused:
            patch.setattr(attention, "_products_serve", lambda *_: False)
        out, weights = segment_attention(
            SimpleNamespace(layer_idx=1),
            query[None],
            key[None],
            value[None],
            None,
            scaling=scaling,
            sliding_window=window,
            softcap=softcap,
            segments=layout,
        )
    assert weights is None
    scale = SIZE**-0.5 if scaling is None else scaling
    expected = naive(query, key, value, layout, 1, scale, window, softcap)
    # softmax of the product form is taken in float32, whatever the inputs are
    torch.testing.assert_close(out[0], expected, rtol=1e-5, atol=1e-6)
    inputs = [query, key, value]
    direction = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((out[0] * direction).sum(), [*inputs, stack], allow_unused=True)
    wanted = torch.autograd.grad((expected * direction).sum(), [*inputs, stack], allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        theirs = torch.zeros(1) if theirs is None else theirs
        ours = torch.zeros_like(theirs) if ours is None else ours
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6


def test_the_window_counts_the_token_itself_and_the_prefix() -> None:
    allowed = attention._bottom_right_causal(3, 5, 2, torch.device("cpu"))
    assert allowed.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    allowed = attention._bottom_right_causal(2, 4, None, torch.device("cpu"))
    assert allowed.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_captured_keys_and_values_are_what_the_layer_computed() -> None:
    key, value = torch.randn(1, KV_HEADS, 4, SIZE), torch.randn(1, KV_HEADS, 4, SIZE)
    layout = SegmentLayout((Segment(0, 4, 0),), captured=[])
    query = torch.randn(1, HEADS, 4, SIZE)
    segment_attention(SimpleNamespace(layer_idx=0), query, key, value, None, segments=layout)
    assert layout.captured is not None
    assert torch.equal(layout.captured[0][0], key[0])
    assert torch.equal(layout.captured[0][1], value[0])


def test_a_row_of_bfloat16_stays_finite_with_large_scores() -> None:
    query = torch.full((1, HEADS, 3, SIZE), 30.0, dtype=torch.bfloat16)
    value = torch.ones((1, KV_HEADS, 3, SIZE), dtype=torch.bfloat16)
    layout = SegmentLayout((Segment(0, 3, 0),))
    out, _ = segment_attention(
        SimpleNamespace(layer_idx=0), query, query[:, :KV_HEADS], value, None, scaling=math.pi, segments=layout
    )
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.ones_like(out))
