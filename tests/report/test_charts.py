"""The charts: valid Vega-Lite, the study's own numbers, thinned and readable whatever the losses are."""

from __future__ import annotations

import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import altair as alt
import pytest
from jsonschema import Draft7Validator

from peft_study.errors import ConfigError
from peft_study.report.charts import (
    COSTS,
    MOST_CURVES,
    MOST_MEASUREMENTS,
    MOST_POINTS,
    Curve,
    PairedDifference,
    ResponseBar,
    RunPoint,
    ScatterPoint,
    colours,
    front,
    learning_curves,
    paired,
    pareto,
    rates,
    response,
    save,
    spec,
    theme,
    training,
)
from peft_study.statistics import Estimate

METHODS = ("lora", "prefix_tuning", "prompt_tuning")
COLOURS = colours(METHODS)
SCHEMA = Draft7Validator(alt.load_schema())


def around(loss: float, half: float = 0.1) -> Estimate:
    return Estimate(loss, loss - half, loss + half)


def drawn(chart: alt.LayerChart) -> list[dict[str, Any]]:
    """Returns all rows of a chart's data, after its specification was checked."""
    values = spec(chart)
    json.dumps(values, allow_nan=False)
    SCHEMA.validate(values)
    assert values["width"] == "container"
    assert values["title"]["text"]
    assert len(values["description"]) > 30
    return [row for rows in values.get("datasets", {}).values() for row in rows]


def subtitle(chart: alt.LayerChart) -> str:
    return " ".join(spec(chart)["title"]["subtitle"]).replace("\u00a0", " ")


def y_domain(chart: alt.LayerChart) -> tuple[float, float]:
    for layer in spec(chart)["layer"]:
        domain = layer["encoding"].get("y", {}).get("scale", {}).get("domain")
        if domain:
            return domain[0], domain[1]
    raise AssertionError("no axis of losses")


def simulated(count: int) -> tuple[list[Curve], list[ScatterPoint]]:
    """Returns trials whose losses fall from 2.2, some of which are pruned, diverge, or end at millions."""
    draw = random.Random(0)
    curves, points = [], []
    for i in range(count):
        method, rate, status, steps = METHODS[i % 3], 10 ** draw.uniform(-5, 0), "finished", 100
        end = 0.8 + abs(math.log10(rate) + 2.5) / 2 + draw.random() / 5
        if rate > 0.1:
            status, end = ("diverged", math.nan) if draw.random() < 0.5 else ("finished", 1e7 * draw.random())
        elif end > 1.6:
            status, steps = "pruned", 30
        losses = [2.2 + (end - 2.2) * math.sqrt(step / 100) for step in range(steps + 1)]
        curves.append(Curve(f"{method}-{i:05d}", method, status, tuple((400 * n, x) for n, x in enumerate(losses))))
        loss = None if status == "diverged" else around(losses[-1], 0.1 * losses[-1])
        points.append(ScatterPoint(curves[-1].trial, method, status, rate, loss))
    return curves, points


def test_a_curve_ends_where_its_trial_ended() -> None:
    curves = [
        Curve("lora-003", "lora", "diverged", ((0, math.nan),)),
        Curve("lora-000", "lora", "finished", ((0, 2.0), (500, 1.5), (1000, 1.25))),
        Curve("lora-001", "lora", "pruned", ((0, 2.0), (500, 1.9))),
        Curve("lora-002", "lora", "diverged", ((0, 2.0), (500, math.nan))),
        Curve("prefix_tuning-000", "prefix_tuning", "failed", ()),
    ]
    chart = learning_curves(curves, 2.0, COLOURS)
    rows = drawn(chart)
    lines = {row["trial"]: row for row in rows if isinstance(row.get("x"), list)}
    assert lines["lora-000"]["x"] == [0, 500, 1000]
    assert lines["lora-000"]["y"] == [2.0, 1.5, 1.25]
    assert lines["lora-001"]["x"] == [0, 500]
    assert lines["lora-002"]["y"] == [2.0], "what is no number is not drawn"
    assert [row["best"] for row in lines.values()] == [False, False, False, True]
    assert list(lines)[-1] == "lora-000", "the best one lies on top"
    ends = {row["trial"]: row for row in rows if "mark" in row}
    assert {name: row["mark"] for name, row in ends.items()} == {
        "lora-000": "full",
        "lora-001": "hollow",
        "lora-002": "lost",
        "lora-003": "lost",
    }
    assert (ends["lora-001"]["x"], ends["lora-001"]["y"]) == (500, 1.9)
    assert "stopped early (1); crossed: diverged or failed (2)" in subtitle(chart)
    assert [row["text"] for row in rows if "text" in row] == [["base", "2.000"]]


