"""One run of one method: base model, data, optimizer, budget, and what is written down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from peft_study.config.common import SettingError, Strict
from peft_study.config.methods import MethodConfig
from peft_study.errors import nearest

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Tracker = Literal["wandb", "trackio", "mlflow"]
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


class ModelConfig(Strict):
    """The frozen base model."""

    name: str = Field(description="folder, hub id, or the embedded 'smollm2-135m-instruct'")
    tokenizer: str | None = Field(None, description="tokenizer, when it is not the model's own")
    revision: str | None = Field(None, description="git revision on the hub")
    device: Device = Field("auto", description="auto takes cuda, then mps, then cpu")
    dtype: Dtype = Field("auto", description="of the frozen base; adapters are always float32")
    quantization: Literal["nf4", "int8"] | None = Field(
        None, description="base of 4 or 8 bits a weight, through bitsandbytes"
    )
    trust_remote_code: bool = Field(False, description="run code that ships with the model")


class SourceConfig(Strict):
    """One data source and how much of it is used."""

    path: str = Field(description="what `peft-study data convert` takes, or the embedded 'skills'")
    take: float = Field(1.0, gt=0, description="at most 1: share of the rows; above 1: number of rows")

    @field_validator("take")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value > 1 and value % 1 != 0:
            raise ValueError("is neither a whole number of rows nor a share of at most 1")
        return value


MAP_KEYS = ("messages", "prompt", "response", "system", "tools", "id", "source")
"""What a column may be said to hold."""


def check_mapping(mapping: Mapping[str, str]) -> None:
    """Refuses names of columns that say nothing, or do not go together.

    Raises:
        SettingError: naming the key.
    """
    for key in mapping:
        if key not in MAP_KEYS:
            raise SettingError(f"unknown key {key!r}", remedy=nearest(key, MAP_KEYS))
    if "messages" in mapping and ("prompt" in mapping or "response" in mapping):
        raise SettingError("messages goes without prompt and response", remedy="give one or the other")
    if ("prompt" in mapping) != ("response" in mapping):
        raise SettingError("prompt and response go together", remedy="give both")


class DataConfig(Strict):
    """Rows, their tokens, and the part that is held out."""

    train: tuple[SourceConfig, ...] = Field(description="training sources, in order", min_length=1)
    held_out: float | str | None = Field(
        None, description="from 1: rows; below 1: share; a path: rows of that file; None: 64, at most a tenth"
    )
    test: float | str | None = Field(
        None, description="opened once, after a study's choice; forms as above; None: as many (of a path: half of it)"
    )
    stratify: bool = Field(True, description="draw held-out rows from each source in proportion")
    split: str | None = Field(None, description="split of the sources, where they have several")
    mapping: dict[str, str] | None = Field(None, description="other column names, e.g. {messages: chat}")
    max_length: int | None = Field(1024, gt=0, description="tokens an example; the rest is cut off")
    chat_template: str | None = Field(None, description="None: the tokenizer's own; tulu, another name, or a file")
    add_bos: bool = Field(False, description="put BOS first where the template does not")
    limit: int | None = Field(None, gt=0, description="use this many rows at most, drawn at random by the seed")
    workers: int | None = Field(None, gt=0, description="processes that tokenise; None: all cores")

    @field_validator("mapping")
    @classmethod
    def _known(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        check_mapping(value or {})
        return value

    @field_validator("train", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        items = value if isinstance(value, (list, tuple)) else [value]
        return [{"path": str(item)} if isinstance(item, (str, Path)) else item for item in items]

    @field_validator("held_out", "test", mode="before")
    @classmethod
    def _amount(cls, value: Any) -> Any:
        if isinstance(value, bool) or value == "":
            raise ValueError("is neither a number of rows, nor a share of them, nor a path")
        if isinstance(value, (int, float)):
            if not value > 0:
                raise ValueError("a comparison needs held-out rows: give a number above 0")
            if value > 1 and value % 1 != 0:
                raise ValueError("is neither a whole number of rows nor a share below 1")
        return value

    @field_validator("test")
    @classmethod
    def _leaves_rows(cls, value: float | str | None, info: ValidationInfo) -> float | str | None:
        held_out = info.data.get("held_out")
        shares = [part for part in (held_out, value) if isinstance(part, float) and part < 1]
        if len(shares) == 2 and sum(shares) >= 1:
            raise ValueError(
                f"leaves nothing to train on beside held_out {held_out}: give shares that add up to less than 1"
            )
        return value


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
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto", description="recompute layers in the backward pass to save memory; auto: where rows do not fit without"
    )
    seed: int = Field(0, ge=0, description="initialisation and dropout")
    data_seed: int = Field(0, ge=0, description="order of the examples, and which rows are held out")
    row_tokens: int | None = Field(None, ge=1, description="tokens packed into one row; None: measured default")

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainingConfig:
        if self.schedule == "constant_with_warmup" and self.warmup_ratio == 0:
            raise ValueError("constant_with_warmup needs warmup_ratio above 0")
        return self


TRAINING_DIMENSIONS = ("learning_rate", "warmup_ratio", "weight_decay")
"""Settings of the optimizer that belong to a method's space."""


class TrialSettings(Strict):
    """Everything that decides the numbers of one trial; made once, when a study asks for the trial."""

    method: Annotated[MethodConfig, Field(discriminator="method")]
    training: TrainingConfig
    rungs: tuple[int, ...] = Field((), description="optimizer steps at which the held-out losses are measured")
    measure_start: bool = Field(True, description="the held-out losses are measured before step 1, too")
    keep: bool = Field(True, description="the adapter is saved at the end")

    @property
    def flat(self) -> dict[str, Any]:
        """Returns the method's settings and the optimizer's searched ones as one JSON object."""
        optimizer = {name: getattr(self.training, name) for name in TRAINING_DIMENSIONS}
        return {**optimizer, **self.method.model_dump(mode="json")}


class LoggingConfig(Strict):
    """What is written down while a trial runs, and how often."""

    log_every: int = Field(1, ge=1, description="optimizer steps between lines of metrics.jsonl")
    evaluate_every: int | None = Field(
        None, ge=1, description="steps between held-out losses; None: 4 a run, in a study its rungs"
    )
    checkpoint_every: int | Literal["epoch"] | None = Field(
        None,
        description="optimizer steps (of any trial in a slot, since the last), or epoch; None: by the clock",
    )
    checkpoint_minutes: float | None = Field(
        5.0, gt=0, description="minutes between checkpoints where no steps are given; None: only when stopped"
    )
    keep_checkpoints: int = Field(3, ge=-1, description="newest checkpoints kept, at least 1; -1: all")
    tensorboard: bool = Field(True, description="write event files beside metrics.jsonl")
    trackers: tuple[Tracker, ...] = Field((), description="experiment trackers that get settings, curves and results")
    base_loss: bool = Field(True, description="log the loss minus the untouched base's on the same examples")

    @field_validator("trackers", mode="before")
    @classmethod
    def _trackers(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

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
    early_stopping: int | None = Field(
        None,
        ge=1,
        description="held-out losses in a row without a lower one that end it; the best step's adapter is kept",
    )
    output: Path = Field(description="folder of the run")
