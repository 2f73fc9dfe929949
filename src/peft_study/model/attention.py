"""Attention that never crosses a segment: the packed row's entry into transformers' attention registry.

A row of T tokens is cut into segments; segment i owns queries [start, end) and sees

    keys:  [ prefix of its trial: P ][ its own tokens: end - start ]
    mask:  causal, aligned bottom-right: query j sees the whole prefix and tokens 0..j of its segment

Shape legend: T tokens of the row, L of a segment, H query heads, G key/value heads, P prefix tokens, D head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from peft_study.model.cache import KeyValueCache
from peft_study.model.cpu import causal
from peft_study.model.scores import weights

Ids = npt.NDArray[np.int64]

NAME = "peft_study_segments"
"""Name under which the function is registered."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One example of one trial: tokens [start, end) of the row, virtual tokens of prompt tuning included."""

    start: int
    end: int
    slot: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(slots=True)
class SegmentLayout:
    """A row's segments and prefixes; given to the model's forward as ``segments=``.

    Attributes:
        segments: in row order, together covering the row.
        prefixes: slot -> (layers, 2, G, P, D) keys and values that the slot's segments see before their own.
        captured: where not None, every layer appends the (keys, values) it computed, each (G, T, D).
        windows: where not None, every layer appends the window that it was given.
        index: what `kernel_index` returns, on the row's device; None: made when a layer first asks.
    """

    segments: tuple[Segment, ...]
    prefixes: dict[int, Tensor] = field(default_factory=dict)
    captured: list[tuple[Tensor, Tensor]] | None = None
    windows: list[int | None] | None = None
    index: tuple[Tensor, Tensor, Tensor] | None = None
    _by_layer: dict[int, tuple[Tensor, ...]] = field(init=False)
    _bounds: tuple[Tensor, Tensor, int, int] | None = None
    _stacks: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        # cut once: autograd would make a whole stack of zeros for the gradient of each layer's part
        self._by_layer = {slot: stack.unbind() for slot, stack in self.prefixes.items()}

    def prefixes_of(self, layer: int) -> dict[int, Tensor]:
        """Returns slot -> (2, G, P, D) keys and values of a layer."""
        return {slot: parts[layer] for slot, parts in self._by_layer.items()}

    def behind_prefixes(self, layer: int, key_GTD: Tensor, value_GTD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (K, G, D) keys and values of the row, those of its prefix before each segment's own.

        All are gathered by one index, whatever the number of segments; it is made once a row.
        """
        own = key_GTD.transpose(0, 1), value_GTD.transpose(0, 1)
        if not self.prefixes:
            return own
        if self._stacks is None:
            self._stacks = _by_layer_and_kind(list(self.prefixes.values()))
        places_K, _, _ = self._index_on(key_GTD.device)
        key_KGD, value_KGD = (torch.cat([self._stacks[2 * layer + n], x])[places_K] for n, x in enumerate(own))
        return key_KGD, value_KGD

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
        """Returns where queries and keys of each segment begin and end (N + 1,), int32, and the longest of each.

        Made once for a row: every layer asks.
        """
        if self._bounds is None:
            _, queries, keys = (x.to(torch.int32) for x in self._index_on(device))
            own = self._prefix_tokens
            longest = max(len(s) for s in self.segments), max(len(s) + own.get(s.slot, 0) for s in self.segments)
            self._bounds = (queries, keys, *longest)
        return self._bounds

    @property
    def _prefix_tokens(self) -> dict[int, int]:
        return {slot: stack.shape[3] for slot, stack in self.prefixes.items()}

    def _index_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if self.index is None:
            places_K, *ends = (torch.from_numpy(x).to(device) for x in kernel_index(self.segments, self._prefix_tokens))
            self.index = places_K, ends[0], ends[1]
        return self.index


def kernel_index(segments: Sequence[Segment], prefix_tokens: Mapping[int, int]) -> tuple[Ids, Ids, Ids]:
    """Returns what the kernel of variable lengths is told of a row, int64.

    Args:
        segments: in row order.
        prefix_tokens: slot -> length of its prefix, of those that have one, in the order of their keys.

    Returns:
        Of each key (K,) its place among all prefixes, one after another, and then the row's own; where the queries
        (N + 1,) and the keys (N + 1,) of each segment begin and end.
    """
    prefixes = one_after_another(prefix_tokens)
    count = sum(prefix_tokens.values())
    pieces, queries, keys = [], [0], [0]
    for segment in segments:
        prefix = prefixes.get(segment.slot, range(0))
        pieces += [np.arange(prefix.start, prefix.stop), np.arange(count + segment.start, count + segment.end)]
        queries.append(len(segment))
        keys.append(len(prefix) + len(segment))
    return np.concatenate(pieces), np.cumsum(queries), np.cumsum(keys)


def one_after_another(lengths: Mapping[int, int]) -> dict[int, range]:
    """Returns for each slot the places of what it has so many of, where all stand one after another."""
    ends = accumulate(lengths.values())
    return {slot: range(end - length, end) for (slot, length), end in zip(lengths.items(), ends, strict=True)}


def register() -> None:
    """Registers the segment attention with transformers, without a mask function: it then makes no masks.

    The layout carries all that a mask would say; looking for packed sequences would wait for the device.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, segment_attention)


