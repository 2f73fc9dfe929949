"""The studies behind docs/findings.md: which trials they have, and how they are trained.

    python studies/experiment.py write      # the blocks, studies/NAME/block-NN.yaml
    python studies/experiment.py run        # trains those that have no rows yet; studies/NAME/block-NN.parquet
    OMP_NUM_THREADS=1 taskset -c 1 python studies/experiment.py run words/block-07      # one of them, on one core

`words` and `choices` are the designed experiment: rate, tokens or rank, initialisation, warm-up, weight decay, batch
and steps, all at once. The points of a data set are one scrambled Sobol sequence a method, so that every part of it
covers the whole space. `sample` asks whether the best of three rates on 300 rows is the best on 3,000: one pass each.
`rising` trains all weights and an attached prompt, and keeps their curves. `transfer` puts the defaults beside a search
of 32 trials, on data sets that no default comes from.

A block trains for at most about 40 minutes on two cores. Nothing is stopped early but in `transfer`. A run that was
killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy.stats import qmc

import peft_study
from peft_study.config import METHODS
from peft_study.model.load import resolve_model
from peft_study.report.costs import costs

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared" / "data"
RUNS = HERE.parent / "runs" / "studies"
MODEL = "smollm2-135m-instruct"
RATES = 1e-5, 10.0
TOKENS = 1, 100
RANKS = 1, 64
WARMUP, WEIGHT_DECAY = 0.2, 0.1
BATCHES = 4, 8
STEPS = 20, 36, 66, 120
"""Evenly spaced on a log scale."""
POINTS = {"prompt_tuning": 64, "prefix_tuning": 64, "lora": 32}
INITS = {"prompt_tuning": ("text", "vocab", "random"), "prefix_tuning": ("text", "zero", "random")}
HELD_OUT = 96
DESIGNED = {
    "budget": {"trials": 1},
    "search": {"sampler": "grid", "pruner": "none", "range_test": False, "widen": False},
    "finals": {"best": 0},
}
"""Every trial is one setting, and runs to its end."""
SEEDS = 0, 1, 2
SAMPLES = {300: SEEDS, 3000: SEEDS[:2]}
"""Rows of `sample`, with the seeds of each."""
SAMPLED = {
    "prompt_tuning": {"tokens": 8, "learning_rate": (0.033, 0.1, 0.3)},
    "prefix_tuning": {"tokens": 30, "learning_rate": (0.013, 0.04, 0.12)},
    "lora": {"rank": 16, "learning_rate": (3.3e-4, 1e-3, 3e-3)},
}
"""Of `sample`: a third of the default rate, the default, and three times it."""
RISING = {
    "full-1e-4": {"method": "full", "learning_rate": 1e-4},
    "full-1e-3": {"method": "full", "learning_rate": 1e-3},
    "prompt-1e-4": {"method": "prompt_tuning", "tokens": 8, "learning_rate": 1e-4},
    "prompt-1e-1": {"method": "prompt_tuning", "tokens": 8, "learning_rate": 0.1},
    "prompt-1e0": {"method": "prompt_tuning", "tokens": 8, "learning_rate": 1.0},
}
"""Of `rising`: an adapter that was never attached is full fine-tuning at the adapter's rate."""
BLOCK_TOKENS = 650_000
"""Of a block: some 35 minutes at the 320 tokens a second of two cores."""


@dataclass(frozen=True)
class DataSet:
    """A data set of the experiment: `file` under ../shared/data, its rows of at most `most` tokens, `mean` of them."""

    file: str
    most: int
    mean: int


SETS = {
    "words": DataSet("dolly-partial/train.jsonl.gz", 64, 54),
    "choices": DataSet("commonsenseqa/train.jsonl.gz", 80, 77),
}


SAMPLE = DataSet("dolly-partial/train.jsonl.gz", 108, 72)
TRANSFERS = {
    "transfer": DataSet("codealpaca-2k/train.jsonl.gz", 96, 75),
    "transfer-codegen": DataSet("gpteacher/codegen.jsonl.gz", 108, 92),
}
"""Of `transfer`, by the name of the file of rows. No default is fitted to them, but what they showed had
those of prompt tuning looked at again."""
PROMPT_DEFAULTS = [{"tokens": 8, "learning_rate": 0.1}, {"tokens": 50, "learning_rate": 0.1}]
"""Former defaults of prompt tuning: at the time of its first search, and of its second."""
FOUND = {
    "transfer": {"tokens": 100, "learning_rate": 0.0146, "warmup_ratio": 0.1},
    "transfer-codegen": {"tokens": 50, "learning_rate": 0.0201, "warmup_ratio": 0.03, "weight_decay": 0.001},
}
"""What the two searches of prompt tuning found."""


