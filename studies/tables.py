"""The tables of docs/findings.md and its Chinese, written from studies/summary.json into the pages themselves.

A page has each table between two lines: `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiment import HERE, POINTS, SAMPLES, SETS, STEPS

PAGES = {"en": HERE.parent / "docs" / "findings.md", "zh": HERE.parent / "docs" / "findings.zh-CN.md"}
Rows = Iterator[tuple[str, ...]]
Summary = dict[str, Any]
ZH = {
    "prompt tuning": "提示微调",
    "prefix tuning": "前缀微调",
    "words": "文字回答",
    "choices": "选择题",
    "method": "方法",
    "data": "数据",
    "trials": "试验数",
    "learned": "学到了",
    "worse than the base": "比基座还差",
    "best seen": "见过的最好值",
    "surface off by": "曲面误差",
    "covered": "区间覆盖率",
    "best rate, 20 steps": "最佳学习率（20 步）",
    "best rate, 120 steps": "最佳学习率（120 步）",
    "loss within 5 % of that": "损失与之相差 5 % 以内",
    "no better than the base from": "从该学习率起不如基座",
    "setting": "设置",
    "best rate there": "此处的最佳学习率",
    "loss there, against the base": "此处的损失（减去基座）",
    "init": "初始化",
    "warm-up": "预热比例",
    "weight decay": "权重衰减",
    "warm-up 0 -> 0.2": "预热比例 0 -> 0.2",
    "weight decay 0 -> 0.1": "权重衰减 0 -> 0.1",
    "batch 4 -> 8": "批大小 4 -> 8",
    "steps 20 -> 120": "步数 20 -> 120",
    "batch": "批大小",
    "steps": "步数",
    "tokens or rank": "虚拟词元数或秩",
    "learning rate": "学习率",
    "alone": "单独",
    "with others": "连同交互",
    "rate at the reference": "参考设置处的学习率",
    "moves with tokens or rank": "随虚拟词元数或秩变化",
    "moves with steps": "随步数变化",
    "off by (decades)": "误差（数量级）",
    "gain": "损失减基座",
    "test accuracy of the recorded runs": "他人记录的测试准确率",
    "best rate, 300 rows": "最佳学习率（300 行）",
    "best rate, 3,000 rows": "最佳学习率（3,000 行）",
    "loss given away": "因此多出的损失",
    "run": "运行",
    "highest held-out loss": "留出损失的最高值",
    "at the end": "结束时",
    "default rate, tokens or rank": "默认学习率、虚拟词元数或秩",
    "setting of the search": "搜索得到的设置",
    "test loss, defaults": "测试损失（默认值）",
    "test loss, search": "测试损失（搜索）",
    "difference": "差",
    "time a token (LoRA: 1)": "每个词元的时间（LoRA = 1）",
    "equal tokens": "相同词元数",
    "equal seconds": "相同时间",
}
NAMES = {
    "prompt_tuning": "prompt tuning", "prefix_tuning": "prefix tuning", "lora": "LoRA", "size": "tokens or rank",
    "warmup_ratio": "warm-up", "weight_decay": "weight decay", "batch_size": "batch", "learning_rate": "learning rate",
    "transfer": "Code Alpaca", "transfer-codegen": "GPTeacher codegen",
}  # fmt: skip


def write(summary: Summary) -> None:
    """Writes the tables into the pages that are there."""
    for language, page in PAGES.items():
        text = page.read_text()
        for name, table in tables(summary).items():
            rows = [tuple(translated(cell) if language == "zh" else cell for cell in row) for row in table]
            text = replaced(text, name, markdown(rows))
        page.write_text(text)


def tables(summary: Summary) -> dict[str, list[tuple[str, ...]]]:
    """Returns each table: its head, then its rows."""
    found = {
        "coverage": coverage(summary),
        "rates": rates(summary),
        "sizes": effects(summary, "size"),
        "inits": effects(summary, "init"),
        "changes": changes(summary),
        "shares": shares(summary),
        "rule": rule(summary),
        "ranking": ranking(summary),
        "sample": sample(summary),
        "rising": rising(summary),
        "transfer": transfer(summary),
    }
    return {name: list(rows) for name, rows in found.items()}


def translated(cell: str) -> str:
    """Returns a cell in Chinese, where it has words."""
    for words, chinese in (("all weights at ", "全部权重，学习率 "), ("an attached prompt at ", "挂上的提示，学习率 ")):
        cell = cell.replace(words, chinese)
    data, _, method = cell.partition(", ")
    if data in ZH and method in NAMES.values():
        return f"{ZH[data]}，{ZH.get(method, method)}"
    return ZH.get(cell, cell).replace(" to ", " 到 ")


def markdown(rows: list[tuple[str, ...]]) -> str:
    """Returns a table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def replaced(text: str, name: str, table: str) -> str:
    """Returns a page with one of its tables written anew."""
    pattern = rf"<!-- {name} -->\n.*?\n<!-- /{name} -->"
    return re.sub(pattern, lambda _: f"<!-- {name} -->\n\n{table}\n\n<!-- /{name} -->", text, flags=re.DOTALL)


