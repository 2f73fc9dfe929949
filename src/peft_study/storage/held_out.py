"""Token counts and base losses of a study's held-out examples: what reports need beside the journal."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from peft_study.statistics import Losses
from peft_study.storage.run_dir import RunFolder

_FILE = "examples.json"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What turns summed losses into losses a token with intervals.

    Attributes:
        counts_N, base_N: supervised tokens of each dev example, and the untouched base's summed losses of them in nats.
        test_counts_N: supervised tokens of each test example.
    """

    counts_N: npt.NDArray[np.int64]
    base_N: Losses
    test_counts_N: npt.NDArray[np.int64]


def keep(folder: RunFolder, examples: HeldOut) -> None:
    """Writes them into a study's folder with the time it began; a file of an earlier start stays."""
    if folder.read_if_there(_FILE) is not None:
        return
    values = {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "dev_tokens": examples.counts_N.tolist(),
        "dev_base": examples.base_N.tolist(),
        "test_tokens": examples.test_counts_N.tolist(),
    }
    folder.write(_FILE, values)


def kept(folder: RunFolder) -> tuple[HeldOut, datetime] | None:
    """Returns the examples of a study and when it began; None if it was killed before it wrote them."""
    values = folder.read_if_there(_FILE)
    if values is None:
        return None
    examples = HeldOut(
        np.array(values["dev_tokens"], dtype=np.int64),
        np.array(values["dev_base"], dtype=np.float64),
        np.array(values["test_tokens"], dtype=np.int64),
    )
    return examples, datetime.fromisoformat(values["began"])
