"""Every method on a quantised base: the same numbers as PEFT on the same base (for LoRA: QLoRA)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import peft_reference as pr
import tiny_world as tw
from peft_study.config import FullConfig, PromptTuningConfig
from peft_study.engine.footprint import count
from peft_study.engine.row import Item, RowRunner
from peft_study.errors import ModelError
from peft_study.methods import create
from peft_study.model import load
from peft_study.model.precision import Placement
from peft_study.model.weightless import outline_of

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    # 4-bit blocks hold 64 numbers, so every layer must be wider than that
    monkeypatch.setitem(tw._SHAPE, "hidden_size", 128)
    monkeypatch.setitem(tw._SHAPE, "intermediate_size", 128)
    monkeypatch.setitem(tw._SHAPE, "head_dim", 64)
    tw.model("llama").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def quantised(folder: str, monkeypatch: pytest.MonkeyPatch, quantization: str = "nf4") -> load.Base:
    monkeypatch.setattr(load, "load_tokenizer", lambda *_a, **_k: None)
    placement = Placement(torch.device("cpu"), torch.float32)
    return load.load_base(folder, placement=placement, quantization=quantization)


CONFIGS = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
}


# int8 rounds what enters a layer: where two attentions differ in the last bit, it may round the other way
TOLERANCE = {"nf4": 1e-5, "int8": 3e-2}


@pytest.mark.parametrize("quantization", CONFIGS)
@pytest.mark.parametrize("method", ["lora", "prefix, random", "prefix, text", "prompt, random"])
def test_every_method_on_a_quantised_base_equals_peft(
    method: str, quantization: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, config, examples = quantised(folder, monkeypatch, quantization), pr.METHODS[method], tw.examples([12, 9, 17])
    assert base.quantization == quantization
    assert base.parameter_count() == tw.base("llama").parameter_count()
    adapter = pr.adapter_of(config, base)
    loss, gradients = pr.ours(base, adapter, examples)
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=CONFIGS[quantization], attn_implementation="eager"
    )
    their_loss, theirs = pr.Reference(plain, config, adapter).gradients(examples)
    assert loss == pytest.approx(their_loss, rel=TOLERANCE[quantization] / 10)
    assert pr.worst(gradients, theirs) < TOLERANCE[quantization]


@pytest.mark.parametrize("quantization", CONFIGS)
def test_a_token_of_a_quantised_base_does_not_depend_on_its_neighbours(
    quantization: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a neighbour has outliers, which LLM.int8 would take out of the whole row."""
    base = quantised(folder, monkeypatch, quantization)
    adapter, sick = pr.adapter_of(pr.METHODS["lora"], base), create(PromptTuningConfig(init="random"), base, None, 0)
    with torch.no_grad():
        sick.parameters()["embeddings"].zero_()[:, 0] = 1e4  # one number of each vector is all that its norm leaves
    first, second = tw.examples([12, 9])
    losses = []
    for items in ([Item(0, adapter, first)], [Item(0, adapter, first), Item(1, sick, second)]):
        with torch.no_grad(), RowRunner(base).row(items) as result:
            losses.append(result.item_losses[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("quantization", CONFIGS)
def test_the_bytes_of_quantised_weights_are_what_was_counted(
    quantization: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = quantised(folder, monkeypatch, quantization)
    scales = 0
    for module in base.model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            scales += state.absmax.nbytes + state.state2.absmax.nbytes
    found = count(outline_of(tw.base("llama")), {}, recompute=False).weights[quantization]
    assert found == pytest.approx(sum(p.nbytes for p in base.model.parameters()) + scales, rel=0.02)


@pytest.mark.parametrize("quantization", CONFIGS)
def test_full_fine_tuning_refuses_codes(quantization: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="quantised"):
        create(FullConfig(), quantised(folder, monkeypatch, quantization), None, 0)
