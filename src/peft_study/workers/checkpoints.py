"""The checkpoints of several workers: a folder each, on a disk that all see or at an fsspec URL.

    STUDY/checkpoints/worker-3/step_120/         where nothing is said
    URL/<name of the study>/worker-3/000007/     with `checkpoints: URL`: written on the worker's disk first, then sent,
                                                 the manifest last; a checkpoint without its manifest is none

No two workers ever have the same name, so that nobody writes where another does, or did.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from peft_study.engine import checkpoint
from peft_study.errors import ConfigError, OutputError, first_line

_TOKEN = "token"


class WorkerCheckpoints:
    """All checkpoints of a study's workers.

    Args:
        local: the study's folder of checkpoints.
        url: a folder or fsspec URL that all machines reach; None: they see `local`.
        study: name of the study below the URL.
        identity: of the settings that all trials share; checkpoints of others are of no use.

    Raises:
        ConfigError: when the URL is none, or its driver is not installed.
    """

    def __init__(self, local: Path, url: str | None, study: str, identity: str) -> None:
        self._local, self._identity = local, identity
        self._url = url
        self._files: Any = None
        self._scratch: Path | None = None
        if url is not None:
            self._files, root = open_place(url)
            self._root = PurePosixPath(root) / study

    def folder(self, worker: str) -> Path:
        """Returns where a worker on this machine writes its checkpoints."""
        if self._files is None:
            return self._local / worker
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="peft-study-"))
        return self._scratch / worker

    def send(self, worker: str, path: Path, number: int) -> None:
        """Copies a checkpoint that a worker has written to where the others find it, and removes the one before.

        Args:
            worker: whose it is.
            path: on this machine.
            number: of the worker's checkpoints, from 0.

        Raises:
            OutputError: when it cannot be written.
        """
        if self._files is None:
            return
        place = self._root / worker / f"{number:06d}"
        try:
            self._files.makedirs(str(place), exist_ok=True)
            for file in sorted(path.iterdir(), key=lambda file: file.name == checkpoint.MANIFEST):
                self._files.put_file(str(file), str(place / file.name))
            if number > 0:
                self._remove(place.with_name(f"{number - 1:06d}"))
        except OSError as error:
            raise self._unusable(error) from error

    def find(self) -> list[checkpoint.Found]:
        """Returns the newest checkpoint of each worker that ever had one; what is at the URL is not fetched yet."""
        here = [self._local, *sorted(self._local.glob("worker-*"))]
        found = [cut for folder in here for cut in checkpoint.find(folder)[-1:]]
        if self._files is not None:
            found += [cut for worker in self._listed(self._root) for cut in self._newest(worker)]
        return [cut for cut in found if cut.identity == self._identity]

    def fetch(self, cut: checkpoint.Found) -> checkpoint.Found:
        """Returns the checkpoint where this machine can read it."""
        if cut.folder.is_absolute() or self._files is None:
            return cut
        target = self.folder("fetched") / cut.folder
        if not (target / checkpoint.MANIFEST).exists():
            target.mkdir(parents=True, exist_ok=True)
            names = sorted(self._listed(self._root / cut.folder), key=lambda file: file.name == checkpoint.MANIFEST)
            for file in names:
                self._files.get_file(str(file), str(target / file.name))
        return replace(cut, folder=target)

    def sweep(self, needed: Iterable[checkpoint.Found]) -> None:
        """Removes the folders of workers that hold none of the `needed` checkpoints; no worker may be at work."""
        kept = {cut.folder.parent.name for cut in needed}
        for folder in self._local.glob("worker-*"):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)
        for worker in self._listed(self._root) if self._files is not None else ():
            if worker.name not in kept and worker.name.startswith("worker-"):
                self._remove(worker)

    def leave_token(self, value: str) -> None:
        """Leaves a word that only those read who see this place.

        Raises:
            OutputError: when nothing can be written there.
        """
        try:
            if self._files is None:
                self._local.mkdir(parents=True, exist_ok=True)
                (self._local / _TOKEN).write_text(value)
            else:
                self._files.makedirs(str(self._root), exist_ok=True)
                self._files.pipe_file(str(self._root / _TOKEN), value.encode())
        except OSError as error:
            raise self._unusable(error) from error

    def sees_token(self, value: str) -> bool:
        """True where the word can be read from here."""
        try:
            if self._files is None:
                return (self._local / _TOKEN).read_text() == value
            return bool(self._files.cat_file(str(self._root / _TOKEN)) == value.encode())
        except OSError:
            return False

    def close(self) -> None:
        """Removes what lies on this machine only to be sent or read."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _newest(self, worker: PurePosixPath) -> Sequence[checkpoint.Found]:
        for place in sorted(self._listed(worker), reverse=True):
            try:
                text = self._files.cat_file(str(place / checkpoint.MANIFEST)).decode()
            except OSError:
                continue
            cut = checkpoint.parse(Path(worker.name, place.name), text)
            if cut is not None:
                return [cut]
        return []

    def _listed(self, place: PurePosixPath) -> list[PurePosixPath]:
        try:
            self._files.invalidate_cache()
            return sorted(PurePosixPath(str(name)) for name in self._files.ls(str(place), detail=False))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unusable(error) from error

    def _remove(self, place: PurePosixPath) -> None:
        """Removes a folder, its manifests first of all: half of a checkpoint must not look whole."""
        try:
            for name in self._files.glob(str(place / "**" / checkpoint.MANIFEST)):
                self._files.rm_file(str(name))
            self._files.rm(str(place), recursive=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> OutputError:
        where = f"checkpoints {self._url or self._local}"
        return OutputError(f"cannot be used ({first_line(error)})", where=where, remedy="see that it can be written")


def open_place(url: str) -> tuple[Any, str]:
    """Returns the file system of an fsspec URL and the path in it.

    Raises:
        ConfigError: when it is none, or its driver is not installed.
    """
    try:
        from fsspec.core import url_to_fs

        files, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"cannot be opened ({first_line(error)})",
            where=f"checkpoints {url}",
            remedy="give a folder, or a URL of fsspec with its driver installed (pip install s3fs, gcsfs or adlfs)",
        ) from error
    return files, str(root)
