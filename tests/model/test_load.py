"""Loading a base: what it knows of its shape, and one line for what cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

import tiny_world as tw
from peft_study.engine.engine import Engine
from peft_study.engine.row import Item, RowRunner
from peft_study.errors import ConfigError, ModelError
from peft_study.methods.reference import NoAdapter
from peft_study.model import precision
from peft_study.model.digest import folder_digest
from peft_study.model.load import load_base, load_tokenizer, resolve_model, wrap
from peft_study.model.precision import Placement, choose
from tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model"
    tw.model("gemma3").save_pretrained(path)
    tiny_tokenizer(320).save_pretrained(path)
    return path


FLOAT32 = Placement(torch.device("cpu"), torch.float32)


def test_a_loaded_base_is_frozen_and_knows_its_shape(folder: Path) -> None:
    base = load_base(str(folder), placement=FLOAT32)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert (base.layers, base.heads, base.kv_heads, base.head_dim, base.hidden) == (2, 4, 2, 8, 32)
    assert base.path == str(folder.resolve())
    assert base.digest == folder_digest(folder)
    assert base.proof.packs
    assert base.dtype == next(base.model.parameters()).dtype == torch.float32


def test_half_precision_is_loaded_as_asked(folder: Path) -> None:
    base = load_base(str(folder), placement=Placement(torch.device("cpu"), torch.bfloat16))
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}


def test_the_digest_is_of_weights_and_config_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    first = folder_digest(folder)
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert folder_digest(moved) == first
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert folder_digest(moved) != first


def test_a_folder_without_a_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a folder without config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "~/nothing"])
def test_a_path_that_is_not_there_is_no_hub_id(name: str) -> None:
    with pytest.raises(ModelError, match="no such model folder; give a folder, a hub id, or 'smollm2-135m-instruct'"):
        resolve_model(name)


@pytest.mark.parametrize("family", tw.FAMILIES)
def test_a_model_folder_without_tokenizer_says_so(family: str, tmp_path: Path) -> None:
    """For Gemma, Cohere and Qwen transformers makes an empty tokenizer, which maps every text to nothing."""
    folder = tmp_path / "model"
    tw.model(family).save_pretrained(folder)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "give a folder that holds tokenizer.json" in str(caught.value)


@pytest.mark.parametrize("damage", ["no weights", "truncated", "pickle"])
def test_weights_that_cannot_be_read_are_one_line(damage: str, folder: Path) -> None:
    weights = folder / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.unlink()
        torch.save(tw.model("gemma3").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        load_base(str(folder), placement=FLOAT32)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_one_line(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(ModelError, match="no causal language model could be loaded"):
        load_base(str(folder), placement=FLOAT32)


def test_the_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device: no cuda device"):
        choose("cuda")
    assert choose("cpu", "float32") == Placement(torch.device("cpu"), torch.float32)


def test_float16_scales_its_loss_and_says_so() -> None:
    placement = choose("cpu", "float16")
    assert placement.scales_loss
    assert placement.note is not None
    assert "\n" not in placement.note
    assert not choose("cpu", "float32").scales_loss


def test_a_cpu_without_bfloat16_takes_float32_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    placement = precision.choose("cpu", "auto")
    assert placement.dtype == torch.float32
    assert placement.note is not None
    assert "float32" in placement.note
    asked_for = precision.choose("cpu", "bfloat16")
    assert asked_for.dtype == torch.bfloat16
    assert asked_for.note is not None
    assert "slower" in asked_for.note


def test_the_bases_own_dropout_is_off_even_while_layers_are_recomputed() -> None:
    """GPT-2 drops a tenth of embeddings, residuals and attention in training mode, which recomputation needs."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": tw.VOCABULARY, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(GPT2Config(**sizes, resid_pdrop=0.5, embd_pdrop=0.5))
    assert any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
    base = wrap(model, None, FLOAT32, path="tiny")

    def loss() -> list[float]:
        with RowRunner(base).row([Item(0, NoAdapter(), example) for example in tw.examples([12, 9])]) as result:
            return result.item_losses

    Engine(base)
    assert not base.model.training
    evaluated = loss()
    Engine(base, gradient_checkpointing=True)
    assert base.model.training
    assert loss() == evaluated
