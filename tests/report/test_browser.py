"""The report's page in a real browser: Debian's Chromium, without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from hand_made import RATE, HandMade
from peft_study.report.pages import page_of
from peft_study.report.view import view_of

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: apt-get install chromium")
EVIL = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
DRAWN = "document.documentElement.dataset.charts"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
TITLES = "getComputedStyle(document.querySelector('[data-chart] .role-axis-title text')).fill"


def study(folder: Path) -> HandMade:
    """Returns a study with every kind of trial, curves and hostile texts."""
    spaces = {"lora": {**RATE, "rank": {"choices": [4, 8]}}, "prompt_tuning": RATE}
    made = HandMade(folder, spaces, finals={"best": 1, "seeds": 2}, data={"train": f"{EVIL}.jsonl"})
    for number, gain in enumerate((1.0, 0.8, 0.9, 0.7)):
        made.trial("lora", 10.0 ** (-4 + number), gain, rank=4 if number % 2 else 8)
    made.trial("lora", 10, None, rank=4)
    made.trial("prompt_tuning", 1e-2, 0.5)
    made.trial("prompt_tuning", 1e-1, 0.1, status="pruned", reason=f"at step 11 {EVIL}")
    made.trial("prompt_tuning", 1.0, 0.1, status="failed", reason="x" * 10_000)
    made.chosen(lora=[0], prompt_tuning=[0])
    names = [*made.finals("lora", 0, [1.0, 1.01]), *made.finals("prompt_tuning", 0, [0.5, 0.51])]
    made.concluded("lora")
    made.opened(**{name: 1.0 if name.startswith("lora") else 0.5 for name in names})
    made.written()
    for name in names:
        made.folder.trial(name).adapter.mkdir(parents=True)
    for trial in made.state.trials.values():
        rows: list[dict[str, Any]] = [{"event": "held_out", "step": 0, "loss": 2.0, "loss_low": 1.9, "loss_high": 2.1}]
        for step in (50, 100):
            rows.append({"event": "train", "step": step, "loss": 1.5, "tokens": 2500, "tokens_per_second": 10.0})
            rows.append({"event": "held_out", "step": step, "loss": 1.5, "loss_low": 1.4, "loss_high": 1.6})
        metrics = made.folder.trial(trial.name).metrics
        metrics.parent.mkdir(parents=True, exist_ok=True)
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    path = folder / "a <script> & b.html"
    path.write_text(page_of([view_of(study(folder / "study <script>").folder.path)]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as program:
        started = program.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page that was opened, with what it said on its console and what it asked for."""

    def __init__(self, browser: Browser, path: Path, width: int = 1400, scheme: str = "light", **more: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)  # type: ignore[arg-type]
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def drawn(self) -> Page:
        self.page.wait_for_selector("html[data-charts]", state="attached")
        return self.page


@pytest.fixture
def opened(browser: Browser, path: Path) -> Iterator[Opened]:
    one = Opened(browser, path)
    yield one
    one.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 900, 1400])
