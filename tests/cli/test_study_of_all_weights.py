"""A study with a trial of all weights: it takes the base, and puts it back for the trials after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from command_line import CommandLine, dev_losses
from peft_study.engine import memory


def test_where_it_does_not_fit_it_is_a_row_that_failed(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda _device: 450_000)
    settings = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tiny_data), "held_out": 8},
        "training": {"steps": 2, "batch_size": 4},
        "methods": {"full": {"learning_rate": 1e-3}, "lora": {"rank": 2, "learning_rate": 1e-3}},
        "slots": 1,
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(settings))
    ran = cli("run", tmp_path / "study.yaml").ok()
    why = "it does not fit into memory: full fine-tuning needs 0.0 GB of memory beside the base"
    assert f"full-000: failed ({why}" in ran.out
    assert f"- full: its only setting did not finish ({why}" in ran.out
    assert f"full will be a row that failed: {why}" in ran.out
    assert "WARNING: it does not fit" not in ran.out  # the line above has said it
    assert "winner by mean dev loss over 3 new seeds: lora" in ran.out
    assert "full will be a row that failed: " in cli("run", tmp_path / "study.yaml", "--dry-run").ok().out


def test_the_base_is_put_back(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    def run(name: str, methods: dict[str, object]) -> dict[str, list[float]]:
        settings = {
            "model": {"name": str(tiny_model_folder), "dtype": "float32"},
            "data": {"train": str(tiny_data), "held_out": 8},
            "training": {"steps": 2, "batch_size": 4},
            "methods": methods,
            "output": str(tmp_path / name),
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        cli("run", path).ok()
        return dev_losses(tmp_path / name)

    lora = {"rank": 2, "learning_rate": 1e-3}
    alone = run("alone", {"lora": lora})
    after = run("after", {"full": {"learning_rate": "1e-2"}, "lora": lora})
    assert sorted(set(after) - set(alone)) == ["full-000", "full-000-seed-1", "full-000-seed-2", "full-000-seed-3"]
    assert {name: after[name] for name in alone} == alone
    assert after["full-000"] != after["none"]
    found = json.loads((tmp_path / "after" / "results.json").read_text())
    full = next(f for f in found["finalists"] if f["method"] == "full")
    # the test part is measured with the weights as they were saved, and the dev part as they were trained
    assert abs(full["test"]["value"] - full["dev"]["value"]) < 0.1 * full["dev"]["value"]
    assert full["test_minus_base"]["high"] < 0
