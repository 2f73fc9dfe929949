"""Norms are replaced only where they give the same numbers, and step aside where their weights are trained."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import tiny_world as tw
from peft_study.model.cpu import norm


class Rms(nn.Module):
    def __init__(self, width: int, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5, requires_grad=False)
        self.eps, self.factor = 1e-5, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype) * self.factor


def gradients(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    (found,) = torch.autograd.grad((out * torch.linspace(-1, 2, out.shape[-1]).to(out.dtype)).sum(), leaf)
    return out.detach(), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_gives_the_same_bits_and_gradient(dtype: torch.dtype) -> None:
    module = Rms(24).to(dtype)
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(3)).to(dtype)
    out, expected = gradients(module, x)
    assert norm.install(module) == 1
    ours, found = gradients(module, x)
    assert torch.equal(ours, out)
    assert (found - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()


def test_another_function_is_left_alone() -> None:
    assert norm.install(Rms(24, factor=1.01)) == 0
    assert norm.install(nn.LayerNorm(24).requires_grad_(False)) == 0


def test_families_whose_norms_fit_have_them_replaced() -> None:
    replaced = {family: norm.install(tw.model(family).requires_grad_(False)) for family in tw.FAMILIES}
    assert replaced["llama"] == replaced["granite"] == 5  # two a layer and the last
    assert replaced["qwen3"] == 9  # queries and keys too
    assert replaced["gemma2"] == 0  # its weights are offsets from one


def test_a_trained_weight_gets_its_gradient() -> None:
    module = Rms(24)
    norm.install(module)
    module.weight.requires_grad_(True)
    module(torch.randn(3, 24)).sum().backward()
    assert module.weight.grad is not None


def test_rows_do_not_meet() -> None:
    module = Rms(24)
    norm.install(module)
    x = torch.randn(5, 24)
    out, gradient = gradients(module, x)
    x[2] = math.nan
    sick, sick_gradient = gradients(module, x)
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], sick[others])
    assert torch.equal(gradient[others], sick_gradient[others])


def test_a_second_argument_is_the_modules_own_business() -> None:
    class Gated(Rms):
        def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            out = super().forward(x)
            return out if gate is None else out * gate

    module = Gated(24)
    x, gate = torch.randn(2, 3, 24)
    expected = module(x, gate)
    assert norm.install(module) == 1
    assert torch.equal(module(x, gate), expected)
    assert torch.equal(module(x, gate=gate), expected)
