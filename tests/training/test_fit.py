"""What is said of memory before a model is loaded, with the one change that makes it fit."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

import tiny_world as tw
from command_line import CommandLine
from peft_study import Study
from peft_study.config import LoraConfig, ModelConfig, NoneConfig, TrainingConfig
from peft_study.engine.footprint import Footprint
from peft_study.errors import ModelError
from peft_study.training import fit
from peft_study.training.fit import Fit, expected_memory

MB = 2**20
PLAIN = Footprint(trial=100 * MB, virtual=0, constant=100 * MB, a_token=1 * MB)
AGAIN = dataclasses.replace(PLAIN, a_token=0.1 * MB)
FIT = Fit(
    weights={"bfloat16": 1000 * MB, "int8": 600 * MB, "nf4": 400 * MB},
    precision="bfloat16",
    row_tokens=1000,
    max_length=1000,
    free=4000 * MB,
    recompute=False,
    plain={"lora": PLAIN},
    recomputed={"lora": AGAIN},
)
"""1,000 MB of weights, a trial of 100, rows of 100 and 1 a token: 2,200 in all, 1,300 with layers computed again."""


def test_what_fits_is_one_line_with_its_parts() -> None:
    assert FIT.lines() == [
        "memory expected at the peak: 2.15 GiB of 3.91 GiB that are free: the base 1,000 MiB in bfloat16, "
        "a row of 1,000 tokens of lora 1.07 GiB, a trial 100 MiB"
    ]


@pytest.mark.parametrize(
    ("free", "recompute", "said"),
    [
        (2000, False, r"set training.gradient_checkpointing: auto \(then 1.27 GiB\)"),
        (2000, "auto", None),
        (1300, "auto", r"set model.quantization: nf4 \(then 700 MiB\)"),
        (1365, True, "set data.max_length: 256"),
        (1700, False, "set data.max_length: 320"),
        (100, True, "take a smaller base"),
    ],
)
def test_the_one_change_that_makes_it_fit(free: int, recompute: bool | str, said: str | None) -> None:
    found = dataclasses.replace(FIT, free=free * MB, recompute=recompute)
    if said is not None and "max_length" in said:  # where neither a quantised base nor computing again saves anything
        weights = dict.fromkeys(FIT.weights, 1000 * MB)
        found = dataclasses.replace(found, weights=weights, recomputed={"lora": AGAIN if recompute else PLAIN})
    line, *more = found.lines()
    assert ("computed again" in line) == (recompute is not False)
    if said is None:
        assert not more
    else:
        with pytest.raises(ModelError, match=said):
            raise ModelError(*more)
        assert more[0].startswith("WARNING: lora does not fit with examples of 1,000 tokens: ")


def test_a_method_that_trains_the_base_is_offered_no_quantised_one() -> None:
    found = dataclasses.replace(FIT, free=1300 * MB, recompute="auto")
    assert "nf4" in found.change()
    assert "nf4" not in dataclasses.replace(found, quantizable=False).change()


def test_rows_that_will_be_cut_are_said_to_be() -> None:
    found = dataclasses.replace(FIT, max_length=100)
    assert "rows are cut" not in found.lines()[0]
    assert "(rows are cut)" in dataclasses.replace(found, free=1500 * MB).lines()[0]


def test_what_cannot_be_is_refused_before_anything_is_loaded(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    """A folder with the configuration of a model that no machine here holds, and no weights."""
    folder = tmp_path / "huge"
    folder.mkdir()
    for file in tiny_model_folder.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 16_384, "intermediate_size": 65_536, "num_hidden_layers": 126, "head_dim": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    said = r"does not fit into the memory: the base takes \d,\d\d\d GiB in float32, .* are free"
    words = ("--data", tiny_data, "--model", folder, "--output", tmp_path / "out", "--trials", 1, "--steps", 1)
    for ran in (
        cli("run", *words, "--dtype", "float32"),
        cli("finetune", "--model_name_or_path", folder, "--train_file", tiny_data, "--dtype", "float32"),
    ):
        assert ran.code == 2
        assert re.search(said, " ".join((ran.out + ran.err).split())), ran.err
    assert not (tmp_path / "out" / "trials").exists()


def test_init_run_and_dry_run_say_it(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, words = tmp_path / "study.yaml", ("--data", tiny_data, "--model", tiny_model_folder)
    said = "memory expected at the peak:"
    assert said in cli("init", *words, "-o", study).ok().out
    small = ("--trials", 1, "--steps", 1, "--output", tmp_path / "out", "--set", "finals.seeds=1")
    dry = cli("run", study, *small, "--dry-run").ok().out
    assert said in dry
    assert "together" in dry
    assert said not in cli("run", study, *small).ok().out, "too small to be counted"
    monkeypatch.setattr(fit, "_at_most", lambda *_: float("inf"))
    assert said in cli("run", study, *small, "--overwrite").ok().out
    assert said not in cli("run", study, *small).ok().out, "a finished study is only read"
    found = Study.from_yaml(study).memory()
    assert found is not None
    assert list(found.plain) == list(found.recomputed) == ["lora", "prefix_tuning", "prompt_tuning"]


def test_a_mixture_of_experts_is_not_counted_and_not_refused(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    shape = {name: value for name, value in tw.config("llama").to_dict().items() if name in tw._SHAPE}
    MixtralConfig(**shape, num_local_experts=4).save_pretrained(tmp_path)
    found = expected_memory(ModelConfig(name=str(tmp_path)), TrainingConfig(), {"lora": LoraConfig()}, 100, both=True)
    assert found is None or found.fits


def test_what_trains_nothing_takes_nothing(tiny_model_folder: Path) -> None:
    model = ModelConfig(name=str(tiny_model_folder))
    found = expected_memory(model, TrainingConfig(), {"none": NoneConfig()}, None, both=True)
    assert found is not None
    assert found.lines() == []
    assert found.max_length == found.row_tokens


def test_workers_share_the_memory_of_a_cpu(tiny_model_folder: Path) -> None:
    model = ModelConfig(name=str(tiny_model_folder), device="cpu")
    alone, shared = (expected_memory(model, TrainingConfig(), {}, 100, both=True, sharing=count) for count in (1, 4))
    assert alone is not None
    assert shared is not None
    assert alone.free is not None
    assert shared.free == pytest.approx(alone.free / 4, rel=0.1)
