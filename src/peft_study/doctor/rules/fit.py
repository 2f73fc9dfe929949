"""Training fits, held-out examples do not."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from peft_study.doctor.diagnosis import Problem, Said
from peft_study.doctor.observations import Floats, LossCurve, Observations
from peft_study.doctor.rule import rule
from peft_study.doctor.trend import Series, training_series

TURNS = 0.03
"""Share of the lowest held-out loss by which it ends higher; less is the noise of 50 to 100 examples."""
TURNS_ONCE = 0.1
"""The same, where a single evaluation lies after the lowest."""
FAR_BELOW = 0.5
"""Share of the held-out loss below which the training loss is far below it."""
NEAR_ZERO = 0.05
"""Nats a token: nearly every token is known by heart."""
VERY_MANY_EPOCHS = 20.0
"""Passes after which a training loss near zero is memory, whatever the task: of one pass it may be skill."""
MANY_EPOCHS = 2.0
"""Passes over the data from which an example can be known by heart."""


class Turn(NamedTuple):
    """A held-out loss that turns up: lowest, where, last and rise as a share of the lowest."""

    lowest: float
    step: int
    last: float
    share: float


def turn(steps: Floats, losses: Floats) -> Turn | None:
    """Returns where a held-out loss turns up for good; None where it does not.

    It must rise beyond its own noise: what neighbours differ by against their trend (second differences).
    """
    known = np.isfinite(losses)
    steps, losses = steps[known], losses[known]
    if len(losses) < 3:
        return None
    low = int(losses.argmin())
    after = losses[low + 1 :]
    if not len(after) or losses[low] <= 0:
        return None
    last = float(after[-2:].mean()) if len(after) > 2 else float(after[-1])
    share = (last - float(losses[low])) / float(losses[low])
    seconds = np.diff(losses[low:], 2)
    noise = 1.4826 * float(np.median(np.abs(seconds))) / np.sqrt(6) if len(seconds) >= 3 else 0.0
    enough = TURNS_ONCE if len(after) == 1 else TURNS
    if share < enough or last - losses[low] < 4 * noise:
        return None
    return Turn(float(losses[low]), int(steps[low]), last, share)


@rule(
    "run",
    looks_at="held-out losses that are no numbers, while the training loss is one",
    threshold="the last one",
    source="a mean over no supervised token is NaN; half precision overflows",
    false_alarms="none known",
    needs=("curve.held_out_loss", "curve.held_out_steps"),
)
def held_out_broken(seen: Observations) -> Problem | None:
    """The held-out loss is not a number."""
    curve = seen.curve
    assert curve is not None
    assert curve.held_out_loss is not None
    assert curve.held_out_steps is not None
    bad = ~np.isfinite(curve.held_out_loss)
    if not len(bad) or not bad[-1] or (len(curve.loss) and not np.isfinite(curve.loss[-1])):
        return None
    first = int(curve.held_out_steps[: len(bad)][bad][0])
    return Problem(
        level="warning",
        sure="certain",
        cause=Said("the held-out loss is not a number", "验证损失不是有限的数"),
        evidence=Said(
            f"{bad.sum()} of {len(bad)} evaluations, first at step {first}",
            f"{len(bad)} 次评估中有 {bad.sum()} 次，首次在第 {first} 步",
        ),
        consequence=Said("whether new examples are learned is not known", "无法知道模型在新样本上学得如何"),
        change=Said(
            "leave out held-out rows without a supervised token, and evaluate in bfloat16 or float32",
            "去掉没有监督标签的验证样本，并用 bfloat16 或 float32 评估",
        ),
        values={"evaluations": int(bad.sum()), "step": first},
        step=first,
    )


@rule(
    "run",
    looks_at="the held-out loss after its lowest value, while the training loss falls",
    threshold="ends 3 % above its lowest (10 % where one evaluation lies after it), beyond its noise",
    source="Prechelt (1998): generalisation loss of 2 to 5 %",
    false_alarms="few held-out examples without an interval",
    needs=("curve.held_out_loss", "curve.held_out_steps"),
    explains=("memorising", "epoch_jumps", "noisy", "undecided"),
)
def overfitting(seen: Observations) -> Problem | None:
    """The held-out loss turns up while the training loss falls."""
    curve = seen.curve
    assert curve is not None
    assert curve.held_out_loss is not None
    assert curve.held_out_steps is not None
    if len(curve.held_out_loss) != len(curve.held_out_steps):
        return None
    found = turn(curve.held_out_steps, curve.held_out_loss)
    if found is None or not _train_falls(curve, found.step):
        return None
    shown = _outside_interval(curve)
    if shown is False and found.share < TURNS_ONCE:
        return None
    never = found.step <= 0
    falls = Said(", while the training loss falls on", "，而训练损失仍在下降") if len(curve.loss) else Said("", "")
    return Problem(
        level="warning",
        sure="certain" if found.share > TURNS_ONCE else "likely",
        cause=Said("the run overfits", "过拟合"),
        evidence=Said(
            f"the held-out loss is lowest at step {found.step} ({found.lowest:.3g}) and ends at {found.last:.3g}, "
            f"{100 * found.share:.0f} % higher{falls.en}",
            f"验证损失在第 {found.step} 步最低（{found.lowest:.3g}），结束时为 {found.last:.3g}，"
            f"高出 {100 * found.share:.0f}%{falls.zh}",
        ),
        consequence=Said(
            "every step after that makes the model worse on new examples", "此后的每一步都让模型在新样本上变差"
        ),
        change=Said(
            "training makes it worse from the start: check that held-out examples are of the same kind; lower the rate"
            if never
            else f"keep the adapter of step {found.step}, stop there, or train on more examples",
            "训练从一开始就让它变差：检查验证样本是否同类；降低学习率"
            if never
            else f"使用第 {found.step} 步的适配器，在那里停止，或者增加训练样本",
        ),
        paste="early_stopping: 2",
        values={"best_step": found.step, "best": found.lowest, "last": found.last},
        step=found.step,
    )


def _train_falls(curve: LossCurve, step: int) -> bool:
    """Returns whether the training loss does not rise from a step on; True where there are no points to tell."""
    series = training_series(curve)
    if series is None:
        return True
    later = np.flatnonzero(series.steps >= step)
    if len(later) < 4:
        return True
    first, width = int(later[0]), max(2, len(later) // 4)
    before, after = series.level(first, first + width), series.end
    return after.value < before.value and after.above(before) < 1


def _outside_interval(curve: LossCurve) -> bool | None:
    """Returns whether the last held-out loss lies outside the interval of the lowest; None without intervals."""
    assert curve.held_out_loss is not None
    value = curve.held_out_loss if curve.held_out_minus_base is None else curve.held_out_minus_base
    if curve.held_out_high is None or len(curve.held_out_high) != len(value):
        return None
    known = np.flatnonzero(np.isfinite(value) & np.isfinite(curve.held_out_high))
    if not len(known):
        return None
    low = known[int(value[known].argmin())]
    return bool(value[known[-1]] > curve.held_out_high[low])


@rule(
    "run",
    looks_at="the training loss at the end against the held-out loss, and passes over the data",
    threshold="below half the held-out loss after 2 epochs; without one: 0.05 nats after 20 epochs (a note from 5)",
    source="our own: an example seen once is as new to the model as a held-out one",
    false_alarms="training data that is easier than the held-out examples",
    needs=("curve",),
    explains=("noisy", "undecided"),
)
def memorising(seen: Observations) -> Problem | None:
    """The training examples are known by heart."""
    curve = seen.curve
    assert curve is not None
    series, epochs = training_series(curve), _epochs(curve)
    if series is None:
        return None
    end, held_out = series.end.value, _last(curve.held_out_loss)
    if held_out is None:
        if epochs is None or epochs < 5 or end > NEAR_ZERO or end > 0.05 * series.start.value:
            return None
        against = Said("; no held-out loss was measured", "；没有测量验证损失")
    else:
        if end > FAR_BELOW * held_out or held_out < NEAR_ZERO or (epochs is not None and epochs < MANY_EPOCHS):
            return None
        if not _parted(curve, series):
            return None
        against = Said(f", {held_out:.3g} on held-out examples", f"，而验证损失为 {held_out:.3g}")
    passes = Said(f" after {epochs:.3g} epochs", f"（{epochs:.3g} 轮后）") if epochs is not None else Said("", "")
    return Problem(
        level="warning" if held_out is not None or (epochs or 0) >= VERY_MANY_EPOCHS else "note",
        sure="likely" if held_out is not None and epochs is not None else "possible",
        cause=Said("the run learns its examples by heart", "模型在背诵训练样本"),
        evidence=Said(
            f"the training loss ends at {end:.3g}{passes.en}{against.en}",
            f"训练损失最终为 {end:.3g}{passes.zh}{against.zh}",
        ),
        consequence=Said("new examples gain nothing from it", "对新样本没有帮助"),
        change=Said("train fewer epochs, or on more examples", "减少轮数，或者增加训练样本"),
        paste="num_train_epochs: 2",
        values={"train": end, "held_out": held_out, "epochs": epochs},
    )


def _parted(curve: LossCurve, series: Series) -> bool:
    """Returns whether training and held-out loss parted under way, and the held-out loss no longer falls."""
    losses, steps = curve.held_out_loss, curve.held_out_steps
    assert losses is not None
    known = np.flatnonzero(np.isfinite(losses))
    if len(known) < 2 or steps is None:
        return True
    before, last = float(losses[known[-2]]), float(losses[known[-1]])
    return last > 0.9 * before


def _epochs(curve: LossCurve) -> float | None:
    if curve.epoch is None or not np.isfinite(curve.epoch).any():
        return None
    return float(np.nanmax(curve.epoch))


def _last(losses: Floats | None) -> float | None:
    known = losses[np.isfinite(losses)] if losses is not None else np.empty(0)
    return float(known[-1]) if len(known) else None


@rule(
    "run",
    looks_at="the held-out loss of each source",
    threshold="one source turns up by 5 % beyond its noise, while another one falls by 5 %",
    source="our own",
    false_alarms="sources with few held-out examples",
    needs=("curve.source_loss", "curve.held_out_steps"),
    explains=("overfitting", "memorising", "noisy"),
)
def source_rising(seen: Observations) -> Problem | None:
    """One source becomes worse while others become better."""
    curve = seen.curve
    assert curve is not None
    assert curve.source_loss is not None
    assert curve.held_out_steps is not None
    up: dict[str, Turn] = {}
    falls = []
    for name, losses in curve.source_loss.items():
        if len(losses) != len(curve.held_out_steps) or np.isfinite(losses).sum() < 3:
            continue
        known = losses[np.isfinite(losses)]
        found = turn(curve.held_out_steps, losses)
        if found is not None and found.share > 0.05:
            up[name] = found
        elif known[-1] < 0.95 * known[0]:
            falls.append(name)
    if not up or not falls:
        return None
    worst = max(up, key=lambda name: up[name].share)
    found = up[worst]
    return Problem(
        level="warning",
        sure="likely",
        cause=Said(f"the source {worst} becomes worse while others become better", f"来源 {worst} 变差，其他来源变好"),
        evidence=Said(
            f"its held-out loss rises from {found.lowest:.3g} at step {found.step} to {found.last:.3g}; "
            f"{', '.join(falls[:4])} fell",
            f"其验证损失从第 {found.step} 步的 {found.lowest:.3g} 升到 {found.last:.3g}；{', '.join(falls[:4])} 下降",
        ),
        consequence=Said("the mean over all sources hides it", "所有来源的平均值掩盖了这一点"),
        change=Said(
            f"give {worst} a larger share of the rows, or train it in an adapter of its own; check its labels",
            f"提高 {worst} 的样本比例，或单独训练一个适配器；并检查其标签",
        ),
        values={"source": worst, "step": found.step, "lowest": found.lowest, "last": found.last},
        step=found.step,
    )
