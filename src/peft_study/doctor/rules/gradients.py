"""Gradients that are cut or overflow."""

from __future__ import annotations

import numpy as np

from peft_study.doctor.diagnosis import Problem, Said
from peft_study.doctor.observations import LossCurve, Observations
from peft_study.doctor.rule import rule

ALWAYS = 0.95
"""Share of the steps."""
FAR_ABOVE = 10.0
"""Median norm in multiples of the clip from which plain gradient descent goes a tenth of its way at most."""
TINY_CLIP = 0.01
"""A clip at which plain gradient descent is cut at every step of a language model (norms of 0.1 to 10 are usual)."""
HALVINGS = 4
"""Falls of the loss scale beyond its way down at the start (GradScaler begins at 65536 and halves)."""
SKIPPED = 0.03
"""Share of the steps without an update; with a growth interval of 2,000, 1 in 2,000 is skipped."""


@rule(
    "run",
    looks_at="the gradient norm before clipping, against the clip; the optimizer",
    threshold="above it in 95 % of at least 10 points; a warning where the optimizer is no Adam and the norm tenfold "
    "(no norm logged: a clip of at most 0.01)",
    source="Adam divides by the gradient's own size (Kingma and Ba 2015), so that a constant factor evens out",
    false_alarms="plain gradient descent with a rate that makes up for the clip",
    needs=("curve", "settings.clip_norm"),
    explains=("never_learned", "too_cold", "undecided", "noisy"),
)
def always_clipped(seen: Observations) -> Problem | None:
    """The gradient is cut at every step."""
    curve, clip = seen.curve, seen.settings.clip_norm
    assert curve is not None
    assert clip is not None
    optimizer = (seen.settings.optimizer or "adam").lower()
    plain = not any(name in optimizer for name in ("adam", "adafactor", "lion", "lamb"))
    if not 0 < clip < np.inf:
        return None
    norms = np.empty(0) if curve.gradient_norm is None else curve.gradient_norm[np.isfinite(curve.gradient_norm)]
    if len(norms) < 10:
        said = Said(f"the clip is {clip:g}", f"裁剪值为 {clip:g}")
        return _clipped(said, clip, None, optimizer, bad=True) if plain and clip <= TINY_CLIP else None
    if (norms > clip).mean() < ALWAYS:
        return None
    ratio, share = float(np.median(norms)) / clip, f"{100 * (norms > clip).mean():.0f}"
    seen_at = Said(
        f"the norm lies above the clip of {clip:g} at {share} % of {len(norms)} points, at {ratio:.3g} times it on the "
        "median",
        f"{len(norms)} 个点中有 {share}% 的梯度范数超过裁剪值 {clip:g}，中位数为其 {ratio:.3g} 倍",
    )
    return _clipped(seen_at, clip, ratio, optimizer, bad=plain and ratio >= FAR_ABOVE)


def _clipped(seen_at: Said, clip: float, ratio: float | None, optimizer: str, *, bad: bool) -> Problem:
    higher = 1.0 if ratio is None else float(f"{2 * ratio * clip:.1g}")
    return Problem(
        level="warning" if bad else "note",
        sure="likely" if bad else "possible",
        cause=Said("the gradient is clipped at nearly every step", "几乎每一步的梯度都被裁剪"),
        evidence=Said(
            f"{seen_at.en}; the optimizer is {optimizer}" if bad else seen_at.en,
            f"{seen_at.zh}；优化器是 {optimizer}" if bad else seen_at.zh,
        ),
        consequence=Said(
            "every step has the length of clip times rate, however large the gradient",
            "无论梯度多大，每步长度都只有裁剪值乘学习率",
        ),
        change=Said(
            f"raise the clip to about {higher:g}, or lower the rate if the norm grows",
            f"把裁剪值提高到约 {higher:g}；如果范数在增大，则降低学习率",
        ),
        paste=f"max_grad_norm: {higher:g}",
        values={"clip": clip, "ratio": ratio},
    )


