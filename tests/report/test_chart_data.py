"""The charts of a study's folder and of a run's: which there are, and that they have its numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import altair as alt
import pytest

from hand_made import HandMade
from peft_study.report.chart_data import charts_of, run_charts
from peft_study.report.charts import MOST_CURVES, spec
from peft_study.report.run_reader import HeldOutPoint
from peft_study.report.study_reader import read_study
from peft_study.statistics import Estimate
from peft_study.storage.metrics import MetricsWriter
from peft_study.storage.run_dir import RunFolder


def measured(study: HandMade, *, batch_tokens: int = 50) -> None:
    """Writes the metrics of a hand-made study's trials, as their training would have."""
    for trial in study.state.trials.values():
        path = study.folder.trial(trial.name).metrics
        path.parent.mkdir(parents=True)
        writer = MetricsWriter(path, None)
        for step in range(max(trial.sums, default=0) + 1):
            if step:
                writer.write("train", step, loss=1.0, tokens=batch_tokens)
            if step in trial.sums:
                loss = float(trial.sums[step].sum() / study.examples.counts_N.sum())
                writer.write("held_out", step, loss=loss, loss_low=loss - 0.1, loss_high=loss + 0.1)
        if trial.status == "diverged":
            writer.write("held_out", 12, loss=math.nan, loss_low=math.nan, loss_high=math.nan)
        writer.close()


@pytest.fixture
def study(tmp_path: Path) -> HandMade:
    made = HandMade(
        tmp_path / "study",
        {"lora": {"rank": [4, 8]}, "prompt_tuning": {"tokens": 8}},
        finals={"best": 1, "seeds": 2},
    )
    made.trial("lora", 1e-3, 0.5, rank=8)
    made.trial("lora", 1e-1, None, rank=4)
    made.trial("prompt_tuning", 0.1, 0.2)
    made.trial("prompt_tuning", 3.0, 0.1, status="pruned", reason="at step 11 worse")
    made.chosen(lora=[0], prompt_tuning=[0])
    made.finals("lora", 0, [0.5, 0.6])
    made.finals("prompt_tuning", 0, [0.2, 0.3])
    made.concluded("lora")
    return made


def charts(study: HandMade, *arguments: Any) -> dict[str, alt.LayerChart]:
    if not study.folder.path.exists():
        study.written()
        measured(study)
    return charts_of(read_study(study.folder.path), study.results(), *arguments)


def rows(chart: alt.LayerChart) -> list[dict[str, Any]]:
    return [row for found in spec(chart)["datasets"].values() for row in found]


def test_a_study_has_its_charts_in_the_order_of_the_report(study: HandMade) -> None:
    points = tuple(
        SimpleNamespace(value=v, low=v, high=v, loss=Estimate(1.5, 1.4, 1.6), trials=("lora-000",)) for v in (4, 8)
    )
    responses = [
        SimpleNamespace(method="lora", setting=setting, log=True, points=some)
        for setting, some in (("learning_rate", points), ("rank", points), ("alpha", points[:1]))
    ]
    costs = {
        method: SimpleNamespace(
            setting=f"{method}-000", trainable=t, adapter_bytes=4 * t, peak_bytes=None, tokens_per_second=9.5
        )
        for method, t in (("lora", 5000), ("prompt_tuning", 70))
    }
    found = charts(study, responses, costs)
    assert list(found) == [
        "learning_curves",
        "learning_rate",
        "response-lora-rank",
        "pareto-trainable",
        "pareto-adapter_bytes",
        "pareto-tokens_per_second",
    ]
    sizes = {row["trial"]: row["x"] for row in rows(found["pareto-adapter_bytes"]) if "trial" in row}
    assert sizes == {"lora-000": 20000, "prompt_tuning-000": 280}
    assert "dev loss" in json.dumps(spec(found["pareto-trainable"])), "the test part was not opened"
    study.opened(**{f"{m}-000-seed-{s}": 0.4 for m in ("lora", "prompt_tuning") for s in (1, 2)})
    opened = charts_of(read_study(study.folder.path), study.results())["pareto-trainable"]
    assert "test loss" in json.dumps(spec(opened))
    assert {row["y"] for row in rows(opened) if "trial" in row} == {1.6}
    assert {row["x"] for row in rows(opened) if "trial" in row} == {7}, "the journal's, where no cost was measured"


