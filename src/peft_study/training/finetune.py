"""One run of one method, as `peft-study finetune` does it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_study.config import TrainConfig, TrialSettings, default_rate
from peft_study.engine import checkpoint
from peft_study.engine.processes import ALONE, ProcessGroup
from peft_study.engine.trial import total_steps
from peft_study.errors import Interrupted, OutputError
from peft_study.model.in_memory import ModelInMemory
from peft_study.statistics import Estimate, difference, mean_loss
from peft_study.storage.environment import environment
from peft_study.storage.run_dir import RunFolder, identity
from peft_study.training.checkup import CheckedWatcher, Checkup
from peft_study.training.fit import expected_memory
from peft_study.training.fitting import check_methods
from peft_study.training.interrupt import StopRequest
from peft_study.training.loop import Commands, Ended, Slots
from peft_study.training.session import Session, bos_losses, describe, measure_base, open_session, refuse_other_inputs
from peft_study.training.slot_count import settle
from peft_study.training.trackers import TrackedWatcher, Trackers
from peft_study.training.trial_run import Outcome, TrialPlan, Watcher


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a run.

    Attributes:
        folder: of the run.
        before: held-out loss before step 1.
        after: held-out loss of the adapter: after the last step, or after the best one with early stopping; None where
            the run diverged.
        minus_base: `after` minus the untouched base's loss, paired by example; None where the run diverged.
        examples, sources: held out, and how many sources they come from.
        diverged: the reason, where it ended early.
        config: of the run, with its learning rate.
        steps: optimizer steps taken, of `planned`.
        best_step: whose adapter early stopping kept; None without it. Where the run diverged, it lies in RUN/best.
        resumed_at: the step at which this process took it up; 0 where it began it.
        seconds: of this process, from loading to the end.
    """

    folder: Path
    before: Estimate
    after: Estimate | None
    minus_base: Estimate | None
    examples: int
    sources: int | None
    diverged: str | None
    config: TrainConfig
    steps: int
    planned: int
    best_step: int | None
    resumed_at: int
    seconds: float

    @property
    def worse(self) -> str | None:
        """A line on a run whose whole interval lies above the untouched base; None for any other run."""
        if self.minus_base is None or not self.minus_base.low > 0:
            return None
        why = "training made the model worse; lower --learning_rate"
        if self._improved:
            why = "it began higher still; start from a text (--prefix_init text, --prompt_init text), or train longer"
        return f"ended {self.minus_base.value:.3g} nats a token above the untouched base: {why}"

    @property
    def harmed(self) -> bool:
        """True where the training itself made the model worse than the untouched base."""
        return self.worse is not None and not self._improved

    @property
    def _improved(self) -> bool:
        return self.after is not None and self.after.value < self.before.value


def resolve(config: TrainConfig) -> TrainConfig:
    """Returns the settings with the method's own learning rate where none was given."""
    rate = config.training.learning_rate or default_rate(config.method)
    return config.model_copy(update={"training": config.training.model_copy(update={"learning_rate": rate})})


def train(
    config: TrainConfig,
    given: Any,
    watcher: Watcher,
    stop: StopRequest,
    *,
    overwrite: bool = False,
    resume_from: Path | None = None,
    processes: ProcessGroup = ALONE,
    in_memory: ModelInMemory | None = None,
) -> Finished:
    """Runs one setting from data to adapter.

    Args:
        config: of the run.
        given: the user's settings, kept in the record.
        watcher: receives the progress.
        stop: asked between steps.
        overwrite: replace the run in the output folder.
        resume_from: a checkpoint folder, or a run's folder (its newest checkpoint). Left out, an unfinished run of the
            same settings in the output folder is resumed.
        processes: that train together; all call this with the same arguments, one of them writes.
        in_memory: a base in memory, instead of the one that the configuration names.

    Raises:
        ConfigError: when the package of a tracker is not installed.
        OutputError: when the output folder holds another run, or a finished one, or another process writes to it.
        Interrupted: when asked to stop; a checkpoint was written.
    """
    started = time.perf_counter()
    config = resolve(config)
    folder = RunFolder(config.output)
    trackers = Trackers(config.logging.trackers if processes.writes else (), folder.path, watcher.say)
    # looked up before the folder is claimed: a wrong path must leave nothing behind, and overwriting must not delete it
    resume = _checkpoint(resume_from, identity(config.model_dump(mode="json"))) if resume_from else None
    if resume is not None and overwrite and folder.path.resolve() in resume.folder.resolve().parents:
        where, remedy = str(resume.folder), "leave out --overwrite_output_dir"
        raise OutputError("would be deleted with the output folder", where=where, remedy=remedy)
    _begun(folder, config, overwrite=overwrite)
    with _locked(folder, processes):
        begun = _begun(folder, config, overwrite=overwrite)
        if in_memory is None and processes.writes:
            memory = expected_memory(
                config.model,
                config.training,
                {str(config.method.method): config.method},
                config.data.max_length,
                sharing=processes.count,
            )
            if memory is not None:
                memory.tell(watcher.say)
        session = open_session(
            config.model, config.data, config.training, watcher.say, processes=processes, in_memory=in_memory
        )
        with contextlib.closing(TrackedWatcher(watcher, trackers, config)) as tracked:
            finished = _train(config, given, folder, session, tracked, stop, resume, begun=begun, overwrite=overwrite)
            tracked.end(finished.diverged, finished.after, finished.minus_base)
    return replace(finished, seconds=time.perf_counter() - started)


_REMEDY = "replace it with --overwrite_output_dir (Python: overwrite=True), or give another folder"


