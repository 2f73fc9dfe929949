"""The charts of a study and of a single run, from what their folders say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from peft_study.report import charts
from peft_study.report.chart_scales import spread
from peft_study.report.charts import COSTS, MOST_CURVES, Curve, ResponseBar, RunPoint, ScatterPoint
from peft_study.report.results import Results
from peft_study.report.run_reader import RunStatus
from peft_study.report.study_reader import StudyRecord, estimate
from peft_study.search.trials import TrialRecord
from peft_study.statistics import Estimate, loss_value
from peft_study.storage import metrics

if TYPE_CHECKING:
    import altair as alt

Charts = dict[str, "alt.LayerChart"]
"""By name, in the report's order."""


def charts_of(
    record: StudyRecord,
    results: Results,
    responses: Sequence[Any] = (),
    costs: Mapping[str, Any] | None = None,
) -> Charts:
    """Returns the charts of a study; those that would show nothing are left out.

    They are ``learning_curves``, ``learning_rate`` (with two rates or more), ``response-METHOD-SETTING`` for each of
    the responses with two values or more, and ``pareto-COST`` for each cost that two settings have.

    Args:
        record, results: of the study.
        responses: of `report.responses`.
        costs: by method, of `report.costs`.
    """
    colours = charts.colours(results.methods)
    base = results.base_dev.value
    searched = [row for row in results.rows if row.trial.kind == "search"]
    found: Charts = {}
    if curves := _curves(record, [row.trial for row in searched]):
        found["learning_curves"] = charts.learning_curves(curves, base, colours, trials=len(searched))
    points = [
        ScatterPoint(row.trial.name, row.trial.method, row.trial.status, row.settings["learning_rate"], row.dev)
        for row in searched
        if row.settings.get("learning_rate")
    ]
    if len({point.x for point in points}) > 1:
        found["learning_rate"] = charts.rates(points, base, colours)
    for each in responses:
        bars = [ResponseBar(p.value, p.low, p.high, p.loss, len(p.trials)) for p in each.points]
        if len(bars) > 1 and each.setting != "learning_rate":
            name = f"response-{each.method}-{each.setting}"
            found[name] = charts.response(each.method, each.setting, bars, base, colours, log=each.log)
    return {**found, **_pareto(results, costs or {}, colours)}


def run_charts(run: RunStatus) -> Charts:
    """Returns the chart of a single run, ``training``; none where nothing was measured."""
    records = metrics.read(run.folder.metrics)
    tokens = _tokens_by_step(records)
    batches, held_out = (
        [
            RunPoint(tokens.get(each["step"], 0), each["step"], _loss_of(each))
            for each in records
            if each["event"] == event and each["loss"] is not None
        ]
        for event in ("train", "held_out")
    )
    base = run.curve[0].loss.value - run.curve[0].minus_base.value if run.curve else None
    return {"training": charts.training(batches, held_out, base)} if batches or held_out else {}


def _curves(record: StudyRecord, trials: Sequence[TrialRecord]) -> list[Curve]:
    """Returns the curves of the trials that are drawn: the metrics of the others are not read."""
    counts_N = record.examples.counts_N if record.examples is not None else None
    found = []
    for method in dict.fromkeys(trial.method for trial in trials):
        own = [trial for trial in trials if trial.method == method and trial.sums]
        last = [loss_value(trial.sums[max(trial.sums)], counts_N) for trial in own] if counts_N is not None else []
        for trial in (own[i] for i in spread(last, MOST_CURVES)):
            records = metrics.read(record.folder.trial(trial.name).metrics)
            tokens = _tokens_by_step(records)
            points = tuple(
                (tokens.get(each["step"], 0), math.nan if each["loss"] is None else each["loss"])
                for each in records
                if each["event"] == "held_out"
            )
            if points:
                found.append(Curve(trial.name, trial.method, trial.status, points))
    return found


def _tokens_by_step(records: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Returns the data tokens that were trained up to each step."""
    train = [each for each in records if each["event"] == "train"]
    sums = accumulate(each["tokens"] for each in train)
    return dict(zip((each["step"] for each in train), sums, strict=True))


def _loss_of(record: Mapping[str, Any]) -> Estimate:
    return estimate(record["loss"], record.get("loss_low"), record.get("loss_high"))


def _pareto(results: Results, costs: Mapping[str, Any], colours: Mapping[str, str]) -> Charts:
    """Returns loss against each cost: of the finalists, on the test part where all of them have a loss there."""
    finalists = [final for final in results.finalists if final.dev is not None]
    on_test = bool(finalists) and all(final.test is not None for final in finalists)
    base = results.base_test if on_test else results.base_dev
    trained = {
        (row.trial.method, row.trial.number): row.trial.facts.get("trainable")
        for row in results.rows
        if row.trial.kind in ("search", "final") and row.trial.facts.get("trainable")
    }
    found: Charts = {}
    for what in COSTS:
        points = []
        for final in finalists:
            name, measured = final.name, costs.get(final.method)
            cost = getattr(measured, what, None) if measured is not None and measured.setting == name else None
            if what == "trainable":
                cost = cost or trained.get((final.method, final.number))
            if cost:
                loss = final.test if on_test else final.dev
                points.append(ScatterPoint(name, final.method, "finished", float(cost), loss))
        if len(points) > 1:
            found[f"pareto-{what}"] = charts.pareto(
                points, what, colours, base.value if base else None, part="test" if on_test else "dev"
            )
    return found
