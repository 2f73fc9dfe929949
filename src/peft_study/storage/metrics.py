"""Measurements of a run as JSON lines, and the same as TensorBoard event files."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from peft_study.storage.files import atomic_writer, json_text, output_error


class MetricsWriter:
    """Appends records; a resumed run first drops those after its checkpoint.

    Args:
        path: of the JSON lines.
        tensorboard: folder for event files, or None.
        from_step: of a resumed run: records of later steps are dropped; None: a new run, all are.

    Raises:
        OutputError: when they cannot be written.
    """

    def __init__(self, path: Path, tensorboard: Path | None, *, from_step: int | None = None) -> None:
        lines = [] if from_step is None else _whole_lines(path)
        kept = [line for line in lines if json.loads(line)["step"] <= (from_step or 0)]
        self._path = path
        self._events: Any = None
        with self._telling():
            with atomic_writer(path) as file:  # a kill here must not lose the lines before
                file.writelines(kept)
            self._file: TextIO = path.open("a", encoding="utf-8")
            if tensorboard is not None:
                if from_step is None:
                    shutil.rmtree(tensorboard, ignore_errors=True)  # of an earlier start without a checkpoint
                from torch.utils.tensorboard import SummaryWriter

                self._events = SummaryWriter(str(tensorboard), purge_step=None if from_step is None else from_step + 1)

    def write(self, event: str, step: int, **values: Any) -> None:
        """Writes one record: its kind (``train`` or ``held_out``), the step, and the values.

        Raises:
            OutputError: when the disk is full.
        """
        with self._telling():
            self._file.write(json_text({"event": event, "step": step, **values}) + "\n")
            self._file.flush()
            if self._events is not None:
                for name, value in values.items():
                    if isinstance(value, (int, float)) and math.isfinite(value):
                        self._events.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes the files.

        Raises:
            OutputError: when the disk is full.
        """
        with self._telling():
            self._file.close()
            if self._events is not None:
                self._events.close()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turns a failed write into an `OutputError`."""
        try:
            yield
        except OSError as error:
            raise output_error(error, self._path) from error


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics file, without an unfinished last line."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
