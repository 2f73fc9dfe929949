"""Slots, row budget and threads of a run: fixed once at its start, written down, and the same when it resumes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import torch

from peft_study.config import TrialSettings
from peft_study.engine.memory import MemoryProbe, measured, probe
from peft_study.errors import UserError
from peft_study.methods.registry import create, is_exclusive
from peft_study.storage.run_dir import RunFolder
from peft_study.training.fitting import check_methods
from peft_study.training.session import Session

_FILE = "capacity.json"
CPU_ROW = 512
"""Tokens a row from which a longer one costs hardly less a token: 2.03 ms against 1.90 (docs/performance.md)."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Sizes of the engine.

    Attributes:
        slots: trials side by side.
        row_tokens: tokens a row.
        threads: of torch on the CPU, in each worker.
        measured: the probe's figures in bytes; None where slots were given or there is one trial.
        workers: that share the processors of this machine or cluster.
        recomputes: whether layers are computed again in the backward pass, so that rows of this length fit.
    """

    slots: int
    row_tokens: int
    threads: int
    measured: dict[str, Any] | None = None
    workers: int = 1
    recomputes: bool = False


def settle(
    session: Session, folder: RunFolder, largest: Sequence[TrialSettings], *, trials: int, wanted: int | Literal["auto"]
) -> str | None:
    """Gives the engine its slots and row budget, and returns a line for the user, if any.

    Args:
        session: its engine has no trials yet.
        folder: of the run; sizes of an earlier start are used again.
        largest: setting of each method.
        trials: of the whole run.
        wanted: slots, or auto.
    """
    capacity = kept(folder)
    if capacity is not None:
        note = differs(capacity, wanted)
    else:
        capacity = found(session, largest, trials=trials, wanted=wanted)
        note = sentence(capacity) if trials > 1 else None
        if session.processes.writes:
            keep(folder, capacity)
    use(session, capacity)
    return note


def kept(folder: RunFolder) -> Capacity | None:
    """Returns the sizes of an earlier start of the run in this folder, or None."""
    values = folder.read_if_there(_FILE)
    return None if values is None else Capacity(**values)


def keep(folder: RunFolder, capacity: Capacity) -> None:
    """Writes the sizes into the run's folder."""
    folder.write(_FILE, asdict(capacity))


def differs(capacity: Capacity, wanted: int | Literal["auto"]) -> str | None:
    """Returns a line where the slots differ from those asked for now."""
    if wanted in ("auto", capacity.slots):
        return None
    return f"{capacity.slots} slots, as when this run began (asked for: {wanted})"


def found(
    session: Session, largest: Sequence[TrialSettings], *, trials: int, wanted: int | Literal["auto"]
) -> Capacity:
    """Returns the sizes that fit this session's engine; arguments as in `settle`."""
    fitting = [t for t in largest if _fits(session, t)]
    session.room.cut_rows([t.method for t in fitting])
    found = _measure(session, largest, fitting) if wanted == "auto" and trials > 1 else None
    slots = _enough(session, largest, trials, found) if wanted == "auto" else wanted
    figures = None if found is None else asdict(found)
    engine = session.engine
    return Capacity(slots, engine.row_tokens, torch.get_num_threads(), figures, recomputes=engine.recomputes)


def use(session: Session, capacity: Capacity) -> None:
    """Gives the engine its slots and row budget, and torch its threads."""
    session.engine.slots, session.engine.row_tokens = capacity.slots, capacity.row_tokens
    if capacity.recomputes:
        session.engine.recompute(True)
    if capacity.threads != torch.get_num_threads():
        # it decides the order of sums: with another number the last bits of a resumed run would differ
        torch.set_num_threads(capacity.threads)


def _fits(session: Session, settings: TrialSettings) -> bool:
    try:
        check_methods(session, [settings.method], settings.training.seed)
    except UserError:  # its trials will fail
        return False
    return True


def _measure(
    session: Session, largest: Sequence[TrialSettings], fitting: Sequence[TrialSettings]
) -> MemoryProbe | None:
    """Runs a row of the largest setting that fits; a slot is as large as the largest of all settings."""
    room = session.room
    slots = [room.slot(t.method) for t in largest if not is_exclusive(t.method.method)]
    if not slots:
        return None
    activations = 0
    if beside := [t for t in fitting if not is_exclusive(t.method.method)]:
        most = max(beside, key=lambda t: room.slot(t.method))
        adapter = create(most.method, session.base, session.material, most.training.seed)
        activations = probe(session.engine, adapter, session.train)
    return measured(room.free, activations, max(slots))


def _enough(session: Session, largest: Sequence[TrialSettings], trials: int, measured: MemoryProbe | None) -> int:
    """Returns as many slots as keep rows full and fit into the memory; more would only begin before others have ended.

    An accelerator wastes time on short rows: a batch ends in the middle of a row and the next one can only start in the
    next row, so two rows' worth of batches are held. On CPU a row of CPU_ROW tokens is full enough, but every method
    gets a slot, as far as a row holds them: trials of other methods do not wait for each other's losses.
    """
    lengths = [len(session.train[i]) for i in islice(range(len(session.train)), 256)]
    batch = min((t.training.batch_size for t in largest), default=1) * sum(lengths) / len(lengths)
    whole = math.ceil(session.engine.row_tokens / batch)
    if session.base.device.type == "cpu":
        filling = min(whole, max(round(CPU_ROW / batch), len(largest)))
    else:
        filling = math.ceil(2 * session.engine.row_tokens / batch)
    fits = measured.fits if measured is not None and measured.fits is not None else filling
    return max(1, min(trials, filling, fits))


def sentence(capacity: Capacity) -> str:
    """Returns the sizes in words."""
    measured = capacity.measured
    room = ""
    if measured is not None and measured["fits"] is not None:
        room = f" (the memory would hold {measured['fits']:,}: {measured['slot'] / 2**20:,.0f} MiB a slot)"
    return f"{capacity.slots} trials side by side in rows of {capacity.row_tokens:,} tokens{room}"
