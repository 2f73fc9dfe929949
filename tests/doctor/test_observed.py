"""Our own runs and studies as the doctor sees them, from folders written by hand and by a true run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_curves import falling, noise

from command_line import CommandLine
from hand_made import NAN, RATE, HandMade
from peft_study.config import TrainConfig
from peft_study.doctor.rule import examine
from peft_study.errors import OutputError
from peft_study.report.observed import diagnose_study, observe_run
from peft_study.storage.run_dir import SCHEMA_VERSION


def write_run(
    folder: Path,
    loss: Any,
    *,
    above: Any = None,
    held_out: dict[int, float] | None = None,
    status: str = "finished",
    reason: str | None = None,
    method: dict[str, Any] | None = None,
) -> Path:
    """Writes the folder of a run whose losses are known; losses that are not finite are null, as ours are."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "model": {"name": "m"},
        "data": {"train": "d.jsonl"},
        "method": method or {"method": "lora"},
        "training": {"steps": max(1, len(loss)), "batch_size": 4, "learning_rate": 1e-3},
        "output": str(folder),
    }
    config = TrainConfig.model_validate(values).model_dump(mode="json")
    (folder / "config.resolved.json").write_text(json.dumps(config))
    (folder / "status.json").write_text(json.dumps({"status": status, "reason": reason, "version": SCHEMA_VERSION}))
    (folder / "record.json").write_text(json.dumps({"data": {"train_rows": 40}, "base": {"dtype": "bfloat16"}}))
    (folder / "parameters.json").write_text(json.dumps({"trainable": 10, "total": 110, "by_module": {}}))
    lines = [
        {"event": "held_out", "step": step, "loss": value, "minus_base": value - 2.5, "minus_base_low": value - 2.6,
         "minus_base_high": value - 2.4}
        for step, value in (held_out or {}).items()
    ]  # fmt: skip
    for place, value in enumerate(loss):
        lines.append(
            {
                "event": "train",
                "step": place + 1,
                "loss": float(value) if math.isfinite(value) else None,
                "loss_minus_base": None if above is None else float(above[place]),
                "learning_rate": 1e-3,
                "gradient_norm": 0.5,
                "skipped": False,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "tra')
    return folder


def test_a_run_is_read_with_its_curve_and_settings(tmp_path: Path) -> None:
    above = np.linspace(0, -1, 30)
    seen = observe_run(write_run(tmp_path / "r", 2.5 + above, above=above, held_out={0: 2.4, 30: 1.6}))
    assert (seen.stage, seen.steps_done) == ("after", 30)
    used = seen.settings
    assert (used.method, used.learning_rate, used.batch_size, used.total_steps) == ("lora", 1e-3, 4, 30)
    assert (used.clip_norm, used.compute_dtype, used.parameter_dtype) == (1.0, "bfloat16", "float32")
    assert seen.parameters is not None
    assert (seen.parameters.base, seen.parameters.adapter_trainable, seen.parameters.base_trainable) == (100, 10, 0)
    curve = seen.curve
    assert curve is not None
    assert curve.epoch is not None
    assert curve.epoch[-1] == pytest.approx(3.0)  # 30 steps of 4 over 40 rows
    assert (curve.base_loss, curve.start_loss) == (2.5, 2.4)
    assert curve.held_out_high is not None
    assert curve.held_out_high.tolist() == pytest.approx([0.0, -0.8])
    assert not examine(seen).wrong


def test_a_diverged_run_shows_where_it_broke(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", [2.0, 2.1], status="diverged", reason=NAN)
    problem = examine(observe_run(folder)).problems[0]
    assert (problem.check, problem.step) == ("diverged", 3)
    at_once = write_run(tmp_path / "s", [], status="diverged", reason="the loss became nan at step 1")
    assert examine(observe_run(at_once)).problems[0].step == 1


def test_unfinished_runs_are_under_way(tmp_path: Path) -> None:
    killed = write_run(tmp_path / "r", falling(20), status="running")
    assert observe_run(killed).stage == "during"
    nothing = write_run(tmp_path / "s", [], status="interrupted")
    seen = observe_run(nothing)
    assert (seen.stage, seen.steps_done, seen.curve) == ("during", 0, None)
    assert not examine(seen, kinds=("run",)).wrong
    with pytest.raises(OutputError, match="holds no run"):
        observe_run(tmp_path)


def test_full_fine_tuning_trains_the_base_on_purpose(tmp_path: Path) -> None:
    seen = observe_run(write_run(tmp_path / "r", falling(20), method={"method": "full"}))
    assert seen.parameters is not None
    assert (seen.parameters.adapter, seen.parameters.own_base) == (0, True)
    assert seen.curve is not None
    assert seen.curve.minus_base is None
    assert "curve.minus_base" in seen.reasons


def study(folder: Path) -> HandMade:
    """Returns a study of two settings: a bad rate that rises, and a good one with a final."""
    made = HandMade(folder, {"lora": RATE})
    made.trial("lora", 1e-2, -1.0)
    made.trial("lora", 1e-3, 1.0)
    made.chosen(lora=[1])
    made.finals("lora", 1, [1.0])
    return made


def test_a_study_is_judged_by_its_finals_and_not_by_what_it_tried(tmp_path: Path) -> None:
    made = study(tmp_path / "study")
    made.written()
    trials = tmp_path / "study" / "trials"
    write_run(trials / "lora-000", np.linspace(2.5, 3.5, 100) + noise(100, 0.05))
    write_run(trials / "lora-001", falling(100) + noise(100, 0.05))
    write_run(trials / "lora-001-seed-1", falling(100) + noise(100, 0.05))
    found = diagnose_study(tmp_path / "study")
    assert not found.wrong
    note = next(problem for problem in found.problems if problem.check == "rising")
    assert (note.level, note.places) == ("note", ("lora-000",))
    assert "2 other trials" in note.cause.en
    # the same fault in a final is the study's own
    write_run(trials / "lora-001-seed-1", np.linspace(2.5, 3.5, 100) + noise(100, 0.05))
    found = diagnose_study(tmp_path / "study")
    assert found.problems[0].check == "rising"
    assert found.problems[0].level == "error"
    assert found.problems[0].places == ("lora-001-seed-1",)


def test_a_true_run_of_ours_can_be_read(
    tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, cli: CommandLine
) -> None:
    out = tmp_path / "run"
    cli(
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data),
        *("--max_train_steps", 12, "--use_lora", "--output_dir", out),
    ).ok()
    seen = observe_run(tmp_path / "run")
    assert seen.steps_done == 12
    assert seen.curve is not None
    assert len(seen.curve.loss) == 12
    assert seen.curve.minus_base is not None
    assert seen.curve.base_loss is not None
    assert seen.parameters is not None
    assert seen.parameters.adapter_trainable > 0
    assert "diverged" in examine(seen).checked
