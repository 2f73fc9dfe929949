"""The grids that `search.py` searches, on which model and data, and what was measured of every cell.

learning rate   7 or 8, over the method's default range
rank or tokens  LoRA: 4, 16, 64, at a fixed alpha; prefix tuning: 10, 40; prompt tuning: 8, 32
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import SHARED, read_rows
from worlds import save_tiny

from peft_study.config import StudyConfig, validate
from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Example
from peft_study.data.split import Split, make_split
from peft_study.engine.order import DataOrder
from peft_study.model.load import load_tokenizer

Losses = npt.NDArray[np.float64]
DATA = {
    # word problems of 90 tokens: short enough for 24 whole trials, and the answers' form is learned in few steps
    "mawps": SHARED / "data" / "llm-adapters" / "mawps_train.jsonl.gz",
    # those of at most SHORT characters, of 110 tokens
    "gsm8k": SHARED / "data" / "gsm8k" / "train.jsonl.gz",
}
SHORT = 300
OTHERS = ("rank", "tokens")
"""Second dimensions of the grids."""
GOOD = 0.02
"""Share by which a good cell's test loss may be above the least: 1 % is within the noise of 64 rows."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is.

    Attributes:
        method: that is searched.
        rates: of the grid.
        other, values: its second dimension.
        steps: optimizer steps of a trial, and
        batch_size: examples of each.
        dev, test: rows of the parts.
        max_length: tokens an example.
        timed_steps: optimizer steps of a run whose time alone is of interest.
    """

    method: str
    rates: tuple[float, ...]
    other: str
    values: tuple[int, ...]
    steps: int = 36
    batch_size: int = 4
    dev: int = 32
    test: int = 64
    max_length: int = 256
    timed_steps: int = 3


def _rates(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(float(f"{rate:.2g}") for rate in np.geomspace(low, high, count))


FULL = {
    "lora": Scale("lora", _rates(1e-5, 1e-2, 8), "rank", (4, 16, 64)),
    "prefix_tuning": Scale("prefix_tuning", _rates(3e-4, 0.3, 7), "tokens", (10, 40)),
    "prompt_tuning": Scale("prompt_tuning", _rates(1e-3, 3.0, 8), "tokens", (8, 32)),
}
TINY = Scale("lora", (1e-4, 1e-2), "rank", (4, 8), steps=9, batch_size=2, dev=6, test=8, max_length=64, timed_steps=3)


def data_of(name: str, work: Path) -> str:
    """Returns the path of a data set of DATA, or ``skills`` where it is not there.

    Of GSM8K it is a file of its short rows, which is written.
    """
    path = DATA[name]
    if not path.exists():
        return "skills"
    if name != "gsm8k":
        return str(path)
    short = work / "gsm8k_short.jsonl"
    rows = gzip.decompress(path.read_bytes()).decode().strip().split("\n")
    kept = [row for row in rows if sum(len(m["content"]) for m in json.loads(row)["messages"]) <= SHORT]
    short.write_text("\n".join(kept) + "\n")
    return str(short)


def study_values(model: str, data: str, scale: Scale, work: Path, device: str = "auto") -> dict[str, Any]:
    """Returns the study file of the grid as plain values, without its output folder.

    Nothing is written or computed beside the trials that a TRL run would not do: no event files, no base losses.
    """
    name = str(save_tiny(work / "tiny-model")) if model == "tiny" else model
    return {
        "model": {"name": name, "device": device},
        "data": {
            "train": "skills" if model == "tiny" else data_of(data, work),
            "held_out": scale.dev,
            "test": scale.test,
            "max_length": scale.max_length,
            "workers": 1,
        },
        "methods": {scale.method: {"learning_rate": list(scale.rates), scale.other: list(scale.values)}},
        "training": {"batch_size": scale.batch_size},
        "budget": {"steps": scale.steps},
        "search": {"sampler": "grid"},
        "finals": {"best": 0},
        "logging": {"tensorboard": False, "base_loss": False},
    }


def config_of(values: Mapping[str, Any], output: Path, seed: int = 0, **search: Any) -> StudyConfig:
    """Returns the filled study with an output folder, a search seed and other settings of the search."""
    whole = {**values, "output": str(output), "search": {**values["search"], "seed": seed, **search}}
    return validate(StudyConfig, whole, where="benchmarks/search.py").filled()


def cell_of(values: Mapping[str, Any]) -> str:
    """Returns the name of a grid cell, from a trial's values or a row."""
    other = next(name for name in OTHERS if name in values)
    return f"rate {values['learning_rate']:g}, {other} {values[other]}"


