"""Rows that the caller has in memory: they become a file of JSON lines, so that all later reading has one path."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_study.data.formats import detect_format
from peft_study.data.readers import table_row
from peft_study.errors import DataError, OutputError
from peft_study.storage.files import atomic_writer, made_folder


def is_rows(value: Any) -> bool:
    """True for rows themselves, false for what names them: a path, a source with its share, or several of these.

    Rows are a ``datasets.Dataset``, a ``pandas.DataFrame``, a list of rows, or a list of conversations, each a list of
    ``{"role", "content"}``.
    """
    if isinstance(value, (str, Path)) or _is_named_source(value):
        return False
    if isinstance(value, Sequence) and not _is_dataset(value):
        return bool(value) and not any(_is_source(item) for item in value) and any(map(_is_row, value))
    return _is_dataset(value) or _is_frame(value)


def _is_source(item: Any) -> bool:
    """True for what may stand in a list of sources: a name, a table, or a list of rows or conversations."""
    if isinstance(item, (list, tuple)):
        turns = any(isinstance(inner, Mapping) and ("role" in inner or "from" in inner) for inner in item)
        return any(map(_is_row, item)) and not turns
    return isinstance(item, (str, Path)) or _is_named_source(item) or is_rows(item)


def _is_named_source(item: Any) -> bool:
    """True for `path:` and what stands beside it; a row may have a column of that name beside those of its texts."""
    return isinstance(item, Mapping) and "path" in item and detect_format(item, {}) is None


def _is_row(item: Any) -> bool:
    return isinstance(item, (list, tuple, Mapping))


def write_rows(rows: Any, path: Path, *, replace: bool) -> None:
    """Writes rows as JSON lines.

    Args:
        rows: as `is_rows` takes them.
        path: of the file; a file with the same content is left alone.
        replace: a file with other content may be replaced.

    Raises:
        DataError: when there are none, or one cannot be written as JSON.
        OutputError: when a file with other content is there, or nothing can be written.
    """
    with made_folder(path.parent), atomic_writer(path.with_suffix(".new")) as file:
        count = 0
        for count, row in enumerate(_plain(rows), start=1):
            try:
                file.write(json.dumps(row, ensure_ascii=False, default=_as_json) + "\n")
            except (TypeError, ValueError) as error:
                what, remedy = f"cannot be written as JSON ({error})", "give texts, or leave the column out"
                raise DataError(what, where=f"row {count} in memory", remedy=remedy) from error
        if not count:
            raise DataError("there are no rows", where="data in memory", remedy="give at least a few")
    new = path.with_suffix(".new")
    if path.exists() and not replace and path.read_bytes() != new.read_bytes():
        new.unlink()
        raise OutputError(
            "the rows in memory are not those that this study began with",
            where=str(path),
            remedy="give the same rows to resume, overwrite=True to replace the study, or another output",
        )
    new.replace(path)


def _plain(rows: Any) -> Iterator[dict[str, Any]]:
    """Yields each row as a mapping; null fields inside a table's columns are left out, as of the same table on disk."""
    table = _is_frame(rows) or _is_dataset(rows)
    if _is_frame(rows):
        from datasets import Dataset

        rows = Dataset.from_pandas(rows, preserve_index=False)
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Mapping):
            yield table_row(row) if table else dict(row)
        elif isinstance(row, (list, tuple)):
            yield {"messages": row}
        else:
            what = f"is a {type(row).__name__}, neither a row nor a list of messages"
            raise DataError(what, where=f"row {number} in memory", remedy='give {"role": ..., "content": ...} turns')


def _as_json(value: Any) -> Any:
    """Returns what JSON has for a number of numpy, a date or a time, as they stand in columns beside the texts."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is none of its values")


def _is_dataset(value: Any) -> bool:
    return hasattr(value, "column_names") and hasattr(value, "__len__") and hasattr(value, "features")


def _is_frame(value: Any) -> bool:
    return hasattr(value, "columns") and hasattr(value, "iloc")
