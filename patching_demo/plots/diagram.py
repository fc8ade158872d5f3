"""The drawing that opens the first chapter: one activation moved from one run into another."""

from __future__ import annotations

import html

from patching_demo.plots.tables import Html

__all__ = ["patching_diagram"]

_INK, _SOFT = "#222222", "#8c8c8c"
_SAME, _CLEAN, _CORRUPTED, _AFTER = "#e4e4e4", "#b3d4ee", "#f6cda2", "#dccbe9"
_LEFT, _PITCH, _WIDE, _HIGH = 84, 64, 50, 20
_ROWS = 3
#: The patched cell: the position at which the prompts differ, in the middle layer.
_COLUMN, _ROW = 3, 1

_ABOUT = (
    "Two grids of activations, layers from top to bottom and token positions from left to right. "
    "The clean prompt is John, Mary, dots, John, to, and its answer is Mary. The corrupted prompt "
    "has Mary in place of the second John, and its answer is John. The grids agree at the "
    "positions before the changed word. An arrow copies the activation of layer 1 at the changed "
    "word from the clean run into the corrupted run; the activations below it and to its right "
    "are computed anew. A scale from 0, the corrupted run, to 1, the clean run, scores the answer."
)


def patching_diagram() -> Html:
    """Activation patching as a picture, with its content in words for screen readers.

    It brings its own light background, so that it reads the same in light and dark pages.

    >>> print(patching_diagram()._repr_html_()[:4])
    <svg
    """
    parts = [
        '<rect x="1" y="1" width="438" height="486" rx="8" fill="#fbfbfb" stroke="#c9c9c9"/>',
        *_run(18, "1  Clean run: keep its activations", "John", "Mary", clean=True),
        *_run(192, "2  Corrupted run, with one of them put in", "Mary", "?", clean=False),
        _copy(),
        *_scale(372),
        *_legend(446),
    ]
    picture = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 440 488" role="img" '
        'aria-labelledby="patching-diagram-title patching-diagram-about" '
        'style="display:block;width:100%;max-width:540px;height:auto" '
        'font-family="system-ui, sans-serif" font-size="13">'
        '<title id="patching-diagram-title">Activation patching</title>'
        f'<desc id="patching-diagram-about">{html.escape(_ABOUT)}</desc>'
        f"{''.join(parts)}</svg>"
    )
    return Html(picture, _ABOUT)


def _run(top: int, heading: str, subject: str, answer: str, *, clean: bool) -> list[str]:
    """One run: its prompt, its activations by layer and position, and its answer."""
    parts = [_text(18, top + 14, heading, weight=600, anchor="start")]
    for column, word in enumerate(("John", "Mary", "…", subject, "to")):
        weight = 700 if column == _COLUMN else 400
        parts.append(_text(_x(column) + _WIDE / 2, top + 38, word, weight=weight))
    for row in range(_ROWS):
        y = _y(top, row)
        parts.append(_text(18, y + 15, f"layer {row}", anchor="start", fill="#555555", size=12))
        for column in range(5):
            parts.append(_cell(column, row, y, clean))
    parts.append(_text(_x(4) + _WIDE / 2, _y(top, _ROWS) + 14, answer, weight=700))
    parts.append(
        _text(_x(4) - 20, _y(top, _ROWS) + 14, "the model's answer:", anchor="end", fill="#555555")
    )
    return parts


def _cell(column: int, row: int, y: int, clean: bool) -> str:
    fill, edge, width = (_CLEAN if clean else _CORRUPTED), _SOFT, 1
    if column < _COLUMN:
        fill = _SAME
    elif (column, row) == (_COLUMN, _ROW):
        fill, edge, width = _CLEAN, "#08305f", 3
    elif not clean and row > _ROW:
        fill = _AFTER
    return (
        f'<rect x="{_x(column)}" y="{y}" width="{_WIDE}" height="{_HIGH}" rx="3" fill="{fill}" '
        f'stroke="{edge}" stroke-width="{width}"/>'
    )


def _copy() -> str:
    """The arrow, in the gap to the right of the patched column."""
    edge, start, end = _x(_COLUMN) + _WIDE, _y(18, _ROW) + 10, _y(192, _ROW) + 10
    lane = edge + 8
    return (
        f'<path d="M{edge + 2},{start}H{lane}V{end}H{edge + 5}" fill="none" stroke="#08305f" '
        f'stroke-width="2.5"/><path d="M{edge + 2},{end}l7,-5v10z" fill="#08305f"/>'
    )


def _scale(top: int) -> list[str]:
    left, right, y = 84, 384, top + 34
    return [
        _text(18, top + 8, "3  Score the answer", weight=600, anchor="start"),
        f'<path d="M{left},{y}H{right}M{left},{y - 6}v12M{right},{y - 6}v12" stroke="{_INK}" '
        'stroke-width="1.5" fill="none"/>',
        f'<path d="M{left + 210},{y - 3}l-6,-10h12z" fill="#08305f"/>',
        _text(left, y + 22, "0: as corrupted (John)", anchor="start"),
        _text(right, y + 22, "1: as clean (Mary)", anchor="end"),
    ]


def _legend(top: int) -> list[str]:
    parts, x = [], 18
    for fill, label, width in (
        (_SAME, "same in both", 106),
        (_CLEAN, "clean", 66),
        (_CORRUPTED, "corrupted", 92),
        (_AFTER, "computed anew", 110),
    ):
        parts.append(
            f'<rect x="{x}" y="{top + 10}" width="14" height="14" rx="2" fill="{fill}" '
            f'stroke="{_SOFT}"/>'
        )
        parts.append(_text(x + 19, top + 22, label, anchor="start", size=12))
        x += width
    return parts


def _x(column: int) -> int:
    return _LEFT + column * _PITCH


def _y(top: int, row: int) -> int:
    return top + 48 + row * (_HIGH + 6)


def _text(
    x: float,
    y: float,
    words: str,
    *,
    weight: int = 400,
    anchor: str = "middle",
    fill: str = _INK,
    size: int = 13,
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" fill="{fill}" '
        f'font-size="{size}">{html.escape(words)}</text>'
    )
