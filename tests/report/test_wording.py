"""Both languages say the same: one set of templates, the same numbers, no English left in the Chinese."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

from hand_made import RATE, HandMade
from peft_study.config import METHODS
from peft_study.report.evidence import Finding
from peft_study.report.findings import TOPICS
from peft_study.report.wording import LANGUAGES, LONGEST, TEMPLATES, interval, say
from peft_study.statistics import Estimate
from rich_study import COSTS, rich

UNITS = {"nats", "token", "log", "Holm", "dev", "MiB", "KiB", "GiB", "LoRA", "search", "stop", "true", "false"}
"""Latin words that Chinese engineers write as they are."""


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finding, ...]:
    return rich(tmp_path_factory.mktemp("rich") / "study").findings(**COSTS)


def placeholders(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


@pytest.mark.parametrize("key", sorted(TEMPLATES))
def test_the_languages_have_the_same_placeholders(key: str) -> None:
    template = TEMPLATES[key]
    assert placeholders(template.en) == placeholders(template.zh)
    assert placeholders(template.one) <= placeholders(template.en)
    assert bool(template.en) == bool(template.zh)


def test_every_template_is_used() -> None:
    source = Path(__file__).parents[2] / "src/peft_study/report"
    text = "".join(path.read_text() for path in source.glob("*.py") if path.name != "wording.py")
    text += (source / "wording.py").read_text().split("def say(")[1]
    made = {"edge_high", "edge_low", *(f"method_{name}" for name in METHODS)}
    made |= {key for key in TEMPLATES if key.startswith("cost_")} | {"adapter_bytes", "peak_bytes"}
    assert [key for key in TEMPLATES if f'"{key}"' not in text and key not in made] == []


def test_the_study_says_something_on_every_topic(findings: tuple[Finding, ...]) -> None:
    # a ranking takes two methods with as many trials: tests/report/test_findings.py
    assert {finding.topic for finding in findings} == set(TOPICS) - {"ranking"}
    assert all(tuple(finding.text) == LANGUAGES for finding in findings)


def test_no_english_is_left_in_the_chinese(findings: tuple[Finding, ...], tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": RATE, "prompt_tuning": RATE}, finals={"best": 1, "seeds": 3})
    for method, gain in (("lora", 0.9), ("prompt_tuning", 0.5)):
        study.trial(method, 1e-2, gain)
    study.chosen(lora=[0], prompt_tuning=[0])
    study.finals("lora", 0, [0.90, 0.91, 0.89])
    study.finals("prompt_tuning", 0, [0.50, 0.51, 0.49])
    study.concluded("lora")
    study.events += [{"event": "deadline"}, {"event": "stopped", "reason": "lunch"}]
    lost = HandMade(tmp_path / "t", {"lora": RATE})
    lost.trial("lora", 1.0, None)
    for finding in (*findings, *study.findings(), *lost.findings()):
        text = re.sub("“.*?”", "", finding.text["zh"])  # what programs and users wrote is quoted
        words = set(re.findall(r"[A-Za-z_][A-Za-z_.\d-]*", text)) - UNITS
        values = str(finding.values)
        names = {"m", "d.jsonl", "learning_rate", *(name for c in METHODS.values() for name in c.model_fields)}
        assert not {word for word in words if word not in names and word.strip(".") not in values}, text
        assert re.search("[\u4e00-\u9fff]", text)


def test_both_languages_have_the_same_numbers(findings: tuple[Finding, ...]) -> None:
    for finding in findings:
        found = [re.findall(r"\d[\d,.]*\d|\d", finding.text[language]) for language in LANGUAGES]
        english, chinese = (sorted(number for number in own if number != "1") for own in found)  # 1 is often a word
        assert english == chinese, finding.text


def test_chinese_has_spaces_only_between_characters_and_latin(findings: tuple[Finding, ...]) -> None:
    for finding in findings:
        assert not re.search("[\u4e00-\u9fff][A-Za-z0-9]|[A-Za-z0-9][\u4e00-\u9fff]", finding.text["zh"])
        assert not re.search("[\u4e00-\u9fff，。；：、（] +[\u4e00-\u9fff，。；：、）]", finding.text["zh"])


def test_one_and_several() -> None:
    assert [say("trials", n=n)["en"] for n in (0, 1, 2)] == ["0 trials", "1 trial", "2 trials"]
    assert say("trials", n=1)["zh"] == "1 次试验"


def test_an_interval_in_words() -> None:
    assert interval(Estimate(1.0, 0.5, 2.0)) == {"en": "95 % 0.500 to 2.000", "zh": "95 % 区间 0.500 至 2.000"}
    alone = interval(Estimate(1.0, -float("inf"), float("inf")))
    assert alone == {"en": "no interval: a single example", "zh": "只有一条样本，没有区间"}


def test_a_long_text_of_several_lines_is_one_short_line() -> None:
    said = say("stopped", reason="two\n  lines " + 10_000 * "x")
    for language in LANGUAGES:
        assert "two lines xxx" in said[language]
        assert "\n" not in said[language]
        assert len(said[language]) < LONGEST + 80
