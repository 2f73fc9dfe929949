"""One setting of each method, with the method's own learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

from peft_study.config.common import Strict


class LearningRates(NamedTuple):
    """A method's own learning rate for AdamW, and the range in which a search is worthwhile (log scale).

    Those of LoRA and soft prompts come from docs/findings.md, which has their evidence and where it holds.

    Attributes:
        default: at `size` virtual tokens, begun from a text.
        low, high: of the range.
        size: virtual tokens; None: the default does not depend on them.
        exponent: the best rate goes with the virtual tokens to this power.
        inits: times which the best rate of another initialisation is higher.
    """

    default: float
    low: float
    high: float
    size: int | None = None
    exponent: float = 0.0
    inits: Mapping[str, float] = MappingProxyType({})

    def at(self, tokens: int | None, init: str | None) -> LearningRates:
        """Returns the rates with the default for so many virtual tokens and an initialisation, within the range."""
        if self.size is None or tokens is None:
            return self
        moved = self.default * (tokens / self.size) ** self.exponent * self.inits.get(init or "", 1.0)
        return self._replace(default=float(f"{min(max(moved, self.low), self.high):.2g}"))


class LoraConfig(Strict):
    """Low-rank updates of linear layers (Hu et al. 2021, arXiv:2106.09685)."""

    learning_rates: ClassVar[LearningRates] = LearningRates(1e-3, 1e-5, 1e-2)
    method: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, description="columns of A and B")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha/rank (rsLoRA: alpha/sqrt(rank))")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of dropping an input of the update")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="all linear layers but the head, or names by their last parts"
    )
    rslora: bool = Field(False, description="rank-stabilised scale (arXiv:2312.03732)")

    @property
    def scale(self) -> float:
        """Returns the factor of the low-rank update."""
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank


class PrefixTuningConfig(Strict):
    """Trained keys and values before every layer's own (Li and Liang 2021, arXiv:2101.00190)."""

    learning_rates: ClassVar[LearningRates] = LearningRates(4e-2, 3e-4, 0.3, 30, -0.25, {"zero": 1.7})
    method: Literal["prefix_tuning"] = "prefix_tuning"
    tokens: int = Field(30, ge=1, description="virtual tokens: keys and values a layer and head")
    init: Literal["text", "zero", "random"] = Field("text", description="text: the base's own keys and values of it")
    init_text: str | None = Field(None, description="None: the opening of training examples")
    projection: bool = Field(False, description="train through an MLP (reparametrisation), saved as its output")
    projection_hidden: int | None = Field(None, ge=1, description="width of that MLP; None: the model's")


class PromptTuningConfig(Strict):
    """Trained input embeddings before the text (Lester et al. 2021, arXiv:2104.08691)."""

    learning_rates: ClassVar[LearningRates] = LearningRates(0.05, 1e-3, 3.0, 50, 0.0, {"random": 2.5})
    method: Literal["prompt_tuning"] = "prompt_tuning"
    tokens: int = Field(50, ge=1, description="virtual tokens")
    init: Literal["text", "vocab", "random"] = Field("text", description="vocab: frequent tokens of the data")
    init_text: str | None = Field(None, description="None: the opening of training examples")


class NoneConfig(Strict):
    """The untouched base: a reference row that trains nothing."""

    learning_rates: ClassVar[LearningRates | None] = None
    method: Literal["none"] = "none"


class FullConfig(Strict):
    """Full fine-tuning of every weight: a reference row that needs the device to itself."""

    learning_rates: ClassVar[LearningRates] = LearningRates(2e-5, 1e-6, 2e-4)
    method: Literal["full"] = "full"


MethodConfig = LoraConfig | PrefixTuningConfig | PromptTuningConfig | NoneConfig | FullConfig
METHODS: dict[str, type[MethodConfig]] = {
    "lora": LoraConfig,
    "prefix_tuning": PrefixTuningConfig,
    "prompt_tuning": PromptTuningConfig,
    "none": NoneConfig,
    "full": FullConfig,
}


def default_rate(method: MethodConfig) -> float | None:
    """Returns the learning rate of a setting that gives none; None where nothing trains."""
    rates = method.learning_rates
    return None if rates is None else rates.at(getattr(method, "tokens", None), getattr(method, "init", None)).default
