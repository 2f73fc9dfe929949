"""Our search on other people's runs: settings tried until one is good, and whether a good run is ever stopped.

    python benchmarks/search_recorded.py      # minutes, on the rows in ../shared/references/recorded

Tried: LoRA on Tulu-3, rate x rank, 35 models (tinker-cookbook, `sft_sweep.md`), until one setting is within 0.5 % of
the best. Only ends of runs are known, so nothing is stopped. Compared with the same cells in random order (the
expectation) and in the order of a grid, rates ascending. The prior has its rate from these very runs; its row is no
test of it.

Stopped: 63 runs of many methods on MetaMathQA (Hugging Face, method_comparison), 5,000 steps, in random orders, each
to its end or to where a rule stops it by its train loss (a mean of 250 steps, no noise of rows). How many of the ten
with the best test accuracy are stopped? The runs have no setting in common, so a run is an unordered choice to our
model.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from common import SHARED, Rows, arguments

from peft_study.config import MethodSpace, StudyConfig, TrainingConfig, validate
from peft_study.search.bayesian import BayesianSearch
from peft_study.search.prior import rate_prior
from peft_study.search.pruners import pruner
from peft_study.search.surrogate import Surrogate
from peft_study.search.trials import TrialRecord

SWEEP = SHARED / "references" / "recorded" / "tinker-tulu3-lora-sweep.csv"
STEPS, DIVERGED, GOOD = 780, 2.0, 1.005
RUNS = SHARED / "references" / "recorded" / "peft-method-comparison-runs.jsonl.gz"
JUDGED, START = (500, 1750), 2.0
"""Points next to a ninth and a third of 5,000 steps; a loss above those of all runs, which bounds none."""
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
    return lora_space(learning_rate=rates, rank=ranks)


def lora_space(**settings: Any) -> MethodSpace:
    """Returns a space of LoRA."""
    study = {"model": {"name": "none"}, "data": {"train": "none"}, "methods": {"lora": settings}, "output": "none"}
    return validate(StudyConfig, study, where="benchmarks/search_recorded.py").methods["lora"].filled(TrainingConfig())


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


def read_runs() -> dict[str, tuple[dict[int, float], float]]:
    """Returns train losses (nats a token) by step, and test accuracy, of each run."""
    found = {}
    for line in gzip.decompress(RUNS.read_bytes()).decode().strip().split("\n"):
        run = json.loads(line)
        if "MetaMathQA" in run["file"]:
            losses = {point["step"]: point["train loss"] for point in run["metrics"]}
            found[run["experiment"]] = losses, run["metrics"][-1]["test accuracy"]
    return found


def stopped_runs(runs: Mapping[str, Mapping[int, float]], kind: str) -> tuple[set[str], float]:
    """Returns the runs that a rule stops, one after another, and the share of all steps that were taken."""
    modules = [[name] for name in sorted(runs)]
    space = lora_space(learning_rate=1e-4, target_modules={"choices": modules})
    counts, trials, taken = np.array([1, 1]), list[TrialRecord](), 0
    rule = pruner(kind, 3, lambda _method: Surrogate(space, trials, counts))
    for number, (name, losses) in enumerate(runs.items()):
        settings = space.at({"target_modules": [name]}, TrainingConfig(steps=5000))
        settings = settings.model_copy(update={"rungs": JUDGED})
        trial = TrialRecord(name, "lora", "search", number, {}, settings, sums={0: np.full(2, START)})
        others = list(trials)
        trials.append(trial)
        for step in (*JUDGED, 5000):
            trial.sums[step] = np.full(2, losses[step])
            taken += step - max(trial.sums.keys() - {step})
            if step < 5000 and rule.judge(trial, others, step, counts) is not None:
                trial.status = "pruned"
                break
        else:
            trial.status = "finished"
    return {trial.name for trial in trials if trial.status == "pruned"}, taken / (5000 * len(runs))


def add_stopped(rows: Rows, orders: int) -> None:
    """Adds a row for each rule: how many of the ten best are stopped in random orders, and the steps that are taken."""
    runs = read_runs()
    best = sorted(runs, key=lambda name: -runs[name][1])
    for kind in ("probability", "successive_halving"):
        lost, first, shares = [], 0, []
        for order in range(orders):
            names = np.random.default_rng(order).permutation(sorted(runs))
            stopped, share = stopped_runs({name: runs[name][0] for name in names}, kind)
            lost.append(len(stopped & set(best[:10])))
            first += best[0] in stopped
            shares.append(share)
        mean, most, steps = round(statistics.mean(lost), 2), max(lost), round(statistics.mean(shares), 3)
        rows.add(row="stopped", rule=kind, orders=orders, of_ten_best=mean, most=most, the_best=first, steps=steps)


def main(words: list[str] | None = None) -> None:
    """Runs all orders on all models; rows go to results/search_recorded.jsonl."""
    parser = arguments(__doc__, "search_recorded")
    parser.add_argument("--orders", type=int, default=10, help="in which the runs of the second part come")
    options = parser.parse_args(words)
    rows = Rows(options)
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
    add_stopped(rows, options.orders)


if __name__ == "__main__":
    main()
