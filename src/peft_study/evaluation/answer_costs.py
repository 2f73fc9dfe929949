"""What an answer costs a system: time to its first token, tokens a second after that, bytes of keys and values."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peft_study.engine.row import RowRunner
from peft_study.evaluation.answering import decoder
from peft_study.evaluation.decoding import DecodingRequest
from peft_study.methods.base import Adapter
from peft_study.storage.files import atomic_writer

COSTS = "costs.json"
TOKENS = 32
"""Tokens after the first that the speed is measured over."""
REPEATS = 3


@dataclass(frozen=True, slots=True)
class AnswerCost:
    """Of one prompt, answered alone.

    Attributes:
        prompt_tokens: of the prompt, worked examples included; without virtual ones.
        first_token: seconds from the prompt to the first token, median of 3.
        tokens_per_second: after the first, median of 3.
        cache_bytes: keys and values of the prompt and of the virtual tokens.
    """

    prompt_tokens: int
    first_token: float
    tokens_per_second: float
    cache_bytes: int


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


def read_costs(folder: Path) -> dict[str, AnswerCost]:
    """Returns the costs that an evaluation has kept, by system."""
    path = folder / COSTS
    return {name: AnswerCost(**cost) for name, cost in json.loads(path.read_text()).items()} if path.exists() else {}


def write_costs(folder: Path, costs: Mapping[str, AnswerCost]) -> None:
    """Writes costs by system into the folder of an evaluation.

    Raises:
        OutputError: when they cannot be written.
    """
    with atomic_writer(folder / COSTS) as file:
        file.write(json.dumps({name: asdict(cost) for name, cost in costs.items()}, indent=1) + "\n")
