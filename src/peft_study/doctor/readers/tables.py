"""Logs as JSON lines, a JSON array or CSV, read row by row."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from peft_study.doctor.readers.columns import KIND_COLUMNS, Columns, of_evaluation
from peft_study.doctor.readers.log_text import LogFile
from peft_study.doctor.readers.points import Points
from peft_study.errors import DataError

_SAMPLE = 1000
"""Rows of which the names are looked at before columns are chosen."""
_MANY_BAD = 0.5
"""Share of lines that cannot be read from which on a file is no log."""
_CONTEXT = {"rate", "epoch", "gradient_norm", "step", "loss_scale"}
"""What says nothing by itself: a row of these and a loss of NaN is a step whose loss is not a number."""


def points_of_rows(
    rows: Iterator[Mapping[str, Any]], where: str, columns: Mapping[str, str] | None
) -> tuple[Points, list[str], list[str]]:
    """Returns the points of a table, what its reader has to say, and the names of all columns.

    Args:
        rows: of the table.
        where: the file, for errors.
        columns: names of columns by what they hold; the others are guessed.

    Raises:
        UserError: when a column that is asked for is not there.
    """
    chosen = Columns(columns)
    sample = list(itertools.islice(rows, _SAMPLE))
    chosen.learn(sample)
    filler = _Filler(chosen)
    for row in itertools.chain(sample, rows):
        filler.row(row)
    chosen.check(where)
    return filler.points, [*chosen.said(), *filler.remarks()], chosen.names


class _Filler:
    """Turns rows into points.

    Attributes:
        points: so far.
    """

    def __init__(self, columns: Columns) -> None:
        self.points = Points()
        self._columns = columns
        self._meanings: dict[bool, dict[str, str | None]] = {False: {}, True: {}}
        self._kinds = not KIND_COLUMNS.isdisjoint(columns.names)
        self._numbered = "step" not in columns.chosen
        self._step, self._last_loss_step, self._offset = 0.0, -math.inf, 0.0
        self._first_step = 0.0
        self._epoch: float | None = None
        self._bad: dict[str, int] = {}
        self._first_bad = ""

    def row(self, row: Mapping[str, Any]) -> None:
        """Adds a row."""
        held_out = self._kinds and of_evaluation(row)
        meanings = self._meanings[held_out]
        values: dict[str, float] = {}
        empty = None
        for name, value in row.items():
            if name not in meanings:
                meanings[name] = self._columns.of(name, held_out)
                self._kinds = self._kinds or name in KIND_COLUMNS
            what = meanings[name]
            if what is None or value is None or value == "":
                continue
            try:
                number: float | None = float(value)
            except (TypeError, ValueError, OverflowError):
                number = self._number(value, what)
            if number is None or value is True or value is False:
                continue
            if number == number:
                values[what] = number
            else:
                empty = what if empty is None else ""
        if empty and empty not in _CONTEXT and not values.keys() - _CONTEXT:
            values[empty] = math.nan  # not a number, where a table's empty places are NaN, too
        if values:
            self._place(values)

    def _number(self, value: Any, what: str) -> float | None:
        """Returns the number of a text that Python takes for none; None where there is none."""
        if isinstance(value, int):
            return math.inf  # of hundreds of digits
        if isinstance(value, str):
            thousands = what == "step" and re.fullmatch(r"\d{1,3}(,\d{3})+", value.strip())
            try:
                return float(value.replace(",", "" if thousands else "."))  # else it is a decimal comma
            except ValueError:
                self._bad[what] = self._bad.get(what, 0) + 1
                self._first_bad = self._first_bad or value[:40]
        return None

    def _place(self, values: dict[str, float]) -> None:
        step, epoch = values.pop("step", None), values.get("epoch")
        trains = "loss" in values
        if self._numbered:
            self._step += trains
        elif step is not None and math.isfinite(step):
            self._step = step + self._offset
            if trains and self._step < self._last_loss_step and (epoch or 0) > (self._epoch or 0):
                # steps are counted anew in each epoch
                self._offset = self._last_loss_step + 1 - self._first_step
                self._step = step + self._offset
        if trains:
            if self._last_loss_step == -math.inf:
                self._first_step = self._step
            self._last_loss_step, self._epoch = self._step, epoch
        if values.keys() - {"epoch"}:
            self.points.add(self._step, values)

    def remarks(self) -> list[str]:
        """Returns what was put right, a line each."""
        found = []
        if self._numbered:
            found.append("no column of steps: the rows with a loss are counted")
        if self._offset:
            found.append("the steps are counted anew in each epoch: they are counted through")
        for what, count in self._bad.items():
            found.append(f"{count:,} values of {what} are no numbers, as {self._first_bad!r}: they are left out")
        return found


def json_rows(file: LogFile, notes: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of JSON lines; nested objects get dotted names.

    Args:
        file: to read.
        notes: gets a line where lines could not be read.

    Raises:
        DataError: most lines are no JSON objects.
    """
    good, bad, first_bad, cut = 0, 0, 0, False
    for number, line in enumerate(file.lines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        except RecursionError:
            row = None
        if isinstance(row, dict):
            good += 1
            yield flat(row) if any(type(value) is dict for value in row.values()) else row
            continue
        cut = row is None and not line.endswith("\n")
        bad, first_bad = bad + 1, first_bad or number
        if bad >= 20 and bad > _MANY_BAD * (good + bad):
            raise DataError(
                "is no log of JSON lines", where=f"{file.where}, line {first_bad}", remedy="give one object a line"
            )
    if cut:
        notes.append("the last line is cut off, as in a run that still writes: it is left out")
    if bad > cut:
        if bad >= good:
            raise DataError("is no JSON object", where=f"{file.where}, line {first_bad}", remedy="give one a line")
        notes.append(f"{bad - cut:,} lines are no JSON objects, first line {first_bad}: they are left out")


def flat(row: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Returns an object without objects in it, under dotted names."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict) and before.count(".") < 8:
            found |= flat(value, f"{before}{name}.")
        else:
            found[before + name] = value
    return found


def csv_rows(file: LogFile, notes: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a CSV file; the separator is a comma, semicolon or tab.

    Args:
        file: to read.
        notes: gets a line where lines could not be read.

    Raises:
        DataError: there is no line of names, or it is no table.
    """
    lines = file.lines()
    first = next((line for line in lines if line.strip() and not line.startswith("#")), "")
    try:
        separator = max(",;\t", key=lambda mark: (len(next(csv.reader([first], delimiter=mark))), mark == ","))
        names = [name.strip() for name in next(csv.reader([first], delimiter=separator))]
    except csv.Error as error:
        raise _no_csv(file, error) from error
    if not any(name and not _is_number(name) for name in names):
        raise DataError("has no line with the names of its columns", where=file.where, remedy="write step,loss first")
    short, last = 0, True
    try:
        for cells in csv.reader(lines, delimiter=separator):
            if len(cells) >= len(names):
                yield dict(zip(names, cells, strict=False))
            elif cells:
                last = file.ended
                short += 1
                if last:
                    yield dict(zip(names, cells, strict=False))
    except csv.Error as error:
        raise _no_csv(file, error) from error
    if not last:
        notes.append("the last line is cut off, as in a run that still writes: it is left out")
        short -= 1
    if short:
        notes.append(f"{short:,} lines have fewer values than there are columns")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _no_csv(file: LogFile, error: csv.Error) -> DataError:
    return DataError(f"is no CSV file ({error})", where=file.where, remedy="give a table of text")
