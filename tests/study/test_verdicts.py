"""Sentences where several things hold at once: ties within noise, a diverged neighbour, several methods."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from peft_study.study.comparison import Comparison, TrialResult
from peft_study.study.findings import rows, sentences

N = 64
COUNTS = np.full(N, 10, dtype=np.int64)
_SPREAD = 0.3 * np.random.default_rng(0).standard_normal(N)
BASE = 10 * (2.0 + _SPREAD - _SPREAD.mean())


def result(method: str, rate: float | None, gain: float | None, *, noise: float = 0.02) -> TrialResult:
    """Returns a row whose loss a token lies `gain` below the base's; None diverged."""
    wobble = noise * np.random.default_rng(zlib.crc32(f"{method} {rate}".encode())).standard_normal(N)
    sums = None if gain is None else BASE - 10 * (gain + wobble - wobble.mean())
    reason = "the loss became nan at step 3" if gain is None else None
    return TrialResult(method, rate, "diverged" if gain is None else "finished", reason, sums, BASE, 7, 1.0)


def said(*results: TrialResult) -> list[str]:
    return sentences(Comparison(results, BASE, COUNTS))


def test_a_neighbour_that_diverged_makes_no_edge() -> None:
    (line,) = said(result("lora", 1e-3, 0.1), result("lora", 1e-2, 0.5), result("lora", 0.1, None))
    assert "edge" not in line
    assert line.endswith("; at 0.1 it diverged")


def test_ties_with_the_best_are_listed_and_not_called_idle() -> None:
    """A wide spread of gains: two rates within noise of the best, all three clearly better than the base."""
    ties = [result("lora", rate, gain, noise=0.3) for rate, gain in ((1e-4, 0.48), (1e-3, 0.5), (3e-3, 0.47))]
    (line,) = said(*ties, result("lora", 1e-2, 0.1))
    assert line.startswith("lora: 0.001 is best of 4 (1.50, 95 % 1.")
    assert "; 0.0001 and 0.003 cannot be told from it" in line
    assert "the base" not in line


def test_a_worse_rate_that_is_still_better_than_the_base_is_not_blamed() -> None:
    (line,) = said(result("lora", 1e-4, 0.1), result("lora", 1e-3, 0.5), result("lora", 1e-2, 0.2))
    assert line.endswith("over 64 held-out examples, one seed)")


def test_methods_are_judged_alone_and_in_order() -> None:
    lines = said(result("prompt_tuning", 0.1, 0.1), result("lora", 1e-3, 0.9), result("none", None, 0.0, noise=0))
    assert [line.split(":")[0] for line in lines] == ["prompt tuning", "lora", "untouched base"]
    assert lines[2].startswith("untouched base: 2.00 (95 % ")


def test_rows_measure_against_the_best_of_their_own_method() -> None:
    made = rows(
        Comparison((result("lora", 1e-4, 0.1), result("lora", 1e-3, 0.5), result("full", 1e-5, 0.9)), BASE, COUNTS)
    )
    assert [row.best for row in made] == [False, True, True]
    behind = [row.minus_best for row in made]
    assert [None if e is None else e.value for e in behind] == [pytest.approx(0.4), 0, 0]
    assert [row.minus_base.value for row in made if row.minus_base] == [pytest.approx(-g) for g in (0.1, 0.5, 0.9)]
