"""Other tools' logs as observations: what lies in a folder, in which format, and what lies beside it.

trainer_state.json ─┐
event files         ├─► curve ──┐
JSON lines, CSV     ┘           ├─► Observations
training arguments, adapter_config.json, doctor.json ─► settings, counts ─┘
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peft_study.doctor.observations import FILE as SEEN
from peft_study.doctor.observations import LossCurve, Observations, UsedSettings, from_json
from peft_study.doctor.readers.adapter_config import method_settings
from peft_study.doctor.readers.columns import plain
from peft_study.doctor.readers.log_curve import curve_of_points, reasons_of
from peft_study.doctor.readers.log_text import GIVE, SUBJECTS, JsonArray, LogFile, document_of
from peft_study.doctor.readers.tables import csv_rows, flat, json_rows, points_of_rows
from peft_study.doctor.readers.tensorboard_log import NAME as EVENTS
from peft_study.doctor.readers.tensorboard_log import event_files, event_rows
from peft_study.doctor.readers.trainer_state import FILE, REWARDED, is_trainer_state, newest_state, read_trainer_state
from peft_study.doctor.readers.training_args import BESIDE, read_training_args
from peft_study.errors import DataError, nearest_path

_TABLES = (".jsonl", ".ndjson", ".csv", ".tsv")
_LOOKED_FOR = f"looked for {FILE}, checkpoint-*/{FILE}, event files (*{EVENTS}*), *.jsonl, *.csv and {SEEN}"
_NO_ARGUMENTS = (
    "there is no file of training arguments (--training-args FILE)",
    "没有训练参数文件（--training-args FILE）",
)
_PICKLED_ARGUMENTS = (
    "training_args.bin is a pickle and is not loaded; write args.to_json_string() to training_args.json beside it, "
    "or give --training-args FILE",
    "training_args.bin 是 pickle，不会加载；请把 args.to_json_string() 写入旁边的 training_args.json，"
    "或用 --training-args FILE 指定",
)
_ALONG = ("rate", "gradient_norm", "epoch", "loss_scale", "minus_base", "steps", "loss", "window")
_EVALUATED = ("held_out_steps", "held_out_loss", "held_out_minus_base", "held_out_low", "held_out_high", "source_loss")


def read_log(
    path: Path, *, columns: Mapping[str, str] | None = None, training_args: Path | None = None
) -> Observations:
    """Returns what the log of a run tells, and training arguments, adapter_config.json and doctor.json beside it.

    Args:
        path: trainer_state.json, an event file of TensorBoard, JSON lines, a JSON array or CSV (gzip too), or the
            folder of a run with one of them.
        columns: names of a table's columns by what they hold, as ``{"loss": "my_loss"}``; the others are guessed.
        training_args: JSON or YAML; None: training_args.json or .yaml beside the log, where it is there.

    Raises:
        UserError: there is no log, it cannot be read, or a column is not there.
    """
    if not path.exists():
        near = nearest_path(path)
        raise DataError("is not there", where=str(path), remedy=f"did you mean {near}?" if near else SUBJECTS)
    log = _find(path)
    folder = path if path.is_dir() else path.parent
    folders = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    if log is None:
        seen, where = Observations(), None
    else:
        seen = _read(log, columns or {})
        where = log if isinstance(log, Path) else folder
        if seen.curve is None and "curve" not in seen.reasons:
            raise DataError("holds no loss", where=str(where), remedy=GIVE)
    seen = _with_arguments(seen, folders, training_args)
    seen = _with_live(seen, folders)
    if seen.curve is None and log is None and seen.parameters is None:
        raise DataError("holds no log", where=str(path), remedy=_LOOKED_FOR)
    if seen.curve is None and seen.reasons.get("curve") != REWARDED and not _known_otherwise(seen):
        raise DataError("holds no loss yet", where=str(where), remedy="wait for the first one (logging_steps)")
    return _with_logged_rates(seen)


def _known_otherwise(seen: Observations) -> bool:
    """Returns whether there is something to check beside a curve."""
    return seen.parameters is not None or seen.settings.learning_rate is not None


def holds_log(folder: Path) -> bool:
    """Returns whether a folder has a log, or what our callback saw."""
    return (
        newest_state(folder) is not None
        or (folder / SEEN).is_file()
        or bool(event_files(folder))
        or any(_may_be_log(file) and _names_a_loss(file) for file in folder.iterdir() if file.is_file())
    )


def _find(path: Path) -> Path | list[tuple[str, Path]] | None:
    """Returns the file of a log, or event files; None where a folder has none, but what our callback saw."""
    if path.is_file():
        return [("", path)] if EVENTS in path.name else path
    try:
        state = newest_state(path)
        found = sorted(file for file in path.iterdir() if file.is_file() and _may_be_log(file))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path), remedy=GIVE) from error
    if state is not None:
        return state
    if len(found) > 1:
        found = [file for file in found if _names_a_loss(file)] or found  # data beside the log
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:6])
        raise DataError(f"holds {len(found)} logs", where=str(path), remedy=f"give one of them: {names}")
    events = [] if found else event_files(path)
    if not found and not events and not (path / SEEN).is_file():
        raise DataError("holds no log", where=str(path), remedy=_LOOKED_FOR)
    return found[0] if found else (events or None)


def _may_be_log(file: Path) -> bool:
    return file.name.lower().removesuffix(".gz").endswith(_TABLES)


def _names_a_loss(file: Path) -> bool:
    try:
        return "loss" in LogFile(file).head[:4096].lower()
    except DataError:
        return False


def _read(log: Path | list[tuple[str, Path]], columns: Mapping[str, str]) -> Observations:
    if not isinstance(log, Path):
        notes: list[str] = []
        return _of_rows(event_rows(log, notes), str(log[0][1].parent), columns, notes, "event files")
    file = LogFile(log)
    if is_trainer_state(file) and not columns:
        return read_trainer_state(file)
    notes = []
    return _of_rows(_rows(file, notes), file.where, columns, notes, "table")


def _rows(file: LogFile, notes: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a table in whichever format."""
    if re.search(r"^\{'(loss|eval_loss)': ", file.head, re.MULTILINE):
        raise DataError("is what a Trainer prints, not its log", where=file.where, remedy=f"give its {FILE}")
    if file.head.startswith("["):
        array = JsonArray(file, None)
        for row in array:
            if isinstance(row, dict):
                yield flat(row)
        if not array.whole:
            notes.append("the file is cut off, as in a run that still writes")
    elif file.head.startswith("{"):
        first = file.head.partition("\n")[0]
        if _is_object(first) and file.head.strip() != first.strip():
            yield from json_rows(file, notes)
        elif "\n" not in file.head or first.strip() == "{" or _is_object(first):
            yield from _columns(document_of(file), file.where)
        else:
            yield from json_rows(file, notes)
    else:
        yield from csv_rows(file, notes)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _columns(document: Any, where: str) -> Iterator[Mapping[str, Any]]:
    """Yields rows of one JSON object: a history as lists by name, a list of records in it, or one record."""
    values = flat(document) if isinstance(document, dict) else {}
    records = [item for item in values.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
    lists = {name: item for name, item in values.items() if isinstance(item, list) and item}
    if records:
        yield from (flat(row) for row in max(records, key=len) if isinstance(row, dict))
    elif lists:
        for place in range(max(map(len, lists.values()))):
            yield {name: item[place] for name, item in lists.items() if place < len(item)}
    elif values:
        yield values
    else:
        raise DataError("holds no loss", where=where, remedy=GIVE)


def _of_rows(
    rows: Iterator[Mapping[str, Any]], where: str, columns: Mapping[str, str], notes: list[str], kind: str
) -> Observations:
    points, said, names = points_of_rows(rows, where, columns)
    curve = curve_of_points(points, [*said, *notes])
    if curve is not None and any(re.fullmatch("(train_)?rewards?(_mean)?", plain(name)) for name in names):
        return Observations(stage="after", reasons={"curve": REWARDED})
    if curve is None:
        shown = ", ".join(name[:40] for name in names[:12]) + (", ..." if len(names) > 12 else "")
        raise DataError(
            f"holds no loss that can be told by its name (columns: {shown or 'none'})",
            where=where,
            remedy="name the column, as --map loss=COLUMN" if names else GIVE,
        )
    ends = [steps[-1] for steps in (curve.steps, curve.held_out_steps) if steps is not None and len(steps)]
    return Observations(stage="after", steps_done=int(max(ends)), curve=curve, reasons=reasons_of(curve))


def _with_arguments(seen: Observations, folders: list[Path], given: Path | None) -> Observations:
    """Adds the settings that training arguments and the adapter's configuration tell."""
    arguments = given or next((f / name for f in folders for name in BESIDE if (f / name).is_file()), None)
    adapter = next((f / "adapter_config.json" for f in folders if (f / "adapter_config.json").is_file()), None)
    values, notes = read_training_args(arguments, total_steps=seen.settings.total_steps) if arguments else ({}, [])
    reasons = dict(seen.reasons)
    if adapter is not None:
        try:
            values |= method_settings(json.loads(adapter.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError):
            notes.append(f"{adapter.name} is no JSON object: it is left out")
    if arguments is None:
        en, zh = _NO_ARGUMENTS
        if any((folder / "training_args.bin").is_file() for folder in folders):
            en, zh = _PICKLED_ARGUMENTS
        reasons["settings"] = (en, zh)
        reasons |= {f"settings.{f.name}": (en, zh) for f in dataclasses.fields(UsedSettings)}
    known = {name: value for name, value in dataclasses.asdict(seen.settings).items() if value is not None}
    settings = UsedSettings(**{**values, **known})
    if seen.curve is not None and (seen.steps_done or 0) + seen.curve.window <= (settings.total_steps or 0):
        seen = dataclasses.replace(seen, stage="during")
    return _noted(dataclasses.replace(seen, settings=settings, reasons=reasons), notes)


def _noted(seen: Observations, notes: list[str]) -> Observations:
    if seen.curve is None or not notes:
        return seen
    return dataclasses.replace(seen, curve=dataclasses.replace(seen.curve, notes=(*seen.curve.notes, *notes)))


def _with_live(seen: Observations, folders: list[Path]) -> Observations:
    """Adds what our callback saw of the run; what the log says is newer."""
    path = next((folder / SEEN for folder in folders if (folder / SEEN).is_file()), None)
    if path is None:
        return seen
    try:
        live = from_json(json.loads(path.read_text(encoding="utf-8"))["observations"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return _noted(seen, [f"{SEEN} cannot be read ({type(error).__name__}): it is left out"])
    if not isinstance(live, Observations):
        return seen
    whole = seen.curve is None
    return Observations(
        stage=live.stage if whole else seen.stage,
        steps_done=live.steps_done if whole else seen.steps_done,
        settings=_merged(live.settings, seen.settings),
        parameters=live.parameters,
        data=live.data,
        curve=_merged_curves(live.curve, seen.curve),
        adapter=live.adapter,
        reasons={**seen.reasons, **live.reasons},
    )


def _merged(older: Any, newer: Any) -> Any:
    known = {f.name: getattr(newer, f.name) for f in dataclasses.fields(newer)}
    return dataclasses.replace(older, **{name: value for name, value in known.items() if value is not None})


def _merged_curves(live: LossCurve | None, log: LossCurve | None) -> LossCurve | None:
    """Returns the log's curve with what only the callback knew."""
    if live is None or log is None:
        return log or live
    missing = {f.name for f in dataclasses.fields(log) if getattr(log, f.name) is None} - {*_ALONG, *_EVALUATED}
    found = {name: getattr(live, name) for name in missing}
    if log.held_out_steps is None:
        found |= {name: getattr(live, name) for name in _EVALUATED}
    if np.array_equal(live.steps, log.steps):
        found |= {name: getattr(live, name) for name in _ALONG[:5] if getattr(log, name) is None}
    return dataclasses.replace(log, **found, resumed=log.resumed or live.resumed)


def _with_logged_rates(seen: Observations) -> Observations:
    """Adds the peak of the logged rate where the arguments do not tell it and the rate has passed it."""
    curve, settings = seen.curve, seen.settings
    if curve is None or curve.rate is None or settings.learning_rate is not None:
        return seen
    rates = curve.rate[np.isfinite(curve.rate)]
    peak = float(rates.max())
    still_rises = len(rates) > 1 and rates[-1] == peak and rates[-2] < peak
    if still_rises or peak <= 0 or not math.isfinite(peak):
        return seen
    flat_rate = bool((rates == peak).all()) and len(rates) > 2
    settings = dataclasses.replace(
        settings, learning_rate=peak, schedule=settings.schedule or ("constant" if flat_rate else None)
    )
    return dataclasses.replace(seen, settings=settings)
