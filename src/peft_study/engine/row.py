"""One packed row: from examples of several trials to losses, and back to gradients.

    items:     [trial 0: ex 7][trial 0: ex 2][trial 1: ex 7      ]      (trial 1: prompt tuning, P = 2)
    row:       | 0 1 2 3 4 5 | 0 1 2 3      | v v 0 1 2 3 4 5   |      tokens, v = virtual
    positions: | 0 1 2 3 4 5 | 0 1 2 3      | 0 1 2 3 4 5 6 7   |      (a prefix of P starts them at P)
    predicts:  |     * * *   |   * *        |       * * *       |      position before each supervised token

Shape legend: T tokens of the row, S supervised tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peft_study.data.conversation import Example
from peft_study.errors import ModelError, out_of_memory
from peft_study.methods.base import Adapter
from peft_study.methods.dropout import DropoutKey
from peft_study.methods.hooks import LinearHooks, Span
from peft_study.model.attention import Ids, Segment, SegmentLayout, kernel_index, one_after_another
from peft_study.model.head import logit_losses, token_losses
from peft_study.model.load import Base
from peft_study.model.proof import decoder_of, forward_inputs

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One example of one trial, to be placed in a row; equal only to itself.

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


def sample_item(adapter: Adapter, example: Example) -> Item:
    """Returns an item as training has them, with dropout, by which a row's memory is told."""
    return Item(0, adapter, example, dropout=DropoutKey(0, 0, 0, adapter.row_tokens + len(example)))


class DoesNotFit(ModelError):
    """An item does not fit into the memory, even in a row of its own; `adapter` is its trial's."""

    def __init__(self, item: Item, device: torch.device) -> None:
        super().__init__(
            f"one example of {item.row_length} tokens does not fit into the memory of {device}",
            remedy="use gradient_checkpointing, a lower max_length, or a smaller base",
        )
        self.adapter = item.adapter

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes what another process gets: the error without the adapter's tensors."""
        return partial(ModelError, where=self.where, remedy=self.remedy), (self.what,)


class RowNumbers(NamedTuple):
    """All numbers of a row that are known before any tensor of a trial is read, int64 but for the weights.

    Shape legend: T tokens, V virtual ones, S supervised ones, K keys and N segments of the row.

    Attributes:
        ids_T: token ids, 0 where a virtual token stands.
        positions_T: of the tokens in their segments.
        places_S: the token that predicts each supervised one.
        targets_S: its id.
        owners_S: number of its item.
        weights_S: factor of its loss, float32.
        virtual_V: place of each virtual token's vector among those of all slots, one after another.
        virtual_places_V: where it stands in the row.
        keys_K, query_ends, key_ends: see `kernel_index`; the ends have (N + 1,).
    """

    ids_T: Tensor
    positions_T: Tensor
    places_S: Tensor
    targets_S: Tensor
    owners_S: Tensor
    weights_S: Tensor
    virtual_V: Tensor
    virtual_places_V: Tensor
    keys_K: Tensor
    query_ends: Tensor
    key_ends: Tensor


@dataclass(frozen=True, slots=True)
class RowPlan:
    """A row's segments, spans and numbers, made on the host: for the next row while a device computes this one.

    Attributes:
        segments: one an item.
        spans: one a slot.
        whole: all of `RowNumbers`, one after another, so that they are copied once; pinned for CUDA.
        sizes: how many there are of each.
    """

    segments: tuple[Segment, ...]
    spans: tuple[Span, ...]
    whole: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, items: Sequence[Item], device: torch.device) -> RowPlan:
        """Returns the plan of a row of these items, in this order; those of one slot stand together."""
        ends = pairwise(accumulate((item.row_length for item in items), initial=0))
        segments = tuple(Segment(*own, item.slot) for own, item in zip(ends, items, strict=True))
        numbers = [*_of_tokens(items, segments), *_of_virtual_tokens(items, segments), *_of_keys(items, segments)]
        whole = torch.from_numpy(np.concatenate(numbers))
        whole = whole.pin_memory() if device.type == "cuda" else whole
        return cls(segments, _spans(items, segments), whole, tuple(len(x) for x in numbers))

    def numbers(self, device: torch.device) -> RowNumbers:
        """Returns the row's numbers on the device, which is not waited for."""
        parts = RowNumbers(*self.whole.to(device, non_blocking=True).split(self.sizes))
        return parts._replace(weights_S=parts.weights_S.to(torch.int32).view(torch.float32))


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


