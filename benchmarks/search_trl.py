"""TRL's and Ray Tune's part of `search.py measure`: what a run takes, from the start of its process to its end.

    python benchmarks/search_trl.py STUDY.yaml MODEL STEPS SETTINGS      # one TRL run, a process of its own
    python benchmarks/search_trl.py STUDY.yaml MODEL STEPS candidates    # the seconds of each that may be its best

No cell is trained to its end: the time of a step does not depend on the learning rate, and the curves are those of our
engine, whose losses are PEFT's (tests/engine/test_parity.py). What is best for long rows need not be so for short ones:
parts of a batch, attention and autocast are searched anew on the grid's own rows.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from common import ROOT, Rows
from search_grid import Scale, split_of, training_batches
from trl_peer import DEFAULT, LEAN, TrlPeer
from worlds import METHODS, World, open_world

from peft_study.config import StudyConfig, validate
from peft_study.data.conversation import Example

Settings = dict[str, Any]
TrialFacts = dict[str, float]


def parts_of(batch_size: int, part: int) -> Settings:
    """Returns the settings that make an optimizer batch of parts."""
    return {"per_device_train_batch_size": part, "gradient_accumulation_steps": batch_size // part}


def candidates(batch_size: int) -> list[Settings]:
    """Returns what may be TRL's best settings on a batch of short rows."""
    parts = [part for part in range(1, batch_size + 1) if batch_size % part == 0]
    return [
        {**LEAN, **parts_of(batch_size, part), "attention": attention, "bf16": autocast}
        for part, attention, autocast in itertools.product(parts, ("eager", "sdpa"), (True, False))
    ]


@dataclass(frozen=True, slots=True)
class Job:
    """What a run trains: the method of a study file, on the first batches of a trial."""

    world: World
    method: str
    batch_size: int
    examples: list[Example]


def job_of(file: Path, model: str, steps: int) -> Job:
    """Returns what the runs of a study file train for some steps."""
    config = validate(StudyConfig, yaml.safe_load(file.read_text()), where=str(file)).filled()
    examples = [e for batch in training_batches(split_of(config), config, steps) for e in batch]
    (method,) = config.methods
    return Job(open_world(model, config.model.device), method, config.training.batch_size, examples)


def train(job: Job, settings: Settings) -> TrialFacts:
    """Trains with TRL for some steps, twice, and evaluates; returns seconds and tokens.

    The first pass bears what happens once (allocations, kernels chosen); `first` says how much longer it took.
    """
    peer = TrlPeer("trl", job.world, METHODS[job.method], None, job.examples, settings)
    first, second = peer.run(), peer.run()
    return {
        "tokens": second.tokens,
        "first": first.seconds,
        "second": second.seconds,
        "evaluation": peer.evaluate(),
    }


def measure_settings(rows: Rows, file: Path, model: str, scale: Scale) -> dict[str, Settings]:
    """Returns TRL's defaults with the grid's batch, and the fastest of the candidates."""
    tried = _process(file, model, scale.timed_steps, "candidates")
    for settings, seconds in tried:
        rows.add(row="candidate", settings=settings, seconds=seconds)
    fastest, _ = min((pair for pair in tried if pair[1] is not None), key=lambda pair: pair[1])
    return {"default": {**DEFAULT[scale.method], **parts_of(scale.batch_size, scale.batch_size)}, "best": fastest}


def _process(file: Path, model: str, steps: int, what: str) -> Any:
    words = [sys.executable, __file__, str(file), model, str(steps), what]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip().splitlines()[-1])
    return json.loads(ran.stdout.splitlines()[-1])


def measure_single(rows: Rows, file: Path, model: str, scale: Scale, chosen: Mapping[str, Settings]) -> None:
    """Measures one TRL run in a process of its own, with each of the settings."""
    for name, settings in chosen.items():
        started = time.time()
        facts = _process(file, model, scale.timed_steps, json.dumps(settings))
        rows.add(
            row="speed",
            system=f"trl {name}",
            concurrent=1,
            settings=settings,
            **_speeds([facts], time.time() - started),
        )


def measure_ray(rows: Rows, file: Path, model: str, scale: Scale, chosen: Mapping[str, Settings]) -> None:
    """Measures Ray Tune with ASHA over TRL runs: one after another on all cores, and two at a time on half of them."""
    cores = os.cpu_count() or 1
    for name, settings in chosen.items():
        for concurrent in (1, 2) if cores > 1 else (1,):
            ready, wall, facts = _tune(file, model, settings, scale.timed_steps, concurrent, cores)
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
    file: Path, model: str, settings: Settings, steps: int, concurrent: int, cores: int
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
        tune.report({"loss": 1.0, "step": steps, **train(job_of(file, model, steps), settings)})

    started = time.time()
    with tempfile.TemporaryDirectory() as storage:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": threads}),
            param_space={"threads": threads, "cell": tune.grid_search([0, 1])},
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
    """Trains once, or once with each candidate, and prints what it took."""
    file, model, steps, what = sys.argv[1:] if words is None else words
    job = job_of(Path(file), model, int(steps))
    if what != "candidates":
        print(json.dumps(train(job, json.loads(what))))
        return
    found: list[tuple[Settings, float | None]] = []
    for settings in candidates(job.batch_size):
        try:
            found.append((settings, round(train(job, settings)["second"], 3)))
        except (ValueError, RuntimeError):  # of this method with these settings
            found.append((settings, None))
        gc.collect()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
