"""Many trials on one base: fused in one engine against one after another; their memory; how many fit.

    python benchmarks/many_trials.py                                            # 8 LoRA trials of 128 tokens a step
    python benchmarks/many_trials.py --model llama-1b --trials 16 --step-tokens 512 --variants equal unequal mixed
    python benchmarks/many_trials.py --model llama-8b --parts slots             # on a GPU

Speed: every round runs the same trials fused, and alone one after another: in our engine with each of the row lengths
of --solo-rows, and (equal trials) with peft in a plain loop. The denominator is the fastest of those; the row names it.
Memory: peak of one process with N trials against N times that of a process with one (--parts memory).
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Rows, arguments, median, synchronize
from peers import LEARNING_RATE, PeftLoop
from worlds import METHODS, MODELS, World, adapter_of, examples_of_length, open_world, vocabulary_of

from peft_study.config import LoraConfig, MethodConfig, PrefixTuningConfig, PromptTuningConfig, TrainingConfig
from peft_study.data.conversation import Example
from peft_study.engine.engine import Engine
from peft_study.engine.trial import Trial
from peft_study.methods import Adapter
from peft_study.model.load import Base
from peft_study.storage.environment import peak_memory

Setting = tuple[MethodConfig, int]
"""A method and the tokens of an optimizer step."""


def settings_of(variant: str, count: int, step_tokens: int) -> list[Setting]:
    """Returns the trials of a variant: equal LoRAs; very different ranks and batches; three methods."""
    if variant == "equal":
        return [(METHODS["lora"], step_tokens)] * count
    if variant == "unequal":
        ranks = (4, 8, 16, 32, 64, 128)
        # batches from a quarter to twice the size
        sizes = [max(1, step_tokens * share // 4) for share in (1, 2, 4, 8)]
        return [(LoraConfig(rank=ranks[i % 6], alpha=2 * ranks[i % 6]), sizes[i % 4]) for i in range(count)]
    assert variant == "mixed", variant
    methods: tuple[MethodConfig, ...] = (
        LoraConfig(rank=16, alpha=32),
        PrefixTuningConfig(tokens=30, init="zero"),
        PromptTuningConfig(tokens=8, init="random"),
    )
    return [(methods[i % 3], step_tokens) for i in range(count)]


_ENGINES: weakref.WeakKeyDictionary[Any, dict[int | None, Engine]] = weakref.WeakKeyDictionary()


def engines_of(base: Base) -> dict[int | None, Engine]:
    """Returns the engines of a base by row length: each leaves hooks on the model, so there is one of each."""
    return _ENGINES.setdefault(base.model, {})


class Crowd:
    """Trials that can be run fused or alone, again and again.

    Args:
        base: the model.
        settings: of each trial.
        length: tokens an example; a step takes as many as its tokens hold.
    """

    def __init__(self, base: Base, settings: Sequence[Setting], length: int) -> None:
        self._base, self._engines, self._length = base, engines_of(base), length
        self._settings: list[Setting] = []
        self._adapters: list[Adapter] = []
        self._lengths: list[int] = []
        self._batches: list[int] = []
        self._examples: list[list[Example]] = []
        self.add(settings)

    def __len__(self) -> int:
        return len(self._adapters)

    def add(self, settings: Sequence[Setting]) -> None:
        """Adds trials of these settings."""
        for config, tokens in settings:
            size = min(self._length, tokens)
            self._settings.append((config, tokens))
            self._lengths.append(size)
            self._batches.append(max(1, tokens // size))
            self._examples.append(examples_of_length(self._batches[-1], size, vocabulary_of(self._base)))
            self._adapters.append(adapter_of(config, self._base, len(self._adapters)))

    def keep(self, count: int) -> None:
        """Takes all but the first trials out again."""
        for things in (self._settings, self._lengths, self._batches, self._examples, self._adapters):
            del things[count:]

    def trials(self, steps: int) -> list[Trial]:
        """Returns fresh trials of the same adapters."""
        return [
            Trial(f"trial {i}", adapter, TrainingConfig(learning_rate=LEARNING_RATE, steps=steps, batch_size=batch), e)
            for i, (adapter, batch, e) in enumerate(zip(self._adapters, self._batches, self._examples, strict=True))
        ]

    def tokens(self, steps: int) -> int:
        """Returns the data tokens of all trials' steps."""
        return steps * sum(b * size for b, size in zip(self._batches, self._lengths, strict=True))

    def fused(self, steps: int, row_tokens: int | None) -> float:
        """Returns the seconds of all trials side by side."""
        return self._run(self.trials(steps), row_tokens)

    def alone(self, steps: int, row_tokens: int | None) -> float:
        """Returns the seconds of the trials one after another."""
        return sum(self._run([trial], row_tokens) for trial in self.trials(steps))

    def peft_alone(self, world: World, steps: int) -> Callable[[], float]:
        """Returns a function that gives the seconds of the trials as plain loops; all must be of one setting.

        One trial is timed and counted for each of them: their work is the same.
        """
        config, _ = self._settings[0]
        examples, batch = self._examples[0] * steps, self._batches[0]
        loop = PeftLoop(world.model(), config, self._adapters[0], examples, batch)
        return lambda: len(self._settings) * loop.run().seconds

    def _run(self, trials: Sequence[Trial], row_tokens: int | None) -> float:
        engine = self._engines.get(row_tokens) or Engine(self._base, row_tokens=row_tokens)
        self._engines[row_tokens] = engine
        try:
            for trial in trials:
                engine.admit(trial)
            synchronize(self._base.device)
            started = time.perf_counter()
            while engine.trials:
                engine.step()
                for trial in [trial for trial in engine.trials if trial.finished]:
                    engine.evict(trial)
            synchronize(self._base.device)
            return time.perf_counter() - started
        finally:
            for trial in engine.trials:  # where memory ended
                engine.evict(trial)


