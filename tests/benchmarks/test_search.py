"""The search benchmark: replays of hand-made curves come to what a pencil comes to; a tiny grid is measured live."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import search_live
import search_recorded
from search_grid import Cell, Curves, Scale, cell_of, read_curves
from search_ours import WorkerCosts, decisions, order_of, ours
from search_replay import (
    NEVER,
    Costs,
    Search,
    Seen,
    asha,
    factor,
    good_from,
    one_after_another,
    recommended,
    regrets,
    spread,
    times,
)

import search

COSTS = Costs(start_up=100, overhead=10, token=1, dev_token=0.5)
LOSSES = {"good": 1.0, "third": 3.0, "fourth": 4.0, "fifth": 5.0}
SETTINGS = {
    "good": {"learning_rate": 1e-2, "rank": 4},
    "third": {"learning_rate": 1e-2, "rank": 8},
    "fourth": {"learning_rate": 1e-3, "rank": 4},
    "fifth": {"learning_rate": 1e-3, "rank": 8},
}
"""Four cells whose losses never cross; each batch is one example of 10 tokens, the dev part has 20."""


def curves(**changed: Any) -> Curves:
    """Returns the curves of those cells: 9 steps, judged after 1 and 3."""
    values = {
        "model": {"name": "none"},
        "data": {"train": "none"},
        "methods": {"lora": {"learning_rate": [1e-2, 1e-3], "rank": [4, 8]}},
        "budget": {"steps": 9},
        "search": {"sampler": "grid", "audit": 0.0},
        "finals": {"best": 0},
    }
    cells = [
        Cell(SETTINGS[name], "finished", 9, {step: np.full(8, loss) for step in (1, 3, 9)}, test=loss)
        for name, loss in LOSSES.items()
    ]
    plain = Curves(
        values,
        rungs=(1, 3),
        steps=9,
        counts_N=np.ones(8, dtype=np.int64),
        start_N=np.full(8, 9.0),
        dev_tokens=20,
        batches=((10,),) * 9,
        slots=2,
        row_tokens=20,
        cells={cell.name: cell for cell in cells},
    )
    return dataclasses.replace(plain, **changed)


def order(*names: str) -> list[str]:
    """Returns the cells of these names."""
    return [cell_of(SETTINGS[name]) for name in names]


def test_one_run_after_another() -> None:
    """A trial takes 10 to begin, 90 for its tokens, 10 for the dev part; the good one is the second."""
    found = one_after_another(curves(), order("third", "good", "fourth", "fifth"), COSTS)
    assert [seen.at for seen in found.seen] == [210, 320, 430, 540]
    assert times(found, curves(), "highest") == {"first": 320, "stays": 320, "whole": 540}
    assert times(found, curves(), "finished") == times(found, curves(), "highest")


def test_a_cell_that_diverged_costs_its_steps_and_is_never_recommended() -> None:
    measured = curves()
    name = order("good")[0]
    cells = {**measured.cells, name: Cell(SETTINGS["good"], "diverged", 4, {}, test=float("inf"))}
    found = one_after_another(curves(cells=cells), order("good", "third"), COSTS)
    assert [(seen.at, seen.cell) for seen in found.seen] == [(100 + 10 + 40 + 10 + 110, order("third")[0])]


def test_ray_tunes_asha() -> None:
    """The first cell is judged against nobody and goes on to the end; a worse one stops at the first rung."""
    pytest.importorskip("ray", reason="Ray Tune is a peer, no dependency")
    found = asha(curves(), order("good", "third", "fourth", "fifth"), COSTS)
    assert [seen.at for seen in found.seen] == [130, 160, 230, 260, 290, 320]
    assert times(found, curves(), "highest") == {"first": 130, "stays": 130, "whole": 320}
    assert times(found, curves(), "finished") == {"first": 230, "stays": 230, "whole": 320}
    last = asha(curves(), order("third", "fourth", "fifth", "good"), COSTS)
    assert times(last, curves(), "highest") == {"first": 420, "stays": 420, "whole": 420}


def test_ray_tunes_asha_with_two_at_a_time() -> None:
    pytest.importorskip("ray", reason="Ray Tune is a peer, no dependency")
    two = dataclasses.replace(COSTS, concurrent=2)
    found = asha(curves(), order("good", "third", "fourth", "fifth"), two)
    assert [(seen.at, seen.step) for seen in found.seen] == [(130, 1), (130, 1), (160, 3), (160, 1), (190, 1), (230, 9)]
    assert found.over == 230


def first_order(name: str) -> int:
    """Returns a search seed whose grid begins with that cell."""
    costs = WorkerCosts(0, 0, 0, 0, 0)
    return next(s for s in range(50) if order_of(ours(curves(), s, costs)[1])[0] == order(name)[0])


def test_our_search() -> None:
    """The base's dev losses take 10; a row of two batches 20, of one 10; each dev part 10.

    100 start-up, 110 base; row 130, two measured 150: the second stops; row 170, the third measured 180 and stopped;
    row 200, the first at its second rung and the fourth at its first 220; six rows alone 280, measured 290.
    """
    found, events = ours(curves(), first_order("good"), WorkerCosts(100, 0, 1, 1, 0.5))
    assert [(seen.at, seen.step) for seen in found.seen] == [(150, 1), (150, 1), (180, 1), (220, 3), (220, 1), (290, 9)]
    assert times(found, curves(), "highest") == {"first": 150, "stays": 150, "whole": 290}
    assert times(found, curves(), "finished") == {"first": 290, "stays": 290, "whole": 290}
    ended = decisions(events)
    assert ended.pop(order("good")[0]) == ("finished", 9)
    assert set(ended.values()) == {("pruned", 1)}


def test_our_search_begins_with_what_entering_takes_and_ends_what_diverged() -> None:
    plain, good = curves(), order("good")[0]
    cells = {**plain.cells, good: Cell(SETTINGS["good"], "diverged", 2, {1: np.full(8, 1.0)}, test=float("inf"))}
    found, events = ours(curves(cells=cells), first_order("good"), WorkerCosts(100, 3, 1, 1, 0.5))
    assert found.seen[0].at == 150 + 2 * 3
    assert decisions(events)[good] == ("diverged", 2)
    # the others were stopped against it before it diverged: nothing has finished
    assert recommended(found.seen, "finished", 9) == []


def test_what_is_recommended_when() -> None:
    seen = [
        Seen(1, "a", 1, 5.0),
        Seen(2, "b", 1, 4.0),
        Seen(3, "a", 3, 3.0),
        Seen(4, "c", 1, 1.0),
        Seen(5, "b", 3, 2.0),
    ]
    assert recommended(seen, "highest", 9) == [(1, "a"), (2, "b"), (3, "a"), (5, "b")]
    assert recommended(seen, "finished", 9) == []
    assert recommended(seen, "finished", 3) == [(3, "a"), (5, "b")]
    changes = recommended(seen, "highest", 9)
    assert good_from(changes, frozenset("b")) == (2, 5)
    assert good_from(changes, frozenset("a")) == (1, NEVER)
    assert good_from(changes, frozenset("c")) == (NEVER, NEVER)


def test_good_cells_are_within_two_percent_of_the_best() -> None:
    tests = dict(zip(LOSSES, (1.0, 1.0199, 1.021, 2.0), strict=True))
    near = {order(name)[0]: Cell(SETTINGS[name], "finished", 9, {}, test) for name, test in tests.items()}
    assert curves(cells=near).good() == frozenset(order("good", "third"))


def test_the_regret_of_what_is_recommended() -> None:
    """Nothing before 5 s is as bad as the worst cell; then a cell three times the best, from 20 s on the best."""
    third, good = order("third", "good")
    searches = [Search([], 30, [(5, third), (20, good)]), Search([], 30, [(20, good)])]
    found = regrets(searches, curves(), "highest", [1, 10, 20])
    assert found == [[4.0, 4.0, 4.0], [2.5, 3.0, 3.5], [0.0, 0.0, 0.0]]


def test_our_model_recommends_at_every_measurement() -> None:
    found, events = ours(curves(), 0, WorkerCosts(100, 0, 1, 1, 0.5), "d")
    assert len(order_of(events)) == 4
    assert {cell for _, cell in found.recommends} <= set(order(*LOSSES))
    assert found.recommends[-1][1] == order("good")[0]
    assert times(found, curves(), "highest")["stays"] <= found.over


def test_medians_and_what_is_never_reached() -> None:
    assert spread([3.0, 1.0, NEVER]) == {"median": 3.0, "least": 1.0, "most": None, "reached": 2, "seeds": 3}
    assert factor([40.0, 20.0, 30.0], [10.0, 15.0, NEVER]) == 2.0
    assert factor([NEVER, NEVER, 30.0], [10.0, 15.0, 20.0]) is None


def test_seconds_from_stamps() -> None:
    """Two rows of 2 s and 20 tokens, one of 2 s with an evaluation of 3 s, for two trials of 10 dev tokens each."""

    def report(at: float, **what: int) -> dict[str, Any]:
        return {
            "what": "report",
            "at": at,
            **dict.fromkeys(("tokens", "measured", "entered", "left"), 0),
            "running": 2,
            **what,
        }

    stamps = [
        {"what": "ready", "at": 5.0},
        report(5.0, running=0),
        report(7.0, entered=2),
        report(9.0, tokens=20),
        report(11.0, tokens=20),
        report(16.0, tokens=20, measured=2, left=1, running=1),
        report(16.5, entered=1),
        report(18.5, tokens=20),
    ]
    found = search_live.speeds(stamps, 2, dev_tokens=10)
    assert found["seconds_per_token"] == pytest.approx(0.1)
    assert found["seconds_per_dev_token"] == pytest.approx(3 / 20)
    assert (found["entry"], found["rows"]) == (0.5, 4)
    assert search_live.start_up(stamps) == 7.0 - 2 * 0.5


def test_unfinished_curves_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "search_curves.jsonl"
    with pytest.raises(SystemExit, match="measure"):
        read_curves(path, "tiny")
    path.write_text(
        json.dumps({"row": "study", "model": "tiny", "data": "mawps", "method": "lora", "grid": "x", "cells": 24})
        + "\n"
    )
    with pytest.raises(SystemExit, match="0 of 24 cells"):
        read_curves(path, "tiny")


@pytest.mark.skipif(not search_recorded.SWEEP.exists(), reason="the shared data are not there")
def test_other_peoples_runs(tmp_path: Path) -> None:
    """LoRA on 35 models by others: without the prior, half the trials of a random order are enough.

    And of 63 runs of many methods none of the ten best is stopped for being unlikely.
    """
    search_recorded.main(["--out", str(tmp_path), "--orders", "1"])
    rows = [json.loads(line) for line in (tmp_path / "search_recorded.jsonl").read_text().splitlines()]
    tried = {row["order"]: row["mean"] for row in rows if row["row"] == "tried"}
    stopped = {row["rule"]: row["of_ten_best"] for row in rows if row["row"] == "stopped"}
    assert stopped["probability"] == 0 < stopped["successive_halving"]
    assert tried["random"] == pytest.approx(4.09, abs=0.01), "by hand: (n + 1) / (k + 1) over the models"
    assert tried["model, no prior"] < tried["random"] / 2 < tried["grid"]


@pytest.mark.slow
def test_a_tiny_grid_is_measured_replayed_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="TRL is a peer, no dependency")
    monkeypatch.setenv("PEFT_STUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        search, "TINY", Scale("lora", (1e-4, 1e-2), "rank", (4, 8), 9, 2, dev=6, test=8, max_length=64, timed_steps=3)
    )
    words = ["--model", "tiny", "--device", "cpu", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    search.main(["measure", *words, "--parts", "ours", "trl"])
    found = read_curves(tmp_path / "out" / "search_curves.jsonl", "tiny")
    assert (found.rungs, found.steps, len(found.cells)) == ((1, 3), 9, 4)
    assert all(set(cell.sums) == {1, 3, 9} and cell.test < 10 for cell in found.cells.values())
    assert set(found.speeds) == {"ours", "ours alone", "trl default", "trl best"}
    assert str(tmp_path) not in (tmp_path / "out" / "search_curves.jsonl").read_text()
    search.main(["replay", *words, "--seeds", "2"])
    search.main(["check", *words])
    search.main(["check", *words, "--system", "d, design"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "search.jsonl").read_text().splitlines()]
    ours_too = {"d", "d, no prior", "d, design"}
    seen = {unit: {row.get("against") for row in rows if row.get("unit") == unit} for unit in ("seconds", "tokens")}
    assert seen["seconds"] - {None} == {"a default", "a best", "c"} | ours_too
    assert seen["tokens"] - {None} == {"a", "c"} | ours_too
    modelled, checked = [row for row in rows if row["row"] == "check"]
    assert modelled["system"] == "d"
    assert modelled["cells"] == 4
    assert checked["same_order"]
    assert checked["same_decisions"] == checked["cells"] == 4, checked["differ"]
    assert checked["largest_loss_difference"] < 1e-4


@pytest.mark.slow
def test_ray_tune_over_tiny_trl_runs_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in ("ray", "trl"):
        pytest.importorskip(peer, reason=f"{peer} is a peer, no dependency")
    monkeypatch.setenv("PEFT_STUDY_CACHE", str(tmp_path / "cache"))
    words = ["--model", "tiny", "--device", "cpu", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    search.main(["measure", *words, "--parts", "ray"])
    lines = (tmp_path / "out" / "search_curves.jsonl").read_text().splitlines()
    measured = [json.loads(line) for line in lines]
    seconds = [row["seconds"] for row in measured if row["row"] == "candidate"]
    assert len(seconds) == 8, "parts of one and two examples, two kinds of attention, with autocast and without"
    rows = {row["system"]: row for row in measured if row["row"] == "speed"}
    assert {name for name in rows if name.endswith(" 1")} == {"ray default 1", "ray best 1"}
    assert all(row["overhead"] > 0 and row["ready"] > 0 and row["trials"] == 2 for row in rows.values())
