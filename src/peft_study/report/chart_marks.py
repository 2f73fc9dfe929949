"""The parts that charts are made of: rows of data, marks, intervals, the base's line, axes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from peft_study.report.chart_scales import LossAxis, log_ticks
from peft_study.report.chart_style import HEIGHT, method_label, shapes, shortened_text
from peft_study.statistics import Estimate, short

WHO = (alt.Tooltip("trial:N"), alt.Tooltip("method:N"), alt.Tooltip("status:N"))
_LINE_LENGTH = 62
"""Characters of a subtitle's line; it fits a phone."""
_SYMBOL, _LETTER, _MOST_LEGEND, _PHONE = 28, 7, 160, 310
"""Widths in pixels: of a legend's symbol with its gaps, of a letter, of an entry at most, and of a phone's chart."""
_CROSS = "M-0.8,-0.8L0.8,0.8M-0.8,0.8L0.8,-0.8"
_ARROW = "M0,-1.3L0,-3.2M-0.7,-2.5L0,-3.2L0.7,-2.5"
"""Over a mark whose loss lies above the axis."""

Datum = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ByMethod:
    """How marks tell methods apart. Layers share a legend only where all of them have the same channels."""

    colour: alt.Color
    shape: alt.Shape


def digits(number: float) -> float:
    """Returns a number with the six digits that a chart needs at most."""
    return float(f"{number:.6g}")


def mark_row(trial: str, method: str, status: str, x: float | str, loss: Estimate | None, axis: LossAxis) -> Datum:
    """Returns the data of a mark: where it is drawn, how, and what its tooltip says.

    `mark` is `full` (trained to the end), `hollow` (stopped early) or `lost` (diverged or failed); with `above` its
    loss lies above the axis. Both of the last are drawn at the axis' edge.
    """
    value = math.nan if loss is None else loss.value
    lost = status in ("diverged", "failed") or not math.isfinite(value)
    row = {
        "trial": shortened_text(trial, 40),
        "method": method_label(method),
        "status": status,
        "x": x if isinstance(x, str) else digits(x),
        "y": digits(axis.place(value if not lost else math.nan)),
        "mark": "lost" if lost else "full" if status == "finished" else "hollow",
        "loss": "no number" if loss is None or not math.isfinite(value) else loss.text(".3f"),
    }
    if not lost and axis.beyond(value):
        row["above"] = True
    if not lost and loss is not None and loss.bounded and loss.low <= axis.edge:
        row |= {"y1": digits(axis.place(loss.low)), "y2": digits(axis.place(loss.high))}
    return row


def marks(
    rows: Sequence[Datum],
    x: alt.X,
    y: alt.Y,
    by_method: ByMethod,
    what: str,
    form: str,
    *,
    tooltip: Sequence[alt.Tooltip] | None = None,
) -> list[alt.Chart]:
    """Returns marks by method and by how the trial ended, with arrows on those above the axis.

    Args:
        rows: of `mark_row`.
        x, y, by_method: channels with their axes and legend.
        what, form: name and d3 format of the number on the x axis, in the tooltip.
        tooltip: another one.
    """
    said = tooltip or [*WHO, alt.Tooltip("x:Q", title=what, format=form), alt.Tooltip("loss:N", title="loss")]
    found = []
    for kind in ("full", "hollow", "lost"):
        some = [row for row in rows if row["mark"] == kind]
        if some:
            points = alt.Chart(alt.InlineData(values=some)).mark_point(
                filled=kind == "full", size=55, opacity=0.95, strokeWidth=1.5
            )
            found.append(points.encode(x=x, y=y, color=by_method.colour, shape=by_method.shape, tooltip=list(said)))
    for path, some in (
        (_CROSS, [row for row in rows if row["mark"] == "lost"]),
        (_ARROW, [row for row in rows if row.get("above")]),
    ):
        if some:
            signs = alt.Chart(alt.InlineData(values=some)).mark_point(shape=path, size=40, strokeWidth=1.3, opacity=1)
            found.append(signs.encode(x=x, y=y, color=by_method.colour, tooltip=list(said)))
    return found


def marks_said(rows: Sequence[Datum]) -> str:
    """Returns what the marks mean that are there."""
    counts = {kind: sum(row["mark"] == kind for row in rows) for kind in ("hollow", "lost")}
    above = sum("above" in row for row in rows)
    said = [
        f"hollow: stopped early ({counts['hollow']})" if counts["hollow"] else "",
        f"crossed: diverged or failed ({counts['lost']})" if counts["lost"] else "",
        f"arrow: loss above the axis ({above})" if above else "",
    ]
    text = "; ".join(each for each in said if each)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def intervals(rows: Sequence[Datum], x: alt.X, y: alt.Y, by_method: ByMethod) -> list[alt.Chart]:
    """Returns vertical rules from the low to the high ends of intervals; arguments as of `marks`."""
    some = [row for row in rows if "y1" in row]
    if not some:
        return []
    rule = alt.Chart(alt.InlineData(values=some)).mark_rule(strokeWidth=1.2, opacity=0.75)
    return [rule.encode(x=x, y=like(y, "y1"), y2="y2:Q", color=by_method.colour)]


def base_line(base: float | None, axis: LossAxis) -> list[alt.Chart]:
    """Returns the untouched base's loss as a dashed line, with its number at the right."""
    if base is None or not math.isfinite(base):
        return []
    data = alt.InlineData(values=[{"y": digits(axis.place(base)), "text": ["base", f"{base:.3f}"]}])
    line = alt.Chart(data).mark_rule(style="base").encode(y="y:Q", tooltip=alt.value(f"the untouched base: {base:.3f}"))
    label = alt.Chart(data).mark_text(style="base-label", align="left", dx=5, baseline="middle", lineHeight=13)
    return [line, label.encode(x=alt.value("width"), y="y:Q", text="text:N")]


