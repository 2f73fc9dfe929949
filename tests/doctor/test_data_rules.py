"""Rules about the examples: each fires on its side of the threshold, and not on the other."""

from __future__ import annotations

from typing import Any

import pytest

from peft_study.doctor.diagnosis import Diagnosis
from peft_study.doctor.observations import DataCounts, Observations
from peft_study.doctor.rule import examine

HEALTHY: dict[str, Any] = {
    "rows": 1000,
    "tokens": 200_000,
    "supervised": 80_000,
    "conversations": True,
    "truncated": 4,
    "unsupervised": 0,
    "max_length": 1024,
    "longest": 1024,
    "context": 2048,
    "bos_checked": True,
    "double_bos": 0,
    "no_end": 5,
    "shifted": False,
    "duplicates": 9,
    "held_out_rows": 100,
    "overlap": 0,
    "largest_source": ("chat", 0.6),
    "template": "tulu",
    "tuned_template": "tulu",
}


def told(**counts: Any) -> Diagnosis:
    return examine(Observations(data=DataCounts(**{**HEALTHY, **counts})), kinds=("data",))


def levels(**counts: Any) -> dict[str, str]:
    return {problem.check: problem.level for problem in told(**counts).problems}


def test_healthy_data_are_silent_and_all_of_it_is_checked() -> None:
    diagnosis = told()
    assert diagnosis.problems == ()
    assert len(diagnosis.checked) == 12
    assert diagnosis.unchecked == {}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"template": "tulu", "tuned_template": "own"}, {"template_differs": "note"}),
        ({"missing_bos": "<s>"}, {"missing_bos": "warning"}),
        ({"double_bos": 10}, {"double_bos": "warning"}),
        ({"double_bos": 9}, {}),
        ({"no_end": 499}, {"no_end_token": "warning"}),
        ({"no_end": 497}, {"no_end_token": "note"}),
        ({"no_end": 9}, {}),
        ({"shifted": True}, {"labels_shifted": "error"}),
        ({"shifted": True, "no_end": 999}, {"labels_shifted": "error"}),
        ({"supervised": 200_000}, {"nothing_masked": "warning"}),
        ({"supervised": 199_000}, {"nothing_masked": "warning"}),
        ({"supervised": 198_999}, {}),
        ({"supervised": 200_000, "conversations": None}, {"nothing_masked": "note"}),
        ({"supervised": 200_000, "conversations": False}, {}),
        ({"unsupervised": 14, "truncated": 4}, {"nothing_supervised": "warning", "truncated": "note"}),
        ({"unsupervised": 13, "truncated": 0}, {"nothing_supervised": "warning"}),
        ({"unsupervised": 9, "truncated": 0}, {"nothing_supervised": "note"}),
        ({"supervised": 0, "unsupervised": 1000, "truncated": 0}, {"nothing_supervised": "error"}),
        ({"supervised": 0, "unsupervised": 1000, "truncated": 1000}, {"truncated": "error"}),
        ({"unsupervised": 10, "truncated": 40}, {"truncated": "warning"}),
        ({"unsupervised": 9, "truncated": 40}, {"truncated": "note"}),
        ({"truncated": 300}, {"truncated": "warning"}),
        ({"truncated": 299}, {"truncated": "note"}),
        ({"truncated": 9}, {}),
        ({"duplicates": 200}, {"duplicates": "warning"}),
        ({"duplicates": 199}, {"duplicates": "note"}),
        ({"overlap": 50}, {"overlap": "error"}),
        ({"overlap": 49}, {"overlap": "warning"}),
        ({"overlap": 1, "held_out_rows": 101}, {"overlap": "note"}),
        ({"largest_source": ("chat", 0.9)}, {"one_source": "note"}),
        ({"largest_source": ("chat", 0.89)}, {}),
        ({"largest_source": ("chat", 1.0)}, {}),
        ({"longest": 2048}, {}),
        ({"longest": 2048, "virtual_tokens": 1}, {"past_positions": "warning"}),
        ({"longest": 2049, "positions": 2048}, {"past_positions": "error"}),
    ],
)
def test_each_side_of_a_threshold(counts: dict[str, Any], expected: dict[str, str]) -> None:
    assert levels(**counts) == expected


def test_too_long_rows_say_what_fits() -> None:
    (problem,) = told(longest=2000, virtual_tokens=100, positions=2048).problems
    assert "2,000 tokens and 100 virtual tokens need 2,100 positions, the model has 2,048" in problem.evidence.en
    assert problem.change.en == "use fewer virtual tokens, or give a max_length of 1,948 or less"


def test_positions_that_nobody_knows_are_not_passed_silently() -> None:
    assert "past_positions" in told(context=None).unchecked


@pytest.mark.parametrize("value", [0, -1, 10**12])
def test_odd_numbers_raise_nothing(value: int) -> None:
    whole = {name: value for name, known in HEALTHY.items() if type(known) is int}
    for name in whole:
        told(**{name: value})
    told(**whole)
    told(largest_source=("", float("nan")))
