"""The folder of a study, which one process at a time may write to.

STUDY/
    study.yaml            the study's file, where `peft-study run` was started without one
    data/                 rows that the caller had in memory, as JSON lines
    config.given.json     what the user wrote
    config.resolved.json  every setting, with all rules applied
    record.json           code state, versions, hardware, data, base
    status.json           running, finished, ..., and the schema version of the folder
    capacity.json         slots, row budget and threads: measured once, the same on a resume
    examples.json         held-out examples: their tokens and the untouched base's losses (storage/held_out.py)
    journal.jsonl         every decision and result, in order (storage/journal.py)
    optuna.db             a copy of the search for optuna-dashboard, made from the journal
    trials/NAME/          a run's folder: configuration, status, metrics, adapter (storage/run_dir.py)
    reruns/NAME/          a trial trained again (study/rerun.py)
    checkpoints/          of the engine, while it runs; of several workers in worker-N/
    workers.json          only of a study that several workers ran: the next worker's number
    results.parquet, results.csv   a row a trial
    results.json          the table of finalists
    findings.json         every finding with its numbers and its trials
    report.html, report.zh.html, charts/   what it says, for a browser (report/pages.py)
    cost.json             what each method's best setting costs (report/costs.py)
    answers.json          answers of base and finalists to test prompts (report/answers.py)
    lock, owner.json      held by the process that writes; its id and machine
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_study.config import StudyConfig, TrialSettings, validate
from peft_study.errors import OutputError
from peft_study.storage.files import output_error
from peft_study.storage.run_dir import FREE, LOCK, OWNER, RunFolder, identity

_BASIS = ("model", "data", "training")
"""Settings that must stay the same for trials to be comparable."""

_WORKERS = "workers.json"
"""Written by a start with several workers, and kept: from then on the journal is ahead of every single checkpoint."""


def run_settings(config: StudyConfig, settings: TrialSettings, output: Path) -> dict[str, Any]:
    """Returns a trial's settings as those of a single run (`TrainConfig`), in JSON values."""
    return {
        **config.model_dump(mode="json", include={"model", "data", "logging"}),
        **settings.model_dump(mode="json", include={"method", "training"}),
        "output": str(output),
    }


