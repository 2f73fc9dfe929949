"""The evidence of findings: against results.csv by hand, and of studies in which little or nothing worked."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hand_made import COUNTS, RATE, HandMade, N
from peft_study.errors import ConfigError
from peft_study.report.evidence import Finding
from peft_study.report.findings import MAIN, TOPICS, find, plain, texts
from peft_study.report.results import write_rows
from peft_study.report.study_result import open_study
from peft_study.statistics import TokenCounts
from peft_study.storage.files import json_text
from peft_study.storage.held_out import HeldOut
from rich_study import COSTS, rich


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> HandMade:
    made = rich(tmp_path_factory.mktemp("rich") / "study")
    made.written()
    write_rows(made.results(), made.folder)
    return made


@pytest.fixture(scope="module")
def findings(study: HandMade) -> tuple[Finding, ...]:
    return study.findings(**COSTS)


@pytest.fixture(scope="module")
def rows(study: HandMade) -> list[dict[str, Any]]:
    with (study.folder.path / "results.csv").open() as file:
        return list(csv.DictReader(file))


def values(findings: tuple[Finding, ...], topic: str, method: str | None) -> dict[str, Any]:
    return next(found.values for found in findings if (found.topic, found.method) == (topic, method))


def test_trials_are_names_of_the_study_and_topics_are_known(study: HandMade, findings: tuple[Finding, ...]) -> None:
    known = set(study.state.trials)
    for finding in findings:
        assert set(finding.trials) <= known
        assert len(set(finding.trials)) == len(finding.trials)
        assert finding.topic in TOPICS
        assert finding.method in (None, *study.config.methods)
        assert finding.trials or finding.topic == "untested"


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning"])
def test_numbers_of_a_method_are_those_of_results_csv(
    method: str, findings: tuple[Finding, ...], rows: list[dict[str, Any]]
) -> None:
    own = [row for row in rows if row["method"] == method and row["kind"] == "search"]
    ended = [row for row in own if row["status"] == "finished"]
    best = min(ended, key=lambda row: float(row["dev"]))
    search = values(findings, "search", method)
    assert (search["best"], search["tried"]) == (best["name"], len(own))
    assert search["settings"]["learning_rate"] == float(best["learning_rate"])
    for end, column in (("value", "dev"), ("low", "dev_low"), ("high", "dev_high")):
        assert search["dev"][end] == pytest.approx(float(best[column]))
    assert search["statuses"] == {s: sum(r["status"] == s for r in own) for s in {r["status"] for r in own}}
    finals = [row for row in rows if row["method"] == method and row["kind"] == "final"]
    final = values(findings, "final", method)
    assert final["dev"]["value"] == pytest.approx(np.mean([float(row["dev"]) for row in finals]))
    assert final["test"]["value"] == pytest.approx(np.mean([float(row["test"]) for row in finals]))
    base = next(row for row in rows if row["kind"] == "reference")
    assert final["test_minus_base"]["value"] == pytest.approx(final["test"]["value"] - float(base["test"]))
    idle = [row["name"] for row in ended if float(row["dev_minus_base_high"]) >= 0]
    assert idle == [n for f in findings if (f.topic, f.method) == ("never_learned", method) for n in f.trials]
    lost = [row["name"] for row in own if row["status"] == "diverged"]
    assert lost == [n for f in findings if (f.topic, f.method) == ("diverged", method) for n in f.trials]
    trained = sum(int(row["data_tokens"]) for row in rows if row["method"] == method)
    assert values(findings, "cost", method)["data_tokens"] == trained


def test_curves_are_means_of_rows_that_finished(findings: tuple[Finding, ...], rows: list[dict[str, Any]]) -> None:
    curve = next(f for f in findings if f.topic == "sensitivity" and f.values.get("setting") == "rank")
    assert [point["value"] for point in curve.values["points"]] == [8, 16]
    ended = [row for row in rows if row["kind"] == "search" and row["status"] == "finished"]
    for point in curve.values["points"]:
        own = [float(row["dev"]) for row in ended if row["rank"] == str(point["value"])]
        assert len(own) == 17
        assert point["loss"]["value"] == pytest.approx(np.mean(own))
    assert sorted(curve.trials) == sorted(row["name"] for row in ended if row["method"] == "lora")


def test_pareto_fronts_follow_from_losses_and_costs(findings: tuple[Finding, ...]) -> None:
    fronts = {f.values["cost"]: f.values for f in findings if f.topic == "pareto"}
    assert set(fronts) == {"trainable", "adapter_bytes", "tokens_per_second"}, "peak memory is known of one alone"
    for front in fronts.values():
        assert front["part"] == "test"
        for method, point in front["points"].items():
            assert point["loss"] == pytest.approx(values(findings, "final", method)["test"]["value"])
    # prefix tuning trained 7 numbers and prompt tuning 4,608, at the same loss; lora is best
    points = {method: point["cost"] for method, point in fronts["trainable"]["points"].items()}
    assert points == {"lora": 4_884_480, "prefix_tuning": 7, "prompt_tuning": 4_608}
    assert fronts["trainable"]["dominated"] == {"prompt_tuning": "prefix_tuning"}
    assert fronts["adapter_bytes"]["front"] == ["lora", "prompt_tuning"]
    assert fronts["tokens_per_second"]["dominated"] == {"prompt_tuning": "lora"}, "more is better"


def test_costs_are_those_measured_and_else_those_of_the_trials(findings: tuple[Finding, ...]) -> None:
    texts_of = {f.method: f.text["en"] for f in findings if f.topic == "cost"}
    assert texts_of["lora"] == (
        "lora: 4,884,480 trainable parameters, adapter of 18.7 MiB, 1.4 GiB of memory a trial beside the base, 410 "
        "data tokens a second alone (a row of 1,024 tokens), 190,000 data tokens trained on, range tests and finals "
        "included"
    )
    assert texts_of["prefix_tuning"].startswith("prefix tuning: 7 trainable parameters, 35,000 data tokens")


def test_the_result_has_text_in_both_languages_and_the_objects(study: HandMade, findings: tuple[Finding, ...]) -> None:
    result = open_study(study.folder.path)
    # nothing was measured in this folder
    own, others = ([f for f in found if f.topic not in ("cost", "pareto")] for found in (result.evidence, findings))
    assert own == others
    assert result.findings == "\n".join(f"- {text}" for text in texts(result.evidence, "en", MAIN))
    assert result.findings_in("zh").startswith("- 未训练的基座模型：开发集损失 2.000（")
    with pytest.raises(ConfigError, match="unknown language 'fr'"):
        result.findings_in("fr")


def test_findings_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": RATE})
    study.trial("lora", 1e-3, float("nan"), status="finished")
    study.trial("lora", 1e-2, 0.5)
    study.trial("lora", 1e-1, 0.4)
    found = study.findings()
    written = json.loads(json.dumps(plain(found), allow_nan=False))
    assert [entry["topic"] for entry in written] == [finding.topic for finding in found]
    assert set(written[0]) == {"topic", "method", "text", "trials", "values"}
    assert json.loads(json_text(plain(found))) == written
    assert study.about("lora").startswith("lora: learning_rate 0.01 is best of 3 settings")
    assert study.said("diverged") == ["lora: 1 of 3 settings diverged: learning_rate 0.001"]
    [span] = [finding for finding in found if finding.topic == "range"]
    assert span.trials == ("lora-001",)
    assert all("nan" not in text for finding in found for text in finding.text.values())


@pytest.mark.parametrize("what", ["nothing", "running", "one", "failures", "nan"])
def test_a_study_in_which_little_worked_says_so(tmp_path: Path, what: str) -> None:
    study = HandMade(tmp_path / "s", {"lora": RATE, "prompt_tuning": RATE}, finals={"best": 1, "seeds": 1})
    for method in ("lora", "prompt_tuning") if what not in ("nothing", "running") else ():
        gain = {"one": 0.5, "failures": None, "nan": math.nan}[what]
        study.trial(method, 1e-3, gain, status="finished" if what == "nan" else None)
    if what == "running":
        study.asked("lora-000", "lora", "search", 0, None, {"learning_rate": 1e-3})
    if what == "one":
        study.chosen(lora=[0])
        study.finals("lora", 0, [0.5])
        study.concluded("lora")
    found = study.findings(**COSTS)
    json.dumps(plain(found), allow_nan=False)
    assert {name for finding in found for name in finding.trials} <= set(study.state.trials)
    expected = {
        "nothing": "lora: no trial began in the time allowed",
        "running": "lora: its only setting did not finish (none has ended yet)",
        "one": "lora: learning_rate 0.001 is the only setting tried: dev loss 1.500 (95 % 1.430 to 1.570, over 64 "
        "examples, one seed)",
        "failures": "lora: its only setting did not finish (the loss became nan at step 3)",
        "nan": "lora: its only setting did not finish (the loss is no finite number)",
    }
    assert study.about("lora") == expected[what]
    spoken = " ".join(study.said("limits"))
    assert ("nothing was retrained with new seeds" in spoken) == (what in ("running", "failures", "nan"))
    if what == "one":
        assert study.said("winner") == [
            "winner by mean dev loss over one new seed: lora with learning_rate 0.001; fewer than 3 seeds: take it as "
            "a lead"
        ]


def test_long_names_and_texts_stay_short_in_sentences_and_whole_in_the_values(tmp_path: Path) -> None:
    long, space = 10_000 * "x", 200 * "y"  # a trial's folder has its name
    study = HandMade(
        tmp_path / "s",
        {space: {"method": "lora", "target_modules": [long], **RATE}},
        model={"name": f"m\n{long}"},
        data={"train": f"d\n{long}"},
    )
    study.trial(space, 1e-3, None, status="failed", reason=f"out of\nmemory {long}")
    found = find(study.config, study.state, study.examples, study.results(), {})
    for finding in found:
        for text in finding.text.values():
            assert len(text) < 1000
            assert "\n" not in text
    [fixed] = [f for f in found if f.topic == "untested" and f.method == space]
    assert fixed.values["fixed"]["target_modules"] == long
    assert [f.values["model"] for f in found if f.topic == "untested" and f.method is None] == [f"m\n{long}"]


def test_a_base_that_is_no_number_gives_no_claims(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": RATE})
    study.trial("lora", 1e-3, 0.5)
    study.trial("lora", 1e-2, 0.4)
    study.examples = HeldOut(TokenCounts(COUNTS), np.full(N, np.nan), TokenCounts(COUNTS))
    found = study.findings()
    json.dumps(plain(found), allow_nan=False)
    assert study.said("never_learned") == []
    assert found[0].text["en"].startswith("untouched base: dev loss nan (")
