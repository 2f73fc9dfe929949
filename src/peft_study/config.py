"""Everything a user may say, as validated models; each field has its unit or meaning.

    StudyConfig  (peft-study run)       one model, one data set, many settings of several methods
    TrainConfig  (peft-study finetune)  one model, one data set, one setting of one method
        ├── ModelConfig      which base model, where and in which precision
        ├── DataConfig       which rows, how they become tokens, which are held out
        ├── MethodConfig     LoraConfig | PrefixTuningConfig | PromptTuningConfig | NoneConfig | FullConfig
        └── TrainingConfig   optimizer, schedule, batch, budget

Learning-rate defaults and ranges belong to the methods, because they differ by orders of magnitude: a soft prompt
learns nothing at a rate that is right for LoRA (docs/decisions/learning-rates.md).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from peft_study.errors import ConfigError, nearest

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


class LearningRates(NamedTuple):
    """A method's own learning rate for AdamW, and the range in which a search is worthwhile (log scale)."""

    default: float
    low: float
    high: float


class Strict(BaseModel):
    """Base of all settings: unknown keys are errors, values cannot be reassigned, infinities and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Strict):
    """The frozen base model."""

    name: str = Field(description="folder, hub id, or the embedded 'smollm2-135m-instruct'")
    tokenizer: str | None = Field(None, description="tokenizer, when it is not the model's own")
    revision: str | None = Field(None, description="git revision on the hub")
    device: Device = Field("auto", description="auto takes cuda, then mps, then cpu")
    dtype: Dtype = Field("auto", description="of the frozen base; adapters are always float32")
    quantization: Literal["nf4"] | None = Field(None, description="4-bit base through bitsandbytes")
    trust_remote_code: bool = Field(False, description="run code that ships with the model")


class Source(Strict):
    """One data source and how much of it is used."""

    path: str = Field(description="what `peft-study data convert` takes, or the embedded 'skills'")
    take: float = Field(1.0, gt=0, description="at most 1: share of the rows; above 1: number of rows")


class DataConfig(Strict):
    """Rows, their tokens, and the part that is held out."""

    train: tuple[Source, ...] = Field(description="training sources, in order", min_length=1)
    held_out: float | str | None = Field(
        None, description="from 1: rows; below 1: share; a path: rows of that file; None: 64, at most a tenth"
    )
    split: str | None = Field(None, description="split of the sources, where they have several")
    mapping: dict[str, str] | None = Field(None, description="other column names, e.g. {messages: chat}")
    max_length: int | None = Field(1024, gt=0, description="tokens an example; the rest is cut off")
    chat_template: str | None = Field(None, description="None: the tokenizer's own; tulu, another name, or a file")
    add_bos: bool = Field(False, description="put BOS first where the template does not")
    limit: int | None = Field(None, gt=0, description="use this many rows at most, drawn at random by the seed")
    workers: int | None = Field(None, gt=0, description="processes that tokenise; None: all cores")

    @field_validator("train", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        items = [value] if isinstance(value, (str, Path, dict)) else value
        return [{"path": str(item)} if isinstance(item, (str, Path)) else item for item in items]

    @field_validator("held_out")
    @classmethod
    def _held_out(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, (int, float)) and value <= 0:
            raise ValueError("a comparison needs held-out rows: give a number above 0")
        return value


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


class TrainingConfig(Strict):
    """Optimizer, schedule, batch and budget of one trial."""

    learning_rate: float | None = Field(None, gt=0, description="peak rate of AdamW; None: the method's default")
    steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    epochs: int = Field(1, ge=1, description="passes over the training rows")
    batch_size: int = Field(8, ge=1, description="examples an optimizer step")
    schedule: Schedule = Field("linear", description="how the rate goes on after the warm-up; names of transformers")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="share of the steps over which the rate rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, as in AdamW")
    clip_norm: float | None = Field(1.0, gt=0, description="largest gradient norm of a trial; None: off")
    reduce_loss: Literal["mean", "sum"] = Field("mean", description="over the supervised tokens of the whole batch")
    sum_divisor: int = Field(1, ge=1, description="with sum: what the sum is divided by (accumulation steps)")
    gradient_checkpointing: bool = Field(False, description="recompute layers in the backward pass to save memory")
    seed: int = Field(0, ge=0, description="initialisation and dropout")
    data_seed: int = Field(0, ge=0, description="order of the examples, and which rows are held out")
    row_tokens: int | None = Field(None, ge=1, description="tokens packed into one row; None: measured default")

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainingConfig:
        if self.schedule == "constant_with_warmup" and self.warmup_ratio == 0:
            raise ValueError("constant_with_warmup needs warmup_ratio above 0")
        return self


class LoggingConfig(Strict):
    """What is written down while a trial runs, and how often."""

    log_every: int = Field(1, ge=1, description="optimizer steps between lines of metrics.jsonl")
    evaluate_every: int | None = Field(None, ge=1, description="optimizer steps between held-out losses; None: 4 a run")
    checkpoint_every: int | Literal["epoch"] | None = Field(
        None, description="optimizer steps (of every trial in a slot), or epoch; None: by the clock"
    )
    checkpoint_minutes: float | None = Field(
        5.0, gt=0, description="minutes between checkpoints where no steps are given; None: only when stopped"
    )
    keep_checkpoints: int = Field(3, ge=-1, description="newest checkpoints kept, at least 1; -1: all")
    tensorboard: bool = Field(True, description="write event files beside metrics.jsonl")
    base_loss: bool = Field(True, description="log the loss minus the untouched base's on the same examples")

    @field_validator("keep_checkpoints")
    @classmethod
    def _keeps_one(cls, value: int) -> int:
        if value == 0:
            raise ValueError("keeps none, so that a stopped run could not go on")
        return value

    @field_validator("checkpoint_every")
    @classmethod
    def _positive(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 1:
            raise ValueError("is below 1")
        return value


class TrainConfig(Strict):
    """One run of one method."""

    model: ModelConfig
    data: DataConfig
    method: Annotated[MethodConfig, Field(discriminator="method")]
    training: TrainingConfig = TrainingConfig()
    logging: LoggingConfig = LoggingConfig()
    output: Path = Field(description="folder of the run")


class MethodSpace(Strict):
    """One method of a study: its fixed settings and the learning rates to try."""

    settings: Annotated[MethodConfig, Field(discriminator="method")]
    learning_rates: tuple[float, ...] = Field(min_length=1, description="peak rates of AdamW to try")

    @field_validator("learning_rates")
    @classmethod
    def _rates(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for rate in value:
            if not rate > 0:
                raise ValueError(f"{rate} is not above 0")
        return tuple(sorted(set(value)))


class StudyConfig(Strict):
    """A comparison of methods, each over its own learning rates, on one model and one data set."""

    model: ModelConfig
    data: DataConfig
    methods: tuple[MethodSpace, ...] = Field(min_length=1)
    training: TrainingConfig = TrainingConfig()
    logging: LoggingConfig = LoggingConfig()
    slots: int | Literal["auto"] = Field(
        "auto", description="trials side by side in the engine; auto: what keeps rows full and fits into the memory"
    )
    output: Path = Field(description="folder of the study")

    @field_validator("methods", mode="before")
    @classmethod
    def _methods(cls, value: Any) -> Any:
        return [_method_space(name, body) for name, body in value.items()] if isinstance(value, dict) else value

    @field_validator("slots", mode="before")
    @classmethod
    def _slots(cls, value: Any) -> Any:
        number = int(value) if str(value).isdigit() and not isinstance(value, bool) else 0
        if value != "auto" and number < 1:
            raise ValueError("is neither auto nor a whole number above 0")
        return value if value == "auto" else number

    @model_validator(mode="after")
    def _rate_belongs_to_methods(self) -> StudyConfig:
        if self.training.learning_rate is not None:
            raise ValueError("training.learning_rate: give learning_rate under each method, their scales differ")
        return self


def _method_space(name: str, body: Any) -> dict[str, Any]:
    """Turns ``lora: {rank: 16, learning_rate: [1e-4, 1e-3]}`` into a MethodSpace's fields."""
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}", where=f"methods.{name}", remedy=nearest(name, METHODS))
    if body is not None and not isinstance(body, dict):
        raise ConfigError(
            f"{body!r} is not a mapping of settings", where=f"methods.{name}", remedy=f"write `{name}: {{}}`"
        )
    settings = dict(body or {})
    rates = settings.pop("learning_rate", None)
    if rates is None:
        default = METHODS[name].learning_rates
        # a method without a rate (none) is one trial; its rate is never used
        rates = [default.default if default else 1.0]
    return {
        "settings": {**settings, "method": name},
        "learning_rates": rates if isinstance(rates, (list, tuple)) else [rates],
    }


