"""What is handed to the variable-length kernel, with the kernel replaced by its definition: no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_study.model import attention
from peft_study.model.attention import Segment, SegmentLayout, segment_attention

H, G, D, LAYERS = 4, 2, 8, 2


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[Tensor, Tensor], scale: float, left: int
) -> Tensor:
    """Queries (T, H, D) and keys (K, H, D) in packed segments; causal, aligned bottom-right, `left` keys back."""
    out = []
    for i in range(len(bounds[0]) - 1):
        q = query[bounds[0][i] : bounds[0][i + 1]]
        k, v = (x[bounds[1][i] : bounds[1][i + 1]] for x in (key, value))
        rank = torch.arange(len(k) - len(q), len(k))[:, None]
        index = torch.arange(len(k))
        allowed = (index <= rank) & ((index >= rank - left) if left >= 0 else torch.tensor(True))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v))
    return torch.cat(out)


def new_kernel(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool = False, num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    assert num_splits == 1
    assert window_size[1] == 0
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert enable_gqa
    key, value = (x.repeat_interleave(H // G, dim=1) for x in (key, value))
    return by_definition(query, key, value, (cu_seq_q, cu_seq_k), scale, window_size[0])


def old_kernel(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    is_causal: bool, scale: float,
) -> Tensor:  # fmt: skip
    assert is_causal
    assert key.shape[1] == H
    return by_definition(query, key, value, (cu_seq_q, cu_seq_k), scale, -1)


@pytest.fixture(params=[new_kernel, old_kernel], ids=["torch 2.13", "before window_size"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tensor]]:
    monkeypatch.setattr(attention, "varlen_attn", request.param)
    attention._varlen_options.cache_clear()
    yield request.param
    attention._varlen_options.cache_clear()


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("prefix", [0, 3])
def test_the_kernel_gets_what_the_loop_over_segments_computes(
    kernel: Any, window: int | None, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel is old_kernel:
        window = None  # it has none, and the code says so
    generator = torch.Generator().manual_seed(0)
    lengths, start, segments = [5, 1, 9], 0, []
    for number, length in enumerate(lengths):
        segments.append(Segment(start, start + length, slot=number % 2))
        start += length
    shapes = [(1, heads, start, D) for heads in (H, G, G)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    stack = torch.randn(LAYERS, 2, G, prefix, D, generator=generator)
    layout = SegmentLayout(tuple(segments), {1: stack} if prefix else {})
    module = SimpleNamespace(layer_idx=1)
    loop, _ = segment_attention(module, query, key, value, None, sliding_window=window, segments=layout)
    monkeypatch.setattr(attention, "_varlen_serves", lambda *_: True)
    fused, _ = segment_attention(module, query, key, value, None, sliding_window=window, segments=layout)
    assert fused.shape == loop.shape == (1, start, H, D)
    assert torch.allclose(fused, loop, atol=1e-5)
