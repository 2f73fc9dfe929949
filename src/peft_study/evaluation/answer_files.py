"""Files of answers: a JSON line each, in the order in which they were made."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft_study.errors import OutputError
from peft_study.storage.files import atomic_writer

Row = dict[str, Any]


def read_answers(path: Path) -> list[Row]:
    """Returns the answers that are there; a line that was cut off, or that is no answer, is left out.

    Raises:
        OutputError: when the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", where=str(path), remedy="give another folder") from error
    return [row for line in text.split("\n") if (row := _answer(line))]  # no splitlines: an answer may hold U+2028


def keep_complete(path: Path) -> set[str]:
    """Returns the systems all of whose answers are there, by the number ``of`` that each has; others are removed.

    Raises:
        OutputError: when the file cannot be read or written.
    """
    rows = read_answers(path)
    counts = Counter(row["system"] for row in rows)
    complete = {row["system"] for row in rows if counts[row["system"]] == row["of"]}
    if complete != counts.keys():
        with atomic_writer(path) as file:
            file.writelines(_line(row) for row in rows if row["system"] in complete)
    return complete


def append_answers(path: Path, rows: Iterable[Row]) -> None:
    """Writes answers behind those of a file, each as soon as it is there; a line that was cut off gives way.

    Raises:
        OutputError: when they cannot be written.
    """
    try:
        with path.open("ab") as file:
            known = path.read_bytes()
            whole = known.rfind(b"\n") + 1
            if _answer(known[whole:].decode("utf-8", "replace")):
                file.write(b"\n")
            else:
                file.truncate(whole)
            for row in rows:
                file.write(_line(row).encode("utf-8", "replace"))
                file.flush()
    except OSError as error:
        remedy = "make room, or let this place be written; the same command goes on from the answers that are there"
        raise OutputError(f"writing failed: {error.strerror or error}", where=str(path), remedy=remedy) from error


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _answer(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"system", "id"} <= row.keys() else None
