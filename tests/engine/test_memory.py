"""How many trials fit, by a probe row."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import tiny_world as tw
from peft_study.config import (
    FullConfig,
    LoraConfig,
    MethodConfig,
    NoneConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from peft_study.engine import memory
from peft_study.engine.engine import Engine
from peft_study.errors import ModelError
from peft_study.methods import create
from peft_study.methods.registry import size

KINDS: dict[str, MethodConfig] = {
    "lora": LoraConfig(rank=16),
    "lora, two layers": LoraConfig(rank=3, target_modules=("q_proj", "down_proj")),
    "prefix": PrefixTuningConfig(tokens=7, init="zero"),
    "prefix, text": PrefixTuningConfig(tokens=7),
    "prefix, projected": PrefixTuningConfig(tokens=7, init="random", projection=True, projection_hidden=5),
    "prompt": PromptTuningConfig(tokens=3, init="random"),
    "full": FullConfig(),
    "none": NoneConfig(),
}


@pytest.mark.parametrize("family", ["llama", "granite"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_setting_trains_is_known_without_making_it(kind: str, family: str) -> None:
    base = tw.base(family, dtype=torch.bfloat16)
    adapter = create(KINDS[kind], base, tw.material(), 0)
    found = size(KINDS[kind], base)
    assert found.trained == sum(p.numel() for p in adapter.parameters().values())
    assert (found.row_tokens, found.prefix_tokens) == (adapter.row_tokens, adapter.prefix_tokens)


def test_slots_are_what_is_free_less_activations_and_margin_over_what_one_keeps() -> None:
    found = memory.measured(50_000_000, 3_000_000, 40_000)
    assert found.fits == (45_000_000 - 3_000_000) // 40_000
    assert memory.measured(1000, 3_000_000, 40_000).fits == 1, "too little memory still gives a slot"
    assert memory.measured(None, 3_000_000, 40_000).fits is None


def test_the_probe_leaves_nothing_behind() -> None:
    engine = Engine(tw.base(), row_tokens=200)
    adapter = create(LoraConfig(rank=16), engine.base, None, 0)
    assert memory.probe(engine, adapter, tw.examples([30, 40, 50])) >= 0
    assert all(p.grad is None for p in adapter.parameters().values())
    assert engine.trials == ()


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
        memory.probe(engine, create(LoraConfig(), base, None, 0), tw.examples([30]))
    assert engine.row_tokens == 50
    assert [length > 60 for length in rows] == [True, True, False]


def test_all_weights_that_do_not_fit_are_refused_before_they_are_copied() -> None:
    engine = Engine(tw.base())
    said = r"full fine-tuning needs 0\.0 GB of memory beside the base, 0\.0 GB are free; leave it out"
    with pytest.raises(ModelError, match=said):
        memory.Room(engine, free=400_000).refuse(FullConfig(), 10)
    # 25,760 float32 weights: kept once more, with a master, a gradient and two moments of four bytes each
    room = memory.Room(engine, free=10**9)
    assert room.slot(FullConfig()) == 25_760 * 20
    exactly = (25_760 * 20 + room.row(FullConfig(), 10)) / 0.9
    memory.Room(engine, free=int(exactly) + 1).refuse(FullConfig(), 10)
    with pytest.raises(ModelError, match="a row of 10 tokens"):
        memory.Room(engine, free=int(exactly) - 10).refuse(FullConfig(), 10)
    with patch.object(memory, "available", lambda _device: None):
        memory.Room(engine).refuse(FullConfig(), 10)


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        (LoraConfig(rank=10**7), "lora of rank 10,000,000 needs .* use a lower rank, or fewer target_modules"),
        (PrefixTuningConfig(tokens=10**7), "prefix_tuning of 10,000,000 tokens needs .*use fewer tokens"),
        (PromptTuningConfig(tokens=10**7), "prompt_tuning of 10,000,000 tokens needs .*use fewer tokens"),
        (PromptTuningConfig(tokens=10**6), r"GB of it for a row of 1,000,010 tokens.*fewer tokens, a lower max_length"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_with_the_numbers(method: MethodConfig, remedy: str) -> None:
    with pytest.raises(ModelError, match=rf"{remedy}") as raised:
        memory.Room(Engine(tw.base()), free=1 << 30).refuse(method, 10)
    assert "1.0 GB are free" in str(raised.value)


ROW = """
import sys, tiny_world as tw
from peft_study.config import LoraConfig, PromptTuningConfig
from peft_study.engine import memory
from peft_study.engine.engine import Engine
from peft_study.methods import create
method, recomputes = eval(sys.argv[1])
engine = Engine(tw.base(), row_tokens=60_000, gradient_checkpointing=recomputes)
took = memory.probe(engine, create(method, engine.base, None, 0), tw.examples([100] * 50))
print(memory.Room(engine, free=1 << 40).row(method, 60_000) / took)
"""


@pytest.mark.parametrize(
    "case", ["LoraConfig(rank=16), False", "LoraConfig(rank=16), True", "PromptTuningConfig(init='random'), False"]
)
def test_a_rows_estimate_is_no_more_than_it_takes_and_not_much_less(case: str) -> None:
    """In a process of its own: here, a row may take memory that an earlier one left to the process."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not let the high-water mark be reset")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", ROW, case], env=environment, capture_output=True, text=True, check=True)
    assert 0.05 < float(ran.stdout) < 1.1


