"""Token counts and base losses of a study's held-out examples: what reports need beside the journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from peft_study.statistics import Losses, TokenCounts
from peft_study.storage.run_dir import RunFolder

_FILE = "examples.json"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What turns summed losses into losses a token with intervals.

    Attributes:
        counts_N, base_N: supervised tokens of each dev example, and the untouched base's summed losses of them in nats.
        test_counts_N: supervised tokens of each test example. Older folders do not tell their sources.
    """

    counts_N: TokenCounts
    base_N: Losses
    test_counts_N: TokenCounts


def keep(folder: RunFolder, examples: HeldOut) -> None:
    """Writes them into a study's folder with the time it began; a file of an earlier start stays."""
    if folder.read_if_there(_FILE) is not None:
        return
    values = {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "dev_base": examples.base_N.tolist(),
        **_written("dev", examples.counts_N),
        **_written("test", examples.test_counts_N),
    }
    folder.write(_FILE, values)


def kept(folder: RunFolder) -> tuple[HeldOut, datetime] | None:
    """Returns the examples of a study and when it began; None if it was killed before it wrote them."""
    values = folder.read_if_there(_FILE)
    if values is None:
        return None
    examples = HeldOut(_read("dev", values), np.array(values["dev_base"], dtype=np.float64), _read("test", values))
    return examples, datetime.fromisoformat(values["began"])


def _written(part: str, counts_N: TokenCounts) -> dict[str, list[int] | None]:
    sources_N = counts_N.sources_N
    return {
        f"{part}_tokens": counts_N.tokens_N.tolist(),
        f"{part}_sources": None if sources_N is None else sources_N.tolist(),
    }


def _read(part: str, values: Mapping[str, Any]) -> TokenCounts:
    tokens, sources = values[f"{part}_tokens"], values.get(f"{part}_sources")
    return TokenCounts(np.array(tokens, dtype=np.int64), None if sources is None else np.array(sources, dtype=np.int64))
