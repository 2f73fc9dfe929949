"""Root-mean-square norms with a backward pass by hand: the input is kept, in its own precision, and nothing else wide.

A model's own norm leaves three float32 copies of the row to autograd in every layer. Whether a module is such a norm is
not read from its name: it must give the same bits forward and the same gradient on random inputs, else it stays.

Shape legend: E width of what is normed; all axes before it are rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class _RmsNorm(torch.autograd.Function):
    """Returns weight * (x / rms(x)), the quotient rounded to x's precision before the weight is applied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_E: Tensor, epsilon: float) -> Tensor:
        work = x.to(torch.float32, copy=True)
        inverse = work.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight_E, inverse)
        return weight_E * work.mul_(inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight_E, inverse = ctx.saved_tensors
        scaled = (gradients[0] * weight_E).float()
        wide = x.float()
        # d x = r g - x r^3 mean(g x), r = 1 / rms
        share = (scaled * wide).mean(-1, keepdim=True).mul_(inverse.pow(3)).neg_()
        return scaled.mul_(inverse).addcmul_(wide, share).to(x.dtype), None, None


def install(model: nn.Module, *, compare: bool = True) -> int:
    """Gives every norm of the model that passes the comparison the forward above; returns how many did.

    On other devices than CPU, and while its weight is trained, a norm runs as it was.

    Args:
        model: the causal language model.
        compare: False for a model without weights, on which nothing can be compared: its norms' names are believed.
    """
    count = 0
    for module in model.modules():
        epsilon = _epsilon(module)
        same = _is_same if compare else _is_called_so
        if epsilon is not None and same(module, epsilon):
            module.forward = partial(_forward, module, epsilon, module.forward)
            count += 1
    return count


def _forward(
    module: Any, epsilon: float, original: Callable[..., Tensor], x: Tensor, *more: Any, **named: Any
) -> Tensor:
    # with a second argument it is another function, as the gated norms of recurrent layers are
    if more or named or x.device.type != "cpu" or module.weight.requires_grad:
        return original(x, *more, **named)
    out: Tensor = _RmsNorm.apply(x, module.weight, epsilon)
    return out


def _epsilon(module: nn.Module) -> float | None:
    """Returns the constant of a module that may be such a norm: one vector of weights, no parts, a small number."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not weight.is_floating_point():
        return None
    if len(list(module.parameters())) != 1 or next(module.children(), None) is not None:
        return None
    found = [getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon")]
    return next((value for value in found if isinstance(value, float)), None)


def _is_called_so(module: Any, _epsilon: float) -> bool:
    return "RMSNorm" in type(module).__name__


def _is_same(module: Any, epsilon: float) -> bool:
    """Compares outputs bit by bit and gradients to rounding, on inputs of three sizes."""
    weight_E = module.weight
    if weight_E.device.type != "cpu" or weight_E.requires_grad:
        return False
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[0.01], [1.0], [100.0]])
    x, direction = (torch.randn(3, len(weight_E), generator=generator) for _ in range(2))
    given = (x * sizes).to(weight_E.dtype)
    results = []
    for way in (module, lambda x: _RmsNorm.apply(x, weight_E, epsilon)):
        leaf = given.clone().requires_grad_()
        try:
            with torch.enable_grad():
                out = way(leaf)
                (gradient,) = torch.autograd.grad((out * direction.to(out.dtype)).sum(), leaf)
        except (RuntimeError, TypeError, ValueError):  # not a function of one tensor
            return False
        results.append((out.detach(), gradient.float()))
    (theirs, expected), (ours, found) = results
    tolerance = 1e-5 if weight_E.dtype == torch.float32 else 2e-2
    near = ((found - expected).norm(dim=-1) <= tolerance * expected.norm(dim=-1)).all()
    return torch.equal(theirs, ours) and bool(near)
