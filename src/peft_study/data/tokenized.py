"""The files that hold tokenised conversations: how they are written, checked and read.

<folder>/
    tokens.int32       all rows, one after the other
    supervised.uint8   1 where the token is supervised
    offsets.int64      N + 1 ends: row i is [offsets[i], offsets[i + 1])
    supervised_counts.int64, whole_lengths.int64, first.int64, digests.bytes, sources.int32
    ids.jsonl          one JSON string a row
    meta.json          counts, the names of the sources, sizes and checksums; written last
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from peft_study.data.conversation import Example
from peft_study.data.parallel import DIGEST_BYTES, EncodedChunk

#: Raised whenever the files change their form.
LAYOUT_VERSION = 1

_META = "meta.json"


class TokenizedData:
    """N tokenised conversations, memory-mapped: rows are read from disk when they are asked for.

    Attributes:
        folder: where the files lie.
        key: the cache key.
        lengths_N: tokens of each row.
        supervised_N: supervised tokens of each row; at least 1.
        whole_lengths_N: tokens of each row before it was cut to ``max_length``.
        first_N: position of each row's first supervised token.
        dropped: rows that lost all supervision to the cut; they are not among the N.
        truncated: rows that were cut, the dropped ones included.
        dropped_lengths: whole lengths of the dropped rows, in tokens.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        self.folder = folder
        self.key: str = meta["key"]
        self.meta = dict(meta)
        self.dropped: int = meta["dropped"]
        self.truncated: int = meta["truncated"]
        self.dropped_lengths: list[int] = meta["dropped_lengths"]
        self._tokens = self._map("tokens.int32", np.int32)
        self._supervised = self._map("supervised.uint8", np.uint8)
        self._offsets: npt.NDArray[np.int64] = np.asarray(self._map("offsets.int64", np.int64))
        self.lengths_N: npt.NDArray[np.int64] = np.diff(self._offsets)
        self.supervised_N: npt.NDArray[np.int64] = np.asarray(self._map("supervised_counts.int64", np.int64))
        self.whole_lengths_N: npt.NDArray[np.int64] = np.asarray(self._map("whole_lengths.int64", np.int64))
        self.first_N: npt.NDArray[np.int64] = np.asarray(self._map("first.int64", np.int64))

    def _map(self, name: str, dtype: type[np.generic]) -> npt.NDArray[Any]:
        return np.memmap(self.folder / name, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return len(self.lengths_N)

    def __getitem__(self, i: int) -> Example:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        row = i % len(self)
        span = slice(int(self._offsets[row]), int(self._offsets[row + 1]))
        return Example(np.array(self._tokens[span]), np.array(self._supervised[span], dtype=np.bool_))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @functools.cached_property
    def ids(self) -> Sequence[str]:
        """The id of each row."""
        with (self.folder / "ids.jsonl").open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    @functools.cached_property
    def sources(self) -> Sequence[str]:
        """The source of each row."""
        names = self.meta["sources"]
        return [names[number] for number in self._map("sources.int32", np.int32)]

    @property
    def digests(self) -> Sequence[bytes]:
        """What each row says, as a hash: rows that say the same have the same."""
        flat = (self.folder / "digests.bytes").read_bytes()
        return [flat[start : start + DIGEST_BYTES] for start in range(0, len(flat), DIGEST_BYTES)]


class _Checked:
    """A file that counts and sums what is written to it."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self.name = path.name
        self.size = 0
        self.checksum = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.size += len(data)
        self.checksum = zlib.crc32(data, self.checksum)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TokenWriter:
    """Writes chunks into the files of a folder; holds one chunk at a time.

    Attributes:
        rows_seen: rows given to ``add``.
        rows_kept: rows written: those with something supervised.
        truncated: rows that were cut to the encoder's ``max_length``.
        dropped_lengths: whole lengths of the rows that were not written, in tokens.
        shortest_first: position of the first supervised token, the smallest of the rows that lost theirs to the cut.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {
            name: _Checked(folder / name)
            for name in (
                "tokens.int32", "supervised.uint8", "offsets.int64", "supervised_counts.int64",
                "whole_lengths.int64", "first.int64", "sources.int32", "digests.bytes", "ids.jsonl",
            )
        }  # fmt: skip
        self._sources: dict[str, int] = {}
        self._end = 0
        self.rows_seen = 0
        self.rows_kept = 0
        self.truncated = 0
        self.dropped_lengths: list[int] = []
        self.shortest_first: int | None = None
        self._write("offsets.int64", np.zeros(1, dtype=np.int64))

    def _write(self, name: str, data: npt.NDArray[Any] | bytes) -> None:
        self._files[name].write(data if isinstance(data, bytes) else data.tobytes())

    def add(self, chunk: EncodedChunk) -> None:
        """Writes the rows of a chunk that still have something supervised."""
        starts_N = np.cumsum(chunk.lengths_N) - chunk.lengths_N
        counts_N = np.add.reduceat(chunk.supervised_T, starts_N, dtype=np.int64)
        counts_N[chunk.lengths_N == 0] = 0  # reduceat gives an empty row its neighbour's first element
        kept_N = counts_N > 0
        kept_T = np.repeat(kept_N, chunk.lengths_N)
        self.rows_seen += len(kept_N)
        self.rows_kept += int(kept_N.sum())
        self.truncated += int((chunk.lengths_N < chunk.whole_lengths_N).sum())
        self.dropped_lengths += chunk.whole_lengths_N[~kept_N].tolist()
        for first in chunk.first_N[~kept_N & (chunk.first_N >= 0)].tolist():
            self.shortest_first = first if self.shortest_first is None else min(first, self.shortest_first)
        ends_N = self._end + np.cumsum(chunk.lengths_N[kept_N])
        self._end = int(ends_N[-1]) if len(ends_N) else self._end
        kept = np.flatnonzero(kept_N).tolist()
        numbers = [self._sources.setdefault(chunk.sources[row], len(self._sources)) for row in kept]
        self._write("tokens.int32", chunk.tokens_T[kept_T])
        self._write("supervised.uint8", chunk.supervised_T[kept_T].astype(np.uint8))
        self._write("offsets.int64", ends_N)
        self._write("supervised_counts.int64", counts_N[kept_N])
        self._write("whole_lengths.int64", chunk.whole_lengths_N[kept_N])
        self._write("first.int64", chunk.first_N[kept_N])
        self._write("sources.int32", np.array(numbers, dtype=np.int32))
        self._write("digests.bytes", b"".join(_digest(chunk, row) for row in kept))
        self._write("ids.jsonl", "".join(json.dumps(chunk.ids[row]) + "\n" for row in kept).encode())

    def finish(self, description: Mapping[str, Any]) -> dict[str, Any]:
        """Writes ``meta.json`` and returns what it holds. The data is on the disk before it."""
        meta = {
            **description,
            "layout": LAYOUT_VERSION,
            "rows": self.rows_kept,
            "dropped": len(self.dropped_lengths),
            "dropped_lengths": self.dropped_lengths,
            "truncated": self.truncated,
            "sources": list(self._sources),
            "files": {file.name: [file.size, file.checksum] for file in self._files.values()},
        }
        meta["checksum"] = _meta_checksum(meta)
        with (self._folder / _META).open("w", encoding="utf-8") as file:
            json.dump(meta, file)
            file.flush()
            os.fsync(file.fileno())
        return meta

    def close(self) -> None:
        """Closes the files; everything written is on the disk after it."""
        try:
            for file in self._files.values():
                file.sync()
        finally:
            for file in self._files.values():
                with contextlib.suppress(OSError):  # a full disk refuses the last flush once more
                    file.close()


def _digest(chunk: EncodedChunk, row: int) -> bytes:
    return chunk.digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]


def _meta_checksum(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in meta.items() if k != "checksum"}, sort_keys=True).encode())


def valid_meta(folder: Path) -> dict[str, Any] | None:
    """The folder's meta data if every file is as it was written, else None."""
    try:
        meta: dict[str, Any] = json.loads((folder / _META).read_bytes())
        if meta["layout"] != LAYOUT_VERSION or meta["key"] != folder.name or meta["checksum"] != _meta_checksum(meta):
            return None
        for name, (size, checksum) in meta["files"].items():
            if (folder / name).stat().st_size != size or _checksum(folder / name) != checksum:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return meta


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            checksum = zlib.crc32(piece, checksum)
    return checksum