@rule(
    "run",
    looks_at="the loss scale of fp16, skipped steps, gradient norms that are not finite beside a finite loss",
    threshold="4 falls of the scale after the first tenth of the run or a scale of at most 1; 3 % of the steps skipped "
    "or without a finite norm, and at least 3",
    source="torch.amp.GradScaler: it halves at an overflow, and doubles after 2,000 steps without one",
    false_alarms="the first steps of every fp16 run, while the scale finds its height: left out",
    needs=("curve",),
    explains=("diverged", "never_learned", "too_cold", "rising", "too_hot", "always_clipped", "noisy", "undecided"),
)
def fp16_overflow(seen: Observations) -> Problem | None:
    """Gradients overflow in float16 again and again."""
    curve = seen.curve
    assert curve is not None
    said, said_zh, values = [], [], {}
    falls = _scale_falls(curve)
    if falls is not None:
        count, last = falls
        said.append(f"the loss scale falls {count} times, to {last:g}")
        said_zh.append(f"损失缩放下降 {count} 次，到 {last:g}")
        values["falls"] = count
    if curve.skipped is not None and curve.skipped >= 3 and len(curve.steps):
        steps = max(float(curve.steps[-1]), 1.0)
        if curve.skipped > SKIPPED * steps + 10:
            said.append(f"{curve.skipped} of {int(steps)} steps had no update")
            said_zh.append(f"{int(steps)} 步中有 {curve.skipped} 步没有更新")
    bad = _bad_norms(seen, curve)
    if bad:
        said.append(f"the gradient norm is not finite at {bad} points where the loss is")
        said_zh.append(f"有 {bad} 个点损失有限而梯度范数不是有限值")
        values["bad_norms"] = bad
    if not said:
        return None
    return Problem(
        level="error" if seen.settings.parameter_dtype == "float16" else "warning",
        sure="likely",
        cause=Said("gradients overflow in float16", "float16 下梯度溢出"),
        evidence=Said("; ".join(said), "；".join(said_zh)),
        consequence=Said(
            "those steps change nothing, and a small scale loses small gradients",
            "这些步没有更新；缩放过小会丢失小梯度",
        ),
        change=Said(
            "train in bfloat16, or keep what trains in float32 under autocast; else lower the rate",
            "改用 bfloat16，或让可训练参数保持 float32 并使用 autocast；否则降低学习率",
        ),
        paste="bf16: true",
        values=values,
    )


def _scale_falls(curve: LossCurve) -> tuple[int, float] | None:
    """Returns how often the loss scale falls after the first tenth, and its last value; None where that is usual."""
    if curve.loss_scale is None:
        return None
    scales = curve.loss_scale[np.isfinite(curve.loss_scale)]
    if len(scales) < 4:
        return None
    factors = scales[1:] / np.maximum(scales[:-1], 1e-30)
    late = factors[len(factors) // 10 :]
    halvings = int(np.round(-np.log2(np.maximum(late[late < 1], 1e-9))).sum())
    if halvings < HALVINGS and scales[-1] > 1:
        return None
    # a scale that recovers after each fall is the scaler at work
    if scales[-1] >= scales[len(scales) // 10] and scales[-1] > 1:
        return None
    return int((factors < 1).sum()), float(scales[-1])


def _bad_norms(seen: Observations, curve: LossCurve) -> int:
    """Returns how many gradient norms are not finite beside a finite loss; 0 where that is usual or not known."""
    norms = curve.gradient_norm
    if norms is None or len(norms) != len(curve.loss):
        return 0
    fp16 = seen.settings.compute_dtype == "float16" or curve.loss_scale is not None
    # a NaN may be a norm that was not logged; an infinite one was
    bad = np.isinf(norms) | (np.isnan(norms) if fp16 else np.zeros(len(norms), dtype=bool))
    bad &= np.isfinite(curve.loss) & (curve.loss != 0)
    # the first steps find the scale's height
    late = bad[max(2, len(bad) // 10) :]
    count = int(late.sum())
    return count if count >= 3 and count > SKIPPED * len(norms) else 0
