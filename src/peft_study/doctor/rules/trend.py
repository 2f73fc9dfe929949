"""Rising, or only noisy, or not decidable yet."""

from __future__ import annotations

import math

import numpy as np

from peft_study.doctor.diagnosis import Problem, Said
from peft_study.doctor.observations import Observations
from peft_study.doctor.rates import lower_rate, rates_said
from peft_study.doctor.rule import rule
from peft_study.doctor.trend import LEAST_POINTS, Series, held_out_fall, training_series

RISES = 4.0
"""Standard errors by which the end lies above the beginning: chance gives that to one run in 30,000."""
SMALL_RISE = 0.02
"""Share of the loss; a smaller rise may be the order of the data."""
CLEAR = 3.0
"""Standard errors from which a fall or a rise is clear."""
WORTHWHILE = 0.05
"""Share of the loss that counts as a fall."""
SEEN = 0.07
"""Share of the loss: a run is judged as flat where a fall of so much would be clear."""


@rule(
    "run",
    looks_at="the loss of the first against the last quarter and the trend of all points (Mann-Kendall), with noise "
    "and autocorrelation estimated on the series; the loss minus the untouched base's, where it was logged",
    threshold="4 standard errors and 2 % of the loss above the beginning",
    source="Mann (1945), Kendall (1975); variance widened for autocorrelation",
    false_alarms="data sorted from easy to hard, where the base's loss is not known",
    needs=("curve",),
    explains=("noisy", "undecided", "never_learned"),
)
def rising(seen: Observations) -> Problem | None:
    """The loss ends above its beginning, and that is no noise."""
    curve = seen.curve
    assert curve is not None
    series = training_series(curve)
    if series is None or len(series) < 6:
        return None
    first, last = series.quarters()
    start, end = series.start, series.end
    up = end.value - min(start.value, first.value)
    by_quarter = last.above(first) > RISES and end.value > start.value
    from_start = end.above(start) > RISES and series.direction() > -CLEAR
    if not (by_quarter or from_start) or up < SMALL_RISE * abs(start.value):
        return None
    trend, rate = series.direction(), lower_rate(seen.settings)
    errors = max(end.above(start), last.above(first))
    base = Said(" above the untouched base's on the same examples", "（相对基座在相同样本上的损失）")
    over = base if series.paired else Said("", "")
    return Problem(
        level="error",
        sure="certain" if by_quarter and from_start and trend > CLEAR else "likely",
        cause=Said("the loss rises", "损失在上升"),
        evidence=Said(
            f"{start.value:.3g} at the start, {end.value:.3g} at the end{over.en}: "
            f"{min(errors, 99):.0f} standard errors of its noise{rates_said(seen.settings).en}",
            f"开始时 {start.value:.3g}，结束时 {end.value:.3g}{over.zh}：为噪声标准误的 "
            f"{min(errors, 99):.0f} 倍{rates_said(seen.settings).zh}",
        ),
        consequence=Said("training makes the model worse", "训练让模型变差"),
        change=Said(
            "check that only the adapter trains and that labels are not shifted; then lower the learning rate",
            "先确认只有适配器在训练、标签没有错位；再降低学习率",
        ),
        paste=None if rate is None else f"learning_rate: {rate:g}",
        values={"start": start.value, "end": end.value, "trend": trend},
        step=int(series.steps[0]),
    )


@rule(
    "run",
    looks_at="points above the start, against the trend of all points",
    threshold="a tenth of the later points lie above the start while the trend falls or is flat",
    source="the same test as rising",
    false_alarms="none: it is a note",
    needs=("curve",),
)
def noisy(seen: Observations) -> Problem | None:
    """Single points rise, but the run does not."""
    curve = seen.curve
    assert curve is not None
    series = training_series(curve)
    if series is None or len(series) < 20 or not series.falls():
        return None
    later = series.values[len(series) // 2 :]
    jumps = np.diff(series.values)
    above = float((later > series.start.value).mean())
    if above < 0.1:
        return None
    place = int(jumps.argmax()) + 1
    before, after, step = series.values[place - 1], series.values[place], int(series.steps[place])
    return Problem(
        level="note",
        sure="likely",
        cause=Said("the loss is noisy, but it does not rise", "损失有噪声，但没有上升趋势"),
        evidence=Said(
            f"points scatter by {series.noise:.2g} about their level; {100 * above:.0f} % of the later ones lie above "
            f"the start; the largest jump is from {before:.3g} to {after:.3g} at step {step}",
            f"各点在其水平上下波动 {series.noise:.2g}；后半程有 {100 * above:.0f}% 的点高于开始时；"
            f"最大的一次跳升在第 {step} 步，从 {before:.3g} 到 {after:.3g}",
        ),
        consequence=Said("none", "无"),
        change=Said("look at a mean over several steps, or at held-out losses", "看多步的平均值，或看验证损失"),
        values={"noise": series.noise, "step": step},
        step=step,
    )


def points_needed(series: Series) -> int:
    """Returns about how many points it takes to see the fall that there seems to be, at least 5 % of the loss.

    First against last quarter: 2 * variance * 4 / points = (fall / 3)^2.
    """
    first, last = series.quarters()
    least = WORTHWHILE * max(abs(first.value), 1e-12)
    size = max(abs(first.value - last.value), least)
    return math.ceil(8 * series.noise**2 * series.inflation * (CLEAR / size) ** 2)


@rule(
    "run",
    looks_at="the noise of the loss against the change that there seems to be",
    threshold="neither a fall nor a rise of 3 standard errors, and one of 7 % of the loss could not be seen",
    source="the same test as rising, solved for the number of points",
    false_alarms="none: it is a note",
    needs=("curve",),
)
def undecided(seen: Observations) -> Problem | None:
    """The log is too short to say whether the loss falls or rises."""
    curve = seen.curve
    assert curve is not None
    series = training_series(curve)
    if held_out_fall(curve) > WORTHWHILE or not len(curve.loss):
        return None
    if series is None:
        count = int(np.isfinite(curve.loss).sum())
        needed, spread = LEAST_POINTS, Said(f"it has {count}", f"只有 {count} 个点")
        steps = needed * max(curve.window, 1)
    else:
        first, last = series.quarters()
        if series.falls() or abs(last.above(first)) > CLEAR or series.direction() > CLEAR or decidable(series):
            return None
        needed = max(points_needed(series), len(series) + 1)
        spacing = float(np.median(np.diff(series.steps))) if len(series) > 1 else 1.0
        steps = max(1, round(needed * spacing))
        spread = Said(
            f"{len(series)} points that scatter by {series.noise:.2g} about {first.value:.3g}",
            f"有 {len(series)} 个点，在 {first.value:.3g} 上下波动 {series.noise:.2g}",
        )
    return Problem(
        level="note",
        sure="certain",
        cause=Said(
            f"whether the loss falls cannot be told before about {steps} steps",
            f"大约 {steps} 步以前，无法判断损失是否下降",
        ),
        evidence=spread,
        consequence=Said("neither a fault nor success shows yet", "目前既看不出故障，也看不出成功"),
        change=Said(
            "train longer, log more often, or measure held-out losses", "训练更久、更频繁地记录，或测量验证损失"
        ),
        values={"steps": steps, "points": needed},
    )


def decidable(series: Series) -> bool:
    """Returns whether a fall of 7 % of the loss from the first to the last quarter would be clear."""
    first, last = series.quarters()
    error = math.hypot(first.error, last.error)
    return CLEAR * error <= SEEN * max(abs(first.value), 1e-12)
