"""Contract 4 at its narrowest: a kill in the middle of a write must leave what was there before."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

import tiny_world as tw
from company import trial
from peft_study.engine import checkpoint
from peft_study.engine.engine import Engine
from peft_study.storage.metrics import read


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it may tidy up."""


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_while_a_checkpoint_of_the_same_number_is_replaced_leaves_one_of_them(at: int, tmp_path: Path) -> None:
    """A run that is stopped again before its next step saves under the number it went on from."""
    base = tw.base()
    engine = Engine(base, row_tokens=70)
    engine.admit(trial(base, "lora"))
    engine.step()
    checkpoint.save(engine, tmp_path, 3, "first")
    rename, calls = Path.rename, []

    def killed(path: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == at:
            raise Killed
        return rename(path, target)

    with (
        patch.object(Path, "rename", killed),
        patch.object(checkpoint.shutil, "rmtree", lambda *_a, **_k: None),
        contextlib.suppress(Killed),
    ):
        checkpoint.save(engine, tmp_path, 3, "second")
    found = checkpoint.newest(tmp_path)
    assert found is not None, "both are gone: with one checkpoint kept, the run would begin anew"
    assert found.step == 3


def test_a_kill_while_a_resumed_run_opens_its_measurements_loses_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"event": "train", "step": step, "loss": 1.0}) + "\n" for step in range(1, 9)))
    script = (
        "import os, pathlib, signal, sys\n"
        "from peft_study.storage.metrics import MetricsWriter\n"
        "def killed(self, *args, **kwargs):\n"
        "    self.open('w').close()\n"  # as write_text begins
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "pathlib.Path.write_text = killed\n"
        "MetricsWriter(pathlib.Path(sys.argv[1]), None, from_step=6)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert [record["step"] for record in read(path)][:6] == [1, 2, 3, 4, 5, 6]
