"""What is measured for the report once a study is decided: what each method costs, and answers to test prompts."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from peft_study.config import MethodConfig, NoneConfig, StudyConfig
from peft_study.errors import OutputError, first_line
from peft_study.evaluation.scores import EVALUATION
from peft_study.report.answers import ANSWERS_FILE, AnsweredRow, Answers, write_answers
from peft_study.report.costs import COST_FILE, MethodCost, write_costs
from peft_study.report.results import Results
from peft_study.search.trials import StudyState, TrialRecord, best_first, best_of_search, setting_name
from peft_study.statistics import Losses
from peft_study.storage.held_out import HeldOut
from peft_study.storage.study_dir import StudyFolder
from peft_study.training.session import Say, timed
from peft_study.workers.backend import Backend

MAX_NEW_TOKENS = 64
"""Of an answer."""


def forget(folder: StudyFolder) -> None:
    """Removes what an earlier study file's finalists cost and answered, and what chose among them.

    Tasks that they were asked at the end, or by hand, are put aside as ``evaluation-before-1`` and so on.
    """
    for name in (COST_FILE, ANSWERS_FILE):
        (folder.path / name).unlink(missing_ok=True)
    shutil.rmtree(folder.path / f"{EVALUATION}-dev", ignore_errors=True)
    if (asked := folder.path / EVALUATION).exists():  # what was asked by hand as well: it is put aside
        free = next(n for n in itertools.count(1) if not (folder.path / f"{EVALUATION}-before-{n}").exists())
        asked.rename(folder.path / f"{EVALUATION}-before-{free}")


def keep_costs(folder: StudyFolder, state: StudyState, results: Results, backend: Backend, say: Say) -> None:
    """Measures what the best setting of each method costs, and keeps it, unless that was done before.

    An error is only shown: the results of a study do not depend on it.
    """
    if (folder.path / COST_FILE).exists():
        return
    best = best_trials(state, results)
    with _shown(say, "what the methods cost was not measured"), timed(say, "measuring what each method costs"):
        found = backend.costs({method: trial.settings for method, trial in best.items()})
        kept = {
            method: MethodCost(
                setting=_setting(best[method]), adapter_bytes=_weights(folder, best[method]), **asdict(cost)
            )
            for method, cost in found.items()
        }
        write_costs(folder.path, kept)


def keep_answers(
    config: StudyConfig,
    folder: StudyFolder,
    state: StudyState,
    examples: HeldOut,
    results: Results,
    backend: Backend,
    say: Say,
) -> None:
    """Has base and finalists answer test prompts, and keeps the answers, unless that was done before.

    An error is only shown: the results of a study do not depend on it.
    """
    best = {m: t for m, t in best_trials(state, results).items() if t.name in state.test}
    wanted = config.finals.answers if best else 0
    if not wanted or (folder.path / ANSWERS_FILE).exists():
        return
    counts_N = examples.test_counts_N.tokens_N
    losses = {"none": state.test["none"] / counts_N}
    losses |= {_setting(trial): state.test[trial.name] / counts_N for trial in best.values()}
    systems: list[tuple[str, MethodConfig, Path]] = [("none", NoneConfig(), folder.path)]
    systems += [(_setting(t), t.settings.method, folder.trial(t.name).adapter) for t in best.values()]
    leading = systems[1][0]
    rows = wins_and_losses(losses[leading] - losses["none"], wanted)
    what = f"answers of the base and {len(best)} finalists to {len(rows)} test prompts"
    with _shown(say, f"there are no {what}"), timed(say, what):
        found = backend.answers(systems, rows, MAX_NEW_TOKENS)
        answered = [
            AnsweredRow(
                **{**row, "prompt": tuple(row["prompt"])},
                losses={name: float(losses_N[row["example"]]) for name, losses_N in losses.items()},
            )
            for row in found
        ]
        write_answers(folder.path, Answers(MAX_NEW_TOKENS, tuple(losses), tuple(answered)))


def keep_evaluation(
    config: StudyConfig, folder: StudyFolder, state: StudyState, results: Results, backend: Backend, say: Say
) -> None:
    """Asks base and finals the study's tasks, or goes on where an earlier start was stopped.

    Each final is represented by the seed with the least dev loss; without finals each method by its best trial. An
    error is only shown: the adapters are there, and `peft-study evaluate` asks them again.
    """
    if config.evaluation is None:
        return
    finals = [done[0] for f in results.finalists if (done := best_first(state.finals_of(f.method, f.number)))]
    trials = finals or list(best_trials(state, results).values())
    trained = [(_setting(t), t.settings.method, folder.trial(t.name).adapter) for t in trials]
    trained = [system for system in trained if system[2].is_dir()]
    what = f"tasks on the base and {len(trained)} adapters"
    with _shown(say, f"the {what} were not finished", files=True), timed(say, what):
        backend.evaluate(config.evaluation, folder.path / EVALUATION, trained)


def best_trials(state: StudyState, results: Results) -> dict[str, TrialRecord]:
    """Returns the trial that stands for each method, the winner's first.

    It is the seed with the least dev loss of the method's best final; without finals the best of its search. A method
    of which no trial has finished is left out.
    """
    found: dict[str, TrialRecord] = {}
    for final in results.finalists:
        if final.method not in found and (done := best_first(state.finals_of(final.method, final.number))):
            found[final.method] = done[0]
    for method, trial in best_of_search(state, results.methods).items():
        found.setdefault(method, trial)
    return found


def wins_and_losses(difference_N: Losses, count: int) -> list[int]:
    """Returns the examples with the least differences, the least first, then those with the greatest, greatest first.

    Args:
        difference_N: loss a token of the winner minus the base's.
        count: half of them wins, one more where it is odd; at most the examples there are.
    """
    order = np.argsort(difference_N, kind="stable").tolist()
    count = min(count, len(order))
    wins = math.ceil(count / 2)
    return [*order[:wins], *order[::-1][: count - wins]]


def _setting(trial: TrialRecord) -> str:
    return setting_name(trial.method, trial.number)


def _weights(folder: StudyFolder, trial: TrialRecord) -> int | None:
    """Returns the bytes of a trial's weights on disk."""
    sizes = [path.stat().st_size for path in folder.trial(trial.name).adapter.glob("*.safetensors")]
    return sum(sizes) if sizes else None


@contextmanager
def _shown(say: Say, what: str, *, files: bool = False) -> Iterator[None]:
    """Shows an error and goes on; one of writing only with `files`: where the files are none of the study's own."""
    try:
        yield
    except OutputError as error:
        if not files:
            raise
        say(f"WARNING: {what}: {error}")
    except Exception as error:  # noqa: BLE001  (whatever a model, a worker or PEFT may raise)
        say(f"WARNING: {what}: {first_line(error)}")
