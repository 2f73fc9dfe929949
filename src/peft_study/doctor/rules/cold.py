"""Nothing is learned: the rate is zero or too low, or the labels cannot be learned."""

from __future__ import annotations

import math

import numpy as np

from peft_study.doctor.diagnosis import Problem, Said
from peft_study.doctor.observations import LossCurve, Observations
from peft_study.doctor.rates import rates_of, rates_said
from peft_study.doctor.rule import rule
from peft_study.doctor.rules.trend import CLEAR, decidable
from peft_study.doctor.trend import Series, held_out_fall, training_series

ZERO_SHARE, ZERO_POINTS = 0.1, 3
"""Share and number of logged points at rate 0 before the end; a schedule's own end gives one or two."""
LOWEST_RATE = 1e-6
"""Below it nothing learns with Adam, whatever the method: the lowest rate that is searched for full fine-tuning."""
TINY_FALL = 0.05
"""Share of the loss; a run at a sound rate falls by more."""
NO_FALL = 1.5
"""Standard errors of a fall that is none."""
SLIGHT_FALL = 0.03
"""Share of the loss: less than this, for sure, is none either, unless it is clear (3 standard errors)."""
FEWEST_STEPS = 20
"""Optimizer steps of a run that may be judged to have learned nothing: a smoke test is shorter."""
NEAR_ZERO = 0.1
"""Nats a token from which on there is little left to learn."""
NO_ANSWER = 0.02
"""Share of right answers that is as good as none (1 of 50)."""
AT_UNIGRAM, ABOVE_UNIGRAM = 0.06, 0.03
"""Shares of the unigram loss below and above it that are still at it."""


@rule(
    "run",
    looks_at="the logged learning rate",
    threshold="0 at every point, or at a tenth of the points and at least 3 before the end",
    source="schedules end at 0 in their last step alone; total steps that are counted too low give the rest",
    false_alarms="a rate that the log rounds to 0",
    needs=("curve.rate",),
    explains=("never_learned", "too_cold", "rate_too_low", "undecided", "noisy", "untouched", "always_clipped"),
)
def rate_zero(seen: Observations) -> Problem | None:
    """The learning rate is zero."""
    curve = seen.curve
    assert curve is not None
    assert curve.rate is not None
    known = np.flatnonzero(np.isfinite(curve.rate))
    rates = curve.rate[known]
    # the first step of a warm-up has rate 0
    if len(rates) < 3:
        return None
    whole = not (rates != 0).any()
    last = len(rates) - int((rates[::-1] != 0).argmax()) if not whole else 0
    idle = len(rates) - last
    if not whole and (idle <= ZERO_POINTS or idle <= ZERO_SHARE * len(rates)):
        return None
    step = int(curve.steps[known[last]])
    where = Said("at every logged step", "所有记录的步上都是 0")
    if not whole:
        where = Said(f"from step {step} on, at {idle} of {len(rates)} points", f"从第 {step} 步起，共 {idle} 个点是 0")
    return Problem(
        level="error" if whole else "warning",
        sure="certain",
        cause=Said("the learning rate is zero", "学习率为零"),
        evidence=Said(f"the log says 0 {where.en}", f"日志里的学习率{where.zh}"),
        consequence=Said(
            "nothing is learned" if whole else "the steps after it teach nothing",
            "什么也没有学到" if whole else "此后的步数没有作用",
        ),
        change=Said(
            "set the rate; give the scheduler the true number of optimizer steps",
            "设置学习率；把真实的优化步数传给调度器",
        ),
        paste="num_training_steps = len(train_loader) // accumulation * epochs",
        values={"step": step, "points": idle},
        step=step,
    )


@rule(
    "run",
    looks_at="training losses of exactly 0",
    threshold="at every point of at least 3; or at the last 3 and more, after a loss above 0.1",
    source="a mean over no supervised token, and a loss of NaN that transformers leaves out, are logged as 0",
    false_alarms="an answer that is known by heart, in a log that rounds",
    needs=("curve",),
    explains=("never_learned", "memorising", "epoch_jumps", "noisy", "undecided", "too_cold", "rate_too_low"),
)
def zero_loss(seen: Observations) -> Problem | None:
    """The loss is exactly zero."""
    curve = seen.curve
    assert curve is not None
    zeros = curve.loss == 0
    last = len(zeros) if zeros.all() else int((~zeros[::-1]).argmax())
    if last < ZERO_POINTS or (last < len(zeros) and not curve.loss[len(zeros) - last - 1] > NEAR_ZERO):
        return None
    step, whole = int(curve.steps[len(zeros) - last]), last == len(zeros)
    before = "" if whole else f"{curve.loss[len(zeros) - last - 1]:.3g}"
    return Problem(
        level="error",
        sure="certain" if whole else "likely",
        cause=Said("the loss is exactly zero", "损失恰好为零"),
        evidence=Said(
            "at every logged step" if whole else f"from step {step} on, {before} before",
            "所有记录的步上都是 0" if whole else f"从第 {step} 步起为 0，之前为 {before}",
        ),
        consequence=Said("nothing is learned", "什么也学不到"),
        change=Said(
            "look whether any label of a batch is supervised, and whether losses or gradients overflow (fp16)",
            "检查批次里是否有监督标签，以及损失或梯度是否溢出（fp16）",
        ),
        paste="print((batch['labels'] != -100).sum())",
        values={"step": step, "points": last},
        step=step,
    )


