"""A study whose file changed on the way: what counts again, what is tried anew, and that it comes to a winner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_study.config import StudyConfig
from peft_study.search.trials import TrialRecord
from peft_study.storage.journal import Event
from simulated import World, study, valley

CURVES = {"lora": valley(1e-3), "prompt_tuning": valley(0.1, depth=0.8)}
RATES = (1e-4, 1e-3, 1e-2)
TESTED = {"range_test": True, "range_steps": 4, "pruner": "none"}


def searched(world: World, method: str = "lora") -> list[TrialRecord]:
    return world.scheduler.state.of(method, "search")


def range_trials(world: World, method: str = "lora") -> list[TrialRecord]:
    return world.scheduler.state.of(method, "range_test")


def one(space: dict[str, Any], **sections: Any) -> StudyConfig:
    return study(methods={"lora": space}, **sections)


def events(folder: Path, *kinds: str) -> list[Event]:
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] in kinds]


def cells(trials: list[TrialRecord]) -> list[tuple[float, ...]]:
    names = ("rank", "learning_rate", "weight_decay")
    return [tuple(trial.settings.flat[name] for name in names) for trial in trials]


# -- the range test


def test_a_new_space_with_the_same_rates_is_searched_after_its_range_test(tmp_path: Path) -> None:
    """The rank in the middle stays: the old trials of the range test are those of the new space."""
    search = {"search": TESTED, "budget": {"trials": 5}}
    world = World(one({"space": "default", "rank": [4, 8]}, **search), tmp_path, CURVES).run()
    old = len(searched(world)), len(range_trials(world))
    world = world.changed(one({"space": "default", "rank": [4, 8], "dropout": [0.0, 0.05, 0.1, 0.2]}, **search), "lora")
    world.run()
    assert old == (5, 7)
    assert len(range_trials(world)) == 7, "a rate that was tried with these settings is not tried again"
    assert len(searched(world)) == 10
    assert world.scheduler.state.winner is not None
    assert [event["method"] for event in events(tmp_path, "tested")] == ["lora", "lora"]
    assert len(world.scheduler.state.notes["lora"]) >= 1


@pytest.mark.parametrize(
    ("space", "fresh"),
    [
        ({"learning_rate": {"low": 1e-4, "high": 0.1, "log": True}}, [3.16e-2, 0.1]),
        ({"rank": 4}, [1e-5, 3.16e-5, 1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]),
    ],
    ids=["other rates", "other settings"],
)
def test_rates_that_were_not_tried_with_these_settings_are_tested(
    tmp_path: Path, space: dict[str, Any], fresh: list[float]
) -> None:
    search = {"search": TESTED, "budget": {"trials": 5}}
    world = World(one({}, **search), tmp_path, CURVES).run()
    whole = {"space": "default", **space} if "rank" in space else space
    world = world.changed(one(whole, **search), "lora").run()
    tests = range_trials(world)
    if "rank" not in space:  # {} searches the default space, a rate alone fixes all the rest
        fresh = [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2, *fresh]
    assert [trial.values["learning_rate"] for trial in tests[7:]] == pytest.approx(fresh)
    assert [trial.name for trial in tests] == [f"lora-range-{number}" for number in range(len(tests))]
    new = searched(world)[5:]
    assert len(new) == 5
    low, high = world.scheduler.state.bounds.get("lora", {}).get("learning_rate", (1e-5, 0.1))
    assert all(low <= trial.values["learning_rate"] <= high for trial in new)
    assert world.scheduler.state.winner is not None


def test_a_range_test_of_other_steps_is_made_again(tmp_path: Path) -> None:
    world = World(one({}, search=TESTED, budget={"trials": 3}), tmp_path, CURVES).run()
    longer = one({"space": "default", "rank": [16, 8, 32, 64, 4]}, search={**TESTED, "range_steps": 8})
    world = world.changed(longer, "lora").run()
    steps = [trial.settings.training.steps for trial in range_trials(world)]
    assert steps == [4] * 7 + [8] * 7


def test_a_method_that_has_all_its_trials_is_not_tested_for_nothing(tmp_path: Path) -> None:
    methods = {"lora": {}, "prompt_tuning": {"tokens": 8}}
    world = World(study(methods=methods, budget={"trials": 4}), tmp_path, CURVES).run()
    methods = {"lora": {"rank": 4}, "prompt_tuning": {"tokens": 8}}
    world = world.changed(study(methods=methods, budget={"trials": 4}, search=TESTED), "lora").run()
    assert (len(range_trials(world)), len(range_trials(world, "prompt_tuning"))) == (7, 0)
    assert (len(searched(world)), len(searched(world, "prompt_tuning"))) == (8, 4)


def test_a_method_that_left_the_file_in_its_range_test_ends_it(tmp_path: Path) -> None:
    methods = {"lora": {}, "prompt_tuning": {"tokens": 8}}
    world = World(study(methods=methods, search=TESTED), tmp_path, CURVES, slots=20)
    world.run(until=lambda w: any(trial.start is not None for trial in range_trials(w)))
    assert {trial.status for trial in range_trials(world)} == {"running"}
    world = world.changed(study(methods={"prompt_tuning": {"tokens": 8}}, search=TESTED), "lora").run()
    assert all(trial.status == "finished" for trial in range_trials(world))
    assert world.scheduler.state.winner is not None
    assert world.scheduler.state.winner[0] == "prompt_tuning"


# -- grids


def grid(**settings: Any) -> StudyConfig:
    return one({"rank": [4, 8], "learning_rate": list(RATES), **settings})


def test_of_a_larger_grid_the_cells_not_yet_tried_are_tried(tmp_path: Path) -> None:
    world = World(grid(), tmp_path, CURVES).run()
    world = world.changed(grid(rank=[2, 4, 8]), "lora").run()
    assert len(searched(world)) == 9
    assert set(cells(searched(world))) == {(rank, rate, 0.0) for rank in (2, 4, 8) for rate in RATES}
    assert [rank for rank, _, _ in cells(searched(world)[6:])] == [2, 2, 2]


def test_under_another_fixed_value_every_cell_is_another_one(tmp_path: Path) -> None:
    world = World(grid(), tmp_path, CURVES).run()
    world = world.changed(grid(weight_decay=0.1), "lora").run()
    assert len(searched(world)) == 12
    assert set(cells(searched(world)[6:])) == {(rank, rate, 0.1) for rank in (4, 8) for rate in RATES}
    # and back again: all of them are there
    world = world.changed(grid(), "lora").run()
    assert len(searched(world)) == 12
    assert world.scheduler.state.winner is not None


def test_of_a_smaller_grid_nothing_is_tried_again(tmp_path: Path) -> None:
    methods = {"lora": {"rank": [4, 8], "learning_rate": list(RATES)}, "prompt_tuning": {"tokens": 8}}
    world = World(study(methods=methods), tmp_path, CURVES).run()
    world = world.changed(study(methods={**methods, "lora": {"rank": 4, "learning_rate": [1e-3, 1e-2]}}), "lora").run()
    state = world.scheduler.state
    assert (len(searched(world)), len(searched(world, "prompt_tuning"))) == (6, 12)
    assert state.winner is not None
    assert state.winner[0] == "lora", "both its cells were tried"


def test_a_grid_within_a_budget_goes_on_where_it_was(tmp_path: Path) -> None:
    """The sampler is a grid, and the budget does not reach for all its cells."""
    sections: dict[str, Any] = {"search": {"sampler": "grid"}}
    world = World(grid_of(3, sections), tmp_path, CURVES).run()
    world = world.changed(grid_of(5, sections)).run()
    assert len(searched(world)) == len(set(cells(searched(world)))) == 5


def grid_of(trials: int, sections: dict[str, Any]) -> StudyConfig:
    return one({"rank": [4, 8], "learning_rate": list(RATES)}, budget={"trials": trials}, **sections)


# -- trials and their counts


def test_a_changed_space_gets_its_trials_and_the_others_are_not_untuned(tmp_path: Path) -> None:
    methods = {"lora": {}, "prompt_tuning": {"tokens": 8}}
    world = World(study(methods=methods, budget={"trials": 4}), tmp_path, CURVES).run()
    world = world.changed(study(methods={**methods, "lora": {"rank": 4}}, budget={"trials": 4}), "lora").run()
    assert (len(searched(world)), len(searched(world, "prompt_tuning"))) == (8, 4)
    state = world.scheduler.state
    assert not any(state.untuned(method, world.config) for method in methods)
    said = state.unequal(world.config)
    assert said == "searched unequally: lora: 4 trials of an earlier space beside those of the present one"


def test_old_values_outside_the_new_range_do_not_widen_it(tmp_path: Path) -> None:
    search = {"range_test": False, "pruner": "none"}
    world = World(one({}, search=search, budget={"trials": 6}), tmp_path, {"lora": valley(1e-4)}).run()
    high = {"learning_rate": {"low": 1e-3, "high": 0.1, "log": True}}
    world = world.changed(one(high, search=search, budget={"trials": 4}), "lora").run()
    new = [trial.values["learning_rate"] for trial in searched(world)[6:]]
    assert len(new) == 4
    assert min(new) >= 1e-3, "the best so far is an old one below the range that was asked for"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_killed_after_a_change_it_repeats_itself(tmp_path: Path, share: float) -> None:
    """The journal is cut anywhere after the change."""
    first = one({"rank": [4, 8], "learning_rate": list(RATES)})
    second = one({"rank": [2, 4, 8], "learning_rate": list(RATES), "weight_decay": [0.0, 0.1]})
    whole = World(first, tmp_path, CURVES).run().changed(second, "lora").run()
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    change = next(i for i, line in enumerate(lines) if b'"continued"' in line)
    # a cut between trials: those under way begin again in this world, and measure what they had
    ends = [i for i in range(change, len(lines)) if not running(lines[: i + 1])]
    cut = ends[int(share * (len(ends) - 1))] + 1
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "journal.jsonl").write_bytes(b"".join(lines[:cut]))
    again = World(second, killed, CURVES).run()
    assert (killed / "journal.jsonl").read_bytes() == (tmp_path / "journal.jsonl").read_bytes()
    assert again.scheduler.state.winner == whole.scheduler.state.winner
    assert len(searched(again)) == 6 + 12


def running(lines: list[bytes]) -> bool:
    kinds = [json.loads(line)["event"] for line in lines]
    return kinds.count("asked") != kinds.count("ended")
