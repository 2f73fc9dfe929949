"""What is tried next: repeatable after a restart, spread over the space, and a database that comes and goes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from scipy.stats import qmc
from sqlalchemy.exc import OperationalError

from peft_study.config import MethodSpace, StudyConfig, TrainingConfig, validate
from peft_study.errors import ConfigError, OutputError
from peft_study.search import samplers
from peft_study.search.samplers import Suggestions, open_storage, reliably

SAMPLERS = ("tpe", "random", "quasi_random", "gp")


def space(**settings: Any) -> MethodSpace:
    values = {"model": {"name": "m"}, "data": {"train": "d"}, "methods": {"lora": settings}, "output": "o"}
    return validate(StudyConfig, values, where="test").methods["lora"].filled(TrainingConfig())


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'optuna.db'}"


def suggestions(url: str, sampler: str, of: MethodSpace, seed: int = 0) -> Suggestions:
    return Suggestions(open_storage(url), "lora", "lora", of, sampler, seed)


def told(book: Suggestions, count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Asks for trials and tells a loss that is least at a rate of 1e-3."""
    found = []
    for number in range(start, count):
        values = book.ask(number, {})
        found.append(values)
        loss = abs(math.log10(values["learning_rate"]) + 3)
        book.report(number, 3, loss + 1)
        book.tell(number, "pruned" if number % 4 == 3 else "finished", loss, {})
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_restart_goes_on_as_if_there_had_been_none(url: str, tmp_path: Path, sampler: str) -> None:
    whole = told(suggestions(url, sampler, space()), 12)
    other = f"sqlite:///{tmp_path / 'other.db'}"
    told(suggestions(other, sampler, space()), 6)
    again = suggestions(other, sampler, space())
    assert [again.ask(number, {}) for number in range(6)] == whole[:6], "what was asked for before is given again"
    assert told(again, 12, start=6) == whole[6:]
    assert whole[:1] != told(suggestions(f"sqlite:///{tmp_path / 'third.db'}", sampler, space(), seed=1), 1)


def test_a_trial_that_a_dead_process_left_running_is_given_out_again(url: str) -> None:
    first = suggestions(url, "random", space())
    values = first.ask(0, {})
    second = suggestions(url, "random", space())
    assert second.ask(0, {}) == values
    second.tell(0, "finished", 1.0, {})
    (trial,) = optuna.load_study(study_name="lora", storage=url).trials
    assert (trial.state, trial.value) == (optuna.trial.TrialState.COMPLETE, 1.0)


@pytest.mark.parametrize("written", [0, 1, 3])
@pytest.mark.parametrize("sampler", ["tpe", "quasi_random"])
def test_a_trial_that_a_kill_left_half_made_is_filled_up(url: str, sampler: str, written: int) -> None:
    """Optuna makes the row first and then commits each value."""
    of = space(space="default")
    whole = told(suggestions(f"{url}.whole", sampler, of), 13)
    told(suggestions(url, sampler, of), 12)
    study = optuna.load_study(study_name="lora", storage=url)
    half = study.ask()
    names = list(of.dimensions())[:written]
    book = suggestions(url, sampler, of)
    for name in names:
        distribution = book._distribution(name, of.dimensions()[name], {})
        value = distribution.to_internal_repr(whole[12][name])
        book._storage.set_trial_param(half._trial_id, name, value, distribution)
    again = suggestions(url, sampler, of)
    assert again.ask(12, {}) == whole[12]
    assert len(optuna.load_study(study_name="lora", storage=url).trials) == 13


