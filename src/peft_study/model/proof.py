"""Checks at load that the packed row gives the model's own numbers.

Two short segments packed against alone, a long one beside a short one, and the chunked head against the model's own
logits. A model in which positions of a row meet outside attention (recurrent layers, rope scaling by the longest
position) differs, and is then run one example a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_study.model.attention import Segment, SegmentLayout
from peft_study.model.head import Transform

_LENGTHS = ((5, 7), (64, 3))


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found at load.

    Attributes:
        packs: several segments may share a row.
        chunked_head: the chunked head gives the model's own logits.
        packing_error: largest difference between packed and alone, relative to the largest value.
        head_error: the same between the chunked head and the model's own logits.
    """

    packs: bool
    chunked_head: bool
    packing_error: float
    head_error: float


@torch.no_grad()
def prove(model: Any, head: nn.Module, transform: Transform, vocabulary: int) -> Proof:
    """Compares packed with alone and the chunked head with the model's logits, on random tokens."""
    parameter = next(model.parameters())
    tolerance = 1e-4 if parameter.dtype == torch.float32 else 4e-2
    generator = torch.Generator().manual_seed(0)
    worst_pack, worst_head = 0.0, 0.0
    for lengths in _LENGTHS:
        pieces = [torch.randint(vocabulary, (length,), generator=generator).to(parameter.device) for length in lengths]
        packed = _logits(model, pieces)
        alone = torch.cat([_logits(model, [piece]) for piece in pieces])
        worst_pack = max(worst_pack, _relative(packed, alone))
        hidden = _hidden(model, pieces)
        worst_head = max(worst_head, _relative(transform(head(hidden)), packed))
    packs = worst_pack <= tolerance and not rope_looks_at_the_row(model.config.get_text_config())
    return Proof(packs, worst_head <= tolerance, worst_pack, worst_head)


def rope_looks_at_the_row(config: Any) -> bool:
    """True where the rotation of every token depends on the longest position of the row (``dynamic``, ``longrope``).

    It shows only beyond the original context, which is too long to be tried at load.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return any(rope.get("rope_type") in ("dynamic", "longrope") for rope in [parameters, *nested])


def _inputs(model: Any, pieces: list[Tensor]) -> dict[str, object]:
    segments, start = [], 0
    for piece in pieces:
        segments.append(Segment(start, start + len(piece), slot=0))
        start += len(piece)
    device = pieces[0].device
    return {
        "inputs_embeds": model.get_input_embeddings()(torch.cat(pieces)[None]),
        "position_ids": torch.cat([torch.arange(len(p), device=device) for p in pieces])[None],
        "segments": SegmentLayout(tuple(segments)),
        "use_cache": False,
    }


def _logits(model: Any, pieces: list[Tensor]) -> Tensor:
    return model(**_inputs(model, pieces)).logits[0].float()


def _hidden(model: Any, pieces: list[Tensor]) -> Tensor:
    return model.get_decoder()(**_inputs(model, pieces)).last_hidden_state[0]


def _relative(ours: Tensor, reference: Tensor) -> float:
    scale = reference.abs().max().clamp_min(1e-12)
    return float(((ours.float() - reference).abs().max() / scale).nan_to_num(nan=float("inf")))
