"""Files that appear whole or not at all.

    write  ->  .NAME.xxxx.tmp  --fsync-->  os.replace  ->  NAME

The temporary file lies in the folder of the final one, because a rename is atomic only inside one file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TextIO

from safetensors import SafetensorError

from peft_study.errors import ConfigError, OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def output_error(error: OSError, path: Path) -> OutputError:
    """Returns the one-line error for an ``OSError`` met while writing ``path``."""
    if error.errno in _FULL:
        what, remedy = "the disk is full", "free some space or name a folder on another disk (nothing was left behind)"
    elif error.errno in _FORBIDDEN:
        what, remedy = "this place cannot be written", "name another folder or change its permissions"
    else:
        what, remedy = f"writing failed: {error.strerror or error}", "name another place (nothing was left behind)"
    return OutputError(what, where=str(path), remedy=remedy)


class AtomicFiles:
    """Several files that appear together when the ``with`` block ends well, in the order they were opened.

    All of them are complete and on the disk before the first is renamed. On any error the temporary files are
    removed, what stood under the names stays, and an ``OSError`` of writing becomes an `OutputError`.
    """

    def __init__(self) -> None:
        self._files: list[tuple[BinaryIO, Path, Path]] = []

    def __enter__(self) -> AtomicFiles:
        return self

    def open(self, path: Path) -> BinaryIO:
        """Opens a temporary file that is to become ``path``; raises `OutputError` where it cannot be made."""
        target = Path(os.path.realpath(path))  # a link stays a link: its target is replaced
        try:
            if target.is_dir():
                raise OutputError("is a folder, not a file", where=str(path), remedy="name a file in it")
            _remove_leftovers(target)
            temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
            handle = _locked_file(temporary)
        except OSError as error:
            raise output_error(error, path) from error
        self._files.append((handle, temporary, target))
        return handle

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._commit()
            elif isinstance(error, OSError) and self._is_ours(error):
                raise output_error(error, self._files[0][2] if self._files else Path.cwd()) from error
        finally:
            for handle, temporary, _ in self._files:
                with contextlib.suppress(OSError):  # a full disk refuses the last flush once more
                    handle.close()
                temporary.unlink(missing_ok=True)

    def _commit(self) -> None:
        for handle, _, target in self._files:
            try:
                handle.flush()
                os.fsync(handle.fileno())
            except OSError as error:
                raise output_error(error, target) from error
        for _, temporary, target in self._files:
            try:
                temporary.replace(target)
                _sync_folder(target.parent)
            except OSError as error:
                raise output_error(error, target) from error

    def _is_ours(self, error: OSError) -> bool:
        """Returns whether the error may come from writing: a write names no file."""
        return error.filename is None or any(str(error.filename) == str(path) for _, path, _ in self._files)


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """Yields a UTF-8 text file that becomes ``path`` when the block ends well; errors as in `AtomicFiles`."""
    with AtomicFiles() as files:
        text = io.TextIOWrapper(files.open(path), encoding="utf-8", newline="\n", write_through=True)
        yield text
        text.detach()  # the binary file underneath is synced and closed by AtomicFiles


@contextlib.contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Makes ``path`` and its missing parents; if the block fails, removes again those that it made.

    Raises:
        OutputError: the folder cannot be made, or a file stands in its place.
    """
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(place for place in (path, *path.parents) if place.exists())
        raise OutputError("is a file, not a folder", where=str(file), remedy="name another folder") from error
    except OSError as error:
        raise output_error(error, path) from error
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # somebody else may have put a file there meanwhile
                folder.rmdir()
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes ``path`` when the block ends well, in place of what is there.

    The temporary folder has a fixed name, so that what a killed process left is overwritten: one writer at a time.

    Raises:
        OutputError: something cannot be written; what stood under the name stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with made_folder(path.parent):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            shutil.rmtree(path, ignore_errors=True)
            temporary.replace(path)
            _sync_folder(path.parent)
        except OSError as error:
            raise output_error(error, path) from error
        except SafetensorError as error:  # safetensors has its own error for a full disk
            raise OutputError(f"writing failed: {error}", where=str(path), remedy="free some space") from error
        except OutputError as error:
            where = (error.where or "").replace(str(temporary), str(path))
            raise OutputError(error.what, where=where, remedy=error.remedy) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(path: Path, *, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Refuses to replace a file, before any work is done for a new one.

    Args:
        path: of the file to write.
        overwrite: an existing file may be replaced, but never one of the `sources`.
        sources: files that are read.

    Raises:
        OutputError: when it may not be replaced.
    """
    if path.is_dir():
        raise OutputError("is a folder, not a file", where=str(path), remedy="name a file in it")
    if any(path.exists() and source.exists() and path.samefile(source) for source in sources):
        raise OutputError("is one of the sources", where=str(path), remedy="name another output file")
    if path.exists() and not overwrite:
        raise OutputError("is there already", where=str(path), remedy="replace it with --overwrite, or name another")


def follow_umask(folder: Path) -> None:
    """Gives the safetensors files of a folder, which safetensors makes 0600, the permissions of a new file.

    They are read from a new file, because reading the umask changes it for other threads.
    """
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    probe.touch(exist_ok=False)
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


class _Writable(Exception):
    """A place can be written."""


def refuse_unwritable(path: Path, *, folder: bool = False) -> None:
    """Tries whether a file or a new folder can be written, before work is done for it; leaves nothing behind.

    Missing parents are made and removed again; the writer has to make them.

    Raises:
        OutputError: when it cannot be written.
    """
    place = atomic_folder if folder else atomic_writer
    with contextlib.suppress(_Writable), made_folder(path.parent), place(path):
        raise _Writable


def read_text(path: Path) -> str:
    """Returns the text of a user's UTF-8 file, without a byte order mark.

    Raises:
        ConfigError: when it does not exist, is a folder, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        form = "UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "GBK"
        if form == "GBK" and b"\0" in error.object:
            raise ConfigError("is not a text file", where=str(path), remedy="name a text file") from error
        line = error.object[: error.start].count(b"\n") + 1
        remedy = f"convert it: iconv -f {form} -t UTF-8 {path} > utf8{path.suffix} (instead of {form}, what it is in)"
        raise ConfigError(f"line {line} is not UTF-8 text", where=str(path), remedy=remedy) from error
    except IsADirectoryError as error:
        raise ConfigError("is a folder, not a file", where=str(path), remedy="name a file in it") from error
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        raise ConfigError(what, where=str(path), remedy="check the path and its permissions") from error


def json_text(values: Any, **options: Any) -> str:
    """Returns values as JSON, with null for numbers that JSON does not have: NaN and infinity.

    Args:
        values: plain values.
        options: of `json.dumps`.
    """
    try:
        return json.dumps(values, allow_nan=False, **options)
    except ValueError:
        return json.dumps(finite(values), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """Returns plain values with None for each number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _locked_file(temporary: Path) -> BinaryIO:
    """Returns a new file with a lock, which dies with the process, so that others can tell a leftover from it.

    Where the file system has no locks, a leftover stays until somebody removes it.
    """
    while True:
        handle = temporary.open("xb")
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if temporary.exists():
            return handle
        handle.close()  # another writer of the same target took it for a leftover before it was locked


def _remove_leftovers(target: Path) -> None:
    """Removes the temporary files of runs that were killed while writing ``target``."""
    for path in target.parent.glob(f".{_escaped(target.name)}.????????.tmp"):
        with contextlib.suppress(OSError), path.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
            path.unlink()


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, if the file system can sync a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
