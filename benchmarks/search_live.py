"""Our engine's part of `search.py measure`: every cell trained once, and seconds of rows, evaluations and start-up.

    python benchmarks/search_live.py STUDY.yaml STAMPS.jsonl SPAWNED_AT    # one study in a process of its own

The curves are a study whose audit share is 1: it judges at the rungs as always, but runs on to the end all the same.
A killed `measure` goes on from the study's own checkpoint.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from common import Rows
from search_grid import Scale, config_of, split_of, training_batches

from peft_study.config import StudyConfig, validate
from peft_study.methods.peft_format import load_adapter
from peft_study.search.trials import StudyState, TrialRecord
from peft_study.statistics import mean_loss
from peft_study.storage.journal import Journal
from peft_study.storage.study_dir import StudyFolder
from peft_study.study.run import run_study
from peft_study.training.interrupt import StopRequest
from peft_study.training.loop import Ended, Evaluated
from peft_study.training.session import open_session, unheard
from peft_study.workers.worker import Facts, Report

Stamp = dict[str, Any]
COMPANY = 3
"""Trials side by side, where more than one is timed."""


class Stamps:
    """Writes down when each report of a study came, seconds after the process was started."""

    def __init__(self, path: Path, spawned: float) -> None:
        self._path, self._spawned = path, spawned

    def say(self, line: str, share: float | None = None, /) -> None:
        """Says nothing."""

    def planned(self, config: StudyConfig, state: StudyState, slots: int) -> None:
        """The start-up is over: model, data, slots and threads are there."""
        self._add(what="ready")

    def reported(self, report: Report, state: StudyState) -> None:
        """A row was run, or trials entered or left."""
        events = report.events
        self._add(
            what="report",
            tokens=sum(pace.tokens for pace in report.paces.values()),
            measured=sum(isinstance(n, Evaluated) and n.step > 0 for n in events),
            entered=sum(isinstance(n, Evaluated) and n.step == 0 for n in events),
            left=sum(isinstance(n, Ended) for n in events),
            running=len(report.running),
        )

    def ended(self, trial: TrialRecord, facts: Facts) -> None:
        """The report says it, too."""

    def _add(self, **what: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"at": time.time() - self._spawned, **what}) + "\n")


def run_apart(values: dict[str, Any], folder: Path, name: str) -> list[Stamp]:
    """Runs a study in a process of its own, or what is left of it, and returns the stamps of all its starts.

    Args:
        values: the study file.
        folder: of the work.
        name: of the study in it.
    """
    file, stamps = folder / f"{name}.yaml", folder / f"{name}.stamps.jsonl"
    file.write_text(yaml.safe_dump({**values, "output": str(folder / name)}))
    if not (folder / name).exists():
        stamps.unlink(missing_ok=True)
    words = [sys.executable, __file__, str(file), str(stamps), repr(time.time())]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in stamps.read_text().splitlines()]


def state_of(folder: Path) -> StudyState:
    """Returns what a study's journal says."""
    state = StudyState()
    for event in Journal(StudyFolder(folder).journal).events:
        state.apply(event)
    return state


def speeds(stamps: Sequence[Stamp], slots: int, dev_tokens: int) -> dict[str, Any]:
    """Returns seconds a token of the rows with all slots full, of a trial's entry, and a dev token of an evaluation.

    A report that has measured is a row and an evaluation; one that has nothing to tell is a row. The time of an
    evaluation is what such a report takes longer than a row, on average; so checkpoints and adapters that are written
    count where they happen.
    """
    rows, judged, tokens, evaluated = list[float](), list[float](), 0, 0
    for before, stamp in _reports(stamps):
        if before["running"] < slots or stamp["entered"] or (stamp["left"] and not stamp["measured"]):
            continue
        (judged if stamp["measured"] else rows).append(stamp["at"] - before["at"])
        tokens, evaluated = tokens + stamp["tokens"], evaluated + stamp["measured"]
    row = sum(rows) / len(rows)
    return {
        "slots": slots,
        "row_seconds": round(row, 4),
        "rows": len(rows) + len(judged),
        "seconds_per_token": row * (len(rows) + len(judged)) / tokens,
        "seconds_per_dev_token": max(0.0, sum(judged) - row * len(judged)) / max(evaluated * dev_tokens, 1),
        "entry": round(_entry(stamps), 4),
    }


def start_up(stamps: Sequence[Stamp]) -> float:
    """Returns the seconds from the start of the process until its first trials are about to run, entries aside."""
    first = next(stamp for stamp in stamps if stamp.get("entered"))
    return round(float(first["at"] - _entry(stamps) * first["entered"]), 3)


def _entry(stamps: Sequence[Stamp]) -> float:
    """Returns the seconds that a trial takes to enter; the first ones bear what happens once and do not count."""
    entering = [(stamp["at"] - before["at"], stamp["entered"]) for before, stamp in _reports(stamps)]
    later = [(seconds, count) for seconds, count in entering if count][1:]
    return sum(seconds for seconds, _ in later) / sum(count for _, count in later) if later else 0.0


