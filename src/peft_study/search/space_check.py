"""Makes settings of a study's spaces once, so that what cannot be trained is said before anything is written."""

from __future__ import annotations

from peft_study.config import Choices, MethodConfig, MethodSpace, Range, StudyConfig, TrainingConfig, TrialSettings
from peft_study.errors import ConfigError, UserError
from peft_study.methods.registry import is_exclusive
from peft_study.search.lr_range_test import central
from peft_study.training.fitting import check_methods, past_context
from peft_study.training.session import Session


def largest(config: StudyConfig) -> dict[str, TrialSettings]:
    """Returns the largest setting of each method of a filled study: what slots are measured with."""
    found = {}
    for method, space in config.methods.items():
        if space.kind == "none":
            continue
        values = central(space)
        for name, dimension in space.dimensions().items():
            if isinstance(dimension, Range):
                values[name] = int(dimension.high) if space.whole(name) else dimension.high
            elif dimension.sorted_numbers:
                values[name] = dimension.sorted_numbers[-1]
        found[method] = space.at(values, config.training)
    return found


def tried(space: MethodSpace, training: TrainingConfig) -> list[MethodConfig]:
    """Returns the middle setting of a method, and with each choice and the ends of each range of whole numbers."""
    middle = central(space)
    tried = [middle]
    for dimension, choices in space.dimensions().items():
        if isinstance(choices, Choices):
            tried += [{**middle, dimension: choice} for choice in choices.choices]
        elif space.whole(dimension):
            tried += [{**middle, dimension: int(end)} for end in (choices.low, choices.high)]
    return list(dict.fromkeys(space.at(values, training).method for values in tried))


def check_spaces(session: Session, config: StudyConfig) -> list[str]:
    """Makes each method's adapters of the middle setting, of every choice and of the ends of ranges, once.

    Returns a note for each method of which some settings cannot be made: they will be rows that failed. So is all of a
    reference that does not fit, such as full fine-tuning, beside methods that do.

    Raises:
        ConfigError: naming the method of which none fits this base or data, and why.
    """
    notes, fitting, refused = [], list[MethodConfig](), dict[str, UserError]()
    for name, space in config.methods.items():
        failed, settings = [], tried(space, config.training)
        for setting in settings:
            try:
                check_methods(session, [setting], config.training.seed)
                fitting.append(setting)
            except UserError as error:
                failed.append(error)
        if len(failed) == len(settings):
            refused[name] = failed[0]
        elif failed:
            notes.append(f"methods.{name}: some settings of its space cannot be made ({failed[0].what})")
    for name, why in refused.items():
        if not is_exclusive(config.methods[name].kind) or all(setting.method == "none" for setting in fitting):
            raise ConfigError(why.what, where=f"methods.{name}", remedy=why.remedy) from why
        notes.append(f"{name} will be a row that failed: {why}")
    if warning := past_context(session, fitting):
        notes.append(warning)
    return notes
