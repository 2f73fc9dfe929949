"""What only an accelerator can show: the variable-length kernel, and the engine on it against the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import peft_reference as pr
import tiny_world as tw
from peft_study.config import TrainingConfig
from peft_study.engine.engine import Engine
from peft_study.engine.trial import Trial
from peft_study.methods import create
from peft_study.model import attention
from peft_study.model.attention import Segment, SegmentLayout, segment_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the variable-length kernel needs one"),
]
HEADS, KV_HEADS, SIZE = 8, 2, 64
LENGTHS = [70, 1, 33, 200]


def attend(tensors: list[Tensor], window: int | None, *, prefixed: bool) -> list[Tensor]:
    """Output and gradients of one row; slots 0 and 1 alternate, slot 1 has the prefix."""
    query, key, value, stack = (t.detach().clone().requires_grad_() for t in tensors)
    segments, start = [], 0
    for number, length in enumerate(LENGTHS):
        segments.append(Segment(start, start + length, number % 2))
        start += length
    layout = SegmentLayout(tuple(segments), {1: stack} if prefixed else {})
    out, _ = segment_attention(
        SimpleNamespace(layer_idx=0), query, key, value, None, sliding_window=window, segments=layout
    )
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(out.shape, generator=generator).to(out)
    (out.float() * direction.float()).sum().backward()
    gradients = [query.grad, key.grad, value.grad] + ([stack.grad] if prefixed else [])
    return [out.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("window", [None, 16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_variable_length_kernel_is_the_loop_forward_and_backward(
    dtype: torch.dtype, window: int | None, prefixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is the loop in float32 on the CPU, itself tested against the definition."""
    generator, total = torch.Generator().manual_seed(0), sum(LENGTHS)
    shapes = [
        (1, HEADS, total, SIZE),
        (1, KV_HEADS, total, SIZE),
        (1, KV_HEADS, total, SIZE),
        (1, 2, KV_HEADS, 12, SIZE),
    ]
    tensors = [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]
    assert attention._varlen_serves(tensors[0], None, None)
    found = attend(tensors, window, prefixed=prefixed)
    expected = attend([t.float().cpu() for t in tensors], window, prefixed=prefixed)
    monkeypatch.setattr(attention, "_varlen_serves", lambda *_: False)
    loop = attend(tensors, window, prefixed=prefixed)
    for ours, theirs, exact in zip(found, loop, expected, strict=True):
        noise = pr.relative(theirs.cpu(), exact)
        assert pr.relative(ours.cpu(), exact) <= max(1e-2, 1.5 * noise)


def test_the_causal_mask_is_aligned_bottom_right_behind_a_prefix() -> None:
    """Changing token j changes the outputs of its segment from j on, and changing the prefix all of its segments."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, 40, SIZE, generator=generator).to("cuda", torch.bfloat16) for h in (8, 2, 2))
    stack = torch.randn(1, 2, KV_HEADS, 5, SIZE, generator=generator).to("cuda", torch.bfloat16)
    layout = SegmentLayout((Segment(0, 15, 0), Segment(15, 40, 1)), {1: stack})

    def out() -> Tensor:
        return segment_attention(SimpleNamespace(layer_idx=0), query, key, value, None, segments=layout)[0][0]

    before = out()
    value[:, :, 20] += 1
    changed = (out() != before).flatten(1).any(dim=1).tolist()
    assert changed == [i >= 20 for i in range(40)]
    value[:, :, 20] -= 1
    before = out()
    stack[:, 1] += 1
    changed = (out() != before).flatten(1).any(dim=1).tolist()
    assert changed == [i >= 15 for i in range(40)]


def test_neighbours_do_not_change_a_bit_forward() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, 90, SIZE, generator=generator).to("cuda", torch.bfloat16) for h in (8, 2, 2))

    def out(first: int) -> Tensor:
        segments = (Segment(0, 60 - first, 0), Segment(60 - first, 90 - first, 0))
        parts = [x[:, :, first:].contiguous() for x in (query, key, value)]
        return segment_attention(SimpleNamespace(layer_idx=0), *parts, None, segments=SegmentLayout(segments))[0][0]

    assert torch.equal(out(0)[60:], out(37)[23:])


@pytest.mark.parametrize("method", pr.METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_a_step_on_cuda_is_a_step_on_the_cpu_in_float32(family: str, method: str) -> None:
    ends = []
    for device in ("cpu", "cuda"):
        base = tw.base(family, device=device)
        training = TrainingConfig(learning_rate=1e-3, steps=5, batch_size=4)
        trial = Trial("t", create(pr.METHODS[method], base, tw.material(), 0), training, tw.examples([12, 20, 9, 33]))
        engine = Engine(base, row_tokens=64)
        engine.admit(trial)
        losses = []
        while not trial.finished:
            losses += [event.report.loss for event in engine.step()]
        ends.append((losses, {n: p.detach().cpu() for n, p in trial.parameters.items()}))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-4)
    for name, parameter in ends[0][1].items():
        assert pr.relative(ends[1][1][name], parameter) < 1e-3


@pytest.mark.parametrize("method", ["lora", "prefix, random", "prompt, random"])
def test_bfloat16_gradients_on_cuda_are_as_near_to_float32_as_pefts(method: str) -> None:
    config, examples = pr.METHODS[method], tw.examples([12, 20, 9, 33])
    base = tw.base("llama", dtype=torch.bfloat16, device="cuda")
    adapter = pr.adapter_of(config, base)
    _, found = pr.ours(base, adapter, examples)
    _, exact = pr.Reference(tw.model("llama", dtype=torch.bfloat16).float(), config, adapter).gradients(examples)
    _, theirs = pr.Reference(tw.model("llama", dtype=torch.bfloat16), config, adapter).gradients(examples)
    ours = {name: gradient.cpu() for name, gradient in found.items()}
    assert pr.worst(ours, exact) <= max(1e-2, 2 * pr.worst(theirs, exact))
