"""Chapters run as a reader runs them, and the claims that a reader then finds in their tables."""

from __future__ import annotations

import inspect
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import jupytext

from patching_demo import chapter_claims
from patching_demo.claims import Checks

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))
HEADS = ["claim", "expected", "measured", "required", "verdict"]
#: The caption of the one table whose claims are open on other models.
PUBLISHED = "Published heads of GPT-2 small"


class Shown(NamedTuple):
    """One row of a table of claims, as it is shown."""

    claim: str
    expected: str
    measured: str
    required: str
    verdict: str


class _Tables(HTMLParser):
    """The cells of every table in a piece of HTML, by table and row."""

    def __init__(self, markup: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._within = False
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"th", "td"}:
            self.tables[-1][-1].append("")
            self._within = True

    def handle_endtag(self, tag):
        if tag in {"th", "td"}:
            self._within = False

    def handle_data(self, data):
        if self._within:
            self.tables[-1][-1][-1] += data


def tables(markup: str) -> list[list[list[str]]]:
    """The cells of every table in a piece of HTML, by table and row."""
    return [[row for row in table if row] for table in _Tables(markup).tables]


def script_of(chapter: str) -> Path:
    """The notebook whose name begins with a chapter's number."""
    (script,) = [path for path in SCRIPTS if path.stem.startswith(chapter)]
    return script


def run(chapter: str, model: str | None = None, *, go_on: bool = False, **settings: str):
    """The chapter, run in a fresh kernel with its model chosen by the environment.

    Args:
        chapter: the number that the notebook's name begins with.
        model: for PATCHING_DEMO_MODEL; None leaves the choice to the notebook.
        go_on: whether the cells after one that fails run as well.
        settings: further environment variables of the kernel.

    Raises:
        CellExecutionError: a cell failed, as one does whose claims do not hold.
    """
    from nbclient import NotebookClient

    script = script_of(chapter)
    book = jupytext.read(script)
    environment = {**os.environ, **settings}
    environment.pop("PATCHING_DEMO_MODEL", None)
    if model is not None:
        environment["PATCHING_DEMO_MODEL"] = model
    client = NotebookClient(
        book,
        kernel_name="python3",
        timeout=3600,
        allow_errors=go_on,
        resources={"metadata": {"path": str(script.parent)}},
    )
    client.execute(env=environment)
    return book


def printed(book) -> str:
    """Everything that the cells of a notebook printed."""
    outputs = [o for cell in book.cells for o in cell.get("outputs", [])]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def claims(book) -> dict[str, list[Shown]]:
    """The rows of each table of claims that a notebook shows, by the first words of its text."""
    found = {}
    for cell in book.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for table in tables(data.get("text/html", "")):
                if table and table[0] == HEADS:
                    title = data["text/plain"].splitlines()[0]
                    found[title] = [Shown(*row) for row in table[1:]]
    return found


def published(found: dict[str, list[Shown]]) -> bool:
    """Whether one of the tables is that of the published heads of GPT-2 small."""
    return any(title.startswith(PUBLISHED) for title in found)


def offered() -> set[str]:
    """The functions of `chapter_claims` that make a table of claims."""
    return {
        name
        for name, function in inspect.getmembers(chapter_claims, inspect.isfunction)
        if inspect.signature(function).return_annotation in (Checks, "Checks")
    }


def claimed(script: Path) -> list[str]:
    """Those of them that a notebook calls, in its order."""
    sources = [cell.source for cell in jupytext.read(script).cells if cell.cell_type == "code"]
    called = re.findall(r"chapter_claims\.(\w+)\(", "\n".join(sources))
    return [name for name in called if name in offered()]


def check_claims(book, chapter: str, model: str) -> dict[str, list[Shown]]:
    """Hold a run to its claims: the model was the one asked for, and every claim holds.

    Claims about the published heads of GPT-2 small have to be open on any other model, and decided
    on that one. Returns what :func:`claims` does.
    """
    said = printed(book)
    assert f"Model: {model} (" in said, f"{model} was asked for, and the notebook says: {said}"
    found = claims(book)
    assert len(found) == len(claimed(script_of(chapter))) > 0, list(found)
    for title, rows in found.items():
        assert rows, title
        open_ = title.startswith(PUBLISHED) and model != "gpt2-small"
        expected = "not checked" if open_ else "✓ holds"
        wrong = [row for row in rows if row.verdict != expected]
        assert not wrong, f"{title}: not {expected!r}: {wrong}"
    return found