class StudyFolder:
    """One study's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = RunFolder(path)

    @property
    def journal(self) -> Path:
        """Of decisions and results."""
        return self.path / "journal.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Of the engine; of several workers each in a folder of its own."""
        return self.run.checkpoints

    @property
    def had_pool(self) -> bool:
        """True where several workers ran the study."""
        return (self.path / _WORKERS).exists()

    def claim_worker(self) -> Path:
        """Makes the folder of checkpoints of a new worker, ``checkpoints/worker-N``; no N is ever used twice.

        So a dead worker that still writes, or an old file, cannot disturb a new worker.
        """
        number = (self.run.read_if_there(_WORKERS) or {"next": 0})["next"]
        self.run.write(_WORKERS, {"next": number + 1})
        folder = self.checkpoints / f"worker-{number}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise output_error(error, folder) from error
        return folder

    def trial(self, name: str) -> RunFolder:
        """Returns the folder of a trial."""
        return RunFolder(self.path / "trials" / name)

    @property
    def optuna(self) -> Path:
        """A copy of the search for optuna-dashboard."""
        return self.path / "optuna.db"

    def check(self, config: StudyConfig, *, overwrite: bool, go_on: bool) -> list[str]:
        """Returns what changed in the study file since this folder's study began; writes nothing.

        Args:
            config: filled.
            overwrite: another study in this folder may be deleted.
            go_on: the file was changed on purpose: add trials under the new one.

        Raises:
            OutputError: when the folder holds something else, another schema, or a study whose file differs and neither
                flag is set; or when old trials could not be compared with new ones.
        """
        found, resolved = self.run.identity(), config.model_dump(mode="json")
        if found is None or overwrite or found == identity(resolved):
            self.run.check(resolved, overwrite=overwrite, remedy="")
            return []
        before = self.run.read_if_there("config.resolved.json")
        if before is None or "methods" not in before:
            raise OutputError("holds a run that is no study", where=str(self.path), remedy="give another output folder")
        self.run.refuse_other_version()
        changes = differences(before, resolved)
        said = "; ".join(changes[:6]) + (f"; and {len(changes) - 6} more" if len(changes) > 6 else "")
        if not go_on:
            raise OutputError(
                f"the settings changed since this study began: {said}",
                where=str(self.path),
                remedy="add --continue (Python: extend=True) for new trials under the new settings, "
                "--overwrite (overwrite=True) to replace it, or give another output folder",
            )
        lost = [
            change for change in changes if change.split(".", 1)[0].split(":", 1)[0] in _BASIS or _is_budget(change)
        ]
        other = [change for change in changes if re.match(r"methods\.[^.]+\.method: ", change)]
        if other:
            raise OutputError(
                f"a name would stand for two methods: {'; '.join(other)}",
                where=str(self.path),
                remedy="give the new space another name",
            )
        if lost:
            raise OutputError(
                f"its trials cannot be compared with new ones: {'; '.join(lost)}",
                where=str(self.path),
                remedy="give another output folder",
            )
        return changes

    def claim(self, config: StudyConfig, given: Any, *, overwrite: bool) -> None:
        """Makes the folder this study's."""
        self.run.claim(config.model_dump(mode="json"), given, overwrite=overwrite, remedy="")

    def take_over(self, config: StudyConfig, given: Any) -> None:
        """Writes a changed study file into the folder."""
        resolved = config.model_dump(mode="json")
        self.run.write("config.given.json", given)
        self.run.write("config.resolved.json", resolved)
        self.run.set_status("running", own=identity(resolved))

    def claim_trial(self, name: str, config: StudyConfig, settings: TrialSettings) -> RunFolder:
        """Returns the claimed folder of a trial, which then is a run's; one that was begun before is used again.

        A trial of other settings in that folder was begun under an earlier study file and never reached a checkpoint.
        """
        folder = self.trial(name)
        resolved = run_settings(config, settings, folder.path)
        if folder.identity() not in (None, identity(resolved)):
            shutil.rmtree(folder.path)
        folder.claim(resolved, resolved, overwrite=False, remedy="give another output folder")
        folder.set_status("running")
        return folder

    def config(self) -> StudyConfig:
        """Returns the study's resolved settings.

        Raises:
            OutputError: when the folder holds no study, or one of another version.
        """
        values = self.run.read_if_there("config.resolved.json")
        if values is None and (writer := owner(self.run)) is not None:
            what = f"holds no study or run yet: process {writer.process} on {writer.machine} is loading model and data"
            raise OutputError(what, where=str(self.path), remedy="ask again in a minute")
        if values is None or "methods" not in values:
            raise OutputError("holds no study", where=str(self.path), remedy="give the output folder of a study")
        self.run.refuse_other_version()
        return validate(StudyConfig, values, where=str(self.path / "config.resolved.json"))


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Returns ``a.b: old -> new`` for every setting that differs, leaving out those that change no number."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in dict.fromkeys((*before, *now)):
            inner = f"{path}.{key}" if path else str(key)
            if inner in (*FREE, "data.workers", "finals.answers"):
                continue
            if key not in now:
                found.append(f"{inner}: no longer there")
            elif key not in before:
                found.append(f"{inner}: new")
            else:
                found += differences(before[key], now[key], inner)
        return found
    return [] if before == now else [f"{path}: {_short(before)} -> {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _is_budget(change: str) -> bool:
    return change.startswith(("budget.steps", "budget.tokens"))


def basis(config: StudyConfig) -> str:
    """Returns a digest of the settings that all trials of a study share; a checkpoint of others is not used."""
    exclude: Any = {name: True for name in type(config).model_fields if name not in ("model", "data", "training")}
    values = config.model_dump(mode="json", exclude={**exclude, "data": {"workers"}})
    shared = {**values, "steps": config.budget.steps, "tokens": config.budget.tokens}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that writes to a folder.

    Attributes:
        process: its id.
        machine: where it runs.
        certain: False where it runs on another machine, whose lock cannot be seen from here.
    """

    process: int
    machine: str
    certain: bool


def owner(folder: RunFolder) -> Owner | None:
    """Returns the process that writes to a folder, or None.

    A killed process leaves owner.json behind, so its lock is tried too: shared, for an instant, and only if the process
    may be alive, so that a starting run is not disturbed.
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
