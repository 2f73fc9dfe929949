"""Prompt tuning: trained input embeddings before the text (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from peft_study.config import PromptTuningConfig
from peft_study.methods.base import Adapter, Material, Size, seeded
from peft_study.methods.peft_files import write
from peft_study.model.load import Base

FREQUENT = 5000
"""Lester et al. draw the sampled-vocabulary initialisation from the 5,000 most common tokens."""


class PromptAdapter(Adapter):
    """P vectors of the width of the embedding table."""

    method = "prompt_tuning"
    starts_as_base = False

    def __init__(self, config: PromptTuningConfig, embeddings_PE: Tensor) -> None:
        self.config = config
        self.row_tokens = config.tokens
        self._embeddings = nn.Parameter(embeddings_PE.detach().clone().float())

    @classmethod
    def create(cls, config: PromptTuningConfig, base: Base, material: Material | None, seed: int) -> PromptAdapter:
        """Makes the adapter of a trial; `material` is needed for the text and vocab initialisations."""
        if config.init == "random":
            noise = torch.randn(config.tokens, base.hidden, generator=seeded(seed, "prompt")).to(base.device)
            return cls(config, noise * table_rms(base))
        assert material is not None, "this initialisation needs the data's tokens"
        if config.init == "text":
            ids = material.text_tokens(config.init_text, config.tokens)
        else:
            ids = frequent_tokens(material, config.tokens, seed)
        with torch.no_grad():
            return cls(config, base.embed(torch.tensor(ids, device=base.device)))

    @classmethod
    def size(cls, config: PromptTuningConfig, base: Base) -> Size:
        """Returns what the adapter would take."""
        name, trained = f"prompt_tuning of {config.tokens:,} tokens", config.tokens * base.hidden
        return Size(name, trained, 0, "use fewer tokens", row_tokens=config.tokens)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns the vectors."""
        return {"embeddings": self._embeddings}

    def embeddings(self) -> Tensor:
        """Returns the (P, E) vectors, float32."""
        return self._embeddings

    def save(self, folder: Path, base: Base) -> None:
        """Writes PEFT's files, with an initialisation that needs no tokenizer when they are loaded."""
        write(
            folder,
            base,
            "PromptTuningConfig",
            {"prompt_embeddings": self._embeddings},
            num_virtual_tokens=self.config.tokens,
            num_layers=base.layers,
            num_attention_heads=base.heads,
            token_dim=base.hidden,
            num_transformer_submodules=1,
            prompt_tuning_init="RANDOM",
        )


@torch.no_grad()
def table_rms(base: Base) -> float:
    """Returns the root mean square of the base's input embeddings, from its embedding module on up to 4,096 ids."""
    size = base.model.config.get_text_config().vocab_size
    ids = torch.linspace(0, size - 1, min(size, 4096), device=base.device).long()
    return float(base.embed(ids).float().pow(2).mean().sqrt())


def frequent_tokens(material: Material, count: int, seed: int) -> list[int]:
    """Returns `count` different ids, drawn evenly from the most frequent words of the data.

    Raises:
        ValueError: when the data has fewer different tokens.
    """
    counts_V = material.counts_V.copy()
    counts_V[list(material.special)] = 0
    frequent = np.argsort(-counts_V, kind="stable")[: min(FREQUENT, int((counts_V > 0).sum()))]
    if len(frequent) < count:
        raise ValueError(f"the data has {len(frequent)} different tokens, fewer than {count} virtual tokens")
    order = torch.randperm(len(frequent), generator=seeded(seed, "prompt vocab"))[:count]
    return [int(frequent[i]) for i in order]
