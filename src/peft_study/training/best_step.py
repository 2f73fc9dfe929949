"""Early stopping: the adapter of the best held-out step is kept, and the run ends when that step stays the best.

    held-out losses --seen--> the lowest so far: the adapter is written to RUN/best | else: one more in vain
    checkpoint: a link to RUN/best, and its step, losses and count; a resume puts all of them back

So a best that is later than the checkpoint is found again by the same steps.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np

from peft_study.engine import checkpoint
from peft_study.statistics import Losses
from peft_study.storage.files import output_error
from peft_study.storage.run_dir import RunFolder


class BestStep:
    """The best held-out step of one run so far.

    Args:
        patience: measurements in a row without a lower loss, after which the run ends.
        folder: of the run.
        writes: this process writes the run's files.
    """

    def __init__(self, patience: int, folder: RunFolder, *, writes: bool) -> None:
        self._patience, self._folder, self._writes = patience, folder, writes
        self.step: int | None = None
        self.sums_N: Losses | None = None
        self._in_vain = 0

    @property
    def stops(self) -> bool:
        """True when the run is to end."""
        return self._in_vain >= self._patience

    def seen(self, step: int, sums_N: Losses) -> bool:
        """Counts the held-out losses after a step (not step 0, before training); True where they are the lowest."""
        if self.sums_N is not None and not sums_N.sum() < self.sums_N.sum():
            self._in_vain += 1
            return False
        self.step, self.sums_N, self._in_vain = step, sums_N, 0
        return True

    def state(self) -> dict[str, Any] | None:
        """Returns what a checkpoint keeps beside the adapter, in JSON values; None before the first measurement."""
        if self.step is None or self.sums_N is None:
            return None
        return {"step": self.step, "sums": self.sums_N.tolist(), "in_vain": self._in_vain}

    def restore(self, found: checkpoint.Checkpoint, state: dict[str, Any] | None) -> None:
        """Puts back what a checkpoint keeps; without one, whatever lies in RUN/best is deleted.

        Raises:
            OutputError: when the checkpoint is damaged, or the adapter cannot be written.
        """
        if state is None:
            self.clear()
            return
        self.step, self.sums_N = state["step"], np.array(state["sums"], dtype=np.float64)
        self._in_vain = state["in_vain"]
        if self._writes:
            checkpoint.take_folder(found, self._folder.best)

    def clear(self) -> None:
        """Deletes RUN/best, which a start without a checkpoint may have left."""
        if self._writes:
            shutil.rmtree(self._folder.best, ignore_errors=True)

    def keep(self) -> None:
        """Makes the best adapter the run's.

        Raises:
            OutputError: when it cannot be moved.
        """
        if not self._writes:
            return
        try:
            shutil.rmtree(self._folder.adapter, ignore_errors=True)
            self._folder.best.replace(self._folder.adapter)
        except OSError as error:
            raise output_error(error, self._folder.adapter) from error
