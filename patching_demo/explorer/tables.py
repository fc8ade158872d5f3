"""What the explorer shows, as HTML that every version of ipywidgets can display.

Nothing here holds state or runs a model: a labelled sweep goes in, markup comes out. Whatever a
reader typed is shown as text, neither as markup nor as a formula.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
import xarray as xr
from plotly.colors import sample_colorscale

from patching_demo.engine.kinds import kind_label
from patching_demo.plots import theme
from patching_demo.plots.tables import table, tokens_table
from patching_demo.plots.theme import number
from patching_demo.results import largest_cells
from patching_demo.tasks import Task

__all__ = [
    "LARGEST",
    "MOST_ROWS",
    "cell_table",
    "entries",
    "heatmap_table",
    "largest_effects",
    "paragraph",
    "prompts_table",
]

#: So many rows of heads are shown, the ones with the largest effects.
MOST_ROWS = 30
#: So many effects are listed in words.
LARGEST = 8

# Notebooks set it for light and dark pages; where nobody does, the page's own colour is inherited.
_TEXT_COLOUR = "var(--jp-content-font-color1, inherit)"
_HATCHED = (
    f"background:repeating-linear-gradient(45deg,{theme.BAND} 0 4px,{theme.HATCH} 4px 6px);"
    "color:transparent"
)
_CELL = "padding:1px 3px;min-width:32px;height:19px;text-align:center;font-size:11px"
_HEAD = "padding:1px 5px;font-size:11px;font-weight:normal;white-space:pre;text-align:right"


def paragraph(head: str, words: str) -> str:
    """A paragraph, with ``head`` in bold before it unless that is empty."""
    bold = f"<b>{html.escape(head)}:</b> " if head else ""
    return (
        f'<p class="tex2jax_ignore mathjax_ignore" style="margin:4px 0;line-height:1.4;'
        f'white-space:normal;overflow-wrap:anywhere;color:{_TEXT_COLOUR}">'
        f"{bold}{_plain(words)}</p>"
    )


def prompts_table(prompts: Sequence[Sequence[int]], strings: Sequence[Sequence[str]]) -> str:
    """A clean and a corrupted prompt token by token, also where their lengths differ.

    Args:
        prompts: the tokens of both.
        strings: what each token says.
    """
    length = max(map(len, prompts))
    padded = [[*row, *[-1] * (length - len(row))] for row in prompts]
    words = [[*row, *[""] * (length - len(row))] for row in strings]
    shown = SimpleNamespace(
        name="your prompts",
        position_labels=list(range(length)),
        clean_tokens=torch.tensor(padded[:1]),
        corrupted_tokens=torch.tensor(padded[1:]),
        clean_strings=words[:1],
        corrupted_strings=words[1:],
        lengths=[length],
    )
    caption = "Your prompts, token by token; where they differ is marked."
    return _coloured(tokens_table(shown, caption=caption).markup)


def entries(result: xr.DataArray, dim: str) -> list[str]:
    """What the entries along a dimension are called."""
    values = result[dim].values.tolist()
    if dim == "kind":
        return [kind_label(value) for value in values]
    return [str(value).replace("\n", "\\n") for value in values]


def largest_effects(result: xr.DataArray) -> list[tuple[str, tuple[int, ...]]]:
    """The largest effects in words, each with its place along the result's dimensions."""
    found = []
    for row in largest_cells(result, LARGEST).to_dict("records"):
        layer, head = re.fullmatch(r"L(\d+)(?:H(\d+))?", row["label"]).groups()
        entry = {**row, "layer": int(layer), "head": int(head or 0)}
        at = tuple(result[dim].values.tolist().index(entry[dim]) for dim in result.dims)
        words = [str(row[key]) for key in ("kind", "label", "position") if key in row]
        words[0] = kind_label(words[0])
        share = "" if math.isnan(row["share"]) else f" ({_percent(row['share'])})"
        found.append((f"{', '.join(words)}: {number(row['value'])}{share}", at))
    return found