def split_of(config: StudyConfig) -> Split:
    """Returns the parts of the data, as the study divides them."""
    data = config.data
    encoder = ChatEncoder(
        load_tokenizer(config.model.name), template=data.chat_template, max_length=data.max_length, add_bos=data.add_bos
    )
    return make_split(data, encoder, config.training.data_seed, test=True)


def training_batches(split: Split, config: StudyConfig, steps: int) -> list[list[Example]]:
    """Returns the first batches of a trial."""
    order = DataOrder(len(split.train), config.training.batch_size, config.training.data_seed)
    return [[split.train[i] for i in order.batch(step)] for step in range(steps)]


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting of the grid, trained to its end.

    Attributes:
        values: learning rate, and rank or tokens.
        status: finished, diverged or failed.
        steps: optimizer steps it took.
        sums: losses of each dev example in nats, by step; none after a divergence.
        test: loss a supervised token of the test part; infinite where the trial did not finish.
    """

    values: dict[str, Any]
    status: str
    steps: int
    sums: dict[int, Losses]
    test: float

    @property
    def name(self) -> str:
        """Of the cell."""
        return cell_of(self.values)

    def loss(self, step: int) -> float:
        """Returns the summed dev loss at a step; infinite where there is none."""
        return float(self.sums[step].sum()) if step in self.sums else float("inf")


@dataclass(frozen=True, slots=True)
class Curves:
    """What was measured once and is replayed.

    Attributes:
        values: the study file.
        rungs: steps of the dev losses before the end.
        steps: of a trial.
        counts_N: supervised tokens of each dev example.
        start_N: the untouched base's dev losses.
        dev_tokens: of all dev examples.
        batches: lengths of the examples of every batch.
        slots, row_tokens: of the engine.
        cells: by name.
        speeds: seconds, by system.
    """

    values: dict[str, Any]
    rungs: tuple[int, ...]
    steps: int
    counts_N: npt.NDArray[np.int64]
    start_N: Losses
    dev_tokens: int
    batches: tuple[tuple[int, ...], ...]
    slots: int
    row_tokens: int
    cells: dict[str, Cell]
    speeds: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Data tokens of a whole trial."""
        return sum(map(sum, self.batches))

    def tokens_between(self, start: int, end: int) -> int:
        """Returns the tokens of the batches after step `start`, up to step `end`."""
        return sum(map(sum, self.batches[start:end]))

    def regret(self, cell: str) -> float:
        """Returns by which share a cell's test loss is above the least."""
        return self.cells[cell].test / min(other.test for other in self.cells.values()) - 1

    def good(self) -> frozenset[str]:
        """Returns the cells whose test loss is within GOOD of the least."""
        return frozenset(name for name in self.cells if self.regret(name) <= GOOD)


def read_curves(path: Path, model: str, data: str = "mawps", method: str = "lora") -> Curves:
    """Returns the newest curves of a model, data set and method.

    Raises:
        SystemExit: when there are none, or cells are missing.
    """
    kept = {"model": model, "data": data, "method": method}
    rows = [row for row in read_rows(path) if all(row.get(key, value) == value for key, value in kept.items())]
    study = next((row for row in reversed(rows) if row["row"] == "study"), None)
    if study is None:
        raise SystemExit(f"no curves of {model}, {data} and {method}: run `python benchmarks/search.py measure` first")
    cells = [_cell(row) for row in rows if row["row"] == "cell" and row["grid"] == study["grid"]]
    named = {cell.name: cell for cell in cells}
    if len(named) != study["cells"]:
        raise SystemExit(f"{len(named)} of {study['cells']} cells were measured: run `measure` again, it goes on")
    speeds = {row["system"]: row for row in rows if row["row"] == "speed" and row["grid"] == study["grid"]}
    return Curves(
        study["values"],
        tuple(study["rungs"]),
        study["steps"],
        np.array(study["counts"]),
        np.array(study["start"]),
        study["dev_tokens"],
        tuple(map(tuple, study["lengths"])),
        study["slots"],
        study["row_tokens"],
        named,
        speeds,
    )


def _cell(row: Mapping[str, Any]) -> Cell:
    sums = {int(step): np.array(values) for step, values in row["sums"].items()}
    values = {name: row[name] for name in ("learning_rate", *OTHERS) if name in row}
    return Cell(values, row["status"], row["steps"], sums, float("inf") if row["test"] is None else row["test"])
