"""The folder of a run: its settings, its environment, its measurements, its result.

RUN/
    config.given.json     what the user wrote
    config.resolved.json  every setting, with defaults
    record.json           code state, versions, hardware, data, base
    capacity.json         slots, row budget and threads: measured once, the same on a resume
    parameters.json       trainable and total parameters, by module; written before step 1
    metrics.jsonl         one line a logged step or evaluation
    tensorboard/          the same, as event files
    checkpoints/step_N/   while it runs
    best/                 while it runs with early stopping: the adapter of the best step so far
    adapter/              in PEFT's format
    data/                 rows that the caller had in memory, as JSON lines
    trackers.json         with logging.trackers: the number in the ids of its runs there
    status.json           running, finished, diverged, failed or interrupted, with the reason
    report.html           the same for a browser (report/pages.py)
    lock, owner.json      held by the process that writes; its id and machine
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from peft_study.errors import Interrupted, OutputError, PeftStudyError
from peft_study.storage.files import atomic_writer, json_text, made_folder, output_error

Status = Literal["running", "finished", "pruned", "diverged", "failed", "interrupted"]
SCHEMA_VERSION = 2
"""Of the folder of a run or study; raised with every change that other versions of this program cannot read."""
_STATUS, _RESOLVED, _GIVEN, _RECORD = "status.json", "config.resolved.json", "config.given.json", "record.json"
FREE = ("output", "logging", "slots", "workers", "ray")
"""Settings that change no number."""
LOCK, OWNER = "lock", "owner.json"
"""Files of the process that writes to the folder of a run or a study."""
_VERSION = {"version": SCHEMA_VERSION}


def identity(resolved: Mapping[str, Any]) -> str:
    """Returns a digest of the settings that decide a run's numbers: not its place, logs, processes or slots."""
    values = {name: value for name, value in resolved.items() if name not in FREE}
    values["data"] = {name: value for name, value in values["data"].items() if name != "workers"}
    if "finals" in values:  # what the finals answer is only for the report
        values["finals"] = {name: value for name, value in values["finals"].items() if name != "answers"}
    if values.pop("early_stopping", None):  # absent where it is off, as in runs that were begun before there was any
        # where the held-out losses are measured then decides which adapter is kept
        values["early_stopping"] = [resolved["early_stopping"], resolved["logging"]["evaluate_every"]]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


INPUTS = ("data", "study.yaml")
"""What a caller puts into the folder before the run begins: rows from memory, and the file of a study without one."""


def _of_a_start(name: str) -> bool:
    """True for files of a process that was killed before it claimed the folder, and for a caller's inputs."""
    return name in (LOCK, OWNER, _GIVEN, _RESOLVED, *INPUTS) or (name.startswith(".") and name.endswith(".tmp"))


