"""The protocol of a study, on curves that are made up: who begins, who stops, who is retrained, who wins."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from peft_study.search.trials import TrialRecord
from simulated import World, study, valley

TWO = {"lora": {}, "prompt_tuning": {"tokens": 8}}
DESIGN = {"sampler": "quasi_random", "pruner": "successive_halving"}
CURVES = {"lora": valley(1e-3), "prompt_tuning": valley(0.1, depth=0.8), "full": valley(2e-5, depth=1.2)}


def searched(world: World, method: str) -> list[TrialRecord]:
    return world.scheduler.state.of(method, "search")


def test_every_method_has_the_same_trials_and_budget(tmp_path: Path) -> None:
    world = World(study(methods=TWO, budget={"trials": 7}), tmp_path, CURVES).run()
    assert {m: len(searched(world, m)) for m in TWO} == {"lora": 7, "prompt_tuning": 7}
    settings = [t.settings for m in TWO for t in searched(world, m)]
    assert {s.training.steps for s in settings} == {90}
    assert {(s.training.seed, s.training.data_seed) for s in settings} == {(0, 0)}
    # methods take turns: neither waits for the other
    firsts = [name for name in world.order if "seed" not in name][1:9]
    assert Counter(name.split("-")[0] for name in firsts) == {"lora": 4, "prompt_tuning": 4}
    assert world.most == 4


def test_finals_are_the_best_settings_with_new_seeds_and_the_winner_has_the_least_mean(tmp_path: Path) -> None:
    world = World(study(methods=TWO, finals={"best": 2, "seeds": 3}), tmp_path, CURVES).run()
    state = world.scheduler.state
    for method in TWO:
        finished = [t for t in searched(world, method) if t.last is not None]
        best = sorted(finished, key=lambda t: float(t.sums[max(t.sums)].sum()))[:2]
        assert state.finalists[method] == tuple(t.number for t in best)
        finals = state.of(method, "final")
        assert sorted((t.number, t.seed) for t in finals) == sorted((t.number, s) for t in best for s in (1, 2, 3))
        assert all(t.values == state.setting(method, t.number).values for t in finals)
    assert state.winner == ("lora", state.finalists["lora"][0])
    assert next(iter(state.trials)) == "none", "the untouched base is a row"


def test_a_seed_that_failed_keeps_a_setting_from_winning(tmp_path: Path) -> None:
    def fragile(trial: TrialRecord, share: float) -> float | None:
        return None if trial.seed == 2 else valley(1e-3)(trial, share)

    world = World(study(methods=TWO), tmp_path, {**CURVES, "lora": fragile}).run()
    assert world.scheduler.state.winner is not None
    assert world.scheduler.state.winner[0] == "prompt_tuning"


def test_hopeless_settings_stop_at_a_rung_after_the_longest_warmup_with_the_reason(tmp_path: Path) -> None:
    config = study(search={**DESIGN, "range_test": False})
    world = World(config, tmp_path, CURVES).run()
    assert searched(world, "lora")[0].settings.rungs == (10, 30)
    pruned = [t for t in searched(world, "lora") if t.status == "pruned"]
    assert 4 <= len(pruned) <= 9
    for trial in pruned:
        assert trial.reason is not None
        assert trial.reason.startswith(f"at step {max(trial.sums)} worse than lora-0")
    best = min(searched(world, "lora"), key=lambda t: abs(np.log10(t.values["learning_rate"] / 1e-3)))
    assert best.status == "finished", "the best of all must not be stopped"
    late = study(methods={"lora": {"warmup_ratio": [0.0, 0.3]}}, budget={"trials": 2})
    assert World(late, _made(tmp_path / "late"), CURVES).run().scheduler.state.trials["lora-000"].settings.rungs == (
        30,
    )


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_random_share_of_the_stopped_runs_on_to_check_the_rule(tmp_path: Path) -> None:
    config = study(budget={"trials": 40}, search={**DESIGN, "range_test": False, "audit": 0.3})
    world = World(config, tmp_path, CURVES).run()
    trials = searched(world, "lora")
    audited = [t for t in trials if t.audited]
    pruned = [t for t in trials if t.status == "pruned"]
    assert all(t.status == "finished" for t in audited)
    assert 0.1 < len(audited) / (len(audited) + len(pruned)) < 0.6


def test_diverged_and_failed_trials_are_rows_and_count(tmp_path: Path) -> None:
    def high_rates_diverge(trial: TrialRecord, share: float) -> float | None:
        return None if trial.values["learning_rate"] > 1.2e-3 and share > 0.2 else valley(1e-3)(trial, share)

    world = World(study(), tmp_path, {"lora": high_rates_diverge}).run()
    diverged = [t for t in searched(world, "lora") if t.status == "diverged"]
    assert diverged
    assert all(t.reason == "the loss became nan at step 19" for t in diverged)
    assert len(searched(world, "lora")) == 12


def test_a_trial_that_diverges_after_a_rung_stops_nobody_there(tmp_path: Path) -> None:
    """It leads at the first rung, and is gone when the others come to it."""

    def curve(trial: TrialRecord, share: float) -> float | None:
        if trial.number > 0:
            return valley(1e-3)(trial, share)
        return None if share > 0.15 else 0.1

    config = study(methods={"lora": {}}, budget={"trials": 3}, finals={"best": 0})
    world = World(config, tmp_path, {"lora": curve}, slots=1).run()
    first, *others = searched(world, "lora")
    assert first.status == "diverged"
    assert 10 in first.sums
    assert others[0].status == "finished"


def test_all_weights_wait_for_an_empty_engine_and_are_untuned_with_fewer_trials(tmp_path: Path) -> None:
    methods = {"full": {"learning_rate": 2e-5}, "lora": {}}
    world = World(study(methods=methods, budget={"trials": 3}), tmp_path, CURVES).run()
    first = world.order.index("full-000")
    assert all(not name.startswith("lora") for name in world.order[first:]), "all others come first"
    state = world.scheduler.state
    assert state.untuned("full", world.config)
    assert state.winner is not None
    assert state.winner[0] == "lora", "the best of all is not ranked: it had one trial"
    tuned = study(methods={"full": {}, "lora": {}}, budget={"trials": 3})
    state = World(tuned, _made(tmp_path / "tuned"), CURVES).run().scheduler.state
    assert not state.untuned("full", tuned)
    assert state.winner is not None
    assert state.winner[0] == "full"


def test_a_best_value_at_the_edge_widens_the_range_up_to_a_limit(tmp_path: Path) -> None:
    search = {"sampler": "tpe", "range_test": False, "pruner": "none"}
    config = study(budget={"trials": 40}, search=search)
    world = World(config, tmp_path, {"lora": valley(0.3)}).run()
    rates = [t.values["learning_rate"] for t in searched(world, "lora")]
    state = world.scheduler.state
    assert state.bounds["lora"]["learning_rate"] == pytest.approx((1e-5, 0.1))
    assert 0.03 < max(rates) <= 0.1
    assert [note.split(";")[1] for note in state.notes["lora"]] == [
        " widened to 1e-05 to 0.0316", " widened to 1e-05 to 0.1"
    ]  # fmt: skip
    # the first trial after it looks into what was added
    events = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    widened = next(i for i, e in enumerate(events) if e["event"] == "widened")
    following = next(e for e in events[widened:] if e["event"] == "asked")
    assert 1e-2 <= following["values"]["learning_rate"] <= 0.0317
    fixed = study(budget={"trials": 40}, search={**search, "widen": False})
    state = World(fixed, _made(tmp_path / "fixed"), {"lora": valley(0.3)}).run().scheduler.state
    assert state.bounds == {}


def test_a_range_test_cuts_off_what_diverges_or_does_not_move_and_its_tokens_count(tmp_path: Path) -> None:
    def curve(trial: TrialRecord, share: float) -> float | None:
        rate = trial.values["learning_rate"]
        if rate > 2e-3:
            return None
        return 2.0 if rate < 2e-5 else valley(3e-4)(trial, share)

    config = study(budget={"trials": 12}, search={"range_test": True, "range_steps": 8, "widen": False})
    world = World(config, tmp_path, {"lora": curve}).run()
    state = world.scheduler.state
    tests = state.of("lora", "range_test")
    assert [t.values["learning_rate"] for t in tests] == [1e-5, 3.16e-5, 1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]
    assert {t.settings.training.steps for t in tests} == {8}
    assert state.bounds["lora"]["learning_rate"] == (1e-5, 1e-3)
    assert state.notes["lora"] == ["range test: 0.00316 and above make it worse; searched: 1e-05 to 0.001"]
    assert max(t.values["learning_rate"] for t in searched(world, "lora")) <= 1e-3
    assert world.order.index("lora-000") > max(world.order.index(t.name) for t in tests)
    assert sum(t.facts["tokens"] for t in tests) > 0


@pytest.mark.parametrize(("learns", "bounds"), [(0, (1e-5, 3.16e-5)), (6, (3.16e-3, 1e-2))])
def test_a_range_test_leaves_two_rates_at_least(tmp_path: Path, learns: int, bounds: tuple[float, float]) -> None:
    """One rate that learns among rates that make it worse is no range yet."""
    rates = [1e-5, 3.16e-5, 1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]

    def curve(trial: TrialRecord, share: float) -> float:
        if trial.kind == "range_test":
            return 2.0 - share if trial.number == learns else 2.0 + share
        return 1.0

    config = study(budget={"trials": 5}, search={"range_test": True, "range_steps": 4, "widen": False})
    state = World(config, tmp_path, {"lora": curve}).run().scheduler.state
    assert state.bounds["lora"]["learning_rate"] == bounds
    assert rates[learns] in bounds


def test_lists_are_tried_once_each_where_there_are_trials_enough(tmp_path: Path) -> None:
    methods = {"lora": {}, "prompt_tuning": {"tokens": [8, 20], "learning_rate": [0.01, 0.1, 1.0]}}
    world = World(study(methods=methods, budget={"trials": 8}), tmp_path, CURVES).run()
    tried = [tuple(t.values.values()) for t in searched(world, "prompt_tuning")]
    assert len(tried) == len(set(tried)) == 6
    assert len(searched(world, "lora")) == 8


def test_a_range_test_is_made_where_it_is_cheap(tmp_path: Path) -> None:
    short, long = study(search=DESIGN), study(search=DESIGN, training={"steps": 900})
    modelled = study(search={}, training={"steps": 900})
    assert World(short, _made(tmp_path / "a"), CURVES).scheduler.range_rates("lora") == ()
    assert len(World(long, _made(tmp_path / "b"), CURVES).scheduler.range_rates("lora")) == 7
    assert World(modelled, _made(tmp_path / "c"), CURVES).scheduler.range_rates("lora") == (), "needs none"


def test_range_tests_are_made_for_all_methods_or_for_none(tmp_path: Path) -> None:
    """Prompt tuning has a rate more than LoRA in its range: alone, its test would cost more than a tenth."""
    methods = {"lora": {}, "prompt_tuning": {}, "prefix_tuning": {"learning_rate": [0.01, 0.1]}, "full": {}}
    found = {}
    for steps in (150, 180, 186, 187, 190, 200, 212, 213, 240):
        scheduler = World(
            study(methods=methods, search=DESIGN, training={"steps": steps}), _made(tmp_path / str(steps)), CURVES
        ).scheduler
        found[steps] = {method: len(scheduler.range_rates(method)) for method in methods}
    assert all(sum(count > 0 for count in tested.values()) in (0, 2) for tested in found.values()), found
    assert sum(found[150].values()) == 0
    assert found[240]["lora"] > 0
    assert found[240]["prefix_tuning"] == found[240]["full"] == 0, "no range to test, and no room beside others"
    forced = study(methods=methods, search={"range_test": True}, training={"steps": 9})
    assert World(forced, _made(tmp_path / "forced"), CURVES).scheduler.range_rates("lora")


def test_a_grid_that_is_tried_to_its_end_is_tuned_and_may_win(tmp_path: Path) -> None:
    methods = {"lora": {"learning_rate": [1e-4, 1e-3]}, "prompt_tuning": {"tokens": 8}, "full": {"learning_rate": 2e-5}}
    config = study(methods=methods, budget={"trials": 6})
    world = World(config, tmp_path, CURVES).run()
    state = world.scheduler.state
    assert {method: len(searched(world, method)) for method in methods} == {"lora": 2, "prompt_tuning": 6, "full": 1}
    assert [state.untuned(method, config) for method in methods] == [False, False, True]
    assert state.winner is not None
    assert state.winner[0] == "lora"
    assert state.unequal(config) == (
        "searched unequally: lora: all 2 settings of its lists, where others have 6 trials; "
        "full: its only setting, so it is not ranked (untuned)"
    )
    assert state.unequal(study(methods=TWO)) == ""


def test_a_grid_that_a_deadline_cut_short_is_untuned(tmp_path: Path) -> None:
    methods = {"prompt_tuning": {"tokens": 8}, "full": {"learning_rate": [1e-5, 2e-5, 4e-5]}}
    config = study(methods=methods, budget={"trials": 4}, search={"range_test": False, "pruner": "none"})
    world = World(config, tmp_path, CURVES).run(
        until=lambda w: any(t.start is not None for t in searched(w, "prompt_tuning"))
    )
    world.scheduler.time_is_up()
    world.run()
    state = world.scheduler.state
    assert (state.deadline, searched(world, "full")) == (True, [])
    assert state.untuned("full", config)


def test_a_time_limit_after_the_last_setting_began_ends_nothing(tmp_path: Path) -> None:
    world = World(study(budget={"trials": 3}), tmp_path, CURVES).run(until=lambda w: len(w.order) > 3)
    assert any(trial.status == "running" for trial in searched(world, "lora"))
    world.scheduler.time_is_up()
    assert not world.scheduler.state.deadline


def test_when_time_is_up_nothing_new_is_searched_and_the_finals_follow(tmp_path: Path) -> None:
    search = {"range_test": False, "pruner": "none"}
    world = World(study(methods=TWO, budget={"trials": 30}, search=search), tmp_path, CURVES)
    world.run(until=lambda w: len(w.order) > 9)
    world.scheduler.time_is_up()
    world.run()
    state = world.scheduler.state
    assert state.deadline
    assert 8 <= sum(len(searched(world, m)) for m in TWO) <= 14
    assert all(t.status != "running" for t in state.trials.values())
    assert len(state.of("lora", "final")) == 6
    assert state.winner is not None


def test_a_study_is_a_function_of_its_journal(tmp_path: Path) -> None:
    config = study(methods=TWO, search={**DESIGN, "range_test": False})
    whole = World(config, _made(tmp_path / "whole"), CURVES).run()
    half = World(config, _made(tmp_path / "half"), CURVES)
    half.run(until=lambda w: len(w.journal) > 60)
    again = World(config, tmp_path / "half", CURVES)
    assert {n: t.status for n, t in again.scheduler.state.trials.items()} == {
        n: t.status for n, t in half.scheduler.state.trials.items()
    }
    again._at, again.order = dict.fromkeys((t.name for t in again.scheduler.state.running()), 0), []
    again.run()
    assert set(again.scheduler.state.trials) == set(whole.scheduler.state.trials)
    assert again.scheduler.state.winner == whole.scheduler.state.winner