def each(summary: Summary) -> Iterator[tuple[str, str, Any]]:
    """Yields data set, method and key figures of the designed experiment."""
    for data in SETS:
        for method in POINTS:
            if method in summary["designed"].get(data, {}):
                yield data, method, summary["designed"][data][method]


def coverage(summary: Summary) -> Rows:
    """Yields how many trials there are, and how many learned."""
    yield "data", "method", "trials", "learned", "worse than the base", "best seen", "surface off by", "covered"
    for data, method, found in each(summary):
        counts = (str(found[name]) for name in ("trials", "learned", "worse_than_base"))
        yield (
            data,
            NAMES[method],
            *counts,
            f"{found['best_seen']:.2f}",
            f"{found['left_out']:.2f}",
            f"{found['covered']:.0%}",
        )


def rates(summary: Summary) -> Rows:
    """Yields best rates with their intervals, and where they still serve."""
    yield (
        "data", "method", "best rate, 20 steps", "best rate, 120 steps", "loss within 5 % of that",
        "no better than the base from",
    )  # fmt: skip
    for data, method, found in each(summary):
        best = {e["level"]: e["rate"] for e in found["effects"] if e["setting"] == "steps"}
        window = found["window"]
        yield (
            data, NAMES[method], _range(best[STEPS[0]]), _range(best[STEPS[-1]]),
            f"{window['from']:.2g} - {window['to']:.2g}", f"{window['breaks']:.2g}" if window["breaks"] else "-",
        )  # fmt: skip


def effects(summary: Summary, setting: str) -> Rows:
    """Yields the levels of a setting."""
    yield "data", "method", NAMES.get(setting, setting), "best rate there", "loss there, against the base"
    for data, method, found in each(summary):
        for effect in found["effects"]:
            if effect["setting"] == setting:
                level = effect["level"] if isinstance(effect["level"], str) else f"{effect['level']:g}"
                yield data, NAMES[method], level, _range(effect["rate"]), _loss(effect["gain"])


def changes(summary: Summary) -> Rows:
    """Yields what the loss at the best rate becomes from the least level of a setting to its most."""
    ends = {"warmup_ratio": (0, 0.2), "weight_decay": (0, 0.1), "batch_size": (4, 8), "steps": (20, 120)}
    yield "data", "method", *(f"{NAMES.get(name, name)} {low} -> {high}" for name, (low, high) in ends.items())
    for data, method, found in each(summary):
        last = {effect["setting"]: effect["minus_first"] for effect in found["effects"]}  # the most comes last
        yield data, NAMES[method], *(_difference(last[name]) for name in ends)


def shares(summary: Summary) -> Rows:
    """Yields the shares of variance of each setting."""
    yield "setting", *(f"{data}, {NAMES[method]}" for data, method, _ in each(summary))
    names = ("learning_rate", "size", "init", "steps", "batch_size", "warmup_ratio", "weight_decay")
    for name in names:
        cells = [found["shares"].get(name) for _, _, found in each(summary)]
        yield NAMES.get(name, name), *(f"{c['alone']:z.0%} ({c['with_others']:z.0%})" if c else "" for c in cells)


