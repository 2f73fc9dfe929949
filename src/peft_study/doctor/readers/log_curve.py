"""The curve of a log, from its points, and what its reader had to put right."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from peft_study.doctor.observations import LossCurve
from peft_study.doctor.readers.columns import SOURCE
from peft_study.doctor.readers.points import MOST_POINTS, Floats, Points, aligned

_HOLE = 20
"""Times the usual distance of two points from which on a gap in the log is told."""

_REASONS = {
    "rate": ("there is no learning rate in the log", "日志里没有学习率"),
    "gradient_norm": ("there is no gradient norm in the log", "日志里没有梯度范数"),
    "epoch": ("there are no epochs in the log", "日志里没有轮次"),
    "loss_scale": ("there is no loss scale in the log", "日志里没有损失缩放系数"),
    "held_out_loss": ("there is no held-out loss in the log", "日志里没有验证集损失"),
    "source_loss": ("the held-out loss is not logged by source", "日志里没有按来源分开的验证集损失"),
    "accuracy": ("there is no share of right answers in the log", "日志里没有答案正确率"),
    "minus_base": (
        "the loss is that of a mixture of batches; the untouched base's loss on them is not in the log",
        "日志里只有各批次的损失，没有原始基座在同样样本上的损失",
    ),
    "base_loss": ("the loss of the untouched base is not in the log", "日志里没有原始基座的损失"),
    "start_loss": ("nothing was evaluated before step 1", "第 1 步之前没有评估"),
    "unigram_loss": ("the supervised tokens are not at hand", "没有监督词元的统计"),
    "skipped": ("skipped steps are not in the log", "日志里没有跳过的步数"),
}
"""Why a curve lacks something, in English and Chinese."""


def reasons_of(curve: LossCurve) -> dict[str, tuple[str, str]]:
    """Returns why something is not known of a logged curve."""
    return {f"curve.{name}": why for name, why in _REASONS.items() if getattr(curve, name) is None}


def curve_of_points(points: Points, notes: Iterable[str] = (), *, every: int | None = None) -> LossCurve | None:
    """Returns the curve; None where there is no loss at all.

    Args:
        points: of the log.
        notes: of its reader, to be told with those made here.
        every: optimizer steps that a logged value averages; None: the usual distance of two.
    """
    series = points.series()
    nothing = (np.empty(0), np.empty(0))
    steps, loss = series.get("loss", nothing)
    held_steps, held, sources = _held_out(series)
    if not len(steps) and not len(held_steps):
        return None
    binned = len(steps) > 1 and every is not None and np.median(np.diff(steps)) > 1.5 * every
    curve = LossCurve(
        steps=steps,
        loss=loss,
        window=_window(steps) if every is None or binned else every,
        rate=aligned(steps, series.get("rate"), between=True),
        gradient_norm=aligned(steps, series.get("gradient_norm"), between=len(steps) > MOST_POINTS // 2),
        epoch=aligned(steps, series.get("epoch"), between=True),
        loss_scale=aligned(steps, series.get("loss_scale"), between=True),
        minus_base=aligned(steps, series.get("minus_base"), between=len(steps) > MOST_POINTS // 2),
        held_out_steps=held_steps if len(held_steps) else None,
        held_out_loss=held if len(held_steps) else None,
        source_loss=sources or None,
        resumed=tuple(points.resumed),
    )
    curve = _with_base(curve, series)
    accuracy = series.get("accuracy")
    remarks = [*notes, *_remarks(points, curve, averaged_sources="held_out_loss" not in series and bool(sources))]
    if accuracy is not None:
        share = accuracy[1] / (100.0 if np.nanmax(accuracy[1], initial=0.0) > 1.5 else 1.0)
        curve = dataclasses.replace(curve, accuracy_steps=accuracy[0], accuracy=share)
    return dataclasses.replace(curve, notes=tuple(remarks))


def _window(steps: Floats) -> int:
    return max(1, round(float(np.median(np.diff(steps))))) if len(steps) > 1 else 1


def _held_out(series: dict[str, tuple[Floats, Floats]]) -> tuple[Floats, Floats, dict[str, Floats]]:
    """Returns steps, losses and each source's losses; the mean of the sources where no loss over all is logged."""
    sources = {what.removeprefix(SOURCE): found for what, found in series.items() if what.startswith(SOURCE)}
    if "held_out_loss" in series:
        steps, loss = series["held_out_loss"]
    elif sources:
        steps = np.unique(np.concatenate([found[0] for found in sources.values()]))
        loss = np.full(len(steps), np.nan)
    else:
        return np.empty(0), np.empty(0), {}
    at_steps = {name: aligned(steps, found, between=False) for name, found in sources.items()}
    known = {name: values for name, values in at_steps.items() if values is not None}
    if "held_out_loss" not in series and known:
        table = np.array(list(known.values()))
        good = np.isfinite(table)
        loss = np.where(good.any(axis=0), np.where(good, table, 0.0).sum(axis=0) / good.sum(axis=0).clip(1), np.nan)
        known = known if len(known) > 1 else {}
    return steps, loss, known


def _with_base(curve: LossCurve, series: dict[str, tuple[Floats, Floats]]) -> LossCurve:
    """Adds differences from the untouched base, and the loss before step 1."""
    if curve.held_out_steps is None or curve.held_out_loss is None or not len(curve.held_out_steps):
        return curve
    names = ("held_out_minus_base", "held_out_low", "held_out_high")
    found: dict[str, Any] = {name: aligned(curve.held_out_steps, series.get(name), between=False) for name in names}
    first = float(curve.held_out_loss[0])
    # a loop that counts from 0 evaluates its step 0 after the first update
    before = curve.held_out_steps[0] == 0 and (not len(curve.steps) or curve.steps[0] > 0) and np.isfinite(first)
    above = found["held_out_minus_base"]
    base = None if above is None or not np.isfinite(above[0]) else first - float(above[0])
    return dataclasses.replace(curve, start_loss=first if before else None, base_loss=base, **found)


def _remarks(points: Points, curve: LossCurve, *, averaged_sources: bool) -> list[str]:
    """Returns what had to be put right, a line each."""
    found = []
    if points.runs > 1:
        found.append(f"the log holds {points.runs} runs, one after the other: the last one is read")
    elif points.dropped:
        steps = ", ".join(map(str, points.resumed[:4])) + (", ..." if len(points.resumed) > 4 else "")
        found.append(f"taken up again at step {steps}: of steps that were done twice the later values are read")
    if points.unordered:
        found.append("the steps are in no order: they were sorted")
    if points.repeated:
        which = "their mean is" if points.averaged else "the later values are"
        found.append(f"{points.repeated:,} steps are logged more than once: {which} read")
    bad = ~np.isfinite(curve.loss)
    if bad.any():
        found.append(f"the loss is not a number at {bad.sum():,} of {len(bad):,} points, first at step "
                     f"{curve.steps[bad][0]:.0f}")  # fmt: skip
    gaps = np.diff(curve.steps)
    if len(gaps) >= 8 and gaps.max() > _HOLE * np.median(gaps):
        at = int(gaps.argmax())
        found.append(f"no loss is logged between the steps {curve.steps[at]:.0f} and {curve.steps[at + 1]:.0f}")
    if len(curve.steps) == 1:
        found.append("the log holds the loss of one step only")
    if averaged_sources:
        found.append("the held-out loss is the mean of its data sets' losses, each counted alike")
    return found
