"""Encoding many conversations on all cores, in order and in bounded memory.

conversations --> chunks of 256 --> one process a core --> EncodedChunk, in the order they were read
"""

from __future__ import annotations

import collections
import ctypes
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Conversation
from peft_study.errors import UserError

CHUNK_ROWS = 256

#: Below this many rows, starting processes costs more than it saves.
IN_PROCESS_ROWS = 2000

#: Bytes of a row's digest.
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """The tokens of up to CHUNK_ROWS conversations (N rows, T tokens in all), cut to the encoder's ``max_length``.

    Attributes:
        ids, sources: of the rows.
        digests: of what the rows say (`row_digest`).
        tokens_T, supervised_T: all rows, one after the other.
        lengths_N: tokens of each row.
        whole_lengths_N: tokens before the cut.
        first_N: position of the first supervised token before the cut; -1 where there is none.
    """

    ids: list[str]
    sources: list[str]
    digests: list[bytes]
    tokens_T: npt.NDArray[np.int32]
    supervised_T: npt.NDArray[np.bool_]
    lengths_N: npt.NDArray[np.int64]
    whole_lengths_N: npt.NDArray[np.int64]
    first_N: npt.NDArray[np.int64]


def row_digest(conversation: Conversation) -> bytes:
    """Returns DIGEST_BYTES that are equal for conversations that say the same.

    Roles, texts, tool calls and tools count; id, source, Unicode composition and the amount of white space do not.
    """
    said = [
        [message.role, " ".join(unicodedata.normalize("NFC", message.content).split()), message.extra]
        for message in conversation.messages
    ]
    text = json.dumps([said, conversation.tools], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def encode_chunk(conversations: list[Conversation], encoder: ChatEncoder) -> EncodedChunk:
    """Encodes the conversations one after the other.

    Raises:
        TemplateError: of the first that cannot be encoded.
        CancelledError: in a worker that was told to stop.
    """
    wholes = []
    for conversation in conversations:
        if _worker_stop.value:
            raise CancelledError
        wholes.append(encoder.encode_whole(conversation))
    cut = slice(encoder.max_length)
    return EncodedChunk(
        ids=[conversation.id for conversation in conversations],
        sources=[conversation.source for conversation in conversations],
        digests=[row_digest(conversation) for conversation in conversations],
        tokens_T=np.concatenate([whole.tokens_L[cut] for whole in wholes]),
        supervised_T=np.concatenate([whole.supervised_L[cut] for whole in wholes]),
        lengths_N=np.array([len(whole.tokens_L[cut]) for whole in wholes], dtype=np.int64),
        whole_lengths_N=np.array([len(whole) for whole in wholes], dtype=np.int64),
        first_N=np.array(
            [int(whole.supervised_L.argmax()) if whole.supervised_L.any() else -1 for whole in wholes], dtype=np.int64
        ),
    )


def encode_rows(
    conversations: Iterable[Conversation], encoder: ChatEncoder, workers: int | None = None
) -> Iterator[EncodedChunk]:
    """Yields the encoded conversations in chunks, in their order, on ``workers`` processes (None: one a core).

    At most three chunks per process are read ahead. Fewer than IN_PROCESS_ROWS rows are encoded in this process.

    Raises:
        UserError: of the first row that cannot be read or encoded; the same one whatever the number of processes.
    """
    rows = _Rows(conversations)
    count = _usable_cores() if workers is None else workers
    head = list(itertools.islice(rows, IN_PROCESS_ROWS)) if count > 1 else []
    chunks = _chunks(itertools.chain(head, rows))
    if len(head) < IN_PROCESS_ROWS:
        for chunk in chunks:
            yield encode_chunk(chunk, encoder)
    else:
        context = _context()
        # Told to stop rather than killed: the pool waits for ever for a result whose writer was killed half way.
        stop = context.RawValue(ctypes.c_bool, False)
        with ProcessPoolExecutor(count, context, _start_worker, (encoder, stop)) as pool:
            try:
                yield from _in_order(chunks, pool, limit=3 * count)
            except BaseException:
                stop.value = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    if rows.failure is not None:
        raise rows.failure


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Rows:
    """An iterator that ends at the first row that cannot be read, and keeps the error for later.

    Rows are read before they are encoded. The rows before the broken one are encoded first, and an error of theirs
    comes first.
    """

    def __init__(self, conversations: Iterable[Conversation]) -> None:
        self._rows = iter(conversations)
        self.failure: UserError | None = None

    def __iter__(self) -> Iterator[Conversation]:
        return self

    def __next__(self) -> Conversation:
        if self.failure is not None:
            raise StopIteration
        try:
            return next(self._rows)
        except UserError as error:
            self.failure = error
            raise StopIteration from None


def _chunks(rows: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        yield chunk


def _in_order(chunks: Iterator[list[Conversation]], pool: ProcessPoolExecutor, *, limit: int) -> Iterator[EncodedChunk]:
    pending: collections.deque[Future[EncodedChunk]] = collections.deque()
    for chunk in chunks:
        pending.append(pool.submit(_encode_in_worker, chunk))
        if len(pending) >= limit:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _context() -> multiprocessing.context.BaseContext:
    # Fork on Linux, as torch's data loaders do: it needs no importable main module, so it works in scripts and
    # notebooks. The children touch neither torch nor a device, so threads that torch holds in the parent are safe.
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


_worker_encoder: ChatEncoder | None = None
_worker_stop = ctypes.c_bool(False)


def _start_worker(encoder: ChatEncoder, stop: ctypes.c_bool) -> None:
    global _worker_encoder, _worker_stop
    # Ctrl-C reaches the whole process group, but only the parent handles it. Fork copied the parent's handlers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _worker_encoder, _worker_stop = encoder, stop


def _encode_in_worker(chunk: list[Conversation]) -> EncodedChunk:
    assert _worker_encoder is not None
    return encode_chunk(chunk, _worker_encoder)
