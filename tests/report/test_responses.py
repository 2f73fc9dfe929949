"""Response curves against means by hand, and importances against functions whose shares are known."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest

from hand_made import COUNTS, RATE, HandMade
from peft_study.report.responses import IMPORTANCE_FROM, Response, importances, responses
from peft_study.search.trials import TrialRecord, value_of
from peft_study.statistics import mean_over_seeds


def curves(study: HandMade) -> dict[str, Response]:
    return {found.setting: found for found in responses(study.config, study.state, study.examples)}


def test_only_trials_that_ran_to_their_end_enter_a_mean(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": {"rank": [4, 8, 64], "learning_rate": [1e-3, 1e-2]}})
    for rank, gain in ((8, 0.5), (8, 0.3), (4, 0.1)):
        study.trial("lora", 1e-3, gain, rank=rank)
    study.trial("lora", 1e-2, -1.0, status="pruned", reason="worse", rank=8)
    study.trial("lora", 1e-2, None, rank=4)
    study.trial("lora", 1e-2, None, status="failed", reason="no memory", rank=64)
    study.chosen(lora=[0])
    study.finals("lora", 0, [0.9, 0.9, 0.9])
    found = curves(study)
    assert [(p.value, p.low, p.high, p.trials) for p in found["rank"].points] == [
        (4, 4, 4, ("lora-002",)),
        (8, 8, 8, ("lora-000", "lora-001")),
    ]
    assert [p.loss.value for p in found["rank"].points] == pytest.approx([1.9, 1.6])
    sums = [study.state.trials[name].last for name in ("lora-000", "lora-001")]
    by_hand = mean_over_seeds(np.stack([s for s in sums if s is not None]), COUNTS)
    assert found["rank"].points[1].loss == by_hand
    assert (found["rank"].log, found["learning_rate"].log) == (True, True)
    assert found["rank"].importance is None


def test_a_few_values_of_a_range_are_points_and_many_are_bins_of_five(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": RATE})
    rates = [10 ** (-4 + number / 10) for number in range(20)]
    for number in (7, 3, 9, 0, 1, 2, 4, 5, 6):
        study.trial("lora", rates[number], 0.1 * number)
    assert [point.value for point in curves(study)["learning_rate"].points] == pytest.approx(rates[:8] + rates[9:10])
    for number in (8, *range(10, 20)):
        study.trial("lora", rates[number], 0.1 * number)
    points = curves(study)["learning_rate"].points
    assert [(point.low, point.high) for point in points] == [(rates[i], rates[i + 4]) for i in range(0, 20, 5)]
    assert [point.value for point in points] == pytest.approx([rates[i] for i in (2, 7, 12, 17)]), "geometric means"
    assert [point.loss.value for point in points] == pytest.approx([2 - 0.1 * i for i in (2, 7, 12, 17)])


def test_values_that_are_no_numbers_keep_the_order_of_the_file(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"prefix_tuning": {"init": ["zero", "text"], "tokens": [10, 20, 30]}})
    for init, tokens in (("text", 30), ("zero", 10), ("text", 20)):
        study.trial("prefix_tuning", 1e-2, 0.3, init=init, tokens=tokens)
    found = curves(study)
    assert [point.value for point in found["init"].points] == ["zero", "text"]
    assert [point.value for point in found["tokens"].points] == [10, 20, 30]
    assert (found["init"].log, found["tokens"].log) == (False, False)


def made(tmp_path: Path, trials: int, slope: float, other: float) -> list[TrialRecord]:
    """Returns trials whose log loss is a sum of a rate's and a rank's parts, each uniform over its range."""
    study = HandMade(tmp_path / f"s{trials}", SPACE)
    rng = np.random.default_rng(1)
    for _ in range(trials):
        rate, rank, dropout = float(10 ** rng.uniform(-4, -2)), int(rng.integers(1, 257)), float(rng.uniform(0, 0.5))
        log_loss = slope * (math.log10(rate) + 4) / 2 + other * rank / 256 + 0.02 * rng.standard_normal()
        study.trial("lora", rate, 2 - math.exp(log_loss), rank=rank, dropout=dropout)
    return study.state.of("lora", "search")


SPACE = {
    "lora": {
        "rank": {"low": 1, "high": 256},
        "dropout": {"low": 0.0, "high": 0.5},
        "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    }
}


def test_importances_are_the_shares_of_the_variance(tmp_path: Path) -> None:
    """Of a + b with uniform a and b over 1 and 0.5 the shares are 1 / 1.25 and 0.25 / 1.25."""
    trials = made(tmp_path, 150, 1.0, 0.5)
    space = HandMade(tmp_path / "other", SPACE).config.methods["lora"].dimensions()
    found = importances(trials, space)
    assert found["learning_rate"].value == pytest.approx(0.8, abs=0.1)
    assert found["rank"].value == pytest.approx(0.2, abs=0.06)
    assert found["dropout"].value < 0.02
    for share, true in ((found["learning_rate"], 0.8), (found["rank"], 0.2), (found["dropout"], 0.0)):
        assert 0 <= share.low <= true <= share.high <= 1
    began = time.process_time()
    assert importances(trials, space) == found, "the same trials give the same numbers"
    assert time.process_time() - began < 1, "0.2 s on one free core"


def test_importances_take_thirty_trials_and_two_settings(tmp_path: Path) -> None:
    trials = made(tmp_path, IMPORTANCE_FROM, 1.0, 0.5)
    space = HandMade(tmp_path / "other", SPACE).config.methods["lora"].dimensions()
    assert set(importances(trials, space)) == {"rank", "dropout", "learning_rate"}
    assert importances(trials[:-1], space) == {}
    assert importances(trials, {"rank": space["rank"]}) == {}
    assert importances([trials[0]] * 40, space) == {}, "nothing varies"


def test_noise_is_no_importance(tmp_path: Path) -> None:
    trials = made(tmp_path, 60, 0.0, 0.0)
    space = HandMade(tmp_path / "other", SPACE).config.methods["lora"].dimensions()
    assert all(share.low == 0 for share in importances(trials, space).values())
    assert all(value_of(trial) > 0 for trial in trials)
