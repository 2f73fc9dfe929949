"""Checks at load that the packed row gives the model's own numbers.

Three comparisons on random tokens: segment attention with the attention the model was loaded with; several segments
packed in a row with each alone; and the chunked head with the model's own logits. A model in which positions of a row
meet outside attention (recurrent layers, rope scaling by the longest position) fails the second and is run one example
a row; one whose attention is another function fails the first, and is run so with its own attention.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_study.model import attention
from peft_study.model.attention import Segment, SegmentLayout
from peft_study.model.cache import KeyValueCache
from peft_study.model.head import Transform

_LENGTHS = ((5, 7), (64, 3))


@dataclass(frozen=True, slots=True)
class Proof:
    """Result of the checks; errors are norms of differences relative to the norm of the reference.

    Attributes:
        segmented: segment attention is in place and gives the model's own numbers.
        packs: several segments may share a row.
        chunked_head: the chunked head gives the model's own logits.
        attending_layers: layers that segment attention reaches.
        attention_error: segment attention against the model's own, each segment alone.
        packing_error: packed against alone.
        head_error: the chunked head against the model's own logits.
        plain_cache: keys and values of all layers have the shape that the configuration gives.
    """

    segmented: bool
    packs: bool
    chunked_head: bool
    attending_layers: int
    attention_error: float
    packing_error: float
    head_error: float
    plain_cache: bool = True

    @property
    def decodes(self) -> bool:
        """True where our decoder serves: sequences share a row, and one cache holds keys and values of all layers."""
        return self.packs and self.plain_cache


@torch.no_grad()
def prove(
    model: Any, head: nn.Module, transform: Transform, vocabulary: int, cached: tuple[int, int] | None = None
) -> Proof:
    """Compares segment attention with the model's own, and leaves in the model the one that is right.

    Args:
        model: the causal language model.
        head: its output layer.
        transform: what it does to that layer's output.
        vocabulary: tokens to draw from.
        cached: heads and head size of keys and values by the configuration; None: not asked.
    """
    parameter = next(model.parameters())
    tolerance = 1e-4 if parameter.dtype == torch.float32 else 0.1  # deep models in half precision differ by 1 to 3 %
    generator = torch.Generator().manual_seed(0)
    texts = [
        [torch.randint(vocabulary, (length,), generator=generator).to(parameter.device) for length in lengths]
        for lengths in _LENGTHS
    ]
    loaded_with = model.config._attn_implementation
    own = [torch.cat([_logits(model, [piece], segmented=False) for piece in pieces]) for pieces in texts]
    hidden = [torch.cat([_hidden(model, [piece], segmented=False) for piece in pieces]) for pieces in texts]
    head_error = max(_relative(transform(head(h)), logits) for h, logits in zip(hidden, own, strict=True))
    model.set_attn_implementation(attention.NAME)
    alone, packed = float("inf"), float("inf")
    config = model.config.get_text_config()
    seen = _attending_layers(model, texts[0][0])
    if seen and not _windows_only_in_a_mask(config, [window for window, _ in seen]):
        alone = max(
            _relative(torch.cat([_logits(model, [p], segmented=True) for p in pieces]), logits)
            for pieces, logits in zip(texts, own, strict=True)
        )
        packed = max(
            _relative(_logits(model, pieces, segmented=True), logits) for pieces, logits in zip(texts, own, strict=True)
        )
    segmented = alone <= tolerance
    if not segmented:
        model.set_attn_implementation(loaded_with)
    kinds = set(getattr(config, "layer_types", None) or ())  # others carry a state over the end of a segment
    packs = segmented and packed <= tolerance and kinds <= _ATTENDS and not rope_looks_at_the_row(config)
    plain = cached is None or {shape for _, shape in seen} <= {(cached, cached)}
    return Proof(segmented, packs, head_error <= tolerance, len(seen), alone, packed, head_error, plain)


_ATTENDS = {"full_attention", "sliding_attention", "chunked_attention"}


def decoder_of(model: Any) -> Any:
    """Returns the part of a causal language model that ends in hidden states."""
    found = model.get_decoder()
    return model.model if found is model else found  # Llama-4 names itself


def _windows_only_in_a_mask(config: Any, windows: list[int | None]) -> bool:
    """True where layers are said to see a window or chunk that is not handed to the attention function.

    The model's own code then masks the rest, and segment attention would not know of it. The texts that are tried at
    load are shorter than any such window.
    """
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if window and not any(windows):  # whatever its layer types say: Qwen2-MoE's mask does not look at them
        return True
    kinds = getattr(config, "layer_types", None) or ()
    attending = [kind for kind in kinds if kind in _ATTENDS]
    if len(attending) != len(windows):
        return False
    return any(kind != "full_attention" and not w for kind, w in zip(attending, windows, strict=True))


@torch.no_grad()
def learned_positions(model: Any, *, segmented: bool = False) -> int | None:
    """Returns the size of the model's table of positions; None where it computes them.

    Found by the model's lookups for a short and a longer row: a table of one size for both rows, in which each token
    takes the next entry, is one of positions (GPT-2; OPT, offset by two; GPT-J, of rotations).

    Args:
        model: the causal language model.
        segmented: segment attention is in place.
    """
    device = next(model.parameters()).device
    tables = []
    for length in _SHORT_ROWS:
        inputs = _inputs(model, [torch.zeros(length, dtype=torch.long, device=device)], segmented=segmented)
        with _Lookups() as lookups:
            decoder_of(model)(**inputs)
        tables.append({(size, first) for size, first, count in lookups.found if count == length})
    return min((size - first for size, first in tables[0] & tables[1]), default=None)


_SHORT_ROWS = (5, 9)


class _Lookups(TorchDispatchMode):
    """Notes the lookups of neighbouring entries: size of the table, first entry, number of entries."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten.embedding.default:
            self._note(args[0], 0, args[1])
        elif func in (aten.index_select.default, aten.gather.default):
            self._note(*args[:3])
        elif func is aten.index.Tensor:
            given = [(dim, index) for dim, index in enumerate(args[1]) if index is not None]
            if len(given) == 1:
                self._note(args[0], *given[0])
        return func(*args, **(kwargs or {}))

    def _note(self, table: Tensor, dim: int, index: Tensor) -> None:
        if index.dtype in (torch.long, torch.int32) and index.numel():
            entries = sorted(set(index.flatten().tolist()))
            if entries[-1] - entries[0] == len(entries) - 1:
                self.found.append((table.shape[dim], entries[0], len(entries)))


