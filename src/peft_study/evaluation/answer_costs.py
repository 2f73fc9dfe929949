"""Measures what an answer costs a system: its first token, those after it, and the keys and values that are kept."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from peft_study.engine.row import RowRunner
from peft_study.evaluation.answering import decoder
from peft_study.evaluation.decoding import DecodingRequest
from peft_study.evaluation.scores import AnswerCost
from peft_study.methods.base import Adapter

TOKENS = 32
"""Tokens after the first that the speed is measured over."""
REPEATS = 3


def measure_cost(runner: RowRunner, adapter: Adapter, prompt: Sequence[int]) -> AnswerCost:
    """Returns what an answer to a prompt costs; once before it is measured the model runs unmeasured.

    Args:
        runner: of the base, which packs rows.
        adapter: that answers.
        prompt: tokens.
    """
    base = runner.base

    def seconds(most: int) -> float:
        request = DecodingRequest(adapter, prompt, most)
        ((_, found),) = decoder(runner, frozenset()).answers([request])
        return found.seconds

    seconds(2)
    first = statistics.median(seconds(1) for _ in range(REPEATS))
    whole = statistics.median(seconds(1 + TOKENS) for _ in range(REPEATS))
    kept = adapter.prefix_tokens + adapter.row_tokens + len(prompt)
    size = 2 * base.layers * base.kv_heads * base.head_dim * base.dtype.itemsize
    return AnswerCost(len(prompt), first, TOKENS / max(whole - first, 1e-9), kept * size)
