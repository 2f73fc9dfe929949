"""Slots, row budget and threads of a run: settled once at its start, written down, and the same when it goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import torch

from peft_study.config import MethodConfig, TrainingConfig
from peft_study.engine.memory import Measured, probe
from peft_study.methods.registry import create, is_exclusive
from peft_study.study.session import Session
from peft_study.study.store import RunFolder

_FILE = "capacity.json"


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the engine works with.

    Attributes:
        slots: trials side by side.
        row_tokens: tokens a row.
        threads: of torch on the CPU.
        measured: the probe's figures in bytes; None where slots were given or there is one trial.
    """

    slots: int
    row_tokens: int
    threads: int
    measured: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Typical:
    """The largest setting of a method that trains beside others, and its optimizer's: what slots are measured with."""

    method: MethodConfig
    training: TrainingConfig


def settle(
    session: Session, folder: RunFolder, largest: Sequence[Typical], *, trials: int, wanted: int | Literal["auto"]
) -> str | None:
    """Gives the engine its slots and row budget, and returns a line for the user where there is news.

    Args:
        session: its engine has no trials yet.
        folder: of the run; what an earlier start settled is used again.
        largest: of each method.
        trials: of the whole run.
        wanted: slots, or auto.
    """
    engine = session.engine
    before = folder.read_if_there(_FILE)
    if before is not None:
        capacity, note = Capacity(**before), None
        if wanted not in ("auto", capacity.slots):
            note = f"{capacity.slots} slots, as when this run began (asked for: {wanted})"
    else:
        measured = _measure(session, largest) if wanted == "auto" and trials > 1 else None
        slots = _enough(session, largest, trials, measured) if wanted == "auto" else wanted
        capacity = Capacity(
            slots, engine.row_tokens, torch.get_num_threads(), None if measured is None else asdict(measured)
        )
        note = _sentence(capacity) if trials > 1 else None
        if session.processes.writes:
            folder.write(_FILE, asdict(capacity))
    engine.slots, engine.row_tokens = capacity.slots, capacity.row_tokens
    if capacity.threads != torch.get_num_threads():
        # sums over threads are cut differently: with another number the last bits of a resumed run would differ
        torch.set_num_threads(capacity.threads)
    return note


def _measure(session: Session, largest: Sequence[Typical]) -> Measured | None:
    side_by_side = [t for t in largest if not is_exclusive(t.method.method)]
    if not side_by_side:
        return None
    adapters = [create(t.method, session.base, session.material, t.training.seed) for t in side_by_side]
    return probe(session.engine, adapters, session.train)


def _enough(session: Session, largest: Sequence[Typical], trials: int, measured: Measured | None) -> int:
    """Returns the slots that keep rows full, as far as they fit: more of them would only wait for each other.

    On an accelerator a short row is a waste: a batch ends in the middle of a row and the next one can only begin in the
    next row, so two rows' worth of batches are held. On CPU a short row costs no more a token, and more slots mean
    thinner products: 16 trials of 128 tokens in rows of 1,024 took 40 % longer a token than 8 (docs/performance.md).
    """
    lengths = [len(session.train[i]) for i in islice(range(len(session.train)), 256)]
    batch = min((t.training.batch_size for t in largest), default=1) * sum(lengths) / len(lengths)
    rows = 1 if session.base.device.type == "cpu" else 2
    filling = math.ceil(rows * session.engine.row_tokens / batch)
    fits = measured.fits if measured is not None and measured.fits is not None else filling
    return max(1, min(trials, filling, fits))


def _sentence(capacity: Capacity) -> str:
    measured = capacity.measured
    room = ""
    if measured is not None and measured["fits"] is not None:
        room = f" (the memory would hold {measured['fits']:,}: {measured['slot'] / 2**20:,.0f} MiB a slot)"
    return f"{capacity.slots} trials side by side in rows of {capacity.row_tokens:,} tokens{room}"
