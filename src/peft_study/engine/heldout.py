"""Held-out losses, example by example, and the untouched base's losses, computed once for a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from peft_study.engine.row import Item, RowRunner, fill_rows
from peft_study.engine.trial import Examples
from peft_study.methods.base import Adapter
from peft_study.methods.reference import NoAdapter


@torch.no_grad()
def example_losses(
    runner: RowRunner,
    adapter: Adapter,
    examples: Examples,
    indices: Sequence[int],
    row_tokens: int,
    on_row: Callable[[], None] | None = None,
) -> npt.NDArray[np.float64]:
    """Returns the summed token loss of each example, in nats, without dropout.

    Args:
        runner: of the base.
        adapter: whose loss; it must be attached where it changes the base.
        examples: the data.
        indices: which of them.
        row_tokens: tokens a row.
        on_row: called after each row, for progress.
    """
    items = [Item(0, adapter, examples[i]) for i in indices]
    # long first: rows fill better, and memory peaks at once
    order = sorted(range(len(items)), key=lambda i: -items[i].row_length)
    sums = np.empty(len(items))
    done = 0
    for row in fill_rows([items[i] for i in order], row_tokens, packs=runner.base.proof.packs):
        with runner.row(row) as result:
            sums[order[done : done + len(row)]] = result.item_losses
        done += len(row)
        if on_row:
            on_row()
    return sums


class BaseLosses:
    """The untouched base's loss of every example: computed when first needed, kept on disk, shared by all trials.

    Args:
        runner: of the base.
        examples: the data.
        path: file the losses are kept in (NaN: not computed yet), or None to keep them in memory.
        row_tokens: tokens a row.
    """

    def __init__(self, runner: RowRunner, examples: Examples, path: Path | None, row_tokens: int) -> None:
        self._runner, self._examples, self._row_tokens, self._path = runner, examples, row_tokens, path
        self._losses_N = np.full(len(examples), np.nan)
        if path is not None and path.exists():
            found = np.load(path)
            if found.shape == self._losses_N.shape:
                self._losses_N = found

    def of(self, indices: Sequence[int]) -> npt.NDArray[np.float64]:
        """Returns the base's summed loss of each of these examples, computing the missing ones."""
        missing = sorted({i for i in indices if np.isnan(self._losses_N[i])})
        if missing:
            # weights of an exclusive trial would be measured instead of the base's: its caller asks beforehand
            self._losses_N[missing] = example_losses(
                self._runner, NoAdapter(), self._examples, missing, self._row_tokens
            )
        return self._losses_N[list(indices)]

    def save(self) -> None:
        """Writes what is known to disk."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(".tmp.npy")
            np.save(temporary, self._losses_N)
            temporary.replace(self._path)
