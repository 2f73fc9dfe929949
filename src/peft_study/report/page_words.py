"""The words of a report's page, in English and Chinese; the findings bring their own text."""

from __future__ import annotations

from peft_study.errors import ConfigError
from peft_study.report.wording import LANGUAGES

_TEXTS: dict[str, tuple[str, str]] = {
    "study": ("Study", "研究"),
    "studies": ("Studies side by side", "研究对比"),
    "run": ("Fine-tuning run", "微调运行"),
    "contents": ("Contents", "目录"),
    "skip": ("Skip to the answer", "跳到结论"),
    "answer": ("The answer", "结论"),
    "behind": ("{n} trials", "{n} 次试验"),
    "behind_one": ("1 trial", "1 次试验"),
    "strip_note": (
        "Bars: 95 % intervals, on one scale for all cards; the dashed line is the untouched base.",
        "横条：95 % 区间，所有卡片用同一刻度；虚线是未训练的基座模型。",
    ),
    "findings": ("What was found", "发现"),
    "curves": ("Learning curves", "学习曲线"),
    "rates": ("Learning rate against loss", "学习率与损失"),
    "responses": ("Other settings against loss", "其他设置与损失"),
    "pareto": ("Loss against cost", "损失与成本"),
    "tasks": ("Tasks", "任务"),
    "task_accuracy_note": (
        "Share of {rows} questions answered correctly, with exact 95 % intervals (Clopper and Pearson); p: McNemar's "
        "test against the base.",
        "{rows} 道题的正确率，附精确 95 % 区间（Clopper–Pearson）；p 为与基座模型比较的 McNemar 检验。",
    ),
    "task_constant": (
        "The answer that is right most often, given every time, would be right in {share} %.",
        "若每次都给出最常见的正确答案，正确率为 {share} %。",
    ),
    "task_mean_note": (
        "Mean score of {rows} answers, with 95 % intervals; differences are paired by question.",
        "{rows} 个回答的平均得分，附 95 % 区间；差值按题目配对。",
    ),
    "task_loss_note": (
        "Mean loss of {rows} rows in nats a token, less is better; differences are paired by row.",
        "{rows} 个样本上的平均损失（nats/token），越小越好；差值按样本配对。",
    ),
    "task_perplexity_note": (
        "Mean loss of {rows} texts in nats a word or byte, as lm-eval counts, less is better; differences are paired.",
        "{rows} 篇文本上的平均损失（nats/词或字节，按 lm-eval 的计数），越小越好；差值按文本配对。",
    ),
    "task_groups": (
        "Within a group, no system differs significantly from the best (Holm, 5 %).",
        "同组系统与组内最优者无显著差异（Holm 校正，5 %）。",
    ),
    "task_unjudged": ("{rows} could not be judged.", "另有 {rows} 条无法评判。"),
    "task_won": ("{winner} is right, the base is wrong", "{winner} 答对，基座模型答错"),
    "task_lost": ("the base is right, {winner} is wrong", "基座模型答对，{winner} 答错"),
    "group": ("Group", "组"),
    "system": ("System", "系统"),
    "metric_accuracy": ("Right", "正确率"),
    "metric_mean": ("Mean score", "平均得分"),
    "metric_loss": ("Loss", "损失"),
    "p_value": ("p", "p"),
    "by_length": ("By length", "按长度归一"),
    "ends": ("{low} to {high}", "{low} 至 {high}"),
    "right": ("right", "正确"),
    "wrong": ("wrong", "错误"),
    "not_judged": ("not judged", "未评判"),
    "answer_costs": ("What an answer costs", "一次回答的开销"),
    "answer_costs_note": (
        "One prompt of middle length, answered alone: until the first token, and the tokens after it. The cache holds "
        "keys and values of the prompt and of virtual tokens.",
        "单独回答一条中等长度的提示：到首个 token 的时间，以及其后的速度。缓存包括提示和虚拟 token 的键与值。",
    ),
    "prompt_tokens": ("Prompt tokens", "提示 token 数"),
    "first_token": ("First token", "首个 token"),
    "cache": ("Cache", "缓存"),
    "answers": ("Answers side by side", "回答对照"),
    "trials": ("All trials", "全部试验"),
    "limits": ("What this study cannot say", "本研究不能说明什么"),
    "protocol": ("How it was done", "实验方案"),
    "checks": ("Checks", "检查"),
    "checks_healthy": ("Nothing wrong was found; {n} checks were made.", "没有发现问题；共做了 {n} 项检查。"),
    "checks_wrong": ("{wrong} problems were found in {n} checks.", "{n} 项检查中发现 {wrong} 个问题。"),
    "checks_wrong_one": ("1 problem was found in {n} checks.", "{n} 项检查中发现 1 个问题。"),
    "checks_change": ("Change", "改法"),
    "environment": ("Environment and hashes", "环境与哈希"),
    "settings": ("Settings", "设置"),
    "curve": ("Held-out losses", "留出损失"),
    "lowest": ("the adapter of this step is kept", "保留这一步的适配器"),
    "merge": ("Merge it into the base", "并入基座模型"),
    "reports": ("Own report", "单独的报告"),
    "all_settings": ("All settings", "全部设置"),
    "training": ("Training", "训练过程"),
    "differences": ("Paired differences", "配对差值"),
    "state_running": ("It is still running: this is what it has found so far.", "研究仍在运行：以下是目前的结果。"),
    "state_unclear": (
        "It was begun on another machine; whether it still runs cannot be told from here.",
        "它在另一台机器上启动，从这里无法判断是否仍在运行。",
    ),
    "state_killed": ("Its process was killed: this is what it had found.", "其进程已被终止：以下是终止前的结果。"),
    "state_interrupted": ("It was interrupted: this is what it had found.", "它被中断：以下是中断前的结果。"),
    "state_failed": ("It failed: this is what it had found.", "它失败了：以下是失败前的结果。"),
    "state_diverged": ("The run diverged.", "训练发散。"),
    "state_finished": ("finished", "已完成"),
    "resume": ("Resume it", "继续运行"),
    "nothing_measured": ("Nothing was measured yet.", "尚无测量结果。"),
    "no_trials": ("No trial has ended yet.", "还没有试验结束。"),
    "no_charts": (
        "Charts need JavaScript; the numbers are in the table of trials.",
        "图表需要 JavaScript；数值见试验表。",
    ),
    "untouched": ("untouched base", "未训练的基座模型"),
    "winner": ("winner", "优胜者"),
    "place": ("group {n}", "第 {n} 组"),
    "alike": ("cannot be told apart from {methods}", "与 {methods} 无法区分"),
    "not_ranked_untuned": ("not ranked: fewer trials than the others", "未排名：试验数少于其他方法"),
    "not_ranked_failed": (
        "not ranked: {failed} of {seeds} seeds did not finish",
        "未排名：{seeds} 个随机种子中有 {failed} 个未完成",
    ),
    "not_ranked_search": (
        "not ranked: one seed, chosen among {n} settings",
        "未排名：只有 1 个随机种子，从 {n} 组设置中选出",
    ),
    "not_ranked_only": ("not ranked: one seed, the only setting", "未排名：只有 1 个随机种子和 1 组设置"),
    "not_ranked_none": ("no setting finished", "没有设置完成"),
    "test_loss": ("test loss", "测试集损失"),
    "dev_loss": ("dev loss", "开发集损失"),
    "held_out_loss": ("held-out loss", "留出损失"),
    "before": ("before training", "训练前"),
    "nats": ("nats a token", "nats/token"),
    "interval": ("95 % {low} to {high}", "95 % 区间 {low} 至 {high}"),
    "no_interval": ("no interval", "无区间"),
    "against_base": ("against the base ({base})", "相对基座模型（{base}）"),
    "verdict_better": ("better than the base", "优于基座模型"),
    "verdict_worse": ("worse than the base", "劣于基座模型"),
    "verdict_same": ("cannot be told from the base", "与基座模型无法区分"),
    "over_seeds": ("mean of {n} seeds", "{n} 个随机种子的均值"),
    "one_seed": ("one seed", "1 个随机种子"),
    "trainable": ("trainable parameters", "可训练参数"),
    "adapter_bytes": ("adapter size", "适配器大小"),
    "peak_bytes": ("peak memory", "峰值内存"),
    "tokens_per_second": ("Tokens a second", "每秒 token 数"),
    "data_tokens": ("tokens trained on", "训练 token 数"),
    "use": ("Use it", "使用"),
    "longer": ("Train it longer", "加长训练"),
    "copy": ("Copy", "复制"),
    "copied": ("Copied", "已复制"),
    "answers_note": (
        "Greedy answers of at most {tokens} tokens to {rows} held-out prompts: first where {winner} gains most on the "
        "base, then where it gains least or loses. Chosen by loss, so they are no sample.",
        "对 {rows} 条留出提示的贪心回答，最多 {tokens} 个 token：先列出 {winner} 相对基座模型改进最大的，"
        "再列出改进最小或变差的。它们按损失挑选，不是随机样本。",
    ),
    "prompt": ("Prompt", "提示"),
    "reference": ("Reference", "参考答案"),
    "loss": ("loss {loss}", "损失 {loss}"),
    "search": ("Search", "搜索"),
    "every_method": ("every method", "所有方法"),
    "every_status": ("every status", "所有状态"),
    "method": ("Method", "方法"),
    "status": ("Status", "状态"),
    "shown": ("{shown} of {all} trials", "{shown} / {all} 个试验"),
    "thinned": (
        "{shown} of {all} trials: the finals, failures and the best of each method. All of them are in "
        "results.parquet and results.csv.",
        "{all} 个试验中的 {shown} 个：最终重训、失败的试验和每种方法中最好的。全部见 results.parquet 和 results.csv。",
    ),
    "trial": ("Trial", "试验"),
    "kind": ("Kind", "类型"),
    "rate": ("Learning rate", "学习率"),
    "others": ("Other settings", "其他设置"),
    "dev": ("Dev loss", "开发集损失"),
    "minus_base": ("Against base", "相对基座模型"),
    "test": ("Test loss", "测试集损失"),
    "steps": ("Steps", "步数"),
    "tokens": ("Tokens", "token"),
    "seconds": ("Seconds", "秒"),
    "reason": ("Reason", "原因"),
    "kind_reference": ("base", "基座模型"),
    "kind_range_test": ("range test", "范围测试"),
    "kind_search": ("search", "搜索"),
    "kind_final": ("final", "最终重训"),
    "status_running": ("running", "运行中"),
    "status_finished": ("finished", "完成"),
    "status_pruned": ("pruned", "提前停止"),
    "status_diverged": ("diverged", "发散"),
    "status_failed": ("failed", "失败"),
    "status_interrupted": ("interrupted", "中断"),
    "losses_note": (
        "Losses in nats a supervised token; intervals are 95 %, with two digits of their half-width.",
        "损失单位为nats/监督 token；区间为 95 %，保留其半宽的两位有效数字。",
    ),
    "step": ("Step", "步"),
    "written": ("Written by peft-study {version}", "由 peft-study {version} 生成"),
    "took": ("took {time}", "用时 {time}"),
    "lower": ("Lower loss", "损失更低"),
    "not_comparable": (
        "{first} and {second}: no paired differences, as {why}.",
        "{first} 与 {second}：没有配对差值，因为{why}。",
    ),
    "why_rows": (
        "their records do not name the same held-out rows (other data, another split, another version of the program)",
        "两者的记录所列的留出样本不同（数据、划分或程序版本不同）",
    ),
    "why_unknown": ("the record of one of them does not name its held-out rows", "其中一个没有记录留出样本"),
    "why_finals": ("they have no method that was retrained in both", "没有在两者中都重新训练的方法"),
    "paired_note": (
        "{first} minus {second}, on the same {rows} {part} rows: below zero, {first} has the lower loss.",
        "{first} 减 {second}，使用相同的 {rows} 条{part}样本：小于零表示 {first} 的损失更低。",
    ),
    "part_test": ("test", "测试集"),
    "part_dev": ("dev", "开发集"),
    "told": ("told apart", "可以区分"),
    "not_told": ("cannot be told apart", "无法区分"),
    "p_model": (
        "One frozen base, {model}{dtype}: every trial trains its own adapter beside it.",
        "同一个冻结的基座模型 {model}{dtype}：每个试验在其旁训练自己的适配器。",
    ),
    "p_data": (
        "Data: {sources}. {train} rows to train on; {dev} dev rows and {test} test rows were held out of training.",
        "数据：{sources}。训练 {train} 条；留出开发集 {dev} 条、测试集 {test} 条，均不参与训练。",
    ),
    "p_loss": (
        "Loss: cross-entropy in nats a supervised token, of every trial on the same held-out rows.",
        "损失：每个监督 token 的交叉熵（nats），所有试验都在相同的留出样本上测量。",
    ),
    "p_space": ("{method} searched {space}.", "{method} 搜索 {space}。"),
    "p_fixed": ("{method} has nothing to search.", "{method} 没有要搜索的设置。"),
    "p_budget": (
        "Budget: {trials} settings a method, {steps} of {batch} rows each, the same order of the data for all.",
        "预算：每种方法 {trials} 组设置，每组 {steps}、每步 {batch} 条样本，数据顺序相同。",
    ),
    "p_steps": ("{n} steps", "{n} 步"),
    "p_tokens": ("{n} data tokens in steps", "共 {n} 个数据 token"),
    "p_epochs": ("{n} passes over the data in steps", "遍历数据 {n} 次"),
    "p_search": (
        "Search: sampler {sampler}, pruner {pruner}; {audit} of the trials that the pruner would stop run on as a "
        "control.",
        "搜索：采样器 {sampler}，剪枝器 {pruner}；按规则应停止的试验中有 {audit} 作为对照继续运行。",
    ),
    "p_finals": (
        "Finals: the best {best} of each method trained again with {seeds} new seeds (initialisation, dropout, order "
        "of the data).",
        "最终重训：每种方法最好的 {best} 组设置用 {seeds} 个新的随机种子（初始化、dropout、数据顺序）重新训练。",
    ),
    "p_no_finals": (
        "No finals: nothing was trained again with new seeds.",
        "没有最终重训：没有用新的随机种子重新训练。",
    ),
    "p_choice": (
        "The winner has the lowest mean dev loss of its seeds; the test rows were opened once, after that choice.",
        "优胜者是各随机种子平均开发集损失最低的设置；选定之后才打开测试集，且只打开一次。",
    ),
    "p_choice_task": (
        "The winner has the best mean score of its seeds on {task}; the test rows were opened once, after that choice.",
        "优胜者是各随机种子在任务 {task} 上平均得分最高的设置；选定之后才打开测试集，且只打开一次。",
    ),
    "p_intervals": (
        "Intervals: 95 %, studentised bootstrap over held-out rows, paired for differences; Student's t over seeds.",
        "区间：95 %，对留出样本做学生化自助法，差值按样本配对；随机种子之间用 t 分布。",
    ),
    "p_groups": (
        "Groups: settings are told apart where their difference is significant after Holm's correction over all pairs.",
        "分组：差值经 Holm 校正（所有两两比较）后仍显著，才视为可以区分。",
    ),
    "p_training": (
        "Training: {schedule} schedule, weight decay and warm-up of each method, gradients clipped at {clip}.",
        "训练：学习率计划 {schedule}，权重衰减与预热按各方法设定，梯度裁剪 {clip}。",
    ),
}


class Words:
    """The words of a language: called with a key and the values for its braces, it gives the text.

    Args:
        lang: one of `LANGUAGES`.

    Raises:
        ConfigError: when it is another.
    """

    def __init__(self, lang: str) -> None:
        if lang not in LANGUAGES:
            remedy = f"give one of {', '.join(LANGUAGES)}"
            raise ConfigError(f"unknown language {lang!r}", where="lang", remedy=remedy)
        self.lang, self._place = lang, LANGUAGES.index(lang)

    def __call__(self, key: str, **values: object) -> str:
        """Returns the text of a key."""
        text = _TEXTS[key][self._place]
        return text.format(**values) if values else text
