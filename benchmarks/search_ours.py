"""Our search replayed: the study's own scheduler gives the commands, a worker on a virtual clock follows them.

    Scheduler (search/scheduler.py, as it is) --commands--> VirtualWorker --events: dev losses--> Scheduler

The worker fills rows as engine/engine.py does (the slot served least comes first, one example a turn; a batch begins in
the row after the one that ended it), takes the measured seconds for them, and tells the measured losses.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_grid import Cell, Curves, cell_of, config_of
from search_replay import Search, Seen

from peft_study.search.scheduler import Scheduler
from peft_study.search.trials import TrialRecord
from peft_study.storage.journal import Event, Journal
from peft_study.training.loop import Ended, Evaluated, TrialEvent
from peft_study.training.trial_run import Ending, Outcome


@dataclass(frozen=True, slots=True)
class WorkerCosts:
    """Seconds of our engine: start-up, a trial's entry, a token with company and alone, a dev token of one trial."""

    start_up: float
    entry: float
    token: float
    token_alone: float
    dev_token: float


@dataclass(slots=True)
class _Running:
    """A trial in a slot: steps taken, tokens served, examples of the batch that no row has taken yet."""

    name: str
    cell: Cell
    rungs: tuple[int, ...]
    served: int
    step: int = 0
    pending: list[int] = field(default_factory=list)


class VirtualWorker:
    """An engine whose rows take the measured time and whose losses are the measured ones."""

    def __init__(self, curves: Curves, costs: WorkerCosts) -> None:
        self.clock = costs.start_up
        self._curves, self._costs = curves, costs
        self._slots: dict[int, _Running] = {}

    @property
    def running(self) -> tuple[str, ...]:
        """Names of the trials in the slots."""
        return tuple(trial.name for trial in self._slots.values())

    @property
    def room(self) -> int:
        """Free slots."""
        return self._curves.slots - len(self._slots)

    def advance(self, enter: Sequence[tuple[TrialRecord, tuple[int, ...]]], leave: dict[str, str]) -> list[TrialEvent]:
        """Runs commands as training/loop.py does: events of trials that left and entered, else those of one row."""
        events: list[TrialEvent] = []
        for slot, trial in list(self._slots.items()):
            if trial.name in leave:
                del self._slots[slot]
                events.append(_ended(trial.name, "pruned", trial.step, leave[trial.name]))
        for record, rungs in enter:
            events += self._enter(record, rungs)
        return events or (self._row() if self._slots else [])

    def _enter(self, record: TrialRecord, rungs: tuple[int, ...]) -> list[TrialEvent]:
        begun = Evaluated(record.name, 0, self._curves.start_N)  # LoRA begins as the base, whose losses are known
        if record.kind == "reference":
            self._evaluate(1)  # the first time they are not
            return [begun, _ended(record.name, "finished", 0)]
        self.clock += self._costs.entry
        served = min((trial.served for trial in self._slots.values()), default=0)
        slot = next(i for i in range(self._curves.slots) if i not in self._slots)
        self._slots[slot] = _Running(record.name, self._curves.cells[cell_of(record.values)], rungs, served)
        return [begun]

    def _row(self) -> list[TrialEvent]:
        costs = self._costs
        self.clock += self._fill() * (costs.token if len(self._slots) > 1 else costs.token_alone)
        events, due = list[TrialEvent](), list[tuple[int, _Running]]()
        for slot, trial in sorted(self._slots.items()):
            if trial.pending:
                continue
            trial.step += 1
            if trial.cell.status != "finished" and trial.step >= trial.cell.steps:
                del self._slots[slot]
                events.append(_ended(trial.name, "diverged", trial.step, "as measured"))
            elif trial.step in trial.rungs or trial.step == self._curves.steps:
                due.append((slot, trial))
        self._evaluate(len(due))
        for slot, trial in due:
            events.append(Evaluated(trial.name, trial.step, trial.cell.sums[trial.step]))
            if trial.step == self._curves.steps:
                del self._slots[slot]
                events.append(_ended(trial.name, "finished", trial.step))
        return events

    def _fill(self) -> int:
        """Takes the examples of one row from the batches and returns its tokens."""
        for trial in self._slots.values():
            trial.pending = trial.pending or list(self._curves.batches[trial.step])
        used, open_slots = 0, set(self._slots)
        while open_slots:
            slot = min(open_slots, key=lambda s: (self._slots[s].served, s))
            trial = self._slots[slot]
            if used and used + trial.pending[0] > self._curves.row_tokens:
                open_slots.discard(slot)
                continue
            length = trial.pending.pop(0)
            used, trial.served = used + length, trial.served + length
            if not trial.pending:
                open_slots.discard(slot)
        return used

    def _evaluate(self, trials: int) -> None:
        self.clock += self._costs.dev_token * self._curves.dev_tokens * trials


