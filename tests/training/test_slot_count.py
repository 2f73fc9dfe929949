"""Slots, row budget and threads are settled once, written down, and kept on resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from command_line import CommandLine, dev_losses
from peft_study.config import DataConfig, ModelConfig, TrainingConfig
from peft_study.training import slot_count
from peft_study.training.session import open_session, unheard


@pytest.fixture
def study(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Path:
    values: dict[str, Any] = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tiny_data), "held_out": 8, "max_length": 64},
        "training": {"steps": 2, "batch_size": 4, "row_tokens": 128},
        "methods": {"lora": {"rank": 4, "learning_rate": [1e-4, 1e-3, 1e-2, 0.1]}, "none": {}},
        "search": {"pruner": "none"},
        "finals": {"best": 1},
        "logging": {"tensorboard": False},
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def capacity(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "capacity.json").read_text())
    return found


def test_auto_fills_a_row_and_says_what_would_fit(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    ran = cli("run", study).ok()
    found = capacity(tmp_path / "out")
    assert found["slots"] == 2, "a batch of 4 rows of 26 tokens leaves a fifth of a row free"
    assert found["row_tokens"] == 128
    assert found["threads"] == torch.get_num_threads()
    assert found["measured"]["fits"] > 5
    assert f"{found['slots']} trials side by side in rows of 128 tokens (the memory would hold " in ran.out


def test_layers_that_were_computed_again_are_so_after_a_restart_and_in_every_worker(
    tiny_model_folder: Path, tiny_data: Path
) -> None:
    """The length of a row is only right with them."""
    session = open_session(
        ModelConfig(name=str(tiny_model_folder), device="cpu", dtype="float32"),
        DataConfig(train=str(tiny_data), held_out=8, workers=1),
        TrainingConfig(row_tokens=128),
        unheard,
    )
    assert not session.engine.recomputes
    session.engine.recompute(True)
    settled = slot_count.found(session, [], trials=1, wanted=1)
    session.engine.recompute(False)
    slot_count.use(session, settled)
    assert session.engine.recomputes


def test_a_long_row_is_not_filled_but_every_method_gets_a_slot(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    """Batches of 8 rows of 26 tokens: two make the 512 tokens from which a row is full enough on a CPU, five a row."""
    values = yaml.safe_load(study.read_text())
    values["training"] = {"steps": 2, "batch_size": 8, "row_tokens": 1024}
    study.write_text(yaml.safe_dump(values))
    cli("run", study).ok()
    assert capacity(tmp_path / "out")["slots"] == 2
    rates = {"learning_rate": [1e-3, 1e-2]}
    values["methods"] = {"lora": {"rank": 4, **rates}, "prefix_tuning": {"tokens": 2, **rates}}
    values["methods"] |= {"prompt_tuning": {"tokens": 2, **rates}, "none": {}}
    study.write_text(yaml.safe_dump(values))
    cli("run", study, "--overwrite").ok()
    assert capacity(tmp_path / "out")["slots"] == 3


def test_slots_of_the_command_line_count(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    ran = cli("run", study, "--slots", 3).ok()
    assert "3 trials side by side in rows of 128 tokens\n" in ran.out
    assert capacity(tmp_path / "out")["slots"] == 3
    assert capacity(tmp_path / "out")["measured"] is None


def test_what_was_settled_is_used_again(
    cli: CommandLine, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_study.training.interrupt import StopRequest

    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "asked", True, raising=False)
        patched.setattr(StopRequest, "__init__", lambda self: None)
        assert cli("run", study, "--slots", 2).code == 130
    before = capacity(tmp_path / "out")
    ran = cli("run", study, "--slots", 4).ok()
    assert "2 slots, as when this run began (asked for: 4)" in ran.out
    assert capacity(tmp_path / "out") == before


def test_numbers_do_not_depend_on_slots(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    for slots in (1, 2, 5):
        # a model of the losses orders a grid by what it has seen so far: with more slots that is less
        words = "--slots", slots, "--set", "search.sampler=grid", "-o", tmp_path / str(slots)
        cli("run", study, *words).ok()
    found = {slots: dev_losses(tmp_path / str(slots)) for slots in (1, 2, 5)}
    assert len(found[1]) == 1 + 4 + 3
    for slots in (2, 5):
        assert set(found[slots]) == set(found[1])
        for name, sums in found[1].items():
            assert found[slots][name] == pytest.approx(sums, rel=1e-4), name
