"""What settings take of memory, counted on a base without weights, against bases with weights and measured peaks."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tiny_world as tw
from peft_study.config import FullConfig, LoraConfig, MethodConfig, PrefixTuningConfig, PromptTuningConfig
from peft_study.engine import footprint
from peft_study.engine.engine import Engine
from peft_study.engine.footprint import Footprint, count
from peft_study.engine.memory import trial_bytes
from peft_study.engine.row import Item, RowRunner
from peft_study.methods import create
from peft_study.methods.reference import NoAdapter
from peft_study.model.cpu import causal
from peft_study.model.load import Base, wrap
from peft_study.model.precision import Placement
from peft_study.model.weightless import Outline, outline_of
from peft_study.storage.cache_dir import cache_root

METHODS: dict[str, MethodConfig] = {
    "lora": LoraConfig(rank=16),
    "lora with dropout": LoraConfig(rank=16, dropout=0.1),
    "prefix": PrefixTuningConfig(tokens=7, init="random"),
    "prefix, projected": PrefixTuningConfig(tokens=7, init="random", projection=True, projection_hidden=5),
    "prompt": PromptTuningConfig(tokens=9, init="random"),
    "full": FullConfig(),
}


def base_of_layers(layers: int, family: str = "llama") -> Base:
    config = tw.config(family)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * layers
    model = type(tw.model(family))(config).to(torch.bfloat16)
    return wrap(model, None, Placement(torch.device("cpu"), torch.bfloat16), path="layers")


@pytest.mark.parametrize("family", tw.FAMILIES)
def test_weights_and_trials_are_those_of_a_base_that_is_loaded(family: str) -> None:
    base, methods = base_of_layers(5, family), METHODS if family == "llama" else {"lora": LoraConfig(rank=16)}
    found = count(outline_of(base), methods, recompute=False)
    assert found.weights["bfloat16"] == sum(parameter.nbytes for parameter in base.model.parameters())
    for name, method in methods.items():
        assert found.methods[name].trial == trial_bytes(method, base), name


def live_bytes(base: Base, method: MethodConfig, *, recompute: bool) -> int:
    """Returns the bytes that live at the peak of a real row of two examples, by the same count."""
    engine, adapter = Engine(base, gradient_checkpointing=recompute), create(method, base, None, 0)
    return footprint._peak(engine, adapter, 2)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["lora", "lora with dropout", "prefix", "prompt"])
def test_a_row_without_weights_holds_what_a_row_with_weights_does(
    name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one and two layers tell what five hold."""
    monkeypatch.setattr(footprint, "_SHARE", 1.0)
    monkeypatch.setattr(footprint, "_CONSTANT", 0)
    monkeypatch.setenv("PEFT_STUDY_CACHE", str(cache_root() / "bare"))
    base, method = base_of_layers(5), METHODS[name]
    found = count(outline_of(base), {name: method}, recompute=recompute).methods[name]
    kept = footprint.size(method, base).kept
    assert found.row(2 * (256 + found.virtual)) == pytest.approx(
        live_bytes(base, method, recompute=recompute) - kept, rel=0.03
    )


def test_layers_computed_again_hold_less() -> None:
    outline = outline_of(base_of_layers(5))
    plain, again = (count(outline, METHODS, recompute=recompute).methods for recompute in (False, True))
    for name in METHODS:
        assert again[name].a_token < 0.5 * plain[name].a_token, name
        assert again[name].trial == plain[name].trial


def test_the_masks_of_dropout_are_counted_for_a_card_that_is_not_there() -> None:
    outline = outline_of(base_of_layers(5))
    card = Outline(outline.config, outline.make, Placement(torch.device("cuda"), torch.bfloat16), outline.proof)
    methods: dict[str, MethodConfig] = {"none": LoraConfig(), "some": LoraConfig(dropout=0.1)}
    plain, again = (count(card, methods, recompute=recompute).methods for recompute in (False, True))
    inputs = 6 * tw.config("llama").hidden_size + tw.config("llama").intermediate_size  # of a layer's seven products
    assert plain["some"].a_token - plain["none"].a_token == pytest.approx(5 * inputs, rel=0.1)
    assert again["some"].a_token - again["none"].a_token < 3 * inputs