def rule(summary: Summary) -> Rows:
    """Yields the prior of the search."""
    yield "method", "rate at the reference", "moves with tokens or rank", "moves with steps", "init", "off by (decades)"
    for method, found in summary["prior"].items():
        inits = ", ".join(f"{name} x {10**decades:.2g}" for name, decades in found["inits"].items())
        powers = f"^ {found['size_exponent']:.2f}", f"^ {found['steps_exponent']:.2f}"
        yield NAMES[method], f"{found['rate']:.2g}", *powers, inits, f"{found['decades']:.2f}"


def ranking(summary: Summary) -> Rows:
    """Yields the methods at tuned settings, at equal tokens and at equal seconds."""
    last = str(STEPS[-1])
    yield (
        "data",
        "method",
        "time a token (LoRA: 1)",
        "equal tokens",
        "equal seconds",
        "test accuracy of the recorded runs",
    )
    for data, methods in summary["ranking"].items():
        for method in sorted(methods, key=lambda name: methods[name]["equal_tokens"][last]["gain"][1]):
            found, accuracies = methods[method], summary["recorded"]["accuracies"][method]
            gains = (_loss(found[name][last]["gain"]) for name in ("equal_tokens", "equal_seconds"))
            recorded = f"{accuracies[0]:.2f} - {accuracies[-1]:.2f}"
            yield data, NAMES[method], f"{found['slower_than_lora']:.2f} x", *gains, recorded


def sample(summary: Summary) -> Rows:
    """Yields the best rates on the small and on the large sample."""
    few, many = map(str, SAMPLES)
    yield "method", "best rate, 300 rows", "best rate, 3,000 rows", "loss given away"
    for method, found in summary["sample"].items():
        best = (", ".join(f"{rate:g}" for rate in found["best"][rows].values()) for rows in (few, many))
        yield NAMES[method], *best, f"{found['regret_mean']:.3f} ({found['regret_most']:.3f})"


def run_name(run: str) -> str:
    """Returns what a run of `rising` trains, and at which rate."""
    kind, rate = run.split("-", 1)
    return f"{'all weights' if kind == 'full' else 'an attached prompt'} at {float(rate):g}"


def rising(summary: Summary) -> Rows:
    """Yields the highest and the last held-out loss of each run of `rising`."""
    yield "run", "highest held-out loss", "at the end"
    for name, found in summary["rising"].items():
        yield run_name(name), *(f"{min(found[key]):+.2f} to {max(found[key]):+.2f}" for key in ("highest", "end"))


def transfer(summary: Summary) -> Rows:
    """Yields the defaults beside a search, on data sets that no default comes from."""
    losses = "test loss, defaults", "test loss, search", "difference"
    yield "data", "method", "default rate, tokens or rank", "setting of the search", *losses
    for found in summary["transfer"]:
        changed = (f"`{name}` {value}" for name, value in found["changed"].items())
        value, low, high = (found["difference"][name] for name in ("value", "low", "high"))
        yield (
            *(NAMES[found[name]] for name in ("data", "method")),
            f"{found['defaults_rate']:.2g}, {found['defaults_size']}",
            ", ".join((f"{found['searched_rate']:.2g}", *changed)),
            *(f"{found[name]:.3f}" for name in ("defaults", "searched")),
            f"{value:+.3f} ({low:+.3f} to {high:+.3f}), {value / found['searched']:+.1%}",
        )


def _range(interval: list[float]) -> str:
    low, middle, high = interval
    return f"**{middle:.2g}** ({low:.2g} - {high:.2g})"


def _loss(interval: list[float]) -> str:
    low, middle, high = interval
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _difference(interval: list[float]) -> str:
    low, middle, high = interval
    return f"{middle:+.3f} ({low:+.3f} to {high:+.3f})"


def page_tables(page: Path) -> dict[str, str]:
    """Returns the tables that stand in a page, by name."""
    return dict(re.findall(r"<!-- ([\w-]+) -->\n\n(.*?)\n\n<!-- /\1 -->", page.read_text(), flags=re.DOTALL))
