"""What only an accelerator can show: the variable-length kernel, and the engine on it against the CPU."""

from __future__ import annotations

import gc
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import peft_reference as pr
import tiny_world as tw
from peft_study.config import LoraConfig, TrainingConfig
from peft_study.engine.engine import Engine
from peft_study.engine.row import RowRunner
from peft_study.engine.trial import Trial
from peft_study.evaluation.decoding import Decoder, DecodingRequest
from peft_study.methods import create, low_rank
from peft_study.methods.base import LowRank
from peft_study.methods.reference import NoAdapter
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
    assert attention._varlen_serves(tensors[0], tensors[2], None, None)
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


def row_of(lengths: list[int], prefixes: dict[int, int], seed: int = 0) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Returns query, key and value of a row and a prefix for each slot that has one, float32 on the CPU."""
    generator, total = torch.Generator().manual_seed(seed), sum(lengths)
    row = [torch.randn(1, heads, total, SIZE, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return row, {s: torch.randn(1, 2, KV_HEADS, n, SIZE, generator=generator) for s, n in prefixes.items()}


def through(
    row: list[Tensor], prefixes: dict[int, Tensor], lengths: list[int], device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns output and gradients, on the CPU in float32; segment i is of slot i."""
    leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in row]
    stacks = {slot: x.to(device, dtype, copy=True).requires_grad_() for slot, x in prefixes.items()}
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    segments = tuple(Segment(e - n, e, i) for i, (e, n) in enumerate(zip(ends, lengths, strict=True)))
    layout = SegmentLayout(segments, dict(stacks))
    out, _ = segment_attention(SimpleNamespace(layer_idx=0), *leaves, None, segments=layout)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    out.backward(direction)
    found = {"out": out.detach(), "query": leaves[0].grad, "key": leaves[1].grad, "value": leaves[2].grad}
    found |= {f"prefix of {slot}": stack.grad for slot, stack in stacks.items()}
    return {name: tensor.float().cpu() for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [5, 40, 3, 17], [63, 64, 65, 1], [127, 128, 129, 200]], ids=str)
@pytest.mark.parametrize("prefixes", [{0: 1, 1: 7}, {1: 64, 3: 130}, {0: 30, 1: 3, 2: 129, 3: 16}], ids=str)
def test_keys_that_outnumber_queries_are_aligned_with_their_ends_forward_and_backward(
    prefixes: dict[int, int], lengths: list[int]
) -> None:
    """Top-left alignment would hide the last P tokens from every query, and give them no gradient."""
    row, stacks = row_of(lengths, prefixes)
    rounded = [x.bfloat16().float() for x in row], {s: x.bfloat16().float() for s, x in stacks.items()}
    assert attention._varlen_serves(*(x.to("cuda", torch.bfloat16) for x in row[::2]), None, None)
    found = through(*rounded, lengths, "cuda", torch.bfloat16)
    expected = through(*rounded, lengths, "cpu", torch.float32)
    for name, tensor in expected.items():
        if tensor.norm() > 1e-4:  # a lone key's weight is one, whatever the query: its gradient is zero
            assert pr.relative(found[name], tensor) < 2e-2, name
        else:
            assert found[name].abs().max() < 1e-2, name


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sick", [0, 1, 2])
@pytest.mark.parametrize("lengths", [[63, 64, 65], [64, 1, 64], [65, 63, 129], [127, 128, 1], [130, 62, 66]], ids=str)
def test_a_neighbour_that_is_not_finite_changes_no_bit_at_the_borders_of_tiles(
    lengths: list[int], sick: int, poison: float
) -> None:
    """The kernel reads keys in tiles of 64 or 128, beyond a segment's end: what it reads there must be masked out.

    A mask that multiplies by zero would not do: zero times NaN is NaN.
    """
    row, stacks = row_of(lengths, {0: 3, 1: 61, 2: 66})
    start, end = sum(lengths[:sick]), sum(lengths[: sick + 1])
    healthy = through(row, stacks, lengths, "cuda", torch.bfloat16)
    again = through(row, stacks, lengths, "cuda", torch.bfloat16)
    infected = [x.clone() for x in row]
    for tensor in infected:
        tensor[:, :, start:end] = poison
    ill = {s: x.clone().fill_(poison) if s == sick else x for s, x in stacks.items()}
    found = through(infected, ill, lengths, "cuda", torch.bfloat16)
    assert not found["out"][0, start:end].isfinite().any()
    for name, tensor in healthy.items():
        if name == f"prefix of {sick}":
            continue
        dim = 1 if name == "out" else 2
        kept = [i for i in range(tensor.shape[dim]) if name.startswith("prefix") or not start <= i < end]
        one, two, three = (x.index_select(dim, torch.tensor(kept)) for x in (tensor, found[name], again[name]))
        assert two.isfinite().all(), name
        # the backward kernel may add up in another order each time: then it is as near as to itself
        assert torch.equal(one, two) or (one - two).norm() <= 2 * (one - three).norm() > 0, name