def cell_table(result: xr.DataArray, task: Task, at: tuple[int, ...]) -> str:
    """The numbers of the cell at ``at``, with a sentence that says what was patched there."""
    cell = result.isel(dict(zip(result.dims, at, strict=True)))
    clean, corrupted = (result.attrs[f"{which}_baseline"] for which in ("clean", "corrupted"))
    value = float(cell)
    where = ", ".join(
        entries(result, str(dim))[index]
        if dim == "kind"
        else f"{dim} {entries(result, str(dim))[index]}"
        for dim, index in zip(result.dims, at, strict=True)
    )
    if "position" in result.dims:
        place = at[result.dims.index("position")]
        one, other = (rows[0][place] for rows in (task.clean_strings, task.corrupted_strings))
        where += f", where the clean prompt has {one!r} and the corrupted one {other!r}"
    if math.isnan(value):
        where += ": no such head: heads of this model share keys and values"
    elif "agrees" in cell.coords and bool(cell["agrees"]):
        where += ": the prompts agree up to here, so there is nothing to patch"
    there = not math.isnan(value)
    share = (value - corrupted) / (clean - corrupted) if clean != corrupted else math.nan
    rows = {
        f"{result.attrs['metric']} ({result.attrs['units']})": number(value) if there else "–",
        "change by the patch": number(value - corrupted) if there else "–",
        "share of clean minus corrupted": "–" if math.isnan(share) else _percent(share),
        "corrupted baseline": number(corrupted),
        "clean baseline": number(clean),
    }
    frame = pd.DataFrame({"this cell": list(rows), "value": list(rows.values())})
    return _coloured(table(frame, f"{where[0].upper()}{where[1:]}.").markup)


def heatmap_table(result: xr.DataArray, chosen: tuple[int, ...]) -> str:
    """The whole result as one or several tables whose cells are coloured by the effect.

    Args:
        result: as :func:`patching_demo.sweep` gives it.
        chosen: the place along the result's dimensions of the cell to outline.
    """
    attrs = result.attrs
    clean, corrupted = attrs["clean_baseline"], attrs["corrupted_baseline"]
    column_dim = "position" if "position" in result.dims else "head"
    row_dims = [d for d in ("layer", "head") if d in result.dims and d != column_dim]
    lead = [d for d in result.dims if d == "kind"]
    values = result.transpose(*lead, *row_dims, column_dim).values.astype(float)
    sizes = [result.sizes[d] for d in row_dims]
    values = values.reshape(-1, int(np.prod(sizes)), result.sizes[column_dim])
    agrees = np.zeros(values.shape[2], dtype=bool)
    if column_dim == "position":
        agrees = result["agrees"].values
    effect = np.where(agrees, np.nan, values - corrupted)
    reach = max(abs(clean - corrupted), float(np.nanmax(np.abs(effect), initial=0.0))) or 1.0
    toward_clean = -1.0 if clean < corrupted else 1.0
    colours = _colours(toward_clean * effect / reach)
    at = dict(zip(result.dims, chosen, strict=True))
    chosen_row = int(np.ravel_multi_index([at[d] for d in row_dims], sizes))
    rows, note = np.arange(values.shape[1]), ""
    if len(rows) > MOST_ROWS:
        largest = np.nan_to_num(np.abs(effect), nan=-1.0).max(axis=(0, 2))
        rows = np.argsort(-largest, kind="stable")[:MOST_ROWS]
        if chosen_row not in rows:
            rows = np.append(rows, chosen_row)
        note = f" Of {values.shape[1]} heads, those with the largest effects, largest first."
    if row_dims == ["layer"]:
        names = [f"layer {layer}" for layer in result["layer"].values]
    else:
        names = [str(name) for name in result["head_label"].values.ravel()]
    # All cells have as many decimals, enough to tell a hundredth of the range.
    decimals = max(0, 1 - math.floor(math.log10(reach)))
    body = "".join(
        _panel(
            panel,
            values[i],
            colours[i],
            agrees,
            rows,
            names,
            entries(result, column_dim),
            column_dim,
            (chosen_row, at[column_dim]) if at.get("kind", 0) == i else None,
            decimals,
        )
        for i, panel in enumerate(entries(result, "kind") if lead else [""])
    )
    title = f"{attrs['metric']}: {attrs['what']}, {attrs['each']}."
    also = " Hatched: the prompts agree, nothing to patch." if agrees.any() else ""
    also += " Grey: no such head, as heads share keys and values." if np.isnan(values).any() else ""
    return (
        f'<div class="tex2jax_ignore mathjax_ignore" style="color:{_TEXT_COLOUR};line-height:1.3">'
        "<p style='margin:4px 0;white-space:normal'>"
        f"<b>{_plain(title[0].upper() + title[1:])}</b>{_plain(note)}</p>"
        f"{_legend(clean, corrupted, reach, toward_clean, also)}"
        '<div role="region" aria-label="heatmap" tabindex="0" '
        'style="overflow-x:auto;display:flex;flex-wrap:wrap;gap:4px 20px">'
        f"{body}</div></div>"
    )


