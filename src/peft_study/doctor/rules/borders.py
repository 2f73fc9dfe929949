"""Jumps where the loss should go on smoothly: between epochs, and where a run was taken up again."""

from __future__ import annotations

import math

import numpy as np

from peft_study.doctor.diagnosis import Problem, Said
from peft_study.doctor.observations import LossCurve, Observations
from peft_study.doctor.rule import rule
from peft_study.doctor.trend import Series, training_series

BORDER_ERRORS = 4.0
"""Standard errors of the mean jump over all borders."""
BORDER_SHARE = 0.03
"""Share of the loss: smaller jumps matter to nobody."""
MANY = 12
"""Other places from which the spread of jumps is taken."""
RESUME_ERRORS = 3.0
"""Standard errors of a single jump that is looked for at a single place."""
PERIODS, ALIKE = 3, 0.7
"""Repeats of the same shape, and the correlation of each with the one before, that chance does not give."""


def jump(series: Series, place: int, width: int) -> float:
    """Returns how much the level rises at a point."""
    before, after = series.values[max(0, place - width) : place], series.values[place : place + width]
    return float(np.median(after) - np.median(before)) if len(before) and len(after) else 0.0


def elsewhere(series: Series, places: list[int], width: int) -> tuple[float, float]:
    """Returns what the level rises by at other points on the median, and the standard error of such a rise.

    The spread of the same number elsewhere counts trend, autocorrelation and saw teeth; it is no smaller than what
    independent points would give, and all there is on a short series.
    """
    least = 1.25 * _jitter(series) * math.sqrt(2 / width)
    others = [
        jump(series, place, width)
        for place in range(width, len(series) - width)
        if all(abs(place - border) >= width for border in places)
    ]
    if len(others) < MANY:
        return 0.0, max(least, 1.25 * series.noise * math.sqrt(2 * series.inflation / width))
    middle = float(np.median(others))
    return middle, max(least, 1.4826 * float(np.median(np.abs(np.array(others) - middle))))


def _jitter(series: Series) -> float:
    """Returns the noise from point to point, whatever the trend."""
    seconds = np.diff(series.values, 2)
    return 1.4826 * float(np.median(np.abs(seconds - np.median(seconds)))) / math.sqrt(6)


@rule(
    "run",
    looks_at="the level of the loss before and after each epoch border",
    threshold="the mean jump lies 4 standard errors and 3 % of the loss from zero; up: a warning, down: a note; where "
    "the log has no epochs: the same shape 3 times (correlation 0.7)",
    source="our own; a fall by a step is what repeated examples look like",
    false_alarms="evaluation or a learning rate that restarts with each epoch",
    needs=("curve",),
    explains=("too_hot", "rising", "never_learned", "noisy", "undecided", "warmup_too_short"),
)
def epoch_jumps(seen: Observations) -> Problem | None:
    """The loss jumps at each border of an epoch."""
    curve = seen.curve
    assert curve is not None
    series = training_series(curve)
    if series is None:
        return None
    borders = _borders(curve) if curve.epoch is not None else _repeats(series)
    if series is None or not borders:
        return None
    places = [int(np.searchsorted(series.steps, border, side="left")) for border in borders]
    places = [place for place in places if 2 <= place <= len(series) - 2]
    if not places or len(series) / (len(places) + 1) < 4:
        return None
    width = max(2, min(10, int(len(series) / (len(places) + 1) / 3)))
    usual, single = elsewhere(series, places, width)
    found = [jump(series, place, width) - usual for place in places]
    size, error = float(np.mean(found)), single / math.sqrt(len(found))
    level = float(np.median(series.values))
    up = size > 0
    same = sum((rise > 0) == up for rise in found)
    if abs(size) < BORDER_ERRORS * error or abs(size) < BORDER_SHARE * level or same < 0.8 * len(found):
        return None
    if up and len(found) < 2 and size < 2 * BORDER_ERRORS * error:
        return None
    return _at_borders(size, len(found), int(series.steps[places[0]]), up=up)


def _at_borders(size: float, count: int, step: int, *, up: bool) -> Problem:
    evidence = Said(
        f"by {size:+.3g} on the mean of {count} borders, the first at step {step}",
        f"{count} 个轮次边界平均变化 {size:+.3g}，第一个在第 {step} 步",
    )
    if up:
        return Problem(
            level="warning",
            sure="likely",
            cause=Said("the loss jumps up at each epoch border", "每到新的一轮，损失就跳升"),
            evidence=evidence,
            consequence=Said(
                "examples come in the same order each time: the end of an epoch fits its last examples, not all",
                "每轮样本顺序相同：一轮结束时模型适应的是最后的样本，而不是全部",
            ),
            change=Said("shuffle the examples anew for each epoch", "每一轮都重新打乱样本"),
            paste="DataLoader(..., shuffle=True)",
            values={"jump": size, "borders": count},
            step=step,
        )
    return Problem(
        level="note",
        sure="likely",
        cause=Said("the loss falls by a step at each epoch border", "每到新的一轮，损失下降一个台阶"),
        evidence=evidence,
        consequence=Said(
            "the model knows the examples from the epoch before; normal, if held-out losses do not rise",
            "模型记得上一轮的样本；只要验证损失不上升就是正常的",
        ),
        change=Said("measure held-out losses; stop where they turn up", "测量验证损失，在其上升处停止"),
        values={"jump": size, "borders": count},
        step=step,
    )


