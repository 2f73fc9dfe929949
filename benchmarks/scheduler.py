"""What the scheduler of a study costs, without any model: time a report and bytes a trial, by number of trials.

    python benchmarks/scheduler.py --trials 1000 --sampler tpe --workers 64

It asks and answers as study/run.py does: `workers` trials are under way at a time, each with random losses at its
rungs; the pruner stops what it stops. The figures of docs/scale.md come from it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np

from peft_study.config import StudyConfig
from peft_study.search.samplers import export
from peft_study.search.scheduler import Scheduler
from peft_study.search.trials import TrialRecord
from peft_study.storage.journal import Journal
from peft_study.training.loop import Ended, Evaluated
from peft_study.training.trial_run import Outcome


def study(trials: int, sampler: str, folder: Path) -> StudyConfig:
    """Returns a filled study of one method with its default space."""
    return StudyConfig.model_validate(
        {
            "model": {"name": "none"},
            "data": {"train": "none"},
            "training": {"steps": 1000},
            "budget": {"trials": trials},
            "search": {"sampler": sampler, "range_test": False},
            "finals": {"best": 0},
            "methods": {"lora": {}},
            "output": str(folder),
        }
    ).filled()


def opened(config: StudyConfig, folder: Path, examples: int) -> Scheduler:
    """Returns the scheduler of the study in `folder`, as a start or a resume makes it."""
    counts_N = np.full(examples, 100)
    return Scheduler(config, Journal(folder / "journal.jsonl"), lambda training: training.steps or 0, counts_N)


def main() -> None:
    """Prints one line of figures."""
    words = argparse.ArgumentParser()
    words.add_argument("--trials", type=int, default=200)
    words.add_argument("--sampler", default="tpe")
    words.add_argument("--workers", type=int, default=64, help="trials under way")
    words.add_argument("--examples", type=int, default=64, help="held-out examples")
    given = words.parse_args()
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = study(given.trials, given.sampler, folder)
        scheduler = opened(config, folder, given.examples)
        asking: list[float] = []
        hearing: list[float] = []
        going: deque[tuple[TrialRecord, deque[int]]] = deque()
        begun = time.perf_counter()
        while not scheduler.finished:
            if len(going) < given.workers:
                started = time.perf_counter()
                found = scheduler.next(1, empty=False)
                asking += [time.perf_counter() - started] * len(found)
                for trial in found:
                    going.append((trial, deque([0, *trial.settings.rungs, 1000])))
                if found:
                    continue
            if not going:
                break
            trial, steps = going.popleft()
            step = steps.popleft()
            sums = 100 * (2 + draw.normal(size=given.examples) / 10 + draw.normal() / 10)
            started = time.perf_counter()
            leave = scheduler.receive([Evaluated(trial.name, step, sums)])
            if trial.kind == "reference" or trial.name in leave or not steps:
                status = "pruned" if trial.name in leave else "finished"
                scheduler.receive([Ended(trial.name, Outcome(status, leave.get(trial.name), steps=step))])
            else:
                going.append((trial, steps))
            hearing.append(time.perf_counter() - started)
        total = time.perf_counter() - begun
        started = time.perf_counter()
        export(folder / "optuna.db", scheduler.samplers, scheduler.state)
        exporting = time.perf_counter() - started
        sizes = [(folder / file).stat().st_size / given.trials for file in ("journal.jsonl", "optuna.db")]
        started = time.perf_counter()
        opened(config, folder, given.examples)
        again = time.perf_counter() - started
    last = slice(-max(1, given.trials // 10), None)
    print(
        f"{given.trials} trials, {given.sampler}, {given.workers} under way: {total:.1f} s in all; "
        f"asking {1000 * np.mean(asking):.0f} ms a trial (last tenth {1000 * np.mean(asking[last]):.0f}), "
        f"a report with news {1000 * np.mean(hearing):.0f} ms (last tenth {1000 * np.mean(hearing[last]):.0f}); "
        f"a trial: {len(hearing) / given.trials:.1f} reports, "
        f"{sizes[0]:.0f} bytes of journal, {sizes[1]:.0f} of optuna.db; all of it exported in {exporting:.1f} s, "
        f"opened again in {again:.2f} s"
    )


if __name__ == "__main__":
    main()
