"""Uniform or stratified samples, nested in one another, from one streaming pass.

    rows --a random key each--> the smallest keys of every stratum --counts per stratum--> sample-N.jsonl, manifest.json

Every row draws a 64-bit key; the n rows with the smallest keys are a uniform sample without replacement, and the
smaller sample is part of the larger. A file is ordered by key, the smaller sample first: so ``sample-9000.jsonl`` is
the beginning of ``sample-90000.jsonl``, and the first n rows of a file are a sample too.
"""

from __future__ import annotations

import heapq
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.random import PCG64, Generator  # loaded when first used, it would swallow a Ctrl-C at the first row

from peft_study.data.convert import LineWriter, line_of
from peft_study.data.readers import RawRow
from peft_study.data.sources import Source, open_sources
from peft_study.data.stream import OnProgress, parsed_rows
from peft_study.errors import ConfigError, DataError, OutputError, nearest
from peft_study.model.digest import file_digest
from peft_study.storage.files import AtomicFiles, made_folder

MANIFEST = "manifest.json"
_KEYS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """What to draw.

    Args:
        sizes: numbers of rows, one sample each; kept in ascending order.
        seed: of the random keys; the same seed and rows give the same files.
        by: the column whose proportions to keep, or None for uniform samples. ``source`` is the source that a row
            has after conversion.
        split: the split to take of each source.
        mapping: what `parse_mapping` returned.

    Raises:
        ConfigError: a size is below 1 or given twice, there is none, or the seed is negative.
    """

    sizes: tuple[int, ...]
    seed: int = 42
    by: str | None = None
    split: str | None = None
    mapping: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ConfigError("no size is given", where="--sizes", remedy="give one or more, as in --sizes 9000 90000")
        for size in self.sizes:
            if size < 1:
                raise ConfigError(f"a sample of {size} rows", where="--sizes", remedy="give sizes of 1 or more")
            if self.sizes.count(size) > 1:
                raise ConfigError(f"{size} is given twice", where="--sizes", remedy="give each size once")
        if self.seed < 0:
            raise ConfigError(f"a seed of {self.seed}", where="--seed", remedy="give 0 or more")
        object.__setattr__(self, "sizes", tuple(sorted(self.sizes)))


