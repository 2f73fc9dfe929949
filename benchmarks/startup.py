"""Start-up: the help's wall time and its imports; from the command to the first step, and where that goes.

    python benchmarks/startup.py

Everything runs in processes of its own. The first step is timed twice: with an empty cache of tokens and base losses,
and again with what the first run left there.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from common import SHARED, Rows, arguments
from worlds import save_tiny

from peft_study.model.embedded import EMBEDDED, embedded_folder

PROGRAM = "from peft_study.cli import main; main()"
ROWS = 64

# (what, module, attribute): each is timed where it is called; the import of their modules is the first stage
STAGES = (
    ("tokenizer", "peft_study.training.session", "load_tokenizer"),
    ("weights", "peft_study.model.load", "load_model"),
    ("proof of packing and head", "peft_study.model.load", "prove"),
    ("tokens of the data", "peft_study.data.split", "tokenize"),
    ("held-out losses, the base's and at step 0", "peft_study.engine.engine", "example_losses"),
    ("record of the machine", "peft_study.training.finetune", "environment"),
    ("metrics files", "peft_study.training.trial_run", "MetricsWriter"),
    ("optimizer and schedule", "peft_study.training.trial_run", "Trial"),
    ("initialisation of the adapter", "peft_study.training.trial_run", "create"),
)


def program() -> list[str]:
    """Returns the words that start `peft-study`: its script where it is installed."""
    script = Path(sys.executable).with_name("peft-study")
    return [str(script)] if script.exists() else [sys.executable, "-c", PROGRAM]


def help_seconds(runs: int) -> list[float]:
    """Returns the wall time of `peft-study --help`, in new processes, after one to warm the disk's cache."""
    taken = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        subprocess.run([*program(), "--help"], stdout=subprocess.DEVNULL, check=True)
        taken.append(time.perf_counter() - started)
    return taken[1:]


def slowest_imports(count: int) -> list[dict[str, Any]]:
    """Returns the modules that the help spends most time in, each without what it imports, in milliseconds."""
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", PROGRAM, "--help"], capture_output=True, text=True, check=True
    )
    found = re.findall(r"^import time:\s+(\d+) \|\s+(\d+) \|\s+(\S+)$", ran.stderr, re.MULTILINE)
    modules = sorted(((int(own), int(whole), name) for own, whole, name in found), reverse=True)
    return [
        {"module": n, "own_ms": round(o / 1000, 1), "with_imports_ms": round(w / 1000, 1)}
        for o, w, n in modules[:count]
    ]


def first_step(model: str, data: Path, cache: Path, device: str) -> dict[str, float]:
    """Returns the seconds of each stage from the command to the end of the first step, in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--model_name_or_path", model, "--train_file", str(data), "--use_lora", "--max_train_steps", "4"]
        words += ["--output_dir", f"{folder}/out", "--device", device]
        started = time.time()
        ran = subprocess.run(
            [sys.executable, __file__, "--child", str(started), "--", "finetune", *words],
            env={**os.environ, "PEFT_STUDY_CACHE": str(cache)},
            capture_output=True,
            text=True,
            check=False,
        )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("STAGES ")]
    if not lines:
        raise RuntimeError(f"the run did not come to its first step: {ran.stdout[-500:]} {ran.stderr[-500:]}")
    found: dict[str, float] = json.loads(lines[0].removeprefix("STAGES "))
    return found


def child(started: float, words: list[str]) -> None:
    """Runs the command line with its stages timed, and ends the process after the first step."""
    import importlib

    from peft_study.cli import main as run

    modules = {module: importlib.import_module(module) for _, module, _ in STAGES}
    importlib.import_module("peft_study.compat.finetune")
    importlib.import_module("peft_study.training.finetune")
    from peft_study.engine.engine import Engine

    spent = {"interpreter and imports": time.time() - started}

    def timed(what: str, function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[what] = spent.get(what, 0.0) + time.perf_counter() - begun

        return wrapper

    for what, module, attribute in STAGES:
        setattr(modules[module], attribute, timed(what, getattr(modules[module], attribute)))
    step = timed("first step", Engine.step)

    def stopping(engine: Engine) -> Any:
        if not (events := step(engine)):
            return events
        whole = time.time() - started
        spent["all else"] = whole - sum(spent.values())
        rounded = {name: round(value, 3) for name, value in {**spent, "in all": whole}.items()}
        print(f"\nSTAGES {json.dumps(rounded)}", flush=True)
        os._exit(0)  # what a run does after its first step is not wanted

    Engine.step = stopping  # type: ignore[method-assign]
    sys.argv = ["peft-study", *words]
    run()


def few_rows(folder: Path) -> Path:
    """Returns a file with a few conversations: the first of the shared ones, or made up where those are not there."""
    path, shared = folder / "rows.jsonl", SHARED / "data" / "tulu-like-mix" / "train.jsonl.gz"
    if shared.exists():
        with gzip.open(shared, "rt") as file:
            path.write_text("".join(islice(file, ROWS)))
    else:
        turns = [("user", "What is {} plus 1?"), ("assistant", "It is {}.")]
        rows = [{"messages": [{"role": r, "content": t.format(i)} for r, t in turns]} for i in range(ROWS)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measure(options: argparse.Namespace) -> None:
    """Measures help, imports and the way to the first step."""
    rows = Rows(options, model=options.model)
    taken = help_seconds(options.runs)
    rows.add(row="help", seconds=round(statistics.median(taken), 3), runs=[round(s, 3) for s in taken])
    rows.add(row="imports of the help", slowest=slowest_imports(10))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, cache = few_rows(folder), folder / "cache"
        cache.mkdir()
        if options.model == EMBEDDED:
            embedded = embedded_folder()  # its conversion happens once on a machine and is not measured here
            (cache / "models").symlink_to(embedded.parent, target_is_directory=True)
            model = EMBEDDED
        else:
            model = str(save_tiny(folder / "model"))
        for number in range(options.first_steps + 1):
            kind = "cache empty" if number == 0 else "cache full"
            rows.add(row="first step", kind=kind, seconds=first_step(model, data, cache, options.device))


def main(words: list[str] | None = None) -> None:
    """Measures, or is the process that is measured."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["--child"]:
        child(float(words[1]), words[3:])
        return
    parser = arguments(__doc__, "startup")
    parser.add_argument("--model", default=EMBEDDED, choices=[EMBEDDED, "tiny"])
    parser.add_argument("--runs", type=int, default=10, help="runs of the help")
    parser.add_argument("--first-steps", type=int, default=5, help="runs to the first step with a full cache")
    measure(parser.parse_args(words))


if __name__ == "__main__":
    main()
