"""Adapters on disk, in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``, and nothing untrained.

``peft_study.json`` beside them says which base the adapter was trained on, by which names it is found again, and
whether it was quantised; PEFT ignores it.
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
"""Where transformers, too, looks for a tokenizer's chat template."""


def write(folder: Path, config: Any, tensors: Mapping[str, Tensor], base: Base) -> None:
    """Writes an adapter's two PEFT files and the note on its base.

    Args:
        folder: created where missing.
        config: the `peft` configuration.
        tensors: PEFT's names and values; stored as float32.
        base: the model the adapter belongs to.

    Raises:
        OutputError: when the folder cannot be written.
    """
    cpu = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        save_file(cpu, folder / WEIGHTS, metadata={"format": "pt"})
        follow_umask(folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise OutputError(
            f"the adapter could not be written ({error})", where=str(folder), remedy="free some space"
        ) from error
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
    """Keeps with an adapter how its training text was written, so that it is used with the same; none: no folder."""
    if folder.is_dir():
        (folder / TEMPLATE).write_text(template)
        note = {**read_note(folder), "add_bos": add_bos}
        (folder / ORIGIN).write_text(json.dumps(note, indent=2) + "\n")


def read_note(folder: Path) -> dict[str, Any]:
    """Returns what this program kept beside an adapter or a model: empty where somebody else wrote it.

    Raises:
        ModelError: when the file is damaged.
    """
    path = folder / ORIGIN
    if not path.exists():
        return {}
    return _read_object(path)


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
        remedy = "export the adapter again"
        raise ModelError(f"{path.name} is not valid JSON", where=str(path.parent), remedy=remedy) from error
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
