"""How many optimizer steps a budget allows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from peft_study.config import TrainingConfig
from peft_study.engine.order import DataOrder
from peft_study.engine.trial import total_steps
from peft_study.errors import ConfigError


def steps_of(training: TrainingConfig, tokens: int | None, lengths_N: npt.NDArray[np.int64]) -> int:
    """Returns a trial's optimizer steps: whole batches up to the tokens, or those configured where none are given.

    Args:
        training: of the trial; its data seed decides which examples come first.
        tokens: data tokens a trial.
        lengths_N: tokens of each training row.

    Raises:
        ConfigError: when the tokens do not reach for one batch.
    """
    if tokens is None:
        return total_steps(training, len(lengths_N))
    order = DataOrder(len(lengths_N), training.batch_size, training.data_seed)
    used, steps = 0, 0
    while True:
        used += int(lengths_N[order.batch(steps)].sum())
        if used > tokens:
            break
        steps += 1
    if steps == 0:
        raise ConfigError(
            f"{tokens} tokens do not reach for one batch ({training.batch_size} examples, {used} tokens)",
            where="budget.tokens",
            remedy="give more tokens, or a smaller training.batch_size",
        )
    return steps
