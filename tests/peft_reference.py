"""The independent implementation that the engine is compared with: `peft`, a plain loop, one example at a time.

Ours and PEFT's names of the same numbers:

    lora            LAYER.lora_A                base_model.model.LAYER.lora_A.default.weight
    prefix tuning   table                       prompt_encoder.default.embedding.weight
      projected     embedding.weight            prompt_encoder.default.embedding.weight
                    enter.*, leave.*            prompt_encoder.default.transform.0.*, .transform.2.*
    prompt tuning   embeddings                  prompt_encoder.default.embedding.weight
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn

import tiny_world as tw
from peft_study.config import LoraConfig, MethodConfig, PrefixTuningConfig, PromptTuningConfig
from peft_study.data.conversation import Example
from peft_study.engine.row import Item, RowRunner
from peft_study.methods import Adapter, create
from peft_study.methods.dropout import DropoutKey, keep_mask
from peft_study.model.load import Base

METHODS: dict[str, MethodConfig] = {
    "lora": LoraConfig(rank=4, alpha=8),
    "rslora, named layers": LoraConfig(rank=3, alpha=6, rslora=True, target_modules=("q_proj", "down_proj")),
    "prefix, random": PrefixTuningConfig(tokens=5, init="random"),
    "prefix, text": PrefixTuningConfig(tokens=7, init="text", init_text="a text of its own"),
    "prefix, projected": PrefixTuningConfig(tokens=4, init="random", projection=True, projection_hidden=24),
    "prompt, random": PromptTuningConfig(tokens=3, init="random"),
    "prompt, text": PromptTuningConfig(tokens=6, init="text"),
}
"""Every method in the variants that change what is computed."""

Gradients = dict[str, Tensor]


def adapter_of(config: MethodConfig, base: Base, *, seed: int = 3) -> Adapter:
    """Returns the method's adapter with noise on every parameter: none is zero."""
    return tw.randomise(create(config, base, tw.material(), seed), seed=seed)


def ours(
    base: Base, adapter: Adapter, examples: Sequence[Example], *, at: tuple[int, int] | None = None
) -> tuple[float, Gradients]:
    """Returns mean token loss and gradients of one packed row of all examples; the gradients are cleared.

    Args:
        base: the engine's.
        adapter: the trial's.
        examples: one segment each; example i has dropout key i.
        at: seed and step of the dropout masks; None drops nothing.
    """
    divisor, virtual = supervised(examples), adapter.row_tokens
    items = []
    for number, example in enumerate(examples):
        key = None if at is None else DropoutKey(*at, number, virtual + len(example))
        items.append(Item(0, adapter, example, 1 / divisor, key))
    with RowRunner(base).row(items) as result:
        result.total.backward()
    gradients = {}
    for name, parameter in adapter.parameters().items():
        assert parameter.grad is not None, name
        gradients[name], parameter.grad = parameter.grad, None
    return sum(result.item_losses) / divisor, gradients


def relative(found: Tensor, expected: Tensor) -> float:
    """Returns |found - expected| / |expected| in the L2 norm; an expected zero compares nothing and fails."""
    assert expected.norm() > 1e-7, "a reference gradient is zero: nothing was compared"
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def worst(found: Gradients, expected: Gradients) -> float:
    """Returns the largest relative difference of a tensor."""
    assert set(found) == set(expected)
    return max(relative(found[name], expected[name]) for name in found)


