"""Rows of one file, streamed: JSON lines, a JSON array, Arrow, parquet; plain, gzip or zstandard.

file  --bytes in pieces-->  rows (dict)          only one piece is in memory
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import itertools
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from peft_study.errors import DataError

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
DATA_SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".arrow")
COMPRESSED_SUFFIXES = (".gz", ".zst")

# Called now and then with the share (0..1) of the file read so far.
Tick = Callable[[float], None]

_PIECE = 1 << 20  # bytes read at once
_BATCH = 256  # rows turned into Python objects at once
_LARGEST_ROW = 1 << 28  # characters; anything longer is more likely a missing bracket than a row
_BLANK = " \t\r\n"
SKIP = "correct the row, or leave such rows out with `peft-study data convert --on-error skip`"
_AGAIN = "the file is damaged or incomplete: copy or download it again"


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it is in a file.

    ``row`` counts from 1; in JSON lines it is the number of the line. Where the row itself cannot be read,
    ``broken`` says why and ``values`` is empty; an error of the whole file is raised instead.
    """

    file: Path
    row: int
    values: dict[str, Any]
    broken: DataError | None = None

    @property
    def where(self) -> str:
        """The place in words, as error messages name it."""
        return f"{self.file} row {self.row}"


def data_suffix(path: Path) -> str | None:
    """Returns ``.jsonl``, ``.parquet``, ... for a data file, also under ``.gz`` or ``.zst``; None for other files."""
    name = path.name.lower()
    for ending in COMPRESSED_SUFFIXES:
        name = name.removesuffix(ending)
    return next((suffix for suffix in DATA_SUFFIXES if name.endswith(suffix)), None)


def read_file(path: Path, tick: Tick) -> Iterator[RawRow]:
    """Yields the rows of one data file in order.

    Raises:
        DataError: the file is missing, empty, damaged, cut short or of no known kind.
    """
    suffix = data_suffix(path)
    if suffix is None:
        endings = ", ".join(DATA_SUFFIXES)
        raise DataError("is no data file", where=str(path), remedy=f"name a file ending in {endings} (or .gz, .zst)")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError("the file is missing or cannot be read", where=str(path), remedy=_AGAIN) from error
    if size == 0:
        raise DataError("the file is empty", where=str(path), remedy="give a file that holds rows")
    if suffix in JSON_SUFFIXES:
        return _json_rows(path, tick)
    return _columnar_rows(path, tick, _parquet_batches if suffix == ".parquet" else _arrow_batches)


def _pieces(path: Path, tick: Tick) -> Iterator[bytes]:
    """Yields the decompressed bytes; the first bytes, not the name, tell the compression."""
    import zstandard

    try:
        size = path.stat().st_size
        with path.open("rb") as raw:
            magic = raw.read(4)
            raw.seek(0)
            if magic[:2] == b"\x1f\x8b":
                pieces = _read_all(gzip.GzipFile(fileobj=raw, mode="rb"))
            elif magic == b"\x28\xb5\x2f\xfd":
                pieces = _zstandard_pieces(raw)
            else:
                pieces = _read_all(raw)
            for piece in pieces:
                tick(raw.tell() / size)
                yield piece
    except EOFError as error:
        raise DataError("the compressed file is cut short", where=str(path), remedy=_AGAIN) from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"the compressed file is damaged ({error})", where=str(path), remedy=_AGAIN) from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", where=str(path), remedy=_AGAIN) from error


