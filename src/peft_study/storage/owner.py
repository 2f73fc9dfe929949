"""Who writes to the folder of a run or a study, seen from outside."""

from __future__ import annotations

import fcntl
import os
import socket
from dataclasses import dataclass

from peft_study.storage.run_dir import LOCK, OWNER, RunFolder


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that writes to a folder.

    Attributes:
        process: its id.
        machine: where it runs.
        certain: False where it began on another machine and its lock cannot be seen from here.
    """

    process: int
    machine: str
    certain: bool


def owner(folder: RunFolder) -> Owner | None:
    """Returns the process that writes to a folder, or None where nobody does.

    A process that was killed leaves its name behind, so its lock is looked at too: shared and for an instant, and only
    where a name lies there and its process is not known to be dead. A run that starts is not in the way of that.
    """
    said = folder.read_if_there(OWNER)
    if said is None:
        return None
    here = said["machine"] == socket.gethostname()
    if here and not _alive(said["process"]):
        return None
    locked = _locked(folder)
    return Owner(said["process"], said["machine"], locked) if locked or not here else None


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is somebody else's, and alive
    return True


def _locked(folder: RunFolder) -> bool:
    try:
        with (folder.path / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # there is no lock, or the file system knows none
    return False
