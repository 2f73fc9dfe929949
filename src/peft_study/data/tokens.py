"""Tokenised conversations on disk: made once, then memory-mapped.

    $PEFT_STUDY_CACHE/tokens/<key>.arrow     an Arrow stream of batches of up to 256 rows;
                                             the last, empty one has the counts as JSON; then 4 bytes of checksum

The key is a hash of the data files' content, the split, the column mapping, everything that decides the tokens (the
encoder's fingerprint), and this package's data code. The file appears whole or not at all, so that two processes may
make the same one. A file with a wrong checksum is made again; it is checked first, since Arrow trusts what it reads.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Example
from peft_study.data.parallel import DIGEST_BYTES, EncodedChunk, encode_rows
from peft_study.data.sources import open_sources
from peft_study.data.stream import OnProgress, read_conversations
from peft_study.doctor.observations import DataCounts, Observations
from peft_study.doctor.rule import examine
from peft_study.errors import DataError
from peft_study.model.digest import file_digest
from peft_study.storage.cache_dir import cache_root, code_digest
from peft_study.storage.files import AtomicFiles, output_error

_LAYOUT = 2
"""Raised with every change of the file's form."""
_SCHEMA = pa.schema(
    {
        "tokens": pa.list_(pa.int32()),
        "supervised": pa.list_(pa.uint8()),
        "supervised_count": pa.int64(),
        "whole_length": pa.int64(),
        "first": pa.int64(),
        "digest": pa.binary(DIGEST_BYTES),
        "id": pa.string(),
        "source": pa.string(),
    }
)


@dataclass(slots=True)
class _Counts:
    """What is counted while rows are written; fields as of `TokenizedData`.

    Attributes:
        seen, kept: rows read, and those with something supervised.
        shortest_first: smallest position of a first supervised token among the rows that lost theirs to the cut.
    """

    seen: int = 0
    kept: int = 0
    truncated: int = 0
    dropped_lengths: list[int] = field(default_factory=list)
    shortest_first: int | None = None


