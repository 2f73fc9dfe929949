"""The studies behind docs/findings.md: the blocks are those of the design, the surfaces find a known optimum."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

STUDIES = Path(__file__).resolve().parents[1] / "studies"
sys.path.insert(0, str(STUDIES))

import experiment  # noqa: E402
import surfaces  # noqa: E402
import tables  # noqa: E402

from peft_study.config import METHODS, StudyConfig, validate  # noqa: E402

BLOCKS = sorted(STUDIES.glob("*/block-*.yaml"))


def test_the_blocks_are_those_of_the_design(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "HERE", tmp_path)
    for name in experiment.SETS:
        experiment.write(name)
    experiment.write_sample()
    experiment.write_rising()
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.glob("*/block-*.yaml")}
    there = {path.relative_to(STUDIES): path.read_text() for path in BLOCKS if path.parent.name != "transfer"}
    assert written == there


@pytest.mark.parametrize("block", BLOCKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_block_is_a_study_file(block: Path) -> None:
    config = validate(StudyConfig, yaml.safe_load(block.read_text()), where=str(block))
    assert config.methods


@pytest.mark.parametrize("name", experiment.SETS)
def test_the_design_has_all_its_trials(name: str) -> None:
    found = [yaml.safe_load(block.read_text()) for block in BLOCKS if block.parent.name == name]
    trials = [setting | study["training"] for study in found for setting in study["methods"].values()]
    for method, count in experiment.POINTS.items():
        rates = [trial["learning_rate"] for trial in trials if trial["method"] == method]
        assert len(rates) == count
        assert min(rates) < 3e-5
        assert max(rates) > 3
    assert {trial["steps"] for trial in trials} == set(experiment.STEPS)


def test_a_block_is_short_enough() -> None:
    for block in (path for path in BLOCKS if path.parent.name in experiment.SETS):
        study = yaml.safe_load(block.read_text())
        training, mean = study["training"], experiment.SETS[block.parent.name].mean
        assert training["steps"] * training["batch_size"] * mean * len(study["methods"]) <= experiment.BLOCK_TOKENS


def valley(method: str, exponent: float, noise: float) -> pd.DataFrame:
    """Returns the design's trials with losses whose best rate is 0.03 at 8 tokens, and moves with the tokens."""
    draw = np.random.default_rng(0)
    rows = pd.DataFrame(experiment.points(method, seed=0)).rename(columns={"tokens": "size", "rank": "size"})
    rows["init"] = rows.get("init")
    away = np.log10(rows["learning_rate"]) - np.log10(0.03 * (rows["size"] / 8) ** exponent)
    rows["gain"] = (-1.0 + 0.4 * away**2).clip(upper=surfaces.WORST) + draw.normal(0, noise, len(rows))
    return rows


@pytest.fixture(scope="module")
def known() -> surfaces.Surface:
    return surfaces.Surface("prompt_tuning", valley("prompt_tuning", -0.5, 0.02))


def test_a_surface_finds_the_known_best_rate_and_how_it_moves(known: surfaces.Surface) -> None:
    for effect in (effect for effect in known.effects() if effect["setting"] == "size"):
        low, middle, high = effect["rate"]
        best = 0.03 * (effect["level"] / 8) ** -0.5
        assert middle == pytest.approx(best, rel=0.5)
        assert low / 1.3 <= best <= high * 1.3
        assert effect["gain"][1] == pytest.approx(-1.0, abs=0.08)
    rule = known.rate_rule()
    assert rule.size[1] == pytest.approx(-0.5, abs=0.15)
    assert rule.steps[1] == pytest.approx(0.0, abs=0.15)
    at_reference = 0.03 * (surfaces.REFERENCE["prompt_tuning"].size / 8) ** -0.5
    assert rule.rate[1] == pytest.approx(at_reference, rel=0.4)


def test_what_does_not_matter_has_no_share(known: surfaces.Surface) -> None:
    shares = known.shares()
    assert shares["learning_rate"]["alone"] > 0.8
    for name in ("warmup_ratio", "weight_decay", "batch_size", "steps"):
        assert shares[name]["with_others"] < 0.05
    differences = [e["minus_first"] for e in known.effects() if e["setting"] in ("warmup_ratio", "weight_decay")]
    assert all(low - 0.02 <= 0 <= high + 0.02 for low, _, high in differences)


def test_the_error_of_a_surface_is_that_at_trials_that_it_has_not_seen() -> None:
    """The formula from the inverse covariance against leaving each trial out in turn."""
    rows = valley("lora", 0.0, 0.05)
    whole = surfaces.Surface("lora", rows)
    process, inputs = whole._process, whole._process.X_train_
    gains, errors = rows["gain"].to_numpy(), []
    scores = whole._scores(gains)
    assert whole._gains(scores) == pytest.approx(gains)
    for number in range(len(rows)):
        kept = np.arange(len(rows)) != number
        weights = process.kernel_(inputs[[number]], inputs[kept]) @ np.linalg.inv(
            process.kernel_(inputs[kept]) + process.alpha * np.eye(kept.sum())
        )
        expected = scores.mean() + weights @ (scores[kept] - scores.mean())
        errors.append(float(whole._gains(expected)[0]) - gains[number])
    assert whole.left_out == pytest.approx(float(np.sqrt(np.mean(np.square(errors)))), rel=1e-6)
    assert 0.5 < whole.covered <= 1.0


def test_what_broke_is_cut_and_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "kind": "search", "method": "lora-03", "planned_steps": 20, "steps": 7, "tokens": np.nan, "rank": 8.0,
        "status": "diverged", "dev_minus_base": np.nan,
    }  # fmt: skip
    good = {**row, "method": "prompt_tuning-01", "tokens": 4.0, "rank": np.nan, "status": "finished"}
    (tmp_path / "words").mkdir()
    frame = pd.DataFrame([row, {**good, "dev_minus_base": -0.4}, {**good, "kind": "reference"}])
    frame.to_parquet(tmp_path / "words" / "block-01.parquet")
    monkeypatch.setattr(surfaces, "HERE", tmp_path)
    found = surfaces.rows()
    assert found["gain"].tolist() == [surfaces.WORST, -0.4]
    assert found["method"].tolist() == ["lora", "prompt_tuning"]
    assert found["size"].tolist() == [8.0, 4.0]
    assert found["steps"].tolist() == [20, 20]


@pytest.mark.parametrize("language", tables.PAGES)
def test_the_tables_of_the_pages_are_those_of_the_summary(language: str) -> None:
    summary = json.loads((STUDIES / "summary.json").read_text())
    there = tables.page_tables(tables.PAGES[language])
    for name, rows in tables.tables(summary).items():
        cells = [tuple(tables.translated(cell) if language == "zh" else cell for cell in row) for row in rows]
        assert there[name] == tables.markdown(cells), f"{name}: make findings"


def test_the_default_rates_are_good_in_every_data_set() -> None:
    """They lie where a run of 120 steps loses less than 5 % of what can be gained."""
    summary = json.loads((STUDIES / "summary.json").read_text())
    for data, methods in summary["designed"].items():
        for method, found in methods.items():
            default, window = METHODS[method].learning_rates.default, found["window"]
            assert window["from"] <= default <= window["to"], (data, method)


def test_published_rates_lie_on_the_map() -> None:
    published = pd.read_csv(STUDIES / "published.csv")
    assert set(published["method"]) == set(experiment.POINTS)
    low, high = experiment.RATES
    assert ((published["rate_low"] >= low) & (published["rate_high"] <= high)).all()
    assert (published["rate_low"] <= published["rate_high"]).all()
    assert published["source"].notna().all()
