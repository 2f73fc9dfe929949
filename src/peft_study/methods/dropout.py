"""Dropout masks that depend on where they stand, not on what was drawn before.

A mask is a function of (trial seed, optimizer step, example, module). Recomputation under gradient checkpointing, the
order of segments in the row, neighbours and a resume therefore cannot change it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from peft_study.seeds import key


@dataclass(frozen=True, slots=True)
class DropoutKey:
    """What a dropout mask depends on beside the module.

    Attributes:
        seed: the trial's.
        step: optimizer steps taken before this one.
        example: its index in the data.
        length: its tokens in the row.
    """

    seed: int
    step: int
    example: int
    length: int


def keep_mask(at: DropoutKey, module: str, probability: float, x: Tensor) -> Tensor:
    """Returns (length, width): False where an input is dropped.

    Args:
        at: the trial, step and example.
        module: full name of the linear layer, layer number included.
        probability: of dropping.
        x: inputs of the layer (..., width); give width and device.
    """
    draw = torch.empty((at.length, x.shape[-1]), device=x.device)
    if not isinstance(x, FakeTensor):  # memory is counted for cards that are not there to draw on
        seed = key(at.seed, at.step, at.example, module)
        draw.uniform_(generator=torch.Generator(device=x.device).manual_seed(seed))
    return draw >= probability
