"""Every sentence of a study's findings, in English and Chinese, from one set of templates.

    say("base", loss=..., ...)  -->  {"en": "untouched base: dev loss ...", "zh": "未训练的基座模型：..."}

A value of a template is a number, a string, or a text in both languages, so that sentences are made of parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from peft_study.statistics import Estimate, short

Text = dict[str, str]
"""The same in each of `LANGUAGES`."""
LANGUAGES = ("en", "zh")
LONGEST = 120
"""Characters of a name or of a program's message in a sentence; longer ones are cut, the whole is in the files."""


class Wording(NamedTuple):
    """A part of a sentence for `str.format`; `one`: the English where the value `n` is 1."""

    en: str
    zh: str
    one: str = ""


TEMPLATES: dict[str, Wording] = {
    # parts
    "interval": Wording("95 % {low} to {high}", "95 % 区间 {low} 至 {high}"),
    "no_interval": Wording("no interval: a single example", "只有一条样本，没有区间"),
    "nothing": Wording("", ""),
    "comma": Wording(", ", "，"),
    "enumeration": Wording(", ", "、"),
    "and": Wording(" and ", "和"),
    "then": Wording("; then ", "；其次是 "),
    "examples": Wording("{n} examples", "{n} 条样本", "{n} example"),
    "settings": Wording("{n} settings", "{n} 组设置", "{n} setting"),
    "others": Wording("{n} other settings", "另有 {n} 组设置", "{n} other setting"),
    "trials": Wording("{n} trials", "{n} 次试验", "{n} trial"),
    "new_seeds": Wording("{n} new seeds", "{n} 个新的随机种子", "one new seed"),
    "at": Wording("{name} {values}", "{name} {values}"),
    "from_to": Wording("{low} to {high}", "{low} 至 {high}"),
    "only": Wording("{value} alone", "只有 {value}"),
    "dev": Wording("dev", "开发集"),
    "test": Wording("test", "测试集"),
    "loss_with_interval": Wording("{value} ({interval})", "{value}（{interval}）"),
    "method_lora": Wording("lora", "LoRA"),
    "method_prefix_tuning": Wording("prefix tuning", "前缀微调"),
    "method_prompt_tuning": Wording("prompt tuning", "提示微调"),
    "method_full": Wording("full", "全参数微调"),
    # the untouched base
    "nothing_begun": Wording("no trial has begun", "尚无试验开始"),
    "base": Wording(
        "untouched base: dev loss {loss} ({interval}, over {examples})",
        "未训练的基座模型：开发集损失 {loss}（{interval}，{examples}）",
    ),
    # the search of a method
    "search_none": Wording("{method}: no trial began in the time allowed", "{method}：在限定时间内没有试验开始"),
    "search_lost": Wording(
        "{method}: none of its {n} settings finished ({reason})",
        "{method}：{n} 组设置无一完成（{reason}）",
        "{method}: its only setting did not finish ({reason})",
    ),
    "reason": Wording("{reason}", "程序信息：“{reason}”"),
    "not_finite": Wording("the loss is no finite number", "损失不是有限数值"),
    "under_way": Wording("none has ended yet", "试验尚未结束"),
    "search": Wording(
        "{method}: {setting} is {rank}: dev loss {loss} ({interval}, over {examples}, one seed){more}",
        "{method}：{setting} 是{rank}：开发集损失 {loss}（{interval}，{examples}，1 个随机种子）{more}",
    ),
    "best_of": Wording("best of {settings}", "{settings}中最好的"),
    "only_setting": Wording("the only setting tried", "唯一试过的设置"),
    "best_is_worse": Wording("; even so it is worse than the untouched base", "；但仍不如未训练的基座模型"),
    "best_is_alike": Wording(
        "; even so it cannot be told from the untouched base", "；但与未训练的基座模型没有可分辨的差别"
    ),
    "untuned": Wording(
        "; untuned: it had fewer trials than the others, so it is not ranked",
        "；搜索不充分：试验比其他方法少，因此不参与排名",
    ),
    "stopped_early": Wording("; {which} were stopped early", "；{which} 被提前停止", "; {which} was stopped early"),
    "failed": Wording("; {which} failed", "；{which} 运行失败"),
    "moved": Wording(
        "{method}: {name} was searched from {low} to {high}, and not only from {before_low} to {before_high} as given",
        "{method}：{name} 的搜索范围由给定的 {before_low} 至 {before_high} 改为 {low} 至 {high}",
    ),
    "cut": Wording(
        "{method}: {name} was searched from {low} to {high}; its range test ruled out the rest of {before_low} to "
        "{before_high}",
        "{method}：{name} 的搜索范围为 {low} 至 {high}；范围测试排除了给定的 {before_low} 至 {before_high} 的其余部分",
    ),
    "settled": Wording(
        "{method}: its search ended early, as known well enough (search.stop)",
        "{method}：最好的设置已足够确定，搜索提前结束（search.stop）",
    ),
    # finals and recommendation
    "final_lost": Wording(
        "{method}: {n} of {seeds} seeds of its best setting did not finish, so it is not ranked",
        "{method}：最好设置的 {seeds} 个随机种子中有 {n} 个未完成，因此不参与排名",
    ),
    "final_pending": Wording(
        "{method}: its best setting is being retrained with new seeds", "{method}：正在用新的随机种子重训最好的设置"
    ),
    "final_not_finite": Wording(
        "{method}, its best setting retrained with {seeds}: the dev loss is no finite number",
        "{method}：最好的设置用 {seeds} 重训后，开发集损失不是有限数值",
    ),
    "final": Wording(
        "{method}, its best setting retrained with {seeds}: dev loss {dev}{spread}{test}",
        "{method}：最好的设置用 {seeds} 重训：开发集损失 {dev}{spread}{test}",
    ),
    "by_seed": Wording(", by seed {low} to {high}", "，各随机种子 {low} 至 {high}"),
    "test_loss": Wording("; test loss {test}, {against}", "；测试集损失 {test}，{against}"),
    "below_base": Wording("{by} ({interval}) below the untouched base's", "比未训练的基座模型低 {by}（{interval}）"),
    "above_base": Wording("{by} ({interval}) above the untouched base's", "比未训练的基座模型高 {by}（{interval}）"),
    "like_base": Wording(
        "which cannot be told from the untouched base's ({by}, {interval})",
        "与未训练的基座模型没有可分辨的差别（{by}，{interval}）",
    ),
    "recommendation": Wording(
        "{method}: recommended from all its trials: {settings}; {within}",
        "{method}：由全部试验推荐：{settings}；{within}",
    ),
    "rates": Wording(
        "{setting} (the best rate lies between {low} and {high})", "{setting}（最佳学习率在 {low} 与 {high} 之间）"
    ),
    "within": Wording(
        "within {within} nats a token of the best of its space, with 90 %",
        "与其搜索空间中最好的设置相差不超过 {within} nats/token（90 %）",
    ),
    "within_nothing": Wording(
        "no other setting of its space is better, with 90 %", "其搜索空间中没有更好的设置（90 %）"
    ),
    # what the settings do
    "range": Wording(
        "{method}, as good as its best within noise ({trials} ran to the end, one seed each): {ranges}{others}",
        "{method}：在噪声范围内与最好的设置一样好（{trials}运行到底，各 1 个随机种子）：{ranges}{others}",
    ),
    "range_part": Wording("{values} ({trials})", "{values}（{trials}）"),
    "range_others": Wording(
        "; each value is judged by the best of the other settings tried there",
        "；每个值按在该值下试过的最好的其余设置判断",
    ),
    "range_unknown": Wording(
        "{method}: one setting ran to its end, so it cannot be said which others are as good",
        "{method}：只有一组设置运行到底，无法判断还有哪些设置一样好",
    ),
    "sensitivity": Wording(
        "{method}: by {name}, the mean dev loss is least at {best}, {best_loss}, and greatest at {worst}, {worst_loss}"
        "{others}{importance}",
        "{method}：按 {name} 看，平均开发集损失在 {best} 处最低，为 {best_loss}；在 {worst} 处最高，为 {worst_loss}"
        "{others}{importance}",
    ),
    "mean_of": Wording("{value} ({interval}, {trials})", "{value}（{interval}，{trials}）"),
    "others_vary": Wording("; the other settings vary from trial to trial", "；其余设置随试验而变"),
    "importance": Wording(
        "; it takes part in {share} % of the variance of the log loss ({interval})",
        "；对数损失的方差中有 {share} % 与它有关（{interval}）",
    ),
    "no_importance": Wording(
        "{method}: {n} trials ran to their end; how important each setting is takes {least} and is not given",
        "{method}：{n} 次试验运行到底；判断各设置的重要性至少需要 {least} 次，故未给出",
        "{method}: {n} trial ran to its end; how important each setting is takes {least} and is not given",
    ),
    "edge_high": Wording(
        "{method}: the best {name}, {value}, lies at the edge of its range: try higher",
        "{method}：最好的 {name}（{value}）位于搜索范围的边缘：请尝试更大的值",
    ),
    "edge_low": Wording(
        "{method}: the best {name}, {value}, lies at the edge of its range: try lower",
        "{method}：最好的 {name}（{value}）位于搜索范围的边缘：请尝试更小的值",
    ),
    "never_learned": Wording(
        "{method}: {n} of {settings} that ran to the end are no better than the untouched base: {where}{worse}",
        "{method}：运行到底的 {settings}中有 {n} 组不优于未训练的基座模型：{where}{worse}",
        "{method}: {n} of {settings} that ran to the end is no better than the untouched base: {where}{worse}",
    ),
    "worse_than_base": Wording(
        "; {n} of these are worse than it", "；其中 {n} 组更差", "; {n} of these is worse than it"
    ),
    "diverged": Wording(
        "{method}: {n} of {settings} diverged: {where}", "{method}：{settings}中有 {n} 组发散：{where}"
    ),
    # cost
    "cost": Wording("{method}: {parts}", "{method}：{parts}"),
    "trainable": Wording("{n:,} trainable parameters", "可训练参数 {n:,} 个", "{n:,} trainable parameter"),
    "adapter_bytes": Wording("adapter of {size}", "适配器 {size}"),
    "peak_bytes": Wording("{size} of memory a trial beside the base", "每次试验在基座模型之外占内存 {size}"),
    "tokens_per_second": Wording(
        "{speed:,.0f} data tokens a second alone (a row of {n:,} tokens)",
        "单独训练时每秒 {speed:,.0f} 个数据 token（一行 {n:,} token）",
    ),
    "data_tokens": Wording(
        "{n:,} data tokens trained on, range tests and finals included",
        "共训练 {n:,} 个数据 token（含范围测试和最终重训）",
        "{n:,} data token trained on, range tests and finals included",
    ),
    "pareto": Wording(
        "mean {part} loss against {cost}: {front}{dominated}", "平均{part}损失与{cost}的权衡：{front}{dominated}"
    ),
    "on_front": Wording(
        "{methods} are on the Pareto front", "帕累托前沿上有 {methods}", "{methods} alone is on the Pareto front"
    ),
    "dominated": Wording("; {method} is dominated by {by}", "；{method} 被 {by} 支配"),
    "cost_trainable": Wording("trainable parameters", "可训练参数量"),
    "cost_adapter_bytes": Wording("the adapter's size", "适配器大小"),
    "cost_peak_bytes": Wording("memory beside the base", "基座模型之外的内存"),
    "cost_tokens_per_second": Wording("speed", "训练速度"),
    # the order
    "no_winner": Wording(
        "no setting finished with all its new seeds, so there is no winner",
        "没有设置用全部新的随机种子完成，因此没有优胜者",
    ),
    "winner": Wording(
        "winner by {by} over {seeds}: {method} with {setting}{more}",
        "按 {seeds} 的{by}，优胜者是 {method}，{setting}{more}",
    ),
    "by_loss": Wording("mean dev loss", "平均开发集损失"),
    "by_task": Wording("mean score on {task}", "在任务 {task} 上的平均得分"),
    "lead": Wording("; fewer than 3 seeds: take it as a lead", "；随机种子不足 3 个：只能当作线索"),
    "close": Wording("; on the {part} part {methods} cannot be told from it", "；在{part}上 {methods} 与它不可分辨"),
    "winner_is_worse": Wording("; it is worse than the untouched base", "；它不如未训练的基座模型"),
    "ranking": Wording(
        "ranking on the {part} part, corrected for all pairs (Holm): {groups}{smallest}",
        "{part}排名（对所有两两比较作 Holm 校正）：{groups}{smallest}",
    ),
    "alike": Wording("{methods}, which cannot be told apart", "{methods}（彼此不可分辨）"),
    "smallest": Wording(
        "; with {examples}, differences of the two best under {now} nats a token are easily missed (80 % power, seeds "
        "apart); {more} would show {later}",
        "；用 {examples}，最好的两组之间小于 {now} nats/token 的差别容易漏掉（检验功效 80 %，不计随机种子）；"
        "{more} 条可以看出 {later} 的差别",
    ),
    "pruning": Wording(
        "{n} trials were stopped early{more}", "{n} 次试验被提前停止{more}", "{n} trial was stopped early{more}"
    ),
    "unchecked": Wording("; none was run on to check that", "；没有留下对照来检验"),
    "audited": Wording(
        "; {n} more met the rule but were kept as controls: {wrong} would have been a finalist",
        "；另有 {n} 次符合停止条件但作为对照运行到底：{wrong}会进入最终重训",
        "; {n} more met the rule but was kept as a control: {wrong} would have been a finalist",
    ),
    "wrong_none": Wording("none", "没有一次"),
    "wrong_some": Wording("{n} of {all}", "其中 {n} 次（共 {all} 次）"),
    # what is not known
    "fixed": Wording("{method}: not searched, held at: {settings}", "{method}：未搜索、保持不变：{settings}"),
    "fixed_for_all": Wording(
        "not varied: {settings}; one model, {model}; one data set, {data}{methods}",
        "未改变：{settings}；一个模型 {model}；一个数据集 {data}{methods}",
    ),
    "other_methods": Wording("; not in the study: {methods}", "；未参与研究的方法：{methods}"),
    "few_examples": Wording(
        "{n} held-out rows: 95 % intervals over so few are wide, and of skewed losses still a little too narrow: they "
        "cover about 92 % with 8 rows and 94 % with 24 and more",
        "只有 {n} 条留出样本：95 % 区间很宽，而对偏态的损失仍略窄：8 条时覆盖约 92 %，24 条以上约 94 %",
        "{n} held-out row: 95 % intervals over so few are wide, and of skewed losses still a little too narrow: they "
        "cover about 92 % with 8 rows and 94 % with 24 and more",
    ),
    "sources_resampled": Wording(
        "intervals resample the {sources} sources of the {rows} held-out rows, not single rows",
        "区间按 {rows} 条留出样本的 {sources} 个来源重抽样，而不是按单条样本",
    ),
    "few_sources": Wording(
        "the {rows} held-out rows come from {sources} sources, too few to resample whole ones (from {least} on): "
        "intervals resample rows, and are too narrow where rows of one source resemble each other",
        "{rows} 条留出样本只有 {sources} 个来源，不足以按来源重抽样（至少 {least} 个）：区间按单条样本重抽样，"
        "同一来源的样本彼此相似时会偏窄",
    ),
    "one_seed": Wording(
        "nothing was retrained with new seeds: each number is of one seed, and the best of many is partly luck",
        "没有用新的随机种子重训：每个数值只来自 1 个随机种子，多组中最好的一组有运气成分",
    ),
    "scope": Wording(
        "chosen on the dev part, with one model, one data set and runs of {length}: on others the order and the best "
        "settings may differ, in longer runs above all the rate",
        "结论由开发集选出，只用了一个模型、一个数据集和 {length} 的训练：换一种条件，排名和最好的设置可能不同，"
        "训练更久时学习率尤其如此",
    ),
    "steps": Wording("{n:,} steps", "{n:,} 步", "{n:,} step"),
    "epochs": Wording("{n:,} epochs", "{n:,} 轮", "{n:,} epoch"),
    "budget_tokens": Wording("{n:,} tokens", "{n:,} 个 token", "{n:,} token"),
    "deadline": Wording(
        "the time limit ended the search before all its settings were tried", "时间用完，搜索在试完所有设置之前结束"
    ),
    "stopped": Wording(
        "the study was ended before its plan was done: {reason}", "研究在计划完成之前结束，原因：“{reason}”"
    ),
    "continued": Wording(
        "the study file was changed during the study, and the test part opened more than once",
        "研究文件在研究期间改过，测试集打开过不止一次",
    ),
}


