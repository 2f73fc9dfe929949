"""Greedy answers of many adapters on one base, side by side.

    prompts:   packed rows, as in training; every layer's keys and values go into the cache of their sequence
    each step: one row with the next token of every sequence; LoRA's products on the span of each adapter

    |  adapter 0: s0 s1 s2  |  adapter 1: s3 s4  |  adapter 2: s5  |

A prefix is the beginning of a cache, a prompt a few embeddings before the first token. Sequences are never padded on
the left: each has its own positions. What ended leaves the row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, groupby

import numpy as np
import torch

from peft_study.data.conversation import Example
from peft_study.engine.row import DoesNotFit, Item, RowRunner, fill_rows, said_whose
from peft_study.errors import out_of_memory
from peft_study.methods.base import Adapter
from peft_study.methods.hooks import Span
from peft_study.model.cache import KeyValueCache
from peft_study.model.proof import forward_inputs

BATCH = 64
"""Sequences that are continued together."""
DROP = 8
"""What ended leaves the batch when it is an eighth of it: each time the caches of the others are copied."""


@dataclass(frozen=True, slots=True)
class DecodingRequest:
    """A prompt of tokens for an adapter.

    Attributes:
        adapter: that answers.
        prompt: its tokens.
        most: tokens that the answer may have.
        stops: returns whether an answer so far ends here, as by a word; None: only tokens end it.
    """

    adapter: Adapter
    prompt: Sequence[int]
    most: int
    stops: Callable[[Sequence[int]], bool] | None = None


@dataclass(frozen=True, slots=True)
class Continuation:
    """The tokens of an answer, the one that ended it left out.

    Attributes:
        tokens: of the answer.
        ended: by such a token, or by `DecodingRequest.stops`; False: by its limit.
        seconds: from the start of its batch to its last token; the batch's other sequences took part of them.
    """

    tokens: tuple[int, ...]
    ended: bool
    seconds: float


class Decoder:
    """Continues prompts greedily on one base.

    Args:
        runner: of the base, whose attention must be that of segments (`Proof.segmented`, `Proof.packs`).
        ends: tokens that end an answer.
        row_tokens: tokens of a row of prompts.
        batch: sequences that are continued together.
    """

    def __init__(self, runner: RowRunner, *, ends: frozenset[int], row_tokens: int, batch: int = BATCH) -> None:
        self._runner, self._ends, self._row_tokens, self._batch = runner, ends, row_tokens, batch

    def answers(self, requests: Sequence[DecodingRequest]) -> Iterator[tuple[int, Continuation]]:
        """Yields the place of each request and its answer, as they are ready: longest prompts first.

        Raises:
            DoesNotFit: where a prompt does not fit into the memory.
        """
        order = sorted(range(len(requests)), key=lambda place: -len(requests[place].prompt))
        for start in range(0, len(order), self._batch):
            places = order[start : start + self._batch]
            first = {id(requests[place].adapter): place for place in reversed(places)}
            places.sort(key=lambda place: first[id(requests[place].adapter)])  # an adapter's sequences stand together
            yield from self._batch_answers(places, [requests[place] for place in places])

    @torch.no_grad()
    def _batch_answers(self, places: list[int], requests: list[DecodingRequest]) -> Iterator[tuple[int, Continuation]]:
        """Yields the answers of a batch; where it does not fit, the halves of what is not answered yet are batches."""
        started, left = time.perf_counter(), set(range(len(requests)))
        try:
            for number, tokens, ended in self._continued(requests):
                left.remove(number)
                yield places[number], Continuation(tokens, ended, time.perf_counter() - started)
        except (RuntimeError, MemoryError, DoesNotFit) as error:
            if len(requests) == 1 or not (isinstance(error, DoesNotFit) or out_of_memory(error)):
                raise
        # outside the handler, whose traceback holds the batch's tensors
        rest = sorted(left)
        for part in (rest[: len(rest) // 2], rest[len(rest) // 2 :]):
            if part:
                yield from self._batch_answers([places[n] for n in part], [requests[n] for n in part])

    def _continued(self, requests: Sequence[DecodingRequest]) -> Iterator[tuple[int, tuple[int, ...], bool]]:
        """Yields number, tokens, and whether the answer ended by itself, of each request when its answer is whole."""
        cache, next_B = self._begin(requests)
        answers: list[list[int]] = [[] for _ in requests]
        live = list(range(len(requests)))  # requests, in the order of the cache
        over: set[int] = set()
        for steps in count(1):
            for number, token in zip(live, next_B.tolist(), strict=True):
                if number in over:
                    continue
                ended = token in self._ends
                if not ended:
                    answers[number].append(token)
                    stops = requests[number].stops
                    ended = stops is not None and stops(answers[number])
                if ended or len(answers[number]) >= requests[number].most:
                    over.add(number)
                    yield number, tuple(answers[number]), ended
            left = [row for row, number in enumerate(live) if number not in over]
            if not left:
                return
            # one that has written all it may has no room, and no position, for more
            full = any(requests[number].most <= steps for number in live)
            if full or len(live) - len(left) >= max(1, len(live) // DROP):
                rows_B = torch.tensor(left, device=next_B.device)
                cache.keep(rows_B)
                next_B, live = next_B[rows_B], [live[row] for row in left]
            next_B = self._step(cache, [requests[number].adapter for number in live], next_B)

    def _begin(self, requests: Sequence[DecodingRequest]) -> tuple[KeyValueCache, torch.Tensor]:
        """Returns the caches of the prompts, and the first token of each answer."""
        base, slots = self._runner.base, {id(request.adapter): slot for slot, request in enumerate(requests)}
        items = []
        for request in requests:
            tokens_L = np.array(request.prompt, dtype=np.int32)
            example = Example(tokens_L, np.zeros(len(tokens_L), dtype=bool))
            items.append(Item(slots[id(request.adapter)], request.adapter, example))
        starts = [request.adapter.prefix_tokens for request in requests]
        room = max(
            start + item.row_length + request.most for start, item, request in zip(starts, items, requests, strict=True)
        )
        shape = base.layers, len(requests), base.kv_heads, room, base.head_dim
        cache = KeyValueCache.empty(shape, base.dtype, base.device)
        first, done = [], 0
        for row in fill_rows(items, self._row_tokens, packs=True):
            with said_whose(row, base.device), self._runner.placed(row) as (inputs, layout, _):
                layout.captured = []
                last_S = torch.tensor([segment.end - 1 for segment in layout.segments], device=base.device)
                first.append(self._runner.logits(inputs, last_S).argmax(-1))
            for layer, (key_GTD, value_GTD) in enumerate(layout.captured):
                for number, segment in enumerate(layout.segments, start=done):
                    span = slice(segment.start, segment.end)
                    prefix = layout.prefixes.get(segment.slot)
                    if prefix is not None:
                        cache.fill(number, 0, layer, prefix[layer, 0], prefix[layer, 1])
                    cache.fill(number, starts[number], layer, key_GTD[:, span], value_GTD[:, span])
            done += len(row)
        cache.lengths_B += torch.tensor(
            [start + item.row_length for start, item in zip(starts, items, strict=True)], device=base.device
        )
        return cache, torch.cat(first)

    def _step(self, cache: KeyValueCache, adapters: Sequence[Adapter], tokens_B: torch.Tensor) -> torch.Tensor:
        """Returns the token after each of these, which are the last ones of the sequences."""
        base, spans, end = self._runner.base, [], 0
        for _, group in groupby(adapters, key=id):
            own = list(group)
            spans.append(Span(end, end + len(own), own[0]))
            end += len(own)
        with self._runner.adapted(spans):
            inputs = forward_inputs(base.model, base.embed(tokens_B), cache.lengths_B, cache, segmented=True)
            all_B = torch.arange(len(tokens_B), device=tokens_B.device)
            next_B = self._runner.logits(inputs, all_B).argmax(-1)
        cache.advance()
        return next_B
