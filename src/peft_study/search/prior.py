"""Where the best learning rate of a method is expected before anything was tried, and how far off that may be.

The figures are those of others, on other models and data. `search.prior: false` does without them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from peft_study.config import MethodSpace, Range


@dataclass(frozen=True, slots=True)
class RatePrior:
    """A normal distribution of the logarithm of the best rate.

    Attributes:
        rate: the best one at `steps` optimizer steps.
        steps: of the runs it is from; None: it does not depend on them.
        decades: the distribution's standard deviation.
    """

    rate: float
    steps: int | None
    decades: float


EXPONENT = 0.26
"""The best rate falls with the number of steps to this power.

3.1 times from 5,000 to 395,000 examples, LoRA (arXiv:2602.04998); 0.32 in pretraining (arXiv:2409.19913).
"""

PRIORS: dict[str, RatePrior] = {
    # 35 models on Tulu-3, batch 128: this rate for all costs 0.0019 nats on average (tinker-cookbook, sft_sweep.md)
    "lora": RatePrior(3e-4, 780, 0.5),
    # the best prefix of Hugging Face's method_comparison/MetaMathQA: Llama-3.2-3B, batch 4, keys and values of a text
    "prefix_tuning": RatePrior(5e-3, 5000, 0.5),
    # TRL's documentation: 1e-2 to 3e-2 (AdamW, from a text); others lie between 1e-4 and 0.3 (Lester et al., Adafactor)
    "prompt_tuning": RatePrior(0.02, None, 1.0),
    # a tenth of LoRA's: "LoRA Without Regret" (Schulman et al. 2025), fit over 14 models
    "full": RatePrior(3e-5, 780, 0.5),
}


def rate_prior(space: MethodSpace, steps: int, *, informed: bool) -> tuple[float, float]:
    """Returns mean and standard deviation, in decades, of the logarithm of a method's best rate.

    Args:
        space: of the method, with a rate that is searched.
        steps: optimizer steps of a trial.
        informed: by the table above; else the middle of the range, with a third of it as the standard deviation.
    """
    known = PRIORS.get(space.kind) if informed else None
    if known is not None:
        shift = 0.0 if known.steps is None else EXPONENT * math.log10(known.steps / steps)
        return math.log10(known.rate) + shift, known.decades
    dimension = space.dimensions()["learning_rate"]
    ends = (dimension.low, dimension.high) if isinstance(dimension, Range) else dimension.choices
    low, high = math.log10(min(ends)), math.log10(max(ends))
    return (low + high) / 2, max((high - low) / 3, 0.5)
