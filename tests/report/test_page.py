"""The report's page: what it shows of studies whose losses are known, that it escapes everything, and its colours."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import peft_study
from hand_made import RATE, HandMade
from peft_study.errors import ConfigError
from peft_study.report import page, page_words
from peft_study.report.page_sections import MOST_ROWS, chosen
from peft_study.report.page_values import minus, places, shown
from peft_study.report.page_words import Words
from peft_study.report.pages import page_of
from peft_study.report.results import Row
from peft_study.report.view import view_of
from peft_study.statistics import Estimate

METHODS = {"lora": RATE, "prefix_tuning": RATE, "prompt_tuning": RATE}
EVIL = "<script>alert(1)</script>"


class Outline(HTMLParser):
    """A page as its parser sees it: its elements with their attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br", "line", "path"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def study(folder: Path) -> HandMade:
    """Returns a finished study in which lora gains 1 nat a token, the others 0.6."""
    made = HandMade(folder, METHODS, finals={"best": 1, "seeds": 2})
    for method, gain in (("lora", 1.0), ("prefix_tuning", 0.6), ("prompt_tuning", 0.6)):
        made.trial(method, 1e-3, gain)
        made.trial(method, 1e-1, None)
    made.chosen(lora=[0], prefix_tuning=[0], prompt_tuning=[0])
    names = []
    for method, gain in (("lora", 1.0), ("prefix_tuning", 0.6), ("prompt_tuning", 0.6)):
        names += made.finals(method, 0, [gain, gain + 0.01])
    made.concluded("lora")
    made.opened(**{name: 1.0 if name.startswith("lora") else 0.6 for name in names})
    return made


def text_of(folder: Path, lang: str = "en") -> str:
    return page_of([view_of(folder)], lang)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_of(study(tmp_path_factory.mktemp("page") / "study").written())


def test_the_winner_comes_first_with_its_loss_and_its_setting(finished: str) -> None:
    cards = re.findall(r'<article class="card.*?</article>', finished, re.S)
    assert [re.search(r"<h3>(.*?)</h3>", card).group(1) for card in cards] == [  # type: ignore[union-attr]
        "lora",
        "prefix tuning",
        "prompt tuning",
    ]
    assert ["winner" in card for card in cards] == [True, False, False]
    assert ">1.0" in cards[0], "2 nats of the base less 1"
    assert "−1.00" in cards[0]
    assert "<dd>0.001</dd>" in cards[0]
    assert "group 1" in cards[0]
    assert "cannot be told apart from prompt tuning" in cards[1]


def test_sections_come_in_the_order_that_answers_first(finished: str) -> None:
    found = re.findall(r'<section id="(\w+)">', finished)
    assert found == ["answer", "findings", "rates", "pareto", "trials", "limits", "protocol"]
    outline = Outline(finished)
    links = [a["href"] for a in outline.named("a") if "skip" not in (a.get("class") or "")]
    assert links == [f"#{key}" for key in found]


