"""What is not finite in one trial stays in that trial: planted anywhere, on every attention path, in any company.

healthy   | lora | named lora | PATIENT | prefix | prompt |   row after row the same rows ...
sick      | lora | named lora | PATIENT | prefix | prompt |   ... and the neighbours the same bits
                                  ^ NaN or infinity planted; it leaves, named, and nobody else does
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig

import tiny_world as tw
from company import apart
from peft_study.config import LoraConfig, MethodConfig, PrefixTuningConfig, PromptTuningConfig, TrainingConfig
from peft_study.data.conversation import Example
from peft_study.engine.engine import Engine
from peft_study.engine.trial import Trial
from peft_study.methods import create
from peft_study.model.load import Base, wrap
from peft_study.model.precision import Placement

PATHS = ("products", "fused", "windows", "caps", "sinks")
"""Short segments by products, long ones by the fused kernel, windows of gemma3, caps of gemma2, sinks of gpt-oss."""
POISONS = (math.nan, math.inf, -math.inf)
PLACES = ("first", "middle", "last")
NEIGHBOURS: dict[str, tuple[MethodConfig, float]] = {
    "lora": (LoraConfig(rank=4, alpha=8, dropout=0.1, target_modules=("q_proj", "v_proj", "o_proj")), 1e-3),
    "named lora": (LoraConfig(rank=2, target_modules=("q_proj", "k_proj")), 1e-3),
    "prefix": (PrefixTuningConfig(tokens=5, init="random"), 1e-2),
    "prompt": (PromptTuningConfig(tokens=3, init="random"), 1e-2),
}
_LORA = LoraConfig(rank=3, target_modules=("q_proj", "k_proj", "v_proj"))
_PREFIX = PrefixTuningConfig(tokens=4, init="random")
_PROJECTED = PrefixTuningConfig(tokens=4, init="random", projection=True, projection_hidden=8)
KINDS: dict[str, tuple[MethodConfig, str]] = {
    "lora_A": (_LORA, "lora_A"),
    "lora_B": (_LORA, "lora_B"),
    "keys": (_PREFIX, "table"),
    "values": (_PREFIX, "table"),
    "enter": (_PROJECTED, "enter.weight"),
    "leave": (_PROJECTED, "leave.weight"),
    "embedding": (_PROJECTED, "embedding.weight"),
    "prompt": (PromptTuningConfig(tokens=2, init="random"), "embeddings"),
}
"""Every kind of parameter, with the method it belongs to."""


def base_of(path: str) -> Base:
    if path != "sinks":
        return tw.base({"products": "llama", "fused": "llama", "windows": "gemma3", "caps": "gemma2"}[path])
    config = GptOssConfig(
        **{k: v for k, v in tw._SHAPE.items() if k != "head_dim"},
        head_dim=8,
        num_local_experts=4,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("sinks"):
                parameter.normal_(0, 0.2)
    return wrap(model.eval(), None, Placement(torch.device("cpu"), torch.float32), path="tiny")


def data_of(path: str) -> tuple[list[Example], int]:
    """Returns examples, and a row budget that takes one of each of five trials and cuts every batch."""
    shortest = 258 if path == "fused" else 18  # longer than what is left to products, and than the windows
    lengths = [shortest + int(n) for n in np.random.default_rng(3).integers(0, 6, size=9)]
    return tw.examples(lengths), 5 * (shortest + 12)


class World:
    """Five trials in one engine, the patient at its place."""

    def __init__(self, path: str, config: MethodConfig, place: str, *, recompute: bool = False) -> None:
        base = base_of(path)
        examples, budget = data_of(path)
        self.engine = Engine(base, row_tokens=budget, gradient_checkpointing=recompute)
        self.patient = trial_of(base, "patient", config, 1e-3, examples)
        self.neighbours = [trial_of(base, name, c, rate, examples) for name, (c, rate) in NEIGHBOURS.items()]
        order = list(self.neighbours)
        order.insert({"first": 0, "middle": 2, "last": 4}[place], self.patient)
        for own in order:
            self.engine.admit(own)
        self.losses: dict[str, list[float]] = {own.name: [] for own in order}
        self.left: dict[str, str] = {}

    def row(self) -> None:
        """Runs a row, which must hold an example of everyone: else nobody stands beside anybody."""
        before = {slot: served for slot, (_, served) in self.engine.places.items()}
        alone = len(self.engine.trials) == 1
        places = dict(self.engine.places)
        for event in self.engine.step():
            if event.report is None:
                self.left[event.trial.name] = str(event.diverged)
                continue
            self.losses[event.trial.name].append(event.report.loss)
            if event.trial.finished:
                self.engine.evict(event.trial)
        if self.patient in (own for own, _ in places.values()) and not alone:
            after = {slot: served for slot, (_, served) in self.engine.places.items()}
            assert all(served > before[slot] for slot, served in after.items()), "somebody was not in the row"

    def state(self) -> dict[str, Tensor]:
        """Returns all that the neighbours go on from, and what they have measured."""
        found: dict[str, Tensor] = {}
        for own in self.neighbours:
            assert own.optimizer is not None
            for name, parameter in own.parameters.items():
                found[f"{own.name} {name}"] = parameter.detach().clone()
                if parameter.grad is not None:
                    found[f"{own.name} {name} gradient"] = parameter.grad.clone()
                for kind, tensor in own.optimizer.state.get(parameter, {}).items():
                    found[f"{own.name} {name} {kind}"] = tensor.clone()
            sums = [*self.losses[own.name], *own.progress().sums.values()]
            found[f"{own.name} losses"] = torch.tensor(sums, dtype=torch.float64)
        return found


def trial_of(base: Base, name: str, config: MethodConfig, rate: float, examples: list[Example]) -> Trial:
    training = TrainingConfig(learning_rate=rate, steps=4, batch_size=3, schedule="constant", warmup_ratio=0)
    return Trial(name, create(config, base, None, 1), training, examples)


@functools.cache
def by_itself(path: str, name: str) -> tuple[list[float], dict[str, Tensor]]:
    """Returns losses and final parameters of a neighbour alone."""
    base = base_of(path)
    examples, budget = data_of(path)
    own = trial_of(base, name, *NEIGHBOURS[name], examples)
    engine = Engine(base, row_tokens=budget)
    engine.admit(own)
    losses = []
    while not own.finished:
        losses += [event.report.loss for event in engine.step() if event.report]
    return losses, {key: parameter.detach().clone() for key, parameter in own.parameters.items()}


def contained(path: str, config: MethodConfig, place: str, plant: Callable[[Trial], None], **changed: Any) -> str:
    """Runs a healthy and a sick world side by side, checks the neighbours, and returns why the patient left.

    Args:
        path: of attention.
        config: the patient's.
        place: of the patient in the row.
        plant: puts something that is not finite into the patient, in the middle of its second batch.
        changed: of the worlds.
    """
    healthy, sick = (World(path, config, place, **changed) for _ in range(2))
    while not (sick.patient.step == 1 and sick.patient.progress().sums and sick.patient.progress().waiting):
        healthy.row()
        sick.row()
    assert all(own.step >= 1 for own in sick.neighbours), "B of a LoRA is still zero: less would be tested"
    plant(sick.patient)
    while not sick.left and not sick.patient.finished:
        healthy.row()
        sick.row()
        expected, found = healthy.state(), sick.state()
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{name} was infected"
    assert healthy.left == {}
    while sick.engine.trials:
        sick.row()
    for own in sick.neighbours:
        losses, parameters = by_itself(path, own.name)
        assert own.finished
        assert sick.losses[own.name] == pytest.approx(losses, rel=1e-5), own.name
        for name, parameter in own.parameters.items():
            assert apart(parameter.detach(), parameters[name]) < 1e-5, (own.name, name)
    assert set(sick.left) <= {"patient"}
    return sick.left.get("patient", "")


def cases() -> list[Any]:
    """Every combination; those of the quick tier hold every path with every kind, the rest in turn."""
    turns = list(itertools.product(POISONS, PLACES, (False, True)))
    # five of eighteen on with each path: no kind meets the same turn on all of them
    quick = {
        (path, kind): turns[(5 * row + column) % len(turns)]
        for row, path in enumerate(PATHS)
        for column, kind in enumerate(KINDS)
    }
    found = []
    for path, kind, *rest in itertools.product(PATHS, KINDS, POISONS, PLACES, (False, True)):
        marks = () if quick[path, kind] == tuple(rest) else pytest.mark.slow
        poison, place, recompute = rest
        name = f"{path}, {kind}, {poison}, {place}{', recomputed' if recompute else ''}"
        found.append(pytest.param(path, kind, poison, place, recompute, marks=marks, id=name))
    return found


@pytest.mark.parametrize(("path", "kind", "poison", "place", "recompute"), cases())
def test_a_weight_that_is_not_finite(path: str, kind: str, poison: float, place: str, recompute: bool) -> None:
    config, wanted = KINDS[kind]

    @torch.no_grad()
    def plant(patient: Trial) -> None:
        parameter = next(p for name, p in patient.parameters.items() if name.endswith(wanted))
        if wanted == "table":  # (P, layers * 2 * G * D): of each layer the keys, then the values
            parameter.view(len(parameter), -1, 2, 2 * 8)[:, :, 0 if kind == "keys" else 1] = poison
        else:
            parameter[0, 0] = poison

    reason = contained(path, config, place, plant, recompute=recompute)
    assert re.fullmatch(r"the (loss|gradient) became (nan|-?inf) at step 2", reason), reason


def square(first: Sequence[Any], second: Sequence[Any], third: Sequence[Any]) -> list[Any]:
    """Every combination; in the quick tier a Latin square of them: each value of one meets each of another."""
    found = []
    for (i, a), (j, b), (k, c) in itertools.product(*map(enumerate, (first, second, third))):
        found.append(pytest.param(a, b, c, marks=() if (i + j + k) % 3 == 0 else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("kind", "poison", "place"), square(["lora_B", "keys", "enter", "prompt"], POISONS, PLACES))
def test_a_gradient_that_is_not_finite(kind: str, poison: float, place: str) -> None:
    config, wanted = KINDS[kind]

    def plant(patient: Trial) -> None:
        gradient = next(p.grad for name, p in patient.parameters.items() if name.endswith(wanted))
        assert gradient is not None
        gradient[0, 0] = poison

    reason = contained("products", config, place, plant)
    assert re.fullmatch(r"the gradient became (nan|inf) at step 2", reason), reason


FINITE = {("exp_avg_sq", math.inf), ("step", math.inf)}
"""An infinite second moment makes an update of zero, an infinite count a bias correction of one: nothing to notice."""


@pytest.mark.parametrize(
    ("kind", "state", "poison"), square(["lora_B", "values", "prompt"], ["exp_avg", "exp_avg_sq", "step"], POISONS)
)
def test_an_optimizer_state_that_is_not_finite(kind: str, state: str, poison: float) -> None:
    config, wanted = KINDS[kind]
    place = PLACES[POISONS.index(poison)]

    def plant(patient: Trial) -> None:
        assert patient.optimizer is not None
        parameter = next(p for name, p in patient.parameters.items() if name.endswith(wanted))
        patient.optimizer.state[parameter][state].fill_(poison)

    reason = contained("products", config, place, plant)
    if (state, poison) in FINITE:
        assert reason == ""
    else:
        assert re.fullmatch(r"the loss became (nan|-?inf) at step 3", reason), reason


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("path", PATHS)
def test_a_held_out_loss_that_is_not_finite(path: str, poison: float) -> None:
    """Held-out examples of several trials share rows, too."""
    config, wanted = KINDS["prompt"]
    world = World(path, config, "middle")
    trials, (examples, _) = world.engine.trials, data_of(path)
    before = world.engine.losses([trial.adapter for trial in trials], examples, range(4))
    with torch.no_grad():
        world.patient.parameters[wanted].fill_(poison)
    after = world.engine.losses([trial.adapter for trial in trials], examples, range(4))
    for own, one, two in zip(trials, before, after, strict=True):
        if own is world.patient:
            assert np.isfinite(one).all()
            assert not np.isfinite(two).any()
        else:
            assert (one == two).all(), own.name
