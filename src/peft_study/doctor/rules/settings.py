"""How a run trains: rates, warm-up, sizes, steps and start, against what the method is known to bear."""

from __future__ import annotations

import math

import numpy as np

from peft_study.config.methods import LearningRates
from peft_study.doctor.diagnosis import Level, Problem, Said
from peft_study.doctor.observations import LossCurve, Observations
from peft_study.doctor.rates import rates_of
from peft_study.doctor.rule import rule

FAR = 10
"""Times beyond a method's range at which nothing can come of a rate."""
SMALL_MODEL = 2e7
"""Numbers of a base below which full fine-tuning bears ten times the rates: good rates fall as a model grows."""
LONG_WARMUP = 0.5
"""Share of the steps: 0.03 to 0.1 are usual, and a longer part than half leaves no time at the rate that was chosen."""
MANY_TOKENS, ONE_TOKEN = 300, 1
"""Virtual tokens: 300 are the most that Li and Liang 2021 tried; one is too few below 11B (Lester et al. 2021)."""
LARGE_SCALE = 32
"""alpha / rank: Hu et al. 2021 take 8 (alpha 32, rank 4), LoRA Without Regret 1/16 (alpha 32, rank 512)."""
FAR_ABOVE = 2
"""Times the model's width: a rank up to there is a waste, and one beyond it a slip."""
FEW_STEPS, VERY_FEW_STEPS = 20, 5
"""Optimizer steps. A choice: a smoke test takes 20, and no published run so few."""
WRECKED = 1.0
"""Nats a token above the untouched base at step 0. SmolLM2-135M on tulu-like-mix, 16 rows: text, vocab, scaled random
prompts within 0.03, prefix from text 0.03, from zero 0.52, random 7.5; peft's random prompts and prefixes begin 2 and 6
above (method_comparison, mean of the first 250 steps)."""
SOON = 0.2
"""Share of the run within which a start that is made good costs little."""
UNEVEN = 0.3
"""Spread of the rows' supervised tokens from which the mean of means differs from the mean over tokens."""


def _rates(seen: Observations) -> LearningRates | Said:
    rates = rates_of(seen.settings)
    if rates is None:
        return Said("the rates of this method and optimizer are not known", "不了解这种方法和优化器适合的学习率")
    small = seen.parameters is not None and seen.parameters.base < SMALL_MODEL
    if small and seen.settings.method == "full":
        return LearningRates(rates.default, rates.low, rates.high * FAR)
    return rates


