"""One setting of each method, with the method's own learning rates."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

from peft_study.config.common import Strict


class LearningRates(NamedTuple):
    """A method's own learning rate for AdamW, and the range in which a search is worthwhile (log scale)."""

    default: float
    low: float
    high: float


class LoraConfig(Strict):
    """Low-rank updates of linear layers (Hu et al. 2021, arXiv:2106.09685)."""

    learning_rates: ClassVar[LearningRates] = LearningRates(3e-4, 1e-5, 1e-2)
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

    learning_rates: ClassVar[LearningRates] = LearningRates(1e-2, 3e-4, 0.3)
    method: Literal["prefix_tuning"] = "prefix_tuning"
    tokens: int = Field(30, ge=1, description="virtual tokens: keys and values a layer and head")
    init: Literal["text", "zero", "random"] = Field("text", description="text: the base's own keys and values of it")
    init_text: str | None = Field(None, description="None: the opening of training examples")
    projection: bool = Field(False, description="train through an MLP (reparametrisation), saved as its output")
    projection_hidden: int | None = Field(None, ge=1, description="width of that MLP; None: the model's")


class PromptTuningConfig(Strict):
    """Trained input embeddings before the text (Lester et al. 2021, arXiv:2104.08691)."""

    learning_rates: ClassVar[LearningRates] = LearningRates(0.1, 1e-3, 3.0)
    method: Literal["prompt_tuning"] = "prompt_tuning"
    tokens: int = Field(8, ge=1, description="virtual tokens")
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