def _begun(folder: RunFolder, config: TrainConfig, *, overwrite: bool) -> bool:
    """Returns True where an unfinished run of these settings lies in the folder."""
    begun = folder.check(config.model_dump(mode="json"), overwrite=overwrite, remedy=_REMEDY)
    if begun and (folder.status() or ("", ""))[0] == "finished":
        raise OutputError("holds a finished run of these settings", where=str(folder.path), remedy=_REMEDY)
    return begun


@contextlib.contextmanager
def _locked(folder: RunFolder, processes: ProcessGroup) -> Iterator[None]:
    """Locks the folder in the process that writes; where that is refused, all processes raise."""
    with contextlib.ExitStack() as held:
        refusal = None
        if processes.writes:
            try:
                held.enter_context(folder.locked())
            except OutputError as error:
                refusal = error
        if processes.of_first([float(refusal is not None)])[0]:
            raise refusal or OutputError(
                "the first process may not write to it", where=str(folder.path), remedy="its own message says why"
            )
        yield


def _train(
    config: TrainConfig,
    given: Any,
    folder: RunFolder,
    session: Session,
    watcher: Watcher,
    stop: StopRequest,
    resume: checkpoint.Checkpoint | None,
    *,
    begun: bool,
    overwrite: bool,
) -> Finished:
    """Runs a setting once its folder is locked; arguments as of `train`; `begun`: a run there is resumed."""
    processes = session.processes
    check_methods(session, [config.method], config.training.seed)
    before = [] if overwrite else [folder]
    # a checkpoint lies in RUN/checkpoints/step_N
    for run in before + ([RunFolder(resume.folder.resolve().parents[1])] if resume else []):
        refuse_other_inputs(describe(session), run)
    if begun:
        resume = resume or checkpoint.newest(folder.checkpoints)
    processes.wait()  # no process may look at the folder after the first has claimed it
    if not processes.writes:
        return _run(config, folder, session, watcher, stop, resume)
    folder.claim(config.model_dump(mode="json"), given, overwrite=overwrite, remedy=_REMEDY)
    folder.set_status("running")
    try:
        folder.write_record({**environment(), **describe(session)})
        finished = _run(config, folder, session, watcher, stop, resume)
    except BaseException as error:
        folder.end(error)
        raise
    folder.set_status("diverged" if finished.diverged else "finished", finished.diverged or finished.worse)
    return finished


def _run(
    config: TrainConfig,
    folder: RunFolder,
    session: Session,
    watcher: Watcher,
    stop: StopRequest,
    resume: checkpoint.Checkpoint | None,
) -> Finished:
    for note in session.notes:
        watcher.say(note)
    logging = config.logging
    planned = total_steps(config.training, len(session.train))
    every = logging.evaluate_every or max(1, planned // (4 if config.early_stopping is None else 20))
    settings = TrialSettings(method=config.method, training=config.training)
    checkup = Checkup(session, settings)
    for line in checkup.lines:
        watcher.say(line)
    if session.processes.writes:
        checkup.keep(folder)
    watcher = CheckedWatcher(watcher, checkup, folder if session.processes.writes else None)
    plan = TrialPlan(config.method.method, settings, folder, every, patience=config.early_stopping)
    settle(session, folder, [settings], trials=1, wanted=1)
    measure_base(session, watcher.say)
    slots = Slots(
        session, logging, watcher, checkpoints=folder.checkpoints, identity=identity(config.model_dump(mode="json"))
    )
    if session.encoder.missing_bos:
        watcher.say(bos_losses(session))
    outcome = _to_the_end(slots, plan, session, stop, resume)
    counts_N = session.held_out.counts()
    base_N = session.base_held_out.of(range(len(session.held_out)))
    end_N = outcome.end_N
    assert outcome.start_N is not None
    return Finished(
        folder.path,
        mean_loss(outcome.start_N, counts_N),
        None if end_N is None else mean_loss(end_N, counts_N),
        None if end_N is None else difference(end_N, base_N, counts_N),
        len(counts_N),
        counts_N.sources,
        outcome.reason,
        config=config,
        steps=outcome.steps,
        planned=planned,
        best_step=outcome.best_step,
        resumed_at=resume.steps[0] if resume else 0,
        seconds=0.0,
    )


def _to_the_end(
    slots: Slots, plan: TrialPlan, session: Session, stop: StopRequest, resume: checkpoint.Checkpoint | None
) -> Outcome:
    stop.heeded = True
    try:
        events = slots.resume(resume, {plan.name: plan}) if resume else slots.advance(Commands(enter=[plan]))
        while True:
            for message in events:
                if isinstance(message, Ended):
                    return message.outcome
            if session.processes.total([float(stop.asked)])[0]:
                slots.save({})
                raise Interrupted(f"{slots.where()}, with a checkpoint; the same command resumes there")
            events = slots.advance(Commands())
    finally:
        slots.close()


def _checkpoint(path: Path, own: str) -> checkpoint.Checkpoint:
    """Returns the checkpoint in `path`, or the newest one of the run in `path`."""
    found = checkpoint.read(path) or checkpoint.newest(path / "checkpoints") or checkpoint.newest(path)
    if found is None:
        remedy = "give RUN/checkpoints/step_N, or the run's folder"
        raise OutputError("holds no whole checkpoint", where=str(path), remedy=remedy)
    if found.identity != own:
        raise OutputError(
            "was made with other settings (method, data, training or model)",
            where=str(found.folder),
            remedy="resume with the command it was made with, or start a new run",
        )
    return found