def test_points_have_the_losses_and_intervals_of_their_trials() -> None:
    points = [
        ScatterPoint("lora-000", "lora", "finished", 1e-3, Estimate(1.2345678, 1.1, 1.4)),
        ScatterPoint("lora-001", "lora", "pruned", 1e-2, Estimate(1.9, -math.inf, math.inf)),
        ScatterPoint("lora-002", "lora", "diverged", 1.0, None),
        ScatterPoint("lora-003", "lora", "finished", 0.5, around(1e6)),
    ]
    chart = rates(points, 2.0, COLOURS)
    rows = {row["trial"]: row for row in drawn(chart) if "trial" in row}
    first = rows["lora-000"]
    assert (first["x"], first["y"], first["y1"], first["y2"]) == (1e-3, 1.23457, 1.1, 1.4)
    assert first["loss"] == "1.235 [1.100, 1.400]"
    assert "y1" not in rows["lora-001"], "a single example has no interval"
    low, high = y_domain(chart)
    assert low < 1.1
    assert 2.0 < high < 4.0, "a loss of a million does not flatten the others"
    assert rows["lora-002"]["y"] == rows["lora-003"]["y"] < high
    assert rows["lora-003"]["above"]
    assert rows["lora-003"]["loss"].startswith("1000000.000"), "the tooltip says what it is"
    assert "arrow: loss above the axis (1)" in subtitle(chart)


def test_when_nothing_is_better_than_the_base_the_best_is_still_on_the_axis() -> None:
    chart = rates([ScatterPoint("a", "lora", "finished", 1e-3, around(9.0))], 2.0, COLOURS)
    (row,) = [row for row in drawn(chart) if "trial" in row]
    assert (row["y"], "above" in row) == (9.0, False)


@pytest.mark.parametrize("count", [1, 1000])
def test_of_many_trials_the_best_and_a_spread_are_drawn(count: int) -> None:
    curves, points = simulated(3 * count)
    chart = learning_curves(curves, 2.2, COLOURS)
    lines = [row for row in drawn(chart) if isinstance(row.get("x"), list)]
    assert len(lines) == 3 * min(count, MOST_CURVES)
    assert all(len(line["x"]) == len(line["y"]) <= MOST_MEASUREMENTS for line in lines)
    said = f"{3 * MOST_CURVES:,} of {3 * count:,} trials are drawn"
    assert (said in subtitle(chart)) == (count > MOST_CURVES)
    names = {line["trial"] for line in lines}
    for method in METHODS:
        own = [c for c in curves if c.method == method]
        best = sorted(own, key=lambda c: c.points[-1][1] if math.isfinite(c.points[-1][1]) else math.inf)
        assert {curve.trial for curve in best[: MOST_CURVES // 2]} <= names
        assert best[-1].trial in names, "the worst is part of the spread"
    marks = [row for row in drawn(rates(points, 2.2, COLOURS)) if "trial" in row]
    assert len({row["trial"] for row in marks}) == 3 * min(count, MOST_POINTS)


def test_10_000_trials_are_drawn_in_a_second_and_300_kilobytes() -> None:
    """Measured: 0.3 s and 115 kB. Seconds of the processor, as a busy machine is no failure."""
    curves, points = simulated(10_000)
    started = time.process_time()
    made = [spec(learning_curves(curves, 2.2, COLOURS)), spec(rates(points, 2.2, COLOURS))]
    seconds = time.process_time() - started
    assert sum(len(json.dumps(values)) for values in made) < 300_000
    assert seconds < 1


def test_responses_of_numbers_bins_and_words() -> None:
    bars = [ResponseBar(8, 8, 8, around(1.5), 3), ResponseBar(64, 64, 64, around(1.25), 2)]
    chart = response("lora", "rank", bars, 2.0, COLOURS, log=True)
    rows = [row for row in drawn(chart) if "trials" in row]
    assert [(row["x"], row["y"], row["trials"]) for row in rows] == [(8, 1.5, 3), (64, 1.25, 2)]
    assert '"type": "log"' in json.dumps(spec(chart))
    assert "rank (log)" in json.dumps(spec(chart))
    binned = [ResponseBar(0.05, 0.0, 0.1, around(1.5), 9), ResponseBar(0.15, 0.1, 0.2, around(1.4), 8)]
    rows = [row for row in drawn(response("lora", "dropout", binned, 2.0, COLOURS)) if "trials" in row]
    assert {(row["x1"], row["x2"]) for row in rows} == {(0.0, 0.1), (0.1, 0.2)}
    words = [ResponseBar(value, value, value, around(1.5), 4) for value in (True, "['q_proj', 'v_proj']", "x" * 9999)]
    rows = [row for row in drawn(response("lora", "target_modules", words, 2.0, COLOURS)) if "trials" in row]
    assert [row["x"] for row in rows][:2] == ["True", "q_proj, v_proj"]
    assert all(len(row["x"]) <= 24 for row in rows)


@pytest.mark.parametrize("less", [True, False])
def test_the_front_is_what_nothing_beats(less: bool) -> None:
    draw = random.Random(3)
    points = [
        ScatterPoint(str(i), "lora", "finished", draw.randint(1, 20), around(draw.randint(1, 20) / 10))
        for i in range(60)
    ]
    sign = 1 if less else -1

    def loss(point: ScatterPoint) -> float:
        assert point.loss is not None
        return point.loss.value

    def beaten(p: ScatterPoint) -> bool:
        return any(sign * q.x <= sign * p.x and loss(q) <= loss(p) and (q.x, loss(q)) != (p.x, loss(p)) for q in points)

    assert {(p.x, loss(p)) for p in front(points, less=less)} == {(p.x, loss(p)) for p in points if not beaten(p)}


def test_pareto_plots_name_their_points_and_draw_the_front() -> None:
    points = [
        ScatterPoint("lora-001", "lora", "finished", 5e6, around(1.0)),
        ScatterPoint("prefix_tuning-000", "prefix_tuning", "finished", 3e5, around(1.5)),
        ScatterPoint("prompt_tuning-000", "prompt_tuning", "finished", 4e5, around(1.9)),
    ]
    for what, cost in COSTS.items():
        chart = pareto(points, what, COLOURS, 2.0, part="test")
        text = json.dumps(spec(chart))
        assert cost.axis in text
        assert "test loss, nats a token" in text
        steps = [row for row in drawn(chart) if set(row) == {"x", "y"}]
        beaten = {"trainable": 2, "adapter_bytes": 2, "peak_bytes": 2, "tokens_per_second": 1}
        assert len(steps) == beaten[what]
        (line,) = [layer["mark"] for layer in spec(chart)["layer"] if layer["mark"].get("style") == "front"]
        assert line["interpolate"] == ("step-after" if what != "tokens_per_second" else "step-before")
        labels = [layer for layer in spec(chart)["layer"] if layer["mark"].get("style") == "label"]
        assert len(labels) == 3


def test_differences_of_two_studies() -> None:
    chart = paired([PairedDifference("lora", "lora", Estimate(-0.2, -0.3, -0.1))], "runs/a", "runs/b", COLOURS)
    row = next(row for row in drawn(chart) if "label" in row)
    assert (row["x"], row["x1"], row["x2"], row["loss"]) == (-0.2, -0.3, -0.1, "-0.200 [-0.300, -0.100]")
    assert "Left of zero runs/a is better, right of it runs/b." in subtitle(chart)


def test_a_long_run_is_averaged() -> None:
    steps = [RunPoint(100 * i, i, Estimate(float(i % 2), -math.inf, math.inf)) for i in range(1, 1001)]
    chart = training(steps, [RunPoint(0, 0, around(2.0)), RunPoint(100_000, 1000, around(1.0))], 2.0)
    batches = [row for row in drawn(chart) if row.get("method") == "training batches"]
    assert 100 < len(batches) <= 4 * MOST_MEASUREMENTS
    assert (batches[-1]["x"], batches[-1]["step"]) == (100_000, 1000)
    assert {row["y"] for row in batches} <= {0.428571, 0.571429, 0.5}
    assert "means over 7 steps" in subtitle(chart)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e300])
