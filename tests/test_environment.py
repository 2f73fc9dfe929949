"""The commit that a run records: of a checkout of this package, and of no other repository around it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from peft_study.storage import environment


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(("git", *who, *words), cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_a_commit_is_recorded_where_the_package_is_in_a_checkout_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "__file__", str(shutil.copy(environment.__file__, tmp_path)))
    assert environment.environment()["code"] is None
    git(tmp_path, "init", "-q")
    (tmp_path / "of_the_user.py").touch()
    git(tmp_path, "add", "of_the_user.py")
    git(tmp_path, "commit", "-qm", "the user's own repository, with the package installed in it")
    assert environment.environment()["code"] is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "the package itself")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert environment.environment()["code"] == {"commit": commit, "changed": False}
    (tmp_path / "of_the_user.py").write_text("changed = True\n")
    assert environment.environment()["code"] == {"commit": commit, "changed": True}
