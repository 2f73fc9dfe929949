"""The rate is too high for the run: it blows up, jumps, or has no time to warm up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from peft_study.doctor.diagnosis import Problem, Said
from peft_study.doctor.observations import LossCurve, Observations
from peft_study.doctor.rates import lower_rate, rates_of, rates_said
from peft_study.doctor.rule import rule
from peft_study.doctor.trend import Climb, Series, training_series

EXPLODED, EXPLODED_NATS = 2.0, 1.0
"""Times the start, and nats above it, from which a loss that stays up is an explosion: no noise of batches does it."""
JUMP_ERRORS = 6.0
"""Standard errors of a rise; the largest of 20 to 40 windows of pure noise lies at 4 to 5. More on a short series, of
which the noise is known less well."""
SHARP, SHARP_ERRORS = 5.0, 2.0
"""Times the gradient norm before, from which a rise of 2 standard errors is one: the rise itself widens the noise of a
short series. Measured: prompt tuning at 0.1 on SmolLM2, where the norm goes from 0.7 to 30 as the loss doubles."""
PAIRED_ERRORS = 5.0
"""Standard errors of a rise of the loss minus the base's, which has no batches that are hard by chance."""
LOST_ERRORS, LOST_RELATIVE = 2.5, 0.1
"""The same for a rise that takes the run back to its start, by a tenth of the loss: all that was learned is lost.
Recorded: prompt tuning with 8 tokens at 0.1, steps 6 to 13; not 0.03 and 0.3 beside it."""
JUMP_SHARE, JUMP_RELATIVE = 0.3, 0.05
"""A rise counts from this share of the fall before it and after it, and this share of the loss."""
SPIKE = 1.4
"""Times the start that the peak of an early explosion reaches at least (recorded runs that recover unharmed: 1.2)."""
EARLY_SHARE, EARLY_STEPS = 0.1, 5
"""Share of the run, and number of steps, in which an explosion belongs to the warm-up."""
USUAL_WARMUP = 0.03
"""Share of the steps; open-instruct and QLoRA warm up over so many."""


