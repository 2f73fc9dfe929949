"""Rules about how a run trains: each fires on its side of the threshold, and not on the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_study.config import METHODS
from peft_study.doctor.diagnosis import Diagnosis
from peft_study.doctor.observations import DataCounts, LossCurve, Observations, ParameterCounts, UsedSettings
from peft_study.doctor.rule import examine

HEALTHY: dict[str, Any] = {
    "method": "lora",
    "learning_rate": 2e-4,
    "optimizer": "adamw_torch",
    "warmup_steps": 6,
    "total_steps": 200,
    "batch_size": 8,
    "rank": 16,
    "alpha": 32.0,
    "narrowest": 192,
    "width": 576,
    "mean_of_means": False,
}
NO_LOSSES = np.empty(0)


def told(
    *, curve: LossCurve | None = None, base: int = 10**9, spread: float | None = None, **settings: Any
) -> Diagnosis:
    seen = Observations(
        settings=UsedSettings(**{**HEALTHY, **settings}),
        curve=curve,
        parameters=ParameterCounts(base=base, base_trainable=0, adapter=1, adapter_trainable=1),
        data=DataCounts(spread=spread),
    )
    return examine(seen, kinds=("settings",))


def levels(**settings: Any) -> dict[str, str]:
    return {problem.check: problem.level for problem in told(**settings).problems}


def losses(*values: float, start: float | None = None, base: float | None = None) -> LossCurve:
    steps = np.arange(1, len(values) + 1, dtype=float)
    return LossCurve(steps=steps, loss=np.array(values, dtype=float), start_loss=start, base_loss=base)


def test_a_healthy_run_is_silent() -> None:
    assert told(curve=losses(start=1.6, base=1.5)).problems == ()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "none"])
def test_a_methods_whole_range_is_silent_and_beyond_it_is_not(method: str) -> None:
    rates = METHODS[method].learning_rates
    assert rates is not None
    for rate in (rates.low, rates.default, rates.high):
        assert levels(method=method, learning_rate=rate) == {}
    assert levels(method=method, learning_rate=rates.high * 1.01) == {"rate_too_high": "warning"}
    assert levels(method=method, learning_rate=rates.high * 10) == {"rate_too_high": "error"}
    assert levels(method=method, learning_rate=rates.low * 0.99) == {"rate_too_low": "warning"}
    assert levels(method=method, learning_rate=rates.low / 10) == {"rate_too_low": "error"}


@pytest.mark.parametrize(
    ("method", "rate"),
    [
        # huggingface/peft method_comparison: rates at which these methods learned
        ("p_tuning", 1e-4),
        ("ia3", 1e-4),
        ("ia3", 5e-3),
        ("vera", 1e-3),
        ("adalora", 1e-4),
        ("lokr", 3e-3),
        ("oft", 1e-4),
        ("boft", 1e-4),
        ("adaption_prompt", 5e-3),
        ("c3a", 0.3),
        ("trainable_tokens", 0.2),
        ("full", 1e-5),
        ("prefix_tuning", 5e-3),
        ("prompt_tuning", 1e-3),
    ],
)
def test_rates_of_runs_that_learned_are_silent(method: str, rate: float) -> None:
    assert levels(method=method, learning_rate=rate) == {}


@pytest.mark.parametrize(("method", "rate"), [("fourierft", 1e-4), ("unilora", 1e-4), ("prompt_tuning", 1e-4)])
def test_rates_of_runs_that_learned_nothing_are_told(method: str, rate: float) -> None:
    assert list(levels(method=method, learning_rate=rate)) == ["rate_too_low"]


def test_the_case_of_the_original_names_the_range() -> None:
    (problem,) = told(method="prompt_tuning", learning_rate=1e-4, tokens=8).problems
    assert (problem.check, problem.level) == ("rate_too_low", "error")
    assert "0.0001, and prompt tuning is known to learn between 0.001 and 3, usually at 0.05" in problem.evidence.en
    assert problem.paste == "learning_rate: 0.05"


def test_lesters_rate_and_optimizer_are_fine_and_others_are_not_judged() -> None:
    assert levels(method="prompt_tuning", learning_rate=0.3, optimizer="adafactor", tokens=100) == {}
    for optimizer in ("sgd", "lion_32bit", "galore_adamw", "prodigy"):
        diagnosis = told(learning_rate=1.0, optimizer=optimizer)
        assert diagnosis.problems == ()
        assert {"rate_too_high", "rate_too_low"} <= set(diagnosis.unchecked)
    assert "rate_too_high" in told(method="a_new_one", learning_rate=1.0).unchecked


def test_a_prefix_through_an_mlp_takes_the_rate_of_li_and_liang() -> None:
    assert levels(method="prefix_tuning", learning_rate=5e-5, projection=True) == {}
    assert levels(method="prefix_tuning", learning_rate=5e-5) == {"rate_too_low": "warning"}


def test_small_models_bear_more_in_full_fine_tuning_alone() -> None:
    assert levels(method="full", learning_rate=1e-3, base=10**6) == {}
    assert levels(method="full", learning_rate=1e-3) == {"rate_too_high": "warning"}
    assert levels(learning_rate=2e-2, base=10**6) == {"rate_too_high": "warning"}


def test_a_run_that_learned_at_a_high_rate_is_believed() -> None:
    assert levels(learning_rate=2e-2, curve=losses(3, 3, 2, 2, 1, 1, 1, 1)) == {"rate_too_high": "note"}
    assert levels(learning_rate=2e-2, curve=losses(3, 3, 3, 3, 3, 3, 2.9, 2.9)) == {"rate_too_high": "warning"}
    assert levels(learning_rate=2e-2, curve=losses(3, 3, 2, np.nan, 1, 1, 1, 1)) == {"rate_too_high": "warning"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup_steps": 99}, {}),
        ({"warmup_steps": 100}, {"warmup_unusual": "warning"}),
        ({"warmup_steps": 200}, {"warmup_unusual": "warning"}),
        ({"warmup_steps": 0}, {}),
        ({"tokens": 300}, {}),
        ({"tokens": 301}, {"tokens_unusual": "warning"}),
        ({"method": "prompt_tuning", "learning_rate": 0.1, "tokens": 1}, {"tokens_unusual": "warning"}),
        ({"method": "prompt_tuning", "learning_rate": 0.1, "tokens": 2}, {}),
        ({"method": "prefix_tuning", "learning_rate": 0.01, "tokens": 1}, {}),
        ({"rank": 192, "alpha": 192.0}, {}),
        ({"rank": 193, "alpha": 193.0}, {"rank_unusual": "note"}),
        ({"rank": 1152, "alpha": 1152.0}, {"rank_unusual": "note"}),
        ({"rank": 1153, "alpha": 1153.0}, {"rank_unusual": "warning"}),
        ({"rank": 8, "alpha": 256.0}, {}),
        ({"rank": 8, "alpha": 257.0}, {"rank_unusual": "warning"}),
        ({"rank": 64, "alpha": 2.0}, {}),
        ({"rank": 64, "alpha": 1.9}, {"rank_unusual": "warning"}),
        ({"rank": 64, "alpha": 256.0, "rank_stabilised": True}, {}),
        ({"rank": 64, "alpha": 264.0, "rank_stabilised": True}, {"rank_unusual": "warning"}),
        ({"total_steps": 20, "warmup_steps": 0}, {}),
        ({"total_steps": 19, "warmup_steps": 0}, {"too_few_steps": "note"}),
        ({"total_steps": 5, "warmup_steps": 0}, {"too_few_steps": "note"}),
        ({"total_steps": 4, "warmup_steps": 0}, {"too_few_steps": "warning"}),
        ({"curve": losses(start=2.5, base=1.5)}, {}),
        ({"curve": losses(start=2.51, base=1.5)}, {"init_wrecks": "warning"}),
        ({"curve": losses(start=6.69, base=1.53)}, {"init_wrecks": "warning"}),
        ({"mean_of_means": True, "accumulation": 1}, {}),
        ({"mean_of_means": True, "accumulation": 2}, {"mean_of_means": "note"}),
        ({"mean_of_means": True, "accumulation": 2, "spread": 0.29}, {"mean_of_means": "note"}),
        ({"mean_of_means": True, "accumulation": 2, "spread": 0.3}, {"mean_of_means": "warning"}),
        ({"memory_bytes": 90, "free_bytes": 100}, {"memory": "note"}),
        ({"memory_bytes": 91, "free_bytes": 100}, {"memory": "error"}),
        ({"seconds": 90.0}, {"time": "note"}),
    ],
)
def test_each_side_of_a_threshold(settings: dict[str, Any], expected: dict[str, str]) -> None:
    assert levels(**settings) == expected


def test_notes_are_not_in_the_short_form() -> None:
    diagnosis = told(memory_bytes=1, free_bytes=2**30, seconds=600.0)
    assert not diagnosis.wrong
    assert diagnosis.short() == []
    assert "about 10 min" in diagnosis.text()


@pytest.mark.parametrize("value", [0, -1, 10**12, float("nan"), float("inf")])
def test_odd_numbers_raise_nothing(value: float) -> None:
    for name, known in {**HEALTHY, "seconds": 1.0, "memory_bytes": 1, "tokens": 1}.items():
        if type(known) in (int, float):
            told(**{name: value}, free_bytes=10)
    told(curve=losses(1, 2, 3, 4, start=value, base=value), learning_rate=1.0)


@pytest.mark.parametrize(("method", "check"), [("lora", "tokens_unusual"), ("prompt_tuning", "rank_unusual")])
def test_a_setting_that_the_method_does_not_have_is_not_missed(method: str, check: str) -> None:
    assert check not in told(method=method, rank=None, tokens=None).unchecked
    assert check in told(method=None, rank=None, tokens=None).unchecked