def _panel(
    name: str,
    values: np.ndarray,
    colours: np.ndarray,
    agrees: np.ndarray,
    rows: np.ndarray,
    row_names: list[str],
    columns: list[str],
    column_dim: str,
    chosen: tuple[int, int] | None,
    decimals: int,
) -> str:
    """One table: a row per layer or head, a column per position or head."""
    head = '<th scope="col"></th>' + "".join(
        f'<th scope="col" style="{_HEAD};text-align:center" title="{html.escape(column)}">'
        f"{_plain(_heading(column, column_dim))}</th>"
        for column in columns
    )
    lines = []
    for row in rows:
        cells = []
        for place, value in enumerate(values[row]):
            words = f"{row_names[row]}, {column_dim} {columns[place]}: "
            if math.isnan(value):
                look, text, words = f"background:{theme.GAP}", "", words + "no such head"
            elif agrees[place]:
                look, text, words = _HATCHED, "=", words + "prompts agree, nothing to patch"
            else:
                look, text = colours[row, place], _rounded(value, decimals)
                words += number(float(value))
            marked = chosen == (row, place)
            outline = ";outline:3px solid #d81b60;outline-offset:-2px" if marked else ""
            current = ' aria-current="true"' if marked else ""
            cells.append(
                f'<td style="{_CELL};{look}{outline}" title="{html.escape(words)}"{current}>'
                f"{text}</td>"
            )
        lead = f'<th scope="row" style="{_HEAD}">{_plain(row_names[row])}</th>'
        lines.append(f"<tr>{lead}{''.join(cells)}</tr>")
    caption = f"<caption><b>{_plain(name)}</b></caption>" if name else ""
    return (
        '<table class="patching-heatmap" style="border-collapse:separate;border-spacing:1px">'
        f"{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _legend(clean: float, corrupted: float, reach: float, toward_clean: float, also: str) -> str:
    """The colours from end to end, with the numbers they stand for."""
    stops = ",".join(f"{colour} {at:.0%}" for at, colour in theme.DIVERGING)
    ends = [number(corrupted + toward_clean * side * reach) for side in (-1, 1)]
    words = (
        f"{ends[0]} (away from clean)",
        f"{number(corrupted)}, the corrupted baseline",
        f"{ends[1]} (towards clean)",
    )
    labels = "".join(f"<span>{_plain(word)}</span>" for word in words)
    return (
        '<div style="max-width:560px;font-size:12px;line-height:1.4">'
        f'<div aria-hidden="true" style="height:10px;background:linear-gradient(90deg,{stops})">'
        '</div><div style="display:flex;justify-content:space-between;gap:8px">'
        f"{labels}</div><div>Clean baseline: {number(clean)}.{also}</div></div>"
    )


def _colours(share: np.ndarray) -> np.ndarray:
    """CSS for each cell: background, and an ink that can be read on it."""
    flat = np.nan_to_num(share, nan=0.0).clip(-1, 1).ravel() / 2 + 0.5
    found = []
    for red, green, blue in sample_colorscale(theme.DIVERGING, flat.tolist(), colortype="tuple"):
        ink = "#1a1a1a" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "#ffffff"
        levels = (round(255 * level) for level in (red, green, blue))
        found.append("background:#{:02x}{:02x}{:02x};color:{}".format(*levels, ink))
    return np.array(found, dtype=object).reshape(share.shape)


def _heading(column: str, column_dim: str) -> str:
    if column_dim == "head":
        return f"H{column}"
    word, _, place = theme.short_label(column).rpartition(" ")
    return f"{word}\n{place}"


def _rounded(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return (text if text.strip("-0.") else text.lstrip("-")).replace("-", "−")


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %").replace("-", "−")


def _coloured(markup: str) -> str:
    # Tables take the page's own colour of text, which a dark page may not pass on to widgets, and
    # the height of their lines, which in a widget is that of a button.
    return f'<div style="color:{_TEXT_COLOUR};line-height:1.3">{markup}</div>'


def _plain(text: str) -> str:
    """Text that is shown as text: no dollar stands beside another, so none encloses a formula."""
    return html.escape(text).replace("$", "<span>$</span>")
