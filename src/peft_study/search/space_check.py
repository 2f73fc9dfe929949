"""Makes settings of a study's spaces once, so that what cannot be trained is said before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from peft_study.config import Choices, MethodConfig, MethodSpace, Range, StudyConfig, TrainingConfig, TrialSettings
from peft_study.doctor.diagnosis import Diagnosis, Problem, Said
from peft_study.doctor.observations import DataCounts, Observations
from peft_study.doctor.rule import examine, together
from peft_study.errors import ConfigError, UserError
from peft_study.methods.registry import is_exclusive
from peft_study.search.budget import steps_of
from peft_study.search.lr_range_test import central
from peft_study.training.checkup import BEFORE, count_data, measured_start, observe_session
from peft_study.training.fitting import check_methods, refuse_unfit
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
    return notes


def diagnose_spaces(session: Session, config: StudyConfig, *, starts: bool = False) -> tuple[Observations, Diagnosis]:
    """Returns what the doctor sees of a study before it begins, and what it says of each method's whole space.

    Args:
        session: with model and data.
        config: filled.
        starts: measure the loss before step 1 of each method's middle setting, too.
    """
    data = count_data(session)
    found = {name: _diagnose_space(session, config, name, data, starts) for name in config.methods}
    about = together({name: each for name, each in found.items() if each is not None}, about="")
    return Observations(stage="before", data=data), about


def _diagnose_space(
    session: Session, config: StudyConfig, name: str, data: DataCounts, starts: bool
) -> Diagnosis | None:
    """Returns what is wrong with a method's middle setting, and with the ends of its dimensions."""
    space, middle = config.methods[name], central(config.methods[name])
    if space.kind == "none":
        return None
    lengths_N = session.train.lengths()

    def seen_at(values: dict[str, Any]) -> Observations:
        settings = space.at(values, config.training)
        steps = steps_of(settings.training, config.budget.tokens, lengths_N)
        return observe_session(session, settings, data, steps=steps)

    try:
        refuse_unfit(session, space.at(middle, config.training).method)
        seen = seen_at(middle)
        if starts:
            seen = replace(seen, curve=measured_start(session, space.at(middle, config.training)))
        whole = examine(seen, kinds=BEFORE)
        told = {problem.check for problem in whole.problems}
        problems = list(whole.problems)
        for dimension, end in _ends(space):
            for problem in examine(seen_at({**middle, dimension: end}), checks=_OF_AN_END).problems:
                if problem.check not in told and problem.level != "note":
                    told.add(problem.check)
                    problems.append(_of_a_range(problem, f"methods.{name}.{dimension}", end))
    except UserError:  # `check_spaces` tells it
        return None
    return replace(whole, problems=tuple(problems))


_OF_AN_END = ("rate_too_high", "rate_too_low", "warmup_unusual", "tokens_unusual", "rank_unusual", "past_positions")


def _ends(space: MethodSpace) -> Iterator[tuple[str, Any]]:
    """Yields the ends of each dimension, by name."""
    for name, dimension in space.dimensions().items():
        if isinstance(dimension, Range):
            for end in (dimension.low, dimension.high):
                yield name, int(end) if space.whole(name) else end
        else:
            for choice in dimension.choices:
                yield name, choice


def _of_a_range(problem: Problem, name: str, end: Any) -> Problem:
    """Returns a problem of the end of a range: trials there are lost, the study is not."""
    shown = f"{end:g}" if isinstance(end, float) else str(end)
    return replace(
        problem,
        level="warning",
        evidence=Said(f"{name} reaches {shown}: {problem.evidence.en}", f"{name} 达到 {shown}：{problem.evidence.zh}"),
        change=Said(f"end the range of {name} before it", f"缩小 {name} 的范围"),
        paste=None,
    )
