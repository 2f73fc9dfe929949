"""Nine trials that share nothing but the base, and how they are run: fused in one engine, or each alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tiny_world as tw
from peft_study.config import LoraConfig, MethodConfig, PrefixTuningConfig, PromptTuningConfig, TrainingConfig
from peft_study.data.conversation import Example
from peft_study.engine.engine import Engine
from peft_study.engine.trial import Trial
from peft_study.methods import create
from peft_study.model.load import Base

ROW_TOKENS = 70
"""Two or three examples a row: every batch below is cut somewhere, and most rows hold several trials."""


@dataclass(frozen=True)
class Setting:
    """A method, its rate, and what differs in its training."""

    config: MethodConfig
    rate: float
    changed: dict[str, Any] = field(default_factory=dict)


NINE: dict[str, Setting] = {
    "lora": Setting(LoraConfig(rank=4, alpha=8), 1e-3, {"batch_size": 4, "steps": 12}),
    "rslora": Setting(
        LoraConfig(rank=3, alpha=6, rslora=True), 5e-4, {"batch_size": 2, "steps": 20, "data_seed": 1, "seed": 7}
    ),
    "lora, named": Setting(
        LoraConfig(rank=8, alpha=8, target_modules=("q_proj", "down_proj")),
        2e-3,
        {"batch_size": 5, "steps": 8, "data_seed": 2, "seed": 3, "weight_decay": 0.1},
    ),
    "prefix": Setting(PrefixTuningConfig(tokens=5, init="text"), 1e-2, {"batch_size": 3, "steps": 14, "data_seed": 3}),
    "prefix, random": Setting(
        PrefixTuningConfig(tokens=9, init="random"), 3e-3, {"batch_size": 1, "steps": 20, "seed": 2}
    ),
    "prefix, projected": Setting(
        PrefixTuningConfig(tokens=4, init="random", projection=True, projection_hidden=24),
        1e-3,
        {"batch_size": 4, "steps": 10, "data_seed": 4, "schedule": "cosine"},
    ),
    "prompt": Setting(PromptTuningConfig(tokens=3, init="text"), 1e-2, {"batch_size": 2, "steps": 16, "data_seed": 5}),
    "prompt, vocab": Setting(
        PromptTuningConfig(tokens=6, init="vocab"), 3e-2, {"batch_size": 6, "steps": 7, "warmup_ratio": 0.3}
    ),
    "prompt, random": Setting(
        PromptTuningConfig(tokens=8, init="random"), 5e-3, {"batch_size": 3, "steps": 11, "clip_norm": 0.2, "seed": 9}
    ),
}
"""Of each family three, no two alike in rate, batch, order and length; none takes more than twenty steps."""


@dataclass
class Run:
    """What a trial did: the loss of every step, and its parameters at the end."""

    losses: list[float]
    parameters: dict[str, Tensor]


def data() -> list[Example]:
    """Returns 24 examples of 7 to 29 tokens."""
    return tw.examples([int(n) for n in np.random.default_rng(4).integers(7, 30, size=24)])


def trial(base: Base, name: str, *, dropout: float = 0.0, examples: Sequence[Example] | None = None) -> Trial:
    """Returns one of the nine, freshly made; `dropout` is that of its LoRA."""
    setting = NINE[name]
    config = setting.config
    if dropout and isinstance(config, LoraConfig):
        config = config.model_copy(update={"dropout": dropout})
    training = TrainingConfig(learning_rate=setting.rate, **setting.changed)
    return Trial(name, create(config, base, tw.material(), training.seed), training, examples or data())


def drive(
    engine: Engine, waiting: Sequence[Trial] = (), *, between: Callable[[Engine], None] = lambda _engine: None
) -> dict[str, list[float]]:
    """Runs until nobody is left, filling free slots from the front of `waiting`; returns each trial's losses.

    Args:
        engine: with trials or without.
        waiting: who enters where there is room.
        between: called before every row, after the free slots were filled.
    """
    queue, curves = list(waiting), dict[str, list[float]]()
    while queue or engine.trials:
        while queue and engine.has_room():
            engine.admit(queue.pop(0))
        between(engine)
        for event in engine.step():
            assert event.report is not None, f"{event.trial.name}: {event.diverged}"
            curves.setdefault(event.trial.name, []).append(event.report.loss)
            if event.trial.finished:
                engine.evict(event.trial)
    return curves


def values(trial: Trial) -> dict[str, Tensor]:
    """Returns a copy of the trial's parameters."""
    return {name: parameter.detach().clone() for name, parameter in trial.parameters.items()}


@functools.cache
def alone(
    family: str, name: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32, row_tokens: int = ROW_TOKENS
) -> Run:
    """Returns what the trial does by itself, on a base and in an engine of its own."""
    base = tw.base(family, dtype=dtype)
    own = trial(base, name, dropout=dropout)
    curves = drive(Engine(base, row_tokens=row_tokens), [own])
    return Run(curves[name], values(own))


def apart(found: Tensor, expected: Tensor) -> float:
    """Returns |found - expected| / |expected|; an expected zero compares nothing and fails."""
    assert expected.norm() > 1e-7, "nothing to compare with"
    return float((found.float() - expected.float()).norm() / expected.float().norm())
