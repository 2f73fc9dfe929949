"""A single held-out row has no interval, and a number may be none: files stay JSON, the terminal says it in words."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pyarrow import parquet

from command_line import CommandLine
from peft_study.search.trials import StudyState
from peft_study.storage.files import json_text
from peft_study.storage.journal import Journal, read
from peft_study.storage.metrics import MetricsWriter
from peft_study.storage.run_dir import RunFolder


def strict(text: str) -> Any:
    """Reads JSON as other programs do: NaN and Infinity are none of it."""

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def flags(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> tuple[Any, ...]:
    """Returns a run of two steps with one held-out row."""
    return (
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--max_train_steps", 2),
        *("--use_lora", "--dtype", "float32", "--held_out", 1, "--with_tracking", "--output_dir", tmp_path / "out"),
    )


def test_a_run_with_one_held_out_row(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    ran = cli(*flags).ok()
    assert "inf" not in ran.out
    assert "[no interval] before" in ran.out
    assert "1 held-out row: 95 % intervals over so few are wide" in ran.out
    lines = [strict(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if line["event"] == "held_out"]
    assert held_out
    for line in held_out:
        assert line["loss"] > 0
        assert line["loss_low"] is line["loss_high"] is line["minus_base_low"] is line["minus_base_high"] is None


def test_a_study_with_one_dev_row(cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "study.yaml"
    values = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tiny_data), "held_out": 1, "test": 1, "max_length": 64},
        "training": {"steps": 2, "batch_size": 2},
        "methods": {"lora": {"rank": 4, "learning_rate": [1e-3, 1e-2]}},
        "search": {"pruner": "none"},
        "finals": {"best": 1, "seeds": 2},
        "logging": {"tensorboard": False},
        "output": str(out),
    }
    file.write_text(yaml.safe_dump(values))
    said = [cli("run", file).ok().out]
    said += [cli("status", out).ok().out, cli("list", out).ok().out, cli("show", "lora-000", "-s", out).ok().out]
    said += [cli("compare", "lora-000", "none", "-s", out).ok().out, cli("list", out, "--csv").ok().out]
    for text in said:
        assert "inf" not in text.replace("information", "")
        assert "nan" not in text
    assert "no interval: a single example" in said[0]
    assert "1 held-out row: " in said[0]
    for path in (*out.rglob("*.json"), *out.rglob("*.jsonl")):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            strict(line)
    (finalist,) = strict((out / "results.json").read_text())["finalists"]
    assert finalist["dev"]["value"] > 0
    assert finalist["dev"]["low"] is finalist["dev"]["high"] is None
    for row in parquet.read_table(out / "results.parquet").to_pylist():
        assert row["dev"] > 0
        assert row["dev_low"] is row["dev_high"] is row["dev_minus_base_low"] is None
    with (out / "results.csv").open() as table:
        assert {row["dev_low"] for row in csv.DictReader(table)} == {""}
    strict(cli("list", out, "--json").ok().out)


def test_every_file_of_numbers_is_json(tmp_path: Path) -> None:
    values = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": np.float64("nan"), "c": "NaN"}
    expected = {"a": [1.5, None, [None, None]], "b": None, "c": "NaN"}
    assert strict(json_text(values)) == expected
    RunFolder(tmp_path).write("x.json", values)
    assert strict((tmp_path / "x.json").read_text()) == expected
    writer = MetricsWriter(tmp_path / "metrics.jsonl", None)
    writer.write("train", 1, loss=math.inf)
    writer.close()
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {"event": "train", "step": 1, "loss": None}
    Journal(tmp_path / "journal.jsonl").append([{"event": "x", "values": [math.nan]}])
    assert strict((tmp_path / "journal.jsonl").read_text()) == {"event": "x", "values": [None]}


def test_a_loss_that_is_none_is_read_back_as_one(tmp_path: Path) -> None:
    asked = {"event": "asked", "name": "lora-000", "method": "lora", "kind": "search", "number": 0}
    settings = {"method": {"method": "lora"}, "training": {}}
    Journal(tmp_path / "journal.jsonl").append(
        [
            {**asked, "values": {}, "settings": settings},
            {"event": "measured", "name": "lora-000", "step": 1, "sums": [1.0, math.nan]},
        ]
    )
    known = StudyState()
    for event in read(tmp_path / "journal.jsonl"):
        known.apply(event)
    sums_N = known.trials["lora-000"].sums[1]
    assert sums_N.dtype == np.float64
    assert math.isnan(sums_N[1])
