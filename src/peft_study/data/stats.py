"""What a data set holds, before anything is trained on it: lengths, truncation, supervision, duplicates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from peft_study.data.chat import ChatEncoder
from peft_study.data.tokens import TokenizedData, tokenize
from peft_study.errors import ConfigError
from peft_study.storage.files import AtomicFiles, made_folder

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
    """

    total: SourceStats
    by_source: tuple[SourceStats, ...]
    quantiles: dict[float, int]
    lengths_N: npt.NDArray[np.int64]
    max_length: int | None
    model: str
    template: str


def compute_stats(
    sources: list[str],
    encoder: ChatEncoder,
    *,
    model: str,
    max_length: int | None,
    split: str | None = None,
    mapping: Mapping[str, str] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> DataStats:
    """Tokenises the sources at full length (from the cache where they are there) and counts.

    Args:
        sources: files, folders or hub ids.
        encoder: template and tokenizer, without a ``max_length`` of its own.
        model: name of the model whose tokenizer that is, for the report.
        max_length: the cut to report on, in tokens; None for no cut.
        split: the split to take of each source.
        mapping: what ``parse_mapping`` returned.
        on_progress: receives the number of rows tokenised so far.

    Raises:
        UserError: of the data, the template or the cache.
    """
    assert encoder.max_length is None, "statistics need whole examples"
    if max_length is not None and max_length < 1:
        raise ConfigError(f"max_length is {max_length}", remedy="give at least 1 token")
    data = tokenize(sources, encoder, split=split, mapping=mapping, on_progress=on_progress)
    return _stats_of(data, max_length=max_length, model=model, template=encoder.template_name)


def _stats_of(data: TokenizedData, *, max_length: int | None, model: str, template: str) -> DataStats:
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
    return DataStats(
        total=count("all", np.ones(len(data), dtype=np.bool_)),
        by_source=tuple(sorted(by_source, key=lambda source: (-source.rows, source.name))),
        quantiles={q: int(np.quantile(lengths_N, q, method="higher")) for q in QUANTILES},
        lengths_N=lengths_N,
        max_length=max_length,
        model=model,
        template=template,
    )


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


def render_stats(stats: DataStats) -> Group:
    """Returns what ``data stats`` prints in 80 columns: the largest sources, the quantiles, and what to know."""
    cut = stats.max_length is not None
    title = f"tokens of {stats.model}, chat template {stats.template}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("source", no_wrap=True, overflow="ellipsis", max_width=26)
    for heading in ("rows", "tokens", "mean", "superv.", *(("cut", "lost") if cut else ()), "dupl."):
        table.add_column(heading, justify="right", no_wrap=True)
    for source in stats.by_source[:SHOWN_SOURCES]:
        table.add_row(*_cells(source, cut))
    if (left_out := len(stats.by_source) - SHOWN_SOURCES) > 0:
        table.add_row(f"... and {left_out} smaller sources")
    table.add_section()
    table.add_row(*_cells(stats.total, cut))
    lengths = Table(title="tokens of a row", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for q in stats.quantiles:
        lengths.add_column(_quantile_name(q), justify="right")
    lengths.add_row(*(f"{length:,}" for length in stats.quantiles.values()))
    return Group(table, lengths, *(Text(sentence) for sentence in _sentences(stats)))


def _cells(source: SourceStats, cut: bool) -> list[str]:
    losses = [_share(source.truncated, source.rows), f"{source.unsupervised:,}"] if cut else []
    return [
        source.name,
        f"{source.rows:,}",
        f"{source.tokens:,}",
        f"{source.tokens / source.rows:.0f}",
        _share(source.supervised, source.kept_tokens),
        *losses,
        f"{source.duplicates:,}",
    ]


def _sentences(stats: DataStats) -> list[str]:
    total = stats.total
    sentences = [
        f"{_share(total.supervised, total.kept_tokens)} of the tokens are supervised; the rest is read, not learned."
    ]
    if stats.max_length is not None:
        lost = total.tokens - total.kept_tokens
        sentences.append(
            f"max_length {stats.max_length} cuts {total.truncated:,} of {_rows(total.rows)} "
            f"({_share(total.truncated, total.rows)}) and {_share(lost, total.tokens)} of the tokens; "
            f"{_rows(total.unsupervised)} left with nothing supervised, to be dropped."
        )
    if total.duplicates:
        sentences.append(f"{_rows(total.duplicates)} saying the same as an earlier one.")
    return sentences


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _quantile_name(q: float) -> str:
    return {0.0: "shortest", 0.5: "median", 1.0: "longest"}.get(q, f"{q:.0%}")


def plot_stats(stats: DataStats, path: Path) -> None:
    """Writes a histogram of row lengths as a PNG, with median, 95% and ``max_length`` marked.

    Raises:
        OutputError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    longest = max(int(stats.lengths_N.max()), 2)
    # Lengths spread over orders of magnitude, so the bins are equally wide in the logarithm.
    edges = np.unique(np.geomspace(max(int(stats.lengths_N.min()), 1), longest + 1, 60).round())
    if len(edges) < 2:
        edges = np.array([longest - 0.5, longest + 0.5])
    axes.hist(stats.lengths_N, bins=edges.tolist(), color="#4c78a8")
    axes.set_xscale("log")
    _mark(axes, stats.quantiles[0.5], "median", "#333333", "--", height=0.97)
    _mark(axes, stats.quantiles[0.95], "95%", "#333333", ":", height=0.90)
    if stats.max_length is not None:
        cut = _share(stats.total.truncated, stats.total.rows)
        _mark(axes, stats.max_length, f"max_length ({cut} cut)", "#d62728", "-", height=0.83)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("length of a row in tokens (log scale)")
    axes.set_ylabel("rows")
    axes.set_title(f"{stats.total.rows:,} rows, {stats.total.tokens:,} tokens of {stats.model}")
    axes.spines[["top", "right"]].set_visible(False)
    with made_folder(path.parent), AtomicFiles() as files:
        figure.savefig(files.open(path), format="png", dpi=150)


def _mark(axes: Any, length: int, label: str, color: str, line: str, *, height: float) -> None:
    axes.axvline(length, color=color, linestyle=line, linewidth=1.2)
    axes.text(
        length,
        height,
        f" {label} {length:,}",
        color=color,
        transform=axes.get_xaxis_transform(),
        fontsize=9,
        verticalalignment="top",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0},
    )