_WIDE = "\u4e00-\u9fff"
_CROWDED = re.compile(
    rf"(?<=[{_WIDE}，。；：、（）“”]) +(?=[{_WIDE}，。；：、（）“”])|(?<=[，。；：、（“]) +| +(?=[，。；：、）”])"
)
_SPACED = re.compile(rf"(?<=[{_WIDE}])(?=[A-Za-z0-9+-])|(?<=[A-Za-z0-9%])(?=[{_WIDE}])")
"""In Chinese a space stands between a character and a number or a Latin word, and nowhere else."""


def say(key: str, **values: Any) -> Text:
    """Returns a template in each language, on one line; strings among the values are cut at `LONGEST` characters."""
    template, said = TEMPLATES[key], {}
    for language in LANGUAGES:
        form = (
            template.one if language == "en" and template.one and values.get("n") == 1 else getattr(template, language)
        )
        own = {name: value[language] if isinstance(value, dict) else cut(value) for name, value in values.items()}
        said[language] = form.format(**own)
    said["zh"] = _SPACED.sub(" ", _CROWDED.sub("", said["zh"]))
    return said


def cut(value: Any) -> Any:
    """Returns a string on one line, cut where it is too long for a sentence; anything else as it is."""
    if not isinstance(value, str):
        return value
    line = " ".join(value[: 4 * LONGEST].split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def same(value: object) -> Text:
    """Returns a setting's value or a name, which is the same in every language."""
    return dict.fromkeys(LANGUAGES, _value(value))


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(cut(short(value)))


def joined(parts: Iterable[Text], key: str = "enumeration") -> Text:
    """Returns parts with a separator between them; `key`: of the separator."""
    there, between = list(parts), say(key)
    return {language: between[language].join(part[language] for part in there) for language in LANGUAGES}


def listed(parts: Sequence[Text]) -> Text:
    """Returns parts as a list in a sentence: "a, b and c"."""
    if len(parts) < 2:
        return joined(parts)
    return joined([joined(parts[:-1]), parts[-1]], "and")


def title(method: str) -> Text:
    """Returns a method's name in a sentence; a name that the study file gave stays."""
    if f"method_{method}" in TEMPLATES:
        return say(f"method_{method}")
    return dict.fromkeys(LANGUAGES, cut(method.replace("_", " ")))


def setting(name: str, value: object) -> Text:
    """Returns a setting with its value, named as in the study file."""
    return dict.fromkeys(LANGUAGES, f"{name} {_value(value)}")


def interval(estimate: Estimate, form: str = ".3f") -> Text:
    """Returns the interval of an estimate as part of a sentence."""
    if not estimate.bounded:
        return say("no_interval")
    return say("interval", low=f"{estimate.low:{form}}", high=f"{estimate.high:{form}}")


def with_interval(estimate: Estimate, form: str = ".3f") -> Text:
    """Returns a value with its interval."""
    return say("loss_with_interval", value=f"{estimate.value:{form}}", interval=interval(estimate, form))
