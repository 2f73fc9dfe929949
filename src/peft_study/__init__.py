"""PEFT Study: choose and tune parameter-efficient fine-tuning, with evidence.

    from peft_study import StudyConfig, run_study, validate

Names are loaded when first used, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_study.config import StudyConfig, TrainConfig, validate
    from peft_study.data.chat import ChatEncoder
    from peft_study.data.convert import convert
    from peft_study.data.sample import sample
    from peft_study.data.tokens import TokenizedData, tokenize
    from peft_study.engine.engine import Engine
    from peft_study.engine.trial import Trial
    from peft_study.errors import PeftStudyError, UserError
    from peft_study.methods.peft_format import load_adapter
    from peft_study.methods.registry import create
    from peft_study.model.load import Base, load_base
    from peft_study.study.run import run_study
    from peft_study.training.finetune import train

_HOMES = {
    "peft_study.config": ("StudyConfig", "TrainConfig", "validate"),
    "peft_study.data.tokens": ("TokenizedData", "tokenize"),
    "peft_study.data.chat": ("ChatEncoder",),
    "peft_study.data.convert": ("convert",),
    "peft_study.data.sample": ("sample",),
    "peft_study.engine.engine": ("Engine",),
    "peft_study.engine.trial": ("Trial",),
    "peft_study.errors": ("PeftStudyError", "UserError"),
    "peft_study.methods.peft_format": ("load_adapter",),
    "peft_study.methods.registry": ("create",),
    "peft_study.model.load": ("Base", "load_base"),
    "peft_study.study.run": ("run_study",),
    "peft_study.training.finetune": ("train",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Base",
    "ChatEncoder",
    "Engine",
    "PeftStudyError",
    "StudyConfig",
    "TokenizedData",
    "TrainConfig",
    "Trial",
    "UserError",
    "convert",
    "create",
    "load_adapter",
    "load_base",
    "run_study",
    "sample",
    "tokenize",
    "train",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'peft_study' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