def test_an_answer_that_was_lost_is_no_second_trial(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "RETRY_SECONDS", (0.0, 0.0))
    book = suggestions(url, "random", space(space="default"))
    real, calls = optuna.storages.RDBStorage._set_trial_param, [0]

    def drop(self: Any, *arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OperationalError("INSERT", {}, Exception("connection reset"))
        real(self, *arguments)

    monkeypatch.setattr(optuna.storages.RDBStorage, "_set_trial_param", drop)
    assert set(book.ask(0, {})) == set(space(space="default").dimensions())
    assert calls[0] > 2
    assert [t.number for t in optuna.load_study(study_name="lora", storage=url).trials] == [0]


def test_optuna_has_every_trial_with_its_curve_and_reason(url: str) -> None:
    book = suggestions(url, "random", space())
    told(book, 4)
    book.ask(4, {})
    book.tell(4, "diverged", None, {"reason": "the loss became nan at step 3"})
    book.tell(4, "finished", 0.0, {})  # what was told stays
    trials = optuna.load_study(study_name="lora", storage=url).trials
    assert [t.state.name for t in trials] == ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED", "FAIL"]
    assert trials[0].intermediate_values == {3: pytest.approx(trials[0].value + 1)}
    assert trials[4].user_attrs["reason"] == "the loss became nan at step 3"


def test_a_quasi_random_design_is_scipys_over_the_space(url: str) -> None:
    book = suggestions(url, "quasi_random", space(learning_rate={"low": 1e-4, "high": 1e-2, "log": True}))
    rates = [book.ask(number, {})["learning_rate"] for number in range(8)]
    shares = [math.log10(rate / 1e-4) / 2 for rate in rates]
    # eight points of a scrambled Sobol sequence: one in each eighth
    assert sorted(int(share * 8) for share in shares) == list(range(8))
    assert qmc.discrepancy(np.array(shares)[:, None]) < 0.01


def test_a_grid_visits_every_cell_once(url: str) -> None:
    of = space(learning_rate=[1e-4, 1e-3], rank=[4, 8, 16], target_modules={"choices": [["q_proj"], "all-linear"]})
    book = suggestions(url, "grid", of)
    cells = [book.ask(number, {}) for number in range(12)]
    assert len({str(cell) for cell in cells}) == 12
    assert {cell["target_modules"] for cell in cells} == {("q_proj",), "all-linear"}


def test_bounds_that_moved_are_respected_and_whole_numbers_stay_whole(url: str) -> None:
    of = space(rank={"low": 4, "high": 64, "log": True})
    book = suggestions(url, "quasi_random", of)
    for number in range(8):
        values = book.ask(number, {"learning_rate": (1e-2, 3e-2)})
        assert 1e-2 <= values["learning_rate"] <= 3e-2
        assert isinstance(values["rank"], int)
        assert 4 <= values["rank"] <= 64


def test_tpe_learns_where_losses_are_low(url: str) -> None:
    rates = [v["learning_rate"] for v in told(suggestions(url, "tpe", space()), 30)]
    assert np.mean([abs(math.log10(rate) + 3) < 0.5 for rate in rates[15:]]) > 0.6


def broken(times: int, sequence: list[int]) -> Any:
    def call() -> str:
        sequence.append(1)
        if len(sequence) <= times:
            raise OperationalError("SELECT 1", {}, Exception("connection refused"))
        return "there"

    return call


def test_a_database_that_comes_back_is_waited_for() -> None:
    calls: list[int] = []
    assert reliably(broken(2, calls), waits=(0, 0, 0)) == "there"
    assert len(calls) == 3


def test_a_database_that_stays_away_is_one_line() -> None:
    with pytest.raises(
        OutputError, match=r"storage: the database cannot be used \(.*connection refused\).*nothing is lost"
    ):
        reliably(broken(9, []), waits=(0, 0))


def test_an_unreachable_database_and_bad_urls_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(samplers, "RETRY_SECONDS", (0,))
    with pytest.raises(OutputError, match="the database cannot be used"):
        open_storage(f"sqlite:///{tmp_path / 'no-such-folder' / 'x.db'}")
    with pytest.raises(ConfigError, match="is no database URL"):
        open_storage("postgres//")
    with pytest.raises(
        ConfigError, match=r"postgresql://\.\.\.@host/db: its driver is not installed .*pip install"
    ) as told:
        open_storage("postgresql://user:secret@host/db")
    assert "secret" not in str(told.value)