def _learned(curve: LossCurve | None) -> bool:
    """True where the loss fell below its start and the base and stayed down: the run is the better witness."""
    if curve is None or len(curve.loss) < 4:
        return False
    before = [loss for loss in (curve.start_loss, curve.base_loss) if loss is not None]
    quarter = max(1, len(curve.loss) // 4)
    first, last = float(np.median(curve.loss[:quarter])), float(np.median(curve.loss[-quarter:]))
    return bool(np.isfinite(curve.loss).all() and last < 0.9 * first and last < min(before, default=np.inf))


@rule(
    "settings",
    looks_at="the peak rate, by method, for Adam's family (Adafactor for prompts)",
    threshold="above the method's range; an error from ten times its upper end; a note where the loss fell",
    source="LearningRates in config/methods.py; other methods: OTHER_RATES in doctor/rates.py, with their sources",
    false_alarms="tiny models, which bear more",
    needs=("settings.learning_rate", "settings.method"),
    explains=(
        "rising", "diverged", "too_hot", "always_clipped", "warmup_too_short", "source_rising", "fp16_overflow",
        "wrong_labels", "never_learned",
    ),
)  # fmt: skip
def rate_too_high(seen: Observations) -> Problem | Said | None:
    """The learning rate is above what the method bears."""
    rates, rate = _rates(seen), seen.settings.learning_rate
    if isinstance(rates, Said):
        return rates
    if rate is None or not rate > rates.high:
        return None
    level: Level = "error" if rate >= FAR * rates.high else "warning"
    return Problem(
        level="note" if _learned(seen.curve) else level,
        sure="certain" if level == "error" else "likely",
        cause=Said(f"the learning rate is too high for {_name(seen)}", f"对 {_name(seen)} 来说学习率太高"),
        evidence=_beside(rate, rates, seen),
        consequence=Said("the loss rises or diverges", "损失会上升或发散"),
        change=Said("take its usual rate", "取常用的学习率"),
        paste=f"learning_rate: {rates.default:g}",
        values={"rate": rate, "default": rates.default, "low": rates.low, "high": rates.high},
    )


@rule(
    "settings",
    looks_at="the peak rate, by method, for Adam's family (Adafactor for prompts)",
    threshold="below the method's range; an error from a tenth of its lower end",
    source="as of rate_too_high; a prompt at 1e-4 with AdamW ended 5,000 steps at 5.7 % where LoRA reached 47.8 %",
    false_alarms="a last, gentle phase of training; DPO",
    needs=("settings.learning_rate", "settings.method"),
    explains=("too_cold", "never_learned", "undecided", "noisy", "updates_below_precision"),
)
def rate_too_low(seen: Observations) -> Problem | Said | None:
    """The learning rate is below what teaches the method anything."""
    rates, rate = _rates(seen), seen.settings.learning_rate
    if isinstance(rates, Said):
        return rates
    # a rate of 0 is another rule's
    if rate is None or not 0 < rate < rates.low:
        return None
    hopeless = rate <= rates.low / FAR * (1 + 1e-9)
    return Problem(
        level="error" if hopeless else "warning",
        sure="certain" if hopeless else "likely",
        cause=Said(f"the learning rate is too low for {_name(seen)}", f"对 {_name(seen)} 来说学习率太低"),
        evidence=_beside(rate, rates, seen),
        consequence=Said(
            "it teaches nothing within a usual number of steps" if hopeless else "it learns little",
            "通常的步数内学不到任何东西" if hopeless else "学到的很少",
        ),
        change=Said("take its usual rate", "取常用的学习率"),
        paste=f"learning_rate: {rates.default:g}",
        values={"rate": rate, "default": rates.default, "low": rates.low, "high": rates.high},
    )


def _beside(rate: float, rates: LearningRates, seen: Observations) -> Said:
    """Returns a rate beside those that the method bears."""
    low, high, usual = (f"{value:g}" for value in (rates.low, rates.high, rates.default))
    return Said(
        f"{rate:g}, and {_name(seen)} is known to learn between {low} and {high}, usually at {usual}",
        f"{rate:g}，而已知 {_name(seen)} 在 {low} 到 {high} 之间有效，常用 {usual}",
    )


def _name(seen: Observations) -> str:
    return (seen.settings.method or "").replace("_", " ")


@rule(
    "settings",
    looks_at="warm-up steps, and all optimizer steps",
    threshold="half of the steps",
    source="0.03 in Tulu, PiSSA and arXiv:2602.04998, 0.1 in method_comparison of peft; none in Lester et al. 2021",
    false_alarms="a first part of a longer schedule, run alone",
    needs=("settings.warmup_steps", "settings.total_steps"),
    explains=("too_cold", "never_learned", "undecided"),
)
def warmup_unusual(seen: Observations) -> Problem | None:
    """The warm-up takes most of the run."""
    warm, total = seen.settings.warmup_steps or 0, seen.settings.total_steps or 0
    # of two steps one is half
    if total < 2 or warm < 2 or warm < LONG_WARMUP * total:
        return None
    never = warm >= total
    return Problem(
        level="warning",
        sure="certain" if never else "likely",
        cause=Said(
            "the warm-up is longer than the run" if never else "the warm-up takes most of the run",
            "预热比整个训练还长" if never else "预热占了训练的大部分",
        ),
        evidence=Said(f"{warm:,} of {total:,} optimizer steps", f"共 {total:,} 个优化步，预热 {warm:,} 步"),
        consequence=Said(
            "the rate never reaches what was chosen" if never else "little is left at the rate that was chosen",
            "学习率始终达不到设定值" if never else "在设定学习率下的步数很少",
        ),
        change=Said("warm up over 3 to 10 % of the steps", "预热取总步数的 3% 到 10%"),
        paste="warmup_ratio: 0.03",
        values={"warmup": warm, "total": total},
    )


@rule(
    "settings",
    looks_at="virtual tokens",
    threshold="more than 300; one alone, for prompts",
    source="Li and Liang 2021: best at 10 and 200; Lester et al. 2021: harm above 100, one too few",
    false_alarms="models of 11B and more, for which one token may do",
    needs=("settings.tokens",),
)
def tokens_unusual(seen: Observations) -> Problem | None:
    """Virtual tokens are far more, or fewer, than what is known to work."""
    tokens, prompt = seen.settings.tokens or 0, seen.settings.method in ("prompt_tuning", "p_tuning")
    many = tokens > MANY_TOKENS
    if not many and not (prompt and tokens == ONE_TOKEN):
        return None
    return Problem(
        level="warning",
        sure="likely" if many else "possible",
        cause=Said(
            "there are very many virtual tokens" if many else "there is one virtual token",
            "虚拟标记过多" if many else "只有一个虚拟标记",
        ),
        evidence=Said(
            f"{tokens:,}; 8 to 100 are usual, and 200 the most that paid off",
            f"{tokens:,} 个；通常用 8 到 100 个，最多到 200 个仍有收益",
        ),
        consequence=Said(
            "each row costs as many tokens more, and training becomes harder" if many else "it can express little",
            "每个样本都多出这么多标记，训练也更难" if many else "能表达的内容很少",
        ),
        change=Said("take 8 to 100", "取 8 到 100 个"),
        paste="tokens: 20",
        values={"tokens": tokens},
    )


@rule(
    "settings",
    looks_at="rank against the sides of the layers; alpha / rank (rsLoRA: alpha / sqrt(rank))",
    threshold="rank above twice the model's width (a note above a layer's smaller side); scale above 32 or below 1/32",
    source="a matrix has no higher rank than its smaller side; scales: Hu et al. 2021 take 8, LoRA Without Regret 1/16",
    false_alarms="a scale that a rate makes up for",
    needs=("settings.rank",),
    explains=("too_hot", "too_cold", "diverged", "rising"),
)
def rank_unusual(seen: Observations) -> Problem | None:
    """LoRA's rank or scale is out of proportion."""
    settings = seen.settings
    rank, alpha = settings.rank or 0, settings.alpha
    if rank <= 0:
        return None
    side = settings.narrowest or settings.width
    if side is not None and rank > side:
        return Problem(
            level="warning" if settings.width is not None and rank > FAR_ABOVE * settings.width else "note",
            sure="certain",
            cause=Said("the rank is above the layers' own", "秩超过了层本身的秩"),
            evidence=Said(f"rank {rank:,}; the smaller side is {side:,}", f"秩为 {rank:,}，较小的边只有 {side:,}"),
            consequence=Said("more numbers train, and nothing more can be learned", "训练的参数变多，能学的却没有变多"),
            change=Said("take a rank of 4 to 128", "秩取 4 到 128"),
            paste="rank: 16",
            values={"rank": rank, "side": side},
        )
    scale = None if alpha is None else alpha / (math.sqrt(rank) if settings.rank_stabilised else rank)
    if scale is None or 1 / LARGE_SCALE <= abs(scale) <= LARGE_SCALE:
        return None
    large = abs(scale) > LARGE_SCALE
    return Problem(
        level="warning",
        sure="likely",
        cause=Said("the scale of LoRA's update is out of proportion", "LoRA 更新量的缩放不成比例"),
        evidence=Said(
            f"alpha {alpha:g}, rank {rank:,}: {scale:.3g}", f"alpha {alpha:g}、秩 {rank:,}：缩放 {scale:.3g}"
        ),
        consequence=Said(
            "a step changes the model as at a far higher rate" if large else "a step changes the model hardly at all",
            "每一步相当于用高得多的学习率" if large else "每一步几乎不改变模型",
        ),
        change=Said("take alpha between one and two times the rank", "alpha 取秩的一到两倍"),
        paste=f"alpha: {2 * rank}",
        values={"rank": rank, "alpha": alpha, "scale": scale},
    )


@rule(
    "settings",
    looks_at="optimizer steps of the whole run",
    threshold="fewer than 5 (a note below 20)",
    source="AdamW moves a number by about the rate a step, whatever the gradient: few steps are a short way",
    false_alarms="a run that only tries the machinery",
    needs=("settings.total_steps",),
    explains=("undecided", "noisy", "too_cold", "never_learned"),
)
def too_few_steps(seen: Observations) -> Problem | None:
    """The run is too short for anything."""
    total = seen.settings.total_steps
    if total is None or not 0 < total < FEW_STEPS:
        return None
    batch = seen.settings.batch_size
    beside, beside_zh = (f" of {batch:,} examples", f"，每步 {batch:,} 个样本") if batch else ("", "")
    return Problem(
        level="warning" if total < VERY_FEW_STEPS else "note",
        sure="likely",
        cause=Said("there are very few optimizer steps", "优化步数太少"),
        evidence=Said(f"{total:,} steps{beside}", f"{total:,} 步{beside_zh}"),
        consequence=Said("little is learned, and no trend shows", "学不到多少，也看不出趋势"),
        change=Said(
            "train for more steps, or more epochs; a smaller batch gives more steps of the same rows",
            "增加步数或轮数；同样的样本，减小批大小可以得到更多步",
        ),
        paste="steps: 100",
        values={"steps": total, "batch": batch},
    )


@rule(
    "settings",
    looks_at="the held-out loss before step 1, and the untouched base's on the same examples",
    threshold="1 nat a token above it (a note where a fifth of the run makes it good)",
    source="method_comparison of peft: random prompts begin 2, random prefixes 6 nats above the base",
    false_alarms="a prompt for a task at which the base answers nothing but its own form",
    needs=("curve.start_loss", "curve.base_loss"),
    explains=("never_learned",),
)
def init_wrecks(seen: Observations) -> Problem | None:
    """The initialisation alone makes the model worse."""
    assert seen.curve is not None
    start, base = seen.curve.start_loss, seen.curve.base_loss
    if start is None or base is None or math.isnan(base) or start <= base + WRECKED:
        return None
    recovered = _recovered(seen.curve, base)
    method = _name(seen)
    init = f" with init {seen.settings.init}" if seen.settings.init else ""
    init_zh = f"（初始化 {seen.settings.init}）" if seen.settings.init else ""
    return Problem(
        level="note" if recovered else "warning",
        sure="certain",
        cause=Said("the initialisation wrecks the base", "初始化破坏了基座"),
        evidence=Said(
            f"before step 1 the loss is {start:.3f}, the untouched base's is {base:.3f}; {method or 'adapter'}{init}",
            f"第 1 步之前损失为 {start:.3f}，未改动的基座为 {base:.3f}；{method or '适配器'}{init_zh}",
        ),
        consequence=Said(
            "the first part of the training only repairs it, often thousands of examples",
            "训练的前一段只是在修复，往往要用掉几千个样本",
        ),
        change=Said(
            "begin from a text (init: text; in finetune --prompt_init text, --prefix_init text); "
            "LoRA begins at zero by itself",
            "用文本初始化（init: text；finetune 用 --prompt_init text、--prefix_init text）；LoRA 默认从零开始",
        ),
        paste="init: text",
        values={"start": start, "base": base},
        step=0,
    )


def _recovered(curve: LossCurve, base: float) -> bool:
    """Returns whether the run was at the base's loss within its first part, and ended below it."""
    loss = curve.loss[np.isfinite(curve.loss)]
    if len(loss) < 8:
        return False
    part = max(3, round(SOON * len(loss)))
    return bool(np.median(loss[part - part // 2 : part + 1]) <= base and np.median(loss[-part:]) < base)


@rule(
    "settings",
    looks_at="how micro-batches of a step are averaged, and how much rows differ in supervised tokens",
    threshold="a mean of means over two micro-batches or more; a warning where rows differ by 30 % of their mean",
    source="huggingface/transformers #34191: until 4.46 the Trainer averaged means, and short rows weighed more",
    false_alarms="rows of nearly one length, for which it makes no difference: a note",
    needs=("settings.mean_of_means",),
)
def mean_of_means(seen: Observations) -> Problem | None:
    """Accumulation averages means."""
    settings, spread = seen.settings, seen.data.spread if seen.data else None
    if not settings.mean_of_means or (settings.accumulation or 2) < 2:
        return None
    uneven = spread is not None and spread >= UNEVEN
    steps = f"{settings.accumulation:,}" if settings.accumulation else "several"
    varied = f", supervised tokens of a row vary by {spread:.0%}" if spread is not None else ""
    varied_zh = f"，每个样本的监督标记数相差 {spread:.0%}" if spread is not None else ""
    return Problem(
        level="warning" if uneven else "note",
        sure="certain" if uneven else "possible",
        cause=Said("a step averages the means of its micro-batches", "每一步对各个微批的均值再取均值"),
        evidence=Said(
            f"{steps} micro-batches a step{varied}", f"每步 {settings.accumulation or '多'} 个微批{varied_zh}"
        ),
        consequence=Said(
            "tokens of short rows weigh more than those of long ones, and the result depends on the micro-batch",
            "短样本的标记权重高于长样本，结果还会随微批大小改变",
        ),
        change=Said(
            "divide by the supervised tokens of the whole step (transformers 4.46 and later do)",
            "按整步的监督标记数求平均（transformers 4.46 起如此）",
        ),
        paste="loss = sum_of_token_losses / num_items_in_batch",
        values={"accumulation": settings.accumulation, "spread": spread},
    )
