"""Sphinx extension: plotly figures that live in a static book with nothing fetched from elsewhere.

List ``patching_demo.book_renderer`` among a book's extensions and each plotly output of a notebook
becomes a figure with a caption and a text for screen readers, drawn by a copy of plotly.js that is
written once for the whole book and loaded only by pages with a figure. Without that line the module
changes nothing, although its entry point makes every MyST-NB build import it.

Source of the plug-in interface: the ``MimeRenderPlugin`` protocol of MyST-NB.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly
from docutils import nodes
from plotly.offline import get_plotlyjs
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

FIGURE_TYPE = "application/vnd.plotly.v1+json"
PLOTLYJS = "plotly.min.js"
SCRIPT = "figures.js"

logger = logging.getLogger(__name__)


def figure_html(figure: Mapping[str, Any]) -> str:
    """Return the HTML of one figure, its data inside, for ``figures.js`` to draw.

    The screen-reader text is ``layout.meta["alt"]``, the caption ``layout.meta["caption"]``.

    Raises:
        ValueError: the figure has nothing to draw, or no text for screen readers.

    >>> page = figure_html({"data": [{"y": [1]}], "layout": {"meta": {"alt": "a < b"}}})
    >>> 'aria-label="a &lt; b"' in page
    True
    >>> figure_html({"data": [], "layout": {}})
    Traceback (most recent call last):
        ...
    ValueError: a figure without traces would be blank
    """
    layout = figure.get("layout", {})
    if not figure.get("data"):
        raise ValueError("a figure without traces would be blank")
    meta = layout.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    alt = _plain(meta.get("alt") or _title(layout))
    if not alt:
        raise ValueError(
            "a figure has no text for screen readers: set layout.meta = {'alt': ...} or a title"
        )
    # "<" can only occur inside JSON strings, where the escape means the same and ends no script.
    content = json.dumps(
        {"data": figure["data"], "layout": layout, "frames": figure.get("frames", [])},
        separators=(",", ":"),
    ).replace("<", "\\u003c")
    caption = meta.get("caption")
    return "".join(
        [
            f'<figure class="plotly-figure" role="figure" aria-label="{html.escape(alt)}">',
            f'<div class="plotly-figure-plot" style="min-height:{_height(layout)}px"></div>',
            f'<script type="application/json">{content}</script>',
            f"<noscript><p>{html.escape(alt)}</p></noscript>",
            f"<figcaption>{html.escape(_plain(caption))}</figcaption>" if caption else "",
            "</figure>",
        ]
    )


def _title(layout: Mapping[str, Any]) -> str:
    title = layout.get("title") or ""
    return title if isinstance(title, str) else title.get("text") or ""


def _plain(text: str | None) -> str:
    """Drop the few tags that plotly allows in its texts."""
    return re.sub(
        r"\s+", " ", re.sub(r"</?(br|b|i|sub|sup|span|em)\b[^>]*>", " ", text or "")
    ).strip()


def _height(layout: Mapping[str, Any]) -> int:
    # The room is reserved before plotly draws, so that a page does not jump as it loads.
    return int(layout.get("height") or 450)


def _figure_node(figure: Mapping[str, Any]) -> nodes.raw:
    node = nodes.raw("", figure_html(figure), format="html")
    node["plotly_figure"] = True
    return node


class FigureRenderer:
    """Turns the plotly outputs of executed notebooks into figures."""

    # Filled by `setup`: a book that does not list the extension keeps MyST-NB's own order.
    mime_priority_overrides: list[tuple[str, str, int | None]] = []

    @staticmethod
    def handle_mime(renderer: Any, data: Any, inline: bool) -> list[nodes.Element] | None:
        """Return the nodes of a plotly output, or None for any other kind."""
        if not FigureRenderer.mime_priority_overrides or inline:
            return None
        if data.mime_type != FIGURE_TYPE:
            return None
        try:
            return [_figure_node(data.content)]
        except ValueError as error:
            renderer.logger.warning(str(error), subtype="plotly", line=data.line)
            return []


class FigureFile(SphinxDirective):
    """``{plotly-figure} path.json``: a figure from a file beside the page."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the figure, or nothing and a warning, which fails the build."""
        relative, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(relative)
        try:
            return [_figure_node(json.loads(Path(path).read_text(encoding="utf-8")))]
        except (OSError, ValueError) as error:
            logger.warning("figure %s: %s", relative, error, location=self.get_location())
            return []


def _load_scripts(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    if doctree is not None and any("plotly_figure" in node for node in doctree.findall(nodes.raw)):
        # Both deferred: the page is readable before a figure is drawn, and in this order.
        app.add_js_file(PLOTLYJS, loading_method="defer")
        app.add_js_file(SCRIPT, loading_method="defer")


def _mend_bibliography(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    # Docutils puts entries with a role of their own into a list, which may only hold list items.
    if "citation-list" in context.get("body", ""):
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def _write_plotlyjs(app: Sphinx, env: Any, docnames: list[str]) -> None:
    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    (static / PLOTLYJS).write_text(get_plotlyjs(), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer, the directive and the page scripts with Sphinx."""
    FigureRenderer.mime_priority_overrides = [("html", FIGURE_TYPE, 1)]
    app.add_directive("plotly-figure", FigureFile)
    app.connect("html-page-context", _load_scripts)
    app.connect("html-page-context", _mend_bibliography)
    app.connect("env-before-read-docs", _write_plotlyjs)
    return {
        "version": plotly.__version__,
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
