"""The charts of a report: plain numbers in, Vega-Lite out (written with altair).

A method has one colour and one shape everywhere. Filled marks were trained to the end, hollow ones stopped early,
crossed ones diverged or failed. Numbers that are not finite never reach the JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import altair as alt

from peft_study.report.chart_marks import (
    WHO,
    base_line,
    channels,
    chart,
    digits,
    intervals,
    labels,
    like,
    mark_row,
    marks,
    marks_said,
    short_value,
    x_numbers,
    x_tokens,
    x_words,
    y_losses,
)
from peft_study.report.chart_scales import LossAxis, loss_axis, spread, thinned
from peft_study.report.chart_style import colours as colours
from peft_study.report.chart_style import method_label, shortened_text
from peft_study.report.chart_style import save as save
from peft_study.report.chart_style import spec as spec
from peft_study.report.chart_style import theme as theme
from peft_study.statistics import Estimate

MOST_CURVES, MOST_MEASUREMENTS, MOST_POINTS = 12, 40, 60
"""What is drawn of a method at most: learning curves, measurements of each, points of a scatter plot."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Dev losses of a trial as it trains: pairs of data tokens and nats a token, NaN where it diverged."""

    trial: str
    method: str
    status: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class ScatterPoint:
    """A loss at a number, such as a trial's learning rate or a method's cost; `loss` None: it diverged or failed."""

    trial: str
    method: str
    status: str
    x: float
    loss: Estimate | None


