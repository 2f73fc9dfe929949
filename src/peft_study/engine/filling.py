"""Which examples of which trials go into the next row: slots take turns, the one that had the fewest tokens first.

The same for all processes that train the same trials: each fills the rows of all, and runs its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from peft_study.engine.processes import ProcessGroup
from peft_study.engine.row import Item, RowPlan
from peft_study.engine.trial import Trial
from peft_study.methods.low_rank import stacked_rank
from peft_study.model.load import Base

TURN = 1 / 8
"""Share of a row that a slot fills before the next one's turn: LoRA's products on fewer tokens are slow."""


@dataclass(slots=True)
class RowEntries:
    """A row being filled: (slot's trial, place in its batch, item)."""

    entries: list[tuple[Trial, int, Item]] = field(default_factory=list)
    used: int = 0

    def takes(self, item: Item, budget: int, *, packs: bool) -> bool:
        """True where the item fits; an item longer than the budget has a row of its own."""
        return not self.entries or (packs and self.used + item.row_length <= budget)


@dataclass(frozen=True, slots=True)
class Waiting:
    """What rows are filled from: while it is the same, so are they.

    Attributes:
        queues: slot -> what no row has taken yet of its trial's batch: (place in the batch, item).
        served: slot -> tokens that rows have given it.
        row_tokens: tokens of a row.
    """

    queues: dict[int, tuple[tuple[int, Item], ...]]
    served: dict[int, int]
    row_tokens: int


@dataclass(frozen=True, slots=True)
class Filled:
    """Rows that are ready to be run.

    Attributes:
        waiting: what they were filled from.
        rows: one a process.
        plan: of this process's row; None where it is empty.
        served: slot -> tokens that rows have given it, these included.
    """

    waiting: Waiting
    rows: list[RowEntries]
    plan: RowPlan | None
    served: dict[int, int]


def fill(waiting: Waiting, trials: Mapping[int, Trial], base: Base, processes: ProcessGroup) -> Filled:
    """Fills a row for each process, from the slot that has been served least, one turn after another.

    Args:
        waiting: what rows are filled from.
        trials: slot -> its trial.
        base: the model.
        processes: that run rows of the same trials.
    """
    rows = [RowEntries() for _ in range(processes.count)]
    queues, served = {slot: deque(queue) for slot, queue in waiting.queues.items()}, dict(waiting.served)
    slot, turn, most = -1, 0, waiting.row_tokens * TURN * len(rows)
    while open_slots := [slot for slot, queue in queues.items() if queue]:
        if slot not in open_slots or turn + queues[slot][0][1].row_length > most:
            slot, turn = min(open_slots, key=lambda s: (served[s], s)), 0
        place, item = queues[slot][0]
        row = min(rows, key=lambda r: r.used)
        if not row.takes(item, waiting.row_tokens, packs=base.proof.packs):
            del queues[slot]  # it waits for the next row
            continue
        queues[slot].popleft()
        row.entries.append((trials[slot], place, item))
        row.used += item.row_length
        served[slot] += item.row_length
        turn += item.row_length
    for row in rows:  # the items of a slot stand together, and slots of like rank
        row.entries.sort(key=lambda entry: (stacked_rank(entry[2].adapter.rank), entry[2].slot))
    own = [item for _, _, item in rows[processes.rank].entries]
    return Filled(waiting, rows, RowPlan.of(own, base.device) if own else None, served)