def speed(world: World, options: argparse.Namespace, variant: str) -> None:
    """Measures one variant, fused and alone in turn, and writes its rows."""
    base = world.base()
    crowd = Crowd(base, settings_of(variant, options.trials, options.step_tokens), options.length)
    rows = Rows(options, part="speed", variant=variant, **_facts(world, options))
    tokens = crowd.tokens(options.steps)
    ways: dict[str, Callable[[], float]] = {"fused": lambda: crowd.fused(options.steps, options.row_tokens)}
    for rows_of in options.solo_rows:
        ways[f"alone, rows of {rows_of}"] = partial(crowd.alone, options.steps, rows_of)
    if variant == "equal":
        ways["alone, peft in a plain loop"] = crowd.peft_alone(world, options.steps)
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(options.rounds + 1):  # the first one warms up
        for way, run in ways.items():
            found = tokens / run()
            if number:
                speeds[way].append(found)
                rows.add(row="round", way=way, round=number, tokens_per_second=round(found, 1))
    medians = {way: median(found) for way, found in speeds.items()}
    fastest = max((way for way in ways if way != "fused"), key=lambda way: medians[way])
    rows.add(
        row="median",
        rounds=options.rounds,
        fused=medians["fused"],
        alone=medians[fastest],
        fastest_alone=fastest,
        ratio=round(medians["fused"] / medians[fastest], 3),
    )


def memory(world: World, options: argparse.Namespace) -> None:
    """Compares one process of N trials with N processes of one, each in a process of its own."""
    rows = Rows(options, part="memory", **_facts(world, options))
    found = {count: _peak_of_process(options, count) for count in (0, 1, options.trials)}
    for count, peak in found.items():
        rows.add(row="process", process_trials=count, peak_gib=round(peak / 2**30, 3))
    together, apart = found[options.trials], options.trials * found[1]
    rows.add(
        row="memory",
        together_gib=round(together / 2**30, 3),
        apart_gib=round(apart / 2**30, 3),
        share=round(together / apart, 3),
    )


