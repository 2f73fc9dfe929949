"""Any source to JSON lines of ``{"id", "messages", "source"}``, streaming.

SRC... --parsed_rows--> Conversation --line_of--> OUT.jsonl          (and OUT.rejects.jsonl with `skip`)
       --every split--------------------------> OUT/SPLIT.jsonl ...  (all of them, or none)
"""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from peft_study.data.conversation import Conversation
from peft_study.data.readers import COMPRESSED_SUFFIXES, JSON_SUFFIXES, SKIP, data_suffix
from peft_study.data.sources import Source, open_sources, open_splits
from peft_study.data.stream import OnProgress, ParsedRow, parsed_rows
from peft_study.errors import DataError, OutputError
from peft_study.storage.files import AtomicFiles, made_folder, refuse_existing

OnError = Literal["fail", "skip"]


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did. ``sha256`` is of the file on the disk; ``rejects`` is None if no row was rejected."""

    output: Path
    rows: int
    rejected: int
    seconds: float
    sha256: str
    rejects: Path | None


class LineWriter:
    """Writes lines into a binary file, compressed by the suffix of ``name``, and hashes what reaches the disk.

    The same lines give the same bytes at any time and under any name.
    """

    def __init__(self, handle: BinaryIO, name: Path) -> None:
        self._sink = _HashedFile(handle)
        self._packed: Any = None
        if name.suffix.lower() == ".gz":
            self._packed = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=self._sink, mtime=0)
        elif name.suffix.lower() == ".zst":
            import zstandard

            sink = cast(BinaryIO, self._sink)  # it has all that is called
            self._packed = zstandard.ZstdCompressor().stream_writer(sink, closefd=False)

    def write(self, line: bytes) -> None:
        """Writes one line, which ends in a line feed."""
        (self._packed or self._sink).write(line)

    def close(self) -> str:
        """Ends the compressed stream, leaves the file open, and returns the sha256 of all bytes."""
        if self._packed is not None:
            self._packed.close()
        return self._sink.hash.hexdigest()


class _HashedFile:
    """The part of a binary file that compressors need."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self._handle.write(data)

    def flush(self) -> None:
        self._handle.flush()


def line_of(conversation: Conversation, where: str) -> bytes:
    """Returns the row as one line of JSON: UTF-8 as it is, role before content.

    Raises:
        DataError: a value beside the texts cannot be written as JSON.
    """
    try:
        return (json.dumps(conversation.to_dict(), ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot be written as JSON ({error})", where=where, remedy=SKIP) from error


def convert(
    sources: Sequence[str],
    output: Path,
    *,
    split: str | None = None,
    mapping: Mapping[str, str] | None = None,
    on_error: OnError = "fail",
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> ConvertReport:
    """Converts sources, one after the other, into one file that appears only when it is complete.

    Args:
        sources: files, folders or hub ids.
        output: the file to write; ``.gz`` and ``.zst`` compress it.
        split: the split to take of each source.
        mapping: what `parse_mapping` returned.
        on_error: ``fail`` stops at the first unusable row; ``skip`` writes file, row and reason of such rows into
            ``OUT.rejects.jsonl``. A file that cannot be read to its end is always an error.
        overwrite: whether an existing output may be replaced.
        on_progress: as `OnProgress`.

    Raises:
        DataError: a source or a row cannot be used, or no row is left.
        OutputError: the output exists, is one of the sources, or cannot be written.
    """
    _rejects_path(output)  # refuses a name that is not one of JSON lines, before anything is looked up
    return _convert({output: open_sources(sources, split)}, mapping, on_error, overwrite, on_progress)[0]


def convert_splits(
    sources: Sequence[str],
    folder: Path,
    *,
    mapping: Mapping[str, str] | None = None,
    on_error: OnError = "fail",
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> list[ConvertReport]:
    """Converts every split of the sources into ``folder/SPLIT.jsonl``: all files appear together, or none does.

    Arguments and errors as of `convert`; a split has the rows of each source that has it.

    Raises:
        OutputError: also where ``folder`` is the name of a data file.
    """
    if folder.is_file() or (data_suffix(folder) and not folder.is_dir()):
        remedy = "with --split all, name the folder for a file a split (train.jsonl, test.jsonl, ...)"
        raise OutputError("is a file, not a folder", where=str(folder), remedy=remedy)
    jobs = {folder / f"{name}.jsonl": opened for name, opened in open_splits(sources).items()}
    return _convert(jobs, mapping, on_error, overwrite, on_progress)


def _convert(
    jobs: Mapping[Path, Sequence[Source]],
    mapping: Mapping[str, str] | None,
    on_error: OnError,
    overwrite: bool,
    on_progress: OnProgress | None,
) -> list[ConvertReport]:
    """Converts sources into files, all or none; arguments otherwise as of `convert`."""
    opened = [source for sources in jobs.values() for source in sources]
    read = [file for source in opened for file in source.files]
    for output in jobs:
        for path in (output, _rejects_path(output)):
            refuse_existing(path, overwrite=overwrite, sources=read)
    total, rows, size = max(sum(source.size for source in opened), 1), 0, 0
    reports = []
    with made_folder(next(iter(jobs)).parent), AtomicFiles() as files:
        for output, sources in jobs.items():
            before, part = (rows, size), sum(source.size for source in sources)

            def progressed(new: int, share: float, before: tuple[int, int] = before, part: int = part) -> None:
                if on_progress is not None:
                    on_progress(before[0] + new, (before[1] + share * part) / total)

            reports.append(_convert_one(files, sources, output, mapping, on_error, progressed))
            rows, size = rows + reports[-1].rows + reports[-1].rejected, size + part
    for report in reports:
        if report.rejects is None:  # one of an earlier conversion would be taken for this one's
            _rejects_path(report.output).unlink(missing_ok=True)
    return reports


def _convert_one(
    files: AtomicFiles,
    sources: Sequence[Source],
    output: Path,
    mapping: Mapping[str, str] | None,
    on_error: OnError,
    on_progress: OnProgress,
) -> ConvertReport:
    """Writes one file of `_convert`."""
    start = time.perf_counter()
    writer, rejects = LineWriter(files.open(output), output), _rejects_path(output)
    rejects_file: BinaryIO | None = None
    first_error: DataError | None = None
    rows = rejected = 0
    for row in parsed_rows(sources, mapping, on_progress):
        try:
            writer.write(line_of(row.conversation(), row.raw.where))
            rows += 1
        except DataError as error:
            if on_error == "fail":
                raise
            rejects_file = rejects_file or files.open(rejects)
            rejects_file.write(_reject_line(row, error))
            rejected += 1
            first_error = first_error or error
    if rows == 0:
        what = f"all {rejected} rows are unusable, the first because: {first_error}"
        raise DataError(what, where=", ".join(source.spec for source in sources))
    seconds = time.perf_counter() - start
    return ConvertReport(output, rows, rejected, seconds, writer.close(), rejects if rejects_file else None)


def _reject_line(row: ParsedRow, error: DataError) -> bytes:
    entry = {"file": str(row.raw.file), "row": row.raw.row, "reason": error.what}
    # A reason may quote what is not valid Unicode.
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")


def _rejects_path(output: Path) -> Path:
    suffix = data_suffix(output)
    if suffix not in JSON_SUFFIXES:
        endings = ", ".join([".jsonl", *(f".jsonl{ending}" for ending in COMPRESSED_SUFFIXES)])
        raise OutputError("JSON lines are written", where=str(output), remedy=f"name a file ending in {endings}")
    return output.with_name(output.name[: output.name.lower().rindex(suffix)] + ".rejects.jsonl")