def test_rows_that_are_known_not_to_fit_are_cut_before_they_are_tried() -> None:
    engine = Engine(tw.base(), row_tokens=10**9)
    room = memory.Room(engine, free=10**8)
    with pytest.warns(UserWarning, match=r"rows of 1,000,000,000 tokens do not fit into the 0\.1 GB"):
        room.cut_rows([LoraConfig(rank=2), NoneConfig()])
    assert 1000 < engine.row_tokens < 100_000
    settled = engine.row_tokens
    room.cut_rows([LoraConfig(rank=2)])
    assert engine.row_tokens == settled


def test_layers_are_computed_again_where_rows_do_not_fit_without() -> None:
    """With gradient_checkpointing: auto, and only there; not where a row has to be cut a little."""
    engine = Engine(tw.base(), row_tokens=1000)
    needs = memory.Room(engine, free=10**9).row(LoraConfig(rank=2), 1000)
    little, much = (memory.Room(engine, free=int(needs * share), recomputes=True) for share in (0.6, 0.2))
    with pytest.warns(UserWarning, match="are cut to"):
        little.cut_rows([LoraConfig(rank=2)])
    assert not engine.recomputes
    assert engine.row_tokens < 1000
    engine.row_tokens = 1000
    with pytest.warns(UserWarning, match="layers are computed again"):
        much.cut_rows([LoraConfig(rank=2)])
    assert engine.recomputes
    never = Engine(tw.base(), row_tokens=1000)
    with pytest.warns(UserWarning, match="are cut to"):
        memory.Room(never, free=int(needs * 0.2)).cut_rows([LoraConfig(rank=2)])
    assert not never.recomputes


def test_a_setting_that_fits_with_layers_computed_again_is_not_refused() -> None:
    engine = Engine(tw.base())
    free = round(memory.Room(engine, free=10**9).need(LoraConfig(rank=2), 4000) * 0.8)
    with pytest.raises(ModelError, match="a row of 4,000 tokens"):
        memory.Room(engine, free=free).refuse(LoraConfig(rank=2), 4000)
    with pytest.warns(UserWarning, match="layers are computed again"):
        memory.Room(engine, free=free, recomputes=True).refuse(LoraConfig(rank=2), 4000)
    assert engine.recomputes


def test_workers_on_one_memory_share_what_is_left_beside_a_base_of_each() -> None:
    engine = Engine(tw.base())
    own = memory.resident("VmRSS")
    with patch.object(memory, "available", lambda _device: 10 * 2**30):
        alone, shared = memory.Room(engine).free, memory.Room(engine, sharing=4).free
    assert alone == 10 * 2**30
    assert own is not None
    assert shared == pytest.approx((10 * 2**30 - 3 * own) / 4, rel=0.05)


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
        (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 300000\nactive_file 200000\n")
        assert memory.available(torch.device("cpu")) == 2_300_000, "files that are read again when they are needed"
        (tmp_path / "memory.max").write_text("max\n")
        assert memory.available(torch.device("cpu")) == pytest.approx(free, rel=0.2)


def test_what_a_row_takes_does_not_depend_on_what_was_asked_before() -> None:
    one, all_layers = LoraConfig(rank=2, target_modules=("q_proj",)), LoraConfig(rank=2)
    alone = memory.Room(Engine(tw.base()), free=10**9).row(one, 1000)
    room = memory.Room(Engine(tw.base()), free=10**9)
    assert room.row(all_layers, 1000) > alone
    assert room.row(one, 1000) == alone


def test_the_peak_of_a_block_is_seen() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not let the high-water mark be reset")
    with memory.peak_above(torch.device("cpu")) as before:
        torch.ones(1000)
    with memory.peak_above(torch.device("cpu")) as peak:
        torch.ones(50_000_000)  # 200 MB, freed at once
    assert before[0] < 50_000_000
    assert 150_000_000 < peak[0] < 300_000_000
