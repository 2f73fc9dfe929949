"""Conversations of sources as a stream: all of them, the first of each file, or a quick survey."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import numpy.typing as npt

from peft_study.data import skills
from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Conversation
from peft_study.data.formats import Format, detect_format, to_conversation
from peft_study.data.readers import RawRow, read_file
from peft_study.data.sources import Source, open_sources
from peft_study.errors import DataError

OnProgress = Callable[[int, float], None]
"""Called now and then with the number of rows read and the share (0..1) of all sources read so far."""

ROWS_READ = 100_000
"""Rows after which a survey stops reading."""
ROWS_TOKENISED = 1000
"""Rows whose length is taken: enough to know a share of 1% to within half of it."""


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """A raw row, and its conversation or the reason why it has none."""

    raw: RawRow
    parsed: Conversation | DataError

    def conversation(self) -> Conversation:
        """Returns the conversation; raises `DataError` if the row cannot be used."""
        if isinstance(self.parsed, DataError):
            raise self.parsed
        return self.parsed


def parsed_rows(
    sources: Sequence[Source], mapping: Mapping[str, str] | None = None, on_progress: OnProgress | None = None
) -> Iterator[ParsedRow]:
    """Yields every row of the sources in order, unusable ones with their error.

    A row whose format differs from the first usable one of its source is unusable, since a mixture of columns is
    mostly an accident. Raises `DataError` if a file as a whole cannot be read.
    """
    total = max(sum(source.size for source in sources), 1)
    rows = before = current = 0  # `before` and `current`: bytes of the sources already read, and of the present one
    share = 0.0

    def tick(of_source: float) -> None:
        nonlocal share
        share = (before + of_source * current) / total

    for source in sources:
        current = source.size
        first: tuple[Format, str] | None = None
        for number, raw in enumerate(source.rows(tick), start=1):
            parsed: Conversation | DataError
            form = None if raw.broken else detect_format(raw.values, mapping)
            try:
                if raw.broken:
                    raise raw.broken
                if first and form and form is not first[0]:
                    what = f"this row is {form.value}, but {first[1]} is {first[0].value}: one source mixes formats"
                    remedy = "keep one format in a file and give the files as several sources"
                    raise DataError(what, where=raw.where, remedy=remedy)
                row_id = f"{source.name}-{number}"
                parsed = to_conversation(
                    raw.values, row_id=row_id, default_source=source.name, where=raw.where, mapping=mapping
                )
                assert form is not None
                first = first or (form, raw.where)
            except DataError as error:
                parsed = error
            yield ParsedRow(raw, parsed)
            rows += 1
            if on_progress is not None and rows % 256 == 0:
                on_progress(rows, share)
        before += source.size
        if on_progress is not None:
            on_progress(rows, share)


def read_conversations(
    sources: Sequence[str],
    *,
    split: str | None = None,
    mapping: Mapping[str, str] | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[Conversation]:
    """Yields the conversations of files, folders or hub ids, in order; stops at the first unusable row.

    Reports its progress as `OnProgress`.

    Raises:
        DataError: a source or a row cannot be used (what, file and row, remedy).
    """
    for row in parsed_rows(open_sources(sources, split), mapping, on_progress):
        yield row.conversation()


def check_heads(
    sources: Sequence[str],
    encoder: ChatEncoder,
    *,
    split: str | None = None,
    mapping: Mapping[str, str] | None = None,
) -> None:
    """Reads and encodes the first row of every file, so that a mistake shows before anything that takes minutes.

    Data on the hub is only looked up.

    Raises:
        DataError: a source is missing, has no rows, or one of those rows cannot be used.
        TemplateError: the template refuses one of them.
    """
    for source in open_sources([s for s in sources if s != skills.EMBEDDED_NAME], split):
        heads = [raw for file in source.files for raw in islice(read_file(file, _unheard), 1)]
        # one shard may be empty; if all are, `rows` raises the error
        for raw in heads or (source.rows(_unheard) if source.files else ()):
            if raw.broken:
                raise raw.broken
            encoder.encode_whole(
                to_conversation(
                    raw.values, row_id=raw.where, default_source=source.name, where=raw.where, mapping=mapping
                )
            )


def _unheard(_share: float) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Survey:
    """What a survey of a data set found.

    Attributes:
        rows: conversations read.
        whole: whether these are all.
        lengths_N: tokens of some of them, drawn at random, in ascending order.
    """

    rows: int
    whole: bool
    lengths_N: npt.NDArray[np.int64]

    def within(self, tokens: int) -> float:
        """Returns the share of rows that have at most this many tokens."""
        return float((self.lengths_N <= tokens).mean())

    def quantile(self, share: float) -> int:
        """Returns the length in tokens that this share of the rows does not exceed."""
        return int(np.quantile(self.lengths_N, share, method="higher"))


def survey(
    sources: Sequence[str],
    encoder: ChatEncoder,
    *,
    split: str | None = None,
    rows_read: int = ROWS_READ,
    on_progress: Callable[[int], None] | None = None,
) -> Survey:
    """Reads up to ``rows_read`` rows of the sources and tokenises some of them.

    The tokenised rows are drawn from all rows read, since mixtures are often sorted by source.

    Args:
        sources: files, folders, hub ids or the embedded data set.
        encoder: template and tokenizer, without a ``max_length`` of its own.
        split: the split to take of each source.
        rows_read: where to stop.
        on_progress: receives the number of rows read so far.

    Raises:
        DataError: a source or row cannot be used.
        TemplateError: the template refuses a row.
    """
    assert encoder.max_length is None, "lengths are those of whole examples"
    drawn: list[Conversation] = []
    chance = random.Random(0)
    rows, whole = 0, True
    for conversation in chain.from_iterable(_conversations(source, split) for source in sources):
        if rows == rows_read:
            whole = False
            break
        rows += 1
        # reservoir sampling: of the rows so far, each is among the drawn ones with the same probability
        if len(drawn) < ROWS_TOKENISED:
            drawn.append(conversation)
        elif (place := chance.randrange(rows)) < ROWS_TOKENISED:
            drawn[place] = conversation
        if on_progress is not None and rows % 256 == 0:
            on_progress(rows)
    lengths = sorted(len(encoder.encode_whole(conversation)) for conversation in drawn)
    return Survey(rows, whole, np.array(lengths, dtype=np.int64))


def _conversations(source: str, split: str | None) -> Iterator[Conversation]:
    if source == skills.EMBEDDED_NAME:
        yield from skills.generate()
    else:
        yield from read_conversations([source], split=split)