def retried(work: Callable[[int], Result], row_tokens: int) -> Result:
    """Returns what `work` does with rows of so many tokens, halved as often as one is out of memory.

    Raises:
        DoesNotFit: what `work` raises for a row of a single example.
    """
    while True:
        try:
            return work(row_tokens)
        except (RuntimeError, MemoryError) as error:
            if row_tokens == 1 or not out_of_memory(error):
                raise
        row_tokens //= 2  # outside the handler, whose traceback holds the row's tensors


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
    def row(self, items: Sequence[Item], plan: RowPlan | None = None) -> Iterator[RowResult]:
        """Runs the row forward; backward, if any, belongs inside the block (layers may be recomputed there).

        Args:
            items: those of one slot stand together.
            plan: of these items; None: made now.
        """
        with self.placed(items, plan) as (inputs, _, numbers):
            places_S, targets_S, owners_S = numbers.places_S, numbers.targets_S, numbers.owners_S
            if self.base.proof.chunked_head:
                hidden_TE = decoder_of(self.base.model)(**inputs).last_hidden_state[0]
                total, losses_S = token_losses(
                    hidden_TE[places_S], targets_S, numbers.weights_S, self.base.head, self.base.transform
                )
            else:  # the model does more to its logits than is known here: it makes them itself, all at once
                logits_SV = self.base.model(**inputs, logits_to_keep=places_S).logits[0]
                total, losses_S = logit_losses(logits_SV, targets_S, numbers.weights_S)
            home = "cpu" if owners_S.device.type == "mps" else owners_S.device  # MPS has no float64
            sums_N = torch.zeros(len(items), dtype=torch.float64, device=home)
            sums_N.index_add_(0, owners_S.to(home), losses_S.to(home, torch.float64))
            yield RowResult(total, sums_N)

    @contextmanager
    def placed(
        self, items: Sequence[Item], plan: RowPlan | None = None
    ) -> Iterator[tuple[dict[str, Any], SegmentLayout, RowNumbers]]:
        """Yields a row's arguments of the model's forward, its layout and its numbers; forward belongs inside."""
        plan = plan or RowPlan.of(items, self.base.device)
        numbers = plan.numbers(self.base.device)
        with self.adapted(plan.spans):
            layout = _layout(items, plan.segments, numbers)
            embeddings_TE = self._embeddings(items, numbers)
            inputs = forward_inputs(
                self.base.model, embeddings_TE, numbers.positions_T, layout, segmented=self.base.proof.segmented
            )
            yield inputs, layout, numbers

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
            hidden_TE = decoder_of(self.base.model)(**inputs).last_hidden_state[0]
            return self.base.transform(self.base.head(hidden_TE[places_S]))
        logits_SV: Tensor = self.base.model(**inputs, logits_to_keep=places_S).logits[0]
        return logits_SV

    def _embeddings(self, items: Sequence[Item], numbers: RowNumbers) -> Tensor:
        """Returns what enters the first layer (T, E): the base's embeddings, and vectors where virtual tokens stand."""
        text_TE = self.base.embed(numbers.ids_T)
        adapters = {item.slot: item.adapter for item in items if item.adapter.row_tokens}
        if not adapters:
            return text_TE
        vectors = [adapter.embeddings() for adapter in adapters.values()]
        # gathered before they are rounded: their gradients add up in float32
        vectors_VE = torch.cat([x for x in vectors if x is not None])[numbers.virtual_V].to(text_TE.dtype)
        return text_TE.index_copy(0, numbers.virtual_places_V, vectors_VE)


def _layout(items: Sequence[Item], segments: tuple[Segment, ...], numbers: RowNumbers) -> SegmentLayout:
    prefixes: dict[int, Tensor] = {}
    for item in items:
        if item.adapter.prefix_tokens and item.slot not in prefixes:
            stack = item.adapter.key_values()
            assert stack is not None
            prefixes[item.slot] = stack
    return SegmentLayout(segments, prefixes, index=(numbers.keys_K, numbers.query_ends, numbers.key_ends))


def _spans(items: Sequence[Item], segments: Sequence[Segment]) -> tuple[Span, ...]:
    """Joins neighbouring items of one slot."""
    spans = list[Span]()
    for _, group in groupby(zip(items, segments, strict=True), key=lambda pair: pair[0].slot):
        own = list(group)
        keys = tuple(item.dropout for item, _ in own if item.dropout is not None)
        spans.append(Span(own[0][1].start, own[-1][1].end, own[0][0].adapter, keys))
    assert len(spans) == len({item.slot for item in items}), "items of one slot stand together"
    return tuple(spans)


def _of_tokens(items: Sequence[Item], segments: Sequence[Segment]) -> list[Ids]:
    """Returns the first six of `RowNumbers`; a weight is the bits of its float32."""
    ids, positions, places, targets, owners, weights = (list[npt.NDArray[Any]]() for _ in range(6))
    for number, (item, segment) in enumerate(zip(items, segments, strict=True)):
        virtual = item.adapter.row_tokens
        (index,) = np.nonzero(item.example.supervised_L)
        assert not len(index) or index[0] > 0, "nothing precedes the first token"
        ids.append(np.pad(item.example.tokens_L, (virtual, 0)))
        positions.append(np.arange(item.row_length) + item.adapter.prefix_tokens)
        places.append(index - 1 + segment.start + virtual)
        targets.append(item.example.tokens_L[index])
        owners.append(np.full(len(index), number))
        weights.append(np.full(len(index), np.float32(item.weight).view(np.int32)))
    return [np.concatenate(x).astype(np.int64) for x in (ids, positions, places, targets, owners, weights)]


def _of_virtual_tokens(items: Sequence[Item], segments: Sequence[Segment]) -> tuple[Ids, Ids]:
    own = one_after_another({item.slot: item.adapter.row_tokens for item in items if item.adapter.row_tokens})
    which, places = list[int](), list[int]()
    for item, segment in zip(items, segments, strict=True):
        which += own.get(item.slot, ())
        places += range(segment.start, segment.start + item.adapter.row_tokens)
    return np.array(which, dtype=np.int64), np.array(places, dtype=np.int64)


def _of_keys(items: Sequence[Item], segments: Sequence[Segment]) -> tuple[Ids, Ids, Ids]:
    tokens = {item.slot: item.adapter.prefix_tokens for item in items if item.adapter.prefix_tokens}
    return kernel_index(segments, tokens)


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
