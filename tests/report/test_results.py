"""The table of results: a row a trial, failures among them, with the same columns and types whatever is in it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from pyarrow import parquet

from hand_made import RATE, HandMade
from peft_study.report.results import columns, summary, write_rows


@pytest.fixture
def study(tmp_path: Path) -> HandMade:
    made = HandMade(
        tmp_path / "study", {"lora": {"rank": [4, 8]}, "prompt_tuning": {"tokens": 8}}, finals={"best": 1, "seeds": 2}
    )
    made.trial("lora", 1e-3, 0.5, rank=8)
    made.trial("lora", 1e-1, None, rank=4)
    made.trial("prompt_tuning", 0.1, 0.2)
    made.trial("prompt_tuning", 3.0, 0.1, status="pruned", reason="at step 11 worse")
    made.chosen(lora=[0], prompt_tuning=[0])
    made.finals("lora", 0, [0.5, 0.6])
    made.finals("prompt_tuning", 0, [0.2, None])
    made.concluded("lora")
    made.opened(**{"lora-000-seed-1": 0.4, "lora-000-seed-2": 0.5, "prompt_tuning-000-seed-1": 0.2})
    made.written()
    return made


def test_both_files_have_a_row_a_trial_and_failures_are_rows(study: HandMade) -> None:
    write_rows(study.results(), study.folder)
    table = parquet.read_table(study.folder.path / "results.parquet")
    rows = {row["name"]: row for row in table.to_pylist()}
    assert list(rows) == [e["name"] for e in study.events if e["event"] == "asked"]
    with (study.folder.path / "results.csv").open() as file:
        texts = list(csv.DictReader(file))
    assert [row["name"] for row in texts] == list(rows)
    assert list(texts[0]) == table.column_names == list(columns())
    assert [row["status"] for row in texts] == [row["status"] for row in rows.values()]
    lost = rows["lora-001"]
    assert (lost["status"], lost["reason"], lost["dev"]) == ("diverged", "the loss became nan at step 3", None)
    best = rows["lora-000"]
    assert best["dev"] == pytest.approx(1.5)
    assert best["dev_minus_base"] == pytest.approx(-0.5)
    assert best["dev_low"] < best["dev"] < best["dev_high"]
    assert (best["rank"], best["learning_rate"], best["seed"], best["test"]) == (8, 1e-3, 0, None)
    assert rows["lora-000-seed-1"]["test"] == pytest.approx(1.6)
    assert rows["lora-000-seed-1"]["seed"] == 1
    assert rows["none"]["test"] == pytest.approx(2.0)
    assert rows["prompt_tuning-001"]["dev"] == pytest.approx(1.9), "a pruned trial has its last measurement"
    assert json.loads(best["settings"])["rank"] == 8


def test_virtual_tokens_of_a_setting_and_data_tokens_of_its_training_are_two_columns(study: HandMade) -> None:
    write_rows(study.results(), study.folder)
    rows = {r["name"]: r for r in parquet.read_table(study.folder.path / "results.parquet").to_pylist()}
    assert (rows["prompt_tuning-000"]["tokens"], rows["prompt_tuning-000"]["data_tokens"]) == (8, 5000)
    assert (rows["lora-000"]["tokens"], rows["lora-000"]["data_tokens"]) == (None, 5000)


def test_columns_have_their_types_where_nothing_was_measured(tmp_path: Path, study: HandMade) -> None:
    write_rows(study.results(), study.folder)
    full = parquet.read_schema(study.folder.path / "results.parquet")
    empty = HandMade(tmp_path / "empty", {"lora": RATE})
    empty.events.clear()
    empty.written()
    write_rows(empty.results(), empty.folder)
    assert parquet.read_schema(empty.folder.path / "results.parquet").equals(full)
    kinds = {name: str(full.field(name).type) for name in full.names}
    assert {kinds[n] for n in ("learning_rate", "dev", "dev_low", "test", "seconds", "alpha", "dropout")} == {"double"}
    assert {kinds[n] for n in ("number", "seed", "steps", "data_tokens", "tokens", "rank", "trainable")} == {"int64"}
    assert {kinds[n] for n in ("name", "method", "status", "reason", "settings", "target_modules")} == {"string"}
    assert kinds["rslora"] == "bool"


def test_finalists_are_ranked_and_those_that_lost_a_seed_come_last(study: HandMade) -> None:
    first, last = study.results().finalists
    assert (first.method, first.winner, first.failed) == ("lora", True, 0)
    assert first.dev is not None
    assert first.dev.value == pytest.approx(1.45)
    assert first.dev_of_seeds == pytest.approx((1.5, 1.4))
    assert first.test_minus_base is not None
    assert first.test_minus_base.value == pytest.approx(-0.45)
    assert first.test_minus_winner is None
    assert (last.method, last.winner, last.failed) == ("prompt_tuning", False, 1)
    assert last.test_minus_winner is not None
    assert last.test_minus_winner.value == pytest.approx(0.25)
    values = json.loads(json.dumps(summary(study.results())))
    assert values["base"]["dev"]["value"] == pytest.approx(2.0)
    assert [f["number"] for f in values["finalists"]] == [0, 0]
    assert values["tokens"] == {"lora": 4 * 5000, "prompt_tuning": 4 * 5000}


def test_finalists_whose_seeds_have_not_begun_or_still_run_are_no_failures(tmp_path: Path) -> None:
    made = HandMade(tmp_path / "s", {"lora": RATE})
    made.trial("lora", 1e-3, 0.5)
    made.chosen(lora=[0])
    (waiting,) = made.results().finalists
    assert (waiting.dev, waiting.failed, waiting.settings["learning_rate"]) == (None, 0, 1e-3)
    made.finals("lora", 0, [0.5])
    made.events.pop()
    (running,) = made.results().finalists
    assert (running.dev, running.failed) == (None, 0)


def test_the_best_step_is_shown_and_the_last_one_counts(study: HandMade) -> None:
    folder = study.folder.path / "trials/lora-000"
    folder.mkdir(parents=True)
    lines = [{"event": "held_out", "step": s, "loss": x} for s, x in ((0, 0.1), (50, 1.2), (100, 1.5))]
    folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "tr')
    row = next(r for r in study.results().rows if r.trial.name == "lora-000")
    assert (row.best_step, row.best_loss) == (50, 1.2)
    assert row.dev is not None
    assert row.dev.value == pytest.approx(1.5)


def test_an_old_finalist_outside_the_present_range_lies_at_no_edge(tmp_path: Path) -> None:
    """A list became a range on the way: a value of the list may have no logarithm."""
    made = HandMade(tmp_path / "s", {"lora": {**RATE, "weight_decay": {"low": 1e-4, "high": 0.1, "log": True}}})
    for decay in (0.0, 0.3, 1e-4):
        made.trial("lora", 1e-3, 0.5, weight_decay=decay)
    made.chosen(lora=[0, 1, 2])
    found = {f.number: f.edges for f in made.results().finalists}
    assert found == {0: {}, 1: {}, 2: {"weight_decay": "low"}}
