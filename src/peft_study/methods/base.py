"""What a method is to the engine: a set of parameters of its own, and up to three places where it touches the row.

    embeddings      P vectors before each segment of the trial            (prompt tuning)
    key_values      P keys and values before each segment's own, a layer  (prefix tuning)
    linear_update   what a linear layer adds on the trial's span          (LoRA)

Freezing, counting, clipping and saving follow from `parameters()`: whatever is not in it does not train.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from peft_study.model.load import Base
from peft_study.seeds import key


@dataclass(frozen=True, slots=True)
class Material:
    """What an initialisation may draw on.

    Attributes:
        encode: text to token ids, without special tokens.
        opening: token ids of training examples, drawn at random, one after another; long enough for any prefix.
        counts_V: how often each token id occurs in such examples.
        bos: id of the BOS token where training examples begin with it, else None. Virtual tokens made of a text do as
            the examples do: a BOS that these lack is worth more to some models than all that is trained.
        special: ids that are no words of the vocabulary.
    """

    encode: Callable[[str], list[int]]
    opening: Sequence[int]
    counts_V: npt.NDArray[np.int64]
    bos: int | None
    special: frozenset[int]

    def text_tokens(self, text: str | None, count: int) -> list[int]:
        """Returns `count` ids: BOS where examples begin with it, then the text, then the data; nothing is repeated."""
        ids = self.encode(text) if text else []
        opening = list(self.opening)
        if self.bos is not None:
            opening = opening[1:] if opening[:1] == [self.bos] else opening
            ids = [self.bos, *ids] if ids[:1] != [self.bos] else ids
        ids = (ids + opening)[:count]
        if len(ids) < count:
            raise ValueError(f"the training examples hold fewer than {count} tokens to start {count} virtual tokens")
        return ids


@dataclass(frozen=True, slots=True)
class LowRank:
    """One layer's update: y += scale * B A dropout(x); A is (r, in), B is (out, r), both float32."""

    A: Tensor
    B: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Size:
    """What a setting takes, from its configuration and the base's shapes alone: nothing is allocated to know it.

    Attributes:
        name: of the setting, as messages say it.
        trained: numbers that train; each is a float32.
        kept: bytes that the adapter holds beside them as long as it is there.
        row_tokens, prefix_tokens: as of an adapter.
        remedy: what makes it smaller.
    """

    name: str
    trained: int
    kept: int
    remedy: str
    row_tokens: int = 0
    prefix_tokens: int = 0


class Adapter(ABC):
    """One trial's trainable part."""

    method: ClassVar[str]
    exclusive: ClassVar[bool] = False
    """True where the method changes the base itself and can have no neighbours."""
    starts_as_base: ClassVar[bool] = True
    """True where it changes no loss before step 1, as a LoRA whose B is zero."""
    row_tokens: int = 0
    """Virtual tokens that stand in the row before each segment."""
    prefix_tokens: int = 0
    """Virtual keys before each segment; positions of the text start after them."""
    rank: int = 0
    """Columns of its linear updates: trials of like rank stand together in a row."""
    dropout: float = 0.0
    """Probability of dropping an input of a linear update."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns the method's own parameters by name: what is trained, counted, clipped and checkpointed."""

    @abstractmethod
    def save(self, folder: Path, base: Base) -> None:
        """Writes the adapter in PEFT's format (full fine-tuning: a model folder)."""

    def embeddings(self) -> Tensor | None:
        """Returns the (row_tokens, E) vectors before each segment."""
        return None

    def key_values(self) -> Tensor | None:
        """Returns the (layers, 2, G, prefix_tokens, D) keys and values before each segment's own."""
        return None

    def linear_update(self, name: str) -> LowRank | None:
        """Returns the update of the linear layer of that name, if the method adapts it."""
        return None

    def adapted_modules(self) -> tuple[str, ...]:
        """Returns the names of the linear layers that `linear_update` answers for."""
        return ()

    def attach(self) -> None:
        """Called when the trial enters the engine."""
        return None

    def after_step(self) -> None:
        """Called after each optimizer step of the trial."""
        return None

    def detach(self) -> None:
        """Called when the trial leaves: the base must be as it was."""
        return None


def seeded(seed: int, *salt: object) -> torch.Generator:
    """Returns a CPU generator that depends on the trial's seed and what it is for, and on nothing else."""
    return torch.Generator().manual_seed(key(seed, *salt))
