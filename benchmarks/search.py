"""Until when a search would recommend a setting within 2 % of the grid's best on the test part: four systems.

    python benchmarks/search.py measure                # live, 30 minutes on 2 cores; killed, it goes on
    python benchmarks/search.py replay                 # a minute, on what was measured
    python benchmarks/search.py check                  # one study live by `peft-study run`, beside its replay

    (a) the grid, one TRL + peft run after another     (c) our engine, one trial after another to the end
    (b) Ray Tune with ASHA over TRL runs               (d) ours: a model of the losses, trials side by side

Live: every cell of the grid trained once by our engine, with its losses at the rungs, at the end and on the test part;
seconds of TRL's, Ray Tune's and our steps, evaluations and start-ups. Replayed: the order of the grid (20 search
seeds, the same orders for all systems but our model) and the rules that stop trials: Ray Tune's own scheduler class and
our own scheduler, on a virtual clock. TRL trains no cell to its end: its time does not depend on the learning rate, and
the losses of the two engines at the same parameters are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pictures
import yaml
from common import ROOT, Rows, arguments
from search_grid import DATA, FULL, GOOD, TINY, Curves, Scale, cell_of, read_curves, study_values
from search_live import measure_ours
from search_ours import SEARCHES, WorkerCosts, decisions, order_of, ours, worker_costs
from search_replay import RULES, Costs, Search, Seen, asha, factor, one_after_another, regrets, spread, times
from search_trl import measure_ray, measure_settings, measure_single
from worlds import EMBEDDED

from peft_study.storage.cache_dir import cache_root
from peft_study.storage.journal import Event, read

PARTS = ("ours", "trl", "ray")
CURVES = "search_curves"
LOOKS = {
    "seconds": [round(30 * 2 ** (k / 2)) for k in range(15)],
    "tokens": [round(3000 * 2 ** (k / 2)) for k in range(18)],
}
"""Seconds, and tokens of training, at which the regret of what a search recommends is looked at."""


def scale_of(options: argparse.Namespace) -> Scale:
    """Returns how large the search is."""
    return TINY if options.model == "tiny" else FULL[options.method]


def _subject(options: argparse.Namespace) -> dict[str, str]:
    return {"model": options.model, "data": options.data, "method": options.method}


def measure(options: argparse.Namespace) -> None:
    """Measures curves and seconds; rows go to results/search_curves.jsonl."""
    scale = scale_of(options)
    options.work.mkdir(parents=True, exist_ok=True)
    values = study_values(options.model, options.data, scale, options.work, options.device)
    file = options.work / "study.yaml"
    file.write_text(yaml.safe_dump({**values, "output": str(options.work / "unused")}))
    grid = hashlib.sha256(json.dumps(asdict(scale)).encode()).hexdigest()[:12]
    options.name = CURVES
    rows = Rows(options, **_subject(options), grid=grid, batch_size=scale.batch_size)
    if "ours" in options.parts:
        measure_ours(rows, options.model, values, scale, options.work)
    if {"trl", "ray"} & set(options.parts):
        chosen = measure_settings(rows, file, options.model, scale)
        if "trl" in options.parts:
            measure_single(rows, file, options.model, scale, chosen)
        if "ray" in options.parts:
            measure_ray(rows, file, options.model, scale, chosen)


def systems(curves: Curves) -> dict[str, Costs]:
    """Returns what every peer's search costs, as far as it was measured; of Ray's concurrencies the faster one."""
    found: dict[str, Costs] = {}
    alone = curves.speeds["ours alone"]
    found["c"] = Costs(alone["start_up"], alone["entry"], alone["seconds_per_token"], alone["seconds_per_dev_token"])
    for name in ("default", "best"):
        single = curves.speeds.get(f"trl {name}")
        if single:
            found[f"a {name}"] = _costs(single, 0.0)
        shared = [row for system, row in curves.speeds.items() if system.startswith(f"ray {name} ")]
        if shared:
            fastest = min(shared, key=lambda row: _whole_trial(curves, row))
            found[f"b {name}"] = _costs(fastest, fastest["ready"])
    return found


def _costs(row: dict[str, Any], start_up: float) -> Costs:
    seconds = (row["overhead"], row["seconds_per_token"], row["seconds_per_dev_token"])
    return Costs(start_up, *seconds, concurrent=row["concurrent"])


def _whole_trial(curves: Curves, row: dict[str, Any]) -> float:
    """Returns the seconds of the machine that one whole trial takes."""
    training, judging = row["seconds_per_token"] * curves.tokens, row["seconds_per_dev_token"] * curves.dev_tokens
    return float((row["overhead"] + training + judging) / row["concurrent"])


def replay(options: argparse.Namespace) -> None:
    """Replays all systems on the measured curves; rows go to results/search.jsonl."""
    curves = _curves(options)
    needed = {"ours alone"} if curves.slots == 1 else {"ours", "ours alone"}
    if missing := needed - curves.speeds.keys():
        raise SystemExit(f"no seconds of {' and '.join(sorted(missing))}: run `measure --parts ours` again, it goes on")
    rows = Rows(options, **_subject(options), slots=curves.slots, seeds=options.seeds)
    peers, own = systems(curves), worker_costs(curves.speeds)
    costs = {system: asdict(peers.get(system, own)) for system in (*SEARCHES, *peers)}
    rows.add(row="replayed", costs=costs, good=sorted(curves.good()))
    # seconds are tokens of training where nothing else costs anything: whose engine it is makes no difference then
    kinds = {system.split()[0]: Costs(0, 0, 1, 0) for system in peers}
    searches = {
        "seconds": searched(curves, options.seeds, own, peers),
        "tokens": searched(curves, options.seeds, WorkerCosts(0, 0, 1, 1, 0), kinds),
    }
    for rule in RULES:
        drawn: list[dict[str, Any]] = []
        for unit, found in searches.items():
            taken = {system: [times(s, curves, rule) for s in each] for system, each in found.items()}
            for system, each in taken.items():
                rows.add(row="times", unit=unit, system=system, rule=rule, **_each(spread, each))
            for system, against in itertools.product(("d", "d, no prior"), found):
                factors = _each(factor, taken[against], taken[system])
                rows.add(row="factor", unit=unit, system=system, against=against, rule=rule, **factors)
            for system, each in found.items():
                levels = regrets(each, curves, rule, LOOKS[unit])
                drawn.append(
                    rows.add(row="regret", unit=unit, system=system, rule=rule, at=LOOKS[unit], quartiles=levels)
                )
        if rule == "highest":
            pictures.search(drawn, GOOD, options.out / f"search_{options.data}_{options.method}_{curves.slots}.png")


def _each(compute: Callable[..., Any], *searches: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Returns a figure of the times of one or two systems, by what the times are of."""
    return {what: compute(*([t[what] for t in own] for own in searches)) for what in searches[0][0]}