@dataclass(frozen=True, slots=True)
class ResponseBar:
    """The mean dev loss of `trials` trials at a value of a setting, or in a bin from `low` to `high` around it."""

    value: float | str | bool
    low: float | str | bool
    high: float | str | bool
    loss: Estimate
    trials: int


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How far the first study's loss is above the second's, paired by example."""

    label: str
    method: str
    difference: Estimate


@dataclass(frozen=True, slots=True)
class RunPoint:
    """A measurement of a single run after so many data tokens: of training batches, or of held-out examples."""

    tokens: int
    step: int
    loss: Estimate


@dataclass(frozen=True, slots=True)
class Cost:
    """A cost in a Pareto plot: its axis, and whether less of it is better."""

    name: str
    axis: str
    less: bool = True


_Item = TypeVar("_Item", Curve, ScatterPoint)

COSTS = {
    "trainable": Cost("trainable parameters", "trainable parameters"),
    "adapter_bytes": Cost("adapter size", "adapter size, bytes"),
    "peak_bytes": Cost("peak memory", "peak memory, bytes"),
    "tokens_per_second": Cost("speed", "data tokens a second", less=False),
}


def learning_curves(
    curves: Sequence[Curve], base: float | None, colours: Mapping[str, str], *, trials: int | None = None
) -> alt.LayerChart:
    """Returns dev loss against data tokens: a line a trial, which ends where the trial ended.

    Args:
        curves: of trials; of each method at most `MOST_CURVES` are drawn.
        base: the untouched base's dev loss, nats a token.
        colours: of the methods, as of `colours`.
        trials: that there are in all, where some were left out before.
    """
    by_method = channels(colours)
    drawn = [curve for curve in _of_each_method(curves, _last_loss, MOST_CURVES) if curve.points]
    axis = loss_axis((loss for curve in drawn for _, loss in curve.points), base)
    ends = [mark_row(c.trial, c.method, c.status, c.points[-1][0], _alone(c.points[-1][1]), axis) for c in drawn]
    best = {min((c for c in drawn if c.method == m), key=_last_loss).trial for m in {c.method for c in drawn}}
    x, y, tokens = x_tokens(), y_losses(axis), alt.Tooltip("x:Q", title="data tokens", format=",")
    tooltip = [*WHO, tokens, alt.Tooltip("y:Q", title="dev loss", format=".3f")]
    rows = sorted((_curve_row(c, axis, best=c.trial in best) for c in drawn), key=lambda row: row["best"])
    flat = alt.Chart(alt.InlineData(values=rows)).transform_flatten(["x", "y"])
    lines = flat.mark_line(clip=True).encode(
        x=x,
        y=y,
        color=by_method.colour,
        detail="trial:N",
        strokeWidth=alt.when("datum.best").then(alt.value(2.8)).otherwise(alt.value(1.1)),
        opacity=alt.when("datum.best").then(alt.value(1)).otherwise(alt.value(0.6)),
    )
    points = flat.mark_point(clip=True, filled=True, size=10)
    said = ["Thick: the best of each method.", marks_said(ends), _too_many(drawn, max(trials or 0, len(curves)))]
    layers = [
        *base_line(base, axis),
        lines,
        points.encode(x=x, y=y, color=by_method.colour, tooltip=tooltip),
        *marks(ends, x, y, by_method, "data tokens", ","),
    ]
    return chart(layers, "Learning curves", said, f"Dev loss of {len(drawn)} trials by data tokens")


def rates(
    points: Sequence[ScatterPoint], base: float | None, colours: Mapping[str, str], *, trials: int | None = None
) -> alt.LayerChart:
    """Returns dev loss against learning rate, all methods on one log axis, with 95 % intervals.

    Args:
        points: of trials, `x` their learning rate; of each method at most `MOST_POINTS` are drawn.
        base, colours, trials: as of `learning_curves`.
    """
    by_method = channels(colours)
    drawn = _of_each_method(points, _loss, MOST_POINTS)
    axis = _axis_of([point.loss for point in drawn if point.loss], base)
    rows = [mark_row(p.trial, p.method, p.status, p.x, p.loss, axis) for p in drawn]
    x, y = x_numbers([point.x for point in drawn], "learning rate (log)", log=True), y_losses(axis)
    layers = [*base_line(base, axis), *intervals(rows, x, y, by_method)]
    layers += marks(rows, x, y, by_method, "learning rate", ".3~g")
    said = ["Bars: 95 % intervals.", marks_said(rows), _too_many(drawn, max(trials or 0, len(points)))]
    return chart(layers, "Loss against learning rate", said, f"Dev loss of {len(drawn)} trials by learning rate")


def response(
    method: str,
    setting: str,
    bars: Sequence[ResponseBar],
    base: float | None,
    colours: Mapping[str, str],
    *,
    log: bool = False,
) -> alt.LayerChart:
    """Returns the mean dev loss at each value of a setting, with 95 % intervals; values are words or numbers.

    Args:
        method, setting: whose.
        bars: in the order of the axis.
        base, colours: as of `learning_curves`.
        log: the setting is searched on the log scale.
    """
    by_method = channels(colours, legend=False)
    axis = _axis_of([bar.loss for bar in bars], base)
    numbers = all(isinstance(bar.value, (int, float)) and not isinstance(bar.value, bool) for bar in bars)
    rows = [_bar_row(method, bar, axis, numbers=numbers) for bar in bars]
    xs = [row["x"] for row in rows]
    log = log and numbers and min(xs, default=0) > 0
    x = x_numbers(xs, f"{setting} (log)" if log else setting, log=log) if numbers else x_words(xs, setting)
    y = y_losses(axis)
    of = alt.Tooltip("range:N", title=setting)
    tooltip = [of, alt.Tooltip("loss:N", title="mean dev loss"), alt.Tooltip("trials:Q", title="trials")]
    layers = [*base_line(base, axis), *intervals(rows, x, y, by_method)]
    if bins := [row for row in rows if "x1" in row]:
        rule = alt.Chart(alt.InlineData(values=bins)).mark_rule(strokeWidth=1.2, opacity=0.8)
        layers.append(rule.encode(x=like(x, "x1"), x2="x2:Q", y=y, color=by_method.colour))
    layers += marks(rows, x, y, by_method, setting, "", tooltip=tooltip)
    said = [
        "Means of the trials trained to the end, with 95 % intervals.",
        "Horizontal bars: the values that a point is the mean of." if bins else "",
        marks_said(rows),
    ]
    name = method_label(method)
    return chart(layers, f"{name}: {setting}", said, f"Mean dev loss of {name} at {len(bars)} values of {setting}")


def pareto(
    points: Sequence[ScatterPoint],
    what: str,
    colours: Mapping[str, str],
    base: float | None = None,
    *,
    part: Literal["dev", "test"] = "dev",
) -> alt.LayerChart:
    """Returns loss against a cost, a labelled point a setting, and the best loss at each cost as a step line.

    Args:
        points: of settings, `x` their cost.
        what: the cost: one of `COSTS`.
        colours, base: as of `learning_curves`.
        part: of the data, on which the loss is measured.
    """
    cost, xs, by_method = COSTS[what], [point.x for point in points], channels(colours, legend=False)
    axis = _axis_of([point.loss for point in points if point.loss], base)
    rows = [mark_row(p.trial, p.method, p.status, p.x, p.loss, axis) for p in points]
    log = min(xs, default=0) > 0 and max(xs) > 20 * min(xs)
    x, y = x_numbers(xs, f"{cost.axis} (log)" if log else cost.axis, log=log, form="~s"), y_losses(axis, part)
    best = [{"x": digits(p.x), "y": digits(axis.place(_loss(p)))} for p in front(points, less=cost.less)]
    steps = alt.Chart(alt.InlineData(values=sorted(best, key=lambda row: row["x"]))).mark_line(
        style="front", interpolate="step-after" if cost.less else "step-before", strokeWidth=1.2
    )
    layers = [*base_line(base, axis), steps.encode(x=x, y=y), *intervals(rows, x, y, by_method)]
    layers += [*marks(rows, x, y, by_method, cost.name, ",.4~s"), *labels(rows, x, y, axis, log=log)]
    said = [f"Line: the best loss at each cost; {'less' if cost.less else 'more'} is better. Bars: 95 % intervals."]
    return chart(layers, f"Loss against {cost.name}", said, f"{part} loss of {len(rows)} settings by {cost.name}")


def front(points: Iterable[ScatterPoint], *, less: bool) -> list[ScatterPoint]:
    """Returns the points that no other beats in both cost and loss, cheapest first; `less`: less cost is better."""
    found: list[ScatterPoint] = []
    for point in sorted(points, key=lambda p: (p.x if less else -p.x, _loss(p))):
        if math.isfinite(_loss(point)) and (not found or _loss(point) < _loss(found[-1])):
            found.append(point)
    return found


def paired(
    differences: Sequence[PairedDifference], first: str, second: str, colours: Mapping[str, str], part: str = "dev"
) -> alt.LayerChart:
    """Returns how far losses of one study are above those of another, with 95 % intervals around zero.

    Args:
        differences: a row each, from the top.
        first, second: names of the studies.
        colours: of the methods.
        part: of the data.
    """
    rows = [
        {
            "label": shortened_text(each.label, 24),
            "method": method_label(each.method),
            "x": digits(each.difference.value),
            **(
                {"x1": digits(each.difference.low), "x2": digits(each.difference.high)}
                if each.difference.bounded
                else {}
            ),
            "loss": each.difference.text("+.3f"),
        }
        for each in differences
        if math.isfinite(each.difference.value)
    ]
    by_method = channels(colours, legend=False)
    title = f"difference of {part} loss, nats a token"
    x = alt.X("x:Q", scale=alt.Scale(padding=16), axis=alt.Axis(title=title, tickCount=6))
    y = alt.Y("label:N", sort=None, axis=alt.Axis(title=None, labelLimit=150, grid=True))
    zero = alt.Chart(alt.InlineData(values=[{"x": 0}])).mark_rule(style="base").encode(x=x)
    bars = alt.Chart(alt.InlineData(values=[row for row in rows if "x1" in row])).mark_rule(strokeWidth=1.6)
    points = alt.Chart(alt.InlineData(values=rows)).mark_point(filled=True, size=70, opacity=1)
    tooltip = [alt.Tooltip("label:N", title="setting"), alt.Tooltip("loss:N", title="difference")]
    layers = [
        zero,
        bars.encode(x=like(x, "x1"), x2="x2:Q", y=y, color=by_method.colour),
        points.encode(x=x, y=y, color=by_method.colour, shape=by_method.shape, tooltip=tooltip),
    ]
    names = [shortened_text(name, 40) for name in (first, second)]
    said = [f"Left of zero {names[0]} is better, right of it {names[1]}. Bars: 95 % intervals."]
    found = chart(layers, "Paired differences", said, f"Differences of {part} loss of {len(rows)} settings")
    return found.properties(height=34 * max(len(rows), 1))


def training(train: Sequence[RunPoint], held_out: Sequence[RunPoint], base: float | None) -> alt.LayerChart:
    """Returns a single run's loss of its batches and its held-out loss against data tokens.

    Args:
        train: losses of batches; averaged over equal stretches where there are many.
        held_out: losses of the held-out examples, with their intervals.
        base: the untouched base's held-out loss.
    """
    batches, over = _averaged(train, 4 * MOST_MEASUREMENTS)
    measured = thinned([point for point in held_out if math.isfinite(point.loss.value)], MOST_MEASUREMENTS)
    axis = _axis_of([point.loss for point in (*batches, *measured)], base)
    by_kind = channels(colours(("held-out examples", "training batches")))
    x, y, layers = x_tokens(), y_losses(axis, ""), base_line(base, axis)
    tooltip = [
        alt.Tooltip("method:N", title="loss of"),
        alt.Tooltip("step:Q", format=","),
        alt.Tooltip("x:Q", title="data tokens", format=","),
        alt.Tooltip("loss:N"),
    ]
    for kind, points, width in (("training batches", batches, 1), ("held-out examples", measured, 2)):
        rows = [{**mark_row("", kind, "finished", p.tokens, p.loss, axis), "step": p.step} for p in points]
        if not rows:
            continue
        lines = [{**row, "y": _on_line(p.loss.value, axis)} for row, p in zip(rows, points, strict=True)]
        line = alt.Chart(alt.InlineData(values=lines)).mark_line(clip=True, strokeWidth=width)
        layers.append(line.encode(x=x, y=y, color=by_kind.colour, tooltip=tooltip))
        if kind == "held-out examples":
            layers += [*intervals(rows, x, y, by_kind), *marks(rows, x, y, by_kind, "", "", tooltip=tooltip)]
    said = [f"Losses of batches are means over {over} steps." if over > 1 else "", "Bars: 95 % intervals."]
    return chart(layers, "Training", said, f"Loss by data tokens, {len(measured)} held-out measurements")


def _of_each_method(items: Sequence[_Item], loss: Callable[[_Item], float], most: int) -> list[_Item]:
    """Returns at most so many curves or points of each method, in their order."""
    found: list[_Item] = []
    for method in dict.fromkeys(item.method for item in items):
        own = [item for item in items if item.method == method]
        found += [own[i] for i in spread([loss(item) for item in own], most)]
    return found


def _too_many(drawn: Sequence[Any], total: int) -> str:
    if total <= len(drawn):
        return ""
    return f"{len(drawn):,} of {total:,} trials are drawn: of each method the best and a spread of the rest."


def _loss(point: ScatterPoint) -> float:
    return math.nan if point.loss is None else point.loss.value


def _last_loss(curve: Curve) -> float:
    """Returns a curve's last loss; infinity where it is no number, so that no such one is the best."""
    last = curve.points[-1][1] if curve.points else math.inf
    return last if math.isfinite(last) else math.inf