def sample(
    sources: Sequence[str],
    output: Path,
    spec: SampleSpec,
    *,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Draws the samples and writes them with their manifest, all together or not at all.

    Args:
        sources: files, folders or hub ids, taken as one.
        output: the folder for ``sample-N.jsonl`` and ``manifest.json``; made where it is missing.
        spec: what to draw.
        overwrite: whether samples in the folder may be replaced.
        on_progress: as `OnProgress`.

    Returns:
        The manifest: seed, sizes, by, rows and counts per source of the whole and of each sample, sha256 of all files.

    Raises:
        DataError: a source or a row cannot be used, or a size is larger than the number of rows.
        OutputError: the folder holds samples already, or cannot be written.
    """
    opened = open_sources(sources, spec.split)
    targets = [output / f"sample-{size}.jsonl" for size in spec.sizes]
    replaced = _written_before(output)
    _check_output(output, [*targets, *replaced], opened, overwrite)
    with made_folder(output), AtomicFiles() as files, tempfile.TemporaryFile(dir=output) as spill:
        reservoir = _Reservoir(spec.sizes[-1], spill)
        _fill(reservoir, opened, spec, on_progress)
        if reservoir.rows < spec.sizes[-1]:
            what = f"a sample of {spec.sizes[-1]} rows is wanted, but there are only {reservoir.rows} rows"
            raise DataError(what, where=", ".join(sources), remedy="ask for fewer, or give more sources")
        counts = allocate(reservoir.strata, spec.sizes)
        blocks = reservoir.blocks(counts)
        manifest = _manifest(spec, opened, reservoir)
        for index, (size, target) in enumerate(zip(spec.sizes, targets, strict=True)):
            entry = _write_sample(files.open(target), target, blocks[: index + 1], reservoir)
            manifest["samples"][str(size)] = entry | _strata_entry(spec, counts[index])
        files.open(output / MANIFEST).write((json.dumps(manifest, ensure_ascii=False, indent=2) + "\n").encode())
    for stale in set(replaced) - set(targets):  # of the manifest that has just been replaced
        stale.unlink(missing_ok=True)
    return manifest


def allocate(population: Mapping[str, int], sizes: Sequence[int]) -> list[dict[str, int]]:
    """Divides each sample among strata in proportion to their rows, so that each larger sample holds the smaller.

    The rule is largest remainder, size by size. It can take a row away from a stratum when the sample grows (the
    Alabama paradox), and then samples would not be nested; in that case the smaller sample is divided as the larger.

    Args:
        population: rows by stratum.
        sizes: in ascending order; none larger than all rows together.

    Returns:
        The counts by stratum for each size.
    """
    counts = [_largest_remainder(population, size) for size in sizes]
    for i in reversed(range(len(sizes) - 1)):
        if any(counts[i][name] > counts[i + 1][name] for name in population):
            counts[i] = _largest_remainder(counts[i + 1], sizes[i])
    return counts


def _largest_remainder(population: Mapping[str, int], size: int) -> dict[str, int]:
    total = sum(population.values())
    counts = {name: size * rows // total for name, rows in population.items()}
    by_remainder = sorted(population, key=lambda name: (-(size * population[name] % total), name))
    for name in by_remainder[: size - sum(counts.values())]:
        counts[name] += 1
    return counts


@dataclass(frozen=True, slots=True, order=True)
class _Kept:
    """A candidate row: its key, its number among all rows, its source, and the place of its line in the spill file."""

    key: int
    number: int
    source: str
    offset: int
    length: int


class _Reservoir:
    """The candidates of every stratum, at most ``largest`` each; their lines are on the disk."""

    def __init__(self, largest: int, spill: IO[bytes]) -> None:
        self._largest = largest
        self._spill = spill
        self._end = 0
        self._heaps: dict[str, list[tuple[int, int, _Kept]]] = {}
        self.rows = 0
        self.strata: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()

    def offer(self, stratum: str, key: int, source: str, line: bytes) -> None:
        """Counts the row, and keeps it while its key is among the smallest of its stratum."""
        self.rows += 1
        number = self.rows
        self.strata[stratum] += 1
        self.sources[source] += 1
        heap = self._heaps.setdefault(stratum, [])
        if len(heap) == self._largest and (-key, -number) < heap[0][:2]:
            return
        entry = (-key, -number, _Kept(key, number, sys.intern(source), self._end, len(line)))
        self._spill.write(line)
        self._end += len(line)
        (heapq.heappush if len(heap) < self._largest else heapq.heapreplace)(heap, entry)

    def blocks(self, counts: Sequence[Mapping[str, int]]) -> list[list[_Kept]]:
        """Returns what each size adds to the one before it, ordered by key."""
        ordered = {name: sorted(entry[2] for entry in heap) for name, heap in self._heaps.items()}
        blocks = []
        before: Mapping[str, int] = Counter()
        for wanted in counts:
            blocks.append(sorted(row for name in ordered for row in ordered[name][before[name] : wanted[name]]))
            before = wanted
        return blocks

    def line(self, kept: _Kept) -> bytes:
        """Returns the line of a candidate."""
        self._spill.seek(kept.offset)
        return self._spill.read(kept.length)


def _fill(reservoir: _Reservoir, sources: Sequence[Source], spec: SampleSpec, on_progress: OnProgress | None) -> None:
    keys = _random_keys(spec.seed)
    for row in parsed_rows(sources, spec.mapping, on_progress):
        conversation = row.conversation()
        source = conversation.source
        stratum = "" if spec.by is None else source if spec.by == "source" else _stratum(row.raw, spec.by)
        reservoir.offer(stratum, next(keys), source, line_of(conversation, row.raw.where))


def _random_keys(seed: int) -> Iterator[int]:
    generator = Generator(PCG64(seed))
    while True:
        yield from generator.integers(2**64, size=_KEYS_AT_ONCE, dtype=np.uint64).tolist()


def _stratum(raw: RawRow, column: str) -> str:
    value = raw.values.get(column)
    if value is None:
        what = f"no value in column {column!r}; the row has {', '.join(raw.values)}"
        raise DataError(what, where=raw.where, remedy=f"{nearest(column, raw.values)} (--by)")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _write_sample(
    handle: BinaryIO, target: Path, blocks: Sequence[Sequence[_Kept]], reservoir: _Reservoir
) -> dict[str, Any]:
    writer = LineWriter(handle, target)
    counts: Counter[str] = Counter()
    for kept in itertools.chain.from_iterable(blocks):
        writer.write(reservoir.line(kept))
        counts[kept.source] += 1
    return {"file": target.name, "sha256": writer.close(), "counts": dict(sorted(counts.items()))}


def _manifest(spec: SampleSpec, sources: Sequence[Source], reservoir: _Reservoir) -> dict[str, Any]:
    """Returns all of the manifest but the samples. It holds no time and no machine: the same draw, the same bytes."""
    files = [file for source in sources for file in source.files]
    return {
        "seed": spec.seed,
        "sizes": list(spec.sizes),
        "by": spec.by,
        "allocation": "largest remainder" if spec.by is not None else "uniform",
        "order": "smaller samples first, then by random key: the first n rows of a uniform sample are a uniform sample",
        "split": spec.split,
        "map": dict(spec.mapping) if spec.mapping else None,
        "sources": [source.spec for source in sources],
        "files": [{"file": str(file), "sha256": file_digest(file)} for file in files],
        "rows": reservoir.rows,
        "counts": dict(sorted(reservoir.sources.items())),
        **_strata_entry(spec, reservoir.strata),
        "samples": {},
    }


def _strata_entry(spec: SampleSpec, counts: Mapping[str, int]) -> dict[str, Any]:
    """Returns the counts per stratum where they differ from those per source."""
    return {} if spec.by in (None, "source") else {"strata": dict(sorted(counts.items()))}


def _written_before(output: Path) -> list[Path]:
    """Returns the samples that the folder's manifest names."""
    try:
        sizes = list(json.loads((output / MANIFEST).read_text())["samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [path for size in sizes if (path := output / f"sample-{size}.jsonl").is_file()]


def _check_output(output: Path, targets: Sequence[Path], sources: Sequence[Source], overwrite: bool) -> None:
    for target in (*targets, output / MANIFEST):
        if target.is_dir():
            raise OutputError("is a folder, not a file", where=str(target), remedy="name another folder")
    for target in targets:
        if any(target.exists() and target.samefile(file) for source in sources for file in source.files):
            raise OutputError("is one of the sources", where=str(target), remedy="name another folder")
    there = [path.name for path in (output / MANIFEST, *sorted(output.glob("sample-*.jsonl"))) if path.exists()]
    if there and not overwrite:
        what = f"the folder holds samples already ({', '.join(there[:3])})"
        raise OutputError(what, where=str(output), remedy="give --overwrite to replace them, or name another folder")
