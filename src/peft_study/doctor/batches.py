"""Batches of a data loader: their examples without padding, what they count, and the loss before the first step.

T tokens of an example
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from peft_study.doctor.observations import DataCounts
from peft_study.errors import first_line

Ids = npt.NDArray[np.int64]

IGNORED = -100
"""Label of a token that does not count in the loss."""
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|eot|>", "</s>")
_NEAR_END = 3
"""An end token is looked for among so many last supervised tokens: chat templates put a line break after it."""
_FEWEST_CUT = 4
"""Rows of one length that are no chance."""
_FEWEST_FOR_UNIGRAM = 500
_FORWARD_WORK = 4e10
"""Numbers of the model times tokens that are spent on the losses before step 1 on a CPU: about half a second."""
_DEVICE_SPEED = 50


class LabelledRow(NamedTuple):
    """One example: tokens and labels (T), without padding."""

    ids: Ids
    labels: Ids


class Ends(NamedTuple):
    """Special tokens: BOS, whether the tokenizer puts it first by itself, and the tokens that end an answer."""

    bos: int | None
    bos_text: str | None
    adds_bos: bool | None
    ends: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, model: Any = None) -> Ends:
        """Returns those of a tokenizer (or a processor's) and of a model's generation settings."""
        ends: set[int] = set()
        for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
            end = getattr(config, "eos_token_id", None)
            ends |= set(end) if isinstance(end, (list, tuple)) else {end} if isinstance(end, int) else set()
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if not hasattr(tokenizer, "get_vocab"):
            return cls(None, None, None, frozenset(ends))
        if tokenizer.eos_token_id is not None:
            ends.add(tokenizer.eos_token_id)
        vocabulary = tokenizer.get_vocab()
        ends |= {vocabulary[text] for text in _TURN_ENDS if text in vocabulary}
        bos = tokenizer.bos_token_id
        adds = bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]
        return cls(bos, tokenizer.bos_token, adds, frozenset(ends))


def as_rows(batches: Iterable[Any], *, pad: int | None = None) -> list[LabelledRow]:
    """Returns the examples of batches; those that have no input_ids (batch, T) and labels are left out.

        position_ids  0 1 2 3 4 0 1 2 0 1      a row of several examples is split where positions restart

    Args:
        batches: mappings of tensors or lists.
        pad: token that fills rows, where there is no attention mask.
    """
    rows = []
    for batch in batches:
        if not isinstance(batch, Mapping) or batch.get("input_ids") is None or batch.get("labels") is None:
            continue
        ids, labels = _array(batch["input_ids"]), _array(batch["labels"])
        if ids.ndim != 2 or ids.shape != labels.shape:
            continue
        mask, positions = (_array(batch[name]) if batch.get(name) is not None else None for name in _BESIDE)
        keep = mask != 0 if mask is not None and mask.shape == ids.shape else _not_padding(ids, labels, pad)
        positions = positions if positions is not None and positions.shape == ids.shape else None
        for place in range(len(ids)):
            kept = keep[place]
            starts = [0]
            if positions is not None:
                (resets,) = np.nonzero(np.diff(positions[place][kept]) < 0)
                starts += [int(start) + 1 for start in resets]
            row_ids, row_labels = ids[place][kept], labels[place][kept]
            rows += [LabelledRow(row_ids[a:b], row_labels[a:b]) for a, b in pairwise([*starts, len(row_ids)]) if b > a]
    return rows


def supervised_padding(batches: Iterable[Any]) -> int | None:
    """Returns how many labels of padding are not masked; None where no batch has an attention mask."""
    found, known = 0, False
    for batch in batches:
        if isinstance(batch, Mapping) and batch.get("attention_mask") is not None and batch.get("labels") is not None:
            mask, labels = _array(batch["attention_mask"]), _array(batch["labels"])
            if mask.shape == labels.shape:
                known = True
                found += int(((mask == 0) & (labels != IGNORED)).sum())
    return found if known else None


_BESIDE = ("attention_mask", "position_ids")


def _array(values: Any) -> Ids:
    values = values.detach().cpu() if hasattr(values, "detach") else values
    return np.asarray(values)


def _not_padding(ids: Ids, labels: Ids, pad: int | None) -> npt.NDArray[np.bool_]:
    """Returns which tokens lie between the padding at a row's ends."""
    text = np.ones(ids.shape, bool) if pad is None else (ids != pad) | (labels != IGNORED)
    return np.asarray(np.maximum.accumulate(text, 1) & np.maximum.accumulate(text[:, ::-1], 1)[:, ::-1])


def count_batches(
    rows: Sequence[LabelledRow],
    *,
    ends: Ends,
    max_length: int | None,
    virtual_tokens: int | None = None,
    positions: int | None = None,
    context: int | None = None,
    decoder_only: bool = True,
) -> DataCounts:
    """Returns what the examples of some batches tell.

    Args:
        rows: of `as_rows`, at least one.
        ends: special tokens.
        max_length: where examples were cut; None: not known.
        virtual_tokens, positions, context: as in `DataCounts`.
        decoder_only: labels are the inputs' own tokens.
    """
    lengths = [len(row.ids) for row in rows]
    # rows of one length without an end are pieces of a stream: they begin and end anywhere
    pieces = len(rows) >= 4 and len(set(lengths)) == 1 and not any(_ended(row, ends.ends) for row in rows)
    begins = decoder_only and not pieces
    first = [row for row in rows if ends.bos is not None and row.ids[0] == ends.bos]
    missing = begins and ends.adds_bos and len(first) < len(rows) / 2
    double = sum(bool(len(row.ids) > 1 and row.ids[1] == ends.bos) for row in first)
    # a collator that packs takes each example's first label away, which nothing predicts anyway
    marked = np.array([int((row.labels != IGNORED).sum()) + _first_unmarked(row) for row in rows])
    supervised = int(marked.sum())
    return DataCounts(
        rows=len(rows),
        tokens=sum(lengths),
        supervised=supervised,
        spread=float(marked.std() / marked.mean()) if supervised else None,
        truncated=_cut(rows, ends.ends, pieces=pieces) if decoder_only and ends.ends else None,
        unsupervised=sum(not (row.labels[1:] != IGNORED).any() for row in rows),
        max_length=max_length,
        longest=max(lengths),
        virtual_tokens=virtual_tokens,
        positions=positions,
        context=context,
        missing_bos=ends.bos_text if missing else None,
        bos_checked=begins if ends.adds_bos is not None else None,
        double_bos=double if begins and ends.bos is not None else None,
        no_end=_without_end(rows, ends.ends, max_length) if begins and ends.ends else None,
        shifted=_shifted(rows) if decoder_only else None,
    )


def _first_unmarked(row: LabelledRow) -> bool:
    return len(row.labels) > 1 and row.labels[0] == IGNORED and row.labels[1] != IGNORED


def _ended(row: LabelledRow, ends: frozenset[int]) -> bool:
    supervised = row.labels[row.labels != IGNORED]
    return any(int(token) in ends for token in supervised[-_NEAR_END:])


def _without_end(rows: Sequence[LabelledRow], ends: frozenset[int], max_length: int | None) -> int | None:
    """Returns how many whole rows end without an end token; None where no row is known to be whole."""
    if max_length is None:  # several rows of the greatest length: that is where they were cut
        longest = max(len(row.ids) for row in rows)
        max_length = longest if sum(len(row.ids) == longest for row in rows) > 1 else longest + 1
    whole = [row for row in rows if len(row.ids) < max_length and (row.labels != IGNORED).any()]
    return sum(not _ended(row, ends) for row in whole) if whole else None


def _cut(rows: Sequence[LabelledRow], ends: frozenset[int], *, pieces: bool) -> int | None:
    """Returns how many rows seem to be cut: all of one greatest length, without an end; None where that tells nothing.

    Args:
        rows: of some batches.
        ends: end tokens.
        pieces: rows look like pieces of a stream; of these only such without a supervised token lost something.
    """
    longest = max(len(row.ids) for row in rows)
    if not any((row.labels != IGNORED).any() for row in rows):  # nothing is supervised: no cut need have done it
        return None
    cut = [row for row in rows if len(row.ids) == longest and not _ended(row, ends)]
    silent = sum(not (row.labels[1:] != IGNORED).any() for row in cut)
    return len(cut) if len(cut) >= _FEWEST_CUT and (silent or not pieces) else None


def _shifted(rows: Sequence[LabelledRow]) -> bool | None:
    """Returns whether labels stand one place off their tokens; None where they are other tokens altogether."""
    same = beside = total = before = 0
    for row in rows:
        marked = row.labels != IGNORED
        total += int(marked[1:-1].sum())
        same += int((marked & (row.labels == row.ids))[1:-1].sum())
        beside += int((marked[:-1] & (row.labels[:-1] == row.ids[1:]))[1:].sum())
        before += int((marked[1:] & (row.labels[1:] == row.ids[:-1]))[:-1].sum())
    if not total:
        return None
    if same > 0.9 * total:
        return False
    return True if max(beside, before) > 0.9 * total and same < 0.5 * total else None


def unigram_loss(rows: Sequence[LabelledRow]) -> float | None:
    """Returns the entropy of the supervised tokens in nats; None where there are too few.

    Entropy of counts is too low in a small sample; (kinds - 1) / (2 tokens) is added for it (Miller 1955).
    """
    labels = np.concatenate([row.labels[1:] for row in rows])
    _, counts = np.unique(labels[labels != IGNORED], return_counts=True)
    total = int(counts.sum())
    if total < _FEWEST_FOR_UNIGRAM:
        return None
    shares = counts / total
    return float(-(shares * np.log(shares)).sum() + (len(counts) - 1) / (2 * total))


def losses_before(
    model: Any, batches: Sequence[Any], *, has_adapter: bool
) -> tuple[float | None, float | None, tuple[str, str] | None]:
    """Returns the losses of the model and of its base on the first rows of batches, or why they were not measured.

    Args:
        model: unwrapped.
        batches: as for `as_rows`.
        has_adapter: where it is False, model and base are one.
    """
    import torch

    if any(is_spread(parameter) or not parameter.numel() for parameter in model.parameters()):
        return None, None, ("the model is spread over processes", "模型分布在多个进程上")
    size = sum(parameter.numel() for parameter in model.parameters())
    device = next(model.parameters()).device
    some = _first_rows(batches, int(_FORWARD_WORK * (1 if device.type == "cpu" else _DEVICE_SPEED) / size))
    if not any(bool((batch["labels"][:, 1:] != IGNORED).any()) for batch in some):
        return None, None, ("no short rows with supervised tokens were seen", "没有看到含监督词元的短样本")
    was_training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            start = _mean_loss(model, some, device)
            if not has_adapter or _starts_at_base(model):
                return start, start, None
            with model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():
                return start, _mean_loss(model, some, device), None
    except Exception as error:  # noqa: BLE001 - whatever a foreign model raises, its training must not stop for it
        said = first_line(error)
        return None, None, (f"measuring it failed: {said}", f"测量失败：{said}")
    finally:
        for module, training in was_training:
            module.training = training


def is_spread(parameter: Any) -> bool:
    """True for a parameter that does not lie whole in this process: of FSDP, of tensor parallelism, or on no device."""
    kinds = {type(parameter).__name__, type(parameter.data).__name__}
    return bool(parameter.is_meta) or bool(kinds & {"DTensor", "FlatParameter"})


def _starts_at_base(model: Any) -> bool:
    """True for LoRA whose B is zero everywhere: its first output is the base's."""
    found = [p for name, p in model.named_parameters() if "lora_B." in name or "lora_embedding_A." in name]
    return bool(found) and not any(bool(parameter.any()) for parameter in found)


def _first_rows(batches: Sequence[Any], tokens: int) -> list[dict[str, Any]]:
    """Returns batches cut to so many tokens in all; at least one row of 1,000 tokens or fewer."""
    some: list[dict[str, Any]] = []
    left = tokens
    for batch in batches:
        ids = batch["input_ids"]
        count, width = ids.shape
        rows = min(count, left // width) or (1 if not some and width <= 1000 else 0)
        if not rows:
            break
        left -= rows * width
        cut = {name: value[:rows] for name, value in batch.items() if hasattr(value, "shape") and len(value) == count}
        some.append(cut)
    return some


def _mean_loss(model: Any, batches: Sequence[dict[str, Any]], device: Any) -> float:
    """Returns the mean over supervised tokens."""
    total = tokens = 0.0
    for batch in batches:
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        if count:
            output = model(**{name: value.to(device) for name, value in batch.items()})
            total += float(output["loss"]) * count
            tokens += count
    return total / tokens if tokens else float("nan")
