"""From attention scores to weights, where they are capped or stand beside sinks: no kernel serves those."""

from __future__ import annotations

import torch
from torch import Tensor


def weights(scores: Tensor, allowed: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Returns the weights (..., K), float32, of scores (..., K).

    Args:
        scores: scaled products of queries and keys.
        allowed: which keys a query sees; broadcasts to the scores.
        softcap: scores are kept within it by tanh.
        sinks: a score a head that takes part without a value (gpt-oss); broadcasts to (..., 1).
    """
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    keys = scores.shape[-1]
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    return scores.softmax(-1, dtype=torch.float32)[..., :keys]
