"""One self-contained HTML page: it opens from disk, asks for nothing over a network, and escapes what it shows.

A policy in the page allows the two scripts and the one style in it by their hashes, and no request at all. Vega runs
with its interpreter of expressions, so that the page needs no `eval`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from peft_study.errors import UserError
from peft_study.report.chart_data import Charts
from peft_study.report.charts import colours, theme
from peft_study.report.charts import spec as spec_of
from peft_study.report.page_words import Words
from peft_study.storage.cache_dir import cache_root
from peft_study.storage.files import atomic_writer, finite, made_folder

_HERE = Path(__file__).parent
COLOURED = 56
"""Methods that have a colour on the page."""


@dataclass(frozen=True, slots=True)
class Caption:
    """What stands above a chart, and what a screen reader says of it."""

    title: str
    lines: tuple[str, ...]
    alt: str


def render(template: str, t: Words, title: str, charts: Charts, values: Mapping[str, Any]) -> str:
    """Returns a page.

    Args:
        template: its file beside this one.
        t: the words of its language.
        title: of the window.
        charts: that the template names.
        values: that the template shows.
    """
    specs, captions = {}, {}
    for name, chart in charts.items():
        specs[name], captions[name] = _taken_apart(spec_of(chart))
    data = {
        "charts": specs,
        "themes": {name: theme(dark=name == "dark", background="transparent") for name in ("light", "dark")},
    }
    places = "\n".join(f".m{number} {{ --colour: {colour}; }}" for number, colour in enumerate(_palette()))
    style = f"{_file('page.css')}{places}\n"
    library, script = _library(), _file("page.js")
    page = _templates().get_template(template)
    return page.render(
        values,
        lang=t.lang,
        t=t,
        version=importlib.metadata.version("peft-study"),
        title=title,
        captions=captions,
        policy=_policy((library, script), style),
        style=Markup(style),
        library=Markup(library),
        script=Markup(script),
        data=htmlsafe_json_dumps(finite(data)),
    )


def _taken_apart(spec: dict[str, Any]) -> tuple[dict[str, Any], Caption]:
    """Returns a chart without its title and theme, and the title: as text of the page it wraps on a phone."""
    title = spec.get("title") or {}
    title = {"text": title} if isinstance(title, str) else title
    lines = title.get("subtitle") or ()
    said = (lines,) if isinstance(lines, str) else tuple(lines)
    rest = {name: value for name, value in spec.items() if name not in ("title", "config", "usermeta")}
    if isinstance(rest.get("height"), dict):  # rows of a fixed height cannot be fitted
        rest["autosize"] = {"type": "fit-x", "contains": "padding"}
    return rest, Caption(str(title.get("text", "")), said, str(spec.get("description", title.get("text", ""))))


def _palette() -> list[str]:
    return list(colours([str(number) for number in range(COLOURED)]).values())


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False
    )


@cache
def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


@cache
def _library() -> str:
    """Returns Vega, Vega-Lite and Vega-Embed as one script, which no text in it can end early.

    They are put together once: that takes a second, and the result is kept in the cache.
    """
    kept = cache_root() / f"vega-{importlib.metadata.version('vl-convert-python')}.js"
    try:
        text = kept.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        from vl_convert import javascript_bundle

        text = javascript_bundle("window.vegaEmbed = vegaEmbed;")
        with contextlib.suppress(UserError, OSError), made_folder(kept.parent), atomic_writer(kept) as file:
            file.write(text)
    return text.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(scripts: tuple[str, ...], style: str) -> str:
    allowed = " ".join(_hash(script) for script in scripts)
    return f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
