"""How many trials fit, by a probe row."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import tiny_world as tw
from peft_study.config import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from peft_study.engine import memory
from peft_study.engine.engine import Engine
from peft_study.errors import ModelError
from peft_study.methods import create


def test_slots_are_what_is_free_less_activations_and_margin_over_the_dearest() -> None:
    base = tw.base()
    engine = Engine(base, row_tokens=200)
    configs = (PromptTuningConfig(tokens=3, init="random"), LoraConfig(rank=16), PrefixTuningConfig(init="zero"))
    adapters = [create(config, base, None, 0) for config in configs]
    numbers = [sum(p.numel() for p in a.parameters().values()) for a in adapters]
    with patch.object(memory, "available", lambda _device: 50_000_000):
        found = memory.probe(engine, adapters, tw.examples([30, 40, 50]))
    assert found.slot == 16 * max(numbers)
    assert found.free == 50_000_000
    assert found.fits == (45_000_000 - found.activations) // found.slot
    assert found.activations >= 0
    assert all(p.grad is None for a in adapters for p in a.parameters().values()), "the probe left gradients behind"
    assert engine.trials == ()


def test_too_little_memory_still_gives_a_slot() -> None:
    base = tw.base()
    with patch.object(memory, "available", lambda _device: 1000):
        found = memory.probe(Engine(base), [create(LoraConfig(), base, None, 0)], tw.examples([30]))
    assert found.fits == 1


def test_a_row_that_does_not_fit_is_halved_before_anything_is_settled() -> None:
    base = tw.base()
    engine = Engine(base, row_tokens=200)
    whole, rows = engine.runner.row, list[int]()

    def row(items):  # type: ignore[no-untyped-def]
        rows.append(sum(item.row_length for item in items))
        if rows[-1] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(items)

    engine.runner.row = row  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="rows are cut from"):
        memory.probe(engine, [create(LoraConfig(), base, None, 0)], tw.examples([30]))
    assert engine.row_tokens == 50
    assert [length > 60 for length in rows] == [True, True, False]


def test_all_weights_that_do_not_fit_are_refused_before_they_are_copied() -> None:
    base = tw.base()
    said = r"full fine-tuning needs 0\.0 GB of memory beside the base, 0\.0 GB are free"
    with patch.object(memory, "available", lambda _device: 400_000), pytest.raises(ModelError, match=said):
        memory.refuse_all_weights(base)
    # 25,760 float32 weights: kept once more, with a master, a gradient and two moments of four bytes each
    with patch.object(memory, "available", lambda _device: 25_760 * 20 / 0.9 + 1):
        memory.refuse_all_weights(base)
    with patch.object(memory, "available", lambda _device: None):
        memory.refuse_all_weights(base)


def test_free_memory_is_the_systems_and_a_containers_limit_counts(tmp_path: Path) -> None:
    free = memory.available(torch.device("cpu"))
    if free is None:
        pytest.skip("this system has no /proc/meminfo")
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    assert free <= int(line.split()[1]) * 1024 * 1.1
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    with patch.object(memory, "CGROUP", tmp_path):
        assert memory.available(torch.device("cpu")) == 2_000_000
        (tmp_path / "memory.max").write_text("max\n")
        assert memory.available(torch.device("cpu")) == pytest.approx(free, rel=0.2)


def test_the_peak_of_a_block_is_seen() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not let the high-water mark be reset")
    with memory._peak(torch.device("cpu")) as before:
        torch.ones(1000)
    with memory._peak(torch.device("cpu")) as peak:
        torch.ones(50_000_000)  # 200 MB, freed at once
    assert before[0] < 50_000_000
    assert 150_000_000 < peak[0] < 300_000_000
