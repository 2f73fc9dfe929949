"""What the doctor says of all cases: planted faults and healthy runs, both halves."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "doctor"))

import score  # noqa: E402 - the benchmarks are scripts, found by their folder

REACHED = {"a": (29, 60), "b": (29, 60)}
"""By half: of how many faulty cases the right cause is told first, and how many healthy ones are silent, at least."""
LARGEST = 1_200_000
"""Bytes of a half's archive."""


def the_cases(half: str) -> list[dict[str, object]]:
    """Returns a half's labels."""
    return list(json.loads((score.FOLDER / f"cases_{half}.json").read_text()))


def archive(half: str) -> Path:
    """Returns where a half's files lie."""
    return score.FOLDER / f"cases_{half}.zip"


@pytest.mark.parametrize("half", sorted(REACHED))
def test_half_has_its_cases(half: str) -> None:
    cases = the_cases(half)
    faulty = [case for case in cases if case["faults"]]
    assert (len(faulty), len(cases) - len(faulty)) == (30, 60)
    assert sum(len(case["faults"]) == 2 for case in faulty) >= 5  # type: ignore[arg-type]
    assert sum(bool(case["look_alike_of"]) for case in cases if not case["faults"]) >= 8
    assert archive(half).stat().st_size < LARGEST
    with zipfile.ZipFile(archive(half)) as files:
        assert {name.split("/")[0] for name in files.namelist()} == {str(case["id"]) for case in cases}
        assert not [name for name in files.namelist() if b"/tmp/" in files.read(name)]


@pytest.mark.parametrize("half", sorted(REACHED))
def test_the_right_cause_is_told_first_and_healthy_runs_are_left_alone(half: str) -> None:
    found = score.totals(score.answers(half))
    right, silent = found["right_cause_first"]["right"], found["silent_healthy"]["right"]
    assert found["failed"] == []
    assert right >= REACHED[half][0], (right, found["misses"])
    assert silent >= REACHED[half][1], (silent, found["false_alarms"])


def test_a_case_is_right_where_its_cause_is_first_and_a_healthy_one_where_nothing_is_said() -> None:
    def of(faults: tuple[str, ...], said: tuple[str, ...], right: bool) -> score.Answer:
        return score.Answer("x", "a", faults, said, (), right, 0)

    found = score.totals([of(("rising",), ("rising",), True), of((), ("noisy",), False), of((), (), True)])
    assert found["right_cause_first"] == {"right": 1, "of": 1, "low": 0.025, "high": 1.0}
    assert (found["silent_healthy"]["right"], found["silent_healthy"]["of"]) == (1, 2)
    assert found["false_alarms"] == {"noisy": 1}
    assert "  healthy and silent: 1 of 2 [1.3%, 98.7%]" in score.lines("half a", found)