@rule(
    "run",
    looks_at="the fall of the loss, and the rate against the range of the method",
    threshold="the rate lies below the range (unknown method: 1e-6), and the loss falls by less than 5 %",
    source="the search ranges of config/methods.py and their sources",
    false_alarms="other optimizers than Adam are left alone",
    needs=("curve", "settings.learning_rate"),
    explains=("never_learned", "undecided", "noisy"),
)
def too_cold(seen: Observations) -> Problem | None:
    """The rate is so low that the loss hardly falls."""
    curve, rate = seen.curve, seen.settings.learning_rate
    assert curve is not None
    assert rate is not None
    series, rates = training_series(curve), rates_of(seen.settings)
    if series is None or len(series) < 8 or rate <= 0:
        return None
    if "adam" not in (seen.settings.optimizer or "adam").lower():
        return None
    if _too_early(seen):
        return None
    fall, error = _fall(series)
    share = fall / max(abs(series.start.value), 1e-12)
    slack = error / max(abs(series.start.value), 1e-12)
    if rate >= (rates.low if rates else LOWEST_RATE) or share > TINY_FALL + slack or held_out_fall(curve) > TINY_FALL:
        return None
    if series.end.above(series.start) > 4:
        return None
    suggested = rates.default if rates else None
    return Problem(
        level="warning",
        sure="likely",
        cause=Said("the learning rate is too low", "学习率过低"),
        evidence=Said(
            f"at {rate:g} the loss falls by {100 * share:.1f} % in {int(curve.steps[-1])} steps"
            f"{rates_said(seen.settings).en}",
            f"学习率 {rate:g}，{int(curve.steps[-1])} 步内损失只下降 {100 * share:.1f}%{rates_said(seen.settings).zh}",
        ),
        consequence=Said("the adapter learns next to nothing", "适配器几乎什么也没学到"),
        change=Said("raise the learning rate", "提高学习率"),
        paste=None if suggested is None else f"learning_rate: {suggested:g}",
        values={"rate": rate, "fall": fall},
    )


@rule(
    "run",
    looks_at="the fall of training and held-out loss over the whole run; right answers, where they were counted",
    threshold="a fall of 7 % would be clear (3 standard errors), and there is none; or no right answer at any time",
    source="recorded: unilora/default of peft's comparison (1.33 to 1.34 nats, 0.2 % right)",
    false_alarms="a base that knows the data already",
    needs=("curve",),
)
def never_learned(seen: Observations) -> Problem | None:
    """The whole run passes without a fall of the loss."""
    curve = seen.curve
    assert curve is not None
    series = training_series(curve)
    if series is None or len(series) < 8:
        return None
    if _too_early(seen):
        return None
    if curve.steps[-1] < FEWEST_STEPS and not _no_answers(curve):
        return None
    fall, error = _fall(series)
    if curve.start_loss is not None:  # the first steps may have done it
        fall = max(fall, curve.start_loss - series.end.value)
    small = fall < NO_FALL * error or fall + 2 * error < SLIGHT_FALL * series.start.value
    flat = small and decidable(series) and not series.falls() and abs(series.start.above(series.end)) < CLEAR - 1
    flat = flat or _constant(series)
    flat = flat and held_out_fall(curve) < TINY_FALL / 2 and series.start.value > NEAR_ZERO and not _below_base(series)
    unanswered = _no_answers(curve)
    if not flat and not (unanswered and fall < 0.2 * series.start.value):
        return None
    answers = Said("; no answer is right at any time", "；始终没有正确答案") if unanswered else Said("", "")
    return Problem(
        level="error" if flat and unanswered else "warning",
        sure="likely",
        cause=Said("the run learned nothing", "整个训练没有学到东西"),
        evidence=Said(
            f"the loss begins at {series.start.value:.3g} and ends at {series.end.value:.3g} after "
            f"{int(curve.steps[-1])} steps; a fall of {3 * error:.2g} would show{answers.en}{_rate(seen).en}",
            f"损失开始时为 {series.start.value:.3g}，{int(curve.steps[-1])} 步后为 {series.end.value:.3g}；"
            f"若下降 {3 * error:.2g} 就能看出来{answers.zh}{_rate(seen).zh}",
        ),
        consequence=Said("the adapter is as good as the base alone", "适配器与基座本身没有差别"),
        change=Said(
            "check that the adapter's weights train and reach the optimizer; then raise the learning rate tenfold",
            "先确认适配器的权重在训练、并且交给了优化器；再把学习率提高十倍",
        ),
        paste="print([name for name, p in model.named_parameters() if p.requires_grad][:4])",
        values={"start": series.start.value, "end": series.end.value, "error": error},
    )


