"""A hermetic world for tests: random two-layer models of six families, in process, no files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    Qwen3Config,
)

from peft_study.data.conversation import Example
from peft_study.methods import Adapter, Material
from peft_study.model.load import Base, wrap
from peft_study.model.precision import Placement

VOCABULARY = 320
FAMILIES = ("llama", "gemma2", "gemma3", "granite", "cohere", "qwen3")

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(family: str) -> Any:
    """Returns a configuration of the family, with its peculiarities on: caps, scales, windows."""
    if family == "llama":
        return LlamaConfig(**_SHAPE, tie_word_embeddings=True)
    if family == "gemma2":
        return Gemma2Config(**_SHAPE, sliding_window=16, query_pre_attn_scalar=8, final_logit_softcapping=0.5)
    if family == "gemma3":
        return Gemma3TextConfig(
            **_SHAPE,
            sliding_window=16,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
            final_logit_softcapping=None,
        )
    if family == "granite":
        return GraniteConfig(
            **{k: v for k, v in _SHAPE.items() if k != "head_dim"},
            logits_scaling=3.0,
            embedding_multiplier=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.3,
        )
    if family == "cohere":
        return CohereConfig(**{k: v for k, v in _SHAPE.items() if k != "head_dim"}, logit_scale=0.25)
    assert family == "qwen3", family
    return Qwen3Config(**_SHAPE)


def model(family: str = "llama", *, dtype: torch.dtype = torch.float32, implementation: str = "eager") -> Any:
    """Returns a random model whose weights are large enough for every gradient to matter."""
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(config(family), dtype=torch.float32, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return built.to(dtype).eval()


def base(
    family: str = "llama", *, dtype: torch.dtype = torch.float32, device: str = "cpu", tokenizer: Any = None
) -> Base:
    """Returns that model as the engine's base."""
    placement = Placement(torch.device(device), dtype)
    return wrap(model(family, dtype=dtype).to(device), tokenizer, placement, path="tiny")


def examples(lengths: list[int], *, seed: int = 0) -> list[Example]:
    """Returns random examples of these lengths, the second half of each supervised, and a lone token before."""
    generator = np.random.default_rng(seed)
    made = []
    for length in lengths:
        tokens = generator.integers(3, VOCABULARY, size=length).astype(np.int32)
        mask = np.arange(length) >= max(1, length // 2)
        if length > 6:
            mask[2] = True
        made.append(Example(tokens, mask))
    return made


def material(*, bos: int | None = 1, opening: int = 64, seed: int = 5) -> Material:
    """Returns what initialisations draw on: characters are tokens, and the data says `opening` random tokens."""
    tokens = [int(t) for t in np.random.default_rng(seed).integers(3, VOCABULARY, size=opening)]
    counts = np.zeros(VOCABULARY, dtype=np.int64)
    np.add.at(counts, tokens, 1)
    return Material(
        encode=lambda text: [3 + ord(letter) % (VOCABULARY - 3) for letter in text],
        opening=tokens if bos is None else [bos, *tokens],
        counts_V=counts,
        bos=bos,
        special=frozenset({0, 1, 2}),
    )


def randomise(adapter: Adapter, *, std: float = 0.1, seed: int = 1) -> Adapter:
    """Adds noise to every parameter, so that none is zero and every gradient is there; returns the adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device) * std)
    return adapter