def test_what_is_no_number_never_reaches_the_page(loss: float) -> None:
    curve = Curve("lora-000", "lora", "finished", ((0, loss), (5, loss)))
    point = ScatterPoint("lora-000", "lora", "finished", 1e-3, Estimate(loss, math.nan, math.inf))
    for base in (None, 2.0, math.nan):
        drawn(learning_curves([curve], base, COLOURS))
        drawn(rates([point, point], base, COLOURS))
        drawn(pareto([point], "trainable", COLOURS, base))
        drawn(training([RunPoint(1, 1, point.loss or around(1))], [RunPoint(1, 1, point.loss or around(1))], base))
    drawn(paired([PairedDifference("a", "lora", Estimate(loss, -math.inf, math.inf))], "a", "b", COLOURS))


@pytest.mark.parametrize("dark", [False, True])
def test_pictures_are_written(tmp_path: Path, dark: bool) -> None:
    chart = rates(simulated(30)[1], 2.2, COLOURS)
    save(chart, tmp_path / "new" / "a.svg", dark=dark)
    save(chart, tmp_path / "new" / "a.png", dark=dark, width=300)
    svg = (tmp_path / "new" / "a.svg").read_text()
    assert svg.startswith("<svg")
    assert all(colour.lower() in svg.lower() for colour in (*COLOURS.values(), theme(dark=dark)["background"]))
    assert re.search(r">dev loss, nats a token<", svg)
    assert (tmp_path / "new" / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match=r"pictures are PNG or SVG.*a\.png or \.svg"):
        save(chart, tmp_path / "a.pdf")


def test_light_and_dark_differ_in_their_theme_only() -> None:
    chart = rates(simulated(30)[1], 2.2, COLOURS)
    light, dark = spec(chart), spec(chart, dark=True)
    assert light.pop("config") != dark.pop("config")
    assert light == dark
