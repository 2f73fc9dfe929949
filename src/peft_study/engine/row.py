"""One packed row: from examples of several trials to losses, and back to gradients.

    items:     [trial 0: ex 7][trial 0: ex 2][trial 1: ex 7      ]      (trial 1: prompt tuning, P = 2)
    row:       | 0 1 2 3 4 5 | 0 1 2 3      | v v 0 1 2 3 4 5   |      tokens, v = virtual
    positions: | 0 1 2 3 4 5 | 0 1 2 3      | 0 1 2 3 4 5 6 7   |      (a prefix of P starts them at P)
    predicts:  |     * * *   |   * *        |       * * *       |      position before each supervised token

Shape legend: T tokens of the row, S supervised tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_study.data.conversation import Example
from peft_study.errors import ModelError, out_of_memory
from peft_study.methods.base import Adapter
from peft_study.methods.dropout import DropoutKey
from peft_study.methods.hooks import LinearHooks, Span
from peft_study.model.attention import Segment, SegmentLayout, one_after_another
from peft_study.model.head import logit_losses, token_losses
from peft_study.model.load import Base
from peft_study.model.proof import forward_inputs


@dataclass(frozen=True, slots=True)
class Item:
    """One example of one trial, to be placed in a row.

    Attributes:
        slot: the trial's place in the engine.
        adapter: the trial's trainable part.
        example: tokens and supervised mask.
        weight: factor of each supervised token's loss in what is differentiated.
        dropout: what dropout masks depend on; None in evaluation.
    """

    slot: int
    adapter: Adapter
    example: Example
    weight: float = 1.0
    dropout: DropoutKey | None = None

    @property
    def row_length(self) -> int:
        """Tokens that the item takes in the row, virtual ones included."""
        return self.adapter.row_tokens + len(self.example)


class DoesNotFit(ModelError):
    """An item does not fit into the memory, even in a row of its own; `adapter` is its trial's."""

    def __init__(self, item: Item, device: torch.device) -> None:
        super().__init__(
            f"one example of {item.row_length} tokens does not fit into the memory of {device}",
            remedy="use gradient_checkpointing, a lower max_length, or a smaller base",
        )
        self.adapter = item.adapter


