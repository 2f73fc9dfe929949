"""Models beyond the six families: other shapes, attention with sinks, and models that must keep their own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    Mamba2Config,
    MistralConfig,
    OPTConfig,
    Phi3Config,
)

import peft_reference as pr
import tiny_world as tw
from peft_study.config import MethodConfig, PrefixTuningConfig
from peft_study.engine.row import Item, RowRunner
from peft_study.errors import ModelError
from peft_study.methods import create
from peft_study.model.load import Base, wrap
from peft_study.model.precision import Placement

V = tw.VOCABULARY
_COMMON: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA_LIKE: dict[str, Any] = {
    **_COMMON,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ORDINARY: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=V,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_COMMON, intermediate_size=48, max_position_embeddings=256),
    "opt": lambda: OPTConfig(**_COMMON, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=256, dropout=0.0),
    "mistral": lambda: MistralConfig(**_LLAMA_LIKE, sliding_window=16),
    "phi3": lambda: Phi3Config(**_LLAMA_LIKE),
    "gpt_oss": lambda: GptOssConfig(
        **_LLAMA_LIKE,
        num_local_experts=4,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
    ),
}
OWN_ATTENTION: dict[str, Callable[[], Any]] = {
    "falcon": lambda: FalconConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    ),
    "mamba2": lambda: Mamba2Config(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=1
    ),
}


def build(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(1.0, 0.5)
    return model.eval()


def based(config: Any) -> Base:
    return wrap(build(config), None, Placement(torch.device("cpu"), torch.float32), path="tiny")


def linear_leaves(method: MethodConfig, base: Base) -> MethodConfig:
    """Names LoRA's layers: PEFT's all-linear takes the experts of a mixture too, which are no linear layers here."""
    if method.method != "lora":
        return method
    leaves = {name.rsplit(".", 1)[-1] for name in create(method, base, None, 0).adapted_modules()}
    return method.model_copy(update={"target_modules": tuple(sorted(leaves))})


@pytest.mark.parametrize("method", ["lora", "prefix, random", "prompt, random"])
@pytest.mark.parametrize("name", ORDINARY)
def test_packed_numbers_are_pefts(name: str, method: str) -> None:
    base = based(ORDINARY[name]())
    assert base.proof.segmented
    assert base.proof.packs
    config, examples = linear_leaves(pr.METHODS[method], base), tw.examples([12, 20, 9, 33])
    adapter = pr.adapter_of(config, base)
    loss, gradients = pr.ours(base, adapter, examples)
    expected, theirs = pr.Reference(build(ORDINARY[name]()), config, adapter).gradients(examples)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert pr.worst(gradients, theirs) < 1e-5


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_other_attention_is_kept_and_run_one_example_a_row(name: str) -> None:
    base = based(OWN_ATTENTION[name]())
    assert not base.proof.segmented
    assert not base.proof.packs
    config, examples = pr.METHODS["prompt, random"], tw.examples([12, 20])
    adapter = pr.adapter_of(config, base)
    expected = [loss.item() for loss in pr.Reference(build(OWN_ATTENTION[name]()), config, adapter).losses(examples)]
    for example, loss in zip(examples, expected, strict=True):
        with RowRunner(base).row([Item(0, adapter, example)]) as result:
            assert result.item_losses[0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_no_prefix_where_attention_cannot_take_one(name: str) -> None:
    with pytest.raises(ModelError, match=r"prefix tuning does not fit this model.*use lora or prompt_tuning"):
        create(PrefixTuningConfig(tokens=3, init="zero"), based(OWN_ATTENTION[name]()), None, 0)


def test_positions_that_end_are_found_whatever_table_they_are_looked_up_in() -> None:
    """GPT-2 and OPT (from its third entry on) learn them, GPT-J looks rotations up; the others compute theirs."""
    found = {name: based(make()).positions for name, make in {**ORDINARY, **OWN_ATTENTION}.items()}
    assert {name: count for name, count in found.items() if count is not None} == {"gpt2": 256, "opt": 256}
    assert based(GPTJConfig(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=80, rotary_dim=8)).positions == 80
    assert all(tw.base(family).positions is None for family in tw.FAMILIES)


def test_a_changed_attention_is_found_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_study.model.cpu import causal

    original = causal.attend
    monkeypatch.setattr(causal, "attend", lambda *a: original(*a) * 1.05)
    assert not tw.base("llama").proof.segmented
