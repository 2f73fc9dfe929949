"""Checkpoints by steps: as often as the trials themselves step, however many there are side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import CommandLine
from peft_study.engine import checkpoint
from peft_study.training import loop as slots_module
from peft_study.training.interrupt import StopRequest

EVERY = 3


@pytest.fixture
def study(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Path:
    """Returns a study of trials with few and many virtual tokens, which step at different paces."""
    values: dict[str, Any] = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tiny_data), "held_out": 8, "max_length": 64},
        "training": {"steps": 9, "batch_size": 2, "row_tokens": 130},
        "search": {"pruner": "none", "range_test": False, "sampler": "quasi_random"},
        "methods": {
            "lora": {"rank": 2, "learning_rate": [1e-4, 1e-3, 1e-2]},
            "prompt_tuning": {"tokens": 60, "init": "random", "learning_rate": [0.1, 1.0]},
        },
        "finals": {"best": 1, "seeds": 1},
        "logging": {"tensorboard": False, "checkpoint_every": EVERY, "keep_checkpoints": -1},
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def cuts(out: Path) -> list[dict[str, int]]:
    """Returns the steps of each trial in each checkpoint that was made, in order."""
    found = sorted(checkpoint.find(out / "checkpoints"), key=lambda one: one.step)
    return [dict(zip(one.trials, one.steps, strict=True)) for one in found]


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_the_interval_is_one_of_a_trials_steps_and_does_not_depend_on_the_slots(
    cli: CommandLine, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    monkeypatch.setattr(slots_module, "CHECKPOINT_SHARE", 1e-9)  # those after a trial's end go by the clock
    cli("run", study, "--slots", slots).ok()
    made = cuts(tmp_path / "out")
    assert len(made) > 3
    taken = [
        {name: steps - before.get(name, 0) for name, steps in after.items()}
        for before, after in zip([{}, *made], made, strict=False)
    ]
    assert taken[0].keys(), "one after the untouched base, before any step"
    assert set(taken[0].values()) == {0}
    assert not taken.pop(), "one at the study's end"
    assert {max(steps.values()) for steps in taken[1:]} == {EVERY}, taken


def test_an_interval_goes_on_over_a_stop(
    cli: CommandLine, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cut that a stop makes is none of the interval's: what follows is where it would have been."""
    values = yaml.safe_load(study.read_text())
    values["methods"] = {"lora": {"rank": 2, "learning_rate": [1e-4, 1e-3]}}
    study.write_text(yaml.safe_dump(values))
    monkeypatch.setattr(slots_module, "CHECKPOINT_SHARE", 1e-9)
    cli("run", study, "--slots", 1, "-o", tmp_path / "whole").ok()
    with monkeypatch.context() as patched:
        asked = iter([False] * 7 + [True] * 9)
        patched.setattr(StopRequest, "asked", property(lambda _s: next(asked), lambda _s, _v: None), raising=False)
        assert cli("run", study, "--slots", 1).code == 130
    (stopped,) = cuts(tmp_path / "out")[-1].values()
    assert stopped % EVERY, "it was stopped at the interval's own cut: the test tests nothing"
    cli("run", study, "--slots", 1).ok()
    whole, went_on = (cuts(tmp_path / run) for run in ("whole", "out"))
    by_steps = [cut for cut in went_on if set(cut.values()) not in ({stopped}, {0})]
    assert by_steps == [cut for cut in whole if set(cut.values()) != {0}]
    found = [json.loads((tmp_path / run / "results.json").read_text())["finalists"] for run in ("whole", "out")]
    assert found[0] == found[1]
