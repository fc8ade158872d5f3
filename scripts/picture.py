"""Redraw the README's picture from the figure that the last `make book` took from its notebook."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "book" / "_build" / "html" / "index.html"
PICTURE = ROOT / "book" / "images" / "headline.png"
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """The browser to draw with: $CHROMIUM, or the first known name on the path."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        sys.exit("No Chromium found: install it (apt install chromium) or set CHROMIUM to its path")
    return found


def main() -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(
            viewport={"width": 1100, "height": 1200}, device_scale_factor=2, color_scheme="light"
        )
        page.goto(PAGE.as_uri())
        figure = page.locator("figure.plotly-figure[data-drawn='true'] .plotly-figure-plot").first
        figure.wait_for()
        # A picture has no use for the buttons, and GitHub may show it on a dark page.
        page.add_style_tag(
            content=".modebar{display:none!important}.plotly-figure{background:#fff}"
        )
        PICTURE.parent.mkdir(exist_ok=True)
        figure.screenshot(path=PICTURE)
        browser.close()
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
