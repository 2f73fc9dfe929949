"""How many settings of how many steps a plan finds for some minutes, and when a search must end."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_study.errors import ConfigError
from peft_study.study import clock, plan
from peft_study.study.dry_run import MethodEstimate, StudyEstimate
from peft_study.study.plan import FORWARD, PASSES, SHARE, seconds_of
from peft_study.training.loop import Evaluated
from peft_study.workers.worker import Pace, Report
from simulated import World, study, valley

SEEDS = 3


def measured(*step_seconds: float, rows: int = 1000, held_out: int = 40, batch: int = 4) -> StudyEstimate:
    """Returns an estimate of methods whose steps take so long."""
    methods = [MethodEstimate(f"m{i}", 1, 1, 0, 0, 0, 0, 0.0, 0.0, s, 0) for i, s in enumerate(step_seconds)]
    return StudyEstimate(tuple(methods), None, rows, held_out, held_out, batch, ())


def planned(monkeypatch: pytest.MonkeyPatch, found: StudyEstimate, minutes: float) -> tuple[dict[str, Any], list[str]]:
    monkeypatch.setattr(plan, "estimate", lambda *_a, **_k: found)
    said: list[str] = []
    return plan.plan(study(methods={"lora": {}}), minutes, said.append), said


def test_the_cost_of_a_study_is_that_of_its_trials_finals_and_passes() -> None:
    """By hand: a step takes 2 s, a pass over 40 rows 2 / 4 x 40 x FORWARD."""
    a_pass = 20 * FORWARD
    search = 5 * (SHARE * 10 * 2 + PASSES * a_pass)
    finals = 3 * (10 * 2 + a_pass + a_pass)
    assert seconds_of(measured(2.0), 5, 10, 3) == pytest.approx(search + finals)
    assert seconds_of(measured(2.0, 2.0), 5, 10, 3) == pytest.approx(2 * (search + finals))


@pytest.mark.parametrize("minutes", [10, 30, 60, 240, 3000])
@pytest.mark.parametrize("seconds", [0.05, 1.0])
def test_a_plan_fills_its_minutes_and_no_more(monkeypatch: pytest.MonkeyPatch, minutes: float, seconds: float) -> None:
    found = measured(seconds, seconds, seconds)
    sections, said = planned(monkeypatch, found, minutes)
    trials, steps, best = sections["budget"]["trials"] // 2, sections["budget"]["steps"], sections["finals"]["best"]
    if rows := sections.get("data", {}).get("held_out"):
        found = dataclasses.replace(found, dev_rows=rows, test_rows=rows)
    takes = seconds_of(found, trials, steps, best * SEEDS)
    assert takes <= 60 * minutes * 0.9
    whole = steps == plan.MOST_PASSES * math.ceil(1000 / 4) and trials == plan.MOST_TRIALS
    assert whole or takes > 60 * minutes * 0.8, "nothing is left that a longer plan would use"
    assert sections["budget"]["minutes"] == minutes
    assert f"about {trials} settings a method of {steps} steps" in said[-1]


def test_few_minutes_have_fewer_settings_before_they_have_too_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(1.0)
    trials = [planned(monkeypatch, found, minutes)[0]["budget"]["trials"] // 2 for minutes in (6, 60)]
    assert trials[0] < 12 <= trials[1]


def test_a_study_that_needs_less_than_its_minutes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(0.01)
    sections, said = planned(monkeypatch, found, 60)
    trials, steps, best = sections["budget"]["trials"], sections["budget"]["steps"], sections["finals"]["best"]
    takes = seconds_of(found, trials, steps, best * SEEDS) / 60
    assert said[-1].endswith(f"; about {takes:.1f} min in all, as no more than 60 settings a method are tried")
    assert planned(monkeypatch, measured(1.0), 60)[1][-1].endswith("; the search ends in time for them")


def test_few_minutes_have_fewer_held_out_rows_before_they_have_fewer_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(1.0, held_out=128)
    short, long = (planned(monkeypatch, found, minutes)[0] for minutes in (12, 240))
    assert short["data"] == {"held_out": 64, "test": 64}
    assert short["budget"]["trials"] >= 2 * 12
    assert "data" not in long


def test_minutes_that_do_not_reach_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"minutes: 1 min do not reach for 4 settings .* give at least \d") as error:
        planned(monkeypatch, measured(1.0, 1.0), 1)
    least = float(str(error.value).split("give at least ")[1].split(",")[0])
    planned(monkeypatch, measured(1.0, 1.0), least * 1.05)


def test_the_search_ends_when_running_trials_and_finals_need_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 100 tokens a second a trial of 90 steps takes 90 s, two finals of one seed 180 s; the report takes 15 s."""
    now = [0.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    config = study(
        methods={"lora": {}}, training={"steps": 90, "batch_size": 1}, budget={"minutes": 10, "trials": 50},
        finals={"best": 2, "seeds": 1}, search={"range_test": False, "pruner": "none"},
    )  # fmt: skip
    world = World(config, tmp_path, {"lora": valley(1e-3)}, slots=1).run(until=lambda w: len(w.order) > 1)
    said: list[str] = []
    watch = clock.StudyClock(config, 600.0, 0.0, 100.0, said.append)
    running = next(t.name for t in world.scheduler.state.running() if t.kind == "search")

    def report(step: int, *events: Any) -> Report:
        return Report(events, 0, (running,), {running: Pace(step, 90, 1.0, 100)}, (), {})

    over = []
    for second in range(1, 421):
        now[0] = float(second)
        step = min(90, (second - 1) % 90 + 1)
        events = [Evaluated(running, step, np.zeros(4))] if second == 10 else []
        over.append(watch.search_is_over(report(step, *events), world.scheduler.state))
    # the fourth trial ends at 360 s, and 180 s of finals would end at 540: a fifth begins, and is the last
    assert over.index(True) + 1 == 361
    assert len(said) == 1, "the plan is said again once, after the first rung"
    assert "at the measured 100 tokens/s: search until minute 6.8 of 10" in said[0]
    assert "the finals, 3.0 minutes" in said[0]


def test_a_short_limit_still_leaves_half_of_it_for_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    config = study(methods={"lora": {}}, training={"steps": 900, "batch_size": 1}, budget={"minutes": 1, "trials": 50})
    world = World(config, tmp_path, {"lora": valley(1e-3)}, slots=1).run(until=lambda w: len(w.order) > 1)
    watch = clock.StudyClock(config, 60.0, 0.0, 100.0, lambda _line: None)
    running = next(t.name for t in world.scheduler.state.running() if t.kind == "search")
    over = []
    for second in range(1, 40):
        now[0] = float(second)
        report = Report((), 0, (running,), {running: Pace(second, 900, 1.0, 100)}, (), {})
        over.append(watch.search_is_over(report, world.scheduler.state))
    assert over.index(True) + 1 == 31
