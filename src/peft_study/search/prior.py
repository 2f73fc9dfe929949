"""Where the best learning rate of a method is expected before anything was tried, and how far off that may be.

The rates and their moves are those of the methods (config/methods.py), which come from docs/findings.md, as the spread
does. `search.prior: false` does without them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from peft_study.config import METHODS, LearningRates, MethodSpace, Range


@dataclass(frozen=True, slots=True)
class RatePrior:
    """A normal distribution of the decimal logarithm of the best rate, around a centre that moves with the setting.

    Attributes:
        rates: of the method; the default is the centre.
        decades: the distribution's standard deviation.
        factor: by which the steps of a trial move the centre.
    """

    rates: LearningRates
    decades: float
    factor: float = 1.0

    def centre(self, setting: Mapping[str, Any]) -> float:
        """Returns the mean at a setting (as `MethodSpace.flat`), in decades."""
        return math.log10(self.rates.at(setting.get("tokens"), setting.get("init")).default * self.factor)


class Spread(NamedTuple):
    """How far off the default rate may be: standard deviation in decades, and its move with the optimizer steps.

    Attributes:
        decades: over data sets and models.
        steps: of the runs that the default is from.
        exponent: the best rate goes with the steps to this power.
    """

    decades: float
    steps: int = 1
    exponent: float = 0.0


SPREADS = {
    # docs/findings.md. LoRA's best rate falls with the steps: by a power of -1.2 from 20 to 120 steps there, of -0.26
    # from 5,000 to 395,000 examples elsewhere (arXiv:2602.04998), which is the safer one for long runs
    "lora": Spread(0.5, 120, -0.26),
    "prefix_tuning": Spread(0.5),
    "prompt_tuning": Spread(0.75),
    # others': a tenth of LoRA's on 14 models ("LoRA Without Regret", Schulman et al. 2025)
    "full": Spread(0.5, 780, -0.26),
}


def rate_prior(space: MethodSpace, steps: int, *, informed: bool) -> RatePrior:
    """Returns what is known of a method's best rate.

    Args:
        space: of the method, with a rate that is searched.
        steps: optimizer steps of a trial.
        informed: by the table above; else the middle of the range, with a third of it as the standard deviation.
    """
    known, rates = SPREADS.get(space.kind), METHODS[space.kind].learning_rates
    if informed and known is not None and rates is not None:
        return RatePrior(rates, known.decades, (steps / known.steps) ** known.exponent)
    dimension = space.dimensions()["learning_rate"]
    ends = (dimension.low, dimension.high) if isinstance(dimension, Range) else dimension.choices
    low, high = math.log10(min(ends)), math.log10(max(ends))
    return RatePrior(LearningRates(10 ** ((low + high) / 2), min(ends), max(ends)), max((high - low) / 3, 0.5))
