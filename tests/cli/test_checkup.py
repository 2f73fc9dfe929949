"""The doctor before a training of ours: what is printed, kept, shown on the page, and said of a file alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import CommandLine
from peft_study.doctor.diagnosis import Diagnosis
from peft_study.report.checks import diagnose_folder
from peft_study.study.checkup import diagnose_file, diagnose_words


def words(model: Path, data: Path, output: Path, *more: object) -> list[object]:
    return [
        *("finetune", "--model_name_or_path", model, "--train_file", data, "--output_dir", output),
        *("--chat_template", "own", "--dtype", "float32", "--held_out", 8, "--max_train_steps", 20, *more),
    ]


@pytest.fixture
def study(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Path:
    values: dict[str, Any] = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tiny_data), "held_out": 8},
        "training": {"steps": 20, "batch_size": 2},
        "methods": {
            "lora": {"rank": 2, "learning_rate": {"low": 1e-4, "high": 1.0, "log": True}},
            "prefix_tuning": {"tokens": 3, "learning_rate": 1e-2, "init": "zero"},
        },
        "budget": {"trials": 2},
        "finals": {"best": 0},
        "logging": {"tensorboard": False},
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def found(diagnosis: Diagnosis) -> dict[str, str]:
    return {p.check: p.level for p in diagnosis.problems if p.level != "note"}


def test_a_healthy_run_says_nothing_and_keeps_what_was_seen(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    ran = cli(*words(tiny_model_folder, tiny_data, tmp_path / "out", "--use_lora", "--learning_rate", "2e-4")).ok()
    assert "WARNING" not in ran.out
    kept = json.loads((tmp_path / "out" / "doctor.json").read_text())
    assert [p["check"] for p in kept["problems"] if p["level"] != "note"] == []
    assert {"rate_too_low", "missing_bos", "no_end_token", "overlap", "base_trains", "init_wrecks"} <= {
        *kept["checked"]
    }
    seen = kept["observations"]
    assert (seen["settings"]["method"], seen["settings"]["total_steps"]) == ("lora", 20)
    assert (seen["data"]["overlap"], seen["data"]["held_out_rows"]) == (0, 8)
    assert seen["parameters"]["base_trainable"] == 0
    assert seen["curve"]["start_loss"] == pytest.approx(seen["curve"]["base_loss"])  # LoRA begins as the base


def test_a_hopeless_rate_is_said_once_kept_and_shown_on_the_page(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    out = tmp_path / "out"
    flags = ("--use_prompt_tuning", "--num_virtual_tokens", 4, "--learning_rate", "1e-4")
    said = cli(*words(tiny_model_folder, tiny_data, out, *flags)).ok().out
    assert said.count("WARNING: the learning rate is too low for prompt tuning") == 1
    assert "known to learn between 0.001 and 3" in said
    first = diagnose_folder(out, study=False).problems[0]
    assert (first.check, first.level) == ("rate_too_low", "error")
    page = (out / "report.html").read_text()
    assert '<section id="checks"><h2>Checks</h2>' in page
    assert "the learning rate is too low for prompt tuning" in page
    cli("report", out, "--lang", "zh").ok()
    assert any("对 prompt tuning 来说学习率太低" in page.read_text() for page in out.glob("report*.html"))


def test_a_random_start_far_above_the_base_is_said_when_it_is_measured(
    tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    """The tiny base guesses at random, so that nothing can be far above it: the start is looked at, and silent."""
    flags = ("--use_prefix_tuning", "--prefix_init", "random", "--num_virtual_tokens", 4)
    diagnosis = diagnose_words([str(word) for word in words(tiny_model_folder, tiny_data, tmp_path / "no", *flags)])
    assert "init_wrecks" in diagnosis.checked
    assert found(diagnosis) == {}
    assert not (tmp_path / "no").exists()


def test_a_studys_range_is_said_once_not_every_trial(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    diagnosis = diagnose_file(study)
    assert found(diagnosis) == {"rate_too_high": "warning"}
    (problem,) = (p for p in diagnosis.problems if p.check == "rate_too_high")
    assert problem.evidence.en.startswith("methods.lora.learning_rate reaches 1: ")
    assert problem.places == ("lora",)
    assert not (tmp_path / "out").exists()
    text = "methods.lora.learning_rate reaches 1"
    assert cli("run", study, "--dry-run").ok().out.replace("\n", " ").count(text) == 1
    before = (study.read_bytes(), json.loads(json.dumps(yaml.safe_load(study.read_text()))))
    assert cli("run", study).ok().out.replace("\n", " ").count(text) == 1
    assert (study.read_bytes(), yaml.safe_load(study.read_text())) == before
    page = (tmp_path / "out" / "report.html").read_text()
    assert text in page
    assert '<section id="checks">' in page
    # the record of the checkup is no part of what a study is: it is found finished
    (tmp_path / "out" / "doctor.json").unlink()
    cli("run", study).ok()
    assert (tmp_path / "out" / "doctor.json").exists()


def test_a_file_of_one_run_and_its_words_are_the_same(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    values = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tiny_data), "held_out": 8},
        "method": {"method": "lora", "rank": 8, "alpha": 512.0},
        "training": {"steps": 4, "learning_rate": 1.0, "warmup_ratio": 0.75},
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    expected = {
        "rate_too_high": "error",
        "warmup_unusual": "warning",
        "rank_unusual": "warning",
        "too_few_steps": "warning",
    }
    assert found(diagnose_file(path)) == expected
    flags = ("--use_lora", "--lora_rank", 8, "--lora_alpha", 512, "--learning_rate", 1.0, "--warmup_ratio", 0.75)
    command = words(tiny_model_folder, tiny_data, tmp_path / "out", *flags, "--max_train_steps", 4)
    assert found(diagnose_words([str(word) for word in command])) == expected
