"""Cache location."""

from __future__ import annotations

import functools
import hashlib
import os
from importlib.metadata import version
from pathlib import Path


def cache_root() -> Path:
    """Returns $PEFT_STUDY_CACHE, else $XDG_CACHE_HOME/peft-study, else ~/.cache/peft-study; it need not exist."""
    own = os.environ.get("PEFT_STUDY_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "peft-study"


@functools.cache
def code_digest(*packages: str) -> str:
    """Returns the sha256 of the source of these packages of ours: edited code never meets what an earlier one kept."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def numbers_digest() -> str:
    """Returns the sha256 of what losses and bytes are computed with: our code, torch's and transformers' versions."""
    parts = code_digest("engine", "methods", "model"), version("torch"), version("transformers")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