def test_headings_go_down_one_level_at_a_time(finished: str) -> None:
    levels = [int(tag[1]) for tag, _ in Outline(finished).elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_the_table_has_every_trial_and_its_failures(finished: str) -> None:
    body = finished.split("<tbody>", 1)[1].split("</tbody>", 1)[0]
    rows = re.findall(r'<tr data-method="(\w+)" data-status="(\w+)">', body)
    assert len(rows) == 13
    assert rows.count(("lora", "diverged")) == 1
    assert "the loss became nan at step 3" in body


def test_charts_say_in_words_what_they_show_and_are_in_the_data(finished: str) -> None:
    outline = Outline(finished)
    places_ = [d for d in outline.named("div") if "data-chart" in d]
    data = json.loads(re.search(r'id="data">(.*?)</script>', finished, re.S).group(1))  # type: ignore[union-attr]
    assert places_
    assert {d["data-chart"] for d in places_} == set(data["charts"])
    assert all(len(d["aria-label"] or "") > 10 for d in places_)
    assert set(data["themes"]) == {"light", "dark"}


def test_the_page_names_nothing_outside_itself_and_allows_just_its_own_scripts(finished: str) -> None:
    outline = Outline(finished)
    assert not [e for e in outline.elements if e[0] in ("link", "img", "iframe", "object", "embed", "base", "form")]
    assert not [a for _, a in outline.elements if "src" in a or "style" in a or any(n.startswith("on") for n in a)]
    assert all((a["href"] or "").startswith("#") for a in outline.named("a"))
    policy = next(m["content"] for m in outline.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", finished, re.S)
    (style,) = re.findall(r"<style>(.*?)</style>", finished, re.S)
    for text in (*scripts, style):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert len(scripts) == 2


def test_a_page_of_a_hundred_trials_is_below_two_megabytes(tmp_path: Path) -> None:
    made = HandMade(tmp_path / "study", METHODS)
    for number in range(33):
        for method in METHODS:
            made.trial(method, 10 ** (-5 + number / 10), 0.5 + number / 100)
    assert len(text_of(made.written()).encode()) < 2e6


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_what_users_and_models_wrote_is_escaped(tmp_path: Path, lang: str) -> None:
    made = HandMade(
        tmp_path / "a<script>b",
        {"lora": RATE},
        model={"name": f"m{EVIL}"},
        data={"train": f"{EVIL}.jsonl"},
        finals={"best": 1, "seeds": 1},
    )
    made.trial("lora", 1e-3, 0.5)
    made.trial("lora", 1e-2, 0.1, status="failed", reason=f"{EVIL} & <b>")
    folder = made.written()
    (folder / "record.json").write_text(json.dumps({"date": EVIL, "data": {EVIL: f"</td>{EVIL}"}}))
    text = text_of(folder, lang)
    outline = Outline(text)
    assert len(outline.named("script")) == 3
    assert not outline.named("b")
    assert text.count(EVIL) == 0
    assert "a&lt;script&gt;b" in text
    assert f"{EVIL} & <b>" in "".join(outline.texts["table"])


def test_data_for_charts_cannot_end_its_element(tmp_path: Path) -> None:
    made = HandMade(tmp_path / "study", {"lora": RATE})
    made.trial("lora", 1e-3, 0.5)
    made.trial("lora", 1e-2, 0.5)
    for event in made.events:  # a name that no study file has, as if the journal were damaged
        if event.get("name") == "lora-001":
            event["name"] = "</script><script>alert(1)</script>"
    text = text_of(made.written())
    assert "alert(1)</script>" not in text
    assert len(re.findall("<script", text)) == 3
    data = re.search(r'id="data">(.*?)</script>', text, re.S)
    assert data is not None
    assert "alert(1)" in data.group(1)


def test_the_library_cannot_end_its_element_early() -> None:
    text = page._library()
    assert "vegaEmbed" in text
    assert not re.search(r"</script|<!--|\r", text, re.I)


# -- numbers


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (Estimate(0.9263, 0.7063, 1.1904), "0.93 [0.71, 1.19]"),
        (Estimate(-0.00291, -0.00854, 0.00321), "−0.0029 [−0.0085, 0.0032]"),
        (Estimate(12.34, 10.1, 14.9), "12.3 [10.1, 14.9]"),
        (Estimate(123.4, 80.0, 160.0), "123 [80, 160]"),
        (Estimate(0.5, float("-inf"), float("inf")), "0.50"),
        (Estimate(float("nan"), float("-inf"), float("inf")), "nan"),
    ],
)
def test_numbers_have_the_digits_that_their_interval_allows(estimate: Estimate, expected: str) -> None:
    found = shown(estimate, Words("en"))
    assert found is not None
    assert f"{found.value} {found.ends}".strip() == expected


def test_a_difference_has_its_sign_and_zero_has_none() -> None:
    found = shown(Estimate(0.2, -0.1, 0.5), Words("en"), sign=True)
    assert found is not None
    assert (found.value, found.ends) == ("+0.20", "[−0.10, +0.50]")
    assert [minus(text) for text in ("-0.00", "+0.00", "-0.01")] == ["0.00", "0.00", "−0.01"]
    assert places(Estimate(1, 1, 1)) == 2


