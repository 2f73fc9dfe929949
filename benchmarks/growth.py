"""How the time per token grows: with slots, with rank, with the row's length, with the examples' length; a picture.

    python benchmarks/growth.py
    python benchmarks/growth.py --model llama-1b --rows 1024 2048 4096 8192 16384

Each measurement trains LoRA trials (r = 16 unless the rank is what grows) on examples of one length. Along the slots
every trial keeps its 128 tokens a step (--step-tokens), so that few trials leave the row short; along the other axes
one trial fills its row. Writes growth.jsonl and growth.png.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import pictures
from common import Rows, arguments, synchronize
from peers import LEARNING_RATE
from worlds import MODELS, adapter_of, examples_of_length, open_world, vocabulary_of

from peft_study.config import LoraConfig, TrainingConfig
from peft_study.engine.engine import Engine
from peft_study.engine.trial import Trial
from peft_study.model.load import Base


def time_per_token(
    base: Base, engine: Engine, *, slots: int, rank: int, row: int, length: int, step_tokens: int, repeats: int
) -> dict[str, float]:
    """Returns milliseconds per data token: the median of `repeats` steps of all trials after one to warm up."""
    engine.row_tokens = row
    batch = max(1, step_tokens // length)
    training = TrainingConfig(learning_rate=LEARNING_RATE, steps=repeats + 2, batch_size=batch)
    examples = examples_of_length(batch, length, vocabulary_of(base))
    config = LoraConfig(rank=rank, alpha=2 * rank)
    trials = [Trial(f"trial {i}", adapter_of(config, base, i), training, examples) for i in range(slots)]
    for trial in trials:
        engine.admit(trial)
    taken = [_step(engine, slots * batch * length) for _ in range(repeats + 1)][1:]
    for trial in trials:
        engine.evict(trial)
    return {
        "ms_per_token": round(1000 * statistics.median(taken), 4),
        "fastest": round(1000 * min(taken), 4),
        "slowest": round(1000 * max(taken), 4),
    }


def _step(engine: Engine, tokens: int) -> float:
    """Runs rows until the trials have reported that many tokens; returns seconds a token."""
    done, started = 0, time.perf_counter()
    while done < tokens:
        done += sum(event.report.tokens for event in engine.step() if event.report)
    synchronize(engine.base.device)
    return (time.perf_counter() - started) / done


def points_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns what to measure; what does not grow stays at one slot, rank 16, one row a step, examples of 128."""
    usual = {"slots": 1, "rank": 16, "row": options.row, "length": min(128, options.row), "step_tokens": options.row}
    few = {**usual, "length": min(64, options.step_tokens), "step_tokens": options.step_tokens}
    return [
        *({**few, "axis": "slots", "slots": slots} for slots in options.slots),
        *({**usual, "axis": "rank", "rank": rank} for rank in options.ranks),
        *({**usual, "axis": "row", "row": row, "length": min(128, row), "step_tokens": row} for row in options.rows),
        *({**usual, "axis": "length", "length": length} for length in options.lengths),
    ]


def main(words: list[str] | None = None) -> None:
    """Measures every point, writes its row, and draws them."""
    parser = arguments(__doc__, "growth")
    parser.add_argument("--model", default=MODELS[0], choices=MODELS)
    parser.add_argument("--slots", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--rows", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--lengths", nargs="+", type=int, default=[16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--row", type=int, default=1024, help="tokens of the row where it is not what grows")
    parser.add_argument("--step-tokens", type=int, default=128, help="tokens a step of each trial along the slots")
    parser.add_argument("--repeats", type=int, default=5, help="steps measured of each point")
    options = parser.parse_args(words)
    world = open_world(options.model, options.device)
    base = world.base()
    engine = Engine(base)
    rows = Rows(options, model=world.name, device=world.placement.device.type, dtype=world.placement.dtype_name)
    found = []
    for point in points_of(options):
        setting = {key: value for key, value in point.items() if key != "axis"}
        found.append(rows.add(**point, **time_per_token(base, engine, **setting, repeats=options.repeats)))
    pictures.growth(found, options.out / "growth.png")


if __name__ == "__main__":
    main()
