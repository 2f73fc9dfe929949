"""Training speed of one trial in the packed engine: data tokens per second and share of the matrix ceiling.

    python benchmarks/throughput.py                             # the embedded model on this machine
    python benchmarks/throughput.py --model llama-1b --row-tokens 8192

Prints one JSON line a method. Lengths follow ../shared/data/tulu-like-mix (mean 194 tokens, 30 % supervised), drawn
from a log-normal with that mean; speed does not depend on what the tokens say. The ceiling is a bf16 matrix product
measured in the same run; a frozen base costs 4 FLOP a parameter and token (forward 2, backward 2), attention not
counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from peft_study.config import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TrainingConfig
from peft_study.data.conversation import Example
from peft_study.engine.engine import Engine
from peft_study.engine.trial import Trial
from peft_study.methods import create
from peft_study.model.load import Base, load_base, wrap
from peft_study.model.precision import choose
from peft_study.study.record import processor

METHODS = {
    "lora": LoraConfig(rank=16),
    "prefix_tuning": PrefixTuningConfig(tokens=30, init="zero"),
    "prompt_tuning": PromptTuningConfig(tokens=8, init="random"),
}


def llama_1b(device: torch.device, dtype: torch.dtype) -> Any:
    """Returns a model of Llama-3.2-1B's shape with random weights, made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def ceiling(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Returns the FLOP/s of a square matrix product, median of 10."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        started = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[3:])


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def examples(count: int, vocabulary: int) -> list[Example]:
    """Returns random examples with the lengths of real ones."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(194) - 0.32, 0.8, size=count), 16, 1024).astype(int)
    made = []
    for length in lengths:
        mask = np.arange(length) >= int(0.7 * length)
        made.append(Example(generator.integers(0, vocabulary, size=length).astype(np.int32), mask))
    return made


def measure(base: Base, method: str, row_tokens: int, steps: int) -> dict[str, Any]:
    """Returns the median speed over `steps` optimizer steps, each of about one row, after three to warm up."""
    size = base.model.config.get_text_config().vocab_size
    data = examples(2048, size)
    batch = max(1, round(row_tokens / np.mean([len(e) for e in data])))
    training = TrainingConfig(learning_rate=1e-4, steps=steps + 3, batch_size=batch)
    trial = Trial(method, create(METHODS[method], base, None, 0), training, data)
    engine = Engine(base, row_tokens=2 * row_tokens)  # a batch of about one row is never cut
    engine.admit(trial)
    speeds = []
    while not trial.finished:
        started = time.perf_counter()
        events = engine.step()
        synchronize(base.device)
        speeds.append(sum(e.report.tokens for e in events) / (time.perf_counter() - started))
    engine.evict(trial)
    return {"tokens_per_second": round(statistics.median(speeds[3:]), 1), "batch_size": batch}


def main() -> None:
    """Measures every method and prints a JSON line each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m-instruct", help="model, or llama-1b for random weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--row-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    placement = choose(options.device)
    if options.model == "llama-1b":
        base = wrap(llama_1b(placement.device, placement.dtype), None, placement, path="llama-1b (random weights)")
    else:
        base = load_base(options.model, placement=placement)
    peak = ceiling(placement.device, placement.dtype, 8192 if placement.device.type == "cuda" else 2048)
    for method in METHODS:
        found = measure(base, method, options.row_tokens, options.steps)
        share = 4 * base.parameter_count() * found["tokens_per_second"] / peak
        row = {
            "method": method,
            **found,
            "share_of_ceiling": round(share, 3),
            "ceiling_tflops": round(peak / 1e12, 2),
            "model": options.model,
            "row_tokens": options.row_tokens,
            "device": torch.cuda.get_device_name() if placement.device.type == "cuda" else processor(),
            "dtype": str(placement.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "date": datetime.now(UTC).date().isoformat(),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
