"""Attention of segments on CPU: the fused kernel against our own products, 1,024 tokens in all.

    python benchmarks/short_segments.py

Prints forward and backward milliseconds, medians of 7 after one to warm up.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from peft_study.model import attention
from peft_study.model.cpu import causal
from peft_study.model.cpu.causal import Piece

HEADS, KEYS, SIZE = 9, 3, 64


def fused(query_HTD: Tensor, key_GTD: Tensor, value_GTD: Tensor, pieces: list[Piece]) -> Tensor:
    """Returns the sum of what torch's kernel gives, segment by segment."""
    outputs = []
    for piece in pieces:
        own = slice(piece.start, piece.end)
        inputs = (x[:, own] for x in (query_HTD, key_GTD, value_GTD))
        outputs.append(attention._attend(*inputs, SIZE**-0.5, None, None, None).sum())
    return torch.stack(outputs).sum()


def products(query_HTD: Tensor, key_GTD: Tensor, value_GTD: Tensor, pieces: list[Piece]) -> Tensor:
    """Returns the same sum from our own products."""
    return causal.attend(query_HTD, key_GTD, value_GTD, pieces, [], SIZE**-0.5).sum()


def main() -> None:
    """Prints a line a shape."""
    for length, count in ((70, 14), (200, 5), (512, 2), (1024, 1)):
        pieces = [Piece(i * length, (i + 1) * length, None) for i in range(count)]
        taken: dict[str, list[float]] = {"fused": [], "products": []}
        for _ in range(8):
            for way in (fused, products):
                inputs = [
                    torch.randn(length * count, heads, SIZE, dtype=torch.bfloat16).transpose(0, 1).requires_grad_()
                    for heads in (HEADS, KEYS, KEYS)
                ]
                started = time.perf_counter()
                way(*inputs, pieces).backward()
                taken[way.__name__].append(1000 * (time.perf_counter() - started))
        found = {name: statistics.median(times[1:]) for name, times in taken.items()}
        print(f"{count} x {length}: fused {found['fused']:.0f} ms, products {found['products']:.0f} ms")


if __name__ == "__main__":
    main()
