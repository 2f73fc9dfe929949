"""Which settings are as good as the best, which matter, which lie at an edge: against losses that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hand_made import RATE, HandMade
from peft_study.report.evidence import Finding
from peft_study.statistics import TokenCounts, difference
from peft_study.storage.held_out import HeldOut


def only(study: HandMade, topic: str) -> Finding:
    [found] = [finding for finding in study.findings() if finding.topic == topic]
    return found


def test_the_range_ends_where_the_difference_excludes_zero(tmp_path: Path) -> None:
    """Noise of 0.3 nats an example over 64 examples: differences below about 0.1 cannot be told."""
    study = HandMade(tmp_path / "s", {"lora": RATE})
    gains = {1e-4: 0.1, 3e-4: 0.46, 1e-3: 0.5, 3e-3: 0.47, 1e-2: 0.2, 3e-2: 0.49}
    for rate, gain in gains.items():
        study.trial("lora", rate, gain, noise=0.3)
    trials = {t.values["learning_rate"]: t for t in study.state.of("lora", "search")}
    best = trials[1e-3].last
    assert best is not None
    alike = [r for r, t in trials.items() if not difference(t.last, best, study.examples.counts_N).excludes_zero()]
    assert alike == [3e-4, 1e-3, 3e-3, 3e-2], "the world is as the test believes"
    found = only(study, "range")
    assert found.values["settings"]["learning_rate"]["values"] == [3e-4, 1e-3, 3e-3], "0.03 lies beyond a worse one"
    assert found.trials == tuple(trials[rate].name for rate in (3e-4, 1e-3, 3e-3))
    assert found.text["en"] == (
        "lora, as good as its best within noise (6 trials ran to the end, one seed each): learning_rate 0.0003 to "
        "0.003 (3 trials)"
    )
    assert found.text["zh"] == (
        "LoRA：在噪声范围内与最好的设置一样好（6 次试验运行到底，各 1 个随机种子）："
        "learning_rate 0.0003 至 0.003（3 次试验）"
    )


@pytest.mark.parametrize("ending", [{"gain": None}, {"gain": 0.1, "status": "pruned", "reason": "worse"}])
def test_what_did_not_end_parts_the_range(tmp_path: Path, ending: dict[str, Any]) -> None:
    study = HandMade(tmp_path / "s", {"lora": RATE})
    study.trial("lora", 1e-3, 0.5, noise=0.3)
    study.trial("lora", 4e-3, 0.49, noise=0.3)
    assert only(study, "range").values["settings"]["learning_rate"]["high"] == 4e-3
    study.trial("lora", 2e-3, **ending)
    assert only(study, "range").values["settings"]["learning_rate"]["high"] == 1e-3
    assert study.said("range")[0].endswith("learning_rate 0.001 alone (1 trial)")


def test_with_several_settings_a_value_is_judged_by_the_best_tried_there(tmp_path: Path) -> None:
    space = {"rank": [4, 8, 16, 64], "learning_rate": [1e-3, 1e-2], "rslora": [True, False]}
    study = HandMade(tmp_path / "s", {"lora": space})
    for rank, rate, rslora, gain in (
        (4, 1e-3, True, 0.1),
        (8, 1e-3, True, 0.2),
        (8, 1e-2, True, 0.5),
        (16, 1e-2, False, 0.5001),
        (64, 1e-2, False, 0.5002),
        (64, 1e-3, False, 0.0),
    ):
        study.trial("lora", rate, gain, rank=rank, rslora=rslora, noise=0.3 if gain > 0.4 else 0.02)
    found = only(study, "range")
    assert {name: part["values"] for name, part in found.values["settings"].items()} == {
        "rank": [8, 16, 64],
        "learning_rate": [1e-2],
        "rslora": [True, False],
    }
    assert {name: part["trials"] for name, part in found.values["settings"].items()} == {
        "rank": 5,
        "learning_rate": 3,
        "rslora": 6,
    }
    assert "rank 8, 16 and 64 (5 trials)" in found.text["en"]
    assert "rslora true and false (6 trials)" in found.text["en"]
    assert found.text["en"].endswith("; each value is judged by the best of the other settings tried there")


def test_one_that_ran_to_its_end_makes_no_range_and_one_tried_says_nothing(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": RATE})
    study.trial("lora", 1e-3, 0.5)
    assert study.said("range", "edge", "sensitivity", "never_learned", "diverged") == []
    study.trial("lora", 1e-2, 0.4, status="pruned", reason="worse")
    assert study.said("range") == ["lora: one setting ran to its end, so it cannot be said which others are as good"]


def test_the_edge_is_that_of_the_final_that_is_recommended(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": {"learning_rate": [1e-3, 1e-2, 1e-1]}}, finals={"best": 2, "seeds": 1})
    study.trial("lora", 1e-1, 0.5)
    study.trial("lora", 1e-2, 0.4)
    assert only(study, "edge").values == {"setting": "learning_rate", "value": 1e-1, "edge": "high"}
    study.chosen(lora=[0, 1])
    study.finals("lora", 0, [0.3])
    study.finals("lora", 1, [0.6])
    study.concluded("lora", 1)
    assert study.said("edge") == []


def test_what_is_no_better_than_the_base_is_so_at_its_end_only(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": RATE})
    for rate, gain in ((1e-3, 0.5), (1e-5, 0.0), (1e-6, 0.001), (1.0, -0.5)):
        study.trial("lora", rate, gain, noise=0.05)
    study.trial("lora", 0.5, -0.5, status="pruned", reason="worse")
    found = only(study, "never_learned")
    assert found.trials == ("lora-001", "lora-002", "lora-003")
    assert found.values == {"settings": {"learning_rate": [1e-6, 1e-5, 1.0]}, "count": 3, "worse": 1, "full": 4}
    assert found.text["en"] == (
        "lora: 3 of 4 settings that ran to the end are no better than the untouched base: learning_rate 1e-06, 1e-05 "
        "and 1; 1 of these is worse than it"
    )


def test_sensitivity_names_the_least_and_the_greatest_mean(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": {"rank": [4, 8], "learning_rate": [1e-3, 1e-2]}})
    for rank, rate, gain in ((4, 1e-3, 0.1), (4, 1e-2, 0.3), (8, 1e-3, 0.5), (8, 1e-2, 0.9)):
        study.trial("lora", rate, gain, rank=rank)
    study.trial("lora", 1e-2, -1.0, status="pruned", reason="worse", rank=4)
    rank, rate, count = (finding for finding in study.findings() if finding.topic == "sensitivity")
    assert [point["loss"]["value"] for point in rank.values["points"]] == pytest.approx([1.8, 1.3])
    assert [point["loss"]["value"] for point in rate.values["points"]] == pytest.approx([1.7, 1.4])
    assert rank.text["en"].startswith("lora: by rank, the mean dev loss is least at 8, 1.300 (95 % ")
    assert ", 2 trials), and greatest at 4, 1.800 (95 % " in rank.text["en"]
    assert rank.values["importance"] is None
    assert count.text["en"] == (
        "lora: 4 trials ran to their end; how important each setting is takes 30 and is not given"
    )


def test_one_example_has_no_range(tmp_path: Path) -> None:
    """Without an interval nothing could be told apart, so nothing is claimed."""
    study = HandMade(tmp_path / "s", {"lora": RATE})
    study.trial("lora", 1e-3, 0.5)
    study.trial("lora", 1e-2, -0.5)
    for event in study.events:
        if event["event"] == "measured":
            event["sums"] = event["sums"][:1]
    one = TokenCounts(np.array([10]))
    study.examples = HeldOut(one, study.examples.base_N[:1], one)
    assert study.said("range", "never_learned") == []
    assert study.said("limits")[0].startswith("1 held-out row: ")
    assert "no interval: a single example" in study.about("lora")