@rule(
    "run",
    looks_at="the level at which the loss stays, against the best guess that ignores the input (unigram loss)",
    threshold="up to 6 % below it over the last fifth, or up to 3 % above it over the last half, and no fall there",
    source="a model that cannot use its inputs learns the frequencies of the labels alone",
    false_alarms="data whose answers do not depend on the inputs",
    needs=("curve", "curve.unigram_loss"),
    explains=("never_learned", "noisy", "undecided", "too_cold"),
)
def wrong_labels(seen: Observations) -> Problem | None:
    """The loss falls to the unigram level and stays: labels do not belong to their inputs."""
    curve = seen.curve
    assert curve is not None
    assert curve.unigram_loss is not None
    series, unigram = training_series(curve), curve.unigram_loss
    if series is None or len(series) < 12 or unigram < NEAR_ZERO:
        return None
    end = series.level(len(series) - max(3, len(series) // 10), len(series))
    low, high = (1 - AT_UNIGRAM) * unigram - end.error, (1 + ABOVE_UNIGRAM) * unigram
    # above it a run may be on its way down: there it has to stay for half of its steps, and noise is no excuse
    above = end.value > unigram
    part = len(series) // (2 if above else 5)
    middle = series.level(len(series) - max(6, part), len(series) - max(3, part // 2))
    slack = 0.0 if above else 3 * math.hypot(middle.error, end.error)
    still = middle.value - end.value < max(slack, 0.02 * unigram)
    if not (low <= end.value <= high) or not still or series.start.value < end.value - 2 * series.start.error:
        return None
    # a base below it has used the inputs already
    knows = curve.base_loss is not None and curve.base_loss < (1 - AT_UNIGRAM) * unigram
    falls = series.start.above(end) > 3
    if not falls and not knows:
        return None
    return Problem(
        level="error",
        sure="likely",
        cause=Said("labels do not seem to belong to their inputs", "标签似乎与输入不对应"),
        evidence=Said(
            f"the loss goes to {end.value:.3g} and stays there; guessing by the frequency of tokens alone gives "
            f"{unigram:.3g}",
            f"损失到 {end.value:.3g} 后不再下降；只按词频猜测的损失是 {unigram:.3g}",
        ),
        consequence=Said("the adapter learns to ignore its inputs", "适配器学到的是忽略输入"),
        change=Said(
            "look at some examples as the model sees them: do answers belong to their questions, and is the prompt "
            "there?",
            "查看模型实际看到的样本：答案与问题是否对应，提示是否还在",
        ),
        values={"end": end.value, "unigram": unigram},
    )


def _too_early(seen: Observations) -> bool:
    """Returns whether a run that is under way has done less than a fifth of its steps, or is still warming up."""
    done, total = seen.steps_done, seen.settings.total_steps
    if seen.stage != "during" or done is None or total is None:
        return False
    return done < max(0.2 * total, 2 * (seen.settings.warmup_steps or 0))


def _fall(series: Series) -> tuple[float, float]:
    """Returns the larger fall of start to end and first to last quarter, with its standard error."""
    first, last = series.quarters()
    return first.value - last.value, math.hypot(first.error, last.error)


def _below_base(series: Series) -> bool:
    """Returns whether the run ends clearly below the untouched base on the same examples."""
    gap = series.base - series.end.value if series.base is not None else 0.0
    return gap > CLEAR * series.end.error and gap > SLIGHT_FALL / 2 * abs(series.base or 0.0)


def _constant(series: Series) -> bool:
    """Returns whether all points are one number, but for its rounding."""
    return bool(np.ptp(series.values) <= 1e-6 * abs(series.start.value))


def _no_answers(curve: LossCurve) -> bool:
    """Returns whether no answer was right in all of the later half of at least 6 counts."""
    if curve.accuracy is None:
        return False
    known = curve.accuracy[np.isfinite(curve.accuracy)]
    return len(known) >= 6 and float(known[len(known) // 2 :].mean()) < NO_ANSWER


def _rate(seen: Observations) -> Said:
    rate = seen.settings.learning_rate
    if rate is None:
        return rates_said(seen.settings)
    said = rates_said(seen.settings)
    return Said(f"; learning rate {rate:g}{said.en}", f"；学习率 {rate:g}{said.zh}")
