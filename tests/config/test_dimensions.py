"""Rates that are not said, and settings that take whole numbers."""

from __future__ import annotations

import pytest

from peft_study.config import METHODS, SPACES, Range, TrainingConfig


@pytest.mark.parametrize("given", [{"rank": 8}, {"rank": 8, "learning_rate": None}, {"learning_rate": None}])
def test_a_rate_that_is_null_is_searched_like_one_left_out(given: dict[str, object]) -> None:
    rates = METHODS["lora"].learning_rates
    assert rates is not None
    dimensions = SPACES["lora"](**given).filled(TrainingConfig()).dimensions()
    assert dimensions["learning_rate"] == Range(low=rates.low, high=rates.high, log=True)
    assert len(dimensions) == (1 if "rank" in given else 5)


def test_whole_numbers() -> None:
    whole = {method: {n for n in space.model_fields if space().whole(n)} for method, space in SPACES.items()}
    assert whole == {
        "lora": {"rank"},
        "prefix_tuning": {"tokens", "projection_hidden"},
        "prompt_tuning": {"tokens"},
        "none": set(),
        "full": set(),
    }
