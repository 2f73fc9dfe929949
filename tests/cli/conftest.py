"""Studies that the tests of commands look at: one that was trained, and one that is written by hand."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from command_line import study_file
from hand_made import RATE, HandMade


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_data: Path) -> Path:
    """Returns the folder of a study that has run; tests that change it work on a copy."""
    from peft_study.cli import main

    folder = tmp_path_factory.mktemp("trained")
    path = study_file(folder, tiny_model_folder, tiny_data)
    with patch.object(sys, "argv", ["peft-study", "run", str(path)]), pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    return folder / "out"


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "study")


@pytest.fixture
def made(tmp_path: Path) -> HandMade:
    """Returns a study in the middle of its finals, not yet written."""
    study = HandMade(tmp_path / "made", {"lora": RATE, "prompt_tuning": RATE}, finals={"best": 1, "seeds": 2})
    study.trial("lora", 1e-3, 0.5)
    study.trial("lora", 1e-2, 0.1, status="pruned", reason="at step 11 worse")
    study.trial("prompt_tuning", 0.1, 0.2)
    study.trial("prompt_tuning", 3.0, None)
    return study


# -- status
