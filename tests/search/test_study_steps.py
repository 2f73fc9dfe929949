"""How much of a study is done: steps of the search, range tests and finals, and what ends them early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_study.search.progress import StudySteps, study_steps
from peft_study.search.trials import Recommendation
from simulated import World, study, valley

RATES = [1e-4, 3e-4, 1e-3]


def world(folder: Path, **sections: Any) -> World:
    """Returns a study of two methods with three trials of 90 steps each, and two finals a method."""
    settings = {
        "methods": {"lora": {"learning_rate": RATES}, "prompt_tuning": {"learning_rate": RATES}},
        "finals": {"best": 1, "seeds": 2},
        "search": {"pruner": "none", "range_test": False, "sampler": "grid"},
    }
    curves = {"lora": valley(3e-4), "prompt_tuning": valley(1e-3)}
    return World(study(**{**settings, **sections}), folder, curves, slots=2)


def steps(world: World) -> StudySteps:
    """Returns the steps of a study as they are now."""
    state, config = world.scheduler.state, world.config
    due = {"lora": 3, "prompt_tuning": 3}
    # one that is no longer under way has taken its last step; the scheduler hears of it at the next turn
    taken = {trial.name: world._at.get(trial.name, 90) for trial in state.running()}
    return study_steps(state, config, due, taken)


def test_all_of_it_is_planned_from_the_beginning_finals_included(tmp_path: Path) -> None:
    assert steps(world(tmp_path)) == (0, 2 * 3 * 90, 2 * 2 * 90)


def test_what_is_done_and_what_is_left_are_always_the_whole(tmp_path: Path) -> None:
    seen: list[StudySteps] = []

    def look(here: World) -> bool:
        seen.append(steps(here))
        return False

    playing = world(tmp_path)
    playing.run(until=look)
    assert len(seen) > 200
    assert {sum(found) for found in seen} == {900}
    assert [found.done for found in seen] == sorted(found.done for found in seen)
    assert steps(playing) == (900, 0, 0)


def test_a_search_that_is_known_well_enough_has_nothing_to_come(tmp_path: Path) -> None:
    playing = world(tmp_path, search={"pruner": "none", "range_test": False, "sampler": "grid", "stop": 0.01})
    playing.run(until=lambda here: any(t.status == "finished" for t in here.scheduler.state.of("lora", "search")))
    state = playing.scheduler.state
    before = steps(playing)
    to_come = 3 - len(state.of("lora", "search"))
    assert to_come > 0
    state.recommended["lora"] = Recommendation({}, None, 0.005)
    after = steps(playing)
    assert (after.done, after.finals) == (before.done, before.finals)
    assert before.search - after.search == 90 * to_come


def test_trials_to_come_are_expected_to_be_pruned_like_those_before(tmp_path: Path) -> None:
    playing = world(tmp_path)
    playing.run(until=lambda here: any(t.status == "finished" for t in here.scheduler.state.of("lora", "search")))
    before, state = steps(playing), playing.scheduler.state
    ended = next(t for t in state.of("lora", "search") if t.status == "finished")
    ended.status, ended.facts["steps"] = "pruned", 30
    to_come = 3 - len(state.of("lora", "search"))
    assert before.search - steps(playing).search == pytest.approx(60 * to_come)


def test_range_tests_count(tmp_path: Path) -> None:
    ranges = {"lora": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}}
    search = {"pruner": "none", "range_test": True, "range_steps": 7, "sampler": "tpe"}
    playing = world(tmp_path, methods=ranges, search=search, budget={"trials": 3})
    rates = len(playing.scheduler.range_rates("lora"))
    assert rates == 5
    assert steps(playing).search == 3 * 90 + rates * 7
    playing.run(until=lambda here: "lora" in here.scheduler.state.tested)
    assert steps(playing).done + steps(playing).search == 3 * 90 + rates * 7
    assert steps(playing).search <= 3 * 90
