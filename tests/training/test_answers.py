"""Answers on the base that the engine has loaded: those of PEFT, whatever the family, and the base is as it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch

import tiny_world
from peft_study.config import LoraConfig, MethodConfig, NoneConfig, PrefixTuningConfig, PromptTuningConfig
from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Message
from peft_study.methods import create
from peft_study.model.in_memory import lent
from peft_study.model.load import Base, load_base
from peft_study.model.precision import Placement
from peft_study.training.answers import _answers
from tiny_tokenizer import tiny_tokenizer

METHODS: dict[str, MethodConfig] = {
    "none": NoneConfig(),
    "lora": LoraConfig(rank=4),
    "prefix_tuning": PrefixTuningConfig(tokens=5, init="random"),
    "prompt_tuning": PromptTuningConfig(tokens=5, init="random"),
}
TOKENS = 12


def plain(family: str) -> Any:
    """Returns the model as transformers loads it: without anything of ours in it."""
    model = tiny_world.model(family)
    model.generation_config.eos_token_id = None  # random models end at random places, and long answers tell more
    return model


def prompts(encoder: ChatEncoder) -> list[list[int]]:
    texts = ("a", "please, what is 3+4 ?", "x" * 40)
    return [encoder.prompt_tokens([Message("user", text)]) for text in texts]


def answered(base: Base, encoder: ChatEncoder, config: MethodConfig, folder: Path) -> list[str]:
    """Returns the answers on the engine's base, which must be as it was afterwards."""
    before = [dict(vars(module)) for module in base.model.modules()]
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    session: Any = SimpleNamespace(base=base, encoder=encoder, material=None)
    found = _answers(session, config, folder, prompts(encoder), TOKENS)
    assert [dict(vars(module)) for module in base.model.modules()] == before
    after = base.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny_world.FAMILIES)
def test_the_engines_base_answers_as_a_plainly_loaded_model(family: str, method: str, tmp_path: Path) -> None:
    """The independent truth is PEFT's own `generate` on a model that nothing of ours was in."""
    tokenizer = tiny_tokenizer(tiny_world.VOCABULARY)
    encoder = ChatEncoder(tokenizer)
    base, config, model = tiny_world.base(family, tokenizer=tokenizer), METHODS[method], plain(family)
    base.model.generation_config.eos_token_id = None
    if not isinstance(config, NoneConfig):
        tiny_world.randomise(create(config, base, tiny_world.material(), 0), std=0.2).save(tmp_path, base)
        model = peft.PeftModel.from_pretrained(model, tmp_path)
    alone = []
    for prompt in prompts(encoder):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            made = model.eval().generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
            )
        alone.append(tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True))
    assert answered(base, encoder, config, tmp_path) == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("method", METHODS)
def test_a_base_of_4_bits_keeps_its_codes(method: str, wide_model_folder: Path, tmp_path: Path) -> None:
    """In eval mode bitsandbytes may repack them on CPU, after which they could no longer be trained on."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = load_base(
        str(wide_model_folder), placement=Placement(torch.device("cpu"), torch.float32), quantization="nf4"
    )
    encoder, config = ChatEncoder(base.tokenizer), METHODS[method]
    if not isinstance(config, NoneConfig):
        create(config, base, tiny_world.material(), 0).save(tmp_path, base)
    assert answered(base, encoder, config, tmp_path) == answered(base, encoder, config, tmp_path)


def test_an_adapter_of_peft_is_taken_off_a_lent_model(tmp_path: Path) -> None:
    base = tiny_world.base()
    model = base.model
    before = {name: id(module) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, config in enumerate(config for config in METHODS.values() if not isinstance(config, NoneConfig)):
        create(config, base, tiny_world.material(), 0).save(tmp_path / str(number), base)
        attributes = [dict(vars(module)) for module in model.modules()]
        with lent(model):
            model.set_attn_implementation(base.attention)
            adapted = peft.PeftModel.from_pretrained(model, tmp_path / str(number))
            assert isinstance(config, LoraConfig) == ({n: id(m) for n, m in model.named_modules()} != before)
            adapted(torch.arange(4)[None])
        assert {name: id(module) for name, module in model.named_modules()} == before
        assert [dict(vars(module)) for module in model.modules()] == attributes
        assert not hasattr(model, "peft_config")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
