"""The engine: trials in slots on one frozen base, rows filled with segments of their current batches.

    slot 0   lora, batch of 4     | ex 7 | ex 2 | ex 9 | ex 4 |   -> complete: its own optimizer step
    slot 1   prefix, batch of 2   | ex 7 | ex 2 |                 -> complete: its own optimizer step, the next batch
    slot 2   (free)                                               <- the next trial enters at the next row
    row      | slot 0: ex 7, ex 2 | slot 1: ex 7 |                   up to `row_tokens` tokens

Slots share the row fairly: the one that has had the fewest tokens comes first, and fills an eighth of the row. A trial
that leaves, of its own or because its numbers are no longer finite, takes nothing with it that the others use.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from peft_study.engine.filling import Filled, RowEntries, Waiting, fill
from peft_study.engine.guards import refuse_unexpected
from peft_study.engine.heldout import example_losses
from peft_study.engine.processes import ALONE, ProcessGroup
from peft_study.engine.row import DoesNotFit, Item, Result, RowRunner
from peft_study.engine.trial import Diverged, Examples, StepReport, Trial, clip_gradients, gradient_norms
from peft_study.errors import ConfigError, ModelError, out_of_memory
from peft_study.methods.base import Adapter
from peft_study.model.load import Base
from peft_study.statistics import Losses

DEFAULT_ROW_TOKENS = {"cpu": 1024, "mps": 2048, "cuda": 8192}
"""Tokens a row where nothing is said; on CPU longer rows are no faster and hold more activations."""


@dataclass(frozen=True, slots=True)
class StepEvent:
    """A trial took an optimizer step, or had to leave: its numbers are no longer finite, or memory ran out.

    Attributes:
        report: of the step; None where the trial left.
        diverged: which number was not finite.
        failed: the optimizer's state did not fit into the memory.
    """

    trial: Trial
    report: StepReport | None
    diverged: str | None = None
    failed: ModelError | None = None


class Engine:
    """Runs the trials in its slots on one frozen base.

    Args:
        base: the model all trials share.
        row_tokens: tokens of a row; None takes the device's default.
        slots: trials at a time; None: no limit.
        gradient_checkpointing: recompute decoder layers in the backward pass.
        processes: that run rows of the same trials.
    """

    def __init__(
        self,
        base: Base,
        *,
        row_tokens: int | None = None,
        slots: int | None = None,
        gradient_checkpointing: bool = False,
        processes: ProcessGroup = ALONE,
    ) -> None:
        self.base = base
        self.runner = RowRunner(base)
        self.row_tokens = row_tokens or DEFAULT_ROW_TOKENS[base.device.type]
        self.slots = slots
        self.processes = processes
        self._slots: dict[int, Trial] = {}
        self._served: dict[int, int] = {}
        self._ahead: Filled | None = None
        self.recompute(gradient_checkpointing)

    def recompute(self, wanted: bool) -> None:
        """Turns recomputation of layers in the backward pass on or off; no number depends on it."""
        self.recomputes = wanted
        _recompute_layers(self.base, wanted)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The trials in the slots, in slot order."""
        return tuple(self._slots[slot] for slot in sorted(self._slots))

    @property
    def places(self) -> dict[int, tuple[Trial, int]]:
        """Slot -> its trial, and the tokens it has been served: what decides how rows are filled."""
        return {slot: (self._slots[slot], self._served[slot]) for slot in sorted(self._slots)}

    def has_room(self, *, exclusive: bool = False) -> bool:
        """True where a trial could be admitted now: there is a slot, and nobody must be alone."""
        if exclusive or any(trial.adapter.exclusive for trial in self._slots.values()):
            return not self._slots
        return self.slots is None or len(self._slots) < self.slots

    def admit(self, trial: Trial, *, slot: int | None = None, served: int | None = None) -> int:
        """Gives the trial a slot and returns it; it takes part from the next row on.

        Args:
            trial: to be trained.
            slot: None: the first free one.
            served: tokens it counts as having been served; None: as few as any trial here.

        Raises:
            ConfigError: when no slot is free, or the trial, or one already here, changes the base and must be alone,
                or shares its name or adapter with one already here.
        """
        if any(other.name == trial.name or other.adapter is trial.adapter for other in self._slots.values()):
            raise ConfigError("a trial of this name, or with this adapter, is in the engine", where=trial.name)
        if not self.has_room(exclusive=trial.adapter.exclusive):
            if self.slots is not None and len(self._slots) >= self.slots:
                raise ConfigError(f"all {self.slots} slots are taken", where=trial.name, remedy="evict a trial first")
            raise ConfigError("full fine-tuning changes the base and must run alone", where=trial.name)
        if slot is None:
            slot = next(i for i in range(len(self._slots) + 1) if i not in self._slots)
        assert slot not in self._slots, "one trial a slot"
        try:
            trial.adapter.attach()
            refuse_unexpected(self.base, trial.adapter)
        except (ModelError, RuntimeError, MemoryError):
            trial.adapter.detach()
            raise
        self._served[slot] = min(self._served.values(), default=0) if served is None else served
        self._slots[slot] = trial
        return slot

    def evict(self, trial: Trial) -> None:
        """Takes the trial out, whatever it was doing; the others do not notice.

        Admitted again, it restarts its current batch.

        Raises:
            ConfigError: when it has no slot.
        """
        slot = next((slot for slot, other in self._slots.items() if other is trial), None)
        if slot is None:
            raise ConfigError("is not in the engine", where=trial.name)
        del self._slots[slot], self._served[slot]
        self._ahead = None  # it holds the trial
        trial.restart_batch()
        trial.adapter.detach()

    def step(self) -> list[StepEvent]:
        """Runs one row (in every process one) forward and backward; returns the optimizer steps that it completed.

        Out of memory halves the row, and the batches it held restart: no example is lost.

        Raises:
            DoesNotFit: when a single example does not fit into the memory; its trial is still in its slot.
        """
        assert self._slots, "no trial was admitted"
        filled = self._taken()
        rows = filled.rows
        losses = self._run(filled)
        if losses is None:
            self._halve(rows)
            return []
        events = []
        for (trial, place, _), loss in zip((entry for row in rows for entry in row.entries), losses, strict=True):
            if trial in self._slots.values():  # else it left with an earlier example of this row
                try:
                    trial.record(place, loss)
                except Diverged as reason:
                    events.append(self._diverged(trial, reason))
        complete = [trial for trial in self.trials if trial.batch_complete]
        for trial in complete:
            self.processes.sum_gradients(list(trial.parameters.values()))
        norms = gradient_norms(complete)
        clip_gradients(complete, norms)
        for trial, norm in zip(complete, norms, strict=True):
            try:
                events.append(StepEvent(trial, trial.finish_batch(norm)))
            except Diverged as reason:
                events.append(self._diverged(trial, reason))
            except (RuntimeError, MemoryError) as error:  # AdamW's moments are made in the first step
                if not out_of_memory(error):
                    raise
                events.append(self._no_room(trial))
        return events

    def losses(self, adapters: Sequence[Adapter], examples: Examples, indices: Sequence[int]) -> list[Losses]:
        """Returns for each adapter the summed token loss of each example, in nats, without dropout.

        The adapters' examples share rows, which are cut smaller where they do not fit into the memory; the trial of an
        exclusive adapter must be in its slot.

        Raises:
            DoesNotFit: when a single example does not fit; it has its adapter.
        """
        return self.retried(
            lambda: example_losses(self.runner, adapters, examples, indices, self.row_tokens, processes=self.processes)
        )

    def retried(self, work: Callable[[], Result]) -> Result:
        """Returns what `work` does, with rows cut smaller as often as one is out of memory.

        Args:
            work: runs rows of `row_tokens`; raises `DoesNotFit` for a row of a single example.

        Raises:
            ModelError: when a row does not fit and several processes would have to agree on smaller ones.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            if self.processes.count > 1 or self.row_tokens == 1:
                raise ModelError(
                    f"rows of {self.row_tokens:,} tokens do not fit into the memory of {self.base.device}",
                    where="row_tokens",
                    remedy="give fewer",
                )
            self._shrink()  # outside the handler, whose traceback holds the row's tensors

    def _diverged(self, trial: Trial, reason: Diverged) -> StepEvent:
        self.evict(trial)
        return StepEvent(trial, None, str(reason))

    def _no_room(self, trial: Trial) -> StepEvent:
        self.evict(trial)
        numbers = sum(p.numel() for p in trial.parameters.values())
        what = f"the optimizer's state of {numbers:,} parameters ({8 * numbers / 2**30:,.1f} GB) does not fit into the "
        remedy = "train fewer parameters, or fewer trials side by side (slots)"
        return StepEvent(trial, None, failed=ModelError(f"{what}memory of {self.base.device}", remedy=remedy))

    def _taken(self) -> Filled:
        """Returns the rows to be run now, whose items are taken from their queues: those filled ahead, if still right.

        An engine that got or lost a trial meanwhile, or whose rows became smaller, fills them again.
        """
        queues = {slot: trial.pending(slot) for slot, trial in self._running().items()}
        assert queues, "every trial here is finished: evict it"
        waiting, filled = self._waiting(queues), self._ahead
        if filled is None or filled.waiting != waiting:
            filled = fill(waiting, self._slots, self.base, self.processes)
        for row in filled.rows:
            for _, _, item in row.entries:
                queues[item.slot].popleft()
        self._served.update(filled.served)
        self._ahead = None
        return filled

    def _running(self) -> dict[int, Trial]:
        return {slot: trial for slot, trial in sorted(self._slots.items()) if not trial.finished}

    def _waiting(self, queues: Mapping[int, Collection[tuple[int, Item]]]) -> Waiting:
        served = {slot: self._served[slot] for slot in queues}
        return Waiting({slot: tuple(queue) for slot, queue in queues.items()}, served, self.row_tokens)

    def _run(self, filled: Filled) -> list[float] | None:
        """Runs this process's row, and fills the next ones while the device computes.

        Returns:
            The loss of every item of all rows; None where one was out of memory.
        """
        rows = filled.rows
        own = rows[self.processes.rank].entries
        item_losses: list[float] = []
        full = False
        try:
            if own:
                with self.runner.row([item for _, _, item in own], filled.plan) as result:
                    if result.total.requires_grad:
                        result.total.backward()
                self._fill_ahead()
                item_losses = result.item_losses
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            full, item_losses = True, [0.0] * len(own)
        before = sum(len(row.entries) for row in rows[: self.processes.rank])
        count = sum(len(row.entries) for row in rows)
        # each process adds zeros for the others' items, so that an infinite loss stays infinite and is not NaN
        padded = [0.0] * before + item_losses + [0.0] * (count - before - len(own))
        *losses, failures = self.processes.total([*padded, float(full)])
        return None if failures else losses

    def _fill_ahead(self) -> None:
        queues = {slot: trial.pending_next(slot) for slot, trial in self._running().items()}
        waiting = self._waiting({slot: queue for slot, queue in queues.items() if queue})
        self._ahead = fill(waiting, self._slots, self.base, self.processes) if waiting.queues else None

    def _halve(self, rows: Sequence[RowEntries]) -> None:
        """Makes rows smaller after one did not fit, and restarts the batches that were in them."""
        if max(len(row.entries) for row in rows) == 1:
            raise DoesNotFit(max(rows, key=lambda row: row.used).entries[0][2], self.base.device)
        for trial in {id(t): t for row in rows for t, _, _ in row.entries}.values():
            trial.restart_batch()
        self._shrink(below=max(row.used for row in rows))

    def _shrink(self, below: int | None = None) -> None:
        before = self.row_tokens
        self.row_tokens = max(1, min(before, below or before) // 2)
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory on {self.base.device}: rows are cut from {before:,} to {self.row_tokens:,} tokens; "
            "nothing is lost",
            stacklevel=2,
        )


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
