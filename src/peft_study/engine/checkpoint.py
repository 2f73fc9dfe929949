"""Checkpoints: the state of the whole engine between two rows; whole on the disk or not there at all.

    step_120/
        slot-0.safetensors   parameter/P, exp_avg/P, exp_avg_sq/P, step/P, gradient/P (of an unfinished batch)
        best/                of a run with early stopping: the adapter of its best step so far, by link where possible
        checkpoint.json      identity of the run, row budget, and of each trial: slot, tokens served, progress; what
                             the caller had decided; sha256 of every other file. Written last.

Data order, schedule and dropout are functions of a trial's step, so nothing else has to be kept. With the tokens
served, rows are filled after a resume as they would have been.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_study.engine.engine import Engine
from peft_study.engine.trial import Progress, Trial
from peft_study.errors import OutputError
from peft_study.model.digest import file_digest
from peft_study.storage.files import atomic_folder, follow_umask

MANIFEST = "checkpoint.json"
"""Written last: a checkpoint without it is none."""
_VERSION = 2
_STATE = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        folder: where it lies.
        step: its number.
        identity: of the run's settings.
        trials: names of the trials in its slots, in slot order.
        steps: optimizer steps that each of them had taken.
        decided: what the caller of `save` kept beside the trials.
        manifest: the content of its ``checkpoint.json``.
    """

    folder: Path
    step: int
    identity: str
    trials: tuple[str, ...]
    steps: tuple[int, ...]
    decided: Mapping[str, Any]
    manifest: Mapping[str, Any]