def searched(curves: Curves, seeds: int, costs: WorkerCosts, peers: Mapping[str, Costs]) -> dict[str, list[Search]]:
    """Returns the searches of all systems, one a seed; peers try the cells in the order of our random grid."""
    found: dict[str, list[Search]] = {system: [] for system in (*SEARCHES, *peers)}
    for seed in range(seeds):
        for system in SEARCHES:
            search, events = ours(curves, seed, costs, system)
            found[system].append(search)
        for system, own in peers.items():
            run = asha if system.startswith("b") else one_after_another
            found[system].append(run(curves, order_of(events), own))
    return found


def check(options: argparse.Namespace) -> None:
    """Runs one study live by the command line and compares its decisions and times with the replay's."""
    curves = _curves(options)
    rows = Rows(options, **_subject(options), slots=curves.slots, search_seed=options.seed, system=options.system)
    live, events = run_live(options, curves.slots)
    replayed, expected = ours(curves, options.seed, worker_costs(curves.speeds), options.system)
    here, there = decisions(events), decisions(expected)
    differ = {cell: [here.get(cell), how] for cell, how in there.items() if here.get(cell) != how}
    apart = [
        abs(seen.loss - curves.cells[seen.cell].loss(seen.step)) / curves.cells[seen.cell].loss(seen.step)
        for seen in live.seen
    ]
    found = {rule: [times(s, curves, rule) for s in (live, replayed)] for rule in RULES}
    rows.add(
        row="check",
        cells=len(there),
        same_order=order_of(events) == order_of(expected),
        same_decisions=len(there) - len(differ),
        differ=differ,
        largest_loss_difference=float(f"{max(apart):.2g}"),
        seconds={
            rule: {w: [None if t[w] == float("inf") else round(t[w], 1) for t in pair] for w in pair[0]}
            for rule, pair in found.items()
        },
        replayed_over_live=round(replayed.over / live.over, 3),
    )


