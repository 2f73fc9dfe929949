"""Where the best learning rate of a method is expected before anything was tried, and how far off that may be.

The figures of LoRA and soft prompts are those of docs/findings.md (`make findings` makes them, from other data sets
than the benchmarks of the search); full fine-tuning's are others'. `search.prior: false` does without them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peft_study.config import MethodSpace, Range


@dataclass(frozen=True, slots=True)
class RatePrior:
    """A normal distribution of the decimal logarithm of the best rate, around a centre that moves with the setting.

    Attributes:
        rate: the best one at `steps` optimizer steps, with `size` virtual tokens or that rank.
        decades: the distribution's standard deviation.
        steps: of the runs it is from; None: it does not depend on them.
        steps_exponent: the best rate goes with the steps to this power.
        size: virtual tokens or rank; None: it does not depend on them.
        size_exponent: the best rate goes with the size to this power.
        inits: decades by which an initialisation moves it.
    """

    rate: float
    decades: float
    steps: int | None = None
    steps_exponent: float = 0.0
    size: int | None = None
    size_exponent: float = 0.0
    inits: Mapping[str, float] = field(default_factory=dict)

    def at(self, steps: int) -> RatePrior:
        """Returns the distribution for trials of so many optimizer steps."""
        if self.steps is None:
            return self
        return replace(self, rate=self.rate * (steps / self.steps) ** self.steps_exponent, steps=steps)

    def centre(self, setting: Mapping[str, Any]) -> float:
        """Returns the mean at a setting (as `MethodSpace.flat`), in decades."""
        found = math.log10(self.rate) + self.inits.get(setting.get("init", ""), 0.0)
        size = setting.get("tokens", setting.get("rank"))
        return found + (self.size_exponent * math.log10(size / self.size) if self.size and size else 0.0)


PRIORS: dict[str, RatePrior] = {
    "lora": RatePrior(3e-4, 0.5, 780, -0.26),
    "prefix_tuning": RatePrior(5e-3, 0.5, 5000, -0.26),
    "prompt_tuning": RatePrior(0.02, 1.0),
    # a tenth of LoRA's on 35 models: "LoRA Without Regret" (Schulman et al. 2025), fit over 14 models; with the steps
    # as LoRA's from 5,000 to 395,000 examples (arXiv:2602.04998), and as in pretraining (arXiv:2409.19913)
    "full": RatePrior(3e-5, 0.5, 780, -0.26),
}


def rate_prior(space: MethodSpace, steps: int, *, informed: bool) -> RatePrior:
    """Returns what is known of a method's best rate.

    Args:
        space: of the method, with a rate that is searched.
        steps: optimizer steps of a trial.
        informed: by the table above; else the middle of the range, with a third of it as the standard deviation.
    """
    known = PRIORS.get(space.kind) if informed else None
    if known is not None:
        return known.at(steps)
    dimension = space.dimensions()["learning_rate"]
    ends = (dimension.low, dimension.high) if isinstance(dimension, Range) else dimension.choices
    low, high = math.log10(min(ends)), math.log10(max(ends))
    return RatePrior(10 ** ((low + high) / 2), max((high - low) / 3, 0.5))
