"""Attention of short segments on CPU as plain matrix products, with a backward pass by hand.

The heads that share a key (grouped heads) become rows of one product, so that keys are never repeated; the queries of
a segment go in blocks that see only the keys before their own end:

    keys:     0 . . . . . . . . K           block 0:  rows of queries 0..B      x  keys 0..P+B
    queries:  [ block 0 | block 1 | .. ]    block 1:  rows of queries B..2B     x  keys 0..P+2B

Only the last columns of a block cross the diagonal and need a mask. No product spans two segments.

Shape legend: T tokens of the row, N queries of a block, K its keys, G key/value heads, R query heads of each,
H = G * R, P prefix tokens, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

BLOCK = 128
"""Queries of a block; smaller ones skip more of the masked half, larger ones make better products."""
KEPT = 512
"""Blocks with at most so many keys keep their weights for the backward pass; others compute them again."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A segment as this file sees it: queries [start, end) of the row, and which prefix stands before its keys."""

    start: int
    end: int
    prefix: int | None


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries [start, end) of the segment see its keys [first, last)."""

    start: int
    end: int
    first: int
    last: int


def attend(
    query_HTD: Tensor,
    key_GTD: Tensor,
    value_GTD: Tensor,
    pieces: Sequence[Piece],
    prefixes: Sequence[Tensor],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Returns (T, H, D): causal attention within each piece.

    Args:
        query_HTD: queries of the row; heads h * R .. h * R + R - 1 belong to key h.
        key_GTD: its keys.
        value_GTD: its values.
        pieces: together covering the row, in order.
        prefixes: (2, G, P, D) keys and values, by the pieces' `prefix`.
        scale: of the scores.
        window: a query sees at most so many keys, its own included.
    """
    out: Tensor = _Attention.apply(query_HTD, key_GTD, value_GTD, tuple(pieces), scale, window, *prefixes)
    return out


class _Attention(torch.autograd.Function):
    """The whole row, segment by segment: each segment's gradients come from its own products alone."""

    @staticmethod
    def forward(
        ctx: Any,
        query_HTD: Tensor,
        key_GTD: Tensor,
        value_GTD: Tensor,
        pieces: tuple[Piece, ...],
        scale: float,
        window: int | None,
        *prefixes: Tensor,
    ) -> Tensor:
        groups, tokens, _ = key_GTD.shape
        query_GTRD = _grouped(query_HTD, groups, scale)
        key_GTD, value_GTD = key_GTD.contiguous(), value_GTD.contiguous()
        out_TGRD = query_HTD.new_empty(tokens, groups, query_HTD.shape[0] // groups, value_GTD.shape[-1])
        kept: list[Tensor] = []
        keeps = any(ctx.needs_input_grad)
        for piece in pieces:
            key_GKD, value_GKD = _with_prefix(key_GTD, value_GTD, piece, prefixes)
            for block in _blocks(piece, key_GKD.shape[1], window):
                at = slice(piece.start + block.start, piece.start + block.end)
                rows_GND = query_GTRD[:, at].flatten(1, 2)
                weights_GNK = _weights(rows_GND, key_GKD, block, window)
                mixed_GND = torch.bmm(weights_GNK, value_GKD[:, block.first : block.last])
                out_TGRD[at] = mixed_GND.unflatten(1, (block.end - block.start, -1)).transpose(0, 1)
                if keeps and block.last - block.first <= KEPT:
                    kept.append(weights_GNK)
        ctx.pieces, ctx.scale, ctx.window = pieces, scale, window
        ctx.save_for_backward(query_GTRD, key_GTD, value_GTD, *prefixes, *kept)
        return out_TGRD.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.needs_input_grad) - 6
        query_GTRD, key_GTD, value_GTD, *rest = ctx.saved_tensors
        prefixes, kept = rest[:count], iter(rest[count:])
        groups, _, repeats, _ = query_GTRD.shape
        d_out_GTRD = gradients[0].unflatten(1, (groups, repeats)).transpose(0, 1).contiguous()
        d_query_GTRD = torch.empty_like(query_GTRD)
        d_key_GTD, d_value_GTD = torch.empty_like(key_GTD), torch.empty_like(value_GTD)
        d_prefixes: list[Tensor | None] = [None] * count
        for piece in ctx.pieces:
            key_GKD, value_GKD = _with_prefix(key_GTD, value_GTD, piece, prefixes)
            sums = _KeyGradients(key_GKD)
            for block in _blocks(piece, key_GKD.shape[1], ctx.window):
                at = slice(piece.start + block.start, piece.start + block.end)
                rows_GND, d_rows_GND = query_GTRD[:, at].flatten(1, 2), d_out_GTRD[:, at].flatten(1, 2)
                keys = slice(block.first, block.last)
                is_kept = block.last - block.first <= KEPT
                weights_GNK = next(kept) if is_kept else _weights(rows_GND, key_GKD, block, ctx.window)
                d_weights_GNK = torch.bmm(d_rows_GND, value_GKD[:, keys].transpose(1, 2))
                d_scores_GNK = torch._softmax_backward_data(d_weights_GNK, weights_GNK, -1, weights_GNK.dtype)
                d_query_GTRD[:, at] = torch.bmm(d_scores_GNK, key_GKD[:, keys]).unflatten(1, (-1, repeats))
                sums.add(
                    keys,
                    torch.bmm(d_scores_GNK.transpose(1, 2), rows_GND),
                    torch.bmm(weights_GNK.transpose(1, 2), d_rows_GND),
                )
            d_pair = sums.pair()
            own = slice(piece.start, piece.end)
            length = piece.end - piece.start
            d_key_GTD[:, own], d_value_GTD[:, own] = (x[:, -length:] for x in d_pair)
            if piece.prefix is not None:
                before = torch.stack([x[:, :-length].float() for x in d_pair])  # over many segments they are summed
                state = d_prefixes[piece.prefix]
                d_prefixes[piece.prefix] = before if state is None else state.add_(before)
        d_query_TGRD = torch.empty_like(query_GTRD.transpose(0, 1), memory_format=torch.contiguous_format)
        torch.mul(d_query_GTRD.transpose(0, 1), ctx.scale, out=d_query_TGRD)
        d_query_HTD = d_query_TGRD.flatten(1, 2).transpose(0, 1)
        return (
            d_query_HTD,
            d_key_GTD,
            d_value_GTD,
            None,
            None,
            None,
            *(None if x is None else x.to(key_GTD.dtype) for x in d_prefixes),
        )


