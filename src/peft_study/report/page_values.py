"""Numbers and texts as the report's page shows them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft_study.report.page_words import Words
from peft_study.statistics import Estimate

LONGEST = 4000
"""Letters of a text that the page shows; of more it shows the beginning and the end."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A number with its interval as text, in the digits that the interval allows.

    Attributes:
        value: the number.
        interval: its 95 % interval in words.
        ends: the same in brackets, for tables.
    """

    value: str
    interval: str
    ends: str


def places(estimate: Estimate) -> int:
    """Returns the decimals to show: two digits of the interval's half-width, at most 4; without an interval 2."""
    half = (estimate.high - estimate.low) / 2
    if not math.isfinite(half) or half <= 0:
        return 2
    return min(4, max(0, 1 - math.floor(math.log10(half))))


def shown(estimate: Estimate | None, t: Words, *, sign: bool = False) -> Shown | None:
    """Returns an estimate as text; `sign`: with + or -, for a difference."""
    if estimate is None:
        return None
    if not math.isfinite(estimate.value):
        return Shown(str(estimate.value), t("no_interval"), "")
    form = f"{'+' if sign else ''}.{places(estimate)}f"
    value, low, high = (minus(f"{number:{form}}") for number in (estimate.value, estimate.low, estimate.high))
    if not estimate.bounded:
        return Shown(value, t("no_interval"), "")
    return Shown(value, t("interval", low=low, high=high), f"[{low}, {high}]")


def minus(text: str) -> str:
    """Returns a number's text with a minus sign in place of the hyphen, and no sign before a zero."""
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def setting(value: object) -> str:
    """Returns a setting's value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value))
    return "-" if value is None else shortened(str(value))


def shortened(text: str, most: int = LONGEST) -> str:
    """Returns a text without its middle where it is longer."""
    return text if len(text) <= most else f"{text[: most * 3 // 4]} … {text[-most // 4 :]}"


def flattened(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yields every value of nested ones with its path, as ``a.b``."""
    for name, value in values.items():
        path = f"{before}.{name}" if before else str(name)
        if isinstance(value, Mapping):
            yield from flattened(value, path)
        elif isinstance(value, (list, tuple)) and any(isinstance(each, Mapping) for each in value):
            yield from flattened({str(i): each for i, each in enumerate(value)}, path)
        else:
            yield path, setting(value)


@dataclass(frozen=True, slots=True)
class Strip:
    """An interval drawn on a line, in pixels of 300; the same scale for all of a page."""

    low: float
    high: float
    value: float
    base: float


def strips(estimates: Mapping[str, Estimate | None], base: Estimate | None) -> dict[str, Strip]:
    """Returns the drawings of some estimates and the base; none where a number is not finite."""
    finite = {name: e for name, e in estimates.items() if e is not None and math.isfinite(e.value)}
    if base is None or not math.isfinite(base.value) or not finite:
        return {}
    ends = [base.value]
    for e in finite.values():
        ends += [e.low, e.high] if e.bounded else [e.value]
    low, high = min(ends), max(ends)
    scale = 280 / (high - low) if high > low else 0.0

    def at(number: float) -> float:
        return round(10 + (number - low) * scale, 1)

    found = {}
    for name, e in finite.items():
        least, most = (e.low, e.high) if e.bounded else (e.value, e.value)
        found[name] = Strip(at(least), at(most), at(e.value), at(base.value))
    return found