def _curves(options: argparse.Namespace) -> Curves:
    found = read_curves(options.curves or options.out / f"{CURVES}.jsonl", **_subject(options))
    return replace(found, slots=options.slots or found.slots)


def run_live(options: argparse.Namespace, slots: int) -> tuple[Search, list[Event]]:
    """Runs `peft-study run` on the grid and notes when each line of its journal appears."""
    options.work.mkdir(parents=True, exist_ok=True)
    values = study_values(options.model, options.data, scale_of(options), options.work, options.device)
    values["slots"] = slots
    values["search"] |= {"seed": options.seed, **SEARCHES[options.system]}
    folder = options.work / "check"
    file = options.work / "check.yaml"
    file.write_text(yaml.safe_dump({**values, "output": str(folder)}))
    shutil.rmtree(folder, ignore_errors=True)  # the lines of an earlier journal would be counted as its own
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    started, journal, stamped = time.time(), folder / "journal.jsonl", list[float]()
    words = [sys.executable, "-m", "peft_study", "run", str(file)]
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.1)
            lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
            stamped += [time.time() - started] * (lines - len(stamped))
    if process.returncode:
        raise RuntimeError(f"the study ended with {process.returncode}")
    events = read(journal)
    stamped += [time.time() - started] * (len(events) - len(stamped))
    cells = {e["name"]: cell_of(e["values"]) for e in events if e["event"] == "asked" and e["kind"] == "search"}
    seen = [
        Seen(at, cells[e["name"]], e["step"], sum(e["sums"]))
        for at, e in zip(stamped, events, strict=True)
        if e["event"] == "measured" and e["step"] > 0 and e["name"] in cells
    ]
    return Search(seen, stamped[-1]), events


def main(words: list[str] | None = None) -> None:
    """Runs the part asked for."""
    parser = arguments(__doc__, "search")
    parser.add_argument("what", choices=("measure", "replay", "check"))
    parser.add_argument("--model", default=EMBEDDED, choices=(EMBEDDED, "tiny"))
    parser.add_argument("--data", default="mawps", choices=tuple(DATA))
    parser.add_argument("--method", default="lora", choices=tuple(FULL))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="of measure")
    parser.add_argument("--slots", type=int, help="of replay and check; default: as measured")
    parser.add_argument("--curves", type=Path, help=f"of replay and check; default: {CURVES}.jsonl among the results")
    parser.add_argument("--system", default="d", choices=tuple(SEARCHES), help="of check")
    parser.add_argument("--seeds", type=int, default=20, help="search seeds of replay")
    parser.add_argument("--seed", type=int, default=0, help="search seed of check")
    parser.add_argument("--work", type=Path, help="folder of the studies, a GB; default: in the cache")
    options = parser.parse_args(words)
    if options.work is None:
        options.work = cache_root() / "benchmarks" / "-".join(("search", *_subject(options).values()))
    {"measure": measure, "replay": replay, "check": check}[options.what](options)


if __name__ == "__main__":
    main()