def test_memory_that_runs_out_halves_the_row_and_loses_nothing() -> None:
    """A real limit: the process may take half of what the row needs beside an eighth of the row."""
    examples, whole_row = tw.examples([200] * 256), 256 * 200
    training = TrainingConfig(learning_rate=1e-3, steps=2, batch_size=256)

    def run(row_tokens: int, room: int | None = None) -> tuple[list[float], dict[str, Tensor], int, int]:
        base = tw.base("llama", device="cuda")
        engine = Engine(base, row_tokens=row_tokens)
        trial = Trial("t", create(LoraConfig(rank=4), base, None, 0), training, examples)
        engine.admit(trial)
        gc.collect()  # the base before this one hangs in a cycle with its hooks
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, (_, total) = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()
        if room is not None:
            torch.cuda.set_per_process_memory_fraction((before + room) / total)
        losses = []
        try:
            while not trial.finished:
                losses += [event.report.loss for event in engine.step() if event.report]
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        parameters = {name: p.detach().cpu() for name, p in trial.parameters.items()}
        return losses, parameters, engine.row_tokens, torch.cuda.max_memory_reserved() - before

    run(whole_row // 8)  # what the libraries keep for themselves is taken by the first run
    *_, eighth = run(whole_row // 8)
    losses, parameters, _, whole = run(whole_row)
    assert whole > 2 * eighth, "the row is too small to run out of anything"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, ends, row_tokens, _ = run(whole_row, (whole + eighth) // 2)
    told = [str(w.message) for w in caught if "out of memory on cuda" in str(w.message)]
    assert row_tokens < whole_row
    assert len(told) == round(math.log2(whole_row / row_tokens))
    assert all(line.endswith("nothing is lost") for line in told)
    assert found == pytest.approx(losses, rel=1e-4)
    for name, tensor in parameters.items():
        assert pr.relative(ends[name], tensor) < 1e-3, name


@pytest.mark.parametrize("family", tw.FAMILIES)
def test_answers_on_cuda_are_those_of_the_cpu_in_float32(family: str) -> None:
    """Three methods and the base side by side, token by token."""
    prompts = [example.tokens_L.tolist() for example in tw.examples([12, 3, 20])]
    found = []
    for device in ("cpu", "cuda"):
        base = tw.base(family, device=device)
        adapters = [*(pr.adapter_of(config, base) for config in pr.METHODS.values()), NoAdapter()]
        decoder = Decoder(RowRunner(base), ends=frozenset({5}), row_tokens=64)
        requests = [DecodingRequest(adapter, prompt, 16) for adapter in adapters for prompt in prompts]
        found.append({place: answer.tokens for place, answer in decoder.answers(requests)})
    assert found[0] == found[1]


def adapted(serves: bool, poison: float | None, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Returns output and gradients of an adapted layer on three spans, grouped or one by one."""
    monkeypatch.setattr(low_rank, "grouped_products_serve", lambda *_: serves)
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=draw).to("cuda", dtype)

    x, weight = random(1, 200, 64, dtype=torch.bfloat16).requires_grad_(), random(96, 64, dtype=torch.bfloat16)
    spans = []
    for start, end, rank in ((0, 3, 5), (3, 70, 8), (70, 200, 7)):
        pair = random(rank, 64).requires_grad_(), random(96, rank).requires_grad_()
        spans.append(low_rank.SpanUpdate(start, end, LowRank(*pair, 0.5)))
    if poison is not None:
        with torch.no_grad():
            spans[1].update.A.fill_(poison)
    groups = low_rank.grouped(spans, x, lambda ends: torch.tensor(ends, dtype=torch.int32, device="cuda"))
    assert len(groups) == (1 if serves else 3)
    out = low_rank.linear(x, weight, None, groups)
    leaves = [x, *(matrix for span in spans for matrix in (span.update.A, span.update.B))]
    return [out.detach(), *torch.autograd.grad((out * random(*out.shape, dtype=out.dtype)).sum(), leaves)]


def test_grouped_products_are_those_of_each_span(monkeypatch: pytest.MonkeyPatch) -> None:
    if not low_rank.grouped_products_serve(torch.device("cuda"), torch.bfloat16):
        pytest.skip("this card has no kernel of grouped products")
    for one, together in zip(*(adapted(serves, None, monkeypatch) for serves in (False, True)), strict=True):
        assert pr.relative(together, one) < 1e-2
    well, sick = (adapted(True, poison, monkeypatch) for poison in (None, math.nan))
    others = torch.ones(200, dtype=torch.bool, device="cuda")
    others[3:70] = False
    for a, b in zip(sick[:2], well[:2], strict=True):
        assert torch.equal(a[0, others], b[0, others]), "a neighbour's NaN changed bits"
    for number in (2, 3, 6, 7):
        assert torch.equal(sick[number], well[number]), "a neighbour's NaN changed a gradient"
