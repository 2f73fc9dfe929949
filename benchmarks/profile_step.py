"""Where the time of a training step goes, and what the matrix products alone would allow.

    python benchmarks/profile_step.py [--method lora]                            # 5 real examples, one trial
    python benchmarks/profile_step.py --length 60 --batch-size 4 --trials 3      # 12 examples of 60 tokens in a row

The products alone: every linear layer of the model at its own shape, forward and the gradient of its input, over the
tokens of a row, and the head over the supervised ones; nothing else is computed. The profile: torch's profiler over
whole steps, own time of the device's operations by kind. Writes profile_step.jsonl.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from common import Rows, arguments, median, seconds
from peers import LEARNING_RATE, InOrder
from torch import nn
from torch.profiler import ProfilerActivity, profile
from worlds import METHODS, MODELS, adapter_of, examples_of_length, open_world, vocabulary_of

from peft_study.config import TrainingConfig
from peft_study.engine.engine import Engine, StepEvent
from peft_study.engine.trial import Trial
from peft_study.model.load import Base

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear"),
    "attention's products": ("aten::bmm", "aten::baddbmm"),
    "softmax": ("aten::_softmax", "aten::_softmax_backward_data", "aten::_log_softmax"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous", "aten::_to_copy"),
    "SiLU": ("aten::silu", "aten::silu_backward"),
    "products and sums by element": ("aten::mul", "aten::mul_", "aten::add", "aten::add_", "aten::sub_", "aten::neg"),
    "optimizer": ("aten::_fused_adamw_", "aten::_foreach_norm", "aten::_foreach_mul_"),
}


def products_alone(base: Base, tokens: int, supervised: int) -> float:
    """Returns the tokens a second at which the model's own matrix products alone would run, forward and backward."""
    total = 0.0
    timed: dict[tuple[int, int, int], float] = {}
    for module in base.model.modules():
        if not isinstance(module, nn.Linear):
            continue
        rows = supervised if module is base.head else tokens
        shape = (rows, module.in_features, module.out_features)
        if shape not in timed:
            x, d_y = (torch.randn(rows, width, dtype=base.dtype, device=base.device) for width in shape[1:])
            weight = module.weight.detach()

            def both(x: torch.Tensor = x, d_y: torch.Tensor = d_y, weight: torch.Tensor = weight) -> None:
                nn.functional.linear(x, weight)
                d_y @ weight

            timed[shape] = median([seconds(both, base.device) for _ in range(8)][3:], digits=6)
        total += timed[shape]
    return tokens / total


def shares(events: Any) -> dict[str, float]:
    """Returns the share of each kind of operation in the own time of all."""
    own = Counter[str]()
    for event in events:
        own[event.key] += event.self_device_time_total or event.self_cpu_time_total
    whole = sum(own.values())
    found = {kind: sum(own.pop(name, 0) for name in names) / whole for kind, names in KINDS.items()}
    return {**found, "everything else": sum(own.values()) / whole}


def main(words: list[str] | None = None) -> None:
    """Measures and writes one row."""
    parser = arguments(__doc__, "profile_step")
    parser.add_argument("--model", default=MODELS[0], choices=MODELS)
    parser.add_argument("--method", default="lora", choices=METHODS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--length", type=int, help="tokens of every example; default: real ones")
    parser.add_argument("--batch-size", type=int, default=5)
    parser.add_argument("--trials", type=int, default=1, help="that share the row")
    options = parser.parse_args(words)
    world = open_world(options.model, options.device)
    base, batch = world.base(), options.batch_size
    if options.length is None:
        pool, _ = world.examples(32)
    else:
        pool = examples_of_length(32, options.length, vocabulary_of(base))
    engine = Engine(base, row_tokens=4096)  # the batches of all trials are a row
    trials = [
        Trial(
            f"{options.method} {number}",
            adapter_of(METHODS[options.method], base, number),
            TrainingConfig(learning_rate=LEARNING_RATE, steps=2 * options.steps + 2, batch_size=batch),
            InOrder(pool, batch),
        )
        for number in range(options.trials)
    ]
    for trial in trials:
        engine.admit(trial)
    for _ in range(2):  # to warm up
        engine.step()
    speeds = []
    for _ in range(options.steps):
        found: list[StepEvent] = []
        taken = seconds(lambda found=found: found.extend(engine.step()), base.device)  # type: ignore[misc]
        speeds.append(sum(event.report.tokens for event in found if event.report) / taken)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if base.device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        while not trials[-1].finished:
            engine.step()
    count = batch * options.trials
    tokens = sum(len(e) for e in pool) * count // len(pool)
    supervised = sum(int(e.supervised_L.sum()) for e in pool) * count // len(pool)
    Rows(options, model=options.model, method=options.method, device=base.device.type).add(
        row="profile",
        length=options.length,
        batch_size=batch,
        trials=options.trials,
        tokens_per_second=median(speeds),
        products_alone=round(products_alone(base, tokens, supervised), 1),
        shares={kind: round(share, 3) for kind, share in shares(profiler.key_averages()).items()},
    )


if __name__ == "__main__":
    main()
