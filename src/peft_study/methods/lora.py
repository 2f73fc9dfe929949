"""LoRA: y + scale * B A x on chosen linear layers (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_study.config import LoraConfig
from peft_study.errors import ModelError, nearest
from peft_study.methods.base import Adapter, LowRank, Material, Size, seeded
from peft_study.methods.peft_files import write
from peft_study.model.load import Base


class LoraAdapter(Adapter):
    """A pair of matrices for each adapted layer; A is drawn at random, B is zero, so training starts at the base."""

    method = "lora"

    def __init__(self, config: LoraConfig, shapes: dict[str, tuple[int, int]], device: torch.device, seed: int) -> None:
        self.config = config
        self.rank, self.dropout = config.rank, config.dropout
        self._pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, (inputs, outputs) in shapes.items():
            A = torch.empty(config.rank, inputs)
            # PEFT's initialisation of A: uniform in +-sqrt(3) * sqrt(2 / (1 + 5)) / sqrt(inputs)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=seeded(seed, "lora", name))
            B = torch.zeros(outputs, config.rank, device=device)
            self._pairs[name] = nn.Parameter(A.to(device)), nn.Parameter(B)

    @classmethod
    def create(cls, config: LoraConfig, base: Base, _material: Material | None, seed: int) -> LoraAdapter:
        """Makes the adapter of a trial; raises ModelError when the base has no linear layer of the given names."""
        return cls(config, target_shapes(base.model, config.target_modules), base.device, seed)

    @classmethod
    def size(cls, config: LoraConfig, base: Base) -> Size:
        """Returns what the adapter would take."""
        shapes = target_shapes(base.model, config.target_modules).values()
        trained = config.rank * sum(inputs + outputs for inputs, outputs in shapes)
        return Size(f"lora of rank {config.rank:,}", trained, 0, "use a lower rank, or fewer target_modules")

    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns A and B of every adapted layer."""
        return {f"{name}.lora_{x}": p for name, pair in self._pairs.items() for x, p in zip("AB", pair, strict=True)}

    def linear_update(self, name: str) -> LowRank | None:
        """Returns the layer's A, B and scale."""
        pair = self._pairs.get(name)
        return None if pair is None else LowRank(pair[0], pair[1], self.config.scale)

    def adapted_modules(self) -> tuple[str, ...]:
        """Returns the names of the adapted layers."""
        return tuple(self._pairs)

    def save(self, folder: Path, base: Base) -> None:
        """Writes ``adapter_config.json`` and ``adapter_model.safetensors``."""
        write(
            folder,
            base,
            "LoraConfig",
            {f"base_model.model.{name}.weight": parameter for name, parameter in self.parameters().items()},
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            use_rslora=self.config.rslora,
            target_modules=_shortest_names(base.model, self._pairs),
        )


def target_shapes(model: nn.Module, targets: str | tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Returns (inputs, outputs) of the layers to be adapted, by full name.

    Args:
        model: the base.
        targets: 'all-linear' (every linear layer but the head, as in PEFT), or names matched by their last parts.

    Raises:
        ModelError: when a name matches no linear layer.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    linear = {name: _shape(part) for name, part in model.named_modules() if _is_linear(part) and part is not head}
    if targets == "all-linear":
        if not linear:
            raise ModelError("the base has no linear layers that LoRA could adapt", remedy="choose another method")
        return linear
    chosen: dict[str, tuple[int, int]] = {}
    for target in targets:
        matches = {name: s for name, s in linear.items() if name == target or name.endswith(f".{target}")}
        if not matches:
            leaves = {name.rsplit(".", 1)[-1] for name in linear}
            what = f"no linear layer of the base is called {target!r}"
            raise ModelError(what, where="target_modules", remedy=nearest(target, leaves))
        chosen |= matches
    return {name: linear[name] for name in linear if name in chosen}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's transposed linear layer


def _shape(module: Any) -> tuple[int, int]:
    if hasattr(module, "in_features"):  # a quantised layer's weight is packed: its shape says nothing
        return module.in_features, module.out_features
    return tuple(module.weight.shape)


def _shortest_names(model: nn.Module, names: dict[str, Any]) -> list[str]:
    """Returns the layers' last name parts where those mean exactly these layers, else their full names."""
    leaves = {name.rsplit(".", 1)[-1] for name in names}
    meant = {n for n, m in model.named_modules() if _is_linear(m) and n.rsplit(".", 1)[-1] in leaves}
    return sorted(leaves if meant == set(names) else names)
