"""TRL's and Ray Tune's part of `search.py measure`: what a run takes, from the start of its process to its end.

    python benchmarks/search_trl.py STUDY.yaml MODEL SETTINGS STEPS    # one TRL run, a process of its own

No cell is trained to its end: the time of a step does not depend on the learning rate, and the curves are those of our
engine, whose losses are PEFT's (tests/engine/test_parity.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from common import ROOT, Rows
from search_grid import Scale, split_of, training_batches
from trl_peer import DEFAULT, TrlPeer, best
from worlds import METHODS, open_world

from peft_study.config import StudyConfig, validate
from peft_study.data.conversation import Example

SETTINGS = ("default", "best")
TrialFacts = dict[str, float]


def settings_of(name: str, device: str, batch_size: int) -> dict[str, Any]:
    """Returns TRL's settings of that name, with the grid's batch."""
    chosen = dict(DEFAULT["lora"] if name == "default" else best(device, "lora"))
    part = chosen.get("per_device_train_batch_size", batch_size)
    part = min(part, batch_size)
    return {**chosen, "per_device_train_batch_size": part, "gradient_accumulation_steps": batch_size // part}


def train(file: Path, model: str, name: str, steps: int) -> TrialFacts:
    """Trains with TRL for some steps, twice, and evaluates; returns seconds and tokens.

    The first pass bears what happens once (allocations, kernels chosen); `first` says how much longer it took.
    """
    config = validate(StudyConfig, yaml.safe_load(file.read_text()), where=str(file)).filled()
    examples: list[Example] = [e for batch in training_batches(split_of(config), config, steps) for e in batch]
    world = open_world(model, config.model.device)
    settings = settings_of(name, world.placement.device.type, config.training.batch_size)
    peer = TrlPeer(f"trl {name}", world, METHODS["lora"], None, examples, settings)
    first, second = peer.run(), peer.run()
    return {
        "tokens": second.tokens,
        "first": first.seconds,
        "second": second.seconds,
        "evaluation": peer.evaluate(),
    }


def measure_single(rows: Rows, file: Path, model: str, scale: Scale) -> None:
    """Measures one TRL run in a process of its own, with each of the settings."""
    for name in SETTINGS:
        started = time.time()
        words = [sys.executable, __file__, str(file), model, name, str(scale.timed_steps)]
        ran = subprocess.run(words, capture_output=True, text=True, check=False)
        wall = time.time() - started
        if ran.returncode:
            raise RuntimeError(ran.stderr.strip().splitlines()[-1])
        facts = json.loads(ran.stdout.splitlines()[-1])
        rows.add(row="speed", system=f"trl {name}", concurrent=1, **_speeds([facts], wall))


def measure_ray(rows: Rows, file: Path, model: str, scale: Scale) -> None:
    """Measures Ray Tune with ASHA over TRL runs: one after another on all cores, and two at a time on half of them."""
    cores = os.cpu_count() or 1
    for name in SETTINGS:
        for concurrent in (1, 2) if cores > 1 else (1,):
            ready, wall, facts = _tune(file, model, name, scale.timed_steps, concurrent, cores)
            found = _speeds(facts, wall * concurrent / len(facts))
            rows.add(row="speed", system=f"ray {name} {concurrent}", concurrent=concurrent, ready=ready, **found)


def _speeds(facts: list[TrialFacts], wall: float) -> dict[str, Any]:
    """Returns seconds a token, and what a trial takes beside training and evaluation.

    Args:
        facts: of each trial.
        wall: seconds of one trial from its start until the next one can start.
    """
    count = len(facts)
    tokens = sum(f["tokens"] for f in facts)
    within = sum(2 * f["second"] + f["evaluation"] for f in facts) / count
    return {
        "trials": count,
        "seconds_per_token": sum(f["second"] for f in facts) / tokens,
        "seconds_per_dev_token": sum(f["evaluation"] for f in facts) / tokens,
        "overhead": round(max(0.0, wall - within), 2),
        "wall": round(wall, 2),
    }


def _tune(
    file: Path, model: str, name: str, steps: int, concurrent: int, cores: int
) -> tuple[float, float, list[TrialFacts]]:
    """Runs two trials with Ray Tune; returns seconds until Ray is there and of the trials, and what each took."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # workers import this folder's modules
    places = [str(Path(__file__).parent), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    started = time.time()
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    # "local": a cluster that somebody else runs on this machine is no part of this
    ray.init("local", num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="error")
    ready = time.time() - started
    threads = max(1, cores // concurrent)

    def trainable(setting: dict[str, Any]) -> None:
        torch.set_num_threads(setting["threads"])
        tune.report({"loss": 1.0, "step": setting["steps"], **train(file, model, name, setting["steps"])})

    started = time.time()
    with tempfile.TemporaryDirectory() as storage:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": threads}),
            param_space={"threads": threads, "steps": steps, "cell": tune.grid_search([0, 1])},
            tune_config=tune.TuneConfig(
                metric="loss", mode="min", scheduler=ASHAScheduler(time_attr="step", max_t=steps, grace_period=1)
            ),
            run_config=tune.RunConfig(storage_path=storage, verbose=0),
        )
        results = tuner.fit()
    wall = time.time() - started
    ray.shutdown()
    if results.errors:
        raise RuntimeError(str(results.errors[0]))
    wanted = ("tokens", "first", "second", "evaluation")
    return round(ready, 2), wall, [{key: float(r.metrics[key]) for key in wanted} for r in results]


def main(words: list[str] | None = None) -> None:
    """Trains once and prints what it took."""
    file, model, name, steps = sys.argv[1:] if words is None else words
    print(json.dumps(train(Path(file), model, name, int(steps))))


if __name__ == "__main__":
    main()