# -- words


def test_every_word_is_in_both_languages_with_the_same_values() -> None:
    for key, texts in page_words._TEXTS.items():
        names = [sorted(set(re.findall(r"\{(\w+)\}", text))) for text in texts]
        assert names[0] == names[1], key
        assert all(texts), key
    with pytest.raises(ConfigError, match="en, zh"):
        Words("fr")


def test_every_word_is_used_and_no_other() -> None:
    folder = Path(page.__file__).parent
    source = "".join(
        path.read_text(encoding="utf-8") for path in folder.iterdir() if path.name.endswith((".py", ".jinja"))
    )
    source = source.replace((folder / "page_words.py").read_text(encoding="utf-8"), "")
    made = ("kind_", "status_", "state_", "part_", "metric_", "task_")
    unused = [k for k in page_words._TEXTS if f'"{k}"' not in source and f"'{k}'" not in source]
    assert [key for key in unused if not key.startswith(made)] == []
    for path in folder.glob("*.jinja"):
        for key in re.findall(r"\bt\([\"'](\w+)[\"']", path.read_text(encoding="utf-8")):
            assert key in page_words._TEXTS or key in made, key


def test_a_chinese_page_is_chinese(tmp_path: Path) -> None:
    text = text_of(study(tmp_path / "study").written(), "zh")
    headings = re.findall(r"<h2>(.*?)</h2>", text.split('<script type="application/json"')[0])
    assert all(re.search(r"[\u4e00-\u9fff]", heading) for heading in headings)
    assert '<html lang="zh-CN">' in text


# -- colours


def contrast(one: str, other: str) -> float:
    """Returns the contrast of two colours by WCAG 2.2, 1 to 21."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_has_the_contrast_of_wcag_aa_in_light_dark_and_print() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    blocks = re.findall(r":root \{(.*?)\}", page._file("page.css"), re.S)
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in blocks]
    assert len(schemes) == 3
    for scheme in schemes:
        for ink in ("text", "quiet", "link", "good", "bad"):
            for ground in ("page", "card"):
                assert contrast(scheme[ink], scheme[ground]) >= 4.5, (ink, ground, scheme)
        assert contrast(scheme["text"], scheme["mark"]) >= 4.5
        assert contrast(scheme["text"], scheme["button"]) >= 4.5
        assert contrast(scheme["quiet"], scheme["button"]) >= 3, "the edge of a field"


# -- ten thousand trials


def test_the_table_of_many_trials_keeps_finals_failures_and_the_best(tmp_path: Path) -> None:
    made = HandMade(tmp_path / "study", {"lora": RATE, "prompt_tuning": RATE}, finals={"best": 1, "seeds": 2})
    for number in range(1500):
        made.trial("lora", 1e-3, 0.0001 * number, noise=0)
    for number in range(300):
        made.trial("prompt_tuning", 1e-3, None if number % 2 else 0.0001 * number, noise=0)
    made.chosen(lora=[1499])
    made.finals("lora", 1499, [0.15, 0.15])
    every = [Row(trial, {}, None, None, None, None, None, None) for trial in made.state.trials.values()]
    rows = chosen(every)
    names = [row.trial.name for row in rows]
    assert len(rows) == MOST_ROWS
    assert {"none", "lora-1499", "lora-1499-seed-1", "prompt_tuning-298"} <= set(names)
    assert sum(row.trial.status == "diverged" for row in rows) == 150
    assert "lora-000" not in names
    assert [row for row in every if row in rows] == rows, "in the order in which they began"
    assert chosen(every[:50]) == every[:50]


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(tmp_path: Path) -> None:
    result = peft_study.open_study(study(tmp_path / "study").written())
    written = result.report()
    assert written.path == tmp_path / "study/report.html"
    frame = written._repr_html_()
    outline = Outline(frame)
    (attributes,) = outline.named("iframe")
    assert attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == written.path.read_text(encoding="utf-8")
    assert len(outline.elements) == 1
    assert result.report(tmp_path / "other.html", "zh").path.read_text(encoding="utf-8").count("研究") > 1
