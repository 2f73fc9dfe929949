"""The doctor inside a run of transformers or TRL: it looks before step 1, during the run, and at its end."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from peft_study.doctor.diagnosis import Diagnosis, Problem
from peft_study.doctor.live import adapter_state, fingerprint, observe_model
from peft_study.doctor.observations import FILE, LossCurve, Observations, to_json
from peft_study.doctor.rule import examine
from peft_study.errors import UserError
from peft_study.storage.files import atomic_writer, json_text

_ROWS = 64
"""Rows of the training data that are looked at before step 1, spread over all of it."""
_LONGEST = 1.0
"""Seconds that training and held-out rows are compared for."""
_LOOKS = 20
"""Times that a run's curve is looked at."""
_FEWEST_STEPS = 10
"""Optimizer steps between two looks, at least; also from which on weights are expected to have changed."""


class DoctorCallback(TrainerCallback):
    """Says what is wrong with a run of `transformers.Trainer` or TRL, and writes OUTPUT_DIR/doctor.json.

        Trainer(model, args, train_dataset=..., callbacks=[DoctorCallback()])

    The batches of the run, its random numbers and its losses stay as they are without it.

    Args:
        stop: a certain or likely error before step 1 stops the run with a `UserError`; False: it is only said.
        language: en or zh.

    Attributes:
        diagnosis: the last one; None before the run.
    """

    def __init__(self, *, stop: bool = True, language: str = "en") -> None:
        self.stop, self.language = stop, language
        self.diagnosis: Diagnosis | None = None
        self._first: Observations | None = None
        self._start: dict[str, Tensor] = {}
        self._said: set[str] = set()
        self._looked_at = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at model, data and settings before step 1.

        Raises:
            UserError: there is an error, and `stop` is set.
        """
        model = kwargs["model"]
        with _same_random_numbers():
            loader = kwargs.get("train_dataloader")
            batches = some_batches(loader, args.train_batch_size)
            tokenizer = kwargs.get("processing_class") or getattr(
                getattr(loader, "collate_fn", None), "tokenizer", None
            )
            seen = observe_model(model, batches=batches, arguments=args, tokenizer=tokenizer)
        if not batches:
            why = (
                "the training data is a stream, or its rows cannot be taken one by one",
                "训练数据是流式的，或无法逐条读取",
            )
            seen = dataclasses.replace(seen, reasons=seen.reasons | {"data": why})
        if state.global_step and seen.curve is not None:  # what was learned before is no start
            seen = dataclasses.replace(seen, curve=dataclasses.replace(seen.curve, start_loss=None))
        settings = dataclasses.replace(
            seen.settings, total_steps=state.max_steps, warmup_steps=args.get_warmup_steps(state.max_steps)
        )
        self._first = dataclasses.replace(seen, settings=settings, steps_done=state.global_step)
        self._start, self._said, self._looked_at = fingerprint(model), set(), state.global_step
        self.diagnosis = examine(self._first)
        stopping = [problem for problem in self.diagnosis.problems if self.stop and _stops(problem)]
        if stopping:
            self._write(args, state, self._first)
            raise _error(stopping[0], self.language)
        self._say(state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at the curve every so often."""
        if state.global_step - self._looked_at >= max(_FEWEST_STEPS, state.max_steps // _LOOKS):
            self._look(state, kwargs["model"], "during")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compares training and held-out rows, once: before its first evaluation a trainer has not made the latter."""
        if self._first is None or self._first.data is None or self._first.data.held_out_rows is not None:
            return
        with _same_random_numbers():
            found = rows_that_train(kwargs.get("train_dataloader"), kwargs.get("eval_dataloader"))
        if found is not None:
            data = dataclasses.replace(self._first.data, overlap=found[0], held_out_rows=found[1])
            self._first = dataclasses.replace(self._first, data=data)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at curve and weights, and writes doctor.json."""
        self._write(args, state, self._look(state, kwargs["model"], "during"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at the whole run, and writes doctor.json."""
        self._write(args, state, self._look(state, kwargs["model"], "after"))

    def _look(self, state: Any, model: Any, stage: str) -> Observations:
        assert self._first is not None
        self._looked_at = state.global_step
        began = self._first.steps_done or 0
        start = self._start if state.global_step - began >= _FEWEST_STEPS or stage == "after" else None
        seen = dataclasses.replace(
            self._first,
            stage=stage,
            steps_done=state.global_step,
            curve=curve_of(state.log_history, self._first.curve, resumed=began),
            adapter=adapter_state(model, start),
            reasons={name: why for name, why in self._first.reasons.items() if name != "adapter.untouched"},
        )
        self.diagnosis = examine(seen)
        self._say(state)
        return seen

    def _say(self, state: Any) -> None:
        """Prints the problems that were not said before."""
        assert self.diagnosis is not None
        new = [problem for problem in self.diagnosis.problems if problem.check not in self._said]
        self._said |= {problem.check for problem in new}
        if state.is_world_process_zero:
            for line in dataclasses.replace(self.diagnosis, problems=tuple(new)).short(self.language):
                print(line, file=sys.stderr)

    def _write(self, args: Any, state: Any, seen: Observations) -> None:
        if not state.is_world_process_zero:
            return
        assert self.diagnosis is not None
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_writer(folder / FILE) as file:
            found = {"observations": to_json(seen), **self.diagnosis.json()}
            file.write(json_text(found, indent=1, ensure_ascii=False) + "\n")


def _stops(problem: Problem) -> bool:
    return problem.level == "error" and problem.sure in ("certain", "likely")


def _error(problem: Problem, language: str) -> UserError:
    texts = (problem.cause, problem.evidence, problem.consequence, problem.change)
    cause, evidence, consequence, change = (text.to(language) for text in texts)
    paste = f":\n    {problem.paste}".replace("\n", "\n    ") if problem.paste else ""
    return UserError(f"{cause}: {evidence}; {consequence}", remedy=f"{change}{paste}")


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Leaves the generators of Python, NumPy and torch as they were."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)


def some_batches(loader: Any, batch_size: int) -> list[Any]:
    """Returns batches of rows that are spread over a data set; none of a stream, which would be used up.

    The loader itself is not asked: its sampler would draw, and accelerate keeps count of its loaders.

    Args:
        loader: a data loader.
        batch_size: rows a batch.
    """
    rows: Any = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    if collate is None or not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__") or not len(rows):
        return []
    places = np.unique(np.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).astype(int)).tolist()
    groups = [places[at : at + batch_size] for at in range(0, len(places), batch_size)]
    try:
        return [collate([rows[place] for place in group]) for group in groups]
    except Exception:  # noqa: BLE001 - a data set may want other places than numbers: its training must not stop for it
        return []


def rows_that_train(train: Any, held_out: Any) -> tuple[int, int] | None:
    """Returns how many of up to 64 held-out rows are training rows too, and how many were looked at.

    None where the rows cannot be taken by number, or are too many to be compared in a second.

    Args:
        train, held_out: data loaders.
    """
    try:
        rows, others = train.dataset, held_out.dataset
        places = np.unique(np.linspace(0, len(others) - 1, min(_ROWS, len(others))).astype(int)).tolist()
        wanted = [tuple(map(int, others[place]["input_ids"])) for place in places]
        missing, until = set(wanted), time.monotonic() + _LONGEST
        for place in range(len(rows)):
            missing.discard(tuple(map(int, rows[place]["input_ids"])))
            if time.monotonic() > until:
                return None
    except Exception:  # noqa: BLE001 - rows of any kind: a training must not stop for this
        return None
    return sum(row not in missing for row in wanted), len(wanted)


def curve_of(history: Sequence[dict[str, Any]], first: LossCurve | None, *, resumed: int = 0) -> LossCurve:
    """Returns the curve of a trainer's log.

    Args:
        history: `log_history` of its state.
        first: the losses before step 1.
        resumed: step at which this run was taken up.
    """
    trained = {int(line["step"]): line for line in history if "loss" in line and "step" in line}
    held_out = {int(line["step"]): line for line in history if "eval_loss" in line and "step" in line}
    steps = sorted(trained)
    gaps = np.diff([0, *steps])
    known = {f: getattr(first, f) for f in ("start_loss", "base_loss", "unigram_loss")} if first else {}

    def column(name: str) -> Any:
        values = np.array([float(trained[step].get(name, np.nan)) for step in steps])
        return None if np.isnan(values).all() else values

    return LossCurve(
        steps=np.array(steps, dtype=float),
        loss=np.array([float(trained[step]["loss"]) for step in steps]),
        window=max(1, int(np.median(gaps))) if steps else 1,
        rate=column("learning_rate"),
        gradient_norm=column("grad_norm"),
        epoch=column("epoch"),
        held_out_steps=np.array(sorted(held_out), dtype=float) if held_out else None,
        held_out_loss=np.array([float(held_out[s]["eval_loss"]) for s in sorted(held_out)]) if held_out else None,
        resumed=(resumed,) if resumed else (),
        **known,
    )
