"""What a data set holds, before anything is trained on it: lengths, truncation, supervision, duplicates."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from peft_study.data.chat import ChatEncoder
from peft_study.data.checkup import file_counts
from peft_study.data.stream import OnProgress
from peft_study.data.tokens import TokenizedData, tokenize
from peft_study.doctor.diagnosis import Diagnosis
from peft_study.doctor.observations import DataCounts, Observations
from peft_study.doctor.rule import examine
from peft_study.errors import ConfigError
from peft_study.storage.picture import write_picture

SHOWN_SOURCES = 20
"""Sources in the table, largest first; a mixture may have hundreds."""
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
"""Shares of rows whose length is reported."""


@dataclass(frozen=True, slots=True)
class SourceStats:
    """The rows of one source, or of all.

    Attributes:
        name: the source.
        rows: conversations.
        tokens: tokens before any cut.
        kept_tokens: tokens after the cut to ``max_length``.
        supervised: supervised tokens after the cut.
        truncated: rows longer than ``max_length``.
        unsupervised: rows that have nothing supervised after the cut.
        duplicates: rows that say the same as an earlier row of the whole data set.
    """

    name: str
    rows: int
    tokens: int
    kept_tokens: int
    supervised: int
    truncated: int
    unsupervised: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class DataStats:
    """The statistics of a data set of N rows under one model's tokenizer and one template.

    Attributes:
        total: all rows together.
        by_source: one entry a source, largest first.
        quantiles: length in tokens before the cut, by share of rows (the keys are QUANTILES).
        lengths_N: tokens of each row before the cut.
        max_length: the cut in tokens, or None.
        model, template: what the tokens were made with.
        diagnosis: what is wrong with the data.
    """

    total: SourceStats
    by_source: tuple[SourceStats, ...]
    quantiles: dict[float, int]
    lengths_N: npt.NDArray[np.int64]
    max_length: int | None
    model: str
    template: str
    diagnosis: Diagnosis


def compute_stats(
    sources: list[str],
    encoder: ChatEncoder,
    *,
    model: str,
    max_length: int | None,
    split: str | None = None,
    mapping: Mapping[str, str] | None = None,
    on_progress: OnProgress | None = None,
) -> DataStats:
    """Tokenises the sources at full length (from the cache where they are there) and counts.

    Args:
        sources: files, folders or hub ids.
        encoder: template and tokenizer, without a ``max_length`` of its own.
        model: name of the model whose tokenizer that is, for the report.
        max_length: the cut to report on, in tokens; None for no cut.
        split: the split to take of each source.
        mapping: what ``parse_mapping`` returned.
        on_progress: as `OnProgress`, of the rows tokenised.

    Raises:
        UserError: of the data, the template or the cache.
    """
    assert encoder.max_length is None, "statistics need whole examples"
    if max_length is not None and max_length < 1:
        raise ConfigError(f"max_length is {max_length}", remedy="give at least 1 token")
    data = tokenize(sources, encoder, split=split, mapping=mapping, on_progress=on_progress)
    return _stats_of(data, encoder, max_length=max_length, model=model)


def _stats_of(data: TokenizedData, encoder: ChatEncoder, *, max_length: int | None, model: str) -> DataStats:
    lengths_N = data.lengths_N
    supervised_N = _supervised_within(data, max_length)
    limit = int(lengths_N.max()) if max_length is None else max_length
    names = np.array(data.sources)
    duplicate_N = _duplicates(data)

    def count(name: str, chosen_N: npt.NDArray[np.bool_]) -> SourceStats:
        return SourceStats(
            name=name,
            rows=int(chosen_N.sum()),
            tokens=int(lengths_N[chosen_N].sum()),
            kept_tokens=int(np.minimum(lengths_N[chosen_N], limit).sum()),
            supervised=int(supervised_N[chosen_N].sum()),
            truncated=int((lengths_N[chosen_N] > limit).sum()),
            unsupervised=int((supervised_N[chosen_N] == 0).sum()),
            duplicates=int(duplicate_N[chosen_N].sum()),
        )

    by_source = [count(str(name), names == name) for name in np.unique(names)]
    total = count("all", np.ones(len(data), dtype=np.bool_))
    return DataStats(
        total=total,
        by_source=tuple(sorted(by_source, key=lambda source: (-source.rows, source.name))),
        quantiles={q: int(np.quantile(lengths_N, q, method="higher")) for q in QUANTILES},
        lengths_N=lengths_N,
        max_length=max_length,
        model=model,
        template=encoder.template_name,
        diagnosis=_diagnosed(file_counts([data], encoder), total, max_length),
    )


def _diagnosed(whole: DataCounts, cut: SourceStats, max_length: int | None) -> Diagnosis:
    """Returns what the doctor says of the data.

    Args:
        whole: counts of the rows at full length.
        cut: counts after the cut to `max_length`.
    """
    counts = replace(
        whole,
        tokens=cut.kept_tokens,
        supervised=cut.supervised,
        truncated=cut.truncated,
        unsupervised=cut.unsupervised,
        max_length=max_length,
    )
    return examine(Observations(data=counts), kinds=("data",))


def _supervised_within(data: TokenizedData, max_length: int | None) -> npt.NDArray[np.int64]:
    """Supervised tokens among the first ``max_length`` of each row."""
    if max_length is None:
        return data.supervised_N
    counts_N = data.supervised_N.copy()
    for row in np.flatnonzero(data.lengths_N > max_length).tolist():
        counts_N[row] = data[row].supervised_L[:max_length].sum()
    return counts_N


def _duplicates(data: TokenizedData) -> npt.NDArray[np.bool_]:
    """True for each row that says the same as one before it."""
    seen: set[bytes] = set()
    duplicate_N = np.zeros(len(data), dtype=np.bool_)
    for row, digest in enumerate(data.digests):
        duplicate_N[row] = digest in seen
        seen.add(digest)
    return duplicate_N


def render_stats(stats: DataStats, *, width: int = 80, all_sources: bool = False) -> Group:
    """Returns what ``data stats`` prints: sources, largest first, the quantiles, and what to know.

    Args:
        stats: the numbers; none of them is cut.
        width: columns there are; names of sources that are too long lose their middle.
        all_sources: show more than the SHOWN_SOURCES largest.
    """
    cut = stats.max_length is not None
    shown = stats.by_source if all_sources else stats.by_source[:SHOWN_SOURCES]
    headings = ["rows", "tokens", "mean", "superv.", *(("cut", "lost") if cut else ()), "dupl."]
    cells = [_cells(source, cut) for source in (*shown, stats.total)]
    numbers = sum(max(map(len, column)) + 1 for column in zip(headings, *cells, strict=True))
    names, keyed = shortened([source.name for source in shown], max(width - numbers - 2, 12))
    title = f"tokens of {stats.model}, chat template {stats.template}"
    # without padding there is a column between two, and two at the edges
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("source", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in zip([*names, stats.total.name], cells, strict=True):
        if row is cells[-1]:
            table.add_section()
        table.add_row(name, *row)
    lengths = Table(title="tokens of a row", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for q in stats.quantiles:
        lengths.add_column(_quantile_name(q), justify="right", no_wrap=True)
    lengths.add_row(*(f"{length:,}" for length in stats.quantiles.values()))
    left_out = len(stats.by_source) - len(shown)
    more = [Text(f"{left_out} smaller sources are not shown (--all-sources shows them)")] if left_out else []
    return Group(table, *(Text(line) for line in keyed), *more, lengths, *_sentences(stats))


def shortened(names: Sequence[str], width: int) -> tuple[list[str], list[str]]:
    """Returns names of at most `width` characters, no two of which look the same, and lines that explain some of them.

    A long name loses its middle. Where two would then look the same, each begins with a number, which a line explains.
    """
    cut = [name if len(name) <= width else _without_middle(name, width) for name in names]
    looks, found, lines = Counter(cut), list[str](), list[str]()
    for name, short in zip(names, cut, strict=True):
        if looks[short] > 1:
            number = f"[{len(lines) + 1}]"
            lines.append(f"{number} {name}")
            short = f"{number} {_without_middle(name, width - len(number) - 1)}"
        found.append(short)
    return found, lines


def _without_middle(name: str, width: int) -> str:
    """Returns a name that is cut in its middle; most of the end stays, since names of a mixture often begin alike."""
    tail = (width - 1) * 3 // 5
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"


def stats_json(stats: DataStats) -> str:
    """Returns everything but the single lengths as JSON."""
    values = {
        "model": stats.model,
        "template": stats.template,
        "max_length": stats.max_length,
        "total": asdict(stats.total),
        "sources": [asdict(source) for source in stats.by_source],
        "quantiles": {f"{q:g}": length for q, length in stats.quantiles.items()},
    }
    return json.dumps(values, indent=1, ensure_ascii=False)


def write_stats_csv(stats: DataStats, file: TextIO) -> None:
    """Writes a row a source, with the fields of `SourceStats`."""
    writer = csv.DictWriter(file, [field.name for field in fields(SourceStats)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(source) for source in stats.by_source)


def _cells(source: SourceStats, cut: bool) -> list[str]:
    losses = [_share(source.truncated, source.rows), f"{source.unsupervised:,}"] if cut else []
    return [
        f"{source.rows:,}",
        f"{source.tokens:,}",
        f"{source.tokens / source.rows:.0f}",
        _share(source.supervised, source.kept_tokens),
        *losses,
        f"{source.duplicates:,}",
    ]


def _sentences(stats: DataStats) -> list[Text]:
    total = stats.total
    sentences = [
        f"{_share(total.supervised, total.kept_tokens)} of the tokens are supervised; the rest is read, not learned."
    ]
    if stats.max_length is not None:
        lost = total.tokens - total.kept_tokens
        sentences.append(
            f"max_length {stats.max_length} cuts {total.truncated:,} of {_rows(total.rows)} "
            f"({_share(total.truncated, total.rows)}) and {_share(lost, total.tokens)} of the tokens; "
            f"{_rows(total.unsupervised)} left with nothing supervised."
        )
    if total.duplicates:
        sentences.append(f"{_rows(total.duplicates)} saying the same as an earlier one.")
    return [Text(sentence) for sentence in sentences]


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _quantile_name(q: float) -> str:
    return {0.0: "shortest", 0.5: "median", 1.0: "longest"}.get(q, f"{q:.0%}")


def plot_stats(stats: DataStats, path: Path) -> None:
    """Writes a histogram of row lengths as PNG or SVG, by the suffix; median, 95% and ``max_length`` are marked.

    Raises:
        ConfigError: the suffix is another one.
        OutputError: the picture cannot be written.
    """
    import altair as alt

    longest = max(int(stats.lengths_N.max()), 2)
    # Lengths spread over orders of magnitude, so the bins are equally wide in the logarithm.
    edges = np.unique(np.geomspace(max(int(stats.lengths_N.min()), 1), longest + 1, 60).round())
    if len(edges) < 2:
        edges = np.array([longest - 0.5, longest + 0.5])
    counts, _ = np.histogram(stats.lengths_N, bins=edges)
    bins = [
        {"low": low, "high": high, "rows": rows}
        for low, high, rows in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
        if rows
    ]
    marks = _marks(stats)
    low, last = min(float(edges[0]), marks[0]["x"]) / 1.05, marks[-1]["x"]
    # the last label, at the right of its line, takes up to 28 % of the width
    high = max(float(edges[-1]) * 1.05, last * (last / low) ** (0.28 / 0.72))
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    x = alt.Axis(title="length of a row in tokens (log scale)", format=",", tickCount=6, labelOverlap=True, grid=False)
    y = alt.Y("rows:Q", scale=alt.Scale(domain=[0, 1.4 * int(counts.max())], nice=False), axis=alt.Axis(tickCount=5))
    bars = alt.Chart(alt.InlineData(values=bins)).mark_rect(color="#0072B2")
    lines = alt.Chart(alt.InlineData(values=marks)).encode(
        x=alt.X("x:Q", scale=scale), y=alt.Y("top:Q", scale=None), color=alt.Color("color:N", scale=None)
    )
    layers = [
        bars.encode(x=alt.X("low:Q", scale=scale, axis=x), x2="high:Q", y=y, y2=alt.datum(0)),
        lines.mark_rule(strokeWidth=1.3).encode(
            strokeDash=alt.StrokeDash("dash:N", scale=None), y2=alt.value("height")
        ),
        lines.mark_text(align="left", dx=5, dy=5, fontSize=12).encode(text="text:N"),
    ]
    title = f"{stats.total.rows:,} rows, {stats.total.tokens:,} tokens of {stats.model}"
    chart = alt.layer(*layers, title=title, width=720, height=330, padding=12)
    write_picture(chart.configure_view(stroke=None).configure_title(anchor="start").to_dict(), path)


def _marks(stats: DataStats) -> list[dict[str, Any]]:
    """Returns the lengths that a histogram marks, shortest first: each line ends below the labels at its left."""
    found = [("median", stats.quantiles[0.5], "#333333", [6, 4]), ("95%", stats.quantiles[0.95], "#333333", [2, 3])]
    if stats.max_length is not None:
        cut = f"max_length ({_share(stats.total.truncated, stats.total.rows)} cut)"
        found.append((cut, stats.max_length, "#B84A00", [1, 0]))
    return [
        {"x": length, "text": f"{label} {length:,}", "color": colour, "dash": dash, "top": 4 + 20 * place}
        for place, (label, length, colour, dash) in enumerate(sorted(found, key=lambda mark: mark[1]))
    ]
