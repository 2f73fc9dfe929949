"""What every skill is made of: a stable source of random draws, the house format, and the skill itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

ANSWER = "Answer:"


class Draws:
    """Random draws that are the same on every platform and Python version.

    Only ``random.Random.random`` is promised to stay as it is for a given integer seed; ``choice``, ``shuffle``
    and ``randrange`` are not, so they are made from it here.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def between(self, low: int, high: int) -> int:
        """Returns a whole number from ``low`` to ``high``, both included."""
        return low + int(self._random() * (high - low + 1))

    def choice(self, items: Sequence[T]) -> T:
        """Returns one of ``items``."""
        return items[self.between(0, len(items) - 1)]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Returns ``count`` of ``items``, none twice, in random order."""
        pool = list(items)
        return [pool.pop(self.between(0, len(pool) - 1)) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Task:
    """One instruction with its answer in the house format: a line of reasoning, then ``Answer: ...``."""

    question: str
    reason: str
    result: str

    @property
    def answer(self) -> str:
        """The assistant's turn."""
        return f"{self.reason}\n{ANSWER} {self.result}"


@dataclass(frozen=True, slots=True)
class Skill:
    """A kind of instruction, each with one right answer.

    Attributes:
        name: the last part of the source, ``skills/<name>``.
        make: draws an instruction and its answer.
    """

    name: str
    make: Callable[[Draws], Task]