def forward_inputs(
    model: Any, embeddings_TE: Tensor, positions_T: Tensor, layout: SegmentLayout | KeyValueCache, *, segmented: bool
) -> dict[str, Any]:
    """Returns the arguments of the model's forward for one row.

    Args:
        model: the causal language model.
        embeddings_TE: what enters the first layer.
        positions_T: of the tokens in their segments.
        layout: of the row, or the cache of its sequences; not given to models that keep their own attention, whose row
            is one segment.
        segmented: segment attention is in place.
    """
    inputs: dict[str, Any] = {"inputs_embeds": embeddings_TE[None], "use_cache": False}
    if segmented:
        return {**inputs, "position_ids": positions_T[None], "segments": layout}
    state = inspect.signature(decoder_of(model).forward).parameters
    return {**inputs, "position_ids": positions_T[None]} if "position_ids" in state else inputs


def rope_looks_at_the_row(config: Any) -> bool:
    """True where the rotation of every token depends on the longest position of the row (``dynamic``, ``longrope``).

    It shows only beyond the original context, which is too long to be tried at load.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return any(rope.get("rope_type") in ("dynamic", "longrope") for rope in [parameters, *nested])


def _inputs(model: Any, pieces: list[Tensor], *, segmented: bool, **seen: Any) -> dict[str, Any]:
    segments, start = [], 0
    for piece in pieces:
        segments.append(Segment(start, start + len(piece), slot=0))
        start += len(piece)
    positions_T = torch.cat([torch.arange(len(p), device=p.device) for p in pieces])
    layout = SegmentLayout(tuple(segments), **seen)
    return forward_inputs(
        model, model.get_input_embeddings()(torch.cat(pieces)), positions_T, layout, segmented=segmented
    )


_Shape = tuple[int, int]
"""Heads and head size."""


def _attending_layers(model: Any, piece: Tensor) -> list[tuple[int | None, tuple[_Shape, _Shape]]]:
    """Returns of each layer that segment attention reaches its window, and the shapes of its keys and of its values.

    Empty where the model cannot take it.
    """
    captured: list[tuple[Tensor, Tensor]] = []
    windows: list[int | None] = []
    try:
        decoder_of(model)(**_inputs(model, [piece], segmented=True, captured=captured, windows=windows))
    except TypeError:  # a forward that does not pass on what it does not know
        return []
    shapes = [tuple((x.shape[0], x.shape[2]) for x in pair) for pair in captured]
    return [(window, (key, value)) for window, (key, value) in zip(windows, shapes, strict=True)]


def _logits(model: Any, pieces: list[Tensor], *, segmented: bool) -> Tensor:
    logits: Tensor = model(**_inputs(model, pieces, segmented=segmented)).logits[0].float()
    return logits


def _hidden(model: Any, pieces: list[Tensor], *, segmented: bool) -> Tensor:
    hidden: Tensor = decoder_of(model)(**_inputs(model, pieces, segmented=segmented)).last_hidden_state[0]
    return hidden


def _relative(ours: Tensor, reference: Tensor) -> float:
    scale = reference.norm().clamp_min(1e-12)
    return float(((ours.float() - reference).norm() / scale).nan_to_num(nan=float("inf")))
