"""One trial inside the engine: its adapter, data order, optimizer and schedule."""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from peft_study.config import TrainingConfig
from peft_study.data.conversation import Example
from peft_study.engine.order import DataOrder
from peft_study.engine.row import Item
from peft_study.methods.base import Adapter
from peft_study.methods.hooks import DropoutKey


class Examples(Protocol):
    """Anything with a length whose items are examples."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step of one trial did.

    Attributes:
        step: optimizer steps taken, this one included.
        loss: mean over the supervised tokens of the batch, in nats, before the step.
        reduced_loss: what was differentiated (equal to `loss` unless the reduction is `sum`).
        learning_rate: rate the step was taken with.
        gradient_norm: before clipping.
        tokens: data tokens of the batch; virtual tokens and padding do not count.
        supervised: supervised tokens of the batch.
        examples: indices of the batch's examples, and
        example_losses: the sum of the token losses of each.
        seconds: since the batch was begun.
        skipped: True where float16 gradients overflowed and no step was taken.
    """

    step: int
    loss: float
    reduced_loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    supervised: int
    examples: tuple[int, ...]
    example_losses: tuple[float, ...]
    seconds: float
    skipped: bool = False


class Diverged(Exception):
    """The trial's numbers are no longer finite; its parameters are those before the step."""