def test_curves_have_the_losses_of_the_metrics_at_their_data_tokens(study: HandMade) -> None:
    found = rows(charts(study)["learning_curves"])
    lines = {row["trial"]: row for row in found if isinstance(row.get("x"), list)}
    assert set(lines) == {"lora-000", "lora-001", "prompt_tuning-000", "prompt_tuning-001"}, "finals have no curve"
    assert lines["lora-000"]["x"] == [0, 100 * 50]
    assert lines["lora-000"]["y"] == pytest.approx([2.0, 1.5])
    assert lines["prompt_tuning-001"]["x"] == [0, 11 * 50]
    marks = {row["trial"]: row["mark"] for row in found if "mark" in row}
    assert marks == {"lora-000": "full", "lora-001": "lost", "prompt_tuning-000": "full", "prompt_tuning-001": "hollow"}


def test_rates_have_the_rows_numbers(study: HandMade) -> None:
    found = {row["trial"]: row for row in rows(charts(study)["learning_rate"]) if "trial" in row}
    for row in study.results().rows:
        if row.trial.kind == "search" and row.dev is not None:
            drawn = found[row.trial.name]
            values = (drawn["x"], drawn["y"], drawn["y1"], drawn["y2"])
            wanted = (row.settings["learning_rate"], row.dev.value, row.dev.low, row.dev.high)
            assert values == pytest.approx(wanted, rel=1e-5)
    assert found["lora-001"]["mark"] == "lost"


def test_only_the_curves_that_are_drawn_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = HandMade(tmp_path / "study", {"lora": {"learning_rate": {"low": 1e-6, "high": 1e3, "log": True}}})
    for i in range(40):
        made.trial("lora", 10 ** (i / 10 - 4), 0.01 * i)
    made.written()
    measured(made)
    record, results = read_study(made.folder.path), made.results()
    from peft_study.storage import metrics

    opened: list[Path] = []
    read = metrics.read
    monkeypatch.setattr(metrics, "read", lambda path: opened.append(path) or read(path))
    found = charts_of(record, results)
    assert len(opened) == MOST_CURVES
    assert f"{MOST_CURVES} of 40 trials are drawn" in " ".join(spec(found["learning_curves"])["title"]["subtitle"])


def test_a_study_of_failures_has_what_can_be_drawn(tmp_path: Path) -> None:
    made = HandMade(tmp_path / "study", {"lora": {"learning_rate": {"low": 1e-6, "high": 1e3, "log": True}}})
    assert charts(made) == {}, "no trial has begun"
    made = HandMade(tmp_path / "other", {"lora": {"learning_rate": {"low": 1e-6, "high": 1e3, "log": True}}})
    made.trial("lora", 1.0, None)
    assert list(charts(made)) == ["learning_curves"], "one rate is no axis"
    made = HandMade(tmp_path / "third", {"lora": {"learning_rate": {"low": 1e-6, "high": 1e3, "log": True}}})
    made.trial("lora", 1.0, None)
    made.trial("lora", 2.0, None)
    found = rows(charts(made)["learning_rate"])
    assert [row["mark"] for row in found if "mark" in row] == ["lost", "lost"]


def test_a_run_has_its_losses_and_the_base(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    writer = MetricsWriter(folder.metrics, None)
    writer.write("held_out", 0, loss=2.25, loss_low=2.0, loss_high=2.5)
    for step in (1, 2, 3):
        writer.write("train", step, loss=math.nan if step == 2 else 2.0 / step, tokens=100)
    writer.write("held_out", 3, loss=1.5, loss_low=1.25, loss_high=1.75)
    writer.close()
    curve = (HeldOutPoint(0, Estimate(2.25, 2.0, 2.5), Estimate(0.25, 0.0, 0.5), None),)
    run: Any = SimpleNamespace(folder=folder, curve=curve)
    found = rows(run_charts(run)["training"])
    held = {(row["x"], row["y"]) for row in found if row.get("method") == "held-out examples"}
    assert held == {(0, 2.25), (300, 1.5)}
    assert {row["x"] for row in found if row.get("method") == "training batches"} == {100, 300}
    assert [row["text"] for row in found if "text" in row] == [["base", "2.000"]]
    folder.metrics.write_text("")
    assert run_charts(run) == {}
