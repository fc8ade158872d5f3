"""Figures become HTML that no prompt text can break out of."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import plotly.graph_objects as go
import pytest

from patching_demo import book_renderer
from patching_demo.book_renderer import FIGURE_TYPE, FigureRenderer, figure_html

HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)> & "quoted" <!-- $x$'


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, dict] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes[tag] = dict(attrs)


def as_json(figure: go.Figure) -> dict:
    return json.loads(figure.to_json())


def stored(page: str) -> dict:
    return json.loads(re.search(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)[1])


def test_hostile_text_stays_text():
    figure = go.Figure(go.Heatmap(z=[[1]], x=[HOSTILE]))
    figure.update_layout(title=HOSTILE, meta={"alt": HOSTILE, "caption": HOSTILE})
    page = figure_html(as_json(figure))
    seen = Tags(page)
    assert seen.tags == ["figure", "div", "script", "noscript", "p", "figcaption"]
    assert stored(page)["data"][0]["x"] == [HOSTILE]
    assert seen.attributes["figure"]["aria-label"].startswith("</script><script>alert")


def test_figure_keeps_its_data_layout_and_frames():
    figure = go.Figure(go.Scatter(y=[3, 1, 2]), frames=[go.Frame(name="next")])
    figure.update_layout(title="Clean <b>resid_pre</b><br>into corrupted", height=321)
    page = figure_html(as_json(figure))
    assert stored(page)["data"][0]["y"] == [3, 1, 2]
    assert stored(page)["frames"][0]["name"] == "next"
    assert 'aria-label="Clean resid_pre into corrupted"' in page
    assert "min-height:321px" in page


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ({"data": [], "layout": {"title": {"text": "Empty"}}}, "would be blank"),
        ({"data": [{"y": [1]}], "layout": {}}, "no text for screen readers"),
        ({"data": [{"y": [1]}], "layout": {"meta": "a note"}}, "no text for screen readers"),
    ],
)
def test_blank_and_mute_figures_are_refused(figure, message):
    with pytest.raises(ValueError, match=message):
        figure_html(figure)


@pytest.fixture
def awake(monkeypatch):
    monkeypatch.setattr(FigureRenderer, "mime_priority_overrides", [("html", FIGURE_TYPE, 1)])


def output(content, mime_type=FIGURE_TYPE):
    return SimpleNamespace(mime_type=mime_type, content=content, line=7, output_metadata={})


def test_renderer_sleeps_in_other_books():
    assert FigureRenderer.mime_priority_overrides == []
    assert FigureRenderer.handle_mime(None, output({}), False) is None


def test_renderer_leaves_other_outputs_alone(awake):
    assert FigureRenderer.handle_mime(None, output("text", "text/plain"), False) is None


def test_renderer_turns_a_blank_figure_into_a_warning(awake):
    warnings = []
    logger = SimpleNamespace(warning=lambda text, **where: warnings.append((text, where)))
    renderer = SimpleNamespace(logger=logger)
    assert FigureRenderer.handle_mime(renderer, output({"data": []}), False) == []
    ((text, where),) = warnings
    assert "blank" in text and where["line"] == 7
    figure = as_json(go.Figure(go.Scatter(y=[1]), layout={"title": "One"}))
    (node,) = FigureRenderer.handle_mime(renderer, output(figure), False)
    assert node["plotly_figure"] and node["format"] == "html" and len(warnings) == 1


def test_setup_wakes_the_renderer(monkeypatch):
    monkeypatch.setattr(FigureRenderer, "mime_priority_overrides", [])
    calls = []
    app = SimpleNamespace(
        add_directive=lambda *arguments: calls.append(arguments[0]),
        connect=lambda event, handler: calls.append(event),
    )
    assert book_renderer.setup(app)["parallel_read_safe"]
    assert FigureRenderer.mime_priority_overrides
    assert calls[0] == "plotly-figure" and set(calls[1:]) == {
        "html-page-context",
        "env-before-read-docs",
    }