@dataclass(slots=True)
class _Batch:
    """The optimizer batch in progress: items that no row has taken, and the loss sums of those that went through."""

    indices: list[int]
    items: deque[tuple[int, Item]]
    supervised: int
    tokens: int
    started: float
    sums: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a trial stands, beside its tensors: what a checkpoint keeps of it.

    Attributes:
        step, tokens: optimizer steps taken and data tokens seen in them.
        loss_scale, good_steps: of float16.
        sums: loss sums of the current batch's examples that went through a row, by their place in the batch.
        waiting: places that no row has taken yet, in order.
    """

    step: int
    tokens: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0
    sums: dict[int, float] = field(default_factory=dict)
    waiting: tuple[int, ...] = ()


def total_steps(training: TrainingConfig, examples: int) -> int:
    """Returns the optimizer steps of a trial over so many examples."""
    return training.steps or training.epochs * math.ceil(examples / training.batch_size)


class Trial:
    """One setting of one method in training.

    Args:
        name: unique among the trials of a run.
        adapter: its trainable part.
        training: optimizer, schedule and batch; `learning_rate` must be given where the adapter has parameters.
        examples: its training data.
        scales_loss: True where gradients are float16.
    """

    def __init__(
        self, name: str, adapter: Adapter, training: TrainingConfig, examples: Examples, *, scales_loss: bool = False
    ) -> None:
        from transformers import get_scheduler

        self.name, self.adapter, self.training, self.examples = name, adapter, training, examples
        self.order = DataOrder(len(examples), training.batch_size, training.data_seed)
        self.total_steps = total_steps(training, len(examples))
        self.step = 0
        self.tokens = 0
        self.loss_scale = 2.0**16 if scales_loss else 1.0
        self.good_steps = 0
        self._scales_loss = scales_loss
        self._batch: _Batch | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.parameters = adapter.parameters()
        if self.parameters:
            assert training.learning_rate is not None, "the method's default was not filled in"
            values = list(self.parameters.values())
            self.optimizer = torch.optim.AdamW(
                values,
                lr=training.learning_rate,
                weight_decay=training.weight_decay,
                fused=values[0].device.type in ("cpu", "cuda"),
            )
            # int(): the schedules of open-instruct and TRL round the warm-up so or up; the first is this project's root
            self.scheduler = get_scheduler(
                training.schedule,
                self.optimizer,
                num_warmup_steps=int(self.total_steps * training.warmup_ratio),
                num_training_steps=self.total_steps,
            )

    @property
    def finished(self) -> bool:
        """True when every step of the budget is taken."""
        return self.step >= self.total_steps

    def progress(self) -> Progress:
        """Returns where the trial stands, between two rows."""
        batch = self._batch
        sums, waiting = ({}, ()) if batch is None else (dict(batch.sums), tuple(place for place, _ in batch.items))
        return Progress(self.step, self.tokens, self.loss_scale, self.good_steps, sums, waiting)

    def restore(self, progress: Progress, slot: int) -> None:
        """Puts step, schedule, loss scale and batch where a checkpoint had them; tensors are the caller's."""
        self.step, self.tokens = progress.step, progress.tokens
        self.loss_scale, self.good_steps = progress.loss_scale, progress.good_steps
        self._batch = None
        if progress.sums:
            self._batch = self._begin(slot)
            items = dict(self._batch.items)
            self._batch.items = deque((place, items[place]) for place in progress.waiting)
            self._batch.sums = dict(progress.sums)
        if self.optimizer is not None:
            # the schedule is a function of the step: LambdaLR recomputes the rate from its counter
            self.scheduler.last_epoch = progress.step
            lambdas = self.scheduler.lr_lambdas
            rates = [base * f(progress.step) for base, f in zip(self.scheduler.base_lrs, lambdas, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            self.adapter.after_step()

    def restart_batch(self) -> None:
        """Forgets what rows have done for the current batch: it is computed anew, from the same examples."""
        self._batch = None
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def pending(self, slot: int) -> deque[tuple[int, Item]]:
        """Returns the items of the current batch that no row has taken yet; begins the next batch where needed."""
        if self._batch is None:
            self._batch = self._begin(slot)
        return self._batch.items

    def _begin(self, slot: int) -> _Batch:
        indices = self.order.batch(self.step)
        chosen = [self.examples[i] for i in indices]
        supervised = int(sum(example.supervised_L.sum() for example in chosen))
        divisor = max(supervised, 1) if self.training.reduce_loss == "mean" else self.training.sum_divisor
        items = deque(
            (
                place,
                Item(
                    slot,
                    self.adapter,
                    example,
                    weight=self.loss_scale / divisor,
                    dropout=DropoutKey(self.training.seed, self.step, index, self.adapter.row_tokens + len(example)),
                ),
            )
            for place, (index, example) in enumerate(zip(indices, chosen, strict=True))
        )
        return _Batch(indices, items, supervised, sum(len(e) for e in chosen), time.perf_counter())

    def record(self, place: int, loss_sum: float) -> None:
        """Notes the summed loss of the batch's example number `place`.

        Raises:
            Diverged: when it is not finite.
        """
        assert self._batch is not None
        if not math.isfinite(loss_sum):
            raise Diverged(f"the loss became {loss_sum} at step {self.step + 1}")
        self._batch.sums[place] = loss_sum

    @property
    def batch_complete(self) -> bool:
        """True when every example of the current batch has been through a row."""
        return self._batch is not None and len(self._batch.sums) == len(self._batch.indices)

    def gradients(self) -> list[Tensor]:
        """Returns the gradients that the current batch has given so far."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def finish_batch(self, scaled_norm: float) -> StepReport:
        """Clips, steps optimizer and schedule, and returns the report; the batch must be complete.

        Args:
            scaled_norm: L2 norm over `gradients`, as `gradient_norms` gives it.

        Raises:
            Diverged: when the gradient is not finite (float16: and the loss scale cannot fall further).
        """
        assert self.batch_complete
        assert self._batch is not None
        batch, self._batch = self._batch, None
        rate = self.optimizer.param_groups[0]["lr"] if self.optimizer else 0.0
        norm, skipped = (0.0, False) if self.optimizer is None else self._update(scaled_norm)
        self.step += 0 if skipped else 1
        self.tokens += batch.tokens
        sums = [batch.sums[place] for place in range(len(batch.indices))]
        loss = sum(sums) / max(batch.supervised, 1)
        mean = self.training.reduce_loss == "mean"
        return StepReport(
            step=self.step,
            loss=loss,
            reduced_loss=loss if mean else sum(sums) / self.training.sum_divisor,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=batch.tokens,
            supervised=batch.supervised,
            examples=tuple(batch.indices),
            example_losses=tuple(sums),
            seconds=time.perf_counter() - batch.started,
            skipped=skipped,
        )

    def _update(self, scaled_norm: float) -> tuple[float, bool]:
        """Takes the optimizer step; returns the gradient norm and whether float16 overflowed."""
        assert self.optimizer is not None
        if self.step == 0:
            _warn_of_idle(self.name, self.parameters)
        norm = scaled_norm / self.loss_scale
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            if self.loss_scale <= 1.0:
                raise Diverged(f"the gradient became {norm} at step {self.step + 1}")
            self.loss_scale, self.good_steps = max(self.loss_scale / 2, 1.0), 0
            return norm, True
        clip = self.training.clip_norm
        factor = 1.0 / self.loss_scale
        if clip is not None and norm > clip:
            factor *= clip / (norm + 1e-6)
        if factor != 1.0:
            torch._foreach_mul_(self.gradients(), factor)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.adapter.after_step()
        self.good_steps += 1
        if self._scales_loss and self.good_steps % 1000 == 0:
            self.loss_scale *= 2
        return norm, False


def _warn_of_idle(name: str, parameters: Mapping[str, nn.Parameter]) -> None:
    """Warns of parameters without a gradient: layers that the model passes by would be left untrained in silence."""
    idle = [key for key, parameter in parameters.items() if parameter.grad is None]
    if idle:
        warnings.warn(
            f"{name}: {len(idle)} of {len(parameters)} tensors got no gradient from the first batch, {idle[0]} first: "
            "the model does not call these layers, or no token reached them",
            stacklevel=2,
        )


def gradient_norms(trials: Sequence[Trial]) -> list[float]:
    """Returns the L2 norm over each trial's own gradients, 0 where it has none; the device is waited for once."""
    norms = [torch._foreach_norm(trial.gradients()) if trial.gradients() else [] for trial in trials]
    totals = [torch.linalg.vector_norm(torch.stack(list(own))) for own in norms if own]
    values = iter(torch.stack(totals).tolist() if totals else ())
    return [next(values) if own else 0.0 for own in norms]