def segment_attention(
    module: Any,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    segments: SegmentLayout | KeyValueCache | None = None,
    **_ignored: Any,
) -> tuple[Tensor, None]:
    """Attends within each segment of the row; the signature is that of transformers' attention functions.

    The window counts keys, the token's own included, as in transformers; prefix keys count with positions 0..P-1.
    `s_aux` (H,) holds a score a head that takes part in the softmax without a value (gpt-oss's sinks). Dropout on
    attention weights is not applied: the base is frozen and evaluated as it is. With a cache the row has the next token
    of each of its sequences.

    Returns:
        (1, T, H, D) and None in place of attention weights.
    """
    assert segments is not None, "segment attention needs the layout of the row"
    assert query_1HTD.shape[0] == 1, "a packed batch is one row"
    layer = module.layer_idx
    scale = scaling if scaling is not None else query_1HTD.shape[-1] ** -0.5
    if isinstance(segments, KeyValueCache):
        new = query_1HTD[0], key_1GTD[0], value_1GTD[0]
        return segments.attend(layer, *new, scale, sliding_window, softcap, s_aux)[None], None
    if segments.captured is not None:
        segments.captured.append((key_1GTD[0].detach(), value_1GTD[0].detach()))
    if segments.windows is not None:
        segments.windows.append(sliding_window)
    if _varlen_serves(query_1HTD, value_1GTD, softcap, s_aux):
        out_THD = _varlen(query_1HTD[0], key_1GTD[0], value_1GTD[0], segments, layer, scale, sliding_window)
        return out_THD.unsqueeze(0), None
    prefixes = segments.prefixes_of(layer)
    if _products_serve(query_1HTD, softcap, s_aux):
        places = {slot: number for number, slot in enumerate(prefixes)}
        pieces = [causal.Piece(s.start, s.end, places.get(s.slot)) for s in segments.segments]
        stacks = list(prefixes.values())
        out_THD = causal.attend(query_1HTD[0], key_1GTD[0], value_1GTD[0], pieces, stacks, scale, sliding_window)
        return out_THD.unsqueeze(0), None
    pieces_HLD = []
    for segment in segments.segments:
        span = slice(segment.start, segment.end)
        query, key, value = query_1HTD[0, :, span], key_1GTD[0, :, span], value_1GTD[0, :, span]
        prefix = prefixes.get(segment.slot)
        if prefix is not None:
            key, value = torch.cat([prefix[0], key], dim=1), torch.cat([prefix[1], value], dim=1)
        pieces_HLD.append(_attend(query, key, value, scale, sliding_window, softcap, s_aux))
    return torch.cat(pieces_HLD, dim=1).transpose(0, 1).unsqueeze(0), None


