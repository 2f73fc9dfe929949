"""Costs and answers on the page, where a study has measured them."""

from __future__ import annotations

import re
from pathlib import Path

from hand_made import RATE, HandMade
from peft_study.report.answers import AnsweredRow, Answers, write_answers
from peft_study.report.costs import MethodCost, write_costs
from peft_study.report.pages import page_of
from peft_study.report.view import view_of

EVIL = "<script>alert(1)</script>"


def study(folder: Path) -> HandMade:
    made = HandMade(folder, {"lora": RATE, "prompt_tuning": RATE}, finals={"best": 1, "seeds": 1})
    for method in ("lora", "prompt_tuning"):
        made.trial(method, 1e-3, 0.5 if method == "lora" else 0.2)
    made.chosen(lora=[0], prompt_tuning=[0])
    made.finals("lora", 0, [0.5])
    made.finals("prompt_tuning", 0, [0.2])
    made.concluded("lora")
    made.written()
    return made


def test_what_was_measured_is_in_the_cards_and_the_charts(tmp_path: Path) -> None:
    made = study(tmp_path / "s")
    write_costs(
        made.folder.path,
        {
            "lora": MethodCost("lora-000", 4_884_480, 19_500_000, 812_000_000, 412.345, 1024, 1000),
            "prompt_tuning": MethodCost("prompt_tuning-000", 4608, None, None, 1234.5, 1024, 1000),
        },
    )
    text = page_of([view_of(made.folder.path)])
    cards = re.findall(r'<article class="card.*?</article>', text, re.S)
    facts = [dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", card)) for card in cards]
    assert facts[0]["trainable parameters"] == "4,884,480"
    assert facts[0]["adapter size"] == "18.6 MiB"
    assert facts[0]["peak memory"] == "774 MiB"
    assert facts[0]["Tokens a second"] == "412"
    assert facts[1]["Tokens a second"] == "1,230"
    assert "adapter size" not in facts[1]
    assert {"pareto-trainable", "pareto-tokens_per_second"} <= set(re.findall(r'data-chart="([^"]+)"', text))


def test_answers_stand_side_by_side_escaped_and_shortened(tmp_path: Path) -> None:
    made = study(tmp_path / "s")
    prompt = ({"role": "system", "content": "Be short."}, {"role": "user", "content": f"Say {EVIL}"})
    row = AnsweredRow(
        7,
        None,
        "sums",
        prompt,
        f"It is {EVIL}.",
        {"none": 2.5, "lora-000": 0.25, "prompt_tuning-000": 1.0},
        {"none": "I cannot.", "lora-000": "x" * 10_000},
    )
    write_answers(made.folder.path, Answers(64, ("none", "lora-000", "prompt_tuning-000"), (row,)))
    text = page_of([view_of(made.folder.path)])
    section = text.split('<section id="answers">')[1].split("</section>")[0]
    assert "at most 64 tokens to 1 held-out prompts" in section
    assert "first where lora-000 gains most" in section
    assert "<h3>sums, #7</h3>" in section
    assert section.count("&lt;script&gt;") == 2
    assert "<script" not in section
    who = re.findall(r'<span class="who">(?:<span class="swatch"></span>)?(.*?)</span>', section)
    assert who == [
        "Prompt (system)",
        "Prompt (user)",
        "Reference",
        "untouched base, loss 2.50",
        "lora-000, loss 0.25",
        "prompt_tuning-000, loss 1.00",
    ]
    assert len(section) < 8000
    order = re.findall(r'<section id="(\w+)">', text)
    assert order.index("pareto") < order.index("answers") < order.index("trials")
