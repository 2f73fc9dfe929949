"""The pictures among the results, drawn from their rows: growth.png, launches.png and search_DATA_METHOD_SLOTS.png.

    python benchmarks/pictures.py                      # all of them again; nothing is measured

`growth.py` and `search.py replay` draw theirs when they end.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
from common import RESULTS, read_rows

from peft_study.report.chart_scales import log_ticks
from peft_study.report.chart_style import PALETTE, colours, shapes, theme
from peft_study.storage.picture import write_picture

AXES = {
    "slots": "trials, each of the same tokens a step",
    "rank": "LoRA rank",
    "row": "tokens of the row",
    "length": "tokens of an example",
}
"""What grows in growth.py."""
UNITS = {"seconds": "seconds (log)", "tokens": "tokens of training (log)"}
SYSTEMS = {
    "d": "(d) ours",
    "d, no prior": "(d) ours, no prior",
    "d, design": "(d) grid at random, halving",
    "c": "(c) ours, whole trials",
    "a": "(a) whole trials",
    "a default": "(a) TRL, defaults",
    "a best": "(a) TRL, best settings",
    "b": "(b) ASHA",
    "b default": "(b) Ray Tune, TRL's defaults",
    "b best": "(b) Ray Tune, TRL's best",
}
_LEAST = 1e-3
"""Where a share of zero is drawn on a log axis."""
_KEYS = ("low", "y", "high")


def growth(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws time per token against each axis, with the fastest and slowest step, on the first row's machine."""
    first = rows[0]
    rows = [row for row in rows if all(row[name] == first[name] for name in ("machine", "model", "device"))]
    top = 1.05 * max(row["slowest"] for row in rows)
    panels = []
    for axis, label in AXES.items():
        found = [row for row in rows if row["axis"] == axis]
        points = [{"x": r[axis], "y": r["ms_per_token"], "low": r["fastest"], "high": r["slowest"]} for r in found]
        base = alt.Chart(alt.InlineData(values=points), width=240, height=220)
        ticks = alt.Axis(title=label, values=sorted(point["x"] for point in points), format="d")
        x = alt.X("x:Q", scale=alt.Scale(type="log", base=2, nice=False, padding=12), axis=ticks)
        scale = alt.Scale(domain=[0, top], nice=False)
        title = None if panels else "milliseconds a data token"
        y, low = (alt.Y(f"{field}:Q", scale=scale, axis=alt.Axis(title=title)) for field in ("y", "low"))
        area = base.mark_area(opacity=0.25, color=PALETTE[0]).encode(x=x, y=low, y2="high:Q")
        line = base.mark_line(color=PALETTE[0], point=alt.OverlayMarkDef(color=PALETTE[0], size=40)).encode(x=x, y=y)
        panels.append(area + line)
    title = f"{first['model']}, {first['dtype']}, LoRA; {first['machine']}, {first['date'][:10]}"
    _write(alt.hconcat(*panels, title=title), path)


