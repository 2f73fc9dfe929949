"""The order of a trial's examples: a function of the data seed, so that a resume needs no generator state."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from peft_study.seeds import key


class DataOrder:
    """Every epoch is a fresh permutation, cut into batches; the last batch of an epoch may be short.

    Args:
        count: examples.
        batch_size: examples an optimizer step.
        seed: of the order.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        assert count > 0, "an empty data set has no order"
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps_per_epoch = math.ceil(count / batch_size)
        self._epoch = -1
        self._permutation: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def seen(self, steps: int) -> int:
        """Returns how many examples so many optimizer steps have."""
        epochs, within = divmod(steps, self.steps_per_epoch)
        return epochs * self.count + min(within * self.batch_size, self.count)

    def batch(self, step: int) -> list[int]:
        """Returns the examples of optimizer step `step` (from 0)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64(key(self.seed, "order", epoch)))
            self._permutation, self._epoch = generator.permutation(self.count), epoch
        start = within * self.batch_size
        return [int(i) for i in self._permutation[start : start + self.batch_size]]