class RunFolder:
    """One run's folder; all writes are atomic."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def adapter(self) -> Path:
        """Where the trained adapter goes."""
        return self.path / "adapter"

    @property
    def best(self) -> Path:
        """Where the adapter of the best step so far lies while a run with early stopping is under way."""
        return self.path / "best"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The JSON lines of measurements."""
        return self.path / "metrics.jsonl"

    def status(self) -> tuple[Status, str | None] | None:
        """Returns status and reason, or None without a run."""
        values = self.read_if_there(_STATUS)
        return None if values is None else (values["status"], values.get("reason"))

    def identity(self) -> str | None:
        """Returns the identity of the settings of this folder's run, or None."""
        values = self.read_if_there(_STATUS)
        return None if values is None else values["identity"]

    def check(self, resolved: Mapping[str, Any], *, overwrite: bool, remedy: str) -> bool:
        """Returns True if the folder holds a run of the same settings, which then is resumed; writes nothing.

        Called before anything is loaded, so that a folder in use is refused at once.

        Args:
            resolved: every setting, as JSON.
            overwrite: another run in the folder may be deleted.
            remedy: for the error: how this command replaces or resumes a run.

        Raises:
            OutputError: when the folder holds another run or other files.
        """
        try:
            names = [path.name for path in self.path.iterdir()] if self.path.exists() else []
            found = self.identity()
        except NotADirectoryError as error:
            raise OutputError("is a file", where=str(self.path), remedy="give a folder") from error
        except OSError as error:
            raise output_error(error, self.path) from error
        if found is None and not all(map(_of_a_start, names)):
            raise OutputError("holds files that are no run", where=str(self.path), remedy="give an empty folder")
        if found is None or overwrite:
            return False
        self.refuse_other_version()
        if found != identity(resolved):
            raise OutputError("holds another run, with other settings", where=str(self.path), remedy=remedy)
        return True

    def refuse_other_version(self) -> None:
        """Refuses a folder that another version of this program wrote.

        Raises:
            OutputError: then.
        """
        version = (self.read_if_there(_STATUS) or {}).get("version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            age, change = ("a newer", "upgrade") if version > SCHEMA_VERSION else ("an older", "install the older")
            raise OutputError(
                f"was written by {age} version of this program (schema {version}, this one reads {SCHEMA_VERSION})",
                where=str(self.path),
                remedy=f"{change} peft-study, or give another folder",
            )

    def claim(self, resolved: Mapping[str, Any], given: Any, *, overwrite: bool, remedy: str) -> bool:
        """Makes the folder this run's; returns True if it holds a run of the same settings, which then is resumed.

        Called after model and data were checked: a mistake in them makes no folder and deletes no old run.

        Args:
            resolved: every setting, as JSON.
            given: what the user wrote.
            overwrite: delete the run in the folder.
            remedy: as in `check`.

        Raises:
            OutputError: when the folder holds another run or other files, or cannot be written.
        """
        if self.check(resolved, overwrite=overwrite, remedy=remedy):
            return True
        if self.identity() is not None:
            self._clear()
        with made_folder(self.path):
            try:
                self.write(_GIVEN, given)
                self.write(_RESOLVED, resolved)
                self.set_status("running", own=identity(resolved))
            except BaseException:
                for name in (_GIVEN, _RESOLVED, _STATUS):
                    (self.path / name).unlink(missing_ok=True)
                raise
        return False

    def _clear(self) -> None:
        """Deletes the run or study in the folder; the lock and the inputs of the new run stay.

        Raises:
            OutputError: when another process writes to a run inside it, such as a rerun, or it cannot be deleted.
        """
        # a kill in between must leave either a run that can be replaced, or a folder that a new run may claim
        order = {"checkpoints": 0, _GIVEN: 2, _RESOLVED: 2, _STATUS: 3}
        try:
            for lock in list(self.path.rglob(LOCK)):
                if lock.parent != self.path and lock.is_file():
                    with RunFolder(lock.parent).locked():
                        pass
            for path in sorted(self.path.iterdir(), key=lambda path: order.get(path.name, 1)):
                if path.name in (LOCK, OWNER, *INPUTS):
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        except OSError as error:
            raise output_error(error, self.path) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other writers out of the folder, which is made, and removed again if nothing is written to it.

        The lock ends with the process, however that ends; forked processes do not hold it.

        Raises:
            OutputError: when another process is writing to the folder, or nothing can be written there.
        """
        lock = FileLock(self.path / LOCK, timeout=0)
        with made_folder(self.path):
            try:
                lock.acquire()
            except Timeout:
                owner = self._owner()
                raise OutputError(
                    f"process {owner.get('process', '?')} on {owner.get('machine', '?')} is writing to it",
                    where=str(self.path),
                    remedy="wait for it, stop it, or give another folder",
                ) from None
            except OSError as error:
                raise output_error(error, self.path) from error
            try:
                self.write(OWNER, {"process": os.getpid(), "machine": socket.gethostname()})
                yield
            finally:
                (self.path / OWNER).unlink(missing_ok=True)
                if {p.name for p in self.path.iterdir()} <= {LOCK}:  # nothing was written: leave no trace
                    (self.path / LOCK).unlink(missing_ok=True)
                lock.release()

    def _owner(self) -> dict[str, Any]:
        """Returns who holds the lock; the other process may have taken it a moment ago, and not have said so yet."""
        for _ in range(20):
            if found := self.read_if_there(OWNER):
                return dict(found)
            time.sleep(0.05)
        return {}

    def end(self, error: BaseException) -> None:
        """Sets the status after an error; if even that cannot be written, the error itself is what the user sees."""
        if isinstance(error, KeyboardInterrupt):
            error = Interrupted("stopped at once; the same command resumes from the last checkpoint")
        status: Status = "interrupted" if isinstance(error, Interrupted) else "failed"
        reason = str(error) if isinstance(error, PeftStudyError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OutputError):
            self.set_status(status, reason)

    def set_status(self, status: Status, reason: str | None = None, *, own: str | None = None) -> None:
        """Writes the status."""
        self.write(_STATUS, {"status": status, "reason": reason, "identity": own or self.identity(), **_VERSION})

    def write_record(self, values: dict[str, Any]) -> None:
        """Writes the record of code, versions, hardware, data and base."""
        self.write(_RECORD, values)

    def record(self) -> dict[str, Any] | None:
        """Returns the record, or None if the run had not begun."""
        values: dict[str, Any] | None = self.read_if_there(_RECORD)
        return values

    def write(self, name: str, values: Any) -> None:
        """Writes a JSON file into the folder, atomically."""
        text = json_text(values, indent=2, ensure_ascii=False, default=str) + "\n"
        with atomic_writer(self.path / name) as file:
            file.write(text)

    def read(self, name: str) -> Any:
        """Returns a JSON file of the folder, which must exist."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def read_if_there(self, name: str) -> Any:
        """Returns a JSON file of the folder, or None if it does not exist."""
        try:
            return self.read(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise OutputError(f"{name} is damaged", where=str(self.path), remedy="give another folder") from error
