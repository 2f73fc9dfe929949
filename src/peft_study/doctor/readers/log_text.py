"""A log's file as text, whatever its compression and encoding; read in pieces."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from peft_study.errors import DataError

_LONGEST_LINE = 1 << 20
"""Letters of a line; no row of a log is longer."""
_PIECE = 1 << 16
_LARGEST = 1 << 26
"""Letters of a JSON document that is read whole."""
_MARKS = (
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"%PDF", "a PDF file"),
    (b"PK\x03\x04", "a zip archive (as of torch.save)"),
    (b"\x80\x02", "a pickle, which is never loaded"),
    (b"\x80\x04", "a pickle, which is never loaded"),
    (b"\x80\x05", "a pickle, which is never loaded"),
    (b"\x28\xb5\x2f\xfd", "a file compressed by zstd"),
    (b"SQLite format", "a database"),
    (b"\x7fELF", "a program"),
)
GIVE = "give a trainer_state.json, event files of TensorBoard, JSON lines or CSV"
SUBJECTS = "name a study file, a run, a log or an adapter's folder"


class LogFile:
    """A file of text.

    Args:
        path: of the file; one that is compressed by gzip is read as what it holds.

    Attributes:
        where: for errors.
        head: its first letters.
        ended: whether the last line read ended with a line break.

    Raises:
        DataError: it cannot be read, is empty or is no text.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.where, self.ended = path, str(path), True
        try:
            with path.open("rb") as file:
                self._zipped = file.read(2) == b"\x1f\x8b"
            with self._binary() as file:
                start = file.read(_PIECE)
        except (OSError, EOFError, zlib.error) as error:
            raise self._unreadable(error) from error
        self._encoding = _encoding(start)
        if not start.strip():
            raise DataError("is empty", where=self.where, remedy="wait until the run has logged something")
        kind = next((kind for mark, kind in _MARKS if start.startswith(mark)), None)
        if kind is None and b"\0" in start and self._encoding == "utf-8-sig":
            kind = "a binary file"
        if kind is not None:
            raise DataError(f"is {kind}, not a log", where=self.where, remedy=GIVE)
        self.head = start.decode(self._encoding, errors="replace").lstrip("\ufeff").lstrip()

    def _binary(self) -> Any:
        return gzip.open(self.path) if self._zipped else self.path.open("rb")

    def _unreadable(self, error: Exception) -> DataError:
        said = getattr(error, "strerror", None) or str(error)
        return DataError(f"cannot be read: {said}", where=self.where, remedy=GIVE)

    def _text(self) -> TextIO:
        options: dict[str, Any] = {"encoding": self._encoding, "errors": "replace"}
        return gzip.open(self.path, "rt", **options) if self._zipped else self.path.open(**options)

    def lines(self) -> Iterator[str]:
        """Yields the lines.

        Raises:
            DataError: a line is longer than any row of a log.
        """
        number = 0
        try:
            with self._text() as file:
                while line := file.readline(_LONGEST_LINE):
                    number += 1
                    self.ended = line.endswith("\n")
                    if not self.ended and len(line) >= _LONGEST_LINE:
                        raise DataError(
                            f"has more than {_LONGEST_LINE:,} letters",
                            where=f"{self.where}, line {number}",
                            remedy="give one row a line",
                        )
                    yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            if number == 0:
                raise self._unreadable(error) from error
            self.ended = False  # a compressed file that is still written
        except OSError as error:
            raise self._unreadable(error) from error

    def pieces(self) -> Iterator[str]:
        """Yields the text in pieces."""
        try:
            with self._text() as file:
                while piece := file.read(_PIECE):
                    yield piece
        except (EOFError, zlib.error, gzip.BadGzipFile):
            self.ended = False
        except OSError as error:
            raise self._unreadable(error) from error


def _encoding(start: bytes) -> str:
    for mark, name in ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if start.startswith(mark):
            return name
    return "utf-8-sig"


class JsonArray:
    """The objects of a JSON array, one at a time, and the document around it.

    Args:
        file: to read.
        key: of the array in the document's object, or None: the document is the array.

    Attributes:
        around: the rest of the document's object, once all objects were read.
        whole: whether the document ends as it should.
    """

    def __init__(self, file: LogFile, key: str | None) -> None:
        self.around: dict[str, Any] = {}
        self.whole = False
        self._file, self._key = file, key

    def __iter__(self) -> Iterator[Any]:
        """Yields the objects.

        Raises:
            DataError: the text is no JSON.
        """
        pieces, decoder = self._file.pieces(), json.JSONDecoder()
        text = next(pieces, "").lstrip("\ufeff")
        at = text.index("[", text.index(f'"{self._key}"') if self._key else 0) + 1
        before, text = text[:at], text[at:]
        place, number, more = 0, 0, True
        while True:
            while place < len(text) and text[place] in " \t\r\n,":
                place += 1
            if place < len(text) and text[place] == "]":
                break
            try:
                if place >= len(text):
                    raise ValueError
                value, place = decoder.raw_decode(text, place)
                number += 1
            except (ValueError, RecursionError) as error:
                # cut at the end of a piece, or no JSON: one more piece tells
                if len(text) - place > _LONGEST_LINE:
                    where = f"{self._file.where}, entry {number + 1}"
                    raise DataError("is no JSON", where=where, remedy="give the file as it was written") from error
                piece = next(pieces, "") if more else ""
                if not piece:
                    return
                text, place = text[place:] + piece, 0
                continue
            yield value
        self._read_around(before, text[place:], pieces)

    def _read_around(self, before: str, after: str, pieces: Iterator[str]) -> None:
        """Reads the rest of the document."""
        for piece in pieces:
            after += piece
            if len(after) > _LARGEST:
                return
        try:
            document = json.loads(before + after)
        except (ValueError, RecursionError):
            return
        self.whole = True
        self.around = document if isinstance(document, dict) else {}


def document_of(file: LogFile) -> Any:
    """Returns a JSON document.

    Raises:
        DataError: it is none, or too large to be one.
    """
    text = ""
    for piece in file.pieces():
        text += piece
        if len(text) > _LARGEST:
            raise DataError("is too large for one JSON object", where=file.where, remedy="give one row a line")
    try:
        return json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON: {str(error)[:100]}", where=file.where, remedy=GIVE) from error
