"""The doctor before anything trains: a study file, the settings of a run, or the words of a command."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peft_study.compat.command_line import parse
from peft_study.compat.finetune import pointed, to_run
from peft_study.config import StudyConfig, TrainConfig, TrialSettings, validate
from peft_study.doctor.diagnosis import Diagnosis
from peft_study.doctor.rule import examine
from peft_study.engine.trial import total_steps
from peft_study.errors import UserError
from peft_study.search.space_check import check_spaces, diagnose_spaces
from peft_study.storage.yaml_file import SettingsFile, load_yaml
from peft_study.training.checkup import BEFORE, measured_start, observe_session
from peft_study.training.cost import TIMED_STEPS, seconds_a_token
from peft_study.training.finetune import resolve
from peft_study.training.fitting import check_methods
from peft_study.training.session import Say, open_session, timed, unheard

_COMMANDS = ("peft-study", "finetune", "run")


def diagnose_file(path: Path, *, say: Say = unheard) -> Diagnosis:
    """Returns what is wrong with a study, or with one run, before it begins; model and data are loaded.

    Args:
        path: a study file, settings of one run (``recommended.yaml``), or arguments of `finetune`, as YAML.
        say: receives each step that takes time.

    Raises:
        UserError: as the study or run itself would.
    """
    file = load_yaml(path)
    if "methods" not in file.values and "method" not in file.values:
        return diagnose_words([str(path)], say=say)
    try:
        return _of_settings(file, say)
    except UserError as error:
        raise file.pointed(error) from None


def diagnose_words(words: Sequence[str], *, say: Say = unheard) -> Diagnosis:
    """Returns what is wrong with the run of a command, before it begins; model and data are loaded.

    Args:
        words: ``peft-study finetune --use_lora ...``, with or without its first words; or ``run STUDY.yaml``.
        say: receives each step that takes time.

    Raises:
        UserError: as the command itself would.
    """
    left = list(words)
    while left and left[0] in _COMMANDS:
        left.pop(0)
    if left and left[0].endswith((".yaml", ".yml")):
        values = load_yaml(Path(left[0])).values
        if "methods" in values or "method" in values:
            return diagnose_file(Path(left[0]), say=say)
    command = parse(left, os.environ)
    try:
        return _of_run(to_run(command).config, say)
    except UserError as error:
        raise pointed(error, command) from None


def _of_settings(file: SettingsFile, say: Say) -> Diagnosis:
    if "methods" in file.values:
        return _of_study(validate(StudyConfig, file.values, where=str(file.path), place=file.place), say)
    return _of_run(validate(TrainConfig, file.values, where=str(file.path), place=file.place), say)


def _of_study(config: StudyConfig, say: Say) -> Diagnosis:
    config = config.filled()
    session = open_session(config.model, config.data, config.training, say, test=True)
    notes = check_spaces(session, config)
    _, found = diagnose_spaces(session, config, starts=True)
    return replace(found, about=f"a study of {', '.join(config.searched)}", notes=(*found.notes, *notes))


def _of_run(config: TrainConfig, say: Say) -> Diagnosis:
    config = resolve(config)
    session = open_session(config.model, config.data, config.training, say)
    check_methods(session, [config.method], config.training.seed)
    settings = TrialSettings(method=config.method, training=config.training)
    seen = replace(observe_session(session, settings), curve=measured_start(session, settings))
    with timed(say, f"timing {TIMED_STEPS} steps"):
        a_token = seconds_a_token(session, settings)
    steps, training = total_steps(config.training, len(session.train)), config.training
    seconds = steps * training.batch_size * float(session.train.lengths().mean()) * a_token
    seen = replace(seen, settings=replace(seen.settings, seconds=seconds))
    return examine(seen, about=f"{config.method.method} on {config.model.name}, before it trains", kinds=BEFORE)
