"""Trains a trial of a study again, alone in the engine, and compares its losses with those of the study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft_study.errors import ConfigError, Interrupted
from peft_study.report.study_reader import StudyRecord
from peft_study.search.trials import TrialRecord
from peft_study.statistics import Estimate, Losses, mean_loss
from peft_study.storage.environment import environment
from peft_study.storage.run_dir import RunFolder
from peft_study.storage.study_dir import run_settings
from peft_study.training.interrupt import StopRequest
from peft_study.training.loop import Commands, Ended, Evaluated, Slots
from peft_study.training.session import Session, describe, open_session, refuse_other_inputs
from peft_study.training.slot_count import settle
from peft_study.training.trial_run import Outcome, TrialPlan, Watcher

EXACT_STEPS = 20
"""Steps for which a float32 run repeats to `EXACT`, whatever its row holds; after them rounding has grown (AdamW)."""
EXACT = 1e-5
"""Of the loss."""
COARSE = 1e-2
"""Of the loss: the largest difference that is allowed where rounding has grown, and in bf16."""
NOISE_SHARE = 0.1
"""Share of the dev loss's own uncertainty (half its interval) that is allowed there: no finding depends on it."""


@dataclass(frozen=True, slots=True)
class Rerun:
    """A trial that was trained again, beside its first run.

    Attributes:
        folder: of the new run.
        name: of the trial.
        before, now: how it ended: status and reason.
        curve: optimizer step, dev loss then, dev loss now, in nats a token.
        tolerance: how far apart the last two may be; None where no loss is compared.
        same: both ended alike, and the last dev losses are within the tolerance.
        notes: what differs in code, versions and machine.
    """

    folder: Path
    name: str
    before: tuple[str, str | None]
    now: tuple[str, str | None]
    curve: tuple[tuple[int, float, float], ...]
    tolerance: float | None
    same: bool
    notes: tuple[str, ...]


