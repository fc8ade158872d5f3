"""Tables for notebooks and the book: readable by a screen reader, text shown as text."""

from __future__ import annotations

import html
import re
import zlib
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from patching_demo.plots.facts import RUNS
from patching_demo.plots.theme import as_html, number, percent
from patching_demo.tasks import Task

# Dark on light in every theme, as a marked word must be readable on both.
_MARK = "background:#ffe08a;color:#1a1a1a;padding:0 2px;border-radius:2px"
# In the colour of the text around it: a theme's colour for code is not made for table rows.
_TOKEN = "color:inherit;background:none;border:0"
_CELLS = [("padding", "2px 6px"), ("white-space", "nowrap"), ("text-align", "left")]
_WRAPPED = [("min-width", "13em"), ("white-space", "normal")]


class Html:
    """Markup that notebooks and the book display, with plain text for everything else."""

    def __init__(self, markup: str, text: str) -> None:
        self.markup, self.text = markup, text

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return self.text


def table(frame: pd.DataFrame, caption: str) -> Html:
    """A table with a caption, numbers of about three digits and shares in per cent.

    Shares are the columns "share" and "share, " with more words after it.

    Args:
        frame: for instance of :func:`patching_demo.largest_cells`. Its index is shown, as the
            heads of rows, if it has a name. Long texts are wrapped.
        caption: what the table shows, in a sentence.

    >>> print(table(pd.DataFrame({"label": ["L9H6"], "share": [0.421]}), "Largest effects."))
    Largest effects.
    label share
     L9H6  42 %
    """
    written = [[_written(str(c), value) for value in frame[c]] for c in frame.columns]
    columns = dict(zip(map(str, frame.columns), written, strict=True))
    shown = pd.DataFrame(columns, index=frame.index)
    named = frame.index.name is not None
    # In the corner; pandas has a row of its own for the name of an index.
    style = shown.rename_axis(index=None, columns=frame.index.name).style.format(as_html)
    if not named:
        style = style.hide(axis="index")
    lengths = [max(map(len, column), default=0) for column in written]
    wraps = [{"selector": f"td.col{i}", "props": _WRAPPED} for i, n in enumerate(lengths) if n > 40]
    if wraps:  # Then others make room, too, so that the last column stays in view.
        narrow = [f"td.col{i}" for i, n in enumerate(lengths) if 16 < n <= 40]
        props = [("min-width", "7em"), ("white-space", "normal")]
        wraps.append({"selector": ", ".join(["th.row_heading", *narrow]), "props": props})
    return Html(framed(style, caption, wraps), f"{caption}\n{shown.to_string(index=named)}")


