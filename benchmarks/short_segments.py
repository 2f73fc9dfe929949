"""Attention of segments on CPU: the fused kernel against plain matrix products, 1,024 tokens in all.

python benchmarks/short_segments.py

Prints forward and backward milliseconds, medians of 7 after one to warm up.
"""

from __future__ import annotations

import statistics
import time
from unittest.mock import patch

import torch

from peft_study.model import attention

HEADS, SIZE = 9, 64


def seconds(length: int, count: int) -> float:
    """Returns forward and backward time of `count` segments of `length` tokens."""
    taken = []
    for _ in range(8):
        inputs = [[torch.randn(HEADS, length, SIZE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]]
        inputs *= count
        started = time.perf_counter()
        outputs = [attention._attend(q, k, v, SIZE**-0.5, None, None, None).sum() for q, k, v in inputs]
        torch.stack(outputs).sum().backward()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def main() -> None:
    """Prints a line a shape."""
    for length, count in ((70, 14), (200, 5), (512, 2), (1024, 1)):
        found = {}
        for name, products in (("fused", False), ("products", True)):
            with patch.object(attention, "_products_serve", lambda *_, chosen=products: chosen):
                found[name] = 1000 * seconds(length, count)
        print(f"{count} x {length}: fused {found['fused']:.0f} ms, products {found['products']:.0f} ms")


if __name__ == "__main__":
    main()
