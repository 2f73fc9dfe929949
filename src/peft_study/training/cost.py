"""What trials of one setting cost: parameters, memory, and tokens a second on the same rows for all methods.

    examples      [ ex 7 ][ ex 2 ][ ex 9 ]          the same for every method, as many as fit into the widest one's row
    row of lora   [ ex 7 ][ ex 2 ][ ex 9 ]
    of a prompt   [v v ex 7][v v ex 2][v v ex 9]    virtual tokens come on top

Every method is alone in the engine while it is measured. They take turns, a row each, so that what slows the machine
down for a while does not fall on one of them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from peft_study.config import TrialSettings
from peft_study.data.conversation import Example
from peft_study.engine.engine import Engine
from peft_study.engine.memory import probe
from peft_study.engine.trial import Trial
from peft_study.errors import ModelError, UserError
from peft_study.methods.registry import create, size
from peft_study.seeds import key
from peft_study.training.fitting import room_for
from peft_study.training.session import Session
from peft_study.training.slot_count import CPU_ROW

_SECONDS, _ROUNDS, _MOST_ROUNDS = 1.0, 2, 50
"""A method is timed for so long, with so many rows at least and at most; the fastest of them counts."""
TIMED_STEPS = 2
"""Optimizer steps from which the time of a run is expected before it begins."""


@dataclass(frozen=True, slots=True)
class TrialCost:
    """What a trial of one setting costs.

    Attributes:
        trainable: numbers that train.
        peak_bytes: memory beside the base: what the trial keeps in its slot, and the peak of a full row of it alone.
        tokens_per_second: data tokens, forward, backward and optimizer step.
        row_tokens: of the row that was timed, virtual ones in it included.
        data_tokens: of that row.
    """

    trainable: int
    peak_bytes: int
    tokens_per_second: float
    row_tokens: int
    data_tokens: int


def seconds_a_token(session: Session, settings: TrialSettings) -> float:
    """Returns the time of a data token in the first steps of a setting, alone in the engine, after one that warms up.

    Args:
        session: of the run; no trial is in its engine before or after.
        settings: with a learning rate.

    Raises:
        ModelError: when it diverges, or does not fit into the memory.
    """
    engine = session.engine
    adapter = create(settings.method, session.base, session.material, settings.training.seed)
    training = settings.training.model_copy(update={"steps": TIMED_STEPS + 1})
    trial = Trial("timed", adapter, training, session.train)
    with _admitted(engine, trial):
        _step(engine)
        before, started = trial.tokens, time.perf_counter()
        while not trial.finished:
            _step(engine)
        return (time.perf_counter() - started) / max(1, trial.tokens - before)


def measure_costs(session: Session, settings: Mapping[str, TrialSettings]) -> dict[str, TrialCost]:
    """Returns what a trial of each of these settings costs; no trial is in the engine before or after.

    Args:
        session: of the study.
        settings: by method; one that does not fit is left out, with a warning.
    """
    row_tokens = session.engine.row_tokens
    examples = _examples(session, max((size(s.method, session.base).row_tokens for s in settings.values()), default=0))
    measured: dict[str, tuple[Trial, int]] = {}
    seconds: dict[str, list[float]] = {}
    try:
        for name, setting in settings.items():
            with _left_out(name, measured), room_for(session, setting.method):
                measured[name] = _prepared(session, name, setting, examples)
                seconds[name] = []
        while due := [name for name in measured if _due(seconds[name])]:
            for name in due:
                with _left_out(name, measured), room_for(session, settings[name].method):
                    seconds[name].append(_timed_step(session.engine, measured[name][0]))
    finally:
        session.engine.row_tokens = row_tokens
    data = sum(len(example) for example in examples)
    return {
        name: TrialCost(
            sum(parameter.numel() for parameter in trial.parameters.values()),
            session.room.slot(settings[name].method) + activations,
            data / min(seconds[name]),
            data + trial.adapter.row_tokens * len(examples),
            data,
        )
        for name, (trial, activations) in measured.items()
    }


@contextmanager
def _left_out(name: str, measured: dict[str, tuple[Trial, int]]) -> Iterator[None]:
    """Leaves a method out where measuring it fails: a study's results do not depend on it."""
    try:
        yield
    except UserError as error:
        measured.pop(name, None)
        warnings.warn(f"what {name} costs was not measured: {error}", stacklevel=2)


def _examples(session: Session, virtual: int) -> list[Example]:
    """Returns training rows, drawn at random, that fill a row of the engine with so many virtual tokens each."""
    base, train = session.base, session.train
    budget = min(session.engine.row_tokens, CPU_ROW) if base.device.type == "cpu" else session.engine.row_tokens
    found, used = list[Example](), 0
    for row in np.random.default_rng(key(0, "cost")).permutation(len(train)).tolist():
        used += len(train[row]) + virtual
        if found and (used > budget or not base.proof.packs):
            break
        found.append(train[row])
    return found


def _prepared(session: Session, name: str, setting: TrialSettings, examples: Sequence[Example]) -> tuple[Trial, int]:
    """Returns a trial to be timed, which has run a full row already, and the bytes of that row's peak."""
    adapter = create(setting.method, session.base, session.material, setting.training.seed)
    adapter.attach()
    try:
        activations = probe(session.engine, adapter, session.train)
    finally:
        adapter.detach()
    update = {"steps": 10**6, "batch_size": len(examples), "learning_rate": 1e-9, "schedule": "constant"}
    training = setting.training.model_copy(update=update)
    scales = session.base.placement.scales_loss
    return Trial(f"cost of {name}", adapter, training, examples, scales_loss=scales), activations


def _due(seconds: Sequence[float]) -> bool:
    return len(seconds) < _ROUNDS or (sum(seconds) < _SECONDS and len(seconds) < _MOST_ROUNDS)


def _timed_step(engine: Engine, trial: Trial) -> float:
    """Returns the seconds of an optimizer step over all examples of the trial, which is alone in the engine."""
    with _admitted(engine, trial):
        _wait(engine.base.device)
        started = time.perf_counter()
        _step(engine)
        _wait(engine.base.device)
        return time.perf_counter() - started


@contextmanager
def _admitted(engine: Engine, trial: Trial) -> Iterator[None]:
    """Puts the trial into the engine for the block."""
    engine.admit(trial)
    try:
        yield
    finally:
        if trial in engine.trials:  # else `_step` has told why it left
            engine.evict(trial)


def _step(engine: Engine) -> None:
    """Takes an optimizer step of the trial that is alone in the engine.

    Raises:
        ModelError: when it diverged, or its optimizer did not fit: the engine has let it go.
    """
    while not (events := engine.step()):
        pass
    if events[0].report is None:
        raise events[0].failed or ModelError(f"{events[0].diverged}")


def _wait(device: torch.device) -> None:
    """Waits for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
