"""Dropout masks that depend on where they stand, not on what was drawn before.

A mask is a function of (trial seed, optimizer step, example, module). Recomputation under gradient checkpointing, the
order of segments in the row, neighbours and a resume therefore cannot change it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_study.seeds import key


def keep_mask(
    *, seed: int, step: int, example: int, module: str, length: int, width: int, probability: float, like: Tensor
) -> Tensor:
    """Returns (length, width) in the type of `like`: 0 where dropped, else 1 / (1 - probability).

    Args:
        seed: the trial's.
        step: optimizer steps taken before this one.
        example: index of the example in the data.
        module: full name of the linear layer, layer number included.
        length: tokens of the example.
        width: inputs of the layer.
        probability: of dropping.
        like: gives device and dtype.
    """
    generator = torch.Generator(device=like.device).manual_seed(key(seed, step, example, module))
    draw = torch.rand((length, width), generator=generator, device=like.device)
    return (draw >= probability).to(like.dtype).mul_(1.0 / (1.0 - probability))