def tokens_table(task: Task, rows: int | None = None, caption: str | None = None) -> Html:
    """Clean and corrupted prompts below each other, token by token, with differences marked.

    The start that all shown pairs share stands in one cell, so that what differs is in view. Of a
    pair of unequal lengths, what was exchanged is marked.

    Args:
        task: what to show.
        rows: show only so many pairs.
        caption: instead of the default sentence.

    Raises:
        ValueError: if ``rows`` is not positive.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    source, target = RUNS[task.direction]
    caption = caption or (
        f"Tokens of {task.name}: each {source} prompt above its {target} one, "
        "tokens that differ are marked."
    )
    # A prompt's rows differ in what follows it alone.
    shown = range(0, len(task.clean_strings), task.rows_per_prompt)[:rows]
    return pairs_table([_pair(task, row) for row in shown], (source, target), caption)


def pairs_table(
    prompts: Sequence[tuple[Sequence[Sequence[str]], Sequence[Sequence[int]]]],
    sides: tuple[str, str],
    caption: str,
) -> Html:
    """What :func:`tokens_table` shows, of the texts and ids of both prompts of each pair."""
    body, index, lines = [], [], [caption]
    pairs = [(strings, _marks(*ids)) for strings, ids in prompts]
    places = max(len(tokens) for strings, _ in pairs for tokens in strings)
    # Token ids decide: two different tokens may print alike.
    shared = min(
        (row.index(True) if True in row else places) for _, marks in pairs for row in marks
    )
    shared = shared if shared >= 4 else 0
    head = {f"0–{shared - 1}": range(shared)} if shared else {}
    head |= {str(place): range(place, place + 1) for place in range(shared, places)}
    for pair, (strings, marks) in enumerate(pairs, 1):
        for side, tokens, differs in zip(sides, strings, marks, strict=True):
            cells = ([i for i in run if i < len(tokens)] for run in head.values())
            body.append([_tokens(tokens, differs, cell) for cell in cells])
            index.append((str(pair), side))
            marked = zip(tokens, differs, strict=False)
            lines.append(f"{pair} {side:<9} " + "|".join(f"*{t}*" if d else t for t, d in marked))
    frame = pd.DataFrame(body, columns=list(head), index=pd.MultiIndex.from_tuples(index))
    # On a telephone, narrow enough to have the first token that differs beside it.
    start = [("min-width", "min(22em, 40vw)"), ("white-space", "normal")]
    wraps = [{"selector": "td.col0", "props": start}] if shared else []
    return Html(framed(frame.style, caption, wraps), "\n".join(lines))


def _pair(task: Task, row: int) -> tuple[list[list[str]], list[list[int]]]:
    """The tokens of a clean and a corrupted prompt, as text and as ids."""
    ends, lengths = task.roles.get("END"), (task.lengths, task.corrupted_lengths)
    found, ids = [], []
    for side, tokens in enumerate((task.clean_tokens, task.corrupted_tokens)):
        length = int(lengths[side][row] if ends is None else ends[side][row] + 1)
        strings = (task.clean_strings, task.corrupted_strings)[side][row]
        found.append(list(strings[:length]))
        ids.append(tokens[row, :length].tolist())
    return found, ids


def _marks(one: Sequence[int], other: Sequence[int]) -> list[list[bool]]:
    """Which tokens of a clean and a corrupted prompt differ."""
    if len(one) == len(other):
        return 2 * [[a != b for a, b in zip(one, other, strict=True)]]
    # Places do not correspond: what stands in both in the same order is the same.
    marks = [[True] * len(one), [True] * len(other)]
    for *starts, size in SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks():
        for mark, start in zip(marks, starts, strict=True):
            mark[start : start + size] = [False] * size
    return marks


def _tokens(tokens: Sequence[str], differs: Sequence[bool], places: Sequence[int]) -> str:
    """Tokens beside each other, a thin line between two; several may be broken into lines."""
    shown = []
    for place in places:
        line = ";border-left:1px dotted" if place != places[0] else ""
        space = "pre-wrap" if len(places) > 1 else "pre"
        text = f'<code style="white-space:{space};{_TOKEN}{line}">{as_html(tokens[place])}</code>'
        shown.append(f'<mark style="{_MARK}">{text}</mark>' if differs[place] else text)
    return "".join(shown)


def _written(column: str, value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        if value != value:
            return "–"
        return percent(value) if column.split(",")[0] == "share" else number(value)
    return str(value)


def framed(style: Styler, caption: str, styles: Sequence[dict[str, Any]] = ()) -> str:
    """The markup of a styled table below its caption, whose cells are markup already.

    The caption stays in view when a wide table scrolls inside its frame, which the keyboard can
    reach to do so. Heads of rows and columns say which they are.
    """
    # The same table has the same name wherever it is made.
    name = f"{zlib.crc32((caption + style.data.to_csv()).encode()):x}"
    style = style.set_uuid(name).format_index(as_html, axis="columns")
    style = style.format_index(as_html, axis="index")
    style = style.set_table_styles([{"selector": "th, td", "props": _CELLS}, *styles])
    # Themes know pandas's tables by their class, and leave them readable in the dark.
    markup = scoped(style.to_html(table_attributes='class="dataframe" style="margin-left:0"'))
    return (
        f'<div class="tex2jax_ignore mathjax_ignore"><p style="margin:0">{as_html(caption)}</p>'
        f'<div role="region" aria-label="{html.escape(caption)}" tabindex="0" '
        f'style="overflow-x:auto">{markup}</div></div>'
    )


def scoped(markup: str) -> str:
    """The markup of a table in which every head says whether it is a row's or a column's."""
    for names, scope in (("col_heading|index_name", "col"), ("row_heading", "row")):
        markup = re.sub(rf'<th (?=[^>]*class="({names}) )', f'<th scope="{scope}" ', markup)
    return markup