def _alone(loss: float) -> Estimate:
    return Estimate(loss, -math.inf, math.inf)


def _axis_of(losses: Sequence[Estimate], base: float | None) -> LossAxis:
    return loss_axis((loss.value for loss in losses), base, (end for loss in losses for end in (loss.low, loss.high)))


def _curve_row(curve: Curve, axis: LossAxis, *, best: bool) -> dict[str, Any]:
    """Returns a curve as one row with lists, which the chart flattens: a third of the text."""
    points = [point for point in thinned(curve.points, MOST_MEASUREMENTS) if math.isfinite(point[1])]
    who = {
        "trial": shortened_text(curve.trial, 40),
        "method": method_label(curve.method),
        "status": curve.status,
        "best": best,
    }
    return {**who, "x": [tokens for tokens, _ in points], "y": [_on_line(loss, axis) for _, loss in points]}


def _on_line(loss: float, axis: LossAxis) -> float:
    """Returns where a line passes; one that leaves the axis does so steeply, so twice the axis is far enough."""
    return digits(min(loss, 2 * axis.high - axis.low))


def _bar_row(method: str, bar: ResponseBar, axis: LossAxis, *, numbers: bool) -> dict[str, Any]:
    x = float(bar.value) if numbers else short_value(bar.value)
    row = mark_row("", method, "finished", x, bar.loss, axis) | {"trials": bar.trials, "range": short_value(bar.value)}
    if numbers and bar.low != bar.high:
        row |= {"x1": digits(float(bar.low)), "x2": digits(float(bar.high))}
        row["range"] = f"{short_value(bar.low)} to {short_value(bar.high)}"
    return row


def _averaged(points: Sequence[RunPoint], most: int) -> tuple[list[RunPoint], int]:
    """Returns means over as many neighbours as leave at most `most` points, and over how many; NaN is left out."""
    over = max(1, math.ceil(len(points) / most))
    found = []
    for first in range(0, len(points), over):
        part = points[first : first + over]
        losses = [point.loss.value for point in part if math.isfinite(point.loss.value)]
        if losses:
            found.append(RunPoint(part[-1].tokens, part[-1].step, _alone(sum(losses) / len(losses))))
    return found, over
