"""`peft-study finetune` under a launcher: two processes share each batch, and the numbers are those of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peft_reference as pr
from command_line import CommandLine

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PROGRAM = ("-m", "peft_study")


def launch(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*TORCHRUN, *PROGRAM, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def numbers(run: Path) -> list[dict[str, Any]]:
    names = ("step", "loss", "gradient_norm", "minus_base", "tokens", "supervised_tokens")
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in names if name in line} for line in lines]


@pytest.fixture
def words(tiny_model_folder: Path, tiny_data: Path) -> tuple[Any, ...]:
    return (
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--dtype", "float32"),
        *("--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 2, "--max_train_steps", 5),
        *("--learning_rate", "1e-3", "--held_out", 7, "--with_tracking", "False"),
    )


@pytest.mark.parametrize("method", [("--use_lora", "--lora_dropout", 0.1), ("--use_prefix_tuning",), ()])
def test_two_processes_train_as_one(
    cli: CommandLine, words: tuple[Any, ...], method: tuple[Any, ...], tmp_path: Path
) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    cli(*words, *method, "--num_processes", 2, "--output_dir", alone).ok()
    ran = launch(*words, *method, "--output_dir", both)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("2 processes share each batch: 3 x 2 x 2 = 12 examples a step") == 1
    assert ran.stdout.count("step 5: held-out loss") == 1, "one process speaks"
    for ours, theirs in zip(numbers(both), numbers(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    name = "adapter_model.safetensors" if method else "model.safetensors"
    ours, theirs = (load_file(run / "adapter" / name) for run in (both, alone))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert pr.relative(ours[key], tensor) < 1e-4, key
    assert {p.name for p in both.iterdir()} == {p.name for p in alone.iterdir()}


def test_the_command_that_one_process_names_trains_on_both_and_they_stop_early_together(
    cli: CommandLine, words: tuple[Any, ...], tmp_path: Path
) -> None:
    high = ("--learning_rate", 0.1, "--lr_scheduler_type", "constant", "--warmup_ratio", 0, "--max_train_steps", 30)
    launched = ("--mixed_precision", "no", "--num_processes", 2, "--use_deepspeed", "finetune_peft.py")
    early = (*launched, *words[1:], *high, "--use_lora", "--early_stopping", 2, "--eval_steps", 1, "--output_dir")
    alone = cli("finetune", *early, tmp_path / "alone").ok()
    (named,) = [line.partition("to use 2 GPUs: ")[2] for line in alone.out.splitlines() if "to use 2 GPUs: " in line]
    torchrun, *command, dots = named.split()
    assert (torchrun, dots) == ("torchrun", "...")
    # --standalone takes a free port: other tests may use the usual one
    starter = [str(Path(sys.executable).with_name(torchrun)), "--standalone", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    whole = [*starter, *map(str, early), str(tmp_path / "both")]
    ran = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "to use 2 GPUs" not in ran.stdout
    ends = [line for line in (*alone.out.splitlines(), *ran.stdout.splitlines()) if line.startswith("stopped at step ")]
    assert len(ends) == 2
    assert ends[0] == ends[1]
    ours, theirs = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("both", "alone"))
    for key, tensor in theirs.items():
        assert pr.relative(ours[key], tensor) < 1e-3, key


def test_two_processes_stop_together_and_go_on(cli: CommandLine, words: tuple[Any, ...], tmp_path: Path) -> None:
    long = (*words, "--use_lora", "--max_train_steps", 60, "--lr_scheduler_type", "constant")
    cli(*long, "--num_processes", 2, "--output_dir", tmp_path / "alone").ok()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*TORCHRUN, *PROGRAM, *map(str, long), "--output_dir", str(tmp_path / "cut")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "cut" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline, process.communicate()
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    status = json.loads((tmp_path / "cut" / "status.json").read_text())
    assert status["status"] == "interrupted"
    (place,) = (tmp_path / "cut" / "checkpoints").iterdir()
    assert 0 < int(place.name.removeprefix("step_")) < 60
    again = launch(*long, "--output_dir", tmp_path / "cut")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("resumes at step") == 1
    ours, theirs = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("cut", "alone"))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-5)


def test_a_mistake_is_a_line_in_each_process_and_no_traceback(words: tuple[Any, ...], tmp_path: Path) -> None:
    ran = launch(*words, "--use_lora", "--train_file", tmp_path / "nope.jsonl", "--output_dir", tmp_path / "out")
    assert ran.returncode != 0
    lines = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert any("nope.jsonl: no such file" in line for line in lines)
    assert all("nope.jsonl" in line or "another process of this run ended" in line for line in lines)
    assert "peft_study/engine" not in ran.stderr, "a traceback of ours"
    assert not (tmp_path / "out").exists()
