"""Makes the pictures of the report that README and docs show, with a Chromium on the PATH.

    pip install pillow
    peft-study run examples/quickstart.yaml
    python docs/screenshots.py runs/quickstart

Writes docs/report-WIDTH-SCHEME.png, the top of the page at three widths, light and dark, and report-charts-SCHEME.png.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from peft_study.report.writing import views_of, write_page

SIZES = {400: 1100, 900: 1000, 1400: 1150}
"""Pixels of the page that are shown: width -> height."""


def picture(browser: Browser, page: Path, width: int, scheme: str, part: str = "") -> bytes:
    """Returns the top of a page, or of a part of it, as PNG, once its charts are drawn."""
    context = browser.new_context(viewport={"width": width, "height": SIZES[width]}, color_scheme=scheme)  # type: ignore[arg-type]
    tab = context.new_page()
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-charts]", state="attached")
    if part:
        tab.locator(part).evaluate("part => part.scrollIntoView({behavior: 'instant'})")
    found = tab.screenshot()
    context.close()
    return found


def main(study: Path) -> None:
    """Writes the pictures of a study's report beside this file."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as program:
        page = write_page(views_of([study]), path=Path(folder) / "report.html")
        browser = program.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for width, part in (*((width, "") for width in SIZES), (1400, "#curves")):
                image = Image.open(io.BytesIO(picture(browser, page, width, scheme, part))).convert("RGB")
                path = Path(__file__).parent / f"report-{'charts' if part else width}-{scheme}.png"
                image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
                print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
