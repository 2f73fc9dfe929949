"""A run that ends above the untouched base says so; one that its training made worse exits with 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandLine
from peft_study.config import TrainConfig, validate
from peft_study.statistics import Estimate
from peft_study.storage.run_dir import RunFolder
from peft_study.training.finetune import Finished


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """Returns held-out rows that say nothing of what the training rows say: to learn those makes these worse."""
    path = tmp_path / "strange.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "ZQXJK" * (2 + i % 5)}]}
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_it_says_what_it_is(
    cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, strange: Path, tmp_path: Path
) -> None:
    words: tuple[Any, ...] = (
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--max_train_steps", 20),
        *("--use_lora", "--learning_rate", "3e-2", "--dtype", "float32", "--warmup_ratio", 0),
    )
    out = tmp_path / "out"
    ran = cli(*words, "--held_out", strange, "--output_dir", out)
    assert ran.code == 1
    assert ran.err == ""
    last = ran.out.splitlines()[-1]
    assert last.startswith("WARNING: the run ended ")
    assert last.endswith("nats a token above the untouched base: training made the model worse; lower --learning_rate")
    status = RunFolder(out).status()
    assert status is not None
    assert status[0] == "finished"
    assert status[1]
    assert status[1] in last
    assert (out / "adapter" / "adapter_model.safetensors").is_file(), "it can be looked at"

    ran = cli(*words, "--output_dir", tmp_path / "good").ok()
    assert "made the model worse" not in ran.out
    assert RunFolder(tmp_path / "good").status() == ("finished", None)


def finished(before: float, after: float, above: tuple[float, float, float]) -> Finished:
    level = Estimate(before, before - 0.1, before + 0.1), Estimate(after, after - 0.1, after + 0.1)
    values = {"model": {"name": "m"}, "data": {"train": "d"}, "method": {"method": "lora"}, "output": "out"}
    config = validate(TrainConfig, values, where="test")
    return Finished(Path("out"), *level, Estimate(*above), 64, None, None, config, 9, 9, None, 0, 1.0)


def test_only_a_whole_interval_above_zero_counts() -> None:
    assert finished(1.5, 11.3, (9.8, 9.1, 10.5)).worse == (
        "ended 9.8 nats a token above the untouched base: training made the model worse; lower --learning_rate"
    )
    assert finished(1.5, 1.6, (0.1, -0.01, 0.2)).worse is None
    assert finished(1.5, 1.4, (-0.1, -0.2, -0.01)).worse is None
    # one held-out row has no interval
    assert finished(1.5, 9.0, (7.5, float("-inf"), float("inf"))).worse is None


def test_what_began_above_the_base_is_told_another_remedy() -> None:
    """Prefix tuning from random keys begins far above the base, and a short run does not make up for it."""
    said = finished(6.7, 6.4, (4.9, 4.5, 5.2)).worse
    assert said is not None
    assert "it began higher still; start from a text (--prefix_init text, --prompt_init text), or train longer" in said
    assert "lower --learning_rate" not in said
    assert not finished(6.7, 6.4, (4.9, 4.5, 5.2)).harmed
    assert finished(1.5, 11.3, (9.8, 9.1, 10.5)).harmed
