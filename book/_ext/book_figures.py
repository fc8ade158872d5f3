"""Sphinx extension: what a chapter's run needs to become a page that fetches nothing.

Each plotly output becomes a figure with a caption and a text for screen readers. One copy of
plotly.js is written for the whole book, and only pages with a figure load it. Widgets, which need
a kernel, become a note.
"""

from __future__ import annotations

import html
import json
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from plotly.offline import get_plotlyjs
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

FIGURE_TYPE = "application/vnd.plotly.v1+json"
WIDGET_TYPE = "application/vnd.jupyter.widget-view+json"
PLOTLYJS = "plotly.min.js"
FIGURE = '<figure class="plotly-figure"'
# A progress bar as text: a share, a bar between two rules, a count.
PROGRESS_BAR = re.compile(r"\d+%\|.*\|\s*\S+/\S+\s*\[")
WIDGET_NOTE = "*In Jupyter and Colab a control panel stands here; it needs a kernel to answer.*"
# The badge's picture comes from elsewhere, and the page has a button that does the same.
BADGE = re.compile(r"\[!\[Open [Ii]n Colab\]\([^)]*\)\]\(([^)]*)\)")
# Packages whose version can change a number or a figure.
LIBRARIES = ("torch", "transformer_lens", "transformers", "numpy", "xarray", "plotly")

logger = logging.getLogger(__name__)


def figure_html(figure: Mapping[str, Any]) -> str:
    """Return the HTML of one figure, its data inside, for ``figures.js`` to draw.

    The text for screen readers is ``layout.meta["alt"]``, the caption ``layout.meta["caption"]``.

    Raises:
        ValueError: the figure has nothing to draw, or no text for screen readers.
    """
    layout = figure.get("layout", {})
    if not figure.get("data"):
        raise ValueError("a figure without traces would be blank")
    meta, title = layout.get("meta"), layout.get("title") or ""
    meta = meta if isinstance(meta, Mapping) else {}
    # A title has plotly's tags; what is meant for screen readers is text, whatever stands in it.
    alt = meta.get("alt") or _plain(title if isinstance(title, str) else title.get("text"))
    if not alt:
        raise ValueError(
            "a figure has no text for screen readers: set layout.meta = {'alt': ...} or a title"
        )
    # "<" can only occur inside JSON strings, where the escape means the same and ends no script.
    content = json.dumps(
        {"data": figure["data"], "layout": layout, "frames": figure.get("frames", [])},
        separators=(",", ":"),
    ).replace("<", "\\u003c")
    caption = html.escape(meta.get("caption") or "")
    # The room is reserved before plotly draws, so that a page does not jump as it loads.
    height = int(layout.get("height") or 450)
    return (
        f'{FIGURE} role="figure" aria-label="{html.escape(alt)}">'
        f'<div class="plotly-figure-plot" style="min-height:{height}px"></div>'
        f'<script type="application/json">{content}</script>'
        f"<noscript><p>{html.escape(alt)}</p></noscript>"
        + (f"<figcaption>{caption}</figcaption>" if caption else "")
        + "</figure>"
    )


def _plain(text: str | None) -> str:
    """Drop the few tags that plotly allows in its texts."""
    return " ".join(re.sub(r"</?(br|b|i|sub|sup|span|em)\b[^>]*>", " ", text or "").split())


def page_output(output: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a page shows of one output of a run, or None where it shows nothing.

    Raises:
        ValueError: it is a figure that would be blank or mute.
    """
    data = output.get("data", {})
    if FIGURE_TYPE in data:
        return {**output, "data": {"text/html": figure_html(data[FIGURE_TYPE])}}
    if WIDGET_TYPE not in data:
        return output
    if PROGRESS_BAR.search("".join(data.get("text/plain", ""))):
        return None
    return {**output, "data": {"text/markdown": WIDGET_NOTE}}


def page_of_run(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run as the book shows it; errors as `page_output`, with the cell's number."""
    run["metadata"].pop("widgets", None)
    for number, cell in enumerate(run["cells"], start=1):
        if cell["cell_type"] == "code":
            try:
                shown = [page_output(output) for output in cell["outputs"]]
            except ValueError as error:
                raise ValueError(f"cell {number}: {error}") from error
            cell["outputs"] = [output for output in shown if output]
        else:
            cell["source"] = BADGE.sub(r"[Open in Colab](\1)", "".join(cell["source"]))
    return run


def _read_run(app: Sphinx, docname: str, source: list[str]) -> None:
    if not app.env.doc2path(docname).endswith(".ipynb"):
        return
    try:
        source[0] = json.dumps(page_of_run(json.loads(source[0])))
    except ValueError as error:
        logger.warning("%s", error, location=docname)


class TaggedFigure(SphinxDirective):
    """``{plotly-figure} run.ipynb figure-NAME``: the figure of the cell with that tag."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        """Return the figure, or nothing and a warning, which fails the build."""
        relative, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(relative)
        try:
            figures = [
                output["data"][FIGURE_TYPE]
                for cell in json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
                if self.arguments[1] in cell["metadata"].get("tags", [])
                for output in cell["outputs"]
                if FIGURE_TYPE in output.get("data", {})
            ]
            if not figures:
                raise ValueError(f"no cell tagged {self.arguments[1]} drew a figure")
            return [nodes.raw("", figure_html(figures[0]), format="html")]
        except (OSError, ValueError) as error:
            logger.warning("figure of %s: %s", relative, error, location=self.get_location())
            return []


class RunTimes(SphinxDirective):
    """``{run-times} folder``: when each run in the folder was made, and how long it took."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a table and a line about the machine."""
        folder = self.arguments[0]
        lines = ["| notebook | run on | seconds |", "|---|---|---:|"]
        for path in sorted(Path(self.env.relfn2path(folder)[1]).glob("*.ipynb")):
            self.env.note_dependency(str(path))
            meta = json.loads(path.read_text(encoding="utf-8"))["metadata"]["papermill"]
            link = f"[{path.stem}]({folder}/{path.name})"
            lines.append(f"| {link} | {meta['start_time'][:10]} | {meta['duration']:.0f} |")
        versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        lines += [
            "",
            f"Machine: {platform.system()} {platform.machine()}, {os.cpu_count()} processors, "
            f"Python {platform.python_version()}, {versions}.",
        ]
        container = nodes.container()
        self.state.nested_parse(StringList(lines, self.env.docname), 0, container)
        return container.children


def _finish_page(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    body = context.get("body", "")
    if FIGURE in body:
        # Both deferred: the page is readable before a figure is drawn, and in this order.
        app.add_js_file(PLOTLYJS, loading_method="defer")
        app.add_js_file("figures.js", loading_method="defer")
    # Docutils puts entries with a role of their own into a list, which may only hold list items.
    context["body"] = body.replace('role="doc-biblioentry"', 'role="listitem"')


def _write_plotlyjs(app: Sphinx, env: Any, docnames: list[str]) -> None:
    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    (static / PLOTLYJS).write_text(get_plotlyjs(), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives, and what happens to runs and pages, with Sphinx."""
    app.add_directive("plotly-figure", TaggedFigure)
    app.add_directive("run-times", RunTimes)
    app.connect("source-read", _read_run)
    app.connect("html-page-context", _finish_page)
    app.connect("env-before-read-docs", _write_plotlyjs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