class Reference:
    """A PEFT model with an adapter's numbers.

    Args:
        model: the base, freshly built; PEFT changes it.
        config: the method's settings.
        adapter: ours, whose parameters are copied.
    """

    def __init__(self, model: Any, config: MethodConfig, adapter: Adapter) -> None:
        self.model = peft.get_peft_model(model, peft_config(config))
        self.model.train()
        self.parameters: dict[str, nn.Parameter] = {
            our_name(name, config): p for name, p in self.model.named_parameters() if p.requires_grad
        }
        mine = adapter.parameters()
        assert set(mine) == set(self.parameters), set(mine) ^ set(self.parameters)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(mine[name])

    def losses(self, examples: Sequence[Example], before: Callable[[int], None] | None = None) -> list[Tensor]:
        """Returns the summed token loss of each example, each run alone; `before(i)` is called before each."""
        sums = []
        for number, example in enumerate(examples):
            if before:
                before(number)
            sums.append(_sum(self.model, [example], padding=0))
        return sums

    def gradients(
        self, examples: Sequence[Example], before: Callable[[int], None] | None = None
    ) -> tuple[float, Gradients]:
        """Returns mean token loss and its gradients, which are cleared."""
        loss = torch.stack(self.losses(examples, before)).sum() / supervised(examples)
        return self._backward(loss)

    def padded_gradients(self, examples: Sequence[Example], padding: int) -> tuple[float, Gradients]:
        """Returns the same of one batch, padded right to its longest example and `padding` more."""
        return self._backward(_sum(self.model, examples, padding) / supervised(examples))

    def _backward(self, loss: Tensor) -> tuple[float, Gradients]:
        loss.backward()
        gradients = {}
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None, name
            gradients[name] = parameter.grad.clone()
            parameter.grad = None
        return loss.item(), gradients


class GivenMask(nn.Module):
    """Stands where PEFT draws a dropout mask, and takes ours; `at` is (seed, step, example), set by the test."""

    at: tuple[int, int, int] = (0, 0, 0)

    def __init__(self, module: str, probability: float) -> None:
        super().__init__()
        self.module, self.p = module, probability

    def forward(self, x_BLI: Tensor) -> Tensor:
        """Drops what the engine drops for the example in hand."""
        return x_BLI * keep_mask(DropoutKey(*GivenMask.at, x_BLI.shape[1]), self.module, self.p, x_BLI) / (1 - self.p)


def give_masks(reference: Reference, probability: float) -> None:
    """Replaces every dropout of PEFT's LoRA layers by one that takes the engine's masks."""
    for name, module in list(reference.model.named_modules()):
        if name.endswith(".lora_dropout"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_dropout")
            module["default"] = GivenMask(layer, probability)


def peft_config(config: MethodConfig) -> peft.PeftConfig:
    """Returns PEFT's configuration of the same method."""
    if isinstance(config, LoraConfig):
        names = config.target_modules
        return peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            use_rslora=config.rslora,
            target_modules=names if isinstance(names, str) else list(names),
        )
    if isinstance(config, PrefixTuningConfig):
        return peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.tokens,
            prefix_projection=config.projection,
            encoder_hidden_size=config.projection_hidden,
        )
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.tokens)


def our_name(name: str, config: MethodConfig) -> str:
    """Returns our name of PEFT's parameter."""
    if isinstance(config, LoraConfig):
        return name.removeprefix("base_model.model.").replace(".default.weight", "")
    leaf = name.removeprefix("prompt_encoder.default.")
    if not isinstance(config, PrefixTuningConfig):
        return "embeddings"
    return leaf.replace("transform.0", "enter").replace("transform.2", "leave") if config.projection else "table"


def supervised(examples: Sequence[Example]) -> int:
    """Returns the number of supervised tokens."""
    return int(sum(example.supervised_L.sum() for example in examples))


def tensors(examples: Sequence[Example], padding: int) -> dict[str, Tensor]:
    """Returns ids, mask and labels of a batch padded right by id 0."""
    longest = max(len(example) for example in examples) + padding
    ids_BL = torch.zeros(len(examples), longest, dtype=torch.long)
    mask_BL, labels_BL = torch.zeros_like(ids_BL), torch.full_like(ids_BL, -100)
    for row, example in enumerate(examples):
        tokens_L = torch.from_numpy(example.tokens_L).long()
        ids_BL[row, : len(example)] = tokens_L
        mask_BL[row, : len(example)] = 1
        labels_BL[row, : len(example)] = tokens_L.masked_fill(~torch.from_numpy(example.supervised_L), -100)
    return {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL}


def _sum(model: Any, examples: Sequence[Example], padding: int) -> Tensor:
    # in float64: torch 2.13's float32 log-softmax over 49,152 words is 2e-5 nats off on AVX2, and so is a model's loss
    batch = tensors(examples, padding)
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, -labels.shape[1] : -1]  # a soft prompt's own positions come first
    return nn.functional.cross_entropy(logits.double().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
