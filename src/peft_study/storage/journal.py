"""The journal of a study: every decision and result as one JSON line, in the order in which they happened.

    {"event": "asked", "name": "lora-003", ...}      what a trial is
    {"event": "measured", "name": "lora-003", ...}   its held-out losses at a rung or at the end
    {"event": "ended", "name": "lora-003", ...}      how it ended
    ...

The state of a study is computed from its journal; a checkpoint only has the number of its lines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft_study.errors import OutputError
from peft_study.storage.files import atomic_writer, json_text, output_error

Event = dict[str, Any]


class Journal:
    """An append-only file of events; an unfinished last line of a killed process is dropped.

    Args:
        path: of the file; made when first written to.

    Raises:
        OutputError: when a line other than the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._events = read(path)
        self._torn = path.exists() and path.stat().st_size != sum(len(_line(event)) for event in self._events)

    def __len__(self) -> int:
        return len(self._events)

    @property
    def events(self) -> tuple[Event, ...]:
        """All events so far."""
        return tuple(self._events)

    def truncate(self, count: int) -> None:
        """Drops all but the first `count` events; what followed is repeated."""
        self._events = self._events[:count]
        with atomic_writer(self._path) as file:
            file.writelines(_line(event).decode() for event in self._events)
        self._torn = False

    def append(self, events: Iterable[Event]) -> None:
        """Adds events and syncs them to disk.

        Raises:
            OutputError: when the disk is full or the file cannot be written.
        """
        new = list(events)
        if not new:
            return
        if self._torn:
            self.truncate(len(self._events))
        try:
            with self._path.open("ab") as file:
                file.write(b"".join(_line(event) for event in new))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._torn = True
            raise output_error(error, self._path) from error
        self._events += new


def read(path: Path) -> list[Event]:
    """Returns the events of a journal, without an unfinished last line.

    Raises:
        OutputError: when another line is damaged.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("cut off")
            events.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise OutputError(
                f"line {number} is damaged", where=str(path), remedy="put the file back, or start a new study"
            ) from error
    return events


def _line(event: Event) -> bytes:
    return json_text(event, separators=(",", ":")).encode() + b"\n"
