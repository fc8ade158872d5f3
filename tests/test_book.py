"""The built book: what can be checked of its files without a browser. `make book` comes first."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import chapters
import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from plotly.offline import get_plotlyjs

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "book" / "_build" / "html"
CHAPTERS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
FETCHED = {"src", "srcset", "poster", "data", "data-src"}
CHAPTER_LIMIT = 1_500_000
# Hosts that serve scripts and fonts to other people's pages.
CDN = re.compile(
    r"(?:https?:)?//[\w.-]*(?:cdn|unpkg|jsdelivr|cloudflare|googleapis|gstatic|esm\.sh|skypack)"
)


class Page:
    """What a page fetches, links to, runs inline and shows as figures."""

    def __init__(self, path: Path):
        self.path, self.text = path, path.read_text(encoding="utf-8")
        soup = BeautifulSoup(self.text, "html.parser")
        self.ids = {tag.get(key) for tag in soup.find_all(True) for key in ("id", "name")}
        self.scripts = soup.find_all(["script", "style"])
        self.figures = soup.find_all("figure", class_="plotly-figure")
        # A browser fetches what these name by itself; links wait for a click.
        self.fetched = [t[k] for k in FETCHED for t in soup.find_all(attrs={k: True}) if t[k]]
        self.links = [a.get("href") or "" for a in soup.find_all("a")]
        for link in soup.find_all("link", rel=lambda rel: rel != "canonical"):
            # The search description, previous and next pages are links, the rest is fetched.
            kind = {"prev", "next", "index", "search"} & set(link.get("rel", []))
            (self.links if kind else self.fetched).append(link.get("href", ""))

    def figure_data(self) -> list[dict]:
        """What each figure of the page draws."""
        return [json.loads(s.string) for s in self.scripts if s.get("type") == "application/json"]


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    """Every page of the site by its path."""
    found = sorted(SITE.rglob("*.html"))
    assert found, f"no book in {SITE}: run `make book` first"
    theme = {"_static"}
    return {
        path.relative_to(SITE).as_posix(): Page(path)
        for path in found
        if not theme & set(path.relative_to(SITE).parts)
    }


def local(reference: str) -> bool:
    """Whether a reference stays within the site."""
    parts = urlsplit(reference)
    return not parts.scheme and not parts.netloc


def test_nothing_is_fetched_from_elsewhere(pages):
    fetched = set()
    for name, page in pages.items():
        fetched |= {reference.rpartition("/")[2].partition("?")[0] for reference in page.fetched}
        strangers = [r for r in page.fetched if not local(r) and not r.startswith("data:")]
        assert not strangers, f"{name} fetches {strangers}"
        for script in page.scripts:
            if script.get("type") != "application/json":
                assert not CDN.search(script.string or ""), f"{name}: {script}"
    for style in SITE.rglob("*.css"):
        text = style.read_text(encoding="utf-8", errors="ignore")
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        for reference in re.findall(r"url\(\s*['\"]?([^'\")]+)", text):
            assert local(reference) or reference.startswith("data:"), f"{style.name}: {reference}"
        assert not re.search(r"@import\s+['\"]?https?:", text), style.name
    # plotly.js holds addresses of map tiles, which no figure here asks for.
    for script in SITE.rglob("*.js"):
        if script.name in fetched - {"plotly.min.js", "searchindex.js"}:
            assert not CDN.search(script.read_text("utf-8", errors="ignore")), script.name


def test_local_references_and_their_anchors_exist(pages):
    for name, page in pages.items():
        for reference in filter(local, page.fetched + page.links):
            parts = urlsplit(reference)
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            assert target.exists(), f"{name} refers to {reference}, which is not there"
            other = pages.get(os.path.relpath(target, SITE.resolve()))
            if parts.fragment and other is not None:
                assert unquote(parts.fragment) in other.ids, f"{name} links to {reference}"


def test_plotlyjs_is_there_once_and_only_loaded_for_figures(pages):
    copies = [p for p in SITE.rglob("*.js") if p.stat().st_size > 2_000_000]
    assert [p.name for p in copies] == ["plotly.min.js"]
    expected = hashlib.sha256(get_plotlyjs().encode()).hexdigest()
    assert hashlib.sha256(copies[0].read_bytes()).hexdigest() == expected
    for name, page in pages.items():
        loads = [s for s in page.scripts if "plotly.min.js" in s.get("src", "")]
        assert len(loads) == bool(page.figures), name
        assert all(script.has_attr("defer") for script in loads), name
        assert "require.js" not in page.text and "html-manager" not in page.text, name


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_shows_what_its_notebook_drew(pages, chapter):
    page = pages[f"notebooks/{chapter}.html"]
    run = json.loads((ROOT / "book/notebooks" / f"{chapter}.ipynb").read_text(encoding="utf-8"))
    outputs = [o for cell in run["cells"] for o in cell.get("outputs", [])]
    kind = "application/vnd.plotly.v1+json"
    drawn = [o["data"][kind] for o in outputs if kind in o.get("data", {})]
    assert [f["data"] for f in page.figure_data()] == [f["data"] for f in drawn]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert "Traceback (most recent call last)" not in page.text
    assert "injected-parameters" not in page.text


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_shows_its_claims_and_each_holds(pages, chapter):
    """On the model that the run names, and in the page as in the run."""
    path = ROOT / "book/notebooks" / f"{chapter}.ipynb"
    run = nbformat.read(path, as_version=4)
    model = re.search(r"^Model: (\S+) \(", chapters.printed(run), re.MULTILINE)[1]
    tables = chapters.check_claims(run, chapter[:2], model)
    shown = chapters.tables(pages[f"notebooks/{chapter}.html"].text)
    assert list(tables.values()) == [
        [chapters.Shown(*row) for row in table[1:]] for table in shown if table[0] == chapters.HEADS
    ]


def test_figures_have_text_for_screen_readers(pages):
    for name, page in pages.items():
        assert len(page.figure_data()) == len(page.figures), name
        for figure in page.figures:
            assert len(figure.get("aria-label", "")) > 20, f"{name}: {figure}"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_is_light_enough(pages, chapter):
    page = pages[f"notebooks/{chapter}.html"]
    images = [
        (page.path.parent / unquote(reference)).resolve()
        for reference in page.fetched
        if local(reference) and "_images" in reference
    ]
    size = page.path.stat().st_size + sum(path.stat().st_size for path in set(images))
    assert size < CHAPTER_LIMIT, f"{chapter} weighs {size} bytes"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_has_its_buttons(pages, chapter):
    config = yaml.safe_load((ROOT / "book/_config.yml").read_text(encoding="utf-8"))
    address = config["repository"]["url"]
    page = pages[f"notebooks/{chapter}.html"]
    path = f"{address.removeprefix('https://github.com/')}/blob/main/notebooks/{chapter}.ipynb"
    assert f"https://colab.research.google.com/github/{path}" in page.links
    assert address in page.links
    assert any(link.endswith(f"_sources/notebooks/{chapter}.ipynb") for link in page.links)
    assert f"notebooks/{chapter}.html" in pages["run-times.html"].links


def test_references_name_every_entry(pages):
    entries = re.findall(r"^@\w+\{(\S+),", (ROOT / "book/references.bib").read_text(), re.MULTILINE)
    addresses = re.findall(r"url = \{(.+)\}", (ROOT / "book/references.bib").read_text())
    assert entries and not set(addresses) - set(pages["references.html"].links)


def test_pages_have_title_language_and_viewport_and_name_no_folder_of_this_machine(pages):
    for name, page in pages.items():
        assert str(ROOT) not in page.text, name
        assert re.search(r'<html[^>]* lang="en"', page.text), name
        assert re.search(r"<title>\s*\S+", page.text), name
        assert '<meta name="viewport"' in page.text, name