def points(method: str, seed: int) -> list[dict[str, Any]]:
    """Returns the settings of a method's trials, with batch size and steps."""
    sobol = qmc.Sobol(7, seed=np.random.default_rng([seed, list(POINTS).index(method)]))
    return [_setting(method, unit) for unit in sobol.random(POINTS[method])]


def _setting(method: str, unit: np.ndarray) -> dict[str, Any]:
    rate, size, init, warmup, decay, batch, steps = unit.tolist()
    setting: dict[str, Any] = {"method": method, "learning_rate": float(f"{_log(rate, *RATES):.3g}")}
    if method == "lora":
        setting["rank"] = round(_log(size, *RANKS))
    else:
        setting |= {"tokens": round(_log(size, *TOKENS)), "init": _of(INITS[method], init)}
    setting |= {"warmup_ratio": round(warmup * WARMUP, 3), "weight_decay": round(decay * WEIGHT_DECAY, 4)}
    return {**setting, "batch_size": _of(BATCHES, batch), "steps": _of(STEPS, steps)}


def _log(unit: float, low: float, high: float) -> float:
    return float(low * (high / low) ** unit)


def _of(choices: tuple[Any, ...], unit: float) -> Any:
    return choices[min(int(unit * len(choices)), len(choices) - 1)]


