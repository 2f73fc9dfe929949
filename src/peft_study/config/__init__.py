"""Everything a user may say, as validated models; each field has its unit or meaning.

    StudyConfig  (peft-study run)       one model, one data set, a search space for each of several methods
    TrainConfig  (peft-study finetune)  one model, one data set, one setting of one method
        ├── ModelConfig      which base model, where and in which precision
        ├── DataConfig       which rows, how they become tokens, which are held out
        ├── MethodConfig     LoraConfig | PrefixTuningConfig | PromptTuningConfig | NoneConfig | FullConfig
        └── TrainingConfig   optimizer, schedule, batch

Learning-rate defaults and ranges belong to the methods, because they differ by orders of magnitude: a soft prompt
learns nothing at a rate that is right for LoRA (docs/findings.md).
"""

from peft_study.config.common import Location, Place, SettingError, Strict, validate
from peft_study.config.evaluation import EvaluationConfig
from peft_study.config.methods import (
    METHODS,
    FullConfig,
    LearningRates,
    LoraConfig,
    MethodConfig,
    NoneConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    default_rate,
)
from peft_study.config.run import (
    TRAINING_DIMENSIONS,
    DataConfig,
    Device,
    Dtype,
    LoggingConfig,
    ModelConfig,
    Schedule,
    SourceConfig,
    Tracker,
    TrainConfig,
    TrainingConfig,
    TrialSettings,
)
from peft_study.config.space import (
    DEFAULT_SPACES,
    SPACES,
    Choices,
    Dimension,
    LoRA,
    MethodSpace,
    PrefixTuning,
    PromptTuning,
    Range,
)
from peft_study.config.study import (
    BudgetConfig,
    FinalsConfig,
    Pruner,
    Sampler,
    SearchConfig,
    StudyConfig,
    cells,
    grid_size,
)

__all__ = [
    "DEFAULT_SPACES",
    "METHODS",
    "SPACES",
    "TRAINING_DIMENSIONS",
    "BudgetConfig",
    "Choices",
    "DataConfig",
    "Device",
    "Dimension",
    "Dtype",
    "EvaluationConfig",
    "FinalsConfig",
    "FullConfig",
    "LearningRates",
    "LoRA",
    "Location",
    "LoggingConfig",
    "LoraConfig",
    "MethodConfig",
    "MethodSpace",
    "ModelConfig",
    "NoneConfig",
    "Place",
    "PrefixTuning",
    "PrefixTuningConfig",
    "PromptTuning",
    "PromptTuningConfig",
    "Pruner",
    "Range",
    "Sampler",
    "Schedule",
    "SearchConfig",
    "SettingError",
    "SourceConfig",
    "Strict",
    "StudyConfig",
    "Tracker",
    "TrainConfig",
    "TrainingConfig",
    "TrialSettings",
    "cells",
    "default_rate",
    "grid_size",
    "validate",
]
