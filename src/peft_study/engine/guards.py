"""Which parameters train: counted and checked before the first step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from peft_study.doctor.observations import Observations, ParameterCounts
from peft_study.doctor.rule import examine
from peft_study.errors import ModelError
from peft_study.methods.base import Adapter
from peft_study.model.load import Base


@dataclass(frozen=True, slots=True)
class Trainable:
    """Parameter counts of one trial.

    Attributes:
        trainable: numbers that train.
        total: numbers of base and adapter together.
        by_module: trainable numbers by kind of module, e.g. q_proj or table.
    """

    trainable: int
    total: int
    by_module: dict[str, int]

    def sentence(self, method: str) -> str:
        """Returns the line a run prints before step 1."""
        share = 100 * self.trainable / self.total
        parts = ", ".join(f"{name} {count:,}" for name, count in self.by_module.items())
        detail = f" ({parts})" if parts else ""
        return f"{method}: {self.trainable:,} of {self.total:,} parameters train, {share:.3g} %{detail}"


def count_trainable(base: Base, adapter: Adapter) -> Trainable:
    """Counts what `adapter` trains on `base`."""
    counts: Counter[str] = Counter()
    for name, parameter in adapter.parameters().items():
        module = name.removesuffix(".lora_A").removesuffix(".lora_B").removesuffix(".weight").removesuffix(".bias")
        counts[module.rsplit(".", 1)[-1]] += parameter.numel()
    trainable = sum(counts.values())
    own = 0 if adapter.exclusive else trainable
    return Trainable(trainable, base.parameter_count() + own, dict(counts))


def refuse_unexpected(base: Base, adapter: Adapter) -> None:
    """Refuses to train when a parameter outside the method's own would train, or one of its own would not.

    A missing call of `get_peft_model` once turned a prompt-tuning run into full fine-tuning at 1e-4, unnoticed
    (references: shizhengLi/PEFT, commit 0b8506f).

    Raises:
        ModelError: naming the first such parameter.
    """
    unexpected = [] if adapter.exclusive else [n for n, p in base.model.named_parameters() if p.requires_grad]
    own = adapter.parameters()
    if unexpected:
        counts = ParameterCounts(
            base=base.parameter_count(),
            base_trainable=sum(base.model.get_parameter(name).numel() for name in unexpected),
            adapter=max(1, sum(parameter.numel() for parameter in own.values())),
            adapter_trainable=sum(parameter.numel() for parameter in own.values() if parameter.requires_grad),
            first_unexpected=unexpected[0],
        )
        examine(Observations(parameters=counts), checks=("base_trains",)).refuse(
            ModelError,
            remedy=f"freeze them (requires_grad_(False)) before training: {adapter.method} trains none of them",
        )
    frozen = [name for name, p in own.items() if not p.requires_grad]
    if frozen:
        raise ModelError(f"{frozen[0]} belongs to {adapter.method} but is frozen")