def save(
    engine: Engine,
    folder: Path,
    number: int,
    identity: str,
    decided: Mapping[str, Any] | None = None,
    beside: Path | None = None,
) -> Path:
    """Writes ``step_NUMBER`` into `folder` and returns its path.

    Args:
        engine: between two rows.
        folder: of the run's checkpoints.
        number: what it is called and ordered by: optimizer steps so far.
        identity: of the run's settings; a resume under others is refused.
        decided: JSON values that belong to the same moment, such as which trials of a study have ended.
        beside: a folder that belongs to it too, whose files are only ever replaced; kept under its own name.

    Raises:
        OutputError: when it cannot be written.
    """
    target, temporary = folder / f"step_{number}", folder / f".step-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
        trials, digests = _save_trials(engine, temporary)
        if beside is not None:
            digests |= _put_beside(beside, temporary / beside.name)
        follow_umask(temporary)
        manifest = {
            "version": _VERSION,
            "step": number,
            "identity": identity,
            "row_tokens": engine.row_tokens,
            "trials": trials,
            "decided": dict(decided or {}),
            "sha256": digests,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest))
        _sync(temporary / MANIFEST)
        _sync(temporary)
        replaced = temporary.with_name(f"{temporary.name}-replaced")
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        _sync(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        what = f"the checkpoint could not be written ({error})"
        raise OutputError(what, where=str(target), remedy="free some space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _save_trials(engine: Engine, folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Writes the tensors of each slot; returns the state beside them, and the digests of the files by name."""
    trials, digests = list[dict[str, Any]](), dict[str, str]()
    whole = engine.processes.count == 1  # else each has a part of a batch's gradients: the batch starts again
    for slot, (trial, served) in engine.places.items():
        path = folder / f"slot-{slot}.safetensors"
        tensors = _tensors(trial, gradients=whole)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
        _sync(path)
        digests[path.name] = file_digest(path)
        progress = trial.progress() if whole else replace(trial.progress(), sums={}, waiting=())
        trials.append({"name": trial.name, "slot": slot, "served": served, **asdict(progress)})
    return trials, digests


def load(engine: Engine, found: Checkpoint, trials: Mapping[str, Trial]) -> None:
    """Puts the engine where it was: each trial into its slot, with its tensors, progress and unfinished batch.

    Args:
        engine: without trials.
        found: the checkpoint.
        trials: by name, those of `found.trials`, freshly made.

    Raises:
        OutputError: when files are damaged or belong to other settings; the engine then has no trials.
    """
    assert not engine.trials, "a checkpoint is of the whole engine"
    entries = found.manifest["trials"]
    loaded = [_read(found, entry, trials[entry["name"]]) for entry in entries]
    engine.row_tokens = found.manifest["row_tokens"]
    for entry, tensors in zip(entries, loaded, strict=True):
        _restore(engine, trials[entry["name"]], entry, tensors, slot=entry["slot"], served=entry["served"])


def load_one(engine: Engine, found: Checkpoint, trial: Trial) -> None:
    """Resumes one trial of a checkpoint in a free slot of any engine, beside any other trials.

    Its numbers are those of the engine it comes from, up to the rounding of other rows.

    Args:
        engine: of the same base and data, with room.
        found: a checkpoint that holds the trial.
        trial: freshly made.

    Raises:
        OutputError: when its files are damaged or belong to other settings; the trial is then as it was.
    """
    entry = next(entry for entry in found.manifest["trials"] if entry["name"] == trial.name)
    _restore(engine, trial, entry, _read(found, entry, trial))


def _restore(
    engine: Engine,
    trial: Trial,
    entry: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    slot: int | None = None,
    served: int | None = None,
) -> None:
    """Gives a trial its tensors, a slot and its progress."""
    _fill(trial, tensors)
    slot = engine.admit(trial, slot=slot, served=served)
    sums = {int(place): loss for place, loss in entry["sums"].items()}
    counts = entry["step"], entry["tokens"], entry["loss_scale"], entry["good_steps"]
    trial.restore(Progress(*counts, sums=sums, waiting=tuple(entry["waiting"])), slot)
    if engine.processes.count > 1:  # each would count the gradients of all
        trial.restart_batch()


def take_folder(found: Checkpoint, target: Path) -> None:
    """Puts the folder that `save` kept under the name of `target` there again, in place of what is there.

    Raises:
        OutputError: when it is damaged, or cannot be written.
    """
    names = [name for name in found.manifest["sha256"] if name.startswith(f"{target.name}/")]
    with atomic_folder(target) as place:
        for name in names:
            source = found.folder / name
            if not source.is_file() or file_digest(source) != found.manifest["sha256"][name]:
                raise _damaged(found)
            there = place / Path(name).relative_to(target.name)
            there.parent.mkdir(parents=True, exist_ok=True)
            _link(str(source), str(there))


def find(folder: Path) -> list[Checkpoint]:
    """Returns the whole checkpoints of a run, oldest first (by number: step_900 before step_1000).

    A killed process may leave a whole one that it had not yet renamed, or had renamed away to replace it: that one
    counts where none has its name.
    """
    found: dict[int, Checkpoint] = {}
    for path in (*folder.glob("step_*"), *folder.glob(".step-*")):
        checkpoint = read(path)
        if checkpoint is not None:
            found.setdefault(checkpoint.step, checkpoint)
    return [found[step] for step in sorted(found)]


def read(folder: Path) -> Checkpoint | None:
    """Returns the checkpoint in `folder`, or None where there is no whole one of this version."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["version"] != _VERSION:
            return None
        names = tuple(entry["name"] for entry in manifest["trials"])
        steps = tuple(entry["step"] for entry in manifest["trials"])
        return Checkpoint(folder, manifest["step"], manifest["identity"], names, steps, manifest["decided"], manifest)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest(folder: Path) -> Checkpoint | None:
    """Returns the newest whole checkpoint of a run, or None where there is none."""
    return next(reversed(find(folder)), None)


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints (-1 keeps all), and what killed processes left half-written."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if keep >= 0:
        found = find(folder)
        for old in found[: max(0, len(found) - keep)]:
            shutil.rmtree(old.folder)


def _tensors(trial: Trial, *, gradients: bool) -> dict[str, Tensor]:
    """Returns all tensors that the trial resumes from; `gradients` are those of an unfinished batch."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trial.parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach()
        state = trial.optimizer.state.get(parameter, {}) if trial.optimizer else {}
        tensors |= {f"{kind}/{name}": state[kind] for kind in _STATE if kind in state}
        if gradients and parameter.grad is not None:
            tensors[f"gradient/{name}"] = parameter.grad
    return tensors


def _read(found: Checkpoint, entry: Mapping[str, Any], trial: Trial) -> dict[str, Tensor]:
    """Returns the trial's tensors, checked whole and fitting."""
    broken = _damaged(found)
    path = found.folder / f"slot-{entry['slot']}.safetensors"
    try:
        if file_digest(path) != found.manifest["sha256"][path.name]:
            raise broken
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise broken from error
    for key, parameter in trial.parameters.items():
        saved = tensors.get(f"parameter/{key}")
        if saved is None or saved.shape != parameter.shape:
            raise OutputError(
                f"the checkpoint does not fit at {key}",
                where=str(found.folder),
                remedy="resume with the settings it was made with",
            )
    return tensors


@torch.no_grad()
def _fill(trial: Trial, tensors: Mapping[str, Tensor]) -> None:
    """Copies parameters, optimizer state and the gradients of an unfinished batch into the trial."""
    for name, parameter in trial.parameters.items():
        parameter.copy_(tensors[f"parameter/{name}"])
        gradient = tensors.get(f"gradient/{name}")
        parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
        if trial.optimizer is not None and f"exp_avg/{name}" in tensors:
            # on CUDA the fused kernel keeps its step counter beside the parameters
            homes = dict.fromkeys(_STATE, parameter.device)
            homes["step"] = parameter.device if parameter.is_cuda else torch.device("cpu")
            trial.optimizer.state[parameter] = {
                kind: tensors[f"{kind}/{name}"].to(homes[kind], copy=True) for kind in _STATE
            }


def _damaged(found: Checkpoint) -> OutputError:
    remedy = "resume from an earlier one (delete this folder)"
    return OutputError("the checkpoint is damaged", where=str(found.folder), remedy=remedy)


def _put_beside(folder: Path, target: Path) -> dict[str, str]:
    """Links the files of a folder into a new one; returns their digests by name."""
    shutil.copytree(folder, target, copy_function=_link)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    return {f"{target.name}/{path.relative_to(target).as_posix()}": file_digest(path) for path in files}


def _link(source: str, target: str) -> None:
    """Makes a second name of a file, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
