"""PEFT Study: choose and tune parameter-efficient fine-tuning, with evidence.

    from peft_study import LoRA, Study
    result = Study("smollm2-135m-instruct", "train.jsonl", methods=[LoRA(rank=[8, 32]), "prompt_tuning"]).run()
    print(result.findings)

docs/python.md shows the whole of it. Names are loaded when first used, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_study.api import Study, finetune, open_study
    from peft_study.config import Choices, LoRA, PrefixTuning, PromptTuning, Range
    from peft_study.data.chat import ChatEncoder
    from peft_study.data.convert import convert
    from peft_study.data.sample import sample
    from peft_study.data.tokens import TokenizedData, tokenize
    from peft_study.doctor.callback import DoctorCallback
    from peft_study.doctor.diagnosis import Diagnosis, Problem
    from peft_study.engine.engine import Engine
    from peft_study.engine.trial import Trial
    from peft_study.errors import Interrupted, PeftStudyError, UserError
    from peft_study.methods.peft_format import load_adapter
    from peft_study.methods.registry import create
    from peft_study.model.load import Base, load_base
    from peft_study.report.study_result import StudyResult, TrainedAdapter
    from peft_study.statistics import Estimate
    from peft_study.study.callbacks import Callback, LiveTrial
    from peft_study.study.diagnose import diagnose

_HOMES = {
    # a study
    "peft_study.api": ("Study", "finetune", "open_study"),
    "peft_study.config": ("Choices", "LoRA", "PrefixTuning", "PromptTuning", "Range"),
    "peft_study.report.study_result": ("StudyResult", "TrainedAdapter"),
    "peft_study.statistics": ("Estimate",),
    "peft_study.study.callbacks": ("Callback", "LiveTrial"),
    "peft_study.errors": ("Interrupted", "PeftStudyError", "UserError"),
    # what is wrong with a run
    "peft_study.study.diagnose": ("diagnose",),
    "peft_study.doctor.callback": ("DoctorCallback",),
    "peft_study.doctor.diagnosis": ("Diagnosis", "Problem"),
    # data
    "peft_study.data.convert": ("convert",),
    "peft_study.data.sample": ("sample",),
    # the engine alone, for a loop of one's own (examples/flat_loop.py shows what it computes)
    "peft_study.data.chat": ("ChatEncoder",),
    "peft_study.data.tokens": ("TokenizedData", "tokenize"),
    "peft_study.engine.engine": ("Engine",),
    "peft_study.engine.trial": ("Trial",),
    "peft_study.methods.peft_format": ("load_adapter",),
    "peft_study.methods.registry": ("create",),
    "peft_study.model.load": ("Base", "load_base"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Base",
    "Callback",
    "ChatEncoder",
    "Choices",
    "Diagnosis",
    "DoctorCallback",
    "Engine",
    "Estimate",
    "Interrupted",
    "LiveTrial",
    "LoRA",
    "PeftStudyError",
    "PrefixTuning",
    "Problem",
    "PromptTuning",
    "Range",
    "Study",
    "StudyResult",
    "TokenizedData",
    "TrainedAdapter",
    "Trial",
    "UserError",
    "convert",
    "create",
    "diagnose",
    "finetune",
    "load_adapter",
    "load_base",
    "open_study",
    "sample",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'peft_study' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