def write(name: str) -> None:
    """Writes the blocks of a data set."""
    cells: dict[tuple[int, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for method in POINTS:
        for number, point in enumerate(points(method, seed=list(SETS).index(name))):
            cells[point.pop("steps"), point.pop("batch_size")][f"{method}-{number:02d}"] = point
    (HERE / name).mkdir(exist_ok=True)
    number = 0
    for (steps, batch), trials in sorted(cells.items()):
        each = max(1, BLOCK_TOKENS // (steps * batch * SETS[name].mean))
        parts = -(-len(trials) // each)
        for part in range(parts):
            number += 1
            chosen = dict(list(trials.items())[part::parts])
            data = {"train": f"runs/studies/{name}.jsonl", "held_out": HELD_OUT, "max_length": SETS[name].most}
            _write(name, number, data, {"steps": steps, "batch_size": batch}, chosen)


def write_sample() -> None:
    """Writes the blocks of `sample`: of 300 rows all methods at once, of 3,000 one at a time."""
    trials = {
        method: {
            f"{method}-{number}": {"method": method, **setting, "learning_rate": rate}
            for number, rate in enumerate(setting["learning_rate"])
        }
        for method, setting in SAMPLED.items()
    }
    (HERE / "sample").mkdir(exist_ok=True)
    few, many = SAMPLES
    together = {name: setting for each in trials.values() for name, setting in each.items()}
    blocks = [(few, seed, together) for seed in SAMPLES[few]]
    blocks += [(many, seed, each) for seed in SAMPLES[many] for each in trials.values()]
    for number, (rows, seed, chosen) in enumerate(blocks, start=1):
        files = {"train": "runs/studies/sample.jsonl", "held_out": "runs/studies/sample-held-out.jsonl"}
        data = {**files, "max_length": SAMPLE.most, "limit": rows}
        training = {"steps": rows // 8, "batch_size": 8, **_seeds(seed)}
        _write("sample", number, data, training, chosen)


def write_transfer() -> None:
    """Writes the blocks of `transfer`: a method's search and its defaults, both retrained with three seeds.

    The last three have no search: they put later defaults of prompt tuning beside what its searches found.
    """
    (HERE / "transfer").mkdir(exist_ok=True)
    first, second = TRANSFERS
    before, between = PROMPT_DEFAULTS
    default = {"space": "default"}
    blocks: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
        (first, "prompt_tuning", default, before),
        (first, "prefix_tuning", default, {}),
        (first, "lora", default, {}),
        (second, "prompt_tuning", default, between),
        (first, "prompt_tuning", FOUND[first], between),
        (first, "prompt_tuning", FOUND[first], {}),
        (second, "prompt_tuning", FOUND[second], {}),
    ]
    for number, (rows, method, beside, former) in enumerate(blocks, start=1):
        defaults = {"method": method, "learning_rate": METHODS[method].learning_rates.default, **former}
        most = TRANSFERS[rows].most
        data = {"train": f"runs/studies/{rows}.jsonl", "held_out": HELD_OUT, "test": 200, "max_length": most}
        searched = {"budget": {"trials": 32}, "search": {}} if beside is default else DESIGNED
        trials = {method: beside, f"{method}-defaults": defaults}
        kept = {**searched, "finals": {"best": 1, "seeds": 3, "answers": 0}}
        _write("transfer", number, data, {"steps": 48, "batch_size": 8}, trials, kept)


def write_rising() -> None:
    """Writes the blocks of `rising`: all weights and an attached prompt at a rate each, a seed a block."""
    (HERE / "rising").mkdir(exist_ok=True)
    for number, seed in enumerate(SEEDS, start=1):
        data = {"train": "runs/studies/words.jsonl", "held_out": HELD_OUT, "max_length": SETS["words"].most}
        _write("rising", number, data, {"steps": 60, "batch_size": 8, **_seeds(seed)}, RISING, every=10)


def _seeds(seed: int) -> dict[str, int]:
    """Returns both seeds: weights that begin at the base or at a text differ by the rows and their order alone."""
    return {"seed": seed, "data_seed": seed}


def _write(
    name: str,
    number: int,
    data: dict[str, Any],
    training: dict[str, Any],
    trials: dict[str, dict[str, Any]],
    searched: dict[str, Any] = DESIGNED,
    every: int | None = None,
) -> None:
    block = f"block-{number:02d}"
    if searched is DESIGNED:
        every = every or training["steps"]
    study = {
        "model": {"name": MODEL},
        "data": data,
        "training": training,
        "methods": trials,
        **searched,
        "logging": {
            "evaluate_every": every,
            "base_loss": False,
            "tensorboard": False,
        },
        "output": f"runs/studies/{name}/{block}",
    }
    (HERE / name / f"{block}.yaml").write_text(yaml.safe_dump(study, sort_keys=False))


def prepare(name: str) -> None:
    """Writes the rows of a study that are short enough, once; of `sample` the held-out ones in a file of their own."""
    target = RUNS / f"{name}.jsonl"
    if target.exists():
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(resolve_model(MODEL)))
    target.parent.mkdir(parents=True, exist_ok=True)
    source = {**SETS, "sample": SAMPLE, **TRANSFERS}[name]
    with gzip.open(SHARED / source.file, "rt") as file:
        rows = [json.loads(line) for line in file]
    kept = [
        json.dumps(row) + "\n"
        for row in rows
        if len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) <= source.most
    ]
    if name == "sample":
        (RUNS / "sample-held-out.jsonl").write_text("".join(kept[:HELD_OUT]))
        kept = kept[HELD_OUT:]
    target.write_text("".join(kept))


def run(name: str) -> None:
    """Trains the blocks of a study that have no rows yet, or one block, as `words/block-07`."""
    study, _, block_name = name.partition("/")
    for block in sorted((HERE / study).glob(f"{block_name or 'block-*'}.yaml")):
        if block.with_suffix(".parquet").exists():
            continue
        prepare(Path(yaml.safe_load(block.read_text())["data"]["train"]).stem)
        result = peft_study.Study.from_yaml(block).run(verbose=False)
        collect(result, block)
        print(f"{study}/{block.stem}: {result.state}", flush=True)


def collect(result: peft_study.StudyResult, block: Path) -> None:
    """Writes a row a trial of a block, with the speed that its setting has alone on this machine."""
    study = yaml.safe_load(block.read_text())
    frame = result.trials_dataframe()
    frame["batch_size"], frame["rows"] = study["training"]["batch_size"], study["data"].get("limit")
    frame["planned_steps"] = study["training"]["steps"]  # `steps` are those that a trial took
    speeds = {method: cost.tokens_per_second for method, cost in costs(result.folder).items()}
    frame["tokens_per_second_alone"] = frame["method"].map(speeds)
    frame.to_parquet(block.with_suffix(".parquet"), index=False)
    if block.parent.name == "rising":
        curves(result.folder).to_parquet(block.with_name(f"{block.stem}-curves.parquet"), index=False)
    if block.parent.name == "transfer":
        finalists = json.loads((result.folder / "results.json").read_text())["finalists"]
        block.with_name(f"{block.stem}-finalists.json").write_text(json.dumps(finalists, indent=1) + "\n")


def curves(folder: Path) -> pd.DataFrame:
    """Returns training and held-out losses of a study's trials, a row a step."""
    lines = [
        {"trial": path.parent.name, **json.loads(line)}
        for path in sorted(folder.glob("trials/*/metrics.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return pd.DataFrame(lines)[["trial", "event", "step", "loss", "minus_base"]]


def main() -> None:
    """Does what the command names, for each data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("write", "run"))
    parser.add_argument(
        "sets",
        nargs="*",
        metavar="NAME",
        help=f"{', '.join(SETS)}, sample, rising or transfer; NAME/block-NN; none: all",
    )
    options = parser.parse_args()
    writers = {name: partial(write, name) for name in SETS}
    writers |= {"sample": write_sample, "rising": write_rising, "transfer": write_transfer}
    for name in options.sets or writers:
        if options.do == "run":
            run(name)
        else:
            writers[name]()


if __name__ == "__main__":
    main()
