"""The errors a person can cause, as one tree.

    PeftStudyError
    ├── Interrupted          the run was asked to stop, and did
    └── UserError            what went wrong, where, and the remedy; the CLI prints one line and exits with 2
        ├── ConfigError      a setting that cannot be used (the field, its value)
        ├── DataError        a file or one of its rows (file, row counted from 1)
        ├── TemplateError    a chat template that cannot be rendered or whose answers cannot be located
        ├── ModelError       a model or adapter folder that cannot be used
        ├── OutputError      a place that cannot be written, or that holds something worth keeping
        └── ProcessError     another process of the same run died

Everything else (``AssertionError``, ``TypeError``, ...) is a defect of this program and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Self


class PeftStudyError(Exception):
    """Root of the errors this package raises on purpose."""


class UserError(PeftStudyError):
    """A mistake the user can fix.

    Args:
        what: what is wrong, naming the field and the value.
        where: file, row, YAML line or command-line flag it was found at.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        return text if self.remedy is None else f"{text}; {self.remedy}"

    def within(self, place: str) -> Self:
        """Returns the same error with a place before its own: the setting that names a file, the file of a setting."""
        where = place if self.where is None else f"{place}, {self.where}"
        return type(self)(self.what, where=where, remedy=self.remedy)


class ConfigError(UserError):
    """A setting that cannot be used."""


class DataError(UserError):
    """A data file, or one of its rows, that cannot be used."""


class TemplateError(UserError):
    """A chat template that cannot be rendered, or in which an answer cannot be located."""


class ModelError(UserError):
    """A model or adapter that cannot be loaded, or that does not fit the method."""


class ProcessError(UserError):
    """Another process of the same run died, so that this one must stop."""


class OutputError(UserError):
    """An output that cannot be written, or a folder that holds another run."""


class Interrupted(PeftStudyError):
    """The run was asked to stop, and did so between two steps, with a checkpoint."""


def first_line(error: BaseException) -> str:
    """Returns what a library's error says, cut to its first line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def out_of_memory(error: BaseException) -> bool:
    """True where memory ran out: on CUDA by the error's class, on MPS and CPU by its text or as Python's own error."""
    said = ("OutOfMemoryError", "MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory")
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, MemoryError) or said[0] in kinds or any(text in str(error) for text in said[1:])


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns the remedy for an unknown name: the nearest valid one where there is one, else all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(names)}"


def nearest_path(path: Path, *, folders: bool = False) -> Path | None:
    """Returns the existing path whose name is nearest to one that is not there, or None.

    Where the folder around it is missing too, the nearest to that folder is returned.

    Args:
        path: that is not there.
        folders: only folders are looked at.
    """
    while not path.parent.is_dir():
        path = path.parent
    try:
        names = [beside.name for beside in path.parent.iterdir() if beside.is_dir() or not folders]
    except OSError:  # a folder that must not be listed
        return None
    close = difflib.get_close_matches(path.name, names, n=1)
    return path.parent / close[0] if close else None
