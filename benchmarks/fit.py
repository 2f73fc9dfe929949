"""Memory that training takes: what the program expects before it loads a model, beside what the process then has.

    python benchmarks/fit.py
    python benchmarks/fit.py --models smollm2-135m-instruct --recompute
    python benchmarks/fit.py --models smollm2-135m-instruct --quantization nf4
    python benchmarks/fit.py --cards                    # the table of docs/gpu.md; nothing is measured

A method a row, each in a process of its own, which loads the base, makes a trial and takes two optimizer steps in rows
of 1,024 tokens. `whole` is the process at its peak (on a card: all that torch took there); `beside`, by how much that
is above what it was with the base alone. What is expected comes from the shapes (engine/footprint.py) and, for the
whole, from what the process had before it loaded the base. Rows are those of `fit.jsonl`, in bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import Rows, arguments
from worlds import METHODS, World, adapter_of, examples_of_length, shape_of, vocabulary_of

from peft_study.config import FullConfig, TrainingConfig
from peft_study.doctor.rules.costs import MARGIN
from peft_study.engine.engine import DEFAULT_ROW_TOKENS, Engine
from peft_study.engine.footprint import Footprints, count
from peft_study.engine.memory import peak_above
from peft_study.engine.trial import Trial
from peft_study.model.precision import Placement, choose
from peft_study.model.weightless import outline_of, outline_of_shape
from peft_study.storage.environment import resident

MODELS = "smollm2-135m-instruct", "gemma-270m", "qwen-0.5b"
ROW, LENGTH = 1024, 256
CARDS = 16, 24, 80
"""GB of memory."""
LONGEST, CONTEXT = 2048, 600 * 2**20
"""Tokens of the longest example on a card, and bytes that CUDA itself takes."""
PARTS = "beside", "whole"
SETTINGS = {**METHODS, "full": FullConfig()}


def measure(
    model: str, method: str, placement: Placement, quantization: str | None, *, recompute: bool
) -> dict[str, Any]:
    """Returns what a setting takes, expected and measured, in bytes; for a process of its own."""
    on_card = placement.device.type == "cuda"
    start = 0 if on_card else resident("VmRSS") or 0
    base = World(model, placement).base(quantization)
    setting = SETTINGS[method]
    engine = Engine(base, row_tokens=ROW, gradient_checkpointing=recompute)
    with peak_above(base.device) as peak:
        adapter = adapter_of(setting, base)
        examples = examples_of_length(ROW // LENGTH, LENGTH - adapter.row_tokens, vocabulary_of(base))
        training = TrainingConfig(learning_rate=1e-4, steps=2, batch_size=len(examples))
        trial = Trial("measured", adapter, training, examples)
        engine.admit(trial)
        while not trial.finished:
            started = time.perf_counter()
            engine.step()
        seconds = time.perf_counter() - started
    whole = torch.cuda.max_memory_allocated() if on_card else resident("VmHWM") or 0
    found = count(outline_of(base), {method: setting}, recompute=recompute)
    precision = quantization or base.placement.dtype_name
    expected = found.methods[method].row(ROW) + found.methods[method].trial
    return {
        "precision": precision,
        "tokens_per_second": round(sum(map(len, examples)) / seconds),
        "beside_expected": expected,
        "beside_measured": peak[0],
        "whole_expected": start + found.weights[precision] + expected,
        "whole_measured": whole,
    }


def card_table() -> str:
    """Returns the table of docs/gpu.md: with which setting a method trains a model on a card."""
    lines = ["| model | method | " + " | ".join(f"{size} GB" for size in CARDS) + " |", "|---" * (2 + len(CARDS)) + "|"]
    for name in ("llama-1b", "llama-3b", "llama-8b"):
        base = outline_of_shape(shape_of(name), Placement(torch.device("cuda"), torch.bfloat16))
        counts = {recompute: count(base, METHODS, recompute=recompute) for recompute in (False, True)}
        for method in METHODS:
            cells = [_setting(counts, method, size * 2**30 * (1 - MARGIN) - CONTEXT) for size in CARDS]
            lines.append(f"| {name} | {method.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _setting(counts: dict[bool, Footprints], method: str, free: float) -> str:
    """Returns the first setting with which examples of `LONGEST` tokens fit, and its longest rows."""
    for precision in ("bfloat16", "nf4"):
        for recompute, found in counts.items():
            one = found.methods[method]
            tokens = (free - found.weights[precision] - one.trial - one.constant) / one.a_token
            if tokens >= LONGEST:
                words = [] if precision == "bfloat16" else [precision]
                words += ["recomputed"] if recompute else []
                rows = min(DEFAULT_ROW_TOKENS["cuda"], int(tokens) // 256 * 256)
                return f"{', '.join(words) or 'as it is'}: {rows:,}"
    return "no"


def main(words: list[str] | None = None) -> None:
    """Measures every model and method, each in its own process."""
    parser = arguments(__doc__, "fit")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=list(SETTINGS))
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument("--quantization", choices=["nf4", "int8"], help="of the base; needs bitsandbytes")
    parser.add_argument("--cards", action="store_true", help="print the table of docs/gpu.md")
    parser.add_argument("--recompute", action="store_true", help="layers are computed again in the backward pass")
    parser.add_argument("--one", action="store_true", help="measure in this process, and print the row")
    options = parser.parse_args(words)
    if options.cards:
        print(card_table())
        return
    if options.one:
        (model,), (method,) = options.models, options.methods
        placement = choose(options.device, options.dtype)
        print(json.dumps(measure(model, method, placement, options.quantization, recompute=options.recompute)))
        return
    rows = Rows(options)
    for model in options.models:
        for method in options.methods:
            command = [sys.executable, Path(__file__), "--one", "--models", model, "--methods", method]
            command += ["--device", options.device, "--dtype", options.dtype]
            command += [] if options.quantization is None else ["--quantization", options.quantization]
            command += ["--recompute"] if options.recompute else []
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(ran.stdout.splitlines()[-1])
            shares = {f"{part}_share": found[f"{part}_expected"] / found[f"{part}_measured"] for part in PARTS}
            rows.add(row="fit", model=model, method=method, recompute=options.recompute, **shares, **found)


if __name__ == "__main__":
    main()
