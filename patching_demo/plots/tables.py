"""Tables for notebooks and the book: readable by a screen reader, text shown as text."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import pandas as pd

from patching_demo.plots.theme import number
from patching_demo.tasks import Task

__all__ = ["Html", "as_text", "framed", "table", "tokens_table"]

# Dark on light in every theme, as a marked word must be readable on both.
_MARK = "background:#ffe08a;color:#1a1a1a;padding:0 2px;border-radius:2px"
# In the colour of the text around it: a theme's colour for code is not made for table rows.
_TOKEN = "white-space:pre;color:inherit;background:none;border:0"
_CELL = "padding:2px 6px;white-space:nowrap;text-align:left"


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

    Args:
        frame: for instance of :func:`patching_demo.largest_cells`; its index is not shown.
        caption: what the table shows, in a sentence.

    >>> print(table(pd.DataFrame({"label": ["L9H6"], "share": [0.421]}), "Largest effects."))
    Largest effects.
    label share
     L9H6  42 %
    """
    shown = pd.DataFrame(
        {
            str(column): [_written(str(column), value) for value in frame[column]]
            for column in frame.columns
        }
    )
    head = "".join(f'<th scope="col" style="{_CELL}">{as_text(c)}</th>' for c in shown.columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{as_text(v)}</td>' for v in row) + "</tr>"
        for row in shown.itertuples(index=False)
    )
    markup = framed(f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>", caption)
    return Html(markup, f"{caption}\n{shown.to_string(index=False)}")


def tokens_table(task: Task, rows: int | None = None, caption: str | None = None) -> Html:
    """Clean and corrupted prompts below each other, token by token, with differences marked.

    Args:
        task: what to show.
        rows: show only so many pairs.
        caption: instead of the default sentence.

    Raises:
        ValueError: if ``rows`` is not positive.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    batch = len(task.clean_strings)
    count = batch if rows is None else min(rows, batch)
    caption = caption or (
        f"Tokens of {task.name}: each clean prompt above its corrupted one, "
        "tokens that differ are marked."
    )
    places = range(len(task.position_labels))
    head = '<th scope="col" colspan="2">pair</th>' + "".join(
        f'<th scope="col" style="{_CELL}">{place}</th>' for place in places
    )
    body, lines = [], [caption]
    for pair in range(count):
        one, other = task.clean_strings[pair], task.corrupted_strings[pair]
        # Token ids decide: two different tokens may print alike.
        differs = (task.clean_tokens[pair] != task.corrupted_tokens[pair]).tolist()
        length = int(task.lengths[pair])
        for which, tokens in (("clean", one), ("corrupted", other)):
            lead = f'<th scope="rowgroup" rowspan="2" style="{_CELL}">{pair + 1}</th>'
            cells = "".join(
                f'<td style="{_CELL}">{_token(token, marked) if place < length else ""}</td>'
                for place, (token, marked) in enumerate(zip(tokens, differs, strict=True))
            )
            side = f'<th scope="row" style="{_CELL}">{which}</th>'
            body.append(f"<tr>{lead if which == 'clean' else ''}{side}{cells}</tr>")
            lines.append(f"{pair + 1} {which:<9} " + _line(tokens[:length], differs))
    markup = framed(f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>", caption)
    return Html(markup, "\n".join(lines))


def _line(tokens: Sequence[str], differs: Sequence[bool]) -> str:
    return "|".join(f"*{t}*" if d else t for t, d in zip(tokens, differs, strict=False))


def _token(token: str, marked: bool) -> str:
    text = f'<code style="{_TOKEN}">{as_text(token)}</code>'
    return f'<mark style="{_MARK}">{text}</mark>' if marked else text


def as_text(value: Any) -> str:
    """Markup that shows ``value`` as it is, on one line."""
    text = html.escape(str(value).replace("\n", "\\n").replace("\r", "\\r"))
    # A dollar alone in its element opens no formula, in whichever version of MathJax the page has.
    return text.replace("$", "<span>$</span>")


def _written(column: str, value: Any) -> str:
    if isinstance(value, float):
        if value != value:
            return "–"
        return (
            f"{value:.0%}".replace("%", " %").replace("-", "−")
            if column == "share"
            else number(value)
        )
    return str(value)


def framed(content: str, caption: str) -> str:
    """The markup of a table below its caption, which stays in view when a wide table scrolls."""
    label = html.escape(caption, quote=True)
    # Wide tables scroll inside their frame, and the keyboard can reach the frame to do so.
    # Themes know pandas's tables by their class, and leave them readable in the dark.
    return (
        f'<div class="tex2jax_ignore mathjax_ignore"><p style="margin:0">{as_text(caption)}</p>'
        f'<div role="region" aria-label="{label}" tabindex="0" style="overflow-x:auto">'
        f'<table class="dataframe" style="margin-left:0">{content}</table></div></div>'
    )