def labels(rows: Sequence[Datum], x: alt.X, y: alt.Y, axis: LossAxis, *, log: bool) -> list[alt.Chart]:
    """Returns the methods' names beside their points: on the inner side, above or below where two are near."""
    place = math.log10 if log else float
    xs = [place(row["x"]) for row in rows]
    low, wide = min(xs, default=0.0), max(max(xs, default=1.0) - min(xs, default=0.0), 1e-9)
    found: list[alt.Chart] = []
    taken: list[tuple[float, float]] = []
    for row, at in sorted(zip(rows, xs, strict=True), key=lambda pair: pair[1]):
        across, up = (at - low) / wide, (row["y"] - axis.low) / (axis.high - axis.low)
        near = sum(abs(across - a) < 0.35 and abs(up - u) < 0.07 for a, u in taken)
        taken.append((across, up))
        text = alt.Chart(alt.InlineData(values=[row])).mark_text(
            style="label",
            align="right" if across > 0.5 else "left",
            dx=-9 if across > 0.5 else 9,
            dy=(-9, 11, -22, 24)[near % 4],
            limit=160,
        )
        found.append(text.encode(x=x, y=y, text="method:N"))
    return found


def channels(colours: Mapping[str, str], *, legend: bool = True) -> ByMethod:
    """Returns colour and shape of all methods, whichever are drawn."""
    names, of = [method_label(method) for method in colours], shapes(list(colours))
    widths = [min(_SYMBOL + _LETTER * len(name), _MOST_LEGEND) for name in names]
    # a phone cuts a legend that is wider than its chart
    columns = next((c for c in (3, 2) if sum(max(widths[i::c], default=0) for i in range(c)) <= _PHONE), 1)
    shown = alt.Legend(title=None, orient="top", columns=columns, symbolOpacity=1) if legend else None
    return ByMethod(
        alt.Color("method:N", scale=alt.Scale(domain=names, range=list(colours.values())), legend=shown),
        alt.Shape("method:N", scale=alt.Scale(domain=names, range=list(of.values())), legend=shown),
    )


def y_losses(axis: LossAxis, part: str = "dev") -> alt.Y:
    """Returns the axis of losses; `part`: of the data."""
    scale = alt.Scale(domain=[digits(axis.low), digits(axis.high)], nice=False, zero=False)
    title = f"{part} loss, nats a token".strip()
    return alt.Y("y:Q", scale=scale, axis=alt.Axis(title=title, tickCount=6))


def x_numbers(xs: Sequence[float], title: str, *, log: bool, form: str = "") -> alt.X:
    """Returns an axis of numbers with some room beside the outermost; `form`: of its labels, a d3 format."""
    if not log:
        return alt.X("x:Q", scale=alt.Scale(zero=False, padding=24), axis=_axis(title, form or "~g"))
    low, high = min(xs), max(xs)
    room = max((high / low) ** 0.06, 1.3)
    low, high = low / room, high * room
    shown = sorted(set(xs)) if len(set(xs)) <= 5 and not form and max(xs) >= 1 else log_ticks(low, high)
    form = form or ("~g" if low >= 1e-3 and high < 1e6 else "~e")
    scale = alt.Scale(type="log", domain=[digits(low), digits(high)], nice=False)
    return alt.X("x:Q", scale=scale, axis=_axis(title, form, [digits(tick) for tick in shown]))


def x_tokens() -> alt.X:
    """Returns an axis of data tokens from zero."""
    return alt.X("x:Q", scale=alt.Scale(zero=True), axis=_axis("data tokens", "~s"))


def _axis(title: str, form: str, values: Sequence[float] | None = None) -> alt.Axis:
    """Returns an axis whose labels have each its own SI prefix: 0, 500, 1.5k in place of 0k, 0.5k, 1.5k."""
    placed = {"tickCount": 5} if values is None else {"values": values}
    return alt.Axis(title=title, labelExpr=f"format(datum.value, '{form}')", **placed)


def x_words(values: Sequence[str], title: str) -> alt.X:
    """Returns an axis of words in the given order."""
    angle = 0 if sum(map(len, values)) < 40 else -30
    return alt.X(
        "x:N", sort=list(values), axis=alt.Axis(title=title, labelAngle=angle, labelLimit=160, labelOverlap=False)
    )


def like(channel: alt.X | alt.Y, field: str) -> Any:
    """Returns a channel of another field on the same axis: layers share one only where they say the same of it."""
    found = channel.copy()
    found.shorthand = f"{field}:Q"
    return found


def chart(layers: Sequence[alt.Chart], title: str, said: Sequence[str], described: str) -> alt.LayerChart:
    """Returns the layers as one chart.

    Args:
        layers: from the bottom.
        title: of the chart.
        said: sentences below the title; empty ones are left out.
        described: what is drawn, for those who cannot see it.
    """
    text = " ".join(sentence for sentence in said if sentence).replace(" %", "\u00a0%")
    heading = alt.TitleParams(text=title, subtitle=textwrap.wrap(text, _LINE_LENGTH) or [""])
    return alt.layer(*layers, title=heading, description=f"{title}. {described}. {text}".strip(), height=HEIGHT)


def short_value(value: object) -> str:
    """Returns a setting's value as an axis shows it."""
    plain = short(value).translate({ord(sign): None for sign in "[]'\""})  # of a list in JSON or Python
    return shortened_text(plain, 24)
