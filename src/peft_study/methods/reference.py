"""The two reference rows of a comparison: the untouched base, and full fine-tuning of every weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from peft_study.config import FullConfig, NoneConfig
from peft_study.errors import ModelError
from peft_study.methods.base import Adapter, Material, Size
from peft_study.model.load import Base
from peft_study.storage.files import follow_umask


class NoAdapter(Adapter):
    """Trains nothing: its loss is the base's."""

    method = "none"

    @classmethod
    def create(cls, _config: NoneConfig, _base: Base, _material: Material | None, _seed: int) -> NoAdapter:
        """Makes the row of the untouched base."""
        return cls()

    @classmethod
    def size(cls, _config: NoneConfig, _base: Base) -> Size:
        """Returns that it takes nothing."""
        return Size("the untouched base", 0, 0, "use a smaller base")

    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns nothing."""
        return {}

    def save(self, folder: Path, base: Base) -> None:
        """Writes nothing: there is no adapter."""
        return None


class FullAdapter(Adapter):
    """Every weight of the base, trained through float32 masters; the base is put back when the trial leaves.

    bfloat16 weights would swallow updates smaller than 1/256 of themselves, which at usual rates is nearly all of
    them; so the optimizer steps float32 copies, and the base gets them rounded.
    """

    method = "full"
    exclusive = True

    def __init__(self, base: Base) -> None:
        self._base = base
        self._targets = dict(base.model.named_parameters())
        self._masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in self._targets.items()}
        self._originals: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @classmethod
    def create(cls, _config: FullConfig, base: Base, _material: Material | None, _seed: int) -> FullAdapter:
        """Makes the trial that trains the base itself.

        Raises:
            ModelError: when the base is quantised: its weights are codes, not numbers.
        """
        codes = [name for name, p in base.model.named_parameters() if not p.is_floating_point()]
        if codes:
            raise ModelError(f"full fine-tuning does not fit a quantised base ({codes[0]})", remedy="use lora")
        return cls(base)

    @classmethod
    def size(cls, _config: FullConfig, base: Base) -> Size:
        """Returns what it would take: a float32 master of each weight, and a copy of the weights."""
        weights = list(base.model.parameters())
        trained, kept = sum(p.numel() for p in weights), sum(p.numel() * p.element_size() for p in weights)
        return Size("full fine-tuning", trained, kept, "leave it out, or use a smaller base")

    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns the float32 masters by the names of the weights they stand for."""
        return self._masters

    def attach(self) -> None:
        """Lets gradients into the base and moves each into its master as soon as it is complete."""
        for name, target in self._targets.items():
            self._originals[name] = target.detach().clone()
            target.requires_grad_(True)
            self._handles.append(target.register_post_accumulate_grad_hook(self._collector(self._masters[name])))
        self.after_step()

    @staticmethod
    def _collector(master: nn.Parameter):  # type: ignore[no-untyped-def]
        def collect(target: Tensor) -> None:
            assert target.grad is not None
            gradient, target.grad = target.grad, None  # first: the copy may not fit, and the batch is then run again
            gradient = gradient.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)

        return collect

    @torch.no_grad()
    def after_step(self) -> None:
        """Rounds the masters into the base."""
        for name, target in self._targets.items():
            target.copy_(self._masters[name])

    @torch.no_grad()
    def detach(self) -> None:
        """Puts the original weights back and freezes them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name, target in self._targets.items():
            target.requires_grad_(False)
            target.grad = None
            if name in self._originals:
                target.copy_(self._originals.pop(name))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the weights of a model folder that `save` wrote; what is tied there is written once.

        Raises:
            ModelError: when a weight is not among this model's, or has another shape.
        """
        for name, tensor in tensors.items():
            if name not in self._masters or self._masters[name].shape != tensor.shape:
                raise ModelError(f"the saved weights do not fit this base at {name}", remedy="train again")
            self._masters[name].copy_(tensor)

    def save(self, folder: Path, base: Base) -> None:
        """Writes a model folder with the trained weights and the tokenizer; the caller handles a full disk."""
        base.model.save_pretrained(folder)
        follow_umask(folder)
        base.tokenizer.save_pretrained(folder)