Model = TypeVar("Model", bound=BaseModel)


def validate(kind: type[Model], values: Any, *, where: str) -> Model:
    """Builds settings from plain values.

    Args:
        kind: the settings class.
        values: what a YAML file or a command line said.
        where: file or command, named in the error.

    Raises:
        ConfigError: with the first bad field, its value, and the nearest valid key for an unknown one.
    """
    if not isinstance(values, dict):
        raise ConfigError("is not a mapping of settings", where=where, remedy="write `key: value` lines")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        # pydantic's path repeats the chosen member of a union and indices of tuples; the user wrote neither
        path = ".".join(str(part) for part in first["loc"] if part not in METHODS)
        if first["type"] == "extra_forbidden":
            key = str(first["loc"][-1])
            raise ConfigError(
                f"unknown key {key!r}", where=f"{where}, {path}", remedy=nearest(key, _siblings(kind, first["loc"]))
            ) from None
        said = "" if first["type"] == "missing" else f" (value: {first['input']!r})"
        raise ConfigError(f"{first['msg'].removeprefix('Value error, ')}{said}", where=f"{where}, {path}") from None


def _siblings(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Returns the valid keys beside the unknown one that pydantic found at `location`."""
    fields = kind.model_fields
    for part in location[:-1]:
        if part in METHODS:
            fields = METHODS[str(part)].model_fields
            continue
        inner = fields[part].annotation if part in fields else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            fields = inner.model_fields
    return [name for name in fields if name != "method"]
