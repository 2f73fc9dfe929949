"""Estimates a study's trials, tokens, memory and time from a few measured steps. Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft_study.config import MethodConfig, StudyConfig, TrialSettings
from peft_study.errors import UserError
from peft_study.evaluation.evaluate import check_tasks
from peft_study.model.in_memory import ModelInMemory
from peft_study.search import lr_range_test
from peft_study.search.budget import steps_of
from peft_study.search.pruners import rungs
from peft_study.search.space_check import check_spaces, diagnose_spaces, largest, tried
from peft_study.search.trials import StudyState
from peft_study.training.checkup import lines
from peft_study.training.cost import TIMED_STEPS, seconds_a_token
from peft_study.training.fit import Fit, expected_memory
from peft_study.training.fitting import check_methods
from peft_study.training.session import Say, Session, open_session, timed


@dataclass(frozen=True, slots=True)
class MethodEstimate:
    """The cost of one method.

    Attributes:
        method: its name in the study.
        trials, steps: of its search, and optimizer steps of each.
        range_rates, range_steps: of its range test, and optimizer steps of each.
        tokens: data tokens of range test, search and finals if nothing is stopped early.
        expected_tokens: if pruning stops what its rule may stop at most.
        seconds: of all these tokens, alone in the engine.
        expected_seconds: the same for the expected tokens.
        step_seconds: of an optimizer step alone in the engine, as measured.
        slot_bytes: memory of its largest trial beside the base.
    """

    method: str
    trials: int
    steps: int
    range_rates: int
    range_steps: int
    tokens: int
    expected_tokens: int
    seconds: float
    expected_seconds: float
    step_seconds: float
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class StudyEstimate:
    """The cost of all methods.

    Attributes:
        methods: each of them.
        free_bytes: memory that is free beside the base; None: not known.
        train_rows, dev_rows, test_rows: of the data, and
        batch_size: how many of them a step takes.
        notes: lines the user should see.
        memory: expected before anything is loaded; None where it could not be.
    """

    methods: tuple[MethodEstimate, ...]
    free_bytes: int | None
    train_rows: int
    dev_rows: int
    test_rows: int
    batch_size: int
    notes: tuple[str, ...]
    memory: Fit | None = None


def estimate(config: StudyConfig, say: Say, *, in_memory: ModelInMemory | None = None) -> StudyEstimate:
    """Returns an estimate of a study; model and data are loaded, a few steps of each method are run.

    Args:
        config: as the user wrote it.
        say: receives each step that takes time.
        in_memory: a base in memory, instead of the one that the configuration names.

    Raises:
        UserError: as the study itself would.
    """
    config = config.filled()
    check_tasks(config)
    memory = None if in_memory is not None else study_memory(config, both=True)
    if memory is not None:
        memory.tell(say)
    session = open_session(config.model, config.data, config.training, say, test=True, in_memory=in_memory)
    for note in check_spaces(session, config):
        say(note)
    assert session.test is not None
    session.engine.slots = 1
    largest_settings = largest(config)
    found = []
    for name, space in config.methods.items():
        setting = _timed(session, tried(space, config.training), config.training.seed)
        if space.kind != "none" and setting is not None:
            session.room.cut_rows([setting])
            slot = session.room.slot(largest_settings[name].method)
            found.append(_method(config, session, name, setting, slot, say))
    counts = len(session.train), len(session.held_out), len(session.test)
    _, diagnosis = diagnose_spaces(session, config)
    notes = [*session.notes, *lines(diagnosis), *filter(None, [StudyState().unequal(config)])]
    return StudyEstimate(tuple(found), session.room.free, *counts, config.training.batch_size, tuple(notes), memory)


def study_memory(config: StudyConfig, *, both: bool = False) -> Fit | None:
    """Returns the memory that a study is expected to take; nothing is loaded.

    Args:
        config: of the study.
        both: with and without layers computed again in the backward pass.
    """
    methods = {name: settings.method for name, settings in largest(config.filled()).items()}
    return expected_memory(
        config.model, config.training, methods, config.data.max_length, both=both, sharing=config.workers
    )


def _timed(session: Session, settings: Sequence[MethodConfig], seed: int) -> MethodConfig | None:
    """Returns the first setting, the middle one if possible, that can be trained."""
    for setting in settings:
        try:
            check_methods(session, [setting], seed)
        except UserError:  # `check_spaces` has told the user
            continue
        return setting
    return None


def _method(
    config: StudyConfig, session: Session, name: str, setting: MethodConfig, slot: int, say: Say
) -> MethodEstimate:
    space = config.methods[name]
    training = space.at(lr_range_test.central(space), config.training).training
    lengths_N = session.train.lengths()
    steps = steps_of(training, config.budget.tokens, lengths_N)
    with timed(say, f"timing {TIMED_STEPS} steps of {name}"):
        a_token = seconds_a_token(session, TrialSettings(method=setting, training=training))
    tokens_a_trial = round(steps * training.batch_size * float(lengths_N.mean()))
    trials, finals = config.trials(name), config.finals.best * config.finals.seeds
    finals = min(finals, trials * config.finals.seeds)
    rates, tested = len(lr_range_test.planned(config, steps).get(name, ())), config.search.range_steps
    tests = rates * tested / steps
    most = round((tests + trials + finals) * tokens_a_trial)
    least = round((tests + trials * _least_share(config, steps) + finals) * tokens_a_trial)
    seconds = most * a_token, least * a_token
    step = a_token * training.batch_size * float(lengths_N.mean())
    return MethodEstimate(name, trials, steps, rates, tested, most, least, *seconds, step, slot)


def _least_share(config: StudyConfig, steps: int) -> float:
    """Returns the share of the search's steps that is left where every rung keeps no more than its rule must."""
    if config.search.pruner not in ("successive_halving", "probability"):
        return 1.0
    least = 1 / config.search.reduction if config.search.pruner == "successive_halving" else 0.0
    share, kept, before = 0.0, 1.0, 0
    for rung in (*rungs(steps, config.search.reduction, 0), steps):
        share += kept * (rung - before) / steps
        kept, before = kept * least, rung
    return share
