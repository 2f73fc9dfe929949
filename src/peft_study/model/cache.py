"""Keys and values of the sequences that are being continued: each gets one token a step.

    keys of sequence b:  [ prefix: P ][ prompt ][ answer so far ][ its new token ][ room ]
    mask:                a query sees the keys of its own sequence, up to its own token

Shape legend: B sequences, H query heads, G key/value heads, h = H / G, K keys that there is room for, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_study.model.scores import weights


@dataclass(slots=True)
class KeyValueCache:
    """The cache of a batch; given to the model's forward as ``segments=`` with a row of B new tokens.

    Attributes:
        keys, values: (layers, B, G, K, D).
        lengths_B: keys that each sequence has, its prefix included: the position of its next token.
    """

    keys: Tensor
    values: Tensor
    lengths_B: Tensor
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> KeyValueCache:
        """Returns a cache of (layers, B, G, K, D) with no keys."""
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(keys, values, torch.zeros(shape[1], dtype=torch.long, device=device))

    def fill(self, sequence: int, start: int, layer: int, key_GLD: Tensor, value_GLD: Tensor) -> None:
        """Puts the keys and values of L tokens of a sequence at its place `start`."""
        places = slice(start, start + key_GLD.shape[1])
        self.keys[layer, sequence, :, places] = key_GLD
        self.values[layer, sequence, :, places] = value_GLD

    def attend(
        self,
        layer: int,
        query_HBD: Tensor,
        key_GBD: Tensor,
        value_GBD: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks_H: Tensor | None,
    ) -> Tensor:
        """Adds the new token's key and value of each sequence, and attends from it; returns (B, H, D).

        Window, cap and sinks are those of `segment_attention`.
        """
        heads, batch, size = query_HBD.shape
        groups = key_GBD.shape[0]
        index_B = torch.arange(batch, device=query_HBD.device)
        for cache, new_GBD in ((self.keys[layer], key_GBD), (self.values[layer], value_GBD)):
            cache[index_B, :, self.lengths_B] = new_GBD.transpose(0, 1)
        mask_B11K = self._mask(window)
        used = mask_B11K.shape[-1]
        key_BGKD, value_BGKD = self.keys[layer][:, :, :used], self.values[layer][:, :, :used]
        query_BGhD = query_HBD.transpose(0, 1).reshape(batch, groups, heads // groups, size)
        if softcap is None and sinks_H is None:
            out = F.scaled_dot_product_attention(query_BGhD, key_BGKD, value_BGKD, attn_mask=mask_B11K, scale=scale)
            return out.reshape(batch, heads, size)
        scores_BGhK = torch.matmul(query_BGhD * scale, key_BGKD.transpose(2, 3))
        sinks_Gh1 = None if sinks_H is None else sinks_H.reshape(groups, heads // groups, 1)
        weights_BGhK = weights(scores_BGhK, mask_B11K, softcap, sinks_Gh1)
        return torch.matmul(weights_BGhK.to(value_BGKD.dtype), value_BGKD).reshape(batch, heads, size)

    def advance(self) -> None:
        """Makes room for the next token, when every layer has seen this one."""
        self.lengths_B += 1
        self._masks = {}

    def keep(self, sequences_B: Tensor) -> None:
        """Drops all sequences but these, which stay in this order."""
        self.keys = self.keys[:, sequences_B]  # one after the other: the memory holds one copy at a time
        self.values = self.values[:, sequences_B]
        self.lengths_B, self._masks = self.lengths_B[sequences_B], {}

    def _mask(self, window: int | None) -> Tensor:
        """Returns (B, 1, 1, K) booleans over the keys in use: made once for a step, every layer asks."""
        if window not in self._masks:
            index_K = torch.arange(int(self.lengths_B.max()) + 1, device=self.lengths_B.device)
            allowed_BK = index_K <= self.lengths_B[:, None]
            if window is not None:
                allowed_BK = allowed_BK & (index_K > self.lengths_B[:, None] - window)
            self._masks[window] = allowed_BK[:, None, None]
        return self._masks[window]
