"""LoRA on a 4-bit base (QLoRA): the same numbers as PEFT on the same base."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tiny_world as tw
from peft_study.config import FullConfig, LoraConfig
from peft_study.engine.row import Item, RowRunner
from peft_study.errors import ModelError
from peft_study.methods import create
from peft_study.model import load
from peft_study.model.precision import Placement

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    # 4-bit blocks hold 64 numbers, so every layer must be wider than that
    monkeypatch.setitem(tw._SHAPE, "hidden_size", 128)
    monkeypatch.setitem(tw._SHAPE, "intermediate_size", 128)
    monkeypatch.setitem(tw._SHAPE, "head_dim", 64)
    tw.model("llama").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def quantised(folder: str, monkeypatch: pytest.MonkeyPatch) -> load.Base:
    monkeypatch.setattr(load, "load_tokenizer", lambda *_a, **_k: None)
    placement = Placement(torch.device("cpu"), torch.float32)
    return load.load_base(folder, placement=placement, quantization="nf4")


def test_lora_on_nf4_equals_peft(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = quantised(folder, monkeypatch)
    assert base.quantization == "nf4"
    assert base.parameter_count() == tw.base("llama").parameter_count()
    adapter = create(LoraConfig(rank=4, alpha=8), base, None, 0)
    ours = adapter.parameters()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ours.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    examples = tw.examples([12, 9, 17])
    count = sum(int(e.supervised_L.sum()) for e in examples)
    with RowRunner(base).row([Item(0, adapter, e, 1 / count) for e in examples]) as result:
        result.total.backward()

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, attn_implementation="eager"
    )
    plain.train()  # in eval mode its CPU kernel has no gradient, and says nothing
    reference = peft.get_peft_model(
        plain, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    )
    theirs = {}
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            own = name.removeprefix("base_model.model.").replace(".default.weight", "")
            with torch.no_grad():
                parameter.copy_(ours[own])
            theirs[own] = parameter
    assert set(theirs) == set(ours)
    total = torch.zeros(())
    for example in examples:
        ids = torch.from_numpy(example.tokens_L).long()[None]
        labels = ids.masked_fill(~torch.from_numpy(example.supervised_L)[None], -100)
        total = total + reference(input_ids=ids, labels=labels).loss * int(example.supervised_L.sum()) / count
    total.backward()
    assert result.total.item() == pytest.approx(total.item(), rel=1e-5)
    for name, parameter in theirs.items():
        assert parameter.grad is not None
        assert parameter.grad.norm() > 0
        assert (ours[name].grad - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


def test_full_fine_tuning_refuses_codes(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="quantised"):
        create(FullConfig(), quantised(folder, monkeypatch), None, 0)
