"""The model of our search on other people's sweeps: settings tried until one is within 0.5 % of the best.

    python benchmarks/search_recorded.py      # half a minute, on the rows in ../shared/references/recorded

LoRA on Tulu-3, rate x rank, 35 models (tinker-cookbook, `sft_sweep.md`). Only ends of runs are known, so nothing is
stopped. Compared with the same cells in random order (the expectation) and in the order of a grid, rates ascending.
The prior has its rate from these very runs; its row is no test of it.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from common import SHARED, Rows, arguments

from peft_study.config import MethodSpace, StudyConfig, TrainingConfig, validate
from peft_study.search.bayesian import BayesianSearch
from peft_study.search.prior import rate_prior
from peft_study.search.trials import TrialRecord

SWEEP = SHARED / "references" / "recorded" / "tinker-tulu3-lora-sweep.csv"
STEPS, DIVERGED, GOOD = 780, 2.0, 1.005
Cells = dict[tuple[float, int], float]


def read_sweep() -> dict[str, Cells]:
    """Returns the test loss of every rate and rank, by model; the mean where a cell was run twice."""
    found: dict[str, dict[tuple[float, int], list[float]]] = {}
    with SWEEP.open() as file:
        for row in csv.DictReader(file):
            cell = float(row["learning_rate"]), int(row["lora_rank"])
            found.setdefault(row["model"], {}).setdefault(cell, []).append(float(row["test_nll"] or math.inf))
    return {model: {cell: statistics.mean(losses) for cell, losses in own.items()} for model, own in found.items()}


def space_of(cells: Iterable[tuple[float, int]]) -> MethodSpace:
    """Returns the lists of rates and ranks of a sweep."""
    rates, ranks = (sorted(set(values)) for values in zip(*cells, strict=True))
    study = {
        "model": {"name": "none"},
        "data": {"train": "none"},
        "methods": {"lora": {"learning_rate": rates, "rank": ranks}},
        "output": "none",
    }
    return validate(StudyConfig, study, where=SWEEP.name).methods["lora"].filled(TrainingConfig())


class MeasuredCells(BayesianSearch):
    """A search among the cells that somebody ran; not every rank has every rate."""

    measured: Mapping[tuple[float, int], float]

    def candidates(self, *_: object) -> list[dict[str, float]]:
        """Returns these cells."""
        return [{"learning_rate": rate, "rank": rank} for rate, rank in self.measured]


def losses_in_order(cells: Cells, *, informed: bool) -> Iterator[float]:
    """Yields the losses of the cells in the order in which our search tries them."""
    space, counts = space_of(cells), np.array([1])
    search = MeasuredCells(space, counts, rate_prior(space, STEPS, informed=informed), 0)
    search.measured = cells
    trials: list[TrialRecord] = []
    for number in range(len(cells)):
        values = search.suggest(trials, {})
        loss = cells[values["learning_rate"], values["rank"]]
        ended = {STEPS: np.array([loss])} if loss < DIVERGED else {}
        trials.append(
            TrialRecord(
                f"lora-{number:03d}",
                "lora",
                "search",
                number,
                values,
                space.at(values, TrainingConfig(steps=STEPS)),
                "finished" if ended else "diverged",
                sums={0: np.array([1.0]), **ended},
            )
        )
        yield loss


def tried(losses: Iterable[float], good: float) -> int:
    """Returns how many losses it takes until one is good."""
    return next(number for number, loss in enumerate(losses, 1) if loss <= good)


def main(words: list[str] | None = None) -> None:
    """Runs all orders on all models; rows go to results/search_recorded.jsonl."""
    rows = Rows(arguments(__doc__, "search_recorded").parse_args(words))
    if not SWEEP.exists():
        raise SystemExit(f"{SWEEP.name} is not there")
    counts: dict[str, list[float]] = {"model, no prior": [], "model, prior": [], "random": [], "grid": []}
    for cells in read_sweep().values():
        good = GOOD * min(cells.values())
        counts["model, no prior"].append(tried(losses_in_order(cells, informed=False), good))
        counts["model, prior"].append(tried(losses_in_order(cells, informed=True), good))
        # of n cells with k good ones, drawn in random order, the first good one comes as number (n + 1) / (k + 1)
        counts["random"].append((len(cells) + 1) / (sum(loss <= good for loss in cells.values()) + 1))
        counts["grid"].append(tried((cells[cell] for cell in sorted(cells)), good))
    for order, found in counts.items():
        mean, most = round(statistics.mean(found), 2), max(found)
        rows.add(row="tried", order=order, models=len(found), mean=mean, median=statistics.median(found), most=most)


if __name__ == "__main__":
    main()
