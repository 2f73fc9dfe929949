"""A first look at data: how many rows, how long. It reads much and tokenises little, so it takes seconds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from peft_study.data import skills
from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Conversation
from peft_study.data.formats import first_conversations, read_conversations

ROWS_READ = 100_000
"""Rows after which a survey stops reading."""
ROWS_TOKENISED = 1000
"""Rows whose length is taken: a share of one in a hundred is known to half of itself."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What a first look at a data set found.

    Attributes:
        rows: conversations read.
        whole: these are all; else there are more.
        lengths_N: tokens of some of them, drawn at random, in ascending order.
    """

    rows: int
    whole: bool
    lengths_N: npt.NDArray[np.int64]

    def within(self, tokens: int) -> float:
        """Returns the share of rows that have at most so many tokens."""
        return float((self.lengths_N <= tokens).mean())

    def quantile(self, share: float) -> int:
        """Returns the tokens that so large a share of the rows does not exceed."""
        return int(np.quantile(self.lengths_N, share, method="higher"))


def survey(
    sources: Sequence[str],
    encoder: ChatEncoder,
    *,
    split: str | None = None,
    rows_read: int = ROWS_READ,
    on_progress: Callable[[int], None] | None = None,
) -> Survey:
    """Reads the sources up to so many rows and tokenises some of them.

    The rows are drawn from all that were read: mixtures are often sorted by where their rows came from.

    Args:
        sources: files, folders, hub ids or the embedded data set.
        encoder: template and tokenizer, without a ``max_length`` of its own.
        split: the split to take of each source.
        rows_read: where to stop.
        on_progress: hears the number of rows read so far.

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


def check_heads(
    sources: Sequence[str],
    encoder: ChatEncoder,
    *,
    split: str | None = None,
    mapping: Mapping[str, str] | None = None,
) -> None:
    """Reads and encodes the first row of every file, so that a mistake is told before anything that takes minutes.

    Raises:
        DataError: a source is not there, holds no rows, or one of those rows cannot be used.
        TemplateError: the template refuses one of them.
    """
    for conversation in first_conversations([s for s in sources if s != skills.EMBEDDED_NAME], split, mapping):
        encoder.encode_whole(conversation)


def _conversations(source: str, split: str | None) -> Iterator[Conversation]:
    if source == skills.EMBEDDED_NAME:
        yield from skills.generate()
    else:
        yield from read_conversations([source], split=split)