def test_it_opens_at_every_width_in_light_and_dark(browser: Browser, path: Path, width: int, scheme: str) -> None:
    one = Opened(browser, path, width, scheme)
    page = one.drawn()
    assert one.said == []
    assert one.asked == [path.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.title").endswith("peft-study")
    assert page.evaluate(DRAWN) == scheme
    names = page.evaluate("[...document.querySelectorAll('[data-chart]')].map(e => e.dataset.chart)")
    assert names[:2] == ["learning_curves", "learning_rate"]
    assert "response-lora-rank" in names
    marks = "e => e.querySelectorAll('svg .mark-symbol path, svg .mark-line path, svg .mark-rule line').length"
    for name in names:
        assert page.locator(f"[data-chart='{name}']").evaluate(marks) >= 3, name
        assert page.locator(f"[data-chart='{name}'] svg").bounding_box()["width"] <= width, name  # type: ignore[index]
    one.context.close()


def test_what_others_wrote_is_text(opened: Opened) -> None:
    page = opened.drawn()
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 3
    assert page.get_by_text("<img src=x onerror").count() >= 2
    assert page.evaluate("document.title") == "study <script> – peft-study"


def test_it_changes_with_the_system_and_prints_light(browser: Browser, path: Path) -> None:
    one = Opened(browser, path, scheme="dark")
    page = one.drawn()
    dark = page.evaluate(BACKGROUND), page.evaluate(TITLES)
    page.emulate_media(color_scheme="light")
    page.wait_for_selector("html[data-charts='light']", state="attached")
    light = page.evaluate(BACKGROUND), page.evaluate(TITLES)
    assert all(a != b for a, b in zip(dark, light, strict=True))
    page.emulate_media(color_scheme="dark", media="print")
    page.wait_for_timeout(300)
    page.wait_for_selector("html[data-charts='light']", state="attached")
    assert page.evaluate(BACKGROUND) == "rgb(255, 255, 255)"
    assert page.locator(".tools").is_hidden()
    assert page.locator(".trials tbody tr").last.is_visible()
    assert page.locator(".scroll").last.evaluate("e => e.scrollHeight <= e.clientHeight + 1"), "nothing is cut off"
    assert len(page.pdf(format="A4")) > 20_000
    assert one.said == []
    one.context.close()


def shown(page: Page) -> list[str]:
    return page.locator(".trials tbody tr:visible th").all_inner_texts()


def test_the_table_sorts_filters_and_searches(opened: Opened) -> None:
    page = opened.drawn()
    every = shown(page)
    assert len(every) == 13
    page.get_by_role("button", name="Dev loss").click()
    assert shown(page)[0].startswith("lora-000")
    assert shown(page)[-1] in ("lora-004", "prompt_tuning-002"), "those without a loss come last"
    page.get_by_role("button", name="Dev loss").click()
    assert shown(page)[0] == "none"
    assert shown(page)[-1] in ("lora-004", "prompt_tuning-002"), "also the other way round"
    head = page.locator("th[aria-sort]")
    assert head.get_attribute("aria-sort") == "descending"
    page.locator(".tools").get_by_label("Status").select_option("diverged")
    assert shown(page) == ["lora-004"]
    assert page.get_by_role("status").inner_text() == "1 of 13 trials"
    page.locator(".tools").get_by_label("Status").select_option("")
    page.locator(".tools").get_by_label("Method").select_option("prompt_tuning")
    assert len(shown(page)) == 5
    page.locator(".tools").get_by_label("Search").fill("final seed-2")
    assert shown(page) == ["prompt_tuning-000-seed-2"]
    page.locator(".tools").get_by_label("Search").fill("no such trial")
    assert shown(page) == []
    assert opened.said == []


def test_a_command_is_copied(browser: Browser, path: Path) -> None:
    one = Opened(browser, path)
    one.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = one.drawn()
    card = page.locator(".card").first
    command = card.locator("pre").first.inner_text()
    assert command.startswith("peft-study chat ")
    assert command.endswith("/trials/lora-000-seed-2/adapter'"), "the seed with the least dev loss, quoted"
    card.get_by_role("button", name="Copy").first.click()
    card.get_by_text("Copied", exact=True).wait_for()  # the clipboard answers later
    assert page.evaluate("navigator.clipboard.readText()") == command
    one.context.close()


def test_the_keyboard_reaches_everything(opened: Opened) -> None:
    page = opened.drawn()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    reached = set()
    for _ in range(150):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName + '.' + document.activeElement.className"))
    assert {"A.", "SUMMARY.", "INPUT.", "SELECT.", "BUTTON.", "DIV.scroll"} <= reached
    page.get_by_role("button", name="Trial", exact=True).focus()
    page.keyboard.press("Enter")
    assert page.locator("th[aria-sort]").inner_text().startswith("Trial")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_without_script_the_table_is_there(browser: Browser, path: Path) -> None:
    one = Opened(browser, path, java_script_enabled=False)
    assert one.page.locator(".trials tbody tr").count() == 13
    assert one.page.locator(".trials tbody tr").last.is_visible()
    assert one.page.locator(".tools").is_hidden()
    assert "need JavaScript" in one.page.locator("noscript").first.inner_text()
    one.context.close()