MODEL = {"sampler": "bayesian", "pruner": "probability"}
SEARCHES: dict[str, dict[str, Any]] = {"d": MODEL, "d, no prior": {**MODEL, "prior": False}, "d, design": {}}
"""Our searches: the model of the losses, with and without its prior; and the grid at random with successive halving."""


def ours(curves: Curves, seed: int, costs: WorkerCosts, system: str = "d, design") -> tuple[Search, list[Event]]:
    """Replays the study with a search seed; returns what it saw when, and its journal."""
    config = config_of(curves.values, Path("unused"), seed, **SEARCHES[system])
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal.jsonl")
        scheduler = Scheduler(config, journal, lambda _training: curves.steps, curves.counts_N)
        worker, seen, changes = VirtualWorker(curves, costs), list[Seen](), list[tuple[float, str]]()
        events: list[TrialEvent] = []
        while not scheduler.finished:  # as study/run.py takes a report and answers it
            seen += seen_in(events, scheduler, worker.clock)
            leave = scheduler.receive(events)
            changes += recommended_in(events, scheduler, worker.clock)
            staying = set(worker.running) - set(leave)
            begun = scheduler.next(worker.room + len(leave), empty=not staying)
            events = worker.advance([(trial, trial.settings.rungs) for trial in begun], leave)
        return Search(seen, worker.clock, changes), list(journal.events)


def recommended_in(events: Sequence[TrialEvent], scheduler: Scheduler, at: float) -> list[tuple[float, str]]:
    """Returns what the model recommends after news of dev losses; nothing where no model searches."""
    (method,) = scheduler.methods
    if not seen_in(events, scheduler, at) or scheduler.config.sampler(method) != "bayesian":
        return []
    found = scheduler.samplers[method].bayesian.recommended(scheduler.state.of(method, "search"), {})
    return [] if found is None else [(at, cell_of(found.values))]


def seen_in(events: Sequence[TrialEvent], scheduler: Scheduler, at: float) -> list[Seen]:
    """Returns the dev losses that news of searched trials holds."""
    trials = scheduler.state.trials
    return [
        Seen(at, cell_of(trials[n.name].values), n.step, float(n.sums_N.sum()))
        for n in events
        if isinstance(n, Evaluated) and n.step > 0 and trials[n.name].kind == "search"
    ]


def order_of(events: Sequence[Event]) -> list[str]:
    """Returns the grid's cells in the order in which a study asked for them."""
    return [cell_of(e["values"]) for e in events if e["event"] == "asked" and e["kind"] == "search"]


def decisions(events: Sequence[Event]) -> dict[str, tuple[str, int]]:
    """Returns how each searched trial ended and after which step, by cell."""
    cells = {e["name"]: cell_of(e["values"]) for e in events if e["event"] == "asked" and e["kind"] == "search"}
    ended = [e for e in events if e["event"] == "ended" and e["name"] in cells]
    return {cells[e["name"]]: (e["status"], e["facts"]["steps"]) for e in ended}


def _ended(name: str, status: Ending, steps: int, reason: str | None = None) -> Ended:
    return Ended(name, Outcome(status, reason, steps=steps))


def worker_costs(speeds: dict[str, dict[str, Any]]) -> WorkerCosts:
    """Returns the measured seconds of our engine."""
    alone = speeds["ours alone"]
    together = speeds.get("ours", alone)
    return WorkerCosts(
        together["start_up"],
        together["entry"],
        together["seconds_per_token"],
        alone["seconds_per_token"],
        together["seconds_per_dev_token"],
    )