class _KeyGradients:
    """Gradients of one segment's keys and values; several blocks are summed in float32."""

    def __init__(self, key_GKD: Tensor) -> None:
        self._like = key_GKD
        self._whole: tuple[Tensor, Tensor] | None = None
        self._sums: tuple[Tensor, Tensor] | None = None

    def add(self, keys: slice, d_key_GKD: Tensor, d_value_GKD: Tensor) -> None:
        """Adds what a block gives its keys."""
        if self._sums is None and self._whole is None and d_key_GKD.shape == self._like.shape:
            self._whole = (d_key_GKD, d_value_GKD)
            return
        if self._sums is None:
            zeros = torch.zeros(2, *self._like.shape, dtype=torch.float32, device=self._like.device)
            self._sums = (zeros[0], zeros[1])
        if self._whole is not None:
            (d_key, d_value), self._whole = self._whole, None
            self.add(slice(None), d_key, d_value)
        self._sums[0][:, keys] += d_key_GKD
        self._sums[1][:, keys] += d_value_GKD

    def pair(self) -> tuple[Tensor, Tensor]:
        """Returns the gradients of keys and values, each (G, K, D)."""
        pair = self._whole or self._sums
        assert pair is not None, "a segment has a block"
        return pair


def _grouped(query_HTD: Tensor, groups: int, scale: float) -> Tensor:
    """Returns the scaled queries as contiguous (G, T, R, D): the heads of a key are neighbouring rows."""
    split_GTRD = query_HTD.unflatten(0, (groups, -1)).transpose(1, 2)
    return torch.mul(split_GTRD, scale, out=torch.empty(split_GTRD.shape, dtype=split_GTRD.dtype))


def _with_prefix(key_GTD: Tensor, value_GTD: Tensor, piece: Piece, prefixes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the keys and values (G, P + L, D) that the piece sees."""
    key_GLD, value_GLD = key_GTD[:, piece.start : piece.end], value_GTD[:, piece.start : piece.end]
    if piece.prefix is None:
        return key_GLD, value_GLD
    before_key, before_value = prefixes[piece.prefix]
    return torch.cat([before_key, key_GLD], dim=1), torch.cat([before_value, value_GLD], dim=1)


def _blocks(piece: Piece, keys: int, window: int | None) -> list[_Block]:
    length = piece.end - piece.start
    before = keys - length
    blocks = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        first = 0 if window is None else max(0, before + start - window + 1)
        blocks.append(_Block(start, end, first, before + end))
    return blocks


def _weights(rows_GND: Tensor, key_GKD: Tensor, block: _Block, window: int | None) -> Tensor:
    """Returns the attention weights (G, N * R, K) of a block, in the precision of the queries."""
    scores_GNK = torch.bmm(rows_GND, key_GKD[:, block.first : block.last].transpose(1, 2))
    queries, keys = block.end - block.start, block.last - block.first
    repeats = rows_GND.shape[1] // queries
    # without a window in reach, all keys before the block's own are seen by all of its queries
    window = window if window is not None and keys > window else None
    masked = queries if window is None else keys
    # a tensor without numbers (model/weightless.py) must not stay for rows that have them
    bias = _bias.__wrapped__ if isinstance(rows_GND, FakeTensor) else _bias
    scores_GNK[:, :, -masked:] += bias(queries, masked, repeats, window, rows_GND.dtype)
    return torch.softmax(scores_GNK, dim=-1, out=scores_GNK)


@functools.lru_cache(maxsize=64)
def _bias(queries: int, keys: int, repeats: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Returns (N * R, K): 0 where a query sees a key, else -inf; the last query's own key is the last.

    Every layer of a row asks for the same few. Adding them is several times as fast as filling by a boolean mask.
    """
    rank_N1 = torch.arange(keys - queries, keys)[:, None]
    index_K = torch.arange(keys)
    allowed_NK = index_K <= rank_N1 if window is None else (index_K <= rank_N1) & (index_K > rank_N1 - window)
    bias_NK = torch.zeros(queries, keys, dtype=dtype).masked_fill_(~allowed_NK, float("-inf"))
    return bias_NK.repeat_interleave(repeats, dim=0)
