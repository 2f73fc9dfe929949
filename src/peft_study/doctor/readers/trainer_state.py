"""The log of Hugging Face's Trainer and of what is built on it, such as TRL: trainer_state.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft_study.doctor.observations import Observations, UsedSettings
from peft_study.doctor.readers.columns import SOURCE, meaning
from peft_study.doctor.readers.log_curve import curve_of_points, reasons_of
from peft_study.doctor.readers.log_text import JsonArray, LogFile
from peft_study.doctor.readers.points import Points
from peft_study.errors import DataError

FILE = "trainer_state.json"
_KEY = "log_history"
_KNOWN = {"loss": "loss", "grad_norm": "gradient_norm", "learning_rate": "rate", "epoch": "epoch"}
"""Keys of the Trainer; TRL adds others, none of them a loss."""
_SUMMARY = "train_runtime"
"""Only the last line of a training has it; `train_loss` there is the mean of the run."""
REWARDED = (
    "the run learns from rewards (GRPO, PPO): its loss says nothing of what is learned",
    "该训练从奖励中学习（GRPO、PPO），其损失不能说明学到了什么",
)


def is_trainer_state(file: LogFile) -> bool:
    """Returns whether a file holds the state of a Trainer."""
    return file.head.startswith("{") and f'"{_KEY}"' in file.head


def read_trainer_state(file: LogFile) -> Observations:
    """Returns what the state of a Trainer tells.

    Args:
        file: trainer_state.json.

    Raises:
        DataError: it has no log.
    """
    if "[" not in file.head.partition(f'"{_KEY}"')[2][:20]:
        raise DataError(f"has no list {_KEY}", where=file.where, remedy="give the file as the Trainer wrote it")
    history = JsonArray(file, _KEY)
    log = _History()
    for line in history:
        log.line(line)
    notes, state = log.notes(), history.around
    if not history.whole:
        notes.append("the file is cut off, as in a run that still writes or was stopped while it wrote")
    every = _every(state)
    curve = curve_of_points(log.points, notes, every=every)
    total = _whole(state.get("max_steps"))
    done = _whole(state.get("global_step")) or log.last_step
    ended = log.ended or (total is not None and done is not None and done >= total)
    if log.rewarded:
        curve, reasons = None, {"curve": REWARDED}
    elif curve is None:
        reasons = {"curve": ("nothing is logged yet (logging_steps)", "日志里还没有损失（logging_steps）")}
    else:
        reasons = reasons_of(curve)
    return Observations(
        stage="after" if ended else "during",
        steps_done=done,
        settings=UsedSettings(total_steps=total),
        curve=curve,
        reasons=reasons,
    )


_MOST_STEPS = 1e15
"""More is no number of steps."""


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and 0 < value < _MOST_STEPS else None


def _every(state: Mapping[str, Any]) -> int | None:
    """Returns the steps that a logged loss averages."""
    every, total = state.get("logging_steps"), _whole(state.get("max_steps"))
    if not isinstance(every, (int, float)) or isinstance(every, bool) or not 0 < every < _MOST_STEPS:
        return None
    if every >= 1:
        return int(every)
    return math.ceil(every * total) if total else None  # a share of the steps


class _History:
    """Turns the lines of a log into points.

    Attributes:
        points: so far.
        ended: whether the last line says that the training ended.
        last_step: of the lines.
        rewarded: whether lines have a reward.
    """

    def __init__(self) -> None:
        self.points = Points()
        self.ended, self.last_step = False, 0
        self.rewarded = False
        self._ended_at: list[int] = []
        self._odd = 0

    def line(self, line: Any) -> None:
        """Adds a line."""
        step = _number(line.get("step")) if isinstance(line, dict) else None
        if step is None or not math.isfinite(step):
            self._odd += 1
            return
        self.last_step = max(self.last_step, int(step))
        if _SUMMARY in line:
            self.ended = True
            return
        self.rewarded = self.rewarded or "reward" in line
        values = dict(_values(line))
        if "loss" in values and self.ended:
            self.ended = False
            self._ended_at.append(int(step))
        if values.keys() - {"epoch"}:
            self.points.add(step, values)

    def notes(self) -> list[str]:
        """Returns what was put right, a line each."""
        found = []
        if self._odd:
            found.append(f"{self._odd:,} lines of {_KEY} have no step: they are left out")
        if self._ended_at:
            found.append(f"the training ended and was begun again, first before step {self._ended_at[0]}")
        return found


def _values(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        what = _KNOWN.get(name)
        if what is None and name.startswith("eval_"):
            known = meaning(name)
            what = known[0] if known and (known[0].startswith(SOURCE) or known[0] in _EVALUATED) else None
        number = _number(value) if what else None
        if what is not None and number is not None:
            yield what, number


_EVALUATED = ("held_out_loss", "accuracy")


def _number(value: Any) -> float | None:
    """Returns a number, also of a text; None of anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def newest_state(folder: Path) -> Path | None:
    """Returns the trainer_state.json of a run's folder that went furthest: its own, or that of a checkpoint.

    Args:
        folder: output folder of the run, or one of its checkpoints.
    """
    found = []
    for path in folder.glob(f"checkpoint-*/{FILE}"):
        number = path.parent.name.rpartition("-")[2]
        if number.isdecimal():
            found.append((int(number), path))
    own, (step, last) = folder / FILE, max(found, default=(0, None))
    if not own.is_file():
        return last
    # a run that goes on after its end leaves the file of that end
    return last if last is not None and step > _steps_of(own) else own


def _steps_of(path: Path) -> float:
    """Returns the steps that a file counts; one that cannot be read is not passed over: its error is told."""
    try:
        return float(json.loads(path.read_text(encoding="utf-8-sig"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return math.inf
