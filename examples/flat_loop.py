"""One LoRA trial, flat: the whole method in one file, to be read from top to bottom.

    python examples/flat_loop.py [STEPS]

The engine gives the same losses (tests/test_flat_loop.py). What it does beyond this, and where:

    many trials in one row           src/peft_study/engine/engine.py, row.py
    LoRA on a span of the row        src/peft_study/methods/hooks.py, lora.py
    attention without a T x T mask   src/peft_study/model/attention.py
    loss without all the logits      src/peft_study/model/head.py
    stopping, going on, divergence   src/peft_study/engine/trial.py, checkpoint.py

Shapes: T tokens of the row, S supervised tokens, I and O inputs and outputs of a layer, R rank, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_study.data import skills
from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Example
from peft_study.engine.order import DataOrder
from peft_study.model.load import resolve_model


class Lora(nn.Module):
    """A frozen linear layer and its update: y = W x + (alpha / R) B A x. Only A and B train, in float32."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))  # zero: training starts at the base
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x_TI: Tensor) -> Tensor:
        """Returns the layer's outputs."""
        hidden_TR = x_TI @ self.A.to(x_TI.dtype).T
        return self.linear(x_TI) + self.scale * (hidden_TR @ self.B.to(x_TI.dtype).T)


def add_lora(model: Any, rank: int = 16, alpha: float = 32.0) -> dict[str, Lora]:
    """Freezes the model, puts LoRA on every linear layer but the head, and returns them by the layers' names."""
    model.requires_grad_(False)
    head, added = model.get_output_embeddings(), {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            added[name] = Lora(module, rank, alpha)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, added[name])
    return added


def loss_sum(model: Any, examples: Sequence[Example]) -> Tensor:
    """Returns the summed loss of all supervised tokens, in nats, from one row that holds all examples.

    row        | a0 a1 a2 a3 | b0 b1 b2 |
    positions  |  0  1  2  3 |  0  1  2 |
    attention  a token sees itself and what stands before it in its own example
    """
    tokens_T = torch.from_numpy(np.concatenate([e.tokens_L for e in examples])).long()
    positions_T = torch.cat([torch.arange(len(e)) for e in examples])
    owner_T = torch.cat([torch.full((len(e),), number) for number, e in enumerate(examples)])
    sees_TT = (owner_T[:, None] == owner_T[None, :]) & torch.ones(len(owner_T), len(owner_T)).bool().tril()
    mask_11TT = torch.zeros(sees_TT.shape, dtype=model.dtype).masked_fill(~sees_TT, torch.finfo(model.dtype).min)[
        None, None
    ]
    hidden_TE = model.get_decoder()(
        input_ids=tokens_T[None], position_ids=positions_T[None], attention_mask=mask_11TT, use_cache=False
    ).last_hidden_state[0]
    (places_S,) = np.nonzero(np.concatenate([e.supervised_L for e in examples]))
    places_S = torch.from_numpy(places_S)
    logits_SV = model.get_output_embeddings()(hidden_TE[places_S - 1]).float()  # a token is predicted from before it
    return F.cross_entropy(logits_SV, tokens_T[places_S], reduction="sum")


def supervised(examples: Sequence[Example]) -> int:
    """Returns how many tokens count in the loss."""
    return int(sum(e.supervised_L.sum() for e in examples))


@torch.no_grad()
def held_out_loss(model: Any, examples: Sequence[Example]) -> float:
    """Returns the mean loss of the supervised tokens of examples that are not trained on."""
    return float(sum(loss_sum(model, [e]) for e in examples)) / supervised(examples)


def train(
    model: Any,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Example],
    *,
    rate: float = 1e-3,
    steps: int = 20,
    batch_size: int = 4,
    warmup_ratio: float = 0.1,
    clip_norm: float = 1.0,
    data_seed: int = 0,
) -> Iterator[float]:
    """Trains, and yields the loss of each step: the mean over the supervised tokens of its whole batch."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    order, warmup = DataOrder(len(examples), batch_size, data_seed), int(steps * warmup_ratio)
    for step in range(steps):
        rising, falling = step / max(1, warmup), (steps - step) / max(1, steps - warmup)
        optimizer.param_groups[0]["lr"] = rate * (rising if step < warmup else falling)
        batch = [examples[i] for i in order.batch(step)]
        loss = loss_sum(model, batch) / supervised(batch)  # not the mean of the examples' means
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def main(steps: int = 20) -> None:
    """Trains the embedded model on the embedded data."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model("smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder), max_length=256)
    examples = [encoder.encode(conversation) for conversation in skills.generate(200)]
    held_out, examples = examples[:8], examples[8:]
    torch.manual_seed(0)
    parameters = [p for lora in add_lora(model).values() for p in lora.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in parameters):,} parameters train")
    print(f"held-out loss before step 1: {held_out_loss(model, held_out):.4f}")
    for step, loss in enumerate(train(model, parameters, examples, steps=steps), start=1):
        print(f"step {step}: loss {loss:.4f}")
    print(f"held-out loss after step {steps}: {held_out_loss(model, held_out):.4f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
