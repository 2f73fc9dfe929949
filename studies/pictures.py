"""The pictures of docs/findings.md."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from experiment import HERE, POINTS, RANKS, RATES, SETS, STEPS, TOKENS
from surfaces import REFERENCE, WORST, Surface, rates
from tables import NAMES, run_name

from peft_study.report.chart_style import PALETTE, SHAPES, theme
from peft_study.storage.picture import write_picture

DOCS = HERE.parent / "docs"
Surfaces = dict[tuple[str, str], Surface]
METHODS = [NAMES[method] for method in POINTS]
LOSS = "loss against the base"
"""On held-out rows, in nats a supervised token."""
SHORT = "datum.value < 0.001 ? format(datum.value, '.0e') : format(datum.value, '~g')"
"""Labels of the rates."""
PUBLISHED, OURS = "published", "our 80 % interval"
SIZES = 16
"""Rows of a heat map."""


def draw(summary: dict[str, Any], table: pd.DataFrame, surfaces: Surfaces, curves: pd.DataFrame | None) -> None:
    """Draws all that has rows."""
    _write(trials(table, surfaces), "findings-trials.svg")
    _write(best_rates(summary), "findings-map.svg")
    _write(heat(table, surfaces), "findings-surfaces.png")
    _write(shares(summary), "findings-shares.svg")
    if summary["ranking"]:
        _write(ranking(summary), "findings-ranking.svg")
    if curves is not None:
        _write(rising(curves), "findings-rising.svg")


def _rate(field: str = "learning_rate") -> alt.X:
    scale = alt.Scale(type="log", domain=list(RATES), clamp=True)
    axis = alt.Axis(values=[10.0**power for power in range(-5, 2)], labelExpr=SHORT, labelOverlap=False)
    return alt.X(f"{field}:Q", title="learning rate", scale=scale, axis=axis)


def _write(chart: alt.TopLevelMixin, name: str) -> None:
    write_picture({**chart.to_dict(), "padding": 12, "config": theme()}, DOCS / name)


def trials(table: pd.DataFrame, surfaces: Surfaces) -> alt.TopLevelMixin:
    """All trials, and the surface along the rate at the reference setting with its 80 % interval."""
    panels = []
    for data in SETS:
        row = []
        for method in POINTS:
            part = table[(table["data"] == data) & (table["method"] == method)]
            title = f"{NAMES[method]}, {data}"
            points = alt.Chart(_values(part[["learning_rate", "gain", "steps"]])).mark_point(filled=True, size=34)
            layers = [points.encode(x=_rate(), y=_gain(), color=_steps())]
            if (data, method) in surfaces:
                low, middle, high = surfaces[data, method].along(REFERENCE[method])
                cut = pd.DataFrame({"learning_rate": rates(), "gain": middle, "low": low, "high": high})
                base = alt.Chart(_values(cut)).encode(x=_rate())
                layers.insert(0, base.mark_line(color="#24292f").encode(y=_gain()))
                layers.insert(0, base.mark_area(color="#24292f", opacity=0.15).encode(y=_gain("low"), y2="high"))
            row.append(alt.layer(*layers).properties(width=235, height=180, title=title))
        panels.append(alt.hconcat(*row))
    return alt.vconcat(*panels).resolve_scale(y="shared")


def _gain(name: str = "gain") -> alt.Y:
    return alt.Y(f"{name}:Q", title=LOSS, scale=alt.Scale(domain=[-1.4, WORST + 0.05], clamp=True))


def _steps() -> alt.Color:
    return alt.Color("steps:O", title="steps", scale=alt.Scale(domain=list(STEPS), range=list(PALETTE[: len(STEPS)])))


def best_rates(summary: dict[str, Any]) -> alt.TopLevelMixin:
    """The map: our best rates and what others recommend, a line each."""
    published = pd.read_csv(HERE / "published.csv")
    panels = []
    for method in POINTS:
        lines = [
            {
                "label": f"here: {data}, batch 8, {f'rank {level}' if method == 'lora' else f'{level} tokens'}",
                "low": low, "high": high, "rate": rate, "kind": OURS,
            }
            for data in SETS
            for effect in summary["designed"].get(data, {}).get(method, {}).get("effects", ())
            if effect["setting"] == "size"
            for level, (low, rate, high) in [(effect["level"], effect["rate"])]
        ]  # fmt: skip
        for _, row in published[published["method"] == method].iterrows():
            batch = f", batch {row['batch_size']}" if isinstance(row["batch_size"], str) else ", batch not said"
            source = row["source"].split(" (")[0]
            lines.append(
                {
                    "label": source + batch, "low": row["rate_low"], "high": row["rate_high"], "kind": PUBLISHED,
                    "rate": float(np.sqrt(row["rate_low"] * row["rate_high"])),
                }
            )  # fmt: skip
        panels.append(_lines(lines, NAMES[method]))
    return alt.vconcat(*panels)


def _lines(lines: list[dict[str, Any]], title: str) -> alt.TopLevelMixin:
    colour = alt.Color("kind:N", title=None, scale=alt.Scale(domain=[OURS, PUBLISHED], range=list(PALETTE[:2])))
    shape = alt.Shape("kind:N", title=None, scale=alt.Scale(domain=[OURS, PUBLISHED], range=["circle", "diamond"]))
    base = alt.Chart(alt.InlineData(values=lines)).encode(
        y=alt.Y(
            "label:N",
            title=None,
            sort=[line["label"] for line in lines],
            axis=alt.Axis(labelLimit=320, labelOverlap=False),
        )
    )
    rule = base.mark_rule(strokeWidth=2).encode(x=_rate("low"), x2="high:Q", color=colour)
    point = base.mark_point(filled=True, size=60).encode(x=_rate("rate"), color=colour, shape=shape)
    return (rule + point).properties(width=420, height=alt.Step(17), title=title)


def heat(table: pd.DataFrame, surfaces: Surfaces) -> alt.TopLevelMixin:
    """The mean surface over rate and tokens or rank, at the reference setting."""
    panels = []
    for data in SETS:
        row = []
        for method in (name for name in POINTS if (data, name) in surfaces):
            low, high = RANKS if method == "lora" else TOKENS
            edges = np.geomspace(low, high, SIZES + 1)
            gains = surfaces[data, method].over(np.sqrt(edges[1:] * edges[:-1]), REFERENCE[method])
            half = np.sqrt(rates()[1] / rates()[0])
            cells = [
                {"x": rate / half, "x2": rate * half, "y": edges[i], "y2": edges[i + 1], "gain": float(gains[i, j])}
                for i in range(SIZES)
                for j, rate in enumerate(rates())
            ]
            row.append(_heat(cells, method, f"{NAMES[method]}, {data}"))
        panels.append(alt.hconcat(*row))
    return alt.vconcat(*panels)


def _heat(cells: list[dict[str, float]], method: str, title: str) -> alt.TopLevelMixin:
    sizes = RANKS if method == "lora" else TOKENS
    chart = alt.Chart(alt.InlineData(values=cells)).mark_rect().encode(
        x=_rate("x"),
        x2="x2:Q",
        y=alt.Y(
            "y:Q",
            title="rank" if method == "lora" else "virtual tokens",
            scale=alt.Scale(type="log", domain=sizes),
            axis=alt.Axis(values=[1, 2, 4, 8, 16, 32, 64, 100], labelOverlap=False, format="d"),
        ),
        y2="y2:Q",
        color=alt.Color(
            "gain:Q", title=["loss against", "the base"],
            scale=alt.Scale(scheme="viridis", reverse=True, domain=[-1.2, WORST], clamp=True),
        ),
    )  # fmt: skip
    return chart.properties(width=235, height=170, title=title)


def shares(summary: dict[str, Any]) -> alt.TopLevelMixin:
    """The share of variance of each setting: alone, and what it has with others."""
    order = ("learning_rate", "size", "init", "steps", "batch_size", "warmup_ratio", "weight_decay")
    names = {name: NAMES.get(name, name) for name in order} | {"init": "initialisation"}
    parts = [
        {"setting": names[name], "share": max(0.0, value), "part": part, "panel": f"{NAMES[method]}, {data}"}
        for data in SETS
        for method, found in summary["designed"].get(data, {}).items()
        for name, share in found["shares"].items()
        for part, value in (("alone", share["alone"]), ("with others", share["with_others"] - share["alone"]))
    ]
    chart = alt.Chart(alt.InlineData(values=parts)).mark_bar().encode(
        x=alt.X("share:Q", title="share of the variance", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("setting:N", title=None, sort=list(names.values()), axis=alt.Axis(labelOverlap=False)),
        color=alt.Color(
            "part:N", title=None, scale=alt.Scale(domain=["alone", "with others"], range=[PALETTE[0], "#9ecae1"])
        ),
        facet=alt.Facet("panel:N", title=None, columns=3, sort=[f"{m}, {data}" for data in SETS for m in METHODS]),
    )  # fmt: skip
    return chart.properties(width=190, height=130)


def ranking(summary: dict[str, Any]) -> alt.TopLevelMixin:
    """The best gain of each method at equal steps of 8 rows, and at the time that so many steps of the fastest take."""
    points = [
        {
            "method": NAMES[method], "steps": float(steps), "gain": best["gain"][1], "low": best["gain"][0],
            "high": best["gain"][2], "panel": f"{data}, {kind.replace('_', ' ')}",
        }
        for data, methods in summary["ranking"].items()
        for method, found in methods.items()
        for kind in ("equal_tokens", "equal_seconds")
        for steps, best in found[kind].items()
    ]  # fmt: skip
    colour = alt.Color("method:N", title=None, scale=alt.Scale(domain=METHODS, range=list(PALETTE[:3])))
    shape = alt.Shape("method:N", title=None, scale=alt.Scale(domain=METHODS, range=list(SHAPES[:3])))
    base = alt.Chart().encode(
        x=alt.X(
            "steps:Q", title="steps of 8 rows (of the fastest method)", scale=alt.Scale(type="log", domain=[18, 130])
        ),
        color=colour,
    )
    y = alt.Y("gain:Q", title=LOSS, scale=alt.Scale(zero=False))
    layers = base.mark_line().encode(y=y) + base.mark_point(filled=True, size=50).encode(y=y, shape=shape)
    layers = layers + base.mark_rule().encode(y=alt.Y("low:Q"), y2="high:Q")
    layers = layers.properties(width=280, height=170, data=alt.InlineData(values=points))
    return layers.facet(facet=alt.Facet("panel:N", title=None), columns=2)


def rising(curves: pd.DataFrame) -> alt.TopLevelMixin:
    """Held-out and training losses of `rising`: a line a seed."""
    names = {"held_out": "held-out loss against the base", "train": "training loss of each batch"}
    shown = curves[(curves["trial"] != "none") & curves["event"].isin(list(names))].copy()
    shown["run"] = shown["trial"].str.rsplit("-", n=1).str[0].map(run_name)
    shown["value"] = shown["minus_base"].where(shown["event"] == "held_out", shown["loss"])
    shown["panel"] = shown["event"].map(names)
    order = sorted(shown["run"].unique())
    scale = alt.Scale(domain=order, range=list(PALETTE[: len(order)]))
    colour = alt.Color("run:N", title=None, scale=scale, legend=alt.Legend(labelLimit=0))
    chart = alt.Chart(_values(shown[["run", "seed", "step", "value", "panel"]])).mark_line(opacity=0.8).encode(
        x=alt.X("step:Q", title="optimizer step"),
        y=alt.Y("value:Q", title="nats a token", scale=alt.Scale(zero=False)),
        color=colour,
        detail="seed:N",
        facet=alt.Facet("panel:N", title=None, columns=1, sort=list(names.values())),
    )  # fmt: skip
    return chart.properties(width=520, height=200).resolve_scale(y="independent")


def _values(table: pd.DataFrame) -> alt.InlineData:
    return alt.InlineData(values=table.to_dict("records"))