def test_what_was_counted_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_STUDY_CACHE", str(tmp_path))
    outline = outline_of(base_of_layers(2))
    first = count(outline, {"lora": LoraConfig()}, recompute=False)
    (kept,) = (tmp_path / "footprints").iterdir()
    changed = json.loads(kept.read_text())
    changed["methods"]["lora"]["trial"] = 7
    kept.write_text(json.dumps(changed))
    assert count(outline, {"lora": LoraConfig()}, recompute=False).methods["lora"].trial == 7
    for damaged in ("{half", "{}", '{"weights": {}, "methods": {"lora": {"of": 1}}}'):
        kept.write_text(damaged)
        assert count(outline, {"lora": LoraConfig()}, recompute=False) == first
    assert count(outline, {"lora": LoraConfig(rank=1)}, recompute=False).methods["lora"] != first.methods["lora"]


def test_what_was_counted_leaves_nothing_for_rows_that_have_numbers() -> None:
    """Masks are kept from row to row: one without numbers would mask nothing."""

    def loss(base: Base) -> list[float]:
        with (
            torch.no_grad(),
            RowRunner(base).row([Item(0, NoAdapter(), example) for example in tw.examples([256])]) as row,
        ):
            return row.item_losses

    base = base_of_layers(2)
    causal._bias.cache_clear()
    expected = loss(base)
    causal._bias.cache_clear()
    methods: dict[str, MethodConfig] = {"lora": LoraConfig(rank=3), "prefix": PrefixTuningConfig(tokens=7, init="zero")}
    assert len(count(outline_of(base), methods, recompute=False).methods) == 2
    assert loss(base) == expected


def test_a_method_that_does_not_fit_the_model_is_left_out() -> None:
    outline = outline_of(base_of_layers(2))
    methods = {"lora": LoraConfig(), "other": LoraConfig(target_modules=("no_such",))}
    assert list(count(outline, methods, recompute=False).methods) == ["lora"]


def test_lists_by_layer_are_cut_and_the_configuration_stays() -> None:
    base = tw.base("gemma3")
    before = copy.deepcopy(base.model.config)
    with outline_of(base).base(1) as one:
        assert one.layers == 1
        assert one.model.config.layer_types == ["sliding_attention"]
    assert base.model.config == before


def test_settings_beyond_all_bounds_are_counted_at_once() -> None:
    methods: dict[str, MethodConfig] = {
        "lora": LoraConfig(rank=10**8),
        "prefix": PrefixTuningConfig(tokens=10**8),
        "prompt": PromptTuningConfig(tokens=10**8),
    }
    started = time.process_time()
    found = count(outline_of(base_of_layers(2)), methods, recompute=False).methods
    assert time.process_time() - started < 20
    assert all(footprint.trial > 10**9 for footprint in found.values())


def test_a_footprint_is_linear_in_tokens() -> None:
    assert Footprint(trial=5, virtual=2, constant=100.0, a_token=3.5).row(10) == 135


def test_nothing_of_a_row_is_computed() -> None:
    """A base of a size that no memory here would hold."""
    config = tw.config("llama")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 16_384, 65_536, 100
    config.head_dim, config.num_attention_heads, config.num_key_value_heads = 128, 128, 8
    small = outline_of(tw.base())
    found = count(Outline(config, small.make, small.placement, small.proof), {"lora": LoraConfig()}, recompute=False)
    assert 1.2e12 < found.weights["float32"] < 1.6e12
    assert found.methods["lora"].row(1024) > 1e11


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning"])
def test_the_memory_of_smollm2_is_what_was_expected(method: str) -> None:
    """Within 15 % of the measured peak: beside the base, and the whole process."""
    script = Path(__file__).parents[2] / "benchmarks" / "fit.py"
    command = [sys.executable, script, "--one", "--models", "smollm2-135m-instruct", "--methods", method]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    for part in ("beside", "whole"):
        assert found[f"{part}_expected"] == pytest.approx(found[f"{part}_measured"], rel=0.15), (part, found)