def _read_all(handle: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    while piece := handle.read(_PIECE):
        yield piece


def _zstandard_pieces(raw: BinaryIO) -> Iterator[bytes]:
    """Yields what one or more zstandard frames hold; the library's own reader takes a cut frame for a complete one."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    for piece in _read_all(raw):
        rest = piece
        while rest:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(rest)
            rest = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError


def _json_rows(path: Path, tick: Tick) -> Iterator[RawRow]:
    """Yields rows of a JSON array or of JSON lines: the first character that is not blank decides."""
    pieces = _pieces(path, tick)
    head = b""
    while not head.strip() or codecs.BOM_UTF8.startswith(head):
        if (piece := next(pieces, None)) is None:
            break
        head = (head + piece).removeprefix(codecs.BOM_UTF8)
    if not head.strip():
        raise DataError("the file holds no rows", where=str(path), remedy="give a file that holds rows")
    read = _array_rows if head.lstrip()[:1] == b"[" else _line_rows
    yield from read(path, itertools.chain([head], pieces))


def _line_rows(path: Path, pieces: Iterator[bytes]) -> Iterator[RawRow]:
    for number, line in enumerate(_lines(pieces), start=1):
        if line.strip():
            yield _line_row(path, number, line)


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Cuts at the line feed only: U+2028 and its like are text inside a row."""
    parts: list[bytes] = []
    for piece in pieces:
        first, *others = piece.split(b"\n")
        parts.append(first)
        if others:
            yield b"".join(parts)
            yield from others[:-1]
            parts = [others[-1]]
    yield b"".join(parts)


def _line_row(path: Path, number: int, line: bytes) -> RawRow:
    where = f"{path} row {number}"
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        broken = DataError(f"not UTF-8 (byte {error.start + 1})", where=where, remedy="save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        broken = DataError(f"broken JSON line ({_reason(error)})", where=where, remedy=SKIP)
    else:
        return _checked(path, number, value)
    return RawRow(path, number, {}, broken)


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, character {error.pos + 1}"
    return str(error)


def _checked(path: Path, number: int, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(path, number, value)
    what = f"a row must be an object with named columns, this one is {type(value).__name__} {str(value)[:40]!r}"
    return RawRow(path, number, {}, DataError(what, where=f"{path} row {number}", remedy=SKIP))


class _Text:
    """A growing window on decoded text; ``position`` is where reading continues."""

    def __init__(self, path: Path, pieces: Iterator[bytes]) -> None:
        self._path = path
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.buffer = ""
        self.position = 0
        self.ended = False

    def more(self) -> None:
        """Doubles the text ahead, so that one long row costs linear time."""
        parts = [self.buffer[self.position :]]
        wanted = max(len(parts[0]), 1)
        self.position = 0
        try:
            while wanted > 0 and not self.ended:
                piece = next(self._pieces, None)
                self.ended = piece is None
                parts.append(self._decoder.decode(piece or b"", final=self.ended))
                wanted -= len(parts[-1])
        except UnicodeDecodeError as error:
            raise DataError("not UTF-8", where=str(self._path), remedy="save the file as UTF-8") from error
        self.buffer = "".join(parts)

    def next_sign(self) -> str:
        """Returns the next character that is not blank, without passing it; the empty text at the end."""
        while True:
            while self.position < len(self.buffer) and self.buffer[self.position] in _BLANK:
                self.position += 1
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if self.ended:
                return ""
            self.more()


def _array_rows(path: Path, pieces: Iterator[bytes]) -> Iterator[RawRow]:
    text = _Text(path, pieces)
    text.next_sign()
    text.position += 1  # the opening bracket
    if text.next_sign() == "]":
        text.position += 1
    else:
        for number in itertools.count(1):
            yield _checked(path, number, _array_value(text, f"{path} row {number}"))
            sign = text.next_sign()
            text.position += 1
            if sign == "]":
                break
            if sign != ",":
                what = "the array ends early" if sign == "" else f"broken JSON: {sign!r} where ',' or ']' belongs"
                raise DataError(what, where=f"{path} after row {number}", remedy=_AGAIN)
    if sign := text.next_sign():
        raise DataError(f"{sign!r} after the end of the array", where=str(path), remedy="keep one array a file")


def _array_value(text: _Text, where: str) -> Any:
    """Reads one element, reading more text while that may resolve the parser's error."""
    decoder = json.JSONDecoder()
    text.next_sign()
    while True:
        try:
            value, end = decoder.raw_decode(text.buffer, text.position)
        except json.JSONDecodeError as error:
            # For text that is cut off, the parser names the end, or where the open string begins.
            stops = error.msg.startswith("Unterminated string") or error.pos >= len(text.buffer) - 16
            if not stops or text.ended or len(text.buffer) > _LARGEST_ROW:
                what = f"broken JSON array ({error.msg})" if not text.ended else "the array is broken or ends early"
                raise DataError(what, where=where, remedy=_AGAIN) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"broken JSON array ({error})", where=where, remedy=_AGAIN) from error
        else:
            if end < len(text.buffer) or text.ended:  # a number might continue in the next piece
                text.position = end
                return value
        text.more()


def _columnar_rows(path: Path, tick: Tick, batches: Callable[[Path, Tick], Iterator[Any]]) -> Iterator[RawRow]:
    """Yields rows of Arrow or parquet. Fields that are null inside a struct are left out.

    Arrow gives every struct of a column all the fields that any of them has, so null there mostly means "absent";
    leaving them out makes the rows equal to those of the same data in JSON.
    """
    import pyarrow

    number = 0
    try:
        with _uncompressed(path) as plain:
            for batch in batches(plain, tick):
                for start in range(0, batch.num_rows, _BATCH):
                    for values in batch.slice(start, _BATCH).to_pylist():
                        number += 1
                        yield RawRow(path, number, table_row(values))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        where = f"{path} after row {number}" if number else str(path)
        raise DataError(f"cannot be read ({reason})", where=where, remedy=_AGAIN) from error


def table_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of a table as the same row in JSON has it: null fields inside a column only fill its type."""
    return {name: _without_nulls(value) for name, value in values.items()}


def _without_nulls(value: Any) -> Any:
    """Leaves out the null fields of every mapping inside ``value``; nulls in lists stay."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _uncompressed(path: Path) -> Iterator[Path]:
    """Yields the file itself, or a temporary copy of what it holds compressed: both formats need to seek."""
    if path.suffix.lower() not in COMPRESSED_SUFFIXES:
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=path.with_suffix("").suffix) as copy:
        for piece in _pieces(path, lambda _: None):
            copy.write(piece)
        copy.flush()
        yield Path(copy.name)


def _parquet_batches(path: Path, tick: Tick) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        rows, done = file.metadata.num_rows, 0
        for batch in file.iter_batches(batch_size=_BATCH):
            yield batch
            done += batch.num_rows
            tick(done / rows)


def _arrow_batches(path: Path, tick: Tick) -> Iterator[Any]:
    """Yields record batches of the stream format (what `datasets` writes) or of the file format."""
    import pyarrow.ipc

    size = path.stat().st_size
    with pyarrow.OSFile(str(path)) as opened:
        if opened.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(opened)
            for index in range(file.num_record_batches):
                yield file.get_batch(index)
                tick((index + 1) / file.num_record_batches)
            return
        opened.seek(0)
        for batch in pyarrow.ipc.open_stream(opened):
            yield batch
            tick(opened.tell() / size)
