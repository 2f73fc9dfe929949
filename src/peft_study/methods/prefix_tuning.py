"""Prefix tuning: trained keys and values before every layer's own (Li and Liang 2021, arXiv:2101.00190).

The trained table is PEFT's: (P, layers * 2 * G * D), row p holding layer 0's key, layer 0's value, layer 1's key, ...
Keys are used as they are, without rotation; keys taken from the base were rotated to positions 0..P-1 when the base
computed them, and the text's positions start at P, so that a text's keys and values act exactly as the text would.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from peft_study.config import PrefixTuningConfig
from peft_study.errors import ModelError
from peft_study.methods.base import Adapter, Material, Size, seeded
from peft_study.methods.peft_files import write
from peft_study.model.attention import Segment, SegmentLayout
from peft_study.model.load import Base
from peft_study.model.proof import decoder_of


class PrefixAdapter(Adapter):
    """The table, or the table plus an MLP's output where it is reparametrised."""

    method = "prefix_tuning"
    starts_as_base = False

    def __init__(self, config: PrefixTuningConfig, base: Base, table_PW: Tensor, seed: int) -> None:
        self.config = config
        self.prefix_tokens = config.tokens
        self._shape = (config.tokens, base.layers, 2, base.kv_heads, base.head_dim)
        self._dtype = base.dtype
        self._encoder = _Projection(config, base, seed).to(base.device) if config.projection else None
        self._table = nn.Parameter(table_PW.float().to(base.device), requires_grad=self._encoder is None)

    @classmethod
    def create(cls, config: PrefixTuningConfig, base: Base, material: Material | None, seed: int) -> PrefixAdapter:
        """Makes the adapter of a trial; `material` is needed for the text initialisation.

        Raises:
            ModelError: when the base cannot take a prefix (layers without ordinary attention).
        """
        refuse_unfit(base)
        width = base.layers * 2 * base.kv_heads * base.head_dim
        # with a projection the table stays fixed and the projection adds to it
        if config.init == "zero" or (config.init == "random" and config.projection):
            table = torch.zeros(config.tokens, width)
        elif config.init == "random":
            table = torch.randn(config.tokens, width, generator=seeded(seed, "prefix"))
        else:
            assert material is not None, "the text initialisation needs the data's tokens"
            table = text_table(base, material.text_tokens(config.init_text, config.tokens))
        return cls(config, base, table, seed)

    @classmethod
    def size(cls, config: PrefixTuningConfig, base: Base) -> Size:
        """Returns what the adapter would take; the table in the base's precision and its gradient are kept as well."""
        width = base.kv_heads * base.head_dim
        table = config.tokens * base.layers * 2 * width
        trained, kept, remedy = table, 2 * base.dtype.itemsize * table, "use fewer tokens"
        if config.projection:  # its output and that plus the fixed table, which trains no more
            hidden = config.projection_hidden or base.hidden
            trained = config.tokens * width + (width + 1) * hidden + (hidden + 1) * base.layers * 2 * width
            kept += 3 * 4 * table
            remedy = "use fewer tokens, a smaller projection_hidden, or no projection"
        name = f"prefix_tuning of {config.tokens:,} tokens"
        return Size(name, trained, kept, remedy, prefix_tokens=config.tokens)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns the table, or the projection's weights."""
        return {"table": self._table} if self._encoder is None else dict(self._encoder.named_parameters())

    def table(self) -> Tensor:
        """Returns the (P, layers * 2 * G * D) keys and values that the model sees, float32."""
        return self._table if self._encoder is None else self._table + self._encoder()

    def key_values(self) -> Tensor:
        """Returns the table as (layers, 2, G, P, D) in the base's precision."""
        return self.table().to(self._dtype).view(self._shape).permute(1, 2, 3, 0, 4)

    def save(self, folder: Path, base: Base) -> None:
        """Writes PEFT's files, without projection: the table that training produced."""
        write(
            folder,
            base,
            "PrefixTuningConfig",
            {"prompt_embeddings": self.table()},
            num_virtual_tokens=self.config.tokens,
            num_layers=base.layers,
            num_attention_heads=base.kv_heads,
            token_dim=base.kv_heads * base.head_dim,
            num_transformer_submodules=1,
            encoder_hidden_size=base.hidden,
            prefix_projection=False,
        )


class _Projection(nn.Module):
    """PEFT's two-layer MLP over P embeddings; its last layer starts at zero unless the initialisation is random."""

    def __init__(self, config: PrefixTuningConfig, base: Base, seed: int) -> None:
        super().__init__()
        width, hidden = base.kv_heads * base.head_dim, config.projection_hidden or base.hidden
        self.embedding = nn.Embedding(config.tokens, width)
        self.enter = nn.Linear(width, hidden)
        self.leave = nn.Linear(hidden, base.layers * 2 * width)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                generator = seeded(seed, "prefix projection", name)
                if name.startswith("embedding"):
                    parameter.normal_(generator=generator)
                elif name.startswith("leave") and config.init != "random":
                    parameter.zero_()
                else:
                    bound = (width if name.startswith("enter") else hidden) ** -0.5
                    parameter.uniform_(-bound, bound, generator=generator)

    def forward(self) -> Tensor:
        """Returns the (P, layers * 2 * G * D) table."""
        return self.leave(torch.tanh(self.enter(self.embedding.weight)))


def refuse_unfit(base: Base) -> None:
    """Raises ModelError where a prefix cannot enter every layer: other layer types, or heads that differ by layer."""
    config = base.model.config.get_text_config()
    odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    why = None
    if odd:
        why = f"it has {', '.join(sorted(odd))} layers without keys and values"
    elif not base.proof.segmented or base.proof.attending_layers != base.layers:
        why = "some of its layers have no attention that could take keys and values from outside"
    elif (
        not base.proof.plain_cache
        or getattr(config, "num_kv_shared_layers", None)
        or getattr(config, "kv_lora_rank", None)
    ):
        why = "its layers share or compress keys and values, or their shapes differ"
    if why:
        raise ModelError(f"prefix tuning does not fit this model: {why}", remedy="use lora or prompt_tuning")


@torch.no_grad()
def text_table(base: Base, ids: list[int]) -> Tensor:
    """Returns the (P, layers * 2 * G * D) keys and values that the base itself computes for these P tokens."""
    layout = SegmentLayout((Segment(0, len(ids), slot=0),), captured=[])
    ids_T = torch.tensor(ids, device=base.device)
    decoder_of(base.model)(
        inputs_embeds=base.embed(ids_T)[None],
        position_ids=torch.arange(len(ids), device=base.device)[None],
        segments=layout,
        use_cache=False,
    )
    assert layout.captured is not None
    assert len(layout.captured) == base.layers, "every layer attends once"
    stack = torch.stack([torch.stack(pair) for pair in layout.captured])  # (layers, 2, G, P, D)
    return stack.permute(3, 0, 1, 2, 4).reshape(len(ids), -1).float()