def _repeats(series: Series) -> list[float]:
    """Returns the steps at which the same shape begins again, where a log has no epochs: rows in a fixed order.

    The period is the lag at which the series without its trend is most like itself; a border is where it rises most.
    """
    number = len(series)
    width = max(3, number // 4)
    trend = np.convolve(np.pad(series.values, width, mode="edge"), np.ones(2 * width + 1) / (2 * width + 1), "valid")
    rest = series.values - trend
    lags = np.arange(5, number // PERIODS + 1)
    if not len(lags) or np.ptp(rest) == 0:
        return []
    alike = np.array([np.corrcoef(rest[lag:], rest[:-lag])[0, 1] for lag in lags])
    # twice the period is as alike: the first peak counts
    peaks = [at for at in range(len(lags)) if alike[at] > ALIKE and alike[at] == alike[max(0, at - 2) : at + 3].max()]
    if not peaks:
        return []
    lag = int(lags[peaks[0]])
    rises = np.diff(series.values)
    phase = max(range(lag), key=lambda first: float(np.median(rises[first::lag])))
    return [float(series.steps[place + 1]) for place in range(phase, number - 1, lag)]


def _borders(curve: LossCurve) -> list[float]:
    """Returns the first step after each whole epoch."""
    assert curve.epoch is not None
    known = np.isfinite(curve.epoch)
    epochs, steps = curve.epoch[known], curve.steps[known]
    if len(epochs) < 4:
        return []
    # the last step of an epoch is logged as 1.0; rounding may say 0.9999
    whole = np.floor(epochs - 1e-3)
    return [float(steps[place]) for place in np.flatnonzero(np.diff(whole) > 0) + 1 if 0 < place < len(steps) - 1]


@rule(
    "run",
    looks_at="the level of the loss before and after the steps at which the run was taken up again",
    threshold="up by 3 standard errors and 3 % of the loss",
    source="our own; a checkpoint without its optimizer or its place in the data is the usual reason",
    false_alarms="other data after the resume, on purpose",
    needs=("curve", "curve.resumed"),
    explains=("too_hot", "rising", "diverged", "never_learned", "epoch_jumps", "noisy", "undecided"),
)
def resume_jump(seen: Observations) -> Problem | None:
    """The loss jumps up where the run was taken up again."""
    curve = seen.curve
    assert curve is not None
    series = training_series(curve)
    if series is None or len(series) < 6:
        return None
    places = [place for step in curve.resumed for place in _places_at(series, step)]
    if not places:
        return None
    rise, error = _sharpest(series, places)
    place = max(places, key=lambda place: jump(series, place, 2))
    level = abs(float(np.median(series.values)))
    if rise < RESUME_ERRORS * error or rise < BORDER_SHARE * level:
        return None
    step = min(curve.resumed, key=lambda resumed: abs(resumed - series.steps[place]))
    return Problem(
        level="warning",
        sure="likely",
        cause=Said("the loss jumps up where the run was resumed", "恢复训练处损失跳升"),
        evidence=Said(
            f"by {rise:.3g} at step {step} ({rise / max(error, 1e-12):.0f} standard errors of its noise)",
            f"第 {step} 步跳升 {rise:.3g}（噪声标准误的 {min(rise / max(error, 1e-12), 999):.0f} 倍）",
        ),
        consequence=Said(
            "optimizer state, schedule, weights or data order were not taken along",
            "优化器状态、调度器、权重或数据顺序没有一起恢复",
        ),
        change=Said(
            "resume from a checkpoint that holds optimizer, scheduler and random state; do not load the adapter alone",
            "从包含优化器、调度器和随机状态的检查点恢复，不要只加载适配器",
        ),
        paste="trainer.train(resume_from_checkpoint=True)",
        values={"step": step, "jump": rise},
        step=step,
    )


def _sharpest(series: Series, places: list[int]) -> tuple[float, float]:
    """Returns the clearest rise at one of the points, of 2 points or of many, and its standard error."""
    found = []
    for width in sorted({2, 3, max(3, min(10, len(series) // 10))}):
        usual, error = elsewhere(series, places, width)
        found.append((max(jump(series, place, width) for place in places) - usual, error))
    return max(found, key=lambda pair: pair[0] / max(pair[1], 1e-12))


def _places_at(series: Series, step: int) -> list[int]:
    """Returns the points at a resume: the log may name the last step before it, or the first after it."""
    place = int(np.searchsorted(series.steps, step, side="left"))
    return [each for each in (place, place + 1) if 2 <= each <= len(series) - 2]
