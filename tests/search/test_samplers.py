"""What is tried next: a function of the seed and the earlier trials, spread over the space; and the copy for Optuna."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from scipy.stats import qmc

from peft_study.config import METHODS, MethodSpace, StudyConfig, TrainingConfig, validate
from peft_study.errors import OutputError
from peft_study.search.prior import RatePrior
from peft_study.search.samplers import SpaceSampler, export
from peft_study.search.trials import State, StudyState, TrialRecord

COUNTS = np.array([1])
SAMPLERS = ("bayesian", "tpe", "random", "quasi_random", "gp")


def space(**settings: Any) -> MethodSpace:
    values = {"model": {"name": "m"}, "data": {"train": "d"}, "methods": {"lora": settings}, "output": "o"}
    return validate(StudyConfig, values, where="test").methods["lora"].filled(TrainingConfig())


def sampler(kind: str, of: MethodSpace, seed: int = 0) -> SpaceSampler:
    return SpaceSampler("lora", of, kind, seed, COUNTS, prior=RatePrior(METHODS["lora"].learning_rates, 0.5))


def record(of: MethodSpace, number: int, values: dict[str, Any], status: State, loss: float) -> TrialRecord:
    settings = of.at(values, TrainingConfig())
    sums = {3: np.array([loss + 1])} | ({9: np.array([loss])} if status == "finished" else {})
    reason = None if status == "finished" else f"it is {status}"
    return TrialRecord(f"lora-{number:03d}", "lora", "search", number, values, settings, status, reason, sums)


def trained(kind: str, of: MethodSpace, count: int, trials: list[TrialRecord], seed: int = 0) -> list[dict[str, Any]]:
    """Adds trials up to `count`, whose loss is least at a rate of 1e-3, and returns the values of all."""
    suggests = sampler(kind, of, seed)
    for number in range(len(trials), count):
        values = suggests.suggest(trials, {}, {})
        loss = abs(math.log10(values["learning_rate"]) + 3)
        trials.append(record(of, number, values, "pruned" if number % 4 == 3 else "finished", loss))
    return [trial.values for trial in trials]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_restart_suggests_what_would_have_come(kind: str) -> None:
    whole = trained(kind, space(), 12, [])
    trials: list[TrialRecord] = []
    trained(kind, space(), 6, trials)
    assert trained(kind, space(), 12, trials) == whole, "a new sampler goes on with the trials that are there"
    assert trained(kind, space(), 4, [], seed=1) != whole[:4]


@pytest.mark.parametrize("kind", ["bayesian", "tpe", "gp"])
def test_a_diverged_trial_keeps_the_sampler_away(kind: str) -> None:
    """All rates above 1e-3 diverge: with that left out, half of the new trials would go there."""
    of = space(learning_rate={"low": 1e-5, "high": 1e-1, "log": True})
    draws, high = np.random.default_rng(0), []
    for status in ("diverged", "failed"):
        trials = []
        for number in range(20):
            rate = float(10 ** draws.uniform(-5, -1))
            bad = rate > 1e-3
            trials.append(record(of, number, {"learning_rate": rate}, status if bad else "finished", -math.log10(rate)))
        rates = []
        for seed in range(12):
            rates.append(sampler(kind, of, seed).suggest(trials, {}, {})["learning_rate"])
        high.append(sum(rate > 1e-3 for rate in rates))
    assert high[0] < high[1], "a failure says nothing about the setting, a divergence does"
    assert high[0] <= 4


def test_trials_under_way_count(tmp_path: Path) -> None:
    of, trials = space(), list[TrialRecord]()
    trained("tpe", of, 14, trials)
    running = record(of, 14, sampler("tpe", of).suggest(trials, {}, {}), "running", 0.0)
    # without it, number 15 would be drawn from the same model
    assert sampler("tpe", of).suggest([*trials, running], {}, {}) != running.values


def test_optuna_has_every_ended_trial_once_with_its_curve_and_reason(tmp_path: Path) -> None:
    of, state, path = space(), StudyState(), tmp_path / "optuna.db"
    trials: list[TrialRecord] = []
    trained("random", of, 4, trials)
    trials.append(record(of, 4, {**trials[0].values, "learning_rate": 1e-2}, "diverged", 9.0))
    trials.append(record(of, 5, {**trials[0].values, "learning_rate": 1e-3}, "running", 9.0))
    state.trials = {trial.name: trial for trial in trials}
    samplers = {"lora": sampler("random", of)}
    export(path, samplers, state)
    trials[5].status = "failed"
    export(path, samplers, state)
    found = optuna.load_study(study_name="lora", storage=f"sqlite:///{path}").trials
    assert [t.state.name for t in found] == ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED", "COMPLETE", "FAIL"]
    assert [t.user_attrs["name"] for t in found] == [trial.name for trial in trials]
    assert [t.params for t in found] == [trial.values for trial in trials]
    assert found[0].intermediate_values == {3: pytest.approx(found[0].value + 1), 9: pytest.approx(found[0].value)}
    assert (found[4].value, found[4].user_attrs["reason"]) == (math.inf, "it is diverged")


def test_a_database_that_is_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "optuna.db"
    path.write_text("something else, long enough to be taken for a header of SQLite" * 20)
    with pytest.raises(OutputError, match=r"optuna.db: cannot be written .*delete it: it is made again") as told:
        export(path, {"lora": sampler("random", space())}, StudyState())
    assert "\n" not in str(told.value)


def test_values_of_an_earlier_space_are_told_as_far_as_they_fit(tmp_path: Path) -> None:
    before = space(learning_rate={"low": 1e-6, "high": 1e-3, "log": True}, rank=[2, 8], dropout={"low": 0, "high": 0.5})
    now = space(learning_rate={"low": 1e-4, "high": 1e-2, "log": True}, rank=[8, 16])
    values = {"learning_rate": 2e-6, "rank": 2, "dropout": 0.25}
    trials = [record(before, n, {**values, "rank": rank}, "finished", 1.0) for n, rank in enumerate((2, 8))]
    told = sampler("tpe", now).frozen(trials, {})
    assert [t.params for t in told] == [{"learning_rate": 2e-6}, {"learning_rate": 2e-6, "rank": 8}]
    rates = [sampler("tpe", now, seed).suggest(trials * 6, {}, {})["learning_rate"] for seed in range(5)]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)


def test_a_quasi_random_design_is_scipys_over_the_space() -> None:
    of = space(learning_rate={"low": 1e-4, "high": 1e-2, "log": True})
    rates = [values["learning_rate"] for values in trained("quasi_random", of, 8, [])]
    shares = [math.log10(rate / 1e-4) / 2 for rate in rates]
    # eight points of a scrambled Sobol sequence: one in each eighth
    assert sorted(int(share * 8) for share in shares) == list(range(8))
    assert qmc.discrepancy(np.array(shares)[:, None]) < 0.01


def test_a_grid_visits_every_cell_once() -> None:
    of = space(learning_rate=[1e-4, 1e-3], rank=[4, 8, 16], target_modules={"choices": [["q_proj"], "all-linear"]})
    cells = trained("grid", of, 12, [])
    assert len({str(cell) for cell in cells}) == 12
    assert {cell["target_modules"] for cell in cells} == {("q_proj",), "all-linear"}


def test_bounds_that_moved_are_respected_and_whole_numbers_stay_whole() -> None:
    of = space(rank={"low": 4, "high": 64, "log": True})
    trials: list[TrialRecord] = []
    for number in range(8):
        values = sampler("quasi_random", of).suggest(
            trials, {"learning_rate": (1e-3, 3e-2)}, {"learning_rate": (1e-2, 3e-2)}
        )
        trials.append(record(of, number, values, "finished", 1.0))
        assert 1e-2 <= values["learning_rate"] <= 3e-2
        assert isinstance(values["rank"], int)
        assert 4 <= values["rank"] <= 64


def test_tpe_learns_where_losses_are_low() -> None:
    rates = [v["learning_rate"] for v in trained("tpe", space(), 30, [])]
    assert np.mean([abs(math.log10(rate) + 3) < 0.5 for rate in rates[15:]]) > 0.6
