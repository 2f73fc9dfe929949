"""The engine: trials in slots, rows filled with segments of their current batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from peft_study.engine.guards import refuse_strangers
from peft_study.engine.row import Item, RowRunner
from peft_study.engine.trial import StepReport, Trial
from peft_study.errors import ConfigError
from peft_study.model.load import Base

DEFAULT_ROW_TOKENS = {"cpu": 1024, "mps": 2048, "cuda": 8192}
"""Tokens a row where nothing is said; on CPU longer rows are no faster and hold more activations."""


@dataclass(frozen=True, slots=True)
class Event:
    """A trial took an optimizer step, or had to leave because its numbers are no longer finite."""

    trial: Trial
    report: StepReport
    diverged: str | None = None


class Engine:
    """Runs the trials in its slots on one frozen base.

    Args:
        base: the model all trials share.
        row_tokens: tokens of a row; None takes the device's default.
        gradient_checkpointing: recompute decoder layers in the backward pass.
    """

    def __init__(self, base: Base, *, row_tokens: int | None = None, gradient_checkpointing: bool = False) -> None:
        self.base = base
        self.runner = RowRunner(base)
        self.row_tokens = row_tokens or DEFAULT_ROW_TOKENS[base.device.type]
        self._slots: dict[int, Trial] = {}
        _recompute_layers(base, gradient_checkpointing)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The trials in the slots, in slot order."""
        return tuple(self._slots[slot] for slot in sorted(self._slots))

    def admit(self, trial: Trial) -> int:
        """Gives the trial the first free slot and returns it.

        Raises:
            ConfigError: when the trial, or one already here, changes the base and must be alone.
        """
        if self._slots and (trial.adapter.exclusive or any(t.adapter.exclusive for t in self._slots.values())):
            raise ConfigError("full fine-tuning changes the base and must run alone", where=trial.name)
        slot = next(i for i in range(len(self._slots) + 1) if i not in self._slots)
        trial.adapter.attach()
        refuse_strangers(self.base, trial.adapter)
        self._slots[slot] = trial
        return slot

    def evict(self, trial: Trial) -> None:
        """Takes the trial out; the others do not notice."""
        slot = next(slot for slot, other in self._slots.items() if other is trial)
        del self._slots[slot]
        trial.adapter.detach()

    def step(self) -> list[Event]:
        """Runs one row forward and backward; returns the optimizer steps that it completed."""
        assert self._slots, "no trial was admitted"
        chosen = self._fill()
        with self.runner.row([item for _, _, item in chosen]) as result:
            if result.total.requires_grad:
                result.total.backward()
        for (trial, place, _), loss in zip(chosen, result.item_losses, strict=True):
            trial.record(place, loss)
        events = []
        for trial in self.trials:
            if trial.batch_complete:
                report = trial.finish_batch()
                diverged = _divergence(report)
                if diverged:
                    self.evict(trial)
                events.append(Event(trial, report, diverged))
        return events

    def _fill(self) -> list[tuple[Trial, int, Item]]:
        """Takes examples from the trials in turn until the row is full; items of one slot end up together."""
        queues = {slot: self._slots[slot].pending(slot) for slot in sorted(self._slots)}
        taken: dict[int, list[tuple[Trial, int, Item]]] = {slot: [] for slot in queues}
        used, count, progress = 0, 0, True
        while progress:
            progress = False
            for slot, queue in queues.items():
                if not queue:
                    continue
                place, item = queue[0]
                if count and (not self.base.proof.packs or used + item.row_length > self.row_tokens):
                    continue
                queue.popleft()
                taken[slot].append((self._slots[slot], place, item))
                used, count, progress = used + item.row_length, count + 1, True
        return [entry for entries in taken.values() for entry in entries]


def _divergence(report: StepReport) -> str | None:
    if not math.isfinite(report.loss):
        return f"the loss became {report.loss} at step {report.step}"
    if not math.isfinite(report.gradient_norm) and not report.skipped:
        return f"the gradient became {report.gradient_norm} at step {report.step}"
    return None


def _recompute_layers(base: Base, wanted: bool) -> None:
    """Turns recomputation of decoder layers in the backward pass on or off."""
    # transformers 5.2x renamed the methods; the old names warn there, the new ones are missing before
    prefix = "activation" if hasattr(base.model, "activation_checkpointing_enable") else "gradient"
    if wanted:
        # non-reentrant: the reentrant kind drops gradients of what enters a layer beside its input (prefixes)
        getattr(base.model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(base.model, f"{prefix}_checkpointing_disable")()
    # transformers recomputes only in training mode, and quantised layers need it (model/load.py)
    base.model.train(wanted or base.quantization is not None)
