"""The commit that a run records: of a checkout of this package, and of no other repository around it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

from peft_study.storage import environment


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(("git", *who, *words), cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def copied(folder: Path) -> ModuleType:
    """Returns the module from a copy of its file in a folder."""
    file = shutil.copy(Path(environment.__file__), folder)
    spec = importlib.util.spec_from_file_location("copied_environment", file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_a_commit_is_recorded_where_the_package_is_in_a_checkout_and_nowhere_else(tmp_path: Path) -> None:
    module = copied(tmp_path)
    assert module.environment()["code"] is None
    git(tmp_path, "init", "-q")
    (tmp_path / "of_the_user.py").touch()
    git(tmp_path, "add", "of_the_user.py")
    git(tmp_path, "commit", "-qm", "the user's own repository, with the package installed in it")
    assert module.environment()["code"] is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "the package itself")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert module.environment()["code"] == {"commit": commit, "changed": False}
    (tmp_path / "of_the_user.py").write_text("changed = True\n")
    assert module.environment()["code"] == {"commit": commit, "changed": True}
