"""What `auto` means: which sampler and pruner, and how many trials."""

from __future__ import annotations

from typing import Any

import pytest

from peft_study.config import StudyConfig, validate

RANGE: dict[str, Any] = {"rank": 16}
LISTS: dict[str, Any] = {"rank": [4, 16], "learning_rate": [1e-4, 1e-3, 1e-2]}
MANY: dict[str, Any] = {"rank": list(range(1, 52)), "learning_rate": [1e-4, 1e-3]}


@pytest.mark.parametrize(
    ("space", "trials", "search", "expected"),
    [
        (RANGE, None, {}, (12, "bayesian", "probability")),
        (RANGE, 100, {}, (100, "bayesian", "probability")),
        (RANGE, 101, {}, (101, "tpe", "successive_halving")),
        (LISTS, None, {}, (6, "bayesian", "probability")),
        (LISTS, 4, {}, (4, "bayesian", "probability")),
        (MANY, None, {}, (102, "grid", "successive_halving")),
        (LISTS, None, {"sampler": "random"}, (12, "random", "successive_halving")),
        (LISTS, None, {"sampler": "grid"}, (6, "grid", "successive_halving")),
        (RANGE, None, {"pruner": "none"}, (12, "bayesian", "none")),
        (RANGE, None, {"sampler": "tpe", "pruner": "probability"}, (12, "tpe", "probability")),
    ],
)
def test_auto(
    space: dict[str, Any], trials: int | None, search: dict[str, str], expected: tuple[int, str, str]
) -> None:
    values = {
        "model": {"name": "m"},
        "data": {"train": "d"},
        "methods": {"lora": space},
        "budget": {"trials": trials},
        "search": search,
        "output": "o",
    }
    filled = validate(StudyConfig, values, where="test").filled()
    assert (filled.budget.trials, filled.search.sampler, filled.search.pruner) == expected


def test_a_schedule_that_needs_a_warm_up_is_searched_without_none() -> None:
    values = {
        "model": {"name": "m"},
        "data": {"train": "d"},
        "methods": {"lora": {}, "wide": {"method": "lora", "warmup_ratio": [0.05, 0.2]}},
        "training": {"schedule": "constant_with_warmup"},
        "output": "o",
    }
    filled = validate(StudyConfig, values, where="test").filled()
    assert [space.warmup_ratio.choices for space in filled.methods.values()] == [(0.03, 0.1), (0.05, 0.2)]
