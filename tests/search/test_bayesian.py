"""The model of a method's losses, what it suggests, stops and recommends, on losses that are made up."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_study.config import LearningRates, MethodSpace, StudyConfig, TrainingConfig, validate
from peft_study.search.bayesian import BayesianSearch
from peft_study.search.prior import SPREADS, RatePrior, rate_prior
from peft_study.search.pruners import Unlikely
from peft_study.search.surrogate import WORST, Surrogate
from peft_study.search.trials import State, TrialRecord, best_first
from simulated import COUNTS, SPREAD, World, study, valley

STEPS = 36
RATES = {"low": 1e-5, "high": 1e-1, "log": True}
SEARCH = {"sampler": "bayesian", "pruner": "probability", "audit": 0.0}


def space(method: str = "lora", **settings: Any) -> MethodSpace:
    values = {"model": {"name": "m"}, "data": {"train": "d"}, "methods": {method: settings}, "output": "o"}
    return validate(StudyConfig, values, where="test").methods[method].filled(TrainingConfig())


def record(of: MethodSpace, number: int, values: dict[str, Any], at: dict[int, float], state: State) -> TrialRecord:
    """Returns a trial with losses a token at some steps."""
    settings = of.at(values, TrainingConfig(steps=STEPS)).model_copy(update={"rungs": (4, 12)})
    sums = {step: 10 * level + SPREAD - SPREAD.mean() for step, level in at.items()}
    return TrialRecord(f"lora-{number:03d}", "lora", "search", number, values, settings, state, None, sums)


def moving(rate: float, step: int) -> float:
    """Returns a loss whose best rate falls with the steps, from 1e-2 after 4 of 36 to 1e-3 after all."""
    best = -3 + math.log(STEPS / step) / math.log(9)
    return 1.0 + 0.3 * abs(math.log10(rate) - best) ** 2 + 0.2 * math.log(STEPS / step)


def test_losses_that_were_measured_are_predicted() -> None:
    of = space(learning_rate=RATES)
    trials = [record(of, n, {"learning_rate": 10.0**-n}, {0: 3.0, STEPS: 1 + 0.1 * n}, "finished") for n in range(1, 6)]
    mean_C, covariance_CC = Surrogate(of, trials, COUNTS).predict([trial.values for trial in trials])
    assert np.exp(mean_C) == pytest.approx([1.1, 1.2, 1.3, 1.4, 1.5], rel=0.01)
    assert np.sqrt(np.diag(covariance_CC)).max() < 0.02


def test_the_valley_that_moves_with_the_steps_is_followed() -> None:
    """Of most rates only the first rung is known, where 1e-2 is best; at the end 1e-3 is."""
    of = space(learning_rate=RATES)
    rates = [10.0**-e for e in (1.5, 2, 2.5, 3, 3.5, 4)]
    trials = []
    for number, rate in enumerate(rates):
        steps = (4, 12, STEPS) if number in (1, 4) else (4,)
        at = {0: 3.0} | {step: moving(rate, step) for step in steps}
        trials.append(record(of, number, {"learning_rate": rate}, at, "finished" if STEPS in at else "pruned"))
    model, line = Surrogate(of, trials, COUNTS), np.geomspace(1e-5, 1e-1, 81)
    settings = [{"learning_rate": float(rate)} for rate in line]
    early = line[model.predict(settings, share=4 / STEPS)[0].argmin()]
    late = line[model.predict(settings)[0].argmin()]
    assert early == pytest.approx(1e-2, rel=0.5)
    assert late < early / 3


def test_what_diverged_is_the_worst_and_what_failed_says_nothing() -> None:
    of = space(learning_rate=RATES)
    good = record(of, 0, {"learning_rate": 1e-3}, {0: 3.0, STEPS: 1.0}, "finished")
    diverged = record(of, 1, {"learning_rate": 1e-1}, {0: 3.0, 4: 1e9}, "diverged")
    failed = record(of, 2, {"learning_rate": 1e-5}, {0: 3.0, 4: 1.0}, "failed")
    model = Surrogate(of, [good, diverged, failed], COUNTS)
    mean_C, covariance_CC = model.predict([{"learning_rate": rate} for rate in (1e-3, 1e-1, 1e-5)])
    assert np.exp(mean_C[:2]) == pytest.approx([1.0, 3.0 * WORST], rel=0.05)
    assert covariance_CC[2, 2] > 10 * covariance_CC[0, 0], "as if it had not been tried"


@pytest.mark.parametrize(
    ("method", "steps", "rate"),
    [
        ("lora", 120, 1e-3),
        ("lora", 480, 1e-3 * 4**-0.26),
        ("prefix_tuning", 5000, 4e-2),
        ("prompt_tuning", 36, 0.05),
    ],
)
def test_the_first_trial_is_the_known_default(method: str, steps: int, rate: float) -> None:
    of = space(method, space="default")
    first = BayesianSearch(of, COUNTS, rate_prior(of, steps, informed=True), 0).suggest([], {})
    assert first["learning_rate"] == pytest.approx(rate, rel=0.25), "a candidate of a line of 33 rates"
    assert first["warmup_ratio"] == 0.03
    assert method in SPREADS


def test_the_known_best_rate_moves_with_tokens_initialisation_and_steps() -> None:
    rates = LearningRates(0.02, 1e-3, 3.0, size=8, exponent=-1.0, inits={"random": 10.0})
    known = RatePrior(rates, 0.5)
    assert known.centre({"tokens": 8, "init": "text"}) == pytest.approx(math.log10(0.02))
    assert known.centre({"tokens": 80, "init": "text"}) == pytest.approx(math.log10(0.002))
    assert known.centre({"tokens": 8, "init": "random"}) == pytest.approx(math.log10(0.2))
    assert RatePrior(rates, 0.5, 0.5).centre({"tokens": 8, "init": "text"}) == pytest.approx(math.log10(0.01))
    assert rate_prior(space(space="default"), 480, informed=True).factor == pytest.approx(4**-0.26)


def test_without_the_prior_it_begins_in_the_middle() -> None:
    of = space(learning_rate=RATES)
    first = BayesianSearch(of, COUNTS, rate_prior(of, STEPS, informed=False), 0).suggest([], {})
    assert first["learning_rate"] == pytest.approx(1e-3)


def test_the_first_trials_vary_the_rate_alone_and_lie_apart() -> None:
    of = space(space="default")
    search, trials = BayesianSearch(of, COUNTS, rate_prior(of, STEPS, informed=True), 0), list[TrialRecord]()
    for number in range(3):
        trials.append(record(of, number, search.suggest(trials, {}), {}, "running"))
    rates = sorted(trial.values["learning_rate"] for trial in trials)
    assert all(high > 2 * low for low, high in itertools.pairwise(rates))
    assert len({str(dict(trial.values, learning_rate=None)) for trial in trials}) == 1


def test_no_rate_is_tried_that_others_lie_next_to(tmp_path: Path) -> None:
    """On a valley without noise the largest expected improvement is always next to the best trial."""
    config = study(methods={"lora": {"learning_rate": RATES}}, search=SEARCH, budget={"trials": 12})
    state = World(config, tmp_path, {"lora": valley(1e-3)}).run().scheduler.state
    rates = sorted(math.log10(trial.values["learning_rate"]) for trial in state.of("lora", "search"))
    assert len(rates) == 12
    assert min(high - low for low, high in itertools.pairwise(rates)) > 0.1


def test_what_is_suggested_lies_in_the_range_that_was_widened() -> None:
    of = space("prefix_tuning", tokens={"low": 10, "high": 100, "log": True}, learning_rate=RATES)
    search = BayesianSearch(of, COUNTS, rate_prior(of, STEPS, informed=True), 0)
    trials = [record(of, 0, {"tokens": 90, "learning_rate": 1e-2}, {0: 3.0, STEPS: 1.0}, "finished")]
    assert search.suggest(trials, {"tokens": (101, 300), "learning_rate": (1e-5, 1e-1)})["tokens"] >= 101
    found = search.suggest(trials, {"learning_rate": (0.11, 0.3)})
    assert 0.11 <= found["learning_rate"] <= 0.3


def test_a_method_whose_settings_are_all_fixed(tmp_path: Path) -> None:
    fixed = {"lora": {"learning_rate": 1e-3, "rank": 8}, "prompt_tuning": {"learning_rate": [0.1, 0.3]}}
    config = study(methods=fixed, search=SEARCH, budget={"trials": 4}, finals={"best": 1, "seeds": 1})
    state = World(config, tmp_path, {"lora": valley(1e-3), "prompt_tuning": valley(0.3)}).run().scheduler.state
    assert [trial.values for trial in state.of("lora", "search")] == [{}]
    assert state.recommended["lora"].rates is None
    assert state.winner is not None
    assert state.setting(*state.winner).values == {"learning_rate": 0.3}


def test_where_every_setting_was_tried_one_is_tried_again() -> None:
    of = space(rank={"low": 1, "high": 3}, learning_rate=1e-3)
    trials = [record(of, n, {"rank": n + 1}, {48: 1.0 + n}, "finished") for n in range(3)]
    search = BayesianSearch(of, COUNTS, None, 0)
    assert search.suggest(trials, {})["rank"] in (1, 2, 3)


def test_earlier_trials_may_lie_outside_a_range_that_is_searched_later() -> None:
    """A weight decay of 0, then of 0.001 to 0.1 on the log scale; a projection of none, then of 16 or 64."""
    was = space(learning_rate=[1e-4, 1e-3, 1e-2])
    of = space(learning_rate=[1e-4, 1e-3, 1e-2], weight_decay={"low": 1e-3, "high": 0.1, "log": True})
    trials = [record(was, n, {"learning_rate": rate}, {48: 1.0 + n}, "finished") for n, rate in enumerate((1e-4, 1e-3))]
    assert trials[0].settings.flat["weight_decay"] == 0
    found = BayesianSearch(of, COUNTS, None, 0).suggest(trials, {})
    assert 1e-3 <= found["weight_decay"] <= 0.1


def test_a_fixed_rate_beside_other_settings() -> None:
    of = space(learning_rate=1e-3, rank=[4, 16, 64], dropout={"low": 0.0, "high": 0.2})
    search, trials = BayesianSearch(of, COUNTS, None, 0), list[TrialRecord]()
    for number in range(6):
        values = search.suggest(trials, {})
        loss = 1.0 + values["dropout"] + 0.1 * (values["rank"] != 16)
        trials.append(record(of, number, values, {0: 3.0, STEPS: loss}, "finished"))
    found = search.recommended(trials, {})
    assert found is not None
    assert found.values["rank"] == 16
    assert found.values["dropout"] < 0.05


def test_who_can_hardly_win_stops() -> None:
    of = space(learning_rate=RATES)
    best = record(of, 0, {"learning_rate": 1e-3}, {0: 3.0, 4: 1.5, 12: 1.2, STEPS: 1.0}, "finished")
    other = record(of, 1, {"learning_rate": 3e-4}, {0: 3.0, 4: 2.0, 12: 1.6, STEPS: 1.4}, "finished")
    far = record(of, 2, {"learning_rate": 1e-5}, {0: 3.0, 4: 2.99}, "running")
    near = record(of, 3, {"learning_rate": 2e-3}, {0: 3.0, 4: 1.45}, "running")
    trials = [best, other, far, near]
    rule = Unlikely(lambda _method: Surrogate(of, trials, COUNTS))
    why = rule.judge(far, trials[:2], 4, COUNTS)
    assert why is not None
    assert why.startswith("a chance of ")
    assert why.endswith(" to end below lora-000")
    assert rule.judge(near, trials[:2], 4, COUNTS) is None
    assert rule.judge(far, [], 4, COUNTS) is None, "nothing to compare with"


def test_the_better_one_at_its_rung_goes_on() -> None:
    """Losses of two rates as measured on GSM8K: the fall of the worse one made the model believe that it would win."""
    of = space(learning_rate=RATES)
    slow = record(of, 0, {"learning_rate": 5.2e-4}, {0: 1.42, 4: 1.103, 12: 0.972}, "running")
    fast = record(of, 1, {"learning_rate": 1.4e-3}, {0: 1.42, 4: 1.008, 12: 0.956}, "running")
    lost = record(of, 2, {"learning_rate": 1.9e-4}, {0: 1.42, 4: 1.225}, "pruned")
    trials = [slow, fast, lost]
    model = Surrogate(of, trials, COUNTS)
    mean_C, _ = model.predict([trial.values for trial in trials])
    assert mean_C[0] < mean_C[1], "what the model believes"
    assert Unlikely(lambda _method: model).judge(fast, [slow, lost], 12, COUNTS) is None


def test_the_noise_of_the_dev_rows_counts() -> None:
    """The same means; where single examples differ by much, the order at the rung says less."""
    of = space(learning_rate=RATES)
    scattered = 400 * np.random.default_rng(1).permutation(np.linspace(-1, 1, len(COUNTS)))
    found = []
    for noise_N in (np.zeros(len(COUNTS)), scattered):
        best = record(of, 0, {"learning_rate": 1e-3}, {0: 9.0, 4: 8.0, 12: 7.5, STEPS: 7.0}, "finished")
        other = record(of, 1, {"learning_rate": 1e-4}, {0: 9.0, 4: 8.8, 12: 8.7, STEPS: 8.6}, "finished")
        third = record(of, 2, {"learning_rate": 1e-5}, {0: 9.0, 4: 8.98}, "running")
        third.sums[4] = third.sums[4] + noise_N
        model = Surrogate(of, [best, other, third], COUNTS)
        found.append(Unlikely(lambda _method, model=model: model).judge(third, [best, other], 4, COUNTS))
    assert found[0] is not None
    assert found[1] is None


def test_a_recommendation_keeps_its_promise() -> None:
    """Of random valleys, the distance to the best is below the promised one in nine of ten, and that one shrinks."""
    of = space(learning_rate=RATES)
    kept, widths = [], []
    draws = np.random.default_rng(0)
    for _ in range(30):
        best, width = draws.uniform(-4.5, -1.5), draws.uniform(0.1, 0.4)

        def loss(rate: float, best: float = best, width: float = width) -> float:
            return 1.0 + width * (math.log10(rate) - best) ** 2

        search, trials = BayesianSearch(of, COUNTS, rate_prior(of, STEPS, informed=False), 0), list[TrialRecord]()
        for number in range(8):
            values = search.suggest(trials, {})
            at = {0: 3.0, STEPS: loss(values["learning_rate"])}
            trials.append(record(of, number, values, at, "finished"))
            if number in (3, 7):
                found = search.recommended(trials, {})
                assert found is not None
                assert found.rates is not None
                kept.append(loss(found.values["learning_rate"]) - 1.0 <= found.within + 1e-3)
                widths.append((number, found.within))
    assert np.mean(kept) >= 0.85
    medians = [float(np.median([width for number, width in widths if number == last])) for last in (3, 7)]
    assert medians[1] < medians[0] / 2
    assert medians[1] < 0.02


def test_nothing_measured_is_no_recommendation() -> None:
    of = space(learning_rate=RATES)
    assert BayesianSearch(of, COUNTS, rate_prior(of, STEPS, informed=False), 0).recommended([], {}) is None


def test_what_was_stopped_is_not_recommended() -> None:
    """Between two good rates the model expects a better one; it was stopped, so it is not what is recommended."""
    of = space(learning_rate=[3e-4, 1e-3, 3e-3])
    between = record(of, 2, {"learning_rate": 1e-3}, {0: 3.0, 4: 1.3, 12: 0.95}, "running")
    trials = [
        record(of, 0, {"learning_rate": 3e-4}, {0: 3.0, 4: 1.6, 12: 1.2, STEPS: 1.01}, "finished"),
        record(of, 1, {"learning_rate": 3e-3}, {0: 3.0, 4: 1.6, 12: 1.2, STEPS: 1.0}, "finished"),
        between,
    ]
    search, found = BayesianSearch(of, COUNTS, None, 0), []
    states: tuple[State, ...] = ("running", "pruned")
    for between.status in states:
        recommended = search.recommended(trials, {})
        assert recommended is not None
        found.append(recommended.values["learning_rate"])
    assert found == [1e-3, 3e-3]


def searched(folder: Path, best: float, **search: Any) -> tuple[float, float]:
    """Runs a study of LoRA alone: by how many decades its best rate is off, and how many whole trials it took."""
    folder.mkdir()
    config = study(search={"range_test": False, **search}, budget={"trials": 10}, finals={"best": 0})
    world = World(config, folder, {"lora": valley(best)}, slots=2).run()
    trials = world.scheduler.state.of("lora", "search")
    taken = [max(trial.sums) / (trial.settings.training.steps or 1) for trial in trials]
    return abs(math.log10(best_first(trials)[0].values["learning_rate"] / best)), sum(taken)


def test_it_comes_nearer_to_the_best_than_a_design_of_the_space(tmp_path: Path) -> None:
    draws, away, taken = np.random.default_rng(3), list[tuple[float, ...]](), list[tuple[float, ...]]()
    for turn in range(6):
        best = float(10 ** draws.uniform(-4.5, -2.5))
        found = [
            searched(tmp_path / f"model-{turn}", best, **SEARCH, prior=False, seed=turn),
            searched(tmp_path / f"whole-{turn}", best, **{**SEARCH, "pruner": "none"}, prior=False, seed=turn),
            searched(tmp_path / f"design-{turn}", best, sampler="quasi_random", pruner="none", seed=turn),
        ]
        away.append(tuple(distance for distance, _ in found))
        taken.append(tuple(trials for _, trials in found))
    model, whole, design = np.mean(away, axis=0)
    assert model < 0.8 * design
    assert model < whole + 0.05, "what was stopped was not the best"
    assert np.mean(taken, axis=0)[0] < np.mean(taken, axis=0)[1] - 0.5


def test_a_study_ends_where_its_best_is_known(tmp_path: Path) -> None:
    both = {"lora": {"learning_rate": RATES}, "prefix_tuning": {}}
    curves = {"lora": valley(1e-3), "prefix_tuning": valley(1e-2, depth=0.8)}
    config = study(methods=both, search={**SEARCH, "stop": 0.02}, budget={"trials": 30}, finals={"best": 1, "seeds": 2})
    world = World(config, tmp_path, curves).run()
    state = world.scheduler.state
    for method in both:
        assert state.settled(method, config)
        assert len(state.of(method, "search")) < 25
        assert state.to_come(method, config, state.due(method, config)) == 0, "also for status and the time left"
        assert len(state.of(method, "final")) == 2
        assert not state.untuned(method, config), "fewer trials because it is known, so it is ranked"
    assert state.winner is not None
    assert state.winner[0] == "lora"
    rate = state.recommended["lora"].values["learning_rate"]
    assert abs(math.log10(rate) + 3) < 0.2
    low, high = state.recommended["lora"].rates or (0, 0)
    assert low <= rate <= high
    again = World(config, tmp_path, curves)
    assert again.scheduler.state.recommended == state.recommended


def test_a_restart_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    config = study(search=SEARCH, budget={"trials": 8}, finals={"best": 1, "seeds": 1})
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = World(config, tmp_path / "whole", {"lora": valley(1e-3)}, slots=1).run()
    World(config, tmp_path / "parts", {"lora": valley(1e-3)}, slots=1).run(
        until=lambda world: len(world.scheduler.state.trials) == 5
    )
    parts = World(config, tmp_path / "parts", {"lora": valley(1e-3)}, slots=1).run()
    assert {n: t.values for n, t in parts.scheduler.state.trials.items()} == {
        n: t.values for n, t in whole.scheduler.state.trials.items()
    }


def test_a_changed_space_learns_from_the_earlier_trials(tmp_path: Path) -> None:
    """They have no value of a dimension that is new, but a setting."""
    before = study(methods={"lora": {"learning_rate": RATES}}, search=SEARCH, budget={"trials": 4}, finals={"best": 0})
    after = study(
        methods={"lora": {"learning_rate": RATES, "rank": [8, 16, 64], "target_modules": ["all-linear", ["q_proj"]]}},
        search=SEARCH,
        budget={"trials": 4},
        finals={"best": 0},
    )
    world = World(before, tmp_path, {"lora": valley(1e-3)}).run().changed(after, "lora").run()
    trials = world.scheduler.state.of("lora", "search")
    assert len(trials) == 8
    assert abs(math.log10(trials[4].values["learning_rate"]) + 3) < 1, "near the valley that the first four showed"


def test_a_grid_is_tried_cell_by_cell(tmp_path: Path) -> None:
    lists = {"lora": {"learning_rate": [1e-4, 1e-3, 1e-2], "rank": [4, 16]}}
    config = study(methods=lists, search=SEARCH, budget={"trials": 20}, finals={"best": 0})
    world = World(config, tmp_path, {"lora": valley(1e-3)}).run()
    trials = world.scheduler.state.of("lora", "search")
    values = [(trial.values["learning_rate"], trial.values["rank"]) for trial in trials]
    assert sorted(values) == sorted({(rate, rank) for rate in (1e-4, 1e-3, 1e-2) for rank in (4, 16)})
