"""How much of a study is done, in optimizer steps: the search that is left, and the finals behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from peft_study.config import StudyConfig
from peft_study.search import lr_range_test
from peft_study.search.trials import StudyState, TrialRecord


class StudySteps(NamedTuple):
    """Optimizer steps of all trials: taken, and expected of the search (with its range tests) and of the finals."""

    done: float
    search: float
    finals: float


def study_steps(state: StudyState, config: StudyConfig, due: Mapping[str, int], steps: Mapping[str, int]) -> StudySteps:
    """Counts the steps of a study.

    A trial to come is expected to take as many as the method's trials so far did, so that pruning counts, and none is
    to come of a method whose best setting is known (`search.stop`).

    Args:
        state: of the study.
        config: filled.
        due: settings in all, by method (`StudyState.due`).
        steps: that running trials have taken, by name.
    """
    done = {"search": 0.0, "final": 0.0}
    left = {"search": 0.0, "final": 0.0}
    for trial in state.trials.values():
        if trial.kind == "reference":
            continue
        part, whole = "final" if trial.kind == "final" else "search", _whole(trial)
        if trial.status == "running":
            taken = max(steps.get(trial.name, 0), max(trial.sums, default=0))
            left[part] += max(0, whole - taken)
        else:
            taken = trial.facts.get("steps", whole)
        done[part] += taken
    anywhere = max(map(_whole, (t for t in state.trials.values() if t.kind in ("search", "final"))), default=1)
    for method in config.searched:
        searched = state.of(method, "search")
        whole = max(map(_whole, searched), default=config.training.steps or anywhere)
        ended = [t.facts["steps"] for t in searched if t.status != "running" and "steps" in t.facts]
        to_come = max(0, state.to_come(method, config, due[method]))
        left["search"] += to_come * (sum(ended) / len(ended) if ended else whole)
        if to_come and method not in state.tested:
            rates = lr_range_test.planned(config, whole).get(method, ())
            tests = max(0, len(rates) - len(state.of(method, "range_test")))
            left["search"] += tests * config.search.range_steps
        begun, finals = state.finals(method, config)
        left["final"] += max(0, finals - len(begun)) * whole
    return StudySteps(done["search"] + done["final"], left["search"], left["final"])


def _whole(trial: TrialRecord) -> int:
    return trial.settings.training.steps or 1
