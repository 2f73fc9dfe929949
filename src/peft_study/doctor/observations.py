"""What the rules look at: plain numbers about a run, whoever trains it. None means: not known.

S points of the training loss     H held-out evaluations
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

import numpy as np
import numpy.typing as npt

from peft_study.config import MethodConfig, TrainingConfig, default_rate

Floats = npt.NDArray[np.float64]

FILE = "doctor.json"
"""Where a run's folder keeps what was seen of it live: ``{"observations": to_json(...), ...}``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Numbers that train, counted on the model itself.

    Attributes:
        base: numbers of the base model, and
        base_trainable: how many of them train.
        adapter: numbers of the adapter; 0 where none is attached, and
        adapter_trainable: how many of them train.
        first_unexpected: name of the first base parameter that trains.
        unattached: class of a PEFT configuration that was made but belongs to no model, such as PromptTuningConfig.
        own_base: the method trains numbers of the base on purpose (full fine-tuning, LN tuning, modules_to_save).
        unmoved: share of the numbers that train that a step of AdamW at the peak rate rounds back to what they were.
    """

    base: int
    base_trainable: int
    adapter: int
    adapter_trainable: int
    first_unexpected: str | None = None
    unattached: str | None = None
    own_base: bool = False
    unmoved: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedSettings:
    """How a run trains.

    Attributes:
        method: lora, prompt_tuning, prefix_tuning, p_tuning, ia3, ..., full; a `peft_type` of peft in lower case.
        learning_rate: peak rate of the optimizer.
        optimizer: name, as adamw or adafactor.
        schedule: linear, cosine, constant, ...
        warmup_steps, total_steps: optimizer steps.
        batch_size: examples an optimizer step, over all devices and micro-batches.
        accumulation: micro-batches a step.
        mean_of_means: the loss of a step is the mean of its micro-batches' means, not the mean over tokens.
        clip_norm: largest gradient norm; inf: off.
        weight_decay: of the optimizer.
        parameter_dtype: of what trains, as bfloat16; compute_dtype: of the forward pass.
        rank, alpha, tokens, init: of the method; tokens are virtual tokens.
        rank_stabilised: LoRA's update is scaled by alpha / sqrt(rank), not alpha / rank.
        narrowest: smaller side of the narrowest layer that LoRA updates, and width: of the model.
        projection: an MLP makes the prefix or prompt.
        seconds, memory_bytes: that the run is expected to take; free_bytes: memory there is for it.
    """

    method: str | None = None
    learning_rate: float | None = None
    optimizer: str | None = None
    schedule: str | None = None
    warmup_steps: int | None = None
    total_steps: int | None = None
    batch_size: int | None = None
    accumulation: int | None = None
    mean_of_means: bool | None = None
    clip_norm: float | None = None
    weight_decay: float | None = None
    parameter_dtype: str | None = None
    compute_dtype: str | None = None
    rank: int | None = None
    alpha: float | None = None
    tokens: int | None = None
    init: str | None = None
    rank_stabilised: bool | None = None
    narrowest: int | None = None
    width: int | None = None
    projection: bool | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCounts:
    """The examples as the model sees them: of a whole data set, or of the batches that were looked at.

    Attributes:
        rows: examples that were counted.
        tokens, supervised: of all of them, after the cut to `max_length`.
        conversations: rows are prompts with answers.
        spread: standard deviation of a row's supervised tokens, as a share of their mean.
        truncated: rows that are cut; unsupervised: rows without a supervised token.
        max_length: the cut in tokens.
        longest: tokens of the longest row after the cut; virtual_tokens: that the method puts before it.
        positions: most that the model can compute (an embedding table's rows); context: that it was made for.
        missing_bos: the BOS token as text, where the tokenizer puts it first by itself and rows do not begin with it.
        double_bos: rows that begin with two of them.
        padding: supervised tokens that are padding.
        no_end: rows whose last supervised token is no end token, though they are whole.
        shifted: labels stand one place off their tokens. (Libraries shift inside the model: labels equal inputs.)
        duplicates: rows that say the same as an earlier one; overlap: held-out rows that also train.
        largest_source: name and share of rows of the largest source; None where there is one source alone.
        template: of the chats, and tuned_template: the one that the model was tuned with, as names or digests.
    """

    rows: int | None = None
    tokens: int | None = None
    supervised: int | None = None
    conversations: bool | None = None
    spread: float | None = None
    truncated: int | None = None
    unsupervised: int | None = None
    max_length: int | None = None
    longest: int | None = None
    virtual_tokens: int | None = None
    positions: int | None = None
    context: int | None = None
    missing_bos: str | None = None
    bos_checked: bool | None = None
    double_bos: int | None = None
    padding: int | None = None
    no_end: int | None = None
    shifted: bool | None = None
    duplicates: int | None = None
    held_out_rows: int | None = None
    overlap: int | None = None
    largest_source: tuple[str, float] | None = None
    template: str | None = None
    tuned_template: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCurve:
    """The losses of a run by optimizer step, in rising order of steps; NaN: not logged there.

    Attributes:
        steps: of the S points; loss: nats a token, mean over the `window` optimizer steps up to each point.
        window: optimizer steps that a point averages; 1: every step is there.
        rate: learning rate; gradient_norm: before clipping; epoch: passes over the data; loss_scale: of fp16.
        minus_base: loss minus the untouched base's loss on the same examples.
        held_out_steps: of the H evaluations; step 0: before training. held_out_loss: nats a token.
        held_out_minus_base, held_out_low, held_out_high: difference from the untouched base, with a 95 % interval.
        source_loss: held-out losses (H) of each source.
        accuracy_steps, accuracy: shares of right answers, 0 to 1.
        base_loss: of the untouched base on the held-out examples, and start_loss: before step 1 on the same.
        unigram_loss: of the best guess that ignores the input, nats a token, on the supervised tokens.
        resumed: steps at which the run was taken up again.
        skipped: optimizer steps without an update (fp16 overflow).
        notes: what the reader had to put right in the log, a line each.
    """

    steps: Floats
    loss: Floats
    window: int = 1
    rate: Floats | None = None
    gradient_norm: Floats | None = None
    epoch: Floats | None = None
    loss_scale: Floats | None = None
    minus_base: Floats | None = None
    held_out_steps: Floats | None = None
    held_out_loss: Floats | None = None
    held_out_minus_base: Floats | None = None
    held_out_low: Floats | None = None
    held_out_high: Floats | None = None
    source_loss: dict[str, Floats] | None = None
    accuracy_steps: Floats | None = None
    accuracy: Floats | None = None
    base_loss: float | None = None
    start_loss: float | None = None
    unigram_loss: float | None = None
    resumed: tuple[int, ...] = ()
    skipped: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterState:
    """An adapter's weights, in memory or in its folder.

    Attributes:
        untouched: nothing was learned: every B of LoRA is zero, or the prompt equals its initialisation.
        bad: names of tensors that hold NaN or infinity.
        embeddings: bytes of embedding tables of the base that lie in the file; bytes: of the file.
        base: path or name of the base that the configuration tells; base_found: whether it is there.
        differences: what the configuration says and the weights contradict, a line each: ``config: ...; weights: ...``.
    """

    untouched: bool | None = None
    bad: tuple[str, ...] | None = None
    embeddings: int | None = None
    bytes: int | None = None
    base: str | None = None
    base_found: bool | None = None
    differences: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """All that is known of one run.

    Attributes:
        stage: before the first step, during the run or after its end.
        steps_done: optimizer steps so far.
        reasons: why something is not known, by dotted name as ``curve.rate``, in English and Chinese.
    """

    stage: str = "after"
    steps_done: int | None = None
    settings: UsedSettings = field(default_factory=UsedSettings)
    parameters: ParameterCounts | None = None
    data: DataCounts | None = None
    curve: LossCurve | None = None
    adapter: AdapterState | None = None
    reasons: dict[str, tuple[str, str]] = field(default_factory=dict)


def configured(method: MethodConfig, training: TrainingConfig, *, steps: int | None, dtype: str | None) -> UsedSettings:
    """Returns the settings of a run of ours.

    Args:
        method, training: as configured.
        steps: optimizer steps of the whole run.
        dtype: of the base, which computes in it; what is added to it trains in float32.
    """
    return UsedSettings(
        method=method.method,
        learning_rate=training.learning_rate or default_rate(method),
        optimizer="adamw",
        schedule=training.schedule,
        warmup_steps=None if steps is None else int(steps * training.warmup_ratio),
        total_steps=steps,
        batch_size=training.batch_size,
        accumulation=1,
        mean_of_means=False,
        clip_norm=np.inf if training.clip_norm is None else training.clip_norm,
        weight_decay=training.weight_decay,
        parameter_dtype="float32",
        compute_dtype=dtype,
        rank=getattr(method, "rank", None),
        alpha=getattr(method, "alpha", None),
        tokens=getattr(method, "tokens", None),
        init=getattr(method, "init", None),
    )


def to_json(value: Any) -> Any:
    """Returns observations, or a part of them, as plain JSON values; arrays become lists, NaN becomes None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {name: item for name, item in found.items() if item is not None}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        return [to_json(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        return to_json(value.item())
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    return "inf" if value == np.inf else value


def from_json(values: dict[str, Any], kind: type[Any] = Observations) -> Any:
    """Returns what `to_json` wrote."""
    hints, found = get_type_hints(kind), {}
    for name, value in values.items():
        if name in hints and value is not None:
            found[name] = _restored(value, hints[name])
    return kind(**found)


def _restored(value: Any, hint: Any) -> Any:
    choices = [choice for choice in (get_args(hint) or (hint,)) if choice is not type(None)]
    kind = choices[0] if hint not in (dict, tuple) else hint
    if isinstance(value, dict):
        if dataclasses.is_dataclass(kind):
            return from_json(value, kind)  # type: ignore[arg-type]
        arrays = "source_loss" if "ndarray" in str(hint) else None
        return {key: np.array(item, dtype=np.float64) if arrays else tuple(item) for key, item in value.items()}
    if isinstance(value, list):
        return np.array(value, dtype=np.float64) if "ndarray" in str(hint) else tuple(value)
    return np.inf if value == "inf" else value
