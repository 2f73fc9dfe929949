"""The parts of the data: training rows, held-out rows that a search decides on, and test rows that are opened once.

    configured sources, without what a held-out or test file says
          │ drawn: held-out rows
          │   the rest, without what they say
          │ drawn: test rows
          ▼   the rest, without what they say
    training rows

Rows that say the same (equal digests, or equal tokens) are never in two parts; one part may have both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peft_study.config import DataConfig, SourceConfig
from peft_study.data import skills
from peft_study.data.chat import ChatEncoder
from peft_study.data.dataset import Pool, Rows
from peft_study.data.sources import open_sources
from peft_study.data.stream import OnProgress, check_heads
from peft_study.data.tokens import TokenizedData, tokenize
from peft_study.errors import ConfigError, UserError
from peft_study.seeds import key
from peft_study.storage.cache_dir import cache_root

HELD_OUT_ROWS = 64
"""Held-out rows by default, at most a tenth of the data; a study has as many test rows."""


@dataclass(frozen=True, slots=True)
class Split:
    """The parts of the data; no two of them share a text.

    Attributes:
        train: rows to train on.
        held_out: rows that settings are chosen by.
        test: rows that the chosen settings are measured on; None if not asked for.
        available: training rows there would be without ``data.limit``.
        notes: lines the user should see once.
    """

    train: Rows
    held_out: Rows
    test: Rows | None
    available: int
    notes: tuple[str, ...]


def make_split(
    data: DataConfig, encoder: ChatEncoder, seed: int, *, test: bool = False, on_progress: OnProgress | None = None
) -> Split:
    """Tokenises the data and divides it. Asking for test rows does not change the held-out rows.

    Args:
        data: sources, and what is held out of them.
        encoder: makes the tokens.
        seed: of all draws.
        test: whether there are test rows.
        on_progress: as `OnProgress`, of what is tokenised.

    Raises:
        UserError: a source cannot be read.
        ConfigError: a part would be empty, or more rows are asked for than there are.
    """
    reader = _Reader(data, encoder, test, on_progress)
    notes = reader.notes
    pool, limited = _training_rows(reader, seed)
    held_out, opened = _files(reader, seed, test=test)
    rest = _beside_files(pool, data, held_out, opened).grouped(data.stratify)
    shares = Counter(rest.strata)
    first, second = _counts(data, len(rest), held_out=held_out is None, test=test and opened is None)
    if held_out is None:
        held_out, rest = _draw(rest, first, shares, key(seed, "held out"))
    if test and opened is None:
        if len(rest) <= second:
            raise ConfigError(
                f"{second} rows leave nothing to train on: only {len(rest)} rows say what no held-out row says",
                where=_deciding(data, second),
                remedy="hold out fewer",
            )
        opened, rest = _draw(rest, second, shares, key(seed, "test"))
    if not len(rest):
        raise ConfigError("no training rows are left beside the held-out ones", where="data", remedy="hold out fewer")
    if left_out := len(pool) - first - second - len(rest):
        kind = "held-out or test" if test else "held-out"
        notes.append(f"{left_out} training rows equal a {kind} row and were left out")
    parts = rest.rows(), held_out.rows(), None if opened is None else opened.rows()
    return Split(*parts, len(rest) + limited, tuple(notes))


def check_files(data: DataConfig, encoder: ChatEncoder, *, test: bool) -> None:
    """Reads the first row of every file of the data, as `make_split` will.

    Raises:
        UserError: a file is not there, or that row cannot be used.
    """
    check_heads([source.path for source in data.train], encoder, split=data.split, mapping=data.mapping)
    for field in ("held_out", "test") if test else ("held_out",):
        if isinstance(path := getattr(data, field), str):
            try:
                check_heads([path], encoder, split=data.split, mapping=data.mapping)
            except UserError as error:
                raise _in_file(error, field, path) from error


class _Reader:
    """Tokenises the files of the data one after the other.

    Attributes:
        data: as configured.
        notes: lines for the user so far.
    """

    def __init__(self, data: DataConfig, encoder: ChatEncoder, test: bool, on_progress: OnProgress | None) -> None:
        self.data, self._encoder, self._on_progress = data, encoder, on_progress
        self.notes: list[str] = []
        paths = [source.path for source in data.train]
        paths += [path for path in (data.held_out, data.test if test else None) if isinstance(path, str)]
        # without a listener no size is looked up
        self._sizes = {path: _size(path, data.split) for path in paths} if on_progress is not None else {}
        self._rows, self._read = 0, 0

    def tokens(self, path: str) -> TokenizedData:
        """Returns the tokens of a file."""
        data, file = self.data, path
        if path == skills.EMBEDDED_NAME:
            # written each time: it is quick, and a file of an older version must not be used
            written = cache_root() / "data" / f"{skills.EMBEDDED_NAME}.jsonl"
            skills.write(written)
            file = str(written)
        found = tokenize(
            [file],
            self._encoder,
            split=data.split,
            mapping=data.mapping,
            workers=data.workers,
            on_progress=lambda rows, share: self._tell(path, rows, share),
        )
        self._rows, self._read = self._rows + len(found) + found.dropped, self._read + self._sizes.get(path, 0)
        return found

    def _tell(self, path: str, rows: int, share: float) -> None:
        if self._on_progress is not None:
            done = self._read + share * self._sizes[path]
            self._on_progress(self._rows + rows, done / sum(self._sizes.values()))


def _size(path: str, split: str | None) -> int:
    """Returns the bytes of a source, at least 1."""
    if path == skills.EMBEDDED_NAME:
        return 1
    return max(1, sum(source.size for source in open_sources([path], split)))


def _training_rows(reader: _Reader, seed: int) -> tuple[Pool, int]:
    """Returns the rows of all sources that are used, and how many ``data.limit`` leaves out."""
    pool, data = Pool([], [], []), reader.data
    for source in data.train:
        tokens = reader.tokens(source.path)
        pool += Pool.of(source.path, tokens, _taken(source, len(tokens), seed))
    whole = len(pool)
    if data.limit is not None and data.limit < whole:
        pool = pool.pick(sorted(_shuffled(whole, key(seed, "limit"))[: data.limit]))
    return pool, whole - len(pool)


def _files(reader: _Reader, seed: int, *, test: bool) -> tuple[Pool | None, Pool | None]:
    """Returns the held-out and the test rows that come from files, with no text in common."""
    data, notes = reader.data, reader.notes
    held_out = opened = None
    if isinstance(data.held_out, str):
        held_out = _file("held_out", data.held_out, reader)
    if test and isinstance(data.test, str):
        opened = _file("test", data.test, reader)
    if held_out is None or not test:
        return held_out, opened
    if data.test is None:
        return _halves(str(data.held_out), held_out, data.stratify, seed, notes)
    if opened is None:
        return held_out, None
    apart = opened.apart_from(held_out)
    if not len(apart):
        raise ConfigError(
            f"every row of {data.test} is also in {data.held_out}",
            where="data.test",
            remedy="give a file of other rows, or leave it out to divide the one of held_out",
        )
    if len(apart) < len(opened):
        notes.append(f"{data.test}: {len(opened) - len(apart)} test rows equal a held-out row and were left out")
    return held_out, apart


def _halves(path: str, pool: Pool, stratify: bool, seed: int, notes: list[str]) -> tuple[Pool, Pool]:
    """Divides the rows of a file. Copies of a row are left out: on both sides they leak, on one they add nothing."""
    distinct = pool.distinct()
    if len(distinct) < 2:
        raise ConfigError(
            f"{path} says one thing only, and cannot be divided into held-out and test rows",
            where="data.held_out",
            remedy="give more rows, or a `test` of its own",
        )
    if len(distinct) < len(pool):
        notes.append(f"{path}: {len(pool) - len(distinct)} rows equal another row of it and were left out")
    grouped = distinct.grouped(stratify)
    half = len(grouped) - len(grouped) // 2
    return _draw(grouped, half, Counter(grouped.strata), key(seed, "halves"))


def _beside_files(pool: Pool, data: DataConfig, *parts: Pool | None) -> Pool:
    """Returns the training rows that equal no row of the held-out and test files."""
    for part in parts:
        pool = pool if part is None else pool.apart_from(part)
    if not len(pool):
        files = {field: path for field in ("held_out", "test") if isinstance(path := getattr(data, field), str)}
        raise ConfigError(
            f"every row of {', '.join(source.path for source in data.train)} is also in {' or '.join(files.values())}",
            where=" and ".join(f"data.{field}" for field in files),
            remedy="give a file of other rows, or a number of rows to draw",
        )
    return pool


def _draw(pool: Pool, count: int, shares: Counter[tuple[str, str]], seed: int) -> tuple[Pool, Pool]:
    """Returns drawn rows, and the others that say something else."""
    drawn = pool.draw(count, shares, _shuffled(len(pool), seed))
    return drawn, pool.apart_from(drawn)


def _shuffled(count: int, seed: int) -> list[int]:
    order: list[int] = np.random.default_rng(seed).permutation(count).tolist()
    return order


def _file(field: str, path: str, reader: _Reader) -> Pool:
    try:
        tokens = reader.tokens(path)
    except UserError as error:
        raise _in_file(error, field, path) from error
    return Pool.of(path, tokens, range(len(tokens)))


def _in_file(error: UserError, field: str, path: str) -> UserError:
    """Returns an error of a held-out or test file with the setting that names it."""
    return (error if path in (error.where or "") else error.within(path)).within(f"data.{field}")


def _taken(source: SourceConfig, available: int, seed: int) -> Sequence[int]:
    """Returns which rows of a source are used: all, a random share, or a random number of them."""
    count = round(source.take * available) if source.take <= 1 else int(source.take)
    if count > available:
        raise ConfigError(f"asks for {count} rows but there are {available}", where=source.path, remedy="ask for fewer")
    if count == 0:
        raise ConfigError(
            f"a share of {source.take} of {available} rows is none", where=source.path, remedy="take a larger share"
        )
    if count == available:
        return range(available)
    return sorted(_shuffled(available, key(seed, "take", source.path))[:count])


def _counts(data: DataConfig, available: int, *, held_out: bool, test: bool) -> tuple[int, int]:
    """Returns how many held-out and test rows to draw; 0 for a part that is not drawn."""
    first = _count("held_out", data.held_out, available) if held_out else 0
    second = 0
    if test:
        second = first if data.test is None else _count("test", data.test, available)
    if first + second >= available:
        what = f"{first} rows and {second} for the test" if first and second else f"{first + second} rows"
        raise ConfigError(
            f"{what} would be held out, but there are {available}",
            where=_deciding(data, second),
            remedy="hold out fewer",
        )
    return first, second


def _count(field: str, wanted: float | str | None, available: int) -> int:
    assert not isinstance(wanted, str), "a file is not drawn from"
    if wanted is None:
        count = min(HELD_OUT_ROWS, available // 10)
    else:
        count = round(wanted * available) if wanted < 1 else int(wanted)
    if count == 0:
        raise ConfigError(
            f"of {available} rows none would be held out",
            where=f"data.{field}",
            remedy="give a number of rows, or a file",
        )
    return count


def _deciding(data: DataConfig, test_rows: int) -> str:
    """Returns the setting to change if too many rows are drawn."""
    return "data.test" if test_rows and data.test is not None else "data.held_out"
