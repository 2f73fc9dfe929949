"""Adapters on disk, in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``, and nothing untrained.

``peft_study.json`` beside them names the base the adapter was trained on, and its quantisation; PEFT ignores it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from peft_study.errors import ModelError, OutputError
from peft_study.model.load import Base
from peft_study.storage.files import follow_umask

WEIGHTS, CONFIG, ORIGIN = "adapter_model.safetensors", "adapter_config.json", "peft_study.json"
TEMPLATE = "chat_template.jinja"
"""The chat template, as transformers names it."""


def write(folder: Path, base: Base, kind: str, tensors: Mapping[str, Tensor], **settings: Any) -> None:
    """Writes an adapter's two PEFT files and the note on its base.

    Args:
        folder: created where missing.
        base: the model the adapter belongs to.
        kind: name of the `peft` configuration, and
        settings: its values beside those that every adapter has.
        tensors: PEFT's names and values; stored as float32.

    Raises:
        OutputError: when the folder cannot be written.
    """
    import peft

    shared = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base.path, "inference_mode": True}
    config = getattr(peft, kind)(**shared, **settings)
    cpu = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        save_file(cpu, folder / WEIGHTS, metadata={"format": "pt"})
        follow_umask(folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        what = f"the adapter could not be written ({error})"
        raise OutputError(what, where=str(folder), remedy="free some space") from error
    note = {
        "base": base.path,
        "base_name": base.name,
        "base_revision": base.revision,
        "base_tokenizer": base.tokenizer_name,
        "base_digest": base.digest,
        "base_origin": base.origin,
        "base_quantization": base.quantization,
    }
    (folder / ORIGIN).write_text(json.dumps(note, indent=2) + "\n")


def note_encoding(folder: Path, template: str, *, add_bos: bool) -> None:
    """Keeps the chat template and `add_bos` of the training beside an adapter, if there is one."""
    if folder.is_dir():
        (folder / TEMPLATE).write_text(template)
        note = {**read_note(folder), "add_bos": add_bos}
        (folder / ORIGIN).write_text(json.dumps(note, indent=2) + "\n")


def read_note(folder: Path) -> dict[str, Any]:
    """Returns the note that this program kept beside an adapter or a model: empty where another program wrote it.

    Raises:
        ModelError: when the file is damaged.
    """
    path = folder / ORIGIN
    return _read_object(path) if path.exists() else {}


def encoding(folder: Path) -> dict[str, Any]:
    """Returns the chat encoder's arguments that an adapter was trained with, as far as they were kept."""
    template = folder / TEMPLATE
    return {
        "add_bos": bool(read_note(folder).get("add_bos", False)),
        "template": str(template) if template.exists() else None,
    }


def read_config(folder: Path) -> dict[str, Any]:
    """Returns an adapter's configuration.

    Raises:
        ModelError: when the folder holds no adapter.
    """
    path = folder / CONFIG
    if not path.exists():
        raise ModelError(f"holds no {CONFIG}", where=str(folder), remedy="give the adapter folder of a finished run")
    return _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        what = f"{path.name} is not valid JSON"
        raise ModelError(what, where=str(path.parent), remedy="export the adapter again") from error
    return values


def base_mismatch(folder: Path, digest: str) -> str | None:
    """Returns a warning when the adapter was trained on a base of other weights, else None."""
    note = read_note(folder)
    if note.get("base_digest", "unknown") in (digest, "unknown") or digest == "unknown":
        return None
    return (
        f"{folder}: trained on {note['base']} (weights {note['base_digest'][:12]}), "
        f"but this base's weights are {digest[:12]}: expect other answers"
    )
