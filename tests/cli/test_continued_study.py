"""`peft-study run --continue` and what is said of such a study; what a study says before it begins."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import CommandLine
from peft_study.config import StudyConfig, validate
from peft_study.study.dry_run import estimate
from peft_study.training.session import unheard

TESTED = {"range_test": True, "range_steps": 4, "pruner": "none"}


@pytest.fixture
def study(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Path:
    values: dict[str, Any] = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tiny_data), "held_out": 8, "max_length": 64},
        "training": {"steps": 2, "batch_size": 4},
        "methods": {
            "lora": {"rank": 4, "learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}},
            "prompt_tuning": {"tokens": 3, "learning_rate": [1e-2, 0.1]},
        },
        "budget": {"trials": 3},
        "search": TESTED,
        "finals": {"best": 1, "seeds": 2},
        "logging": {"tensorboard": False},
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def changed(study: Path, space: str, **settings: Any) -> None:
    values = yaml.safe_load(study.read_text())
    values["methods"][space] |= settings
    study.write_text(yaml.safe_dump(values))


def listed(cli: CommandLine, folder: Path) -> dict[str, dict[str, str]]:
    rows = csv.DictReader(io.StringIO(cli("list", folder, "--csv").ok().out))
    return {row["name"]: row for row in rows}


def statuses(cli: CommandLine, folder: Path) -> dict[str, list[str]]:
    """Returns the row of each method in what `status` says, and the names of its columns as `method`."""
    lines = [line.split() for line in cli("status", folder).ok().out.splitlines()]
    return {line[0]: line for line in lines if line and line[0] in ("method", "lora", "prompt_tuning")}


def test_a_changed_space_is_searched_on_and_has_a_winner(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cli("run", study).ok()
    changed(study, "lora", dropout=[0.0, 0.1])
    assert "methods.lora.dropout" in cli("run", study).error()
    ran = cli("run", study, "--continue").ok()
    rows = listed(cli, out)
    searched = [row for row in rows.values() if row["method"] == "lora" and row["kind"] == "search"]
    assert [row["name"] for row in searched] == [f"lora-{number:03d}" for number in range(6)]
    tests = [name for name, row in rows.items() if row["kind"] == "range_test"]
    assert tests == [f"lora-range-{number}" for number in range(3)], "the same rates with the same settings count again"
    found = json.loads((out / "results.json").read_text())
    assert [f["winner"] for f in found["finalists"]] == [True, False]
    assert not any(f["untuned"] for f in found["finalists"])
    assert "lora: 3 trials of an earlier space beside those of the present one" in ran.out
    # what looks at it from outside
    status = statuses(cli, out)
    assert status["lora"][1:5] == ["3/3", "0", "6", "2/2"], "range test, to come, finished, finals"
    assert status["prompt_tuning"][1:5] == ["0/0", "0", "2", "2/2"]
    assert "lora-000: a setting of the search" in cli("show", "lora-000", "-s", out).ok().out
    dropped = next(row["name"] for row in searched if float(row["dropout"]) == 0.1)
    assert "dropout" in cli("compare", "lora-000", dropped, "-s", out).out
    assert "the same: apart by " in cli("rerun", "lora-000", "-s", out).ok().out
    # the same command once more finds all done
    assert "resumes: " in cli("run", study).ok().out
    assert listed(cli, out) == rows


def test_other_rates_are_tested_and_a_method_may_leave(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    cli("run", study).ok()
    changed(study, "lora", learning_rate={"low": 1e-3, "high": 0.1, "log": True})
    values = yaml.safe_load(study.read_text())
    del values["methods"]["prompt_tuning"]
    study.write_text(yaml.safe_dump(values))
    cli("run", study, "--continue").ok()
    rows = listed(cli, tmp_path / "out")
    rates = [float(row["learning_rate"]) for row in rows.values() if row["kind"] == "range_test"]
    assert rates == [1e-3, 3.16e-3, 1e-2, 3.16e-2, 0.1]
    assert {f"lora-{number:03d}" for number in range(6)} <= set(rows)
    assert "winner by mean dev loss of its seeds: lora-" in cli("status", tmp_path / "out").ok().out
    assert "prompt_tuning-000: " in cli("show", "prompt_tuning-000", "-s", tmp_path / "out").ok().out


def test_a_name_does_not_become_another_methods(cli: CommandLine, study: Path) -> None:
    values = yaml.safe_load(study.read_text())
    values["methods"] = {"soft": {"method": "prompt_tuning", "tokens": 3, "learning_rate": [1e-2, 0.1]}}
    study.write_text(yaml.safe_dump(values))
    cli("run", study).ok()
    changed(study, "soft", method="prefix_tuning")
    line = cli("run", study, "--continue").error()
    assert "a name would stand for two methods: methods.soft.method: " in line
    assert line.strip().endswith("give the new space another name")


def test_the_list_as_csv_is_the_results_file_to_the_byte(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    changed(study, "lora", target_modules=[["q_proj", "v_proj"], "all-linear"])
    cli("run", study).ok()
    listed_bytes = cli("list", tmp_path / "out", "--csv").ok().out.encode()
    assert listed_bytes == (tmp_path / "out/results.csv").read_bytes()


# -- before it begins


def test_the_plan_says_what_is_searched_unequally(cli: CommandLine, study: Path) -> None:
    said = "searched unequally: prompt tuning: all 2 settings of its lists, where others have 3 trials"
    dry = cli("run", study, "--dry-run").ok().out
    assert said in dry
    assert "3 x 4" in next(line for line in dry.splitlines() if line.strip().startswith("lora"))
    assert "minutes of training, finals included and range tests too" in dry
    ran = cli("run", study).ok().out
    assert said in ran
    assert "untuned" not in ran
    assert "searched unequally" not in cli("run", study, "--dry-run", "--set", "budget.trials=2").ok().out


def test_a_dry_run_counts_the_range_tests(study: Path) -> None:
    def found(*, test: bool) -> dict[str, tuple[int, int]]:
        values = yaml.safe_load(study.read_text())
        values["search"] = {**TESTED, "range_test": test}
        methods = estimate(validate(StudyConfig, values, where="study.yaml"), unheard).methods
        return {m.method: (m.tokens, m.expected_tokens) for m in methods}

    without, tested = found(test=False), found(test=True)
    # 3 trials and 2 finals of 2 steps; then 3 rates of 4 steps on top
    for before, after in zip(without["lora"], tested["lora"], strict=True):
        assert after - before == pytest.approx(3 * 4 / (5 * 2) * before, abs=5)
    assert tested["prompt_tuning"] == without["prompt_tuning"]
