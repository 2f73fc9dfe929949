"""Checkpoints of one trial between two optimizer steps: safetensors and JSON only, whole or not there at all.

    step_120/
        tensors.safetensors   parameter/NAME, exp_avg/NAME, exp_avg_sq/NAME, step/NAME
        checkpoint.json       step, tokens, loss scale, identity of the run, sha256 of the tensors; written last

Data order, schedule and dropout are functions of the step, so nothing else has to be kept.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_study.engine.trial import Trial
from peft_study.errors import OutputError
from peft_study.model.digest import file_digest

_TENSORS, _MANIFEST = "tensors.safetensors", "checkpoint.json"
_STATE = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint on disk."""

    folder: Path
    step: int
    identity: str


def save(trial: Trial, folder: Path, identity: str) -> Path:
    """Writes ``step_N`` into `folder` and returns its path.

    Args:
        trial: between two optimizer steps.
        folder: of the run's checkpoints.
        identity: of the run's settings; a resume under others is refused.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trial.parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach()
        state = trial.optimizer.state.get(parameter, {}) if trial.optimizer else {}
        tensors |= {f"{kind}/{name}": state[kind] for kind in _STATE if kind in state}
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step_{trial.step}"
    temporary = Path(tempfile.mkdtemp(prefix=".step-", dir=folder))
    try:
        path = temporary / _TENSORS
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
        _sync(path)
        manifest = {
            "step": trial.step,
            "tokens": trial.tokens,
            "loss_scale": trial.loss_scale,
            "good_steps": trial.good_steps,
            "identity": identity,
            "sha256": file_digest(path),
        }
        (temporary / _MANIFEST).write_text(json.dumps(manifest))
        _sync(temporary / _MANIFEST)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise OutputError(
            f"the checkpoint could not be written ({error})", where=str(target), remedy="free some space"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def load(trial: Trial, found: Found) -> None:
    """Puts the trial where it was when the checkpoint was written.

    Raises:
        OutputError: when the files are damaged or belong to another method.
    """
    manifest = json.loads((found.folder / _MANIFEST).read_text())
    path = found.folder / _TENSORS
    broken = OutputError("the checkpoint is damaged", where=str(found.folder), remedy="resume from an earlier one")
    try:
        if file_digest(path) != manifest["sha256"]:
            raise broken
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise broken from error
    with torch.no_grad():
        for name, parameter in trial.parameters.items():
            saved = tensors.get(f"parameter/{name}")
            if saved is None or saved.shape != parameter.shape:
                raise OutputError(
                    f"the checkpoint does not fit at {name}",
                    where=str(found.folder),
                    remedy="resume with the settings it was made with",
                )
            parameter.copy_(saved)
            if trial.optimizer is not None and f"exp_avg/{name}" in tensors:
                trial.optimizer.state[parameter] = {
                    kind: tensors[f"{kind}/{name}"].to("cpu" if kind == "step" else parameter.device) for kind in _STATE
                }
                if parameter.is_cuda:  # the fused kernel keeps its step counter beside the parameters
                    state = trial.optimizer.state[parameter]
                    state["step"] = state["step"].to(parameter.device)
    trial.restore(
        manifest["step"], manifest["loss_scale"], tokens=manifest["tokens"], good_steps=manifest["good_steps"]
    )


def find(folder: Path) -> list[Found]:
    """Returns the whole checkpoints of a run, oldest first (by number: step_900 before step_1000)."""
    found = []
    for path in folder.glob("step_*"):
        checkpoint = read(path)
        if checkpoint is not None:
            found.append(checkpoint)
    return sorted(found, key=lambda item: item.step)


def read(folder: Path) -> Found | None:
    """Returns the checkpoint in `folder`, or None where there is no whole one."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return Found(folder, manifest["step"], manifest["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest(folder: Path) -> Found | None:
    """Returns the newest whole checkpoint of a run, or None where there is none."""
    return next(iter(reversed(find(folder))), None)


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints; -1 keeps all."""
    if keep >= 0:
        found = find(folder)
        for old in found[: max(0, len(found) - keep)]:
            shutil.rmtree(old.folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
