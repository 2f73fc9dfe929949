"""Held-out losses, example by example, and the untouched base's losses, computed once for a data set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from peft_study.engine.processes import ALONE, ProcessGroup
from peft_study.engine.row import Item, RowRunner, fill_rows, said_whose
from peft_study.engine.trial import Examples
from peft_study.errors import OutputError
from peft_study.methods.base import Adapter
from peft_study.statistics import Losses
from peft_study.storage.files import AtomicFiles


@torch.no_grad()
def example_losses(
    runner: RowRunner,
    adapters: Sequence[Adapter],
    examples: Examples,
    indices: Sequence[int],
    row_tokens: int,
    *,
    processes: ProcessGroup = ALONE,
) -> list[Losses]:
    """Returns, for each adapter, the summed token loss of each example, in nats, without dropout.

    The adapters' examples stand one adapter after another, and rows are cut where they are full: only an adapter's
    last row is shared with the next.

    Args:
        runner: of the base.
        adapters: whose losses; one that changes the base must be attached.
        examples: the data.
        indices: which of them.
        row_tokens: tokens a row.
        processes: each takes its share of the rows.

    Raises:
        DoesNotFit: where a row of a single example does not fit into the memory.
    """
    items: list[Item] = []
    places: list[tuple[int, int]] = []  # of each item: its adapter, its place among the indices
    for slot, adapter in enumerate(adapters):
        own = [(Item(slot, adapter, examples[i]), (slot, place)) for place, i in enumerate(indices)]
        own.sort(key=lambda entry: -entry[0].row_length)  # long first: rows fill better, and memory peaks at once
        items += [item for item, _ in own]
        places += [place for _, place in own]
    sums_AN = np.zeros((len(adapters), len(indices)))
    done = 0
    for number, row in enumerate(fill_rows(items, row_tokens, packs=runner.base.proof.packs)):
        if number % processes.count == processes.rank:
            with said_whose(row, runner.base.device), runner.row(row) as result:
                for place, loss in zip(places[done : done + len(row)], result.item_losses, strict=True):
                    sums_AN[place] = loss
        done += len(row)
    return list(np.array(processes.total(sums_AN.ravel().tolist())).reshape(sums_AN.shape))


class BaseLosses:
    """The untouched base's loss of every example: computed when first needed, kept on disk, shared by all trials.

    Args:
        measure: returns the base's summed losses of these examples.
        count: examples of the data.
        path: file of the losses (NaN: not computed yet), or None to keep them in memory.
        processes: that measure together; one of them writes the file.
    """

    def __init__(
        self,
        measure: Callable[[Sequence[int]], Losses],
        count: int,
        path: Path | None,
        *,
        processes: ProcessGroup = ALONE,
    ) -> None:
        self._measure, self._path, self._processes = measure, path, processes
        self._losses_N = np.full(count, np.nan)
        self._changed = False
        if path is not None and path.exists():
            found = np.load(path)
            if found.shape == self._losses_N.shape:
                self._losses_N = found
        self._losses_N = np.array(processes.of_first(self._losses_N.tolist()))

    @property
    def missing(self) -> int:
        """Number of examples that were not measured yet."""
        return int(np.isnan(self._losses_N).sum())

    def of(self, indices: Sequence[int]) -> Losses:
        """Returns the base's summed loss of each of these examples, computing the missing ones."""
        missing = sorted({i for i in indices if np.isnan(self._losses_N[i])})
        if missing:
            self._changed = True
            # while an exclusive trial is attached this would measure its weights: its caller asks beforehand
            self._losses_N[missing] = self._measure(missing)
        return self._losses_N[list(indices)]

    def save(self) -> None:
        """Writes the losses computed so far to disk; where that fails, they are computed again another time."""
        if self._path is None or not self._processes.writes or not self._changed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with AtomicFiles() as files:
                np.save(files.open(self._path), self._losses_N)
        except (OSError, OutputError) as error:
            warnings.warn(f"the base's losses are not kept in the cache: {error}", stacklevel=2)
        self._changed = False
