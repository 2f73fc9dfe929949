"""Chosen rows of tokenised data, what they say, and random draws that keep the proportions of their sources."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peft_study.data.conversation import Example
from peft_study.data.tokens import TokenizedData
from peft_study.statistics import TokenCounts

Place = tuple[TokenizedData, int]
"""Data, and a row of it."""
Stratum = tuple[str, str]
"""A source as configured, and the source that its row itself names."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Chosen rows of several tokenised sources, as one sequence of examples."""

    places: tuple[Place, ...]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        data, row = self.places[index]
        return data[row]

    def lengths(self) -> npt.NDArray[np.int64]:
        """Returns the tokens of each row."""
        return np.array([int(data.lengths_N[row]) for data, row in self.places], dtype=np.int64)

    def counts(self) -> TokenCounts:
        """Returns the supervised tokens of each row, and which rows name the same source."""
        numbers: dict[str, int] = {}
        sources = [numbers.setdefault(data.sources[row], len(numbers)) for data, row in self.places]
        tokens = [int(data.supervised_N[row]) for data, row in self.places]
        return TokenCounts(np.array(tokens, dtype=np.int64), np.array(sources, dtype=np.int64))

    def digest(self) -> str:
        """Returns a digest of what the rows say, in their order: the same where another version has read them."""
        digests = {data.key: data.digests for data in {data.key: data for data, _ in self.places}.values()}
        total = hashlib.sha256()
        for data, row in self.places:
            total.update(digests[data.key][row])
        return total.hexdigest()

    def fingerprint(self) -> str:
        """Returns a digest of the rows' tokens, by where they lie: of other code, template or file it is another."""
        digest = hashlib.sha256()
        for data, row in self.places:
            digest.update(f"{data.key}:{row}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Pool:
    """Rows to draw from.

    Attributes:
        places: the rows.
        strata: where each comes from.
        digests: what each says; rows that say the same have the same.
    """

    places: list[Place]
    strata: list[Stratum]
    digests: list[bytes]

    @classmethod
    def of(cls, path: str, data: TokenizedData, rows: Iterable[int]) -> Pool:
        """Returns these rows of a configured source."""
        digests, sources, chosen = data.digests, data.sources, list(rows)
        strata = {source: (path, source) for source in set(sources)}  # one object for all rows of a source
        return cls(
            [(data, row) for row in chosen],
            [strata[sources[row]] for row in chosen],
            [digests[row] for row in chosen],
        )

    def __len__(self) -> int:
        return len(self.places)

    def __add__(self, other: Pool) -> Pool:
        return Pool(self.places + other.places, self.strata + other.strata, self.digests + other.digests)

    def rows(self) -> Rows:
        """Returns the rows as examples."""
        return Rows(tuple(self.places))

    def pick(self, indices: Iterable[int]) -> Pool:
        """Returns some of the rows, in the order of `indices`."""
        chosen = list(indices)
        return Pool(
            [self.places[i] for i in chosen], [self.strata[i] for i in chosen], [self.digests[i] for i in chosen]
        )

    def apart_from(self, other: Pool) -> Pool:
        """Returns the rows that equal no row of `other`, neither in digest nor in tokens."""
        said = set(other.digests)
        tokens = {_tokens(place) for place in other.places}
        # rows are read from disk only where the length is that of a row of the other
        lengths = {_length(place) for place in other.places}
        return self.pick(
            i
            for i, (place, digest) in enumerate(zip(self.places, self.digests, strict=True))
            if digest not in said and (_length(place) not in lengths or _tokens(place) not in tokens)
        )

    def distinct(self) -> Pool:
        """Returns the rows without copies of earlier ones."""
        digests, tokens, kept = set[bytes](), set[bytes](), []
        for i, (place, digest) in enumerate(zip(self.places, self.digests, strict=True)):
            said = _tokens(place)
            if digest not in digests and said not in tokens:
                kept.append(i)
            digests.add(digest)
            tokens.add(said)
        return self.pick(kept)

    def grouped(self, stratify: bool) -> Pool:
        """Returns the rows with the strata to draw from: a single one, or one per source.

        Sources with a single text form one stratum, since a text cannot be on both sides of a split. So rows are drawn
        in proportion and at random even if each has a source of its own (a web address, for example).
        """
        if not stratify:
            return Pool(self.places, [("", "")] * len(self), self.digests)
        texts = Counter(stratum for stratum, _ in set(zip(self.strata, self.digests, strict=True)))
        strata = [stratum if texts[stratum] > 1 else (stratum[0], "") for stratum in self.strata]
        return Pool(self.places, strata, self.digests)

    def draw(self, count: int, shares: Mapping[Stratum, int], order: Sequence[int]) -> Pool:
        """Returns `count` of the rows, of each stratum in proportion to its share.

        The next row always comes from the stratum that is furthest below its share: largest-remainder rounding, unless
        a stratum runs out. A stratum of one text comes last, since it would vanish from the rows that are left.

        Args:
            count: at most the rows there are.
            shares: rows of each stratum in the data that the draw represents.
            order: the rows, shuffled: each stratum's are taken in this order. It also decides between equal strata.
        """
        queues: dict[Stratum, deque[int]] = {}
        for i in order:
            queues.setdefault(self.strata[i], deque()).append(i)
        given, taken, total = Counter[Stratum](), list[int](), sum(shares.values())
        texts = Counter(stratum for stratum, _ in set(zip(self.strata, self.digests, strict=True)))
        heap = [(texts[s] == 1, -count * shares[s], number, s) for number, s in enumerate(queues)]
        heapq.heapify(heap)
        while heap and len(taken) < count:
            single, _, number, stratum = heap[0]
            if not queues[stratum]:
                heapq.heappop(heap)
                continue
            taken.append(queues[stratum].popleft())
            given[stratum] += 1
            below = given[stratum] * total - count * shares[stratum]
            heapq.heapreplace(heap, (single, below, number, stratum))
        return self.pick(sorted(taken))


def _tokens(place: Place) -> bytes:
    data, row = place
    return data[row].tokens_L.tobytes()


def _length(place: Place) -> int:
    data, row = place
    return int(data.lengths_N[row])
