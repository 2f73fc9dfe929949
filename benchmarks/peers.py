"""Ours and the plain loop: trainers that go over the same examples and are timed alike.

A pass is one epoch over the pool of examples. The learning rate is so small that no weight changes, so that every
pass of every peer computes the same losses, whatever its batches are, and the peers can be checked against each other
at any time. What a pass computes is what training computes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from common import synchronize

from peft_study.config import LoraConfig, MethodConfig, PrefixTuningConfig, TrainingConfig
from peft_study.data.conversation import Example
from peft_study.engine.engine import Engine
from peft_study.engine.order import DataOrder
from peft_study.engine.trial import Trial
from peft_study.methods import Adapter
from peft_study.model.load import Base

LEARNING_RATE = 1e-12
"""Float32 weights of ordinary size do not change at this rate."""


@dataclass(slots=True)
class Pass:
    """One epoch over the pool.

    Attributes:
        seconds: wall time, from before the first batch is fetched until the last optimizer step is done.
        tokens: data tokens; padding and virtual tokens do not count.
        supervised: tokens with a label.
        loss: mean over the supervised tokens of the pool, in nats.
        positions: token positions that the model was given, padding included, virtual ones not.
        steps: seconds of each optimizer step, the fetching of its batch included.
        cpu_seconds: of all threads; well below `seconds` times the threads where a neighbour took the processor.
    """

    seconds: float
    tokens: int
    supervised: int
    loss: float
    positions: int
    steps: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0


class Peer(Protocol):
    """A trainer: it goes over its pool as often as it is asked to."""

    name: str
    settings: dict[str, Any]

    def run(self) -> Pass:
        """Runs one pass."""


class InOrder:
    """Examples that a trial with data seed 0 sees in the given order, not shuffled, in its first epoch."""

    def __init__(self, examples: Sequence[Example], batch_size: int) -> None:
        order = DataOrder(len(examples), batch_size, seed=0)
        shuffled = [i for step in range(order.steps_per_epoch) for i in order.batch(step)]
        self._places = dict(zip(shuffled, range(len(examples)), strict=True))
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[self._places[index]]


class Ours:
    """One trial in the packed engine.

    Args:
        base: the frozen model.
        adapter: the trial's.
        examples: the pool.
        batch_size: examples an optimizer step.
        row_tokens: tokens a row; None takes the engine's default.
    """

    name = "ours"

    def __init__(
        self, base: Base, adapter: Adapter, examples: Sequence[Example], batch_size: int, row_tokens: int | None = None
    ) -> None:
        self.base, self._adapter = base, adapter
        self._examples, self._batch_size = InOrder(examples, batch_size), batch_size
        self._engine = Engine(base, row_tokens=row_tokens)
        self.settings: dict[str, Any] = {"batch_size": batch_size, "row_tokens": self._engine.row_tokens}

    def run(self) -> Pass:
        """Runs one pass as a trial of one epoch."""
        training = TrainingConfig(learning_rate=LEARNING_RATE, epochs=1, batch_size=self._batch_size)
        trial = Trial("ours", self._adapter, training, self._examples)
        engine = self._engine
        engine.admit(trial)
        reports, steps = [], []
        synchronize(self.base.device)
        cpu, started = time.process_time(), time.perf_counter()
        last = started
        while not trial.finished:
            for event in engine.step():
                assert event.report is not None, event.diverged
                synchronize(self.base.device)
                now = time.perf_counter()
                steps.append(now - last)
                reports.append(event.report)
                last = now
        taken, cpu = time.perf_counter() - started, time.process_time() - cpu
        engine.evict(trial)
        tokens, supervised = (sum(getattr(r, what) for r in reports) for what in ("tokens", "supervised"))
        loss = sum(r.loss * r.supervised for r in reports) / supervised
        return Pass(taken, tokens, supervised, loss, positions=tokens, steps=steps, cpu_seconds=cpu)


class PeftLoop:
    """`peft` as it comes (base in the device's precision, adapters in float32) with a plain loop over padded batches.

    Args:
        model: a base of its own.
        config: the method.
        adapter: ours, whose numbers are copied.
        examples: the pool.
        batch_size: examples an optimizer step.
        grouped: batches of neighbours in length, as a careful user would make them.
    """

    def __init__(
        self,
        model: Any,
        config: MethodConfig,
        adapter: Adapter,
        examples: Sequence[Example],
        batch_size: int,
        *,
        grouped: bool = False,
    ) -> None:
        import peft

        self.name = "peft_loop_grouped" if grouped else "peft_loop"
        self.settings: dict[str, Any] = {"batch_size": batch_size, "grouped": grouped}
        self._model = peft.get_peft_model(model, peft_config(config))
        self._model.train()
        copy_numbers(self._model, adapter)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        pool = sorted(examples, key=len) if grouped else list(examples)
        self._batches = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]

    def run(self) -> Pass:
        """Runs one pass with an optimizer of its own."""
        optimizer = torch.optim.AdamW(self._parameters, lr=LEARNING_RATE)
        device = self._parameters[0].device
        found, losses = Pass(0.0, 0, 0, 0.0, 0), []
        synchronize(device)
        cpu, started = time.process_time(), time.perf_counter()
        last = started
        for batch in self._batches:
            inputs = {name: tensor.to(device) for name, tensor in padded(batch).items()}
            loss = self._model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())  # a loop that shows its loss waits for the device here
            now = time.perf_counter()
            found.steps.append(now - last)
            last = now
        found.seconds, found.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        counts = [sum(int(e.supervised_L.sum()) for e in batch) for batch in self._batches]
        found.tokens = sum(len(e) for batch in self._batches for e in batch)
        found.supervised = sum(counts)
        found.positions = sum(len(batch) * max(len(e) for e in batch) for batch in self._batches)
        found.loss = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / found.supervised
        return found


def padded(batch: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Returns ids, mask and labels of a batch, padded right with id 0."""
    longest = max(len(example) for example in batch)
    ids_BL = torch.zeros(len(batch), longest, dtype=torch.long)
    mask_BL, labels_BL = torch.zeros_like(ids_BL), torch.full_like(ids_BL, -100)
    for row, example in enumerate(batch):
        tokens_L = torch.from_numpy(example.tokens_L).long()
        ids_BL[row, : len(example)] = tokens_L
        mask_BL[row, : len(example)] = 1
        labels_BL[row, : len(example)] = tokens_L.masked_fill(~torch.from_numpy(example.supervised_L), -100)
    return {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL}


def peft_config(config: MethodConfig) -> Any:
    """Returns PEFT's configuration of the same method."""
    import peft

    if isinstance(config, LoraConfig):
        return peft.LoraConfig(
            task_type="CAUSAL_LM", r=config.rank, lora_alpha=config.alpha, target_modules="all-linear"
        )
    if isinstance(config, PrefixTuningConfig):
        return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.tokens)
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.tokens)


def copy_numbers(model: Any, adapter: Adapter) -> None:
    """Gives PEFT's parameters the numbers of ours."""
    mine = adapter.parameters()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.startswith("prompt_encoder."):
                (value,) = mine.values()
            else:
                value = mine[name.removeprefix("base_model.model.").replace(".default.weight", "")]
            parameter.copy_(value)
