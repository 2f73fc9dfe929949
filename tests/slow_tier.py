"""Runs the slow tests and writes a summary to tests/slow-summary.json: counts, date, machine, commit.

python tests/slow_tier.py [pytest arguments]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from peft_study.storage.environment import environment

PATH = Path(__file__).with_name("slow-summary.json")


class Counts:
    """A pytest plugin that counts outcomes and keeps the reasons of skips."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.skips: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.skips[report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)] += 1
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome if report.when == "call" or report.skipped else "error"] += 1


def main() -> int:
    """Runs pytest with the arguments of the command line; returns its exit code."""
    counts, started = Counts(), time.perf_counter()
    code = int(pytest.main([*sys.argv[1:], str(PATH.parent)], plugins=[counts]))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    known = environment()
    summary = {
        "command": "make test-slow",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "uncommitted_changes": bool(changed.strip()),
        "exit_code": code,
        "outcomes": dict(counts.outcomes),
        "skips": dict(counts.skips),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "machine": known["machine"],
        "python": known["python"],
        "packages": known["packages"],
    }
    PATH.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"summary -> {PATH}")
    return code


if __name__ == "__main__":
    sys.exit(main())
