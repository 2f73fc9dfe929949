"""The loss of the packed row: logits only at supervised positions, in chunks, never all at once.

A vocabulary of 50,000 to 260,000 makes the logits the largest tensor of a training step. Here a chunk of positions
is turned into logits, loss and gradient with respect to the hidden states, and forgotten, before the next.

Shape legend: S supervised positions of the row, E hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = (1 << 23) - (1 << 16)
"""Logits held at a time on CPU (positions x vocabulary): just under 32 MiB in float32; accelerators hold twice as many.

From 32 MiB on, glibc asks the kernel for every buffer again, and clearing its pages costs more than the arithmetic.
"""

Transform = Callable[[Tensor], Tensor]


def head_transform(config: Any) -> Transform:
    """Returns what a model does to its logits after the head's matrix product.

    Gemma-2 and -3 cap them (``final_logit_softcapping``), Granite divides (``logits_scaling``), Cohere multiplies
    (``logit_scale``). The load-time proof compares the result with the model's own logits (model/proof.py).
    """
    cap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None)
    factor = getattr(config, "logit_scale", None)

    def transform(logits: Tensor) -> Tensor:
        if divisor is not None:
            logits = logits / divisor
        if factor is not None:
            logits = logits * factor
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    return transform


def token_losses(
    hidden_SE: Tensor, targets_S: Tensor, weights_S: Tensor, head: nn.Module, transform: Transform
) -> tuple[Tensor, Tensor]:
    """Returns the weighted sum of token losses (differentiable) and each token's loss (S,), in nats, float32.

    Args:
        hidden_SE: hidden states at the positions that predict.
        targets_S: token ids to be predicted.
        weights_S: weight of each token in the sum, float32.
        head: the model's output projection; its own parameters receive gradients where they require them.
        transform: what the model does to the logits afterwards.
    """
    if any(p.requires_grad for p in head.parameters()):
        return _checkpointed_losses(hidden_SE, targets_S, weights_S, head, transform)
    return _FrozenHeadLoss.apply(hidden_SE, targets_S, weights_S, head, transform)


def logit_losses(logits_SV: Tensor, targets_S: Tensor, weights_S: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what `token_losses` does, from logits that the model made itself.

    Args:
        logits_SV: the model's own logits at the positions that predict.
        targets_S: token ids to be predicted.
        weights_S: weight of each token in the sum, float32.
    """
    losses_S = F.cross_entropy(logits_SV.float(), targets_S, reduction="none")
    return (losses_S * weights_S).sum(), losses_S.detach()


def _chunks(count: int, vocabulary: int, device: torch.device) -> list[slice]:
    most = max(1, CHUNK_LOGITS * (1 if device.type == "cpu" else 2) // vocabulary)
    size = math.ceil(count / math.ceil(count / most)) if count else most  # chunks of about one size
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _losses(hidden_SE: Tensor, targets_S: Tensor, head: nn.Module, transform: Transform) -> Tensor:
    return F.cross_entropy(transform(head(hidden_SE)).float(), targets_S, reduction="none")


def _vocabulary(head: nn.Module) -> int:
    return int(getattr(head, "out_features", 0)) or int(next(head.parameters()).shape[0])


def _checkpointed_losses(
    hidden_SE: Tensor, targets_S: Tensor, weights_S: Tensor, head: nn.Module, transform: Transform
) -> tuple[Tensor, Tensor]:
    """Chunks under activation checkpointing, for heads that are trained themselves (full fine-tuning)."""
    pieces = [
        checkpoint(_losses, hidden_SE[part], targets_S[part], head, transform, use_reentrant=False)
        for part in _chunks(len(targets_S), _vocabulary(head), hidden_SE.device)
    ]
    losses_S = torch.cat(pieces) if pieces else hidden_SE.new_zeros(0, dtype=torch.float32)
    return (losses_S * weights_S).sum(), losses_S.detach()


def _losses_and_gradient(
    logits_SV: Tensor, targets_S: Tensor, weights_S: Tensor, *, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns each token's loss (S,) and the gradient (S, V) of their weighted sum, in one float32 copy of the logits.

    The loss is log sum exp(logits) - logit of the target; its gradient is the softmax, less one at the target.
    """
    target_S1 = targets_S[:, None]
    work_SV = logits_SV.to(torch.float32, copy=True)
    chosen_S1 = work_SV.gather(1, target_S1)
    top_S1 = work_SV.amax(dim=1, keepdim=True)
    total_S1 = work_SV.sub_(top_S1).exp_().sum(dim=1, keepdim=True)
    losses_S = (total_S1.log() + top_S1 - chosen_S1).squeeze(1)
    if not wanted:
        return losses_S, None
    work_SV.mul_(weights_S[:, None] / total_S1)
    work_SV.scatter_add_(1, target_S1, -weights_S[:, None])
    return losses_S, work_SV.to(logits_SV.dtype)


class _FrozenHeadLoss(torch.autograd.Function):
    """Computes the gradient with the loss, chunk by chunk: the head is frozen, so only d loss / d hidden is needed.

    No token's gradient depends on another's, whatever its value: a trial's infinity stays in its own positions.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_SE: Tensor, targets_S: Tensor, weights_S: Tensor, head: nn.Module, transform: Transform
    ) -> tuple[Tensor, Tensor]:
        losses_S = hidden_SE.new_empty(len(targets_S), dtype=torch.float32)
        wanted = ctx.needs_input_grad[0]
        gradient_SE = torch.empty_like(hidden_SE) if wanted else None
        for part in _chunks(len(targets_S), _vocabulary(head), hidden_SE.device):
            with torch.set_grad_enabled(wanted):
                chunk = hidden_SE[part].detach().requires_grad_(wanted)
                logits = transform(head(chunk))
            losses_S[part], d_logits = _losses_and_gradient(
                logits.detach(), targets_S[part], weights_S[part], wanted=wanted
            )
            if gradient_SE is not None:
                (gradient_SE[part],) = torch.autograd.grad(logits, chunk, d_logits)
        ctx.save_for_backward(gradient_SE)
        ctx.mark_non_differentiable(losses_S)
        return (losses_S * weights_S).sum(), losses_S

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient_SE,) = ctx.saved_tensors
        return (None if gradient_SE is None else gradient_SE * gradients[0]), None, None, None, None
