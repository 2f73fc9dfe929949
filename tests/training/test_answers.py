"""Answers side by side: each prompt's tokens are those that it gets alone, whatever the method and the model family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import tiny_world
from peft_study.config import LoraConfig, MethodConfig, PrefixTuningConfig, PromptTuningConfig
from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Message
from peft_study.evaluation.generation import Answerer
from peft_study.methods import create
from peft_study.model.in_memory import lent
from tiny_tokenizer import tiny_tokenizer

METHODS: dict[str, MethodConfig | None] = {
    "none": None,
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
    texts = ("a", "please, what is 3+4 ?", "say that again", "x" * 40)
    return [encoder.prompt_tokens([Message("user", text)]) for text in texts]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny_world.FAMILIES)
def test_prompts_side_by_side_get_the_tokens_that_each_gets_alone(family: str, method: str, tmp_path: Path) -> None:
    """The independent truth is PEFT's `generate` for one prompt without padding."""
    tokenizer = tiny_tokenizer(tiny_world.VOCABULARY)
    encoder = ChatEncoder(tokenizer)
    base, config = tiny_world.base(family, tokenizer=tokenizer), METHODS[method]
    model = plain(family)
    if config is not None:
        adapter = tiny_world.randomise(create(config, base, tiny_world.material(), 0), std=0.5)
        adapter.save(tmp_path, base)
        model = peft.PeftModel.from_pretrained(model, tmp_path)
    asked = prompts(encoder)
    assert len({len(prompt) for prompt in asked}) == 4
    alone = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            made = model.eval().generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
            )
        alone.append(tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True))
    answerer = Answerer(model, tokenizer, encoder)
    assert answerer.answers(asked, TOKENS) == alone
    assert answerer.answers(asked[::-1], TOKENS) == alone[::-1]
    assert answerer.answers(asked[1:2] * 2, TOKENS) == alone[1:2] * 2, "of one length, where nothing is padded"
    assert len(set(alone)) > 1
    assert "prepare_inputs_for_generation" not in vars(model)


def test_an_adapter_of_peft_is_taken_off_a_lent_model(tmp_path: Path) -> None:
    base = tiny_world.base()
    model = base.model
    before = {name: id(module) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, config in enumerate(filter(None, METHODS.values())):
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