class TokenizedData:
    """N tokenised conversations, memory-mapped: rows are read from disk when they are asked for.

    Attributes:
        path: of the file.
        key: the cache key.
        lengths_N: tokens of each row.
        supervised_N: supervised tokens of each row; at least 1.
        whole_lengths_N: tokens of each row before it was cut to ``max_length``.
        first_N: position of each row's first supervised token.
        dropped: rows that lost all supervision to the cut; they are not among the N.
        truncated: rows that were cut, the dropped ones included.
        dropped_lengths: whole lengths of the dropped rows, in tokens.
    """

    def __init__(self, path: Path, meta: Mapping[str, Any], batches: Sequence[pa.RecordBatch]) -> None:
        self.path, self._batches = path, batches
        self.key: str = meta["key"]
        self.truncated: int = meta["truncated"]
        self.dropped_lengths: list[int] = meta["dropped_lengths"]
        self.dropped = len(self.dropped_lengths)
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)]).tolist()
        self._offsets = [batch["tokens"].offsets.to_numpy() for batch in batches]
        self._tokens = [batch["tokens"].values.to_numpy() for batch in batches]
        self._supervised = [batch["supervised"].values.to_numpy() for batch in batches]
        self.lengths_N: npt.NDArray[np.int64] = np.concatenate([np.diff(o) for o in self._offsets]).astype(np.int64)
        self.supervised_N: npt.NDArray[np.int64] = self._column("supervised_count")
        self.whole_lengths_N: npt.NDArray[np.int64] = self._column("whole_length")
        self.first_N: npt.NDArray[np.int64] = self._column("first")

    def _column(self, name: str) -> npt.NDArray[np.int64]:
        return np.concatenate([batch[name].to_numpy() for batch in self._batches])

    def _values(self, name: str) -> list[Any]:
        return [value for batch in self._batches for value in batch[name].to_pylist()]

    def __len__(self) -> int:
        return len(self.lengths_N)

    def __getitem__(self, i: int) -> Example:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        row = i % len(self)
        batch = bisect.bisect_right(self._starts, row) - 1
        start, end = self._offsets[batch][row - self._starts[batch] :][:2]
        return Example(
            np.array(self._tokens[batch][start:end]), np.array(self._supervised[batch][start:end], dtype=np.bool_)
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @functools.cached_property
    def ids(self) -> Sequence[str]:
        """The id of each row."""
        return self._values("id")

    @functools.cached_property
    def sources(self) -> Sequence[str]:
        """The source of each row."""
        return self._values("source")

    @property
    def digests(self) -> Sequence[bytes]:
        """A hash of what each row says: equal for rows that say the same."""
        return self._values("digest")

    @property
    def short_digests(self) -> npt.NDArray[np.uint64]:
        """The first eight bytes of each row's digest, which are as good for counting equals."""
        found = []
        for batch in self._batches:
            column = batch["digest"]
            values = np.frombuffer(column.buffers()[1], dtype=np.uint8).reshape(-1, DIGEST_BYTES)
            chosen = values[column.offset : column.offset + len(column), :8]
            found.append(np.ascontiguousarray(chosen).view(np.uint64).ravel())
        return np.concatenate(found)


def tokenize(
    sources: Sequence[str | Path],
    encoder: ChatEncoder,
    *,
    split: str | None = None,
    mapping: Mapping[str, str] | None = None,
    cache_dir: Path | None = None,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> TokenizedData:
    """Returns the tokens of the conversations in ``sources``, from the cache if they are there.

    Args:
        sources: files, folders or hub ids, in order.
        encoder: template, tokenizer and ``max_length``.
        split: the split to take of each source.
        mapping: what ``parse_mapping`` returned.
        cache_dir: instead of ``cache_root() / "tokens"``.
        workers: processes; None for one a core.
        on_progress: as `OnProgress`, of the rows encoded; not called when the cache serves.

    Raises:
        DataError: a source or row cannot be used, or ``max_length`` leaves no row anything to learn.
        TemplateError: the template refuses a row, or its answers cannot be located.
        OutputError: the cache cannot be written.
    """
    specs = [str(source) for source in sources]
    key = _cache_key(specs, encoder, split, mapping)
    path = (cache_dir or cache_root() / "tokens") / f"{key}.arrow"
    if (found := _opened(path, key)) is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(error, path.parent) from error
    counts, share_of_row = _Counts(), 0.0

    def reading(rows: int, share: float) -> None:
        nonlocal share_of_row
        share_of_row = share / max(rows, 1)

    conversations = read_conversations(specs, split=split, mapping=mapping, on_progress=reading)
    with AtomicFiles() as files:
        file = _Checked(files.open(path))
        with pa.ipc.new_stream(file, _SCHEMA) as writer:
            for chunk in encode_rows(conversations, encoder, workers):
                writer.write_batch(_batch(chunk, counts))
                if on_progress is not None:
                    on_progress(counts.seen, min(share_of_row * counts.seen, 1.0))  # reading is ahead of encoding
            if counts.kept == 0:
                _refuse_nothing_supervised(counts, encoder)
            description = {"key": key, "from": specs, "split": split, "template": encoder.template_name}
            meta = json.dumps({**description, **asdict(counts)})
            writer.write_batch(pa.RecordBatch.from_pylist([], schema=_SCHEMA), {"meta": meta})
        file.write(file.checksum)
    made = _opened(path, key)
    if made is None:
        raise DataError("was written but cannot be read back", where=str(path), remedy="check the disk")
    return made


class _Checked(io.RawIOBase):
    """A file being written, with the checksum of what was written so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.checksum = file, _checksum(b"")

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.checksum = _checksum(data, self.checksum)
        return self._file.write(data)


def _checksum(data: Any, before: bytes = b"\0" * 4) -> bytes:
    return zlib.crc32(data, int.from_bytes(before, "big")).to_bytes(4, "big")


def _opened(path: Path, key: str) -> TokenizedData | None:
    """Returns the data in a file, or None if there is none or it is not as it was written."""
    try:
        content = pa.memory_map(str(path)).read_buffer()
    except (OSError, pa.ArrowException):
        return None
    whole = memoryview(content)
    if len(whole) < 4 or _checksum(whole[:-4]) != bytes(whole[-4:]):
        return None
    reader, batches = pa.ipc.open_stream(content), list[pa.RecordBatch]()
    while True:
        batch, custom = reader.read_next_batch_with_custom_metadata()
        if custom is not None:
            meta = json.loads(custom[b"meta"])
            return TokenizedData(path, meta, batches) if meta["key"] == key else None
        batches.append(batch)


def _batch(chunk: EncodedChunk, counts: _Counts) -> pa.RecordBatch:
    """Returns the rows of a chunk that have something supervised, and counts all of them."""
    starts_N = np.cumsum(chunk.lengths_N) - chunk.lengths_N
    supervised_N = np.add.reduceat(chunk.supervised_T, starts_N, dtype=np.int64)
    supervised_N[chunk.lengths_N == 0] = 0  # reduceat gives an empty row its neighbour's first element
    kept_N = supervised_N > 0
    kept_T = np.repeat(kept_N, chunk.lengths_N)
    counts.seen += len(kept_N)
    counts.kept += int(kept_N.sum())
    counts.truncated += int((chunk.lengths_N < chunk.whole_lengths_N).sum())
    counts.dropped_lengths += chunk.whole_lengths_N[~kept_N].tolist()
    lost = chunk.first_N[~kept_N & (chunk.first_N >= 0)].tolist()
    if lost:
        counts.shortest_first = min(lost if counts.shortest_first is None else [counts.shortest_first, *lost])
    offsets = pa.array(np.cumsum([0, *chunk.lengths_N[kept_N]]), pa.int32())
    rows = np.flatnonzero(kept_N).tolist()
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(chunk.tokens_T[kept_T])),
        pa.ListArray.from_arrays(offsets, pa.array(chunk.supervised_T[kept_T].astype(np.uint8))),
        supervised_N[kept_N],
        chunk.whole_lengths_N[kept_N],
        chunk.first_N[kept_N],
        [chunk.digests[row] for row in rows],
        [chunk.ids[row] for row in rows],
        [chunk.sources[row] for row in rows],
    ]
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, f.type)
        for column, f in zip(columns, _SCHEMA, strict=True)
    ]
    return pa.record_batch(arrays, schema=_SCHEMA)


def _refuse_nothing_supervised(counts: _Counts, encoder: ChatEncoder) -> None:
    if counts.seen == 0:
        raise DataError("there are no rows", remedy="give a source that holds conversations")
    cut = counts.shortest_first is not None
    data = DataCounts(
        rows=counts.seen,
        supervised=0,
        truncated=counts.truncated if cut else 0,
        unsupervised=counts.seen,
        max_length=encoder.max_length,
    )
    remedy = f"choose another chat template than {encoder.template_name!r}"
    if counts.shortest_first is not None:
        remedy = (
            f"give at least {counts.shortest_first + 1}, which keeps one token of one row; the longest row has "
            f"{max(counts.dropped_lengths)}"
        )
    found = examine(Observations(data=data), checks=("truncated", "nothing_supervised"))
    found.refuse(DataError, where="max_length" if cut else None, remedy=remedy)


def _cache_key(specs: Sequence[str], encoder: ChatEncoder, split: str | None, mapping: Mapping[str, str] | None) -> str:
    data = [
        [source.name, source.split, [_digest(file) for file in source.files] or _hub_revision(source.spec)]
        for source in open_sources(specs, split)
    ]
    parts = [_LAYOUT, data, dict(mapping or {}), encoder.fingerprint, code_digest("data")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(f"cannot read it: {error.strerror}", where=str(path), remedy="check the path") from error


def _hub_revision(name: str) -> str:
    import huggingface_hub

    # `open_sources` has just asked the hub for the same name, so a failure here is no mistake of the user
    return str(huggingface_hub.HfApi().dataset_info(name, timeout=10).sha)
