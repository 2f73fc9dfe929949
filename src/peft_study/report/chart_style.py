"""How charts look: a colour and a shape a method, light and dark, for a page or for a file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import altair as alt

from peft_study.storage.picture import write_picture

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#A578FF", "#A54B3C", "#9600FF", "#696978")
"""The colours of Okabe & Ito (2008) with a contrast of 3:1 on white and on `BACKGROUND`'s dark, then others with it.

One palette for both, so that a page changes its theme without a second chart. Those added are as far as possible from
the others for normal and colour-blind eyes (Machado et al. 2009).
"""
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "triangle-left", "triangle-right")
BACKGROUND = {False: "#ffffff", True: "#15181d"}
"""Behind the charts of a file, by `dark`; a page's is near it."""
WIDTH, HEIGHT = 640, 300
"""Of the axes of a file, in pixels."""
_TEXT = {False: "#24292f", True: "#d7dbe0"}
_QUIET = {False: "#57606a", True: "#9aa4af"}
_GRID = {False: "#e4e7eb", True: "#2d333b"}


def colours(methods: Sequence[str]) -> dict[str, str]:
    """Returns a colour of each method, by the order in the study file; beyond eight they come again.

    The shapes come again after seven, so that 56 methods differ in one of both.
    """
    return dict(zip(methods, cycle(PALETTE), strict=False))


def shapes(methods: Sequence[str]) -> dict[str, str]:
    """Returns the shape of each method's marks."""
    return dict(zip(methods, cycle(SHAPES), strict=False))


def method_label(method: str) -> str:
    """Returns a method's name as charts show it."""
    return shortened_text(method, 40)


def shortened_text(text: str, most: int) -> str:
    """Returns a text without its middle where it is longer; names may have thousands of letters."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]}…{text[-(most - most * 2 // 3 - 1) :]}"


def theme(*, dark: bool = False, background: str | None = None) -> dict[str, Any]:
    """Returns the `config` of a chart: all of its colours but the methods'.

    Args:
        dark: light on dark.
        background: None: that of a file; a page gives `transparent`.
    """
    text, quiet, grid = _TEXT[dark], _QUIET[dark], _GRID[dark]
    return {
        "background": background or BACKGROUND[dark],
        "font": "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif",
        "view": {"stroke": None},
        "axis": {
            "labelColor": quiet,
            "titleColor": text,
            "domainColor": quiet,
            "tickColor": quiet,
            "gridColor": grid,
            "labelFontSize": 11,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "labelOverlap": True,
            "labelSeparation": 8,
        },
        "legend": {"labelColor": text, "titleColor": text, "labelFontSize": 12, "labelLimit": 130, "symbolSize": 70},
        "title": {
            "anchor": "start",
            "color": text,
            "fontSize": 14,
            "subtitleColor": quiet,
            "subtitleFontSize": 11,
            "subtitlePadding": 5,
            "offset": 10,
        },
        "style": {
            "base": {"color": text, "strokeDash": [5, 4], "strokeWidth": 1.3},
            "base-label": {"color": text, "fontSize": 11},
            "front": {"color": quiet},
            "label": {"color": text, "fontSize": 12},
        },
    }


def spec(chart: alt.LayerChart, *, dark: bool = False) -> dict[str, Any]:
    """Returns a chart as Vega-Lite for a page: as wide as its container, on the page's own background.

    Only `config` differs between light and dark, so a page may replace it with `theme(dark=..., ...)`.
    """
    values: dict[str, Any] = chart.properties(width="container").to_dict()
    return {**values, "config": theme(dark=dark, background="transparent")}


def save(chart: alt.LayerChart, path: Path, *, dark: bool = False, width: int = WIDTH) -> None:
    """Writes a chart as a picture, SVG or PNG by the file's suffix.

    Args:
        chart: of this module's neighbour `charts`.
        path: of the file.
        dark: light on dark.
        width: of the axes, in pixels.

    Raises:
        ConfigError: when the suffix is another one.
        OutputError: when the file cannot be written.
    """
    values: dict[str, Any] = chart.properties(width=width).to_dict()
    write_picture({**values, "padding": 12, "config": theme(dark=dark)}, path)
