"""What a comparison says, from hand-made losses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from peft_study.study.comparison import Comparison, TrialResult
from peft_study.study.findings import rows, save, sentences
from peft_study.study.store import RunFolder, Status

COUNTS = np.full(64, 10)
BASE = 10 * np.random.default_rng(0).normal(2.0, 0.3, size=64)


def trial(method: str, rate: float | None, gain: float | None, *, noise: int = 1) -> TrialResult:
    """A trial that is `gain` nats a token better than the base, give or take a little; None diverged."""
    wobble = 10 * np.random.default_rng(noise).normal(0, 0.02, size=64)
    sums = None if gain is None else BASE - 10 * gain + wobble
    status: Status = "diverged" if gain is None else "finished"
    reason = "the loss became nan at step 3" if gain is None else None
    return TrialResult(method, rate, status, reason, sums, BASE, 100, 1.0)


def said(*results: TrialResult) -> str:
    (sentence,) = sentences(Comparison(results, BASE, COUNTS))
    return sentence


def test_the_best_in_the_middle_needs_no_warning() -> None:
    text = said(trial("lora", 1e-4, 0.1), trial("lora", 1e-3, 0.5), trial("lora", 1e-2, 0.3))
    assert text.startswith("lora: 0.001 is best of 3 (1.")
    assert "over 64 held-out examples, one seed)" in text
    assert "edge" not in text
    assert "base" not in text


def test_edges_of_the_range_are_said() -> None:
    high = said(trial("prompt_tuning", 0.1, 0.1), trial("prompt_tuning", 0.3, 0.5))
    assert high.startswith("prompt tuning: 0.3 is best of 2")
    assert "at the edge of the range: try higher" in high
    assert "at the edge of the range: try lower" in said(trial("lora", 0.1, 0.5), trial("lora", 0.3, 0.1))
    assert "the only one tried" in said(trial("lora", 0.1, 0.5))


def test_what_is_no_different_from_the_base_or_from_the_best() -> None:
    text = said(
        trial("prompt_tuning", 1e-4, 0.0, noise=5),
        trial("prompt_tuning", 0.03, 0.5, noise=1),
        trial("prompt_tuning", 0.1, 0.5, noise=2),
        trial("prompt_tuning", 3.0, -1.0),
        trial("prompt_tuning", 9.0, None),
    )
    assert "0.03 is best of 5" in text or "0.1 is best of 5" in text
    assert "cannot be told from it" in text
    assert "at 0.0001 it cannot be told from the base" in text
    assert "at 3 it is worse than the base" in text
    assert "at 9 it diverged" in text


def test_a_best_that_is_no_good_is_said_to_be_none() -> None:
    assert "even so it cannot be told from the base" in said(trial("lora", 1e-4, 0.0, noise=5))
    assert "even so it is worse than the untouched base" in said(trial("lora", 1.0, -0.5))
    assert said(trial("lora", 1.0, None), trial("lora", 2.0, None)) == (
        "lora: none of 2 learning rates finished (the loss became nan at step 3)"
    )


def test_rows_and_their_file(tmp_path: Path) -> None:
    comparison = Comparison(
        (trial("lora", 1e-3, 0.5), trial("lora", 1.0, None), trial("none", None, 0.0)), BASE, COUNTS
    )
    table = rows(comparison)
    assert [row.best for row in table] == [True, False, True]
    assert table[1].loss is None
    save(comparison, RunFolder(tmp_path))
    written = json.loads((tmp_path / "results.json").read_text())
    assert [row["status"] for row in written["rows"]] == ["finished", "diverged", "finished"]
    assert written["rows"][0]["minus_base"]["value"] < -0.4
    assert written["sentences"] == sentences(comparison)
