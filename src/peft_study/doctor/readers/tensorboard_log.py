"""Event files of TensorBoard, read record by record."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft_study.errors import DataError

NAME = "tfevents"
_PARTS = {"train": "train", "training": "train", "eval": "eval", "val": "eval", "valid": "eval", "validation": "eval",
          "test": "test", "dev": "eval"}  # fmt: skip
"""Folders that are parts of one run, as Keras writes them, and what they put before their tags."""
_DEPTH, _MOST_FOLDERS = 4, 5000
"""Folders that are looked into, one in another and in all."""


def event_files(folder: Path) -> list[tuple[str, Path]]:
    """Returns the event files of one run, oldest first, with what comes before their tags; none where there are none.

    Args:
        folder: of the run, or one above it.

    Raises:
        DataError: there are several runs.
    """
    found: dict[Path, list[Path]] = {}
    for place, folders, files in itertools.islice(os.walk(folder), _MOST_FOLDERS):
        here = Path(place)
        if len(here.relative_to(folder).parts) >= _DEPTH:
            folders.clear()
        events = sorted((here / name for name in files if NAME in name), key=lambda path: path.name)
        if events:
            found[here] = events
    runs: dict[Path, list[tuple[str, Path]]] = {}
    for here, events in found.items():
        part = _PARTS.get(here.name.lower())
        above = next((parent for parent in here.parents if parent in found and part is None), None)
        if above is not None:
            continue  # hyperparameters, which are written into a folder of their own
        run = here.parent if part and here != folder else here
        runs.setdefault(run, []).extend((f"{part}/" if part and here != folder else "", path) for path in events)
    if len(runs) > 1:
        names = ", ".join(str(run.relative_to(folder)) for run in sorted(runs)[:6])
        raise DataError(f"holds {len(runs)} runs", where=str(folder), remedy=f"give the folder of one: {names}")
    return next(iter(runs.values()), [])


def event_rows(files: list[tuple[str, Path]], notes: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yields the scalars of event files as rows of step and one value.

    Args:
        files: with what comes before their tags.
        notes: gets a line where a file ends early.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    for before, path in files:
        loader = RawEventFileLoader(str(path))
        try:
            for record in loader.Load():
                event = Event.FromString(record)
                for value in event.summary.value:
                    number = _scalar(value)
                    if number is not None:
                        yield {"step": event.step, before + value.tag: number}
        except Exception as error:  # noqa: BLE001 - of protobuf and TensorBoard, of many kinds
            notes.append(f"{path.name} is damaged ({type(error).__name__}): what comes before is read")


def _scalar(value: Any) -> float | None:
    """Returns a summary's number; None of a histogram, text or picture."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if not value.HasField("tensor"):
        return None
    tensor = value.tensor
    if any(size.size != 1 for size in tensor.tensor_shape.dim):
        return None
    for numbers in (tensor.float_val, tensor.double_val, tensor.int_val, tensor.int64_val):
        if len(numbers) == 1:
            return float(numbers[0])
    if tensor.tensor_content:
        from tensorboard.util.tensor_util import make_ndarray

        found = make_ndarray(tensor)
        return float(found.reshape(-1)[0]) if found.size == 1 and found.dtype.kind in "fiu" else None
    return None
