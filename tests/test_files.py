"""Files that appear whole or not at all, also with several writers of one name."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_study.storage import cache_dir
from peft_study.storage.files import atomic_writer
from peft_study.storage.run_dir import RunFolder

WRITER = """
import sys
from pathlib import Path
from peft_study.storage.files import atomic_writer
for number in range(5000):
    with atomic_writer(Path(sys.argv[1])) as file:
        file.write(f"{number} " * 100)
"""


def test_a_file_taken_for_a_leftover_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fcntl.flock, list[int]()

    def late(handle: Any, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:  # another writer's look for leftovers, between the making and the locking
            Path(handle.name).unlink()
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with atomic_writer(tmp_path / "a") as file:
        file.write("whole")
    assert (tmp_path / "a").read_text() == "whole"
    assert len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    words = [sys.executable, "-c", WRITER, str(tmp_path / "a")]
    writers = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], ends
    assert (tmp_path / "a").read_text() == "4999 " * 100
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_was_kept_follows_the_code_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "storage").mkdir()
    module = tmp_path / "engine/row.py"
    module.parent.mkdir()
    module.write_text("one")
    monkeypatch.setattr(cache_dir, "__file__", str(tmp_path / "storage/cache_dir.py"))
    digests = {cache_dir.code_digest.__wrapped__("engine")}
    module.write_text("two")
    digests.add(cache_dir.code_digest.__wrapped__("engine"))
    module.rename(module.with_name("rows.py"))
    digests.add(cache_dir.code_digest.__wrapped__("engine"))
    assert len(digests) == 3
    (tmp_path / "storage/files.py").write_text("of no consequence")
    assert cache_dir.code_digest.__wrapped__("engine") in digests


def test_a_run_stopped_from_a_notebook_is_interrupted_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.end(KeyboardInterrupt())
    assert folder.status() == ("interrupted", "stopped at once; the same command resumes from the last checkpoint")
    folder.end(ValueError("bad"))
    assert folder.status() == ("failed", "ValueError: bad")