def launches(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the operations of a row against the number of trials: the newest run, and dashed the oldest."""
    rows, panels = [row for row in rows if row["row"] == "launches"], []
    for kind, label in {"equal": "equal LoRA", "unequal": "LoRA of ranks 4 to 32", "mixed": "three methods"}.items():
        own = [row for row in rows if row["trials"] == kind]
        points = [
            {"x": row["count"], "y": row["operations"], "run": run}
            for run, of in (("before", own[0]), ("now", own[-1]))
            for row in own
            if row["commit"] == of["commit"]
        ]
        base = alt.Chart(alt.InlineData(values=points), width=200, height=200)
        ticks = alt.Axis(title=f"trials: {label}", values=sorted({point["x"] for point in points}), format="d")
        x = alt.X("x:Q", scale=alt.Scale(type="log", base=2, nice=False, padding=12), axis=ticks)
        top = 1.05 * max(row["operations"] for row in rows)
        y = alt.Y(
            "y:Q",
            scale=alt.Scale(type="log", domain=[300, top], nice=False),
            axis=alt.Axis(title=None if panels else "operations of a row (log)", values=[300, 1000, 3000, 10000]),
        )
        dash = alt.StrokeDash("run:N", scale=alt.Scale(domain=["now", "before"], range=[[1, 0], [4, 3]]), title=None)
        point = alt.OverlayMarkDef(color=PALETTE[0], size=40)
        panels.append(base.mark_line(color=PALETTE[0], point=point).encode(x=x, y=y, strokeDash=dash))
    _write(alt.hconcat(*panels), path)


def search(rows: Sequence[dict[str, Any]], good: float, path: Path) -> None:
    """Draws each system's median regret against seconds and against tokens, with its quartiles.

    Args:
        rows: `regret` of one replay by the rule `highest`.
        good: the regret of a setting that is good enough.
        path: of the picture.
    """
    panels = []
    for unit, label in UNITS.items():
        levels = {row["system"]: row for row in rows if row["unit"] == unit}
        names = {system: name for system, name in SYSTEMS.items() if system in levels}
        points = [
            {"system": name, "x": at, **{key: max(level, _LEAST) for key, level in zip(_KEYS, found, strict=True)}}
            for system, name in reversed(names.items())  # ours lies on top
            for at, found in zip(levels[system]["at"], levels[system]["quartiles"], strict=True)
        ]
        low, high = points[0]["x"], points[-1]["x"]
        ticks = alt.Axis(title=label, format="~s", values=log_ticks(low, high))
        x = alt.X("x:Q", scale=alt.Scale(type="log", domain=[low, high], nice=False), axis=ticks)
        title = None if panels else "test loss above the best of the grid, share (log)"
        axis = alt.Axis(title=title, format="~g", values=[_LEAST, 0.01, 0.1, 1, 10])
        y, quartile = (alt.Y(f"{field}:Q", scale=alt.Scale(type="log"), axis=axis) for field in ("y", "low"))
        shown = list(names.values())
        legend = alt.Legend(title=None, orient="bottom", columns=2, symbolOpacity=1, labelLimit=260)
        of = colours(shown), shapes(shown)
        colour = alt.Color("system:N", scale=alt.Scale(domain=shown, range=list(of[0].values())), legend=legend)
        shape = alt.Shape("system:N", scale=alt.Scale(domain=shown, range=list(of[1].values())), legend=legend)
        base = alt.Chart(alt.InlineData(values=points), width=430, height=300)
        panels.append(
            base.mark_area(opacity=0.1, interpolate="step-after").encode(x=x, y=quartile, y2="high:Q", color=colour)
            + base.mark_line(interpolate="step-after", strokeWidth=1.8).encode(x=x, y=y, color=colour)
            + base.mark_point(filled=True, size=36, opacity=1).encode(x=x, y=y, color=colour, shape=shape)
            + alt.Chart(alt.InlineData(values=[{"y": good}])).mark_rule(style="base").encode(y=y)
        )
    first = rows[0]
    title = f"{first['method']} on {first['data']}, {first['slots']} slot{'s' if first['slots'] > 1 else ''}"
    said = f"Median and quartiles of {first['seeds']} orders. Dashed: good enough, {good:.0%}. 0 is drawn at {_LEAST}."
    whole = alt.hconcat(*panels, title=alt.TitleParams(title, subtitle=said))
    _write(whole.resolve_scale(color="independent", shape="independent"), path)


def _write(chart: alt.HConcatChart, path: Path) -> None:
    write_picture({**chart.to_dict(), "config": theme(), "padding": 10}, path)


def main(words: list[str] | None = None) -> None:
    """Draws all pictures of the rows in a folder."""
    from search_grid import GOOD

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows and pictures")
    out = parser.parse_args(words).out
    if rows := read_rows(out / "growth.jsonl"):
        growth(rows, out / "growth.png")
    if rows := read_rows(out / "launches.jsonl"):
        launches(rows, out / "launches.png")
    regrets = [row for row in read_rows(out / "search.jsonl") if row["row"] == "regret" and row["rule"] == "highest"]
    replays: dict[str, list[dict[str, Any]]] = {}
    for row in regrets:
        replays.setdefault(f"search_{row['data']}_{row['method']}_{row['slots']}.png", []).append(row)
    for name, found in replays.items():
        search([row for row in found if row["date"] == found[-1]["date"]], GOOD, out / name)


if __name__ == "__main__":
    main()