def _attend(
    query_HLD: Tensor,
    key_GKD: Tensor,
    value_GKD: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Attends in one segment whose K = P + L keys end where its queries end; returns (H, L, D).

    Serves scores that are capped or beside sinks, and devices without a kernel of variable lengths.
    """
    groups = query_HLD.shape[0] // key_GKD.shape[0]
    queries, keys = query_HLD.shape[1], key_GKD.shape[1]
    if groups > 1:
        key_GKD, value_GKD = (x.repeat_interleave(groups, dim=0) for x in (key_GKD, value_GKD))
    window = window if window is not None and keys > window else None
    if softcap is None and sinks_H is None:
        plain = queries == keys and window is None
        mask = None if plain else _bottom_right_causal(queries, keys, window, query_HLD.device)
        return F.scaled_dot_product_attention(
            query_HLD[None], key_GKD[None], value_GKD[None], attn_mask=mask, is_causal=plain, scale=scale
        )[0]
    allowed_LK = _bottom_right_causal(queries, keys, window, query_HLD.device)
    scores_HLK = torch.matmul(query_HLD * scale, key_GKD.transpose(1, 2))
    sinks_H11 = None if sinks_H is None else sinks_H[:, None, None]
    weights_HLK = weights(scores_HLK, allowed_LK, softcap, sinks_H11)
    return torch.matmul(weights_HLK.to(value_GKD.dtype), value_GKD)


def _products_serve(query_1HTD: Tensor, softcap: float | None, sinks_H: Tensor | None) -> bool:
    """True where our own products (model/cpu/causal.py) run: on CPU they beat the fused kernel at every length."""
    return query_1HTD.device.type == "cpu" and softcap is None and sinks_H is None


def _bottom_right_causal(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Returns (L, K) booleans: query i stands at key index K - L + i and sees no later key, and at most `window`."""
    rank_L1 = torch.arange(keys - queries, keys, device=device)[:, None]
    index_K = torch.arange(keys, device=device)
    allowed = index_K <= rank_L1
    return allowed if window is None else allowed & (index_K > rank_L1 - window)


def _varlen_serves(query_1HTD: Tensor, value_1GTD: Tensor, softcap: float | None, sinks_H: Tensor | None) -> bool:
    """True where the variable-length kernel can run: half precision on an Ampere card or later, plain scores.

    Values of another head size than the queries' (latent attention) are none for it.
    """
    size = query_1HTD.shape[-1]
    return (
        query_1HTD.is_cuda
        and query_1HTD.dtype in (torch.bfloat16, torch.float16)
        and size <= 256
        and value_1GTD.shape[-1] == size
        and size % 8 == 0
        and softcap is None
        and sinks_H is None
        and torch.cuda.get_device_capability(query_1HTD.device) >= (8, 0)
    )


def _varlen(
    query_HTD: Tensor,
    key_GTD: Tensor,
    value_GTD: Tensor,
    layout: SegmentLayout,
    layer: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attends over the whole row in one kernel; returns (T, H, D).

    The kernel aligns the causal mask bottom-right where keys outnumber queries, which is what a prefix needs.
    """
    groups = query_HTD.shape[0] // key_GTD.shape[0]
    # the kernel of torch 2.11 has fewer arguments than that of 2.13
    state = _varlen_options()
    options: dict[str, Any] = {"scale": scale}
    if "window_size" in state:
        # the kernel counts keys to the left of the token's own
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        assert window is None, "this torch has no sliding window in varlen_attn"
        options["is_causal"] = True
    if "num_splits" in state:
        options["num_splits"] = 1  # the same bits whatever the neighbours are
    key_KGD, value_KGD = layout.behind_prefixes(layer, key_GTD, value_GTD)
    if groups > 1:
        if "enable_gqa" in state:
            options["enable_gqa"] = True
        else:
            key_KGD, value_KGD = (x.repeat_interleave(groups, dim=1) for x in (key_KGD, value_KGD))
    bounds_q, bounds_k, longest_q, longest_k = layout.bounds(query_HTD.device)
    out = varlen_attn(
        query_HTD.transpose(0, 1).contiguous(),
        key_KGD.contiguous(),
        value_KGD.contiguous(),
        bounds_q,
        bounds_k,
        longest_q,
        longest_k,
        **options,
    )
    assert isinstance(out, Tensor), "nothing beside the output was asked for"
    return out


def _by_layer_and_kind(stacks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the (P, G, D) keys, then values, of each layer, P over all prefixes."""
    return torch.cat(list(stacks), dim=3).transpose(2, 3).flatten(0, 1).unbind()


@functools.cache
def _varlen_options() -> frozenset[str]:
    """Returns the names of the kernel's arguments in the torch that is installed."""
    return frozenset(inspect.signature(varlen_attn).parameters)