@contextmanager
def said_whose(items: Sequence[Item], device: torch.device) -> Iterator[None]:
    """Names the item where a row of a single one does not fit; a longer row can be cut.

    Raises:
        DoesNotFit: instead of the device's own error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if len(items) > 1 or not out_of_memory(error):
            raise
        raise DoesNotFit(items[0], device) from None


@dataclass(slots=True)
class RowResult:
    """What a row's forward pass gave.

    Attributes:
        total: weighted sum of all token losses, differentiable.
        sums_N: sum of the token losses of each item, float64, on the device.
    """

    total: Tensor
    sums_N: Tensor

    @property
    def item_losses(self) -> list[float]:
        """Returns the summed token loss of each item, in nats, in the items' order.

        It waits for the device: asked for after backward, the device never waits for its next work.
        """
        losses: list[float] = self.sums_N.tolist()
        return losses


class RowRunner:
    """Computes rows on one base."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.hooks = LinearHooks(base.model)

    @contextmanager
    def row(self, items: Sequence[Item]) -> Iterator[RowResult]:
        """Runs the row forward; backward, if any, belongs inside the block (layers may be recomputed there).

        Items of one slot must stand together.
        """
        with self.placed(items) as (inputs, layout):
            places_S, targets_S, weights_S, owners_S = (x.to(self.base.device) for x in supervised(items, layout))
            if self.base.proof.chunked_head:
                hidden_TE = self.base.model.get_decoder()(**inputs).last_hidden_state[0]
                total, losses_S = token_losses(
                    hidden_TE[places_S], targets_S, weights_S, self.base.head, self.base.transform
                )
            else:  # the model does more to its logits than is known here: it makes them itself, all at once
                logits_SV = self.base.model(**inputs, logits_to_keep=places_S).logits[0]
                total, losses_S = logit_losses(logits_SV, targets_S, weights_S)
            home = "cpu" if owners_S.device.type == "mps" else owners_S.device  # MPS has no float64
            sums_N = torch.zeros(len(items), dtype=torch.float64, device=home)
            sums_N.index_add_(0, owners_S.to(home), losses_S.to(home, torch.float64))
            yield RowResult(total, sums_N)

    @contextmanager
    def placed(self, items: Sequence[Item]) -> Iterator[tuple[dict[str, Any], SegmentLayout]]:
        """Yields the arguments of the model's forward for a row of items, and its layout; forward belongs inside."""
        layout = self._layout(items)
        with self.adapted(_spans(items)):
            inputs = forward_inputs(
                self.base.model,
                self._embeddings(items),
                self._positions(items),
                layout,
                segmented=self.base.proof.segmented,
            )
            yield inputs, layout

    @contextmanager
    def adapted(self, spans: Sequence[Span]) -> Iterator[None]:
        """Makes the linear layers add what the adapters of these spans add."""
        for adapter in {id(span.adapter): span.adapter for span in spans}.values():
            self.hooks.ensure(adapter.adapted_modules())
        with self.hooks.row(spans):
            yield

    def logits(self, inputs: Mapping[str, Any], places_S: Tensor) -> Tensor:
        """Returns the (S, V) logits at places of a row, all of them at once."""
        if self.base.proof.chunked_head:
            hidden_TE = self.base.model.get_decoder()(**inputs).last_hidden_state[0]
            return self.base.transform(self.base.head(hidden_TE[places_S]))
        logits_SV: Tensor = self.base.model(**inputs, logits_to_keep=places_S).logits[0]
        return logits_SV

    def _layout(self, items: Sequence[Item]) -> SegmentLayout:
        segments, prefixes, start = [], {}, 0
        for item in items:
            segments.append(Segment(start, start + item.row_length, item.slot))
            start += item.row_length
            if item.adapter.prefix_tokens and item.slot not in prefixes:
                stack = item.adapter.key_values()
                assert stack is not None
                prefixes[item.slot] = stack
        return SegmentLayout(tuple(segments), prefixes)

    def _embeddings(self, items: Sequence[Item]) -> Tensor:
        """Returns what enters the first layer (T, E): the base's embeddings, and vectors where virtual tokens stand."""
        ids_T = np.concatenate([np.pad(item.example.tokens_L, (item.adapter.row_tokens, 0)) for item in items])
        text_TE = self.base.embed(torch.from_numpy(ids_T).long().to(self.base.device))
        adapters = {item.slot: item.adapter for item in items if item.adapter.row_tokens}
        if not adapters:
            return text_TE
        own = one_after_another({slot: adapter.row_tokens for slot, adapter in adapters.items()})
        which, places, start = [], [], 0
        for item in items:
            which += [*own.get(item.slot, ())]
            places += [*range(start, start + item.adapter.row_tokens)]
            start += item.row_length
        which_V, places_V = torch.tensor([which, places], device=self.base.device)
        vectors = [adapter.embeddings() for adapter in adapters.values()]
        # gathered before they are rounded: their gradients add up in float32
        vectors_VE = torch.cat([x for x in vectors if x is not None])[which_V].to(text_TE.dtype)
        return text_TE.index_copy(0, places_V, vectors_VE)

    def _positions(self, items: Sequence[Item]) -> Tensor:
        pieces = [np.arange(item.row_length) + item.adapter.prefix_tokens for item in items]
        return torch.from_numpy(np.concatenate(pieces)).to(self.base.device)


def _spans(items: Sequence[Item]) -> list[Span]:
    """Joins neighbouring items of one slot."""
    spans: list[Span] = []
    start = 0
    for _, group in groupby(items, key=lambda item: item.slot):
        own = list(group)
        end = start + sum(item.row_length for item in own)
        keys = tuple(item.dropout for item in own if item.dropout is not None)
        spans.append(Span(start, end, own[0].adapter, keys))
        start = end
    assert len(spans) == len({item.slot for item in items}), "items of one slot stand together"
    return spans


def supervised(items: Sequence[Item], layout: SegmentLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns for each supervised token: the place that predicts it, its id, its weight, its item."""
    places, targets, weights, owners = [], [], [], []
    for number, (item, segment) in enumerate(zip(items, layout.segments, strict=True)):
        (index,) = np.nonzero(item.example.supervised_L)
        assert not len(index) or index[0] > 0, "nothing precedes the first token"
        places.append(index - 1 + segment.start + item.adapter.row_tokens)
        targets.append(item.example.tokens_L[index])
        weights.append(np.full(len(index), item.weight, dtype=np.float32))
        owners.append(np.full(len(index), number))
    return (
        torch.from_numpy(np.concatenate(places)).long(),
        torch.from_numpy(np.concatenate(targets)).long(),
        torch.from_numpy(np.concatenate(weights)),
        torch.from_numpy(np.concatenate(owners)).long(),
    )


def fill_rows(items: Iterable[Item], budget: int, *, packs: bool) -> Iterator[list[Item]]:
    """Cuts items, in their order, into rows of at most `budget` tokens; a longer item has a row of its own.

    Args:
        items: to be run.
        budget: tokens a row.
        packs: False for models that take one example a row.
    """
    row: list[Item] = []
    used = 0
    for item in items:
        if row and (not packs or used + item.row_length > budget):
            yield row
            row, used = [], 0
        row.append(item)
        used += item.row_length
    if row:
        yield row