@rule(
    "run",
    looks_at="losses that are no numbers, or that explode and stay up",
    threshold="not finite up to the end; or an end 2 times and 1 nat above the start",
    source="our own: a uniform guess over the vocabulary lies at most a few nats above an untrained start",
    false_alarms="a batch without a supervised token is not a number; it is told apart, as the loss is finite after it",
    needs=("curve",),
    explains=(
        "rising", "too_hot", "warmup_too_short", "overfitting", "memorising", "never_learned", "too_cold",
        "source_rising", "epoch_jumps", "always_clipped", "noisy", "undecided",
    ),
)  # fmt: skip
def diverged(seen: Observations) -> Problem | None:
    """The loss is no number any more, or it exploded."""
    curve = seen.curve
    assert curve is not None
    broken = _broken(curve)
    if broken is not None:
        return _not_finite(seen, curve, broken)
    series = training_series(curve)
    if series is None:
        return _few_points(seen, curve)
    start, end = series.start, series.end
    began = min(start.value, curve.start_loss or np.inf) if not series.paired else start.value
    exploded = end.value > EXPLODED * max(began, 0.0) and end.value > began + EXPLODED_NATS
    if not exploded or end.above(start) < JUMP_ERRORS:
        return None
    climb = series.climb(min(3, len(series) // 3))
    step = climb.step if climb else int(series.steps[0])
    return _exploded(seen, curve, step, began, end.value)


def _few_points(seen: Observations, curve: LossCurve) -> Problem | None:
    """Judges a log of 2 or 3 points: only an explosion far beyond every noise of batches shows there."""
    loss = curve.loss[np.isfinite(curve.loss)]
    if len(loss) < 2 or loss[-1] < 3 * max(loss[0], 0.0) or loss[-1] < loss[0] + 3 * EXPLODED_NATS:
        return None
    return _exploded(seen, curve, int(curve.steps[-1]), float(loss[0]), float(loss[-1]))


def _broken(curve: LossCurve) -> int | None:
    """Returns the first point from which on no loss is a usable number; None where the last one is.

    Hugging Face's Trainer leaves out losses that are NaN: the log then says 0, with a gradient norm of NaN.
    """
    bad = ~np.isfinite(curve.loss)
    if curve.gradient_norm is not None and np.isfinite(curve.gradient_norm).any():
        bad |= (curve.loss == 0) & ~np.isfinite(curve.gradient_norm)
    if curve.gradient_norm is None or not np.isfinite(curve.gradient_norm[-1:]).all():
        bad |= _sudden_zeros(curve)
    if not len(bad) or not bad[-1]:
        return None
    good = np.flatnonzero(~bad)
    return int(good[-1]) + 1 if len(good) else 0


def _sudden_zeros(curve: LossCurve) -> npt.NDArray[np.bool_]:
    """Marks exact zeros at the end that follow a loss which was not near zero."""
    zeros = curve.loss == 0
    good = curve.loss[~zeros & np.isfinite(curve.loss)]
    if zeros.sum() < 2 or not len(good) or good[-1] < 0.1:
        return np.zeros(len(zeros), dtype=bool)
    return zeros


def _not_finite(seen: Observations, curve: LossCurve, place: int) -> Problem:
    step = int(curve.steps[place])
    fp16 = seen.settings.compute_dtype == "float16" or curve.loss_scale is not None
    before = f", {curve.loss[place - 1]:.3g} just before" if place else ""
    before_zh = f"，之前为 {curve.loss[place - 1]:.3g}" if place else ""
    at = _rate_and_norm(curve, max(place - 1, 0))
    rate = lower_rate(seen.settings)
    dtype = (" and train in bfloat16 or float32", "，并改用 bfloat16 或 float32") if fp16 else ("", "")
    return Problem(
        level="error",
        sure="certain",
        cause=Said("the loss is not a number any more", "损失已不是有限的数"),
        evidence=Said(
            f"from step {step} on{before}{at.en}{rates_said(seen.settings).en}",
            f"从第 {step} 步起{before_zh}{at.zh}{rates_said(seen.settings).zh}",
        ),
        consequence=Said(
            "the weights hold NaN; nothing after this step can be used", "权重中已有 NaN，此后的结果都不能用"
        ),
        change=Said(
            f"go back to a checkpoint before it, and lower the learning rate{dtype[0]}",
            f"回到该步之前的检查点，降低学习率{dtype[1]}",
        ),
        paste=None if rate is None else f"learning_rate: {rate:g}",
        values={"step": step},
        step=step,
    )


def _exploded(seen: Observations, curve: LossCurve, step: int, began: float, ended: float) -> Problem:
    place = int(np.searchsorted(curve.steps, step).clip(0, len(curve.steps) - 1))
    at, rate = _rate_and_norm(curve, place), lower_rate(seen.settings)
    return Problem(
        level="error",
        sure="certain" if ended > 1.5 * EXPLODED * began else "likely",
        cause=Said("the loss exploded and stayed up", "损失急剧上升，没有恢复"),
        evidence=Said(
            f"{began:.3g} at the start, {ended:.3g} at the end; it begins at step {step}"
            f"{at.en}{rates_said(seen.settings).en}",
            f"开始时 {began:.3g}，结束时 {ended:.3g}；从第 {step} 步开始{at.zh}{rates_said(seen.settings).zh}",
        ),
        consequence=Said("the result is worse than no training", "结果比不训练更差"),
        change=Said("lower the learning rate and start again", "降低学习率，重新训练"),
        paste=None if rate is None else f"learning_rate: {rate:g}",
        values={"step": step, "start": began, "end": ended},
        step=step,
    )


@rule(
    "run",
    looks_at="a rise of the loss between two windows (a twentieth and an eighth of the run), against its own noise",
    threshold="6 standard errors, 5 % of the loss, and 30 % of the whole fall; stays up or comes down again",
    source="recorded: frod/sparse0.02-lr_0.001 of peft's comparison rises by 20 % while the rate is at its peak",
    false_alarms="data sorted by difficulty; a resumed run (told by resume_jump)",
    needs=("curve",),
    explains=("rising", "always_clipped", "noisy", "undecided", "never_learned"),
)
def too_hot(seen: Observations) -> Problem | None:
    """The loss jumps up under way, and comes down again or stays above its best."""
    curve = seen.curve
    assert curve is not None
    series = training_series(curve)
    if series is None or len(series) < 8:
        return None
    lost = _lost_start(series)
    climb = lost or hot_climb(series, curve)
    if climb is None or _is_resume(curve, climb.step):
        return None
    end, first = series.end, series.start
    stays = end.value > climb.before + 0.5 * climb.size
    if end.above(first) > 4 and not climb.sudden and end.value > climb.peak - 0.4 * climb.size:
        return None  # a steady rise to the end, which `rising` tells
    growth = _norm_growth(curve, climb.step)
    place = int(np.searchsorted(curve.steps, climb.step).clip(0, len(curve.steps) - 1))
    at, rate = _rate_and_norm(curve, place), lower_rate(seen.settings)
    rates = rates_of(seen.settings)
    hot = rates is not None and (seen.settings.learning_rate or 0) > rates.default
    grown = (
        Said(f"; the norm grows {growth:.3g}-fold", f"；范数增大到 {growth:.3g} 倍")
        if (growth or 0) > 2
        else Said("", "")
    )
    then = Said("stays up", "没有恢复") if stays else Said(f"ends at {end.value:.3g}", f"结束时为 {end.value:.3g}")
    return Problem(
        level="error" if end.above(first) > 4 or stays or lost else "warning",
        sure="likely" if hot or (growth or 0) > 2 or stays or climb.errors > 2 * JUMP_ERRORS else "possible",
        cause=Said("the learning rate is too high", "学习率过高"),
        evidence=Said(
            f"the loss{_less_base(series).en} jumps up at step {climb.step}, from {climb.before:.3g} to "
            f"{climb.peak:.3g} ({climb.errors:.0f} standard errors of its noise), and {then.en}"
            f"{at.en}{grown.en}{rates_said(seen.settings).en}",
            f"损失{_less_base(series).zh}在第 {climb.step} 步跳升，从 {climb.before:.3g} 到 {climb.peak:.3g}"
            f"（噪声标准误的 {climb.errors:.0f} 倍），{then.zh}{at.zh}{grown.zh}{rates_said(seen.settings).zh}",
        ),
        consequence=Said("steps are lost, and the run ends higher than it could", "浪费了训练步数，最终损失也偏高"),
        change=Said("lower the learning rate", "降低学习率"),
        paste=None if rate is None else f"learning_rate: {rate:g}",
        values={"step": climb.step, "before": climb.before, "peak": climb.peak, "errors": climb.errors},
        step=climb.step,
    )


def _lost_start(series: Series) -> Climb | None:
    """Returns the rise of a run that blows up in its first steps and never comes back to where it began."""
    early = max(EARLY_STEPS, int(EARLY_SHARE * len(series)))
    peak = int(series.values[:early].argmax())
    if peak == 0 or len(series) < 2 * early:
        return None
    first, end = float(series.values[: min(peak, 3)].min()), series.end
    high = series.values[peak]
    # the last third lies above the first points
    if high < SPIKE * first or end.value < (1 + JUMP_SHARE / 2) * first or series.values[-early:].min() <= first:
        return None
    errors = (end.value - first) / max(series.noise, 1e-12)
    if errors < JUMP_ERRORS / 2:
        return None
    step = int(series.steps[peak])
    return Climb(float(high - first), errors, step, first, float(high), step, sudden=True)


def hot_climb(series: Series, curve: LossCurve) -> Climb | None:
    """Returns a rise that is no noise and matters; None where there is none."""
    fall = max(series.start.value - series.lowest.value, 0.0)
    found = []
    for width in {max(3, len(series) // 20), max(3, len(series) // 8)}:
        climb = series.climb(width)
        if climb is None or climb.size <= 0 or climb.size < JUMP_SHARE * fall:
            continue
        least = (PAIRED_ERRORS if series.paired else JUMP_ERRORS) * (1 + 6 / len(series))
        if (_norm_growth(curve, climb.step) or 0.0) >= SHARP:
            least = SHARP_ERRORS
        elif series.paired and _all_lost(series, climb):
            least = LOST_ERRORS
        if climb.errors >= least and climb.size >= JUMP_RELATIVE * abs(climb.before):
            found.append(climb)
    return max(found, key=lambda climb: climb.errors, default=None)


def _all_lost(series: Series, climb: Climb) -> bool:
    """Returns whether a rise takes the run from clearly below its start back to it, for 6 points and more."""
    start = series.start
    place = int(np.searchsorted(series.steps, climb.step))
    after = series.values[place : place + max(6, len(series) // 6)]
    lasts = len(after) >= 6 and float(np.quantile(after, 0.2)) > climb.before + climb.size / 2
    large = climb.size > LOST_RELATIVE * abs(climb.before)
    return lasts and large and climb.before < start.value - 2 * start.error and climb.peak >= start.value


@rule(
    "run",
    looks_at="the peak of the loss in the first tenth of the run, and whether the rate was at its full height by then",
    threshold="1.4 times the start, beyond the noise, at full rate, and back below the start later",
    source="recorded: prefix tuning with 40 tokens at 0.3 (2.2 to 5.3 in step 3), SmolLM2",
    false_alarms="one batch of very long or foreign examples at the very beginning",
    needs=("curve",),
    explains=("too_hot", "rising", "always_clipped", "noisy", "undecided"),
)
def warmup_too_short(seen: Observations) -> Problem | None:
    """The loss explodes in the first steps at the full rate, and recovers later."""
    curve = seen.curve
    assert curve is not None
    series = training_series(curve)
    if series is None or len(series) < 12 or curve.window > 10:
        return None
    total = seen.settings.total_steps or float(curve.steps[-1])
    until = curve.steps[0] + max(EARLY_SHARE * total, EARLY_STEPS) - 1
    early = np.flatnonzero(curve.steps <= until)
    early = early[np.isfinite(curve.loss[early])]
    if len(early) < 2 or not _full_by(seen, curve, int(early[-1])):
        return None
    # of many points the highest is noise: a peak lasts for a tenth of them
    width = max(1, len(early) // 10)
    levels = np.median(np.lib.stride_tricks.sliding_window_view(curve.loss[early], width), axis=1)
    place = int(levels.argmax())
    peak = int(early[place + width // 2])
    first = float(levels[: min(place, 3)].min()) if place else None
    if first is None or levels[place] < SPIKE * first:
        return None
    beyond = (float(levels[place]) - first) / max(series.noise, 1e-12)
    if beyond < JUMP_ERRORS or series.end.value >= first or not (width > 2 or _lasts(curve, peak, first, series.noise)):
        return None
    step, rate = int(curve.steps[peak]), _rate_and_norm(curve, peak)
    steps = max(10, round(USUAL_WARMUP * total), (seen.settings.warmup_steps or 0) * 3)
    return Problem(
        level="warning",
        sure="likely",
        cause=Said("the warm-up is too short for this rate", "对这个学习率来说，预热太短"),
        evidence=Said(
            f"the loss rises from {first:.3g} to {levels[place]:.3g} at step {step}, and recovers later{rate.en}",
            f"损失在第 {step} 步从 {first:.3g} 升到 {levels[place]:.3g}，之后恢复{rate.zh}",
        ),
        consequence=Said("what the start gave is lost, and steps with it", "丢失了初始化的好处，也浪费了步数"),
        change=Said(f"warm up over {steps} steps, or lower the learning rate", f"预热 {steps} 步，或者降低学习率"),
        paste=f"warmup_steps: {steps}",
        values={"step": step, "start": first, "peak": float(levels[place])},
        step=step,
    )


def _lasts(curve: LossCurve, peak: int, first: float, noise: float) -> bool:
    """Returns whether an early peak is more than one odd batch: the next step is high too, or the point is a mean."""
    spacing = float(np.median(np.diff(curve.steps)))
    after = curve.loss[peak + 1 : peak + 2]
    least = first + max((SPIKE - 1) / 2 * first, 4 * noise)
    return curve.window >= 4 or (spacing <= 2 and bool((after > least).any()))


def _full_by(seen: Observations, curve: LossCurve, place: int) -> bool:
    """Returns whether the rate was at its height by a point, as far as that is known."""
    if curve.rate is not None and np.isfinite(curve.rate).any():
        early = curve.rate[: place + 1]
        return bool(np.isfinite(early).any() and np.nanmax(early) >= 0.8 * np.nanmax(curve.rate))
    return seen.settings.warmup_steps is None or seen.settings.warmup_steps <= curve.steps[place]


def _is_resume(curve: LossCurve, step: int) -> bool:
    return any(0 <= step - resumed <= max(2 * curve.window, 5) for resumed in curve.resumed)


def _norm_growth(curve: LossCurve, step: int) -> float | None:
    """Returns how many times larger the gradient norm is at a step and the 4 points after it than before it."""
    if curve.gradient_norm is None or len(curve.gradient_norm) != len(curve.steps):
        return None
    known = np.isfinite(curve.gradient_norm)
    before = curve.gradient_norm[known & (curve.steps < step)]
    after = curve.gradient_norm[known & (curve.steps >= step)][:5]
    if not len(before) or not len(after) or np.median(before) <= 0:
        return None
    return float(np.median(after) / np.median(before))


def _rate_and_norm(curve: LossCurve, place: int) -> Said:
    """Returns rate and gradient norm at a point, as the end of a sentence."""
    en, zh = "", ""
    for values, name, name_zh in (
        (curve.rate, "learning rate", "学习率"),
        (curve.gradient_norm, "gradient norm", "梯度范数"),
    ):
        if values is not None and np.isfinite(values[place]):
            en += f", {name} {values[place]:.3g}"
            zh += f"，{name_zh} {values[place]:.3g}"
    return Said(f"{en} there", f"{zh}") if en else Said("", "")


def _less_base(series: Series) -> Said:
    return Said(" (the batches' own part taken out)", "（已扣除批次本身的难度）") if series.paired else Said("", "")