def _peak_of_process(options: argparse.Namespace, count: int) -> int:
    words = [sys.executable, __file__, "--parts", "peak", "--trials", count, "--model", options.model]
    words += ["--device", options.device, "--step-tokens", options.step_tokens, "--length", options.length]
    ran = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip().splitlines()[-1])
    return int(json.loads(ran.stdout.splitlines()[-1])["peak"])


def peak(world: World, options: argparse.Namespace) -> None:
    """Runs the trials for three steps in this process and prints its peak memory; 0 trials: the loaded base alone."""
    base = world.base()
    if options.trials:
        Crowd(base, settings_of("equal", options.trials, options.step_tokens), options.length).fused(3, None)
    print(json.dumps({"peak": _own_peak(base.device)}))


def _own_peak(device: torch.device) -> int:
    """Returns the peak memory of this process in bytes.

    On Linux, getrusage reports at least what the parent held when it started this process; VmHWM is this one's own.
    """
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return peak_memory(device)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def slots(world: World, options: argparse.Namespace) -> None:
    """Adds LoRA trials, as many again each time, until memory ends, then fewer at a time; each takes two steps."""
    rows = Rows(options, part="slots", **_facts(world, options))
    base = world.base()
    crowd, more, ended = Crowd(base, [], options.length), 1, False
    while more and len(crowd) + more <= options.most_slots:
        before, fits = len(crowd), True
        try:
            crowd.add(settings_of("equal", more, options.step_tokens))
            taken = crowd.fused(2, options.row_tokens)
            rows.add(row="slots", slots=len(crowd), fits=True, seconds=round(taken, 2), peak_gib=_gib(base.device))
        except torch.OutOfMemoryError:
            fits, ended = False, True
            rows.add(row="slots", slots=before + more, fits=False)
        if not fits:  # outside the handler, whose traceback holds tensors
            crowd.keep(before)
            gc.collect()
            torch.cuda.empty_cache()
        more = more // 2 if ended else min(len(crowd), max(1, options.most_slots - len(crowd)))
    rows.add(row="most", slots=len(crowd), memory_ended=ended, peak_gib=_gib(base.device))


def _gib(device: torch.device) -> float:
    return round(peak_memory(device) / 2**30, 3)


def _facts(world: World, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": world.name,
        "device": world.placement.device.type,
        "dtype": world.placement.dtype_name,
        "trials": options.trials,
        "step_tokens": options.step_tokens,
        "length": options.length,
    }


def main(words: list[str] | None = None) -> None:
    """Runs the parts asked for."""
    parser = arguments(__doc__, "many_trials")
    parser.add_argument("--model", default=MODELS[0], choices=MODELS)
    parser.add_argument("--parts", nargs="+", default=["speed", "memory"], choices=["speed", "memory", "slots", "peak"])
    parser.add_argument("--variants", nargs="+", default=["equal"], choices=["equal", "unequal", "mixed"])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--step-tokens", type=int, default=128, help="tokens an optimizer step of each trial")
    parser.add_argument("--length", type=int, default=64, help="tokens an example")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each trial in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--row-tokens", type=int, help="of the fused rows; the engine's default where not given")
    parser.add_argument(
        "--solo-rows", nargs="+", type=int, default=[1024], help="row lengths to try alone; the best one counts"
    )
    parser.add_argument("--most-slots", type=int, default=1024, help="slots are not counted beyond this")
    options = parser.parse_args(words)
    world = open_world(options.model, options.device)
    for part in options.parts:
        if part == "speed":
            for variant in options.variants:
                speed(world, options, variant)
        else:
            {"memory": memory, "slots": slots, "peak": peak}[part](world, options)


if __name__ == "__main__":
    main()