def _reports(stamps: Sequence[Stamp]) -> list[tuple[Stamp, Stamp]]:
    """Returns each report with the one before it; what lies between two starts of a killed study is left out."""
    return [pair for pair in itertools.pairwise(stamps) if all(stamp["what"] == "report" for stamp in pair)]


def measure_ours(rows: Rows, model: str, values: dict[str, Any], scale: Scale, work: Path) -> None:
    """Trains every cell, then measures what trials take side by side and alone, and a start-up with full caches.

    The curves bear company: what they take is not used. The short runs after them do not.
    """
    config, data = config_of(values, work / "curves"), values["data"]["train"]
    dev_tokens = int(split_of(config).held_out.lengths().sum())
    run_apart({**values, "search": {**values["search"], "audit": 1.0}}, work, "curves")
    state = state_of(work / "curves")
    # where the model and the data lie on this machine is no part of what was measured
    portable = {**values, "model": {"name": model}, "data": {**values["data"], "train": Path(data).name}}
    facts = _study_facts(config, scale, state)
    # as short as shows the speed
    some = slice(len(scale.rates) // 2 - 1, len(scale.rates) // 2 + 1)
    few = {scale.method: {"learning_rate": list(scale.rates[some]), scale.other: list(scale.values)}}
    short = {**values, "methods": few, "budget": {"steps": scale.timed_steps}}
    none = {**short, "search": {**values["search"], "pruner": "none"}}
    for name in ("together", "alone", "start-up"):  # done again they are measured again
        shutil.rmtree(work / name, ignore_errors=True)
    again = start_up(run_apart({**none, "budget": {"steps": 1}}, work, "start-up"))
    longer = {"budget": {"steps": COMPANY * scale.timed_steps}}
    together = run_apart({**none, **longer, "slots": COMPANY}, work, "together")
    alone = run_apart({**none, "slots": 1}, work, "alone")
    rows.add(row="study", values=portable, **facts)
    _write_cells(rows, config, scale, state)
    rows.add(row="speed", system="ours", start_up=again, **speeds(together, COMPANY, dev_tokens))
    rows.add(row="speed", system="ours alone", start_up=start_up(alone), **speeds(alone, 1, dev_tokens))


def _study_facts(config: StudyConfig, scale: Scale, state: StudyState) -> dict[str, Any]:
    """Returns what the replay must know of data and engine."""
    split, trials = split_of(config), state.of(scale.method, "search")
    (reference,) = state.of("none", "reference")
    return {
        "cells": len(trials),
        "rungs": sorted({step for trial in trials for step in trial.sums} - {0, scale.steps}),
        "steps": scale.steps,
        "slots": StudyFolder(config.output).run.read("capacity.json")["slots"],
        "row_tokens": StudyFolder(config.output).run.read("capacity.json")["row_tokens"],
        "counts": split.held_out.counts().tokens_N.tolist(),
        "start": _rounded(reference.sums[0]),
        "dev_tokens": int(split.held_out.lengths().sum()),
        "lengths": [list(map(len, batch)) for batch in training_batches(split, config, scale.steps)],
    }


def _write_cells(rows: Rows, config: StudyConfig, scale: Scale, state: StudyState) -> None:
    trials = state.of(scale.method, "search")
    tests = _test_losses(config, [trial for trial in trials if trial.status == "finished"])
    for trial in trials:
        rows.add(
            row="cell",
            learning_rate=trial.values["learning_rate"],
            **{scale.other: trial.values[scale.other]},
            status=trial.status,
            reason=trial.reason,
            steps=trial.facts["steps"],
            seconds=round(trial.facts["seconds"], 1),
            test=tests.get(trial.name),
            audited=trial.audited,
            sums={step: _rounded(values_N) for step, values_N in trial.sums.items() if step > 0},
        )


def _test_losses(config: StudyConfig, trials: Sequence[TrialRecord]) -> dict[str, float]:
    """Returns each trial's loss a supervised token of the test part."""
    folder = StudyFolder(config.output)
    session = open_session(config.model, config.data, config.training, unheard, test=True)
    assert session.test is not None
    counts, found = session.test.counts(), {}
    for trial in trials:
        adapter = load_adapter(folder.trial(trial.name).adapter, session.base)
        (sums_N,) = session.engine.losses([adapter], session.test, range(len(session.test)))
        found[trial.name] = round(mean_loss(sums_N, counts).value, 6)
    return found


def _rounded(values_N: Any) -> list[float]:
    return [round(float(value), 4) for value in values_N]


def main(words: list[str] | None = None) -> None:
    """Runs one study with stamps."""
    file, stamps, spawned = sys.argv[1:] if words is None else words
    values = yaml.safe_load(Path(file).read_text())
    with StopRequest().listening() as stop:
        run_study(validate(StudyConfig, values, where=file), values, Stamps(Path(stamps), float(spawned)), stop)


if __name__ == "__main__":
    main()