def rerun(study: StudyRecord, trial: TrialRecord, watcher: Watcher, stop: StopRequest) -> Rerun:
    """Trains a trial again into STUDY/reruns/NAME, with the study's data, row budget and threads.

    A pruned trial is trained up to where it was stopped.

    Raises:
        ConfigError: when there is nothing to train again.
        OutputError: when the base or the data changed since the study began, or the folder cannot be written.
        Interrupted: when asked to stop.
    """
    if trial.kind == "reference":
        raise ConfigError(f"{trial.name} is the untouched base: nothing was trained", remedy="give another trial")
    if trial.status in ("running", "interrupted"):
        raise ConfigError(f"{trial.name} has not ended", remedy="`peft-study status` says how the study continues")
    # locked before model and data are loaded, so that a study folder that cannot be written is refused first
    folder = _new_folder(study, trial)
    with folder.locked():
        session = open_session(study.config.model, study.config.data, study.config.training, watcher.say, test=True)
        refuse_other_inputs(describe(session), study.folder.run)
        record = {**environment(), **describe(session)}
        notes = changes(study.folder.run.record() or {}, record)
        for note in (*session.notes, *notes):
            watcher.say(note)
        settle(session, study.folder.run, [], trials=1, wanted="auto")
        resolved = run_settings(study.config, trial.settings, folder.path)
        folder.claim(resolved, resolved, overwrite=False, remedy="")
        try:
            folder.write_record(record)
            sums, outcome = _train(study, trial, session, folder, watcher, stop)
        except BaseException as error:
            folder.end(error)
            raise
        folder.set_status(outcome.status, outcome.reason)
        curve, allowed, same = _judged(study, trial, sums, outcome, session.base.placement.dtype_name)
        before, now = (trial.status, trial.reason), (outcome.status, outcome.reason)
        found = Rerun(folder.path, trial.name, before, now, curve, allowed, same, notes)
        folder.write("rerun.json", asdict(found))
    return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns what differs in code, versions and machine, a line each."""
    packages = before.get("packages", {})
    pairs = [(name, packages.get(name), version) for name, version in now["packages"].items()]
    pairs.append(("python", before.get("python"), now["python"]))
    for part, names in (("machine", ("processor", "gpu", "threads")), ("base", ("dtype", "device"))):
        pairs += [(name, before.get(part, {}).get(name), now[part][name]) for name in names]
    found = [f"{name} was {old}, is {new}" for name, old, new in pairs if old != new]
    codes = [(state or {}).get("commit") for state in (before.get("code"), now["code"])]
    if codes[0] != codes[1]:
        found.append(f"the code was at {_short(codes[0])}, is at {_short(codes[1])}")
    elif any((state or {}).get("changed") for state in (before.get("code"), now["code"])):
        found.append("the code has changes that are in no commit, so it may differ")
    return tuple(found)


def tolerance(dev: Estimate, *, steps: int, exact: bool) -> float:
    """Returns how far apart two dev losses of the same trial may be, in nats a token.

    Rounding depends on the other trials in a row. In float32 it is `EXACT` of the loss for the first `EXACT_STEPS`
    steps. AdamW divides small gradients by their own size, so rounding grows: after that, and in bf16, runs are the
    same where they differ by at most `NOISE_SHARE` of the uncertainty that the dev loss has anyway, and by at most
    `COARSE` of the loss.

    Args:
        dev: loss of the trial in the study.
        steps: that were taken.
        exact: the base is float32.
    """
    fine = EXACT * abs(dev.value)
    if exact and steps <= EXACT_STEPS:
        return fine
    coarse = COARSE * abs(dev.value)
    return max(fine, min(coarse, NOISE_SHARE * (dev.high - dev.low) / 2))


def _new_folder(study: StudyRecord, trial: TrialRecord) -> RunFolder:
    """Returns reruns/NAME, or NAME-2, ...: the first that does not exist yet."""
    reruns, number = study.folder.path / "reruns", 1
    while (path := reruns / (trial.name if number == 1 else f"{trial.name}-{number}")).exists():
        number += 1
    return RunFolder(path)


def _train(
    study: StudyRecord, trial: TrialRecord, session: Session, folder: RunFolder, watcher: Watcher, stop: StopRequest
) -> tuple[dict[int, Losses], Outcome]:
    settings = trial.settings.model_copy(update={"rungs": tuple(trial.sums)})
    plan = TrialPlan(trial.name, settings, folder)
    # no checkpoints: a rerun that is stopped cannot be resumed
    logging = study.config.logging.model_copy(update={"checkpoint_every": None, "checkpoint_minutes": None})
    slots = Slots(session, logging, watcher, checkpoints=folder.checkpoints, identity="rerun", tolerant=True)
    sums: dict[int, Losses] = {}
    commands = Commands(enter=[plan])
    last = max(trial.sums, default=0)
    stop.heeded = True
    try:
        while True:
            events, commands = slots.advance(commands), Commands()
            for message in events:
                if isinstance(message, Ended):
                    return sums, message.outcome
                assert isinstance(message, Evaluated)
                sums[message.step] = message.sums_N
                if trial.status == "pruned" and message.step == last:
                    commands = Commands(leave={trial.name: f"as in the study, {trial.reason}"})
            if stop.asked:
                raise Interrupted(f"{slots.where()}; nothing is kept of a rerun that was stopped")
    finally:
        slots.close()


def _judged(
    study: StudyRecord, trial: TrialRecord, sums: Mapping[int, Losses], outcome: Outcome, dtype: str
) -> tuple[tuple[tuple[int, float, float], ...], float | None, bool]:
    """Returns `curve`, `tolerance` and `same` of a `Rerun`."""
    assert study.examples is not None
    counts_N = study.examples.counts_N
    total = counts_N.sum()
    curve = tuple(
        (step, float(then_N.sum() / total), float(sums[step].sum() / total))
        for step, then_N in sorted(trial.sums.items())
        if step in sums
    )
    alike = outcome.status == trial.status
    allowed = None
    if alike and trial.status in ("finished", "pruned"):
        last = max(trial.sums)
        allowed = tolerance(mean_loss(trial.sums[last], counts_N), steps=last, exact=dtype == "float32")
        step, then, now = curve[-1]
        alike = step == last and abs(now - then) <= allowed
    return curve, allowed, alike


def _short(commit: str | None) -> str:
    return "an unknown commit" if commit is None else commit[:12]
