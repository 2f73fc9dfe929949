"""What each method of a study costs, as it was measured at the study's end (``cost.json``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from peft_study.errors import OutputError
from peft_study.storage.run_dir import RunFolder

COST_FILE = "cost.json"


@dataclass(frozen=True, slots=True)
class MethodCost:
    """What the best setting of a method costs.

    Attributes:
        setting: its name.
        trainable: numbers that train.
        adapter_bytes: of its weights on disk (of `full` the model's); None where they were not kept.
        peak_bytes: memory that a trial needs beside the base: what it keeps in its slot, and the peak of a full row
            of it alone; None where it could not be measured.
        tokens_per_second: data tokens, forward, backward and optimizer step, alone on the study's device, on the same
            training rows for every method.
        row_tokens: of the row that was timed, virtual ones in it included.
        data_tokens: of that row.
    """

    setting: str
    trainable: int
    adapter_bytes: int | None
    peak_bytes: int | None
    tokens_per_second: float
    row_tokens: int
    data_tokens: int


def costs(folder: Path) -> dict[str, MethodCost]:
    """Returns what each method of a study costs; empty where it was not measured.

    Raises:
        OutputError: when the file is damaged.
    """
    values = RunFolder(folder).read_if_there(COST_FILE)
    try:
        return {method: MethodCost(**cost) for method, cost in (values or {}).items()}
    except (AttributeError, TypeError) as error:
        raise OutputError(
            f"{COST_FILE} is damaged", where=str(folder), remedy="delete it; the command of the study makes it again"
        ) from error


def write_costs(folder: Path, costs: Mapping[str, MethodCost]) -> None:
    """Writes what each method of a study costs into its folder."""
    RunFolder(folder).write(COST_FILE, {method: asdict(cost) for method, cost in costs.items()})
