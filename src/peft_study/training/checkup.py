"""What the doctor sees of a run of ours before it trains, says of it, and keeps in the run's folder.

Session + settings --observe_session--> Observations --examine--> Diagnosis --> lines for the user, doctor.json
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from peft_study.config import TrialSettings
from peft_study.data.checkup import split_counts, unigram_of
from peft_study.doctor.diagnosis import Diagnosis
from peft_study.doctor.observations import (
    FILE,
    DataCounts,
    LossCurve,
    Observations,
    ParameterCounts,
    UsedSettings,
    configured,
    to_json,
)
from peft_study.doctor.rule import Kind, examine
from peft_study.engine.trial import total_steps
from peft_study.methods.lora import target_shapes
from peft_study.methods.registry import create, is_exclusive, size, starts_as_base
from peft_study.storage.run_dir import RunFolder
from peft_study.training.session import Session

BEFORE: tuple[Kind, ...] = ("weights", "data", "settings")
"""Rules that have something to look at before the first step."""
_STARTS = 16
"""Held-out rows on which a start is measured where no trial measures it."""
_NOT_BEGUN = ("the run has not begun", "训练还没有开始")


def observe_session(
    session: Session, settings: TrialSettings, data: DataCounts | None = None, *, steps: int | None = None
) -> Observations:
    """Returns what is known of a run of ours before it trains.

    Args:
        session: with model and data.
        settings: of the run.
        data: of `count_data`, where it was called already.
        steps: optimizer steps, where they are not those of the settings.

    Raises:
        ModelError: when the method does not fit the model.
    """
    data = count_data(session) if data is None else data
    found = size(settings.method, session.base)
    virtual = found.row_tokens + found.prefix_tokens
    reasons = {
        "curve": _NOT_BEGUN,
        "adapter": _NOT_BEGUN,
        "parameters.unmoved": (
            "adapters are float32 here, so that no step is lost",
            "这里的适配器是 float32，不会丢失更新",
        ),
        "settings.seconds": ("--dry-run measures it", "用 --dry-run 测量"),
        "data.tuned_template": ("the tokenizer has no chat template of its own", "分词器没有自带的对话模板"),
        "data.bos_checked": ("the chat template refuses a short example", "对话模板拒绝简短的示例"),
    }
    return Observations(
        stage="before",
        settings=_used_settings(session, settings, steps),
        parameters=_parameters(session, settings, found.trained),
        data=dataclasses.replace(data, virtual_tokens=virtual),
        reasons=reasons,
    )


def count_data(session: Session) -> DataCounts:
    """Returns the counts of a session's rows."""
    counts = split_counts(session.train, session.held_out, session.encoder)
    base = session.base
    return dataclasses.replace(counts, longest=session.longest, positions=base.positions, context=base.context)


def _used_settings(session: Session, settings: TrialSettings, steps: int | None) -> UsedSettings:
    """Returns how a run trains, and the memory it takes."""
    method, training, base = settings.method, settings.training, session.base
    steps = total_steps(training, len(session.train)) if steps is None else steps
    shapes = [side for pair in _shapes(session, settings) for side in pair]
    need, free = session.room.need(method, session.longest), session.room.free
    return dataclasses.replace(
        configured(method, training, steps=steps, dtype=base.placement.dtype_name),
        rank_stabilised=getattr(method, "rslora", None),
        narrowest=min(shapes, default=None),
        width=getattr(base.model.config.get_text_config(), "hidden_size", None),
        projection=getattr(method, "projection", None),
        memory_bytes=None if free is None else need,
        free_bytes=free,
    )


def _shapes(session: Session, settings: TrialSettings) -> list[tuple[int, int]]:
    if settings.method.method != "lora":
        return []
    return list(target_shapes(session.base.model, settings.method.target_modules).values())


