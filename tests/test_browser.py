"""The built book in a real browser, opened from its files with no server behind it.

`make browser` runs this after `make book`. Without Chromium the tests fail and say so.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "book" / "_build" / "html"
PAGES = [
    "index",
    *sorted(f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")),
]
PAGES += sorted(path.stem for path in (ROOT / "book").glob("*.md") if path.stem != "index")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# Milliseconds; generous, for CI machines are slow and shared.
TIMEOUT = 120_000
# A page is done when its figures are, or when it has none.
DRAWN = """() => document.readyState === 'complete' &&
    [...document.querySelectorAll('figure.plotly-figure')].every(f => f.dataset.drawn === 'true')"""
# For each trace of each figure: what was given, and what plotly made of it.
# Cells are counted by their numbers: plotly pads a trace that has not all columns of its axis.
TRACES = """() => [...document.querySelectorAll('.plotly-figure')].flatMap((figure, number) => {
    const plot = figure.querySelector('.plotly-figure-plot');
    const given = JSON.parse(figure.querySelector('script').textContent).data;
    const box = plot.getBoundingClientRect();
    const count = rows => [...(rows || [])].flatMap(row => [...row]).filter(Number.isFinite).length;
    const shown = plot._fullData.filter(t => t.visible === true).map(t => t.index);
    const images = [...plot.querySelectorAll('.hm image')].filter(i => i.getAttribute('width') > 0);
    return given.map((trace, i) => ({
        figure: number, type: trace.type || 'scatter', visible: shown.includes(i),
        cells: count(plot.calcdata[i]?.[0]?.z), expected: count(plot._fullData[i].z),
        points: plot.calcdata[i]?.length || 0,
        heatmaps: plot._fullData.filter(t => t.visible === true && t.type === 'heatmap').length,
        images: images.length, width: box.width, height: box.height,
    }));
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Headless Chromium, the system's own."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from picture import chromium
    from playwright.sync_api import sync_playwright

    assert (SITE / "index.html").exists(), f"no book in {SITE}: run `make book` first"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=chromium(),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield running
        running.close()


class Visit:
    """A page opened in a window of its own, with everything it complained of or asked for."""

    def __init__(self, browser, name: str, scheme: str = "light", viewport: dict = WIDE):
        self.errors: list[str] = []
        self.strangers: list[str] = []
        self.page = browser.new_page(viewport=viewport, color_scheme=scheme)
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("requestfailed", lambda request: self.errors.append(f"failed: {request.url}"))
        self.page.on("request", self._watch)
        self.page.set_default_timeout(TIMEOUT)
        self.page.goto((SITE / f"{name}.html").as_uri())
        self.page.wait_for_function(DRAWN)

    def _listen(self, message) -> None:
        if message.type in {"error", "warning"}:
            self.errors.append(message.text)

    def _watch(self, request) -> None:
        if not request.url.startswith((SITE.as_uri(), "data:", "blob:")):
            self.strangers.append(request.url)

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_) -> None:
        self.page.close()


def check_cells(page) -> None:
    """Every trace that shows has as many cells or points in the page as in its data."""
    for trace in page.evaluate(TRACES):
        assert trace["width"] > 300 and trace["height"] > 100, trace
        if trace["type"] == "heatmap" and trace["visible"]:
            assert trace["cells"] == trace["expected"] > 0, trace
            assert trace["images"] == trace["heatmaps"], trace
        elif trace["visible"]:
            assert trace["points"] > 0, trace


# Pairs of labels of one figure that cover a good part of each other. The box of a line of text is
# higher than its letters, so boxes of neat lines may overlap by less.
COVERED = """() => [...document.querySelectorAll('.plotly-figure-plot')].flatMap((plot, number) => {
    const texts = [...plot.querySelectorAll('.main-svg text')].filter(t => t.textContent.trim())
        .map(t => [t.textContent, t.getBoundingClientRect()]).filter(([_, b]) => b.width);
    const part = (a, b, from, to, size) =>
        (Math.min(a[to], b[to]) - Math.max(a[from], b[from])) / Math.min(a[size], b[size]);
    return texts.flatMap(([one, a], i) => texts.slice(i + 1).filter(([_, b]) =>
        part(a, b, 'left', 'right', 'width') > 0.42 && part(a, b, 'top', 'bottom', 'height') > 0.42
    ).map(([other]) => [number, one, other]));
})"""


# Titles that end beyond the edge of their figure: plotly breaks no lines.
CUT = """() => [...document.querySelectorAll('.plotly-figure')].filter(figure =>
    [...figure.querySelectorAll('.gtitle')].some(title =>
        title.getBoundingClientRect().right > figure.getBoundingClientRect().right + 1)
).map(figure => figure.querySelector('.gtitle').textContent)"""


def check_accessible(page) -> None:
    """The axe rules find nothing serious."""
    from axe_core_python.sync_playwright import Axe

    # Colours that are still on their way into the dark are not the page's.
    page.evaluate("Promise.all(document.getAnimations().map(motion => motion.finished))")
    serious = {
        f"{rule['id']}: {rule['help']}": [node["html"][:160] for node in rule["nodes"][:3]]
        for rule in Axe().run(page)["violations"]
        if rule["impact"] in {"serious", "critical"}
    }
    assert serious == {}


def check_theme(page, scheme: str) -> None:
    """The page took the reader's theme, also below outputs; text of figures is legible in it."""
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    grounds = page.evaluate(
        """() => [...document.querySelectorAll('.cell_output .output')]
            .filter(output => !output.matches('.stream'))
            .map(output => getComputedStyle(output).backgroundColor)"""
    )
    assert set(grounds) <= {"rgba(0, 0, 0, 0)"}
    texts = page.evaluate(
        """() => [...document.querySelectorAll('.plotly-figure-plot')].map(plot => {
            const context = document.createElement('canvas').getContext('2d');
            const brightness = colour => {
                context.fillStyle = colour;
                return parseInt(context.fillStyle.slice(1, 3), 16);
            };
            // The ground is that of the nearest element around the figure that has one.
            let around = plot, ground = 'rgba(0, 0, 0, 0)';
            while (around && ground === 'rgba(0, 0, 0, 0)') {
                ground = getComputedStyle(around).backgroundColor;
                around = around.parentElement;
            }
            const {font, paper_bgcolor} = plot._fullLayout;
            return [brightness(font.color), brightness(ground), paper_bgcolor];
        })"""
    )
    for text, ground, paper in texts:
        assert text < 100 < 155 < ground if scheme == "light" else text > 155 > 100 > ground, texts
        assert paper == "rgba(0,0,0,0)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_page(browser, name, scheme):
    with Visit(browser, name, scheme) as visit:
        check_cells(visit.page)
        assert visit.page.evaluate(COVERED) == []
        assert visit.page.evaluate(CUT) == []
        check_theme(visit.page, scheme)
        check_accessible(visit.page)
        assert visit.errors == []
        assert visit.strangers == []
        # The same page on a phone: what is too wide scrolls inside itself.
        visit.page.set_viewport_size(NARROW)
        visit.page.wait_for_timeout(500)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
        assert visit.page.evaluate(COVERED) == []
        assert visit.page.evaluate(CUT) == []
        assert visit.errors == []


def test_figures_follow_a_change_of_theme(browser):
    with Visit(browser, "index", "light") as visit:
        check_theme(visit.page, "light")
        visit.page.emulate_media(color_scheme="dark")
        visit.page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
        visit.page.wait_for_timeout(1000)
        check_theme(visit.page, "dark")


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("notebooks/")])
def test_buttons_and_sliders_change_what_is_drawn(browser, name):
    # What is painted: the picture that each heatmap became, and how much of it shows.
    state = """plot => JSON.stringify([...plot.querySelectorAll('.hm')].map(map => [
        getComputedStyle(map).opacity,
        [...map.querySelectorAll('image')].map(i => i.href.baseVal + i.getAttribute('height')),
    ]))"""
    with Visit(browser, name) as visit:
        for plot in visit.page.locator(".plotly-figure-plot").element_handles():
            plot.scroll_into_view_if_needed()
            before = plot.evaluate(state)
            for menu in plot.query_selector_all(".updatemenu-container > g"):
                seen = {before}
                header = menu.query_selector(".updatemenu-header")
                if header:
                    header.click()
                count = len(menu.query_selector_all(".updatemenu-button"))
                for index in range(count):
                    seen.add(plot.evaluate(state))
                    button = menu.query_selector_all(".updatemenu-button")
                    if header and not button:
                        header.click()
                        button = menu.query_selector_all(".updatemenu-button")
                    if index < len(button):
                        button[index].click()
                        visit.page.wait_for_timeout(300)
                        seen.add(plot.evaluate(state))
                assert count == 0 or len(seen) > 1, "a menu changes nothing"
            for slider in plot.query_selector_all(".slider-group"):
                seen = set()
                # Both ways: the first click does nothing where the slider stands there already.
                for share in (0.98, 0.02, 0.98):
                    rail = slider.query_selector(".slider-rail-touch-rect")
                    place = {"x": rail.bounding_box()["width"] * share, "y": 5}
                    rail.click(position=place, force=True)
                    visit.page.wait_for_timeout(800)
                    seen.add(plot.evaluate(state))
                assert len(seen) > 1, "a slider changes nothing"
        assert visit.errors == [] and visit.strangers == []


def test_search_finds_the_logit_difference(browser):
    with Visit(browser, "index") as visit:
        visit.page.goto((SITE / "search.html").as_uri() + "?q=logit+difference")
        results = visit.page.locator("#search-results li a")
        results.first.wait_for()
        visit.page.get_by_text("Search finished").wait_for()
        found = [results.nth(i).get_attribute("href") for i in range(results.count())]
        assert any("glossary" in address for address in found), found
        # Opened from files, a page may not read its neighbours: the excerpts stay away, no more.
        excerpts = re.compile("file:|ERR_FAILED|Failed to fetch")
        assert [error for error in visit.errors if not excerpts.search(error)] == []
        assert visit.strangers == []
