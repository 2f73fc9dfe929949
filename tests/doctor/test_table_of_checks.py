"""The table of all checks: whole, in step with docs/doctor.md, and each check with a test that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

import peft_study.doctor.rules  # noqa: F401 - registers them
from peft_study.doctor.rule import RULES, table_of_checks

ROOT = Path(__file__).resolve().parents[2]
TESTS = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))


def test_docs_doctor_ends_with_the_table() -> None:
    text = (ROOT / "docs/doctor.md").read_text(encoding="utf-8")
    assert text.endswith(table_of_checks().rstrip() + "\n")


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_check_is_whole_and_tested(name: str) -> None:
    one = RULES[name]
    assert all((one.looks_at, one.threshold, one.source, one.false_alarms, one.needs, one.find.__doc__))
    assert set(one.explains) <= set(RULES)
    assert name in TESTS
