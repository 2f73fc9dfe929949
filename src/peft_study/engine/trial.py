"""One trial inside the engine: its adapter, data order, optimizer and schedule."""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from peft_study.config import TrainingConfig
from peft_study.data.conversation import Example
from peft_study.engine.order import DataOrder
from peft_study.engine.row import Item
from peft_study.methods.base import Adapter
from peft_study.methods.dropout import DropoutKey


class Examples(Protocol):
    """Anything with a length whose items are examples."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step of one trial.

    Attributes:
        step: optimizer steps taken, this one included.
        loss: mean over the supervised tokens of the batch, in nats, before the step.
        reduced_loss: the differentiated value (equal to `loss` unless the reduction is `sum`).
        learning_rate: of the step.
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
    """The optimizer batch in progress: items that no row has taken, and the loss sums of those that a row has run."""

    indices: list[int]
    items: deque[tuple[int, Item]]
    supervised: int
    tokens: int
    started: float = field(default_factory=time.perf_counter)
    sums: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """A trial's state beside its tensors, as a checkpoint keeps it.

    Attributes:
        step, tokens: optimizer steps taken and data tokens seen in them.
        loss_scale, good_steps: of float16.
        sums: loss sums of the current batch's examples that a row has run, by their place in the batch.
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
        self._next: _Batch | None = None
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
        """True after the last step."""
        return self.step >= self.total_steps

    def progress(self) -> Progress:
        """Returns the trial's state between two rows."""
        batch = self._batch
        sums, waiting = ({}, ()) if batch is None else (dict(batch.sums), tuple(place for place, _ in batch.items))
        return Progress(self.step, self.tokens, self.loss_scale, self.good_steps, sums, waiting)

    def restore(self, progress: Progress, slot: int) -> None:
        """Restores step, schedule, loss scale and batch; the caller restores the tensors."""
        self.step, self.tokens = progress.step, progress.tokens
        self.loss_scale, self.good_steps = progress.loss_scale, progress.good_steps
        self._batch = self._next = None
        if progress.sums:
            self._batch = self._begin(slot, self.step)
            items = dict(self._batch.items)
            self._batch.items = deque((place, items[place]) for place in progress.waiting)
            self._batch.sums = dict(progress.sums)
        if self.optimizer is not None:
            # the schedule is a function of the step: LambdaLR recomputes the rate from its counter
            self.scheduler.last_epoch = progress.step
            # one group: there is one base rate and one function
            (rate,), (factor,) = self.scheduler.base_lrs, self.scheduler.lr_lambdas
            self.optimizer.param_groups[0]["lr"] = rate * factor(progress.step)
            self.adapter.after_step()

    def restart_batch(self) -> None:
        """Drops the losses and gradients of the current batch: it is computed again, from the same examples."""
        self._batch = self._next = None
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def pending(self, slot: int) -> deque[tuple[int, Item]]:
        """Returns the items of the current batch that no row has taken yet; starts the next batch where needed."""
        if self._batch is None:
            self._batch, self._next = self._next or self._begin(slot, self.step), None
            self._batch.started = time.perf_counter()
        return self._batch.items

    def pending_next(self, slot: int) -> deque[tuple[int, Item]]:
        """Returns what `pending` will when the row that now runs has ended, unless float16 repeats the step."""
        rest = self.pending(slot)
        if rest or self.step + 1 == self.total_steps:
            return rest
        if self._next is None:
            self._next = self._begin(slot, self.step + 1)
        return self._next.items

    def _begin(self, slot: int, step: int) -> _Batch:
        indices = self.order.batch(step)
        chosen = [self.examples[i] for i in indices]
        supervised = int(sum(example.supervised_L.sum() for example in chosen))
        divisor = max(supervised, 1) if self.training.reduce_loss == "mean" else self.training.sum_divisor
        items = deque[tuple[int, Item]]()
        for place, (index, example) in enumerate(zip(indices, chosen, strict=True)):
            dropout = DropoutKey(self.training.seed, step, index, self.adapter.row_tokens + len(example))
            items.append((place, Item(slot, self.adapter, example, self.loss_scale / divisor, dropout)))
        return _Batch(indices, items, supervised, sum(len(e) for e in chosen))

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
        """True when a row has run every example of the current batch."""
        return self._batch is not None and len(self._batch.sums) == len(self._batch.indices)

    def gradients(self) -> list[Tensor]:
        """Returns the gradients that the current batch has given so far."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def finish_batch(self, scaled_norm: float) -> StepReport:
        """Steps optimizer and schedule, and returns the report; the batch must be complete, its gradients clipped.

        Args:
            scaled_norm: L2 norm over `gradients` before that, as `gradient_norms` gives it.

        Raises:
            Diverged: when the gradient is not finite (float16: and the loss scale cannot fall further).
        """
        assert self._batch is not None
        assert self.batch_complete
        batch, self._batch = self._batch, None
        rate, norm, skipped = 0.0, 0.0, False
        if self.optimizer is not None:
            rate = self.optimizer.param_groups[0]["lr"]
            norm, skipped = self._update(scaled_norm)
        self.step += 0 if skipped else 1
        self.tokens += batch.tokens
        sums = [batch.sums[place] for place in range(len(batch.indices))]
        loss = sum(sums) / max(batch.supervised, 1)
        return StepReport(
            step=self.step,
            loss=loss,
            reduced_loss=loss if self.training.reduce_loss == "mean" else sum(sums) / self.training.sum_divisor,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=batch.tokens,
            supervised=batch.supervised,
            examples=tuple(batch.indices),
            example_losses=tuple(sums),
            seconds=time.perf_counter() - batch.started,
            skipped=skipped,
        )

    def clip_factor(self, scaled_norm: float) -> float:
        """Returns what the gradients are multiplied by before the step, from their norm; the loss scale is in it."""
        norm, clip = scaled_norm / self.loss_scale, self.training.clip_norm
        factor = 1.0 / self.loss_scale
        if clip is not None and math.isfinite(norm) and norm > clip:
            factor *= clip / (norm + 1e-6)
        return factor

    def _update(self, scaled_norm: float) -> tuple[float, bool]:
        """Takes the optimizer step; returns the gradient norm and whether float16 overflowed."""
        assert self.optimizer is not None
        if self.step == 0:
            self._warn_of_idle()
        norm = scaled_norm / self.loss_scale
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            if self.loss_scale <= 1.0:
                raise Diverged(f"the gradient became {norm} at step {self.step + 1}")
            self.loss_scale, self.good_steps = max(self.loss_scale / 2, 1.0), 0
            self._next = None  # the same batch again, by another scale
            return norm, True
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.adapter.after_step()
        self.good_steps += 1
        if self._scales_loss and self.good_steps % 1000 == 0:
            self.loss_scale *= 2
            self._next = None
        return norm, False

    def _warn_of_idle(self) -> None:
        """Warns of parameters without a gradient: layers that the model does not call would stay untrained."""
        idle = [name for name, parameter in self.parameters.items() if parameter.grad is None]
        if idle:
            warnings.warn(
                f"{self.name}: {len(idle)} of {len(self.parameters)} tensors got no gradient from the first batch, "
                f"{idle[0]} first: the model does not call these layers, or no token reached them",
                stacklevel=2,
            )


def gradient_norms(trials: Sequence[Trial]) -> list[float]:
    """Returns the L2 norm over each trial's own gradients, 0 where it has none; the device is waited for once."""
    own = [trial.gradients() for trial in trials]
    together = [gradient for gradients in own for gradient in gradients]
    norms = iter(torch.stack(torch._foreach_norm(together)).tolist() if together else ())
    return [math.hypot(*islice(norms, len(gradients))) for gradients in own]


def clip_gradients(trials: Sequence[Trial], norms: Sequence[float]) -> None:
    """Clips the gradients of all trials by their norms and takes their loss scales out, in one pass.

    Args:
        trials: with complete batches.
        norms: as `gradient_norms` gives them; where one is not finite, the trial takes no step.
    """
    factors = [trial.clip_factor(norm) for trial, norm in zip(trials, norms, strict=True)]
    changed = [
        (g, factor) for trial, factor in zip(trials, factors, strict=True) if factor != 1 for g in trial.gradients()
    ]
    if changed:
        torch._foreach_mul_([gradient for gradient, _ in changed], [factor for _, factor in changed])
