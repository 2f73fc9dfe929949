"""Who is stopped at a rung: against Optuna's own pruners, and inside and outside the noise."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_study.config import NoneConfig, TrainingConfig, TrialSettings
from peft_study.search.pruners import Median, Never, SuccessiveHalving, pruner, rungs
from peft_study.search.surrogate import Surrogate
from peft_study.search.trials import TrialRecord

STEP = 3
COUNTS = np.full(32, 10, dtype=np.int64)
SPREAD = np.random.default_rng(0).normal(0, 3, 32)
SETTINGS = TrialSettings(method=NoneConfig(), training=TrainingConfig(steps=9))


def losses(level: float) -> npt.NDArray[np.float64]:
    """Losses that differ from those of another level by the same on every example: no noise between them."""
    return 10 * level + SPREAD


def trial(name: str, losses_N: npt.NDArray[np.float64]) -> TrialRecord:
    """Returns a trial that came to the rung with these losses."""
    return TrialRecord(name, "lora", "search", 0, {}, SETTINGS, sums={STEP: losses_N})


def optuna_stops(rule: optuna.pruners.BasePruner, levels: list[float], step: int) -> list[bool]:
    """What Optuna decides about trials that come to a step one after another, each run to its end if not stopped."""
    study = optuna.create_study(pruner=rule)
    stopped = []
    for level in levels:
        trial = study.ask()
        trial.report(level, step)
        stopped.append(trial.should_prune())
        study.tell(trial, level, state=optuna.trial.TrialState.COMPLETE)
    return stopped


def ours(rule: SuccessiveHalving | Median, levels: list[float]) -> list[bool]:
    trials = [trial(str(number), losses(level)) for number, level in enumerate(levels)]
    return [rule.judge(t, trials[:number], STEP, COUNTS) is not None for number, t in enumerate(trials)]


distinct = st.lists(st.integers(1, 1000), min_size=1, max_size=14, unique=True).map(lambda x: [v / 100 for v in x])


@given(distinct, st.integers(2, 4))
def test_without_noise_successive_halving_is_optunas(levels: list[float], reduction: int) -> None:
    rule = optuna.pruners.SuccessiveHalvingPruner(min_resource=3, reduction_factor=reduction)
    assert ours(SuccessiveHalving(reduction), levels) == optuna_stops(rule, levels, 3)


@given(distinct.filter(lambda levels: len(levels) % 2 == 0))
def test_without_noise_the_median_rule_is_optunas(levels: list[float]) -> None:
    """With an odd number of others; of an even one Optuna takes the mean of two, and we the worse of them."""
    rule = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=0)
    found, expected = ours(Median(), levels), optuna_stops(rule, levels, 3)
    assert found[1::2] == expected[1::2]


def test_a_difference_inside_the_noise_stops_nobody() -> None:
    wild = np.random.default_rng(1).normal(0, 10, 32)
    best, rule = trial("a", losses(1.0)), SuccessiveHalving(3)
    assert rule.judge(trial("b", losses(1.05) + wild - wild.mean()), [best], STEP, COUNTS) is None
    found = rule.judge(trial("b", losses(1.05)), [best], STEP, COUNTS)
    assert found is not None
    assert found.startswith("worse than a by 0.0500 (95 %: at least 0.0500)")


def test_never_stops_nobody() -> None:
    def unused(_method: str) -> Surrogate:
        raise AssertionError("nothing is asked of a model")

    rule = pruner("none", 3, unused)
    assert isinstance(rule, Never)
    assert rule.judge(trial("b", losses(9.0)), [trial("a", losses(1.0))], STEP, COUNTS) is None


@pytest.mark.parametrize(
    ("total", "reduction", "warmup_end", "expected"),
    [
        (900, 3, 0, (100, 300)),
        (900, 3, 99, (100, 300)),
        (900, 3, 100, (300,)),  # no decision before the longest warm-up has ended
        (900, 3, 450, ()),
        (24, 3, 2, (3, 8)),
        (2, 3, 0, (1,)),
        (1, 3, 0, ()),
        (100, 2, 0, (25, 50)),
    ],
)
def test_rungs_lie_between_the_longest_warmup_and_the_end(
    total: int, reduction: int, warmup_end: int, expected: tuple[int, ...]
) -> None:
    assert rungs(total, reduction, warmup_end) == expected
