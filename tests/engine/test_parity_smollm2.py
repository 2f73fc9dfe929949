"""Contract 1 on the embedded real model: a trained network is better conditioned than a random one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import peft_reference as pr
from peft_study.config import LoraConfig, MethodConfig, PrefixTuningConfig, PromptTuningConfig
from peft_study.data.conversation import Example
from peft_study.errors import ModelError
from peft_study.methods import Material
from peft_study.model.embedded import embedded_folder
from peft_study.model.load import load_base
from peft_study.model.precision import Placement

pytestmark = pytest.mark.slow

TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1969 two people walked on the moon, and a third one waited for "
    "them in orbit. Water boils at 100 degrees Celsius at sea level, but on a high mountain it boils earlier, because "
    "the air presses less. A recipe for bread needs flour, water, salt, yeast and a good deal of patience."
)
METHODS: dict[str, MethodConfig] = {
    "lora": LoraConfig(rank=8, alpha=16),
    "prefix": PrefixTuningConfig(tokens=10, init="text"),
    "prompt": PromptTuningConfig(tokens=8, init="text", init_text="Follow the instruction"),
}


@pytest.fixture(scope="module")
def folder() -> str:
    try:
        return str(embedded_folder())
    except ModelError as error:
        pytest.skip(f"the embedded model is not installed: {error}")


def their_model(folder: str, dtype: torch.dtype, implementation: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=implementation).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_on_the_real_model(method: str, dtype: torch.dtype, folder: str) -> None:
    """Three segments of real words; in bfloat16 no further apart than 1e-2 or PEFT's own noise."""
    base = load_base(folder, placement=Placement(torch.device("cpu"), dtype))
    ids = base.tokenizer(TEXT).input_ids
    pieces = [ids[:37], ids[10:61], ids[5:29]]
    examples = [Example(np.array(piece, np.int32), np.arange(len(piece)) >= 8) for piece in pieces]
    material = Material(
        lambda text: base.tokenizer(text, add_special_tokens=False).input_ids,
        ids,
        np.bincount(ids, minlength=len(base.tokenizer)),
        base.tokenizer.bos_token_id,
        frozenset(base.tokenizer.all_special_ids),
    )
    config = METHODS[method]
    adapter = pr.create(config, base, material, 0)
    pr.tw.randomise(adapter, std=0.02)
    loss, gradients = pr.ours(base, adapter, examples)
    found, noise = {}, 0.0
    for implementation in ("eager", "sdpa"):
        their_loss, found[implementation] = pr.Reference(
            their_model(folder, dtype, implementation), config, adapter
        ).gradients(examples)
        assert loss == pytest.approx(their_loss, rel=1e-5 if dtype == torch.float32 else 1e-2)
    noise = pr.worst(found["sdpa"], found["eager"])
    apart = min(pr.worst(gradients, theirs) for theirs in found.values())
    print(f"{method} {dtype}: ours and PEFT {apart:.1e} apart, PEFT eager and sdpa {noise:.1e}")
    assert apart <= max(1e-5 if dtype == torch.float32 else 1e-2, noise)