def _parameters(session: Session, settings: TrialSettings, trained: int) -> ParameterCounts:
    base = session.base
    if is_exclusive(settings.method.method):
        return ParameterCounts(
            base=base.parameter_count(), base_trainable=trained, adapter=0, adapter_trainable=0, own_base=True
        )
    unexpected = [(name, p.numel()) for name, p in base.model.named_parameters() if p.requires_grad]
    return ParameterCounts(
        base=base.parameter_count(),
        base_trainable=sum(numbers for _, numbers in unexpected),
        adapter=trained,
        adapter_trainable=trained,
        first_unexpected=unexpected[0][0] if unexpected else None,
    )


def measured_start(session: Session, settings: TrialSettings) -> LossCurve:
    """Returns the loss before step 1 beside the untouched base's, on a few held-out rows.

    Raises:
        UserError: the adapter cannot be made.
    """
    some = range(min(_STARTS, len(session.held_out)))
    base = session.base_held_out.of(some)
    start = base
    if not starts_as_base(settings.method.method):
        adapter = create(settings.method, session.base, session.material, settings.training.seed)
        start = session.engine.losses([adapter], session.held_out, some)[0]
    tokens = session.held_out.counts().tokens_N[: len(some)].sum()
    return start_curve(session, float(start.sum() / tokens), float(base.sum() / tokens))


def start_curve(session: Session, start: float, base: float) -> LossCurve:
    """Returns the losses before step 1 as a curve without a step.

    Args:
        session: with the data.
        start: with the adapter.
        base: without.
    """
    unigram = unigram_of(session.train)
    return LossCurve(steps=np.empty(0), loss=np.empty(0), start_loss=start, base_loss=base, unigram_loss=unigram)


def lines(diagnosis: Diagnosis) -> list[str]:
    """Returns what is printed before a training: errors and warnings, and rows that the cut takes."""
    cut = [p.evidence.en for p in diagnosis.problems if p.check == "truncated" and p.level == "note"]
    return [*diagnosis.short(), *cut]


def keep(folder: RunFolder, seen: Observations, diagnosis: Diagnosis) -> None:
    """Writes doctor.json."""
    folder.write(FILE, {"observations": to_json(seen), **diagnosis.json()})


class Checkup:
    """The checkup of one run: said before it trains, kept in its folder, and looked at again once the start is known.

    Args:
        session: with model and data.
        settings: of the run.
    """

    def __init__(self, session: Session, settings: TrialSettings) -> None:
        self._session = session
        self._seen = observe_session(session, settings)
        self.diagnosis = examine(self._seen, kinds=BEFORE)

    @property
    def lines(self) -> list[str]:
        """What is printed."""
        return lines(self.diagnosis)

    def keep(self, folder: RunFolder) -> None:
        """Writes doctor.json."""
        keep(folder, self._seen, self.diagnosis)

    def started(self, start: float, base: float) -> list[str]:
        """Returns what the loss before step 1 adds.

        Args:
            start: of the held-out rows, with the adapter.
            base: of the same, without.
        """
        told = {problem.check for problem in self.diagnosis.problems}
        self._seen = dataclasses.replace(self._seen, curve=start_curve(self._session, start, base))
        self.diagnosis = examine(self._seen, kinds=BEFORE)
        new = tuple(problem for problem in self.diagnosis.problems if problem.check not in told)
        return dataclasses.replace(self.diagnosis, problems=new).short()


class CheckedWatcher:
    """The watcher of a run, which says what its start tells.

    Args:
        watcher: receives everything.
        checkup: of the run.
        folder: of the run, where this process writes.
    """

    def __init__(self, watcher: Any, checkup: Checkup, folder: RunFolder | None) -> None:
        self.say, self.counted, self.stepped = watcher.say, watcher.counted, watcher.stepped
        self._watcher, self._checkup, self._folder = watcher, checkup, folder

    def evaluated(self, trial: Any, loss: float, minus_base: float) -> None:
        """As of `Watcher`."""
        self._watcher.evaluated(trial, loss, minus_base)
        if trial.step == 0:
            for line in self._checkup.started(loss, loss - minus_base):
                self.say(line)
            if self._folder is not None:
                self._checkup.keep(self._folder)
