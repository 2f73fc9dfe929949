"""Cache location."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Returns $PEFT_STUDY_CACHE, else $XDG_CACHE_HOME/peft-study, else ~/.cache/peft-study; it need not exist."""
    own = os.environ.get("PEFT_STUDY_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "peft-study"
