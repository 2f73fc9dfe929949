"""`StudyResult`: best, groups and rows of studies whose losses are known."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest

import peft_study
from hand_made import RATE, HandMade
from peft_study.errors import ModelError
from peft_study.report.results import columns, write_rows

METHODS = {"lora": RATE, "prefix_tuning": RATE, "prompt_tuning": RATE}


def made(folder: Path, *, opened: bool = True, **gains: list[float | None]) -> HandMade:
    """Returns a study with one final a method, whose seeds gain so much."""
    study = HandMade(folder, METHODS, finals={"best": 1, "seeds": 3})
    for method, seeds in gains.items():
        study.trial(method, 1e-3, next(gain for gain in seeds if gain is not None))
    study.chosen(**{method: [0] for method in gains})
    for method, seeds in gains.items():
        study.finals(method, 0, seeds)
    ranked = [m for m, seeds in gains.items() if None not in seeds]
    study.concluded(max(ranked, key=lambda m: sum(gains[m]), default=None))  # type: ignore[arg-type]
    if opened:
        finals = {f"{m}-000-seed-{n}": g for m, s in gains.items() for n, g in enumerate(s, 1) if g is not None}
        study.opened(**finals)
    study.written()
    return study


@pytest.mark.parametrize("opened", [True, False])
def test_groups_part_where_the_difference_excludes_zero(tmp_path: Path, opened: bool) -> None:
    study = made(
        tmp_path / "study",
        opened=opened,
        lora=[1.00, 1.01, 0.99],
        prefix_tuning=[0.60, 0.61, 0.62],
        prompt_tuning=[0.58, 0.62, 0.60],
    )
    result = peft_study.open_study(study.folder.path)
    assert result.groups == (("lora-000",), ("prefix_tuning-000", "prompt_tuning-000"))
    assert [final.name for final in result.finals] == ["lora-000", "prefix_tuning-000", "prompt_tuning-000"]


def test_the_best_is_the_least_mean_dev_loss_of_what_is_ranked(tmp_path: Path) -> None:
    study = made(
        tmp_path / "study",
        lora=[0.50, 0.52, 0.54],
        prefix_tuning=[0.40, 0.41, 0.42],
        prompt_tuning=[0.90, None, 0.90],
    )
    best = peft_study.open_study(study.folder.path).best
    assert best is not None
    assert (best.name, best.method, best.settings["learning_rate"]) == ("lora-000", "lora", 1e-3)
    assert best.dev is not None
    assert best.dev.value == pytest.approx(2.0 - 0.52)
    assert best.adapter_path == study.folder.path / "trials/lora-000-seed-3/adapter", "the seed of the least dev loss"
    with pytest.raises(ModelError, match="holds no adapter"):
        best.load()


def test_nothing_ranked_has_no_best_and_no_groups(tmp_path: Path) -> None:
    result = peft_study.open_study(made(tmp_path / "study", lora=[0.5, None, 0.5]).folder.path)
    assert (result.best, result.groups) == (None, ())
    assert "nothing is ranked" in repr(result)


def test_an_unfinished_study_is_read_as_it_is(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "study", METHODS)
    study.trial("lora", 1e-3, 0.5)
    study.asked("lora-001", "lora", "search", 1, None, {"learning_rate": 1e-2})
    study.written(status="running")
    result = peft_study.open_study(study.folder.path)
    assert (result.state, result.best, result.finals) == ("killed", None, ())
    frame = result.trials_dataframe()
    assert list(frame.status) == ["finished", "finished", "interrupted"]
    assert "lora: learning_rate 0.001 is best of 2 settings" in result.findings


def test_a_study_without_trials_has_an_empty_frame(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "study", METHODS)
    study.events.clear()
    study.written(status="running")
    (study.folder.path / "examples.json").unlink()
    result = peft_study.open_study(study.folder.path)
    assert list(result.trials_dataframe().columns) == list(columns())
    assert len(result.trials_dataframe()) == 0
    assert (result.findings, result.best, result.groups) == ("no trial has begun", None, ())


def test_the_frame_is_results_csv(tmp_path: Path) -> None:
    study = made(tmp_path / "study", lora=[0.5, 0.5, 0.5], prompt_tuning=[0.2, 0.2, 0.2])
    write_rows(study.results(), study.folder)
    frame = peft_study.open_study(study.folder.path).trials_dataframe()
    table = pandas.read_csv(study.folder.path / "results.csv")
    assert list(frame.columns) == list(table.columns)
    for name in ("name", "dev", "dev_low", "test", "learning_rate", "status", "steps"):
        pandas.testing.assert_series_equal(frame[name], table[name], check_dtype=False)
