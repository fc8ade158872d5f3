"""What the panel shows, as HTML that every version of ipywidgets can display.

Nothing here holds state or runs a model: a labelled sweep goes in, markup comes out. Whatever a
reader typed is shown as text, neither as markup nor as a formula.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from plotly.colors import sample_colorscale

from patching_demo.engine.kinds import kind_label
from patching_demo.plots import theme
from patching_demo.plots.facts import (
    baseline_names,
    entries_of,
    entry_name,
    what_is_one_patch,
    what_was_patched,
)
from patching_demo.plots.panels import largest_rows
from patching_demo.plots.tables import pairs_table, scoped, table
from patching_demo.plots.theme import as_html, number, percent
from patching_demo.results import baselines_are_equal, largest_cells
from patching_demo.tasks import Task

#: So many rows of heads are shown, the ones with the largest effects.
MOST_ROWS = 30
#: So many effects are listed in words.
LARGEST = 8
#: Chooses a cell of the picture by a click or an arrow key: its place goes into the panel's hidden
#: text field, by which the kernel hears of it. The picture that comes back takes the focus again.
CHOOSE = """\
const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
const step = steps[event.key];
let cell = event.target.closest('td');
if (event.key) {
  if (!step) return;
  event.preventDefault();
  event.stopPropagation();
  const now = this.querySelector('td [aria-current]').closest('td');
  const row = now.closest('table').rows[now.parentNode.rowIndex + step[0]];
  cell = row?.cells[now.cellIndex + step[1]];
}
const at = cell?.querySelector('[data-at]')?.dataset.at;
if (!at) return;
const host = this.closest('.widget-html');
new MutationObserver((_, watching) => {
  const picture = host.querySelector('[data-picture]');
  if (!picture) return;
  watching.disconnect();
  picture.focus({preventScroll: true});
  picture.querySelector('[aria-current]').scrollIntoView({block: 'nearest', inline: 'nearest'});
}).observe(host, {childList: true, subtree: true});
const field = this.closest('.patching-panel').querySelector('.patching-picked input');
field.value = at;
field.dispatchEvent(new Event('input', {bubbles: true}));"""

# Notebooks set it for light and dark pages; where nobody does, the page's own colour is inherited.
# A widget's lines would be as high as its buttons.
_TEXT = "color:var(--jp-content-font-color1, inherit);line-height:1.3;white-space:normal"
_HATCHED = (
    f"background:repeating-linear-gradient(45deg,{theme.BAND} 0 4px,{theme.HATCH} 4px 6px);"
    "color:transparent"
)
_CHOSEN = ";outline:3px solid #d81b60;outline-offset:-2px"
_STYLES = [
    {"selector": "", "props": "border-collapse:separate;border-spacing:1px;font-size:11px"},
    {"selector": "td", "props": "padding:1px 3px;min-width:32px;height:19px;text-align:center"},
    {"selector": "td span", "props": "display:block"},
    {
        "selector": "th",
        "props": "padding:1px 5px;font-weight:normal;white-space:pre;text-align:right",
    },
    {"selector": "th.col_heading", "props": "text-align:center"},
    {"selector": "caption", "props": "font-weight:bold"},
]


def _text_block(markup: str) -> str:
    return f'<div class="tex2jax_ignore mathjax_ignore" style="{_TEXT}">{markup}</div>'


def paragraph(head: str, words: str) -> str:
    """A paragraph, with ``head`` in bold before it unless that is empty."""
    bold = f"<b>{as_html(head)}:</b> " if head else ""
    return _text_block(f'<p style="margin:4px 0;overflow-wrap:anywhere">{bold}{as_html(words)}</p>')


def prompts_table(prompts: Sequence[Sequence[int]], strings: Sequence[Sequence[str]]) -> str:
    """A clean and a corrupted prompt token by token, also where their lengths differ.

    Args:
        prompts: the tokens of both.
        strings: what each token says.
    """
    caption = "Your prompts, token by token; where they differ is marked."
    return _text_block(pairs_table([(strings, prompts)], ("clean", "corrupted"), caption).markup)


def entries(result: xr.DataArray, dim: str) -> list[str]:
    """What the entries along a dimension are called."""
    return [entry_name(dim, entry).replace("\n", "\\n") for entry in entries_of(result, dim)]


def largest_effects(result: xr.DataArray) -> list[tuple[str, tuple[int, ...]]]:
    """The largest effects in words, each with its place along the result's dimensions."""
    found = []
    for row in largest_cells(result, LARGEST).to_dict("records"):
        layer, head = re.fullmatch(r"L(\d+)(?:H(\d+))?", row["label"]).groups()
        entry = {**row, "layer": int(layer), "head": int(head or 0)}
        at = tuple(result[dim].values.tolist().index(entry[dim]) for dim in result.dims)
        words = [str(row[key]) for key in ("kind", "label", "position", "role") if key in row]
        words[0] = kind_label(words[0])
        share = "" if math.isnan(row["share"]) else f" ({percent(row['share'])})"
        found.append((f"{', '.join(words)}: {number(row['value'])}{share}", at))
    return found


def cell_table(result: xr.DataArray, task: Task, at: tuple[int, ...]) -> str:
    """The numbers of the cell at ``at``, with a sentence that says what was patched there."""
    cell = result.isel(dict(zip(result.dims, at, strict=True)))
    clean, corrupted = (result.attrs[f"{which}_baseline"] for which in ("clean", "corrupted"))
    value = float(cell)
    named = {str(dim): entries(result, str(dim))[i] for dim, i in zip(result.dims, at, strict=True)}
    where = ", ".join(name if dim == "kind" else f"{dim} {name}" for dim, name in named.items())
    source, target = baseline_names(result)
    if "position" in result.dims or "role" in result.dims:
        places = (
            [at[result.dims.index("position")]] * 2
            if "position" in result.dims
            else [int(own[0]) for own in task.roles[cell["role"].item()]]
        )
        strings = (task.clean_strings[0], task.corrupted_strings[0])
        one, other = (row[place] for row, place in zip(strings, places, strict=True))
        where += f", where the {source} prompt has {one!r} and the {target} one {other!r}"
    if math.isnan(value):
        where += f": no value. {why_missing(result)}"
    elif "agrees" in cell.coords and bool(cell["agrees"]):
        where += ": the prompts agree up to here, so there is nothing to patch"
    equal = baselines_are_equal(result)
    share = math.nan if equal else (value - corrupted) / (clean - corrupted)
    rows = {
        f"{result.attrs['metric']} ({result.attrs['units']})": _or_dash(number, value),
        "change by the patch": _or_dash(number, value - corrupted),
        f"share of {source} minus {target}": _or_dash(percent, share),
        f"{target} baseline": number(corrupted),
        f"{source} baseline": number(clean),
    }
    frame = pd.DataFrame({"this cell": list(rows), "value": list(rows.values())})
    return _text_block(table(frame, f"{where[0].upper()}{where[1:]}.").markup)


def why_missing(result: xr.DataArray) -> str:
    """Why cells of a result may have no value."""
    if result.attrs["by"] == "path":
        return "No path leads from there to the receiver."
    return "This model has no such head, as heads share keys and values, or its hook is dead."


def _or_dash(written: Any, value: float) -> str:
    return "–" if math.isnan(value) else written(value)


def heatmap_table(result: xr.DataArray, chosen: tuple[int, ...]) -> str:
    """The whole result as one or several tables whose cells are coloured by the effect.

    Args:
        result: as :func:`patching_demo.sweep` returns it.
        chosen: the place along the result's dimensions of the cell to outline.
    """
    attrs = result.attrs
    clean, corrupted = attrs["clean_baseline"], attrs["corrupted_baseline"]
    across = next(d for d in ("position", "role", "head") if d in result.dims)
    down = [d for d in ("layer", "head") if d in result.dims and d != across]
    lead = [d for d in result.dims if d == "kind"]
    sizes = [result.sizes[d] for d in down]
    values = result.transpose(*lead, *down, across).values.astype(float)
    values = values.reshape(-1, int(np.prod(sizes)), result.sizes[across])
    agrees = np.zeros(values.shape[2], dtype=bool)
    if across != "head":
        agrees = result["agrees"].values
    effect = np.where(agrees, np.nan, values - corrupted)
    reach = max(abs(clean - corrupted), float(np.nanmax(np.abs(effect), initial=0.0))) or 1.0
    toward_clean = -1.0 if clean < corrupted else 1.0
    looks = _colours(toward_clean * effect / reach)
    looks[np.isnan(values)] = f"background:{theme.GAP}"
    looks[..., agrees] = _HATCHED
    at = dict(zip(result.dims, chosen, strict=True))
    here = (at.get("kind", 0), int(np.ravel_multi_index([at[d] for d in down], sizes)), at[across])
    looks[here] += _CHOSEN
    rows, note = np.arange(values.shape[1]), ""
    if len(down) > 1 and len(rows) > MOST_ROWS:  # Layers stay in their order.
        rows = largest_rows(effect, MOST_ROWS)
        rows = rows if here[1] in rows else np.append(rows, here[1])
        note = f" Of {values.shape[1]} heads, those with the largest effects, largest first."
    if down == ["layer"]:
        names = [f"layer {layer}" for layer in result["layer"].values]
    else:
        names = [str(name) for name in result["head_label"].values.ravel()]
    columns = entries(result, across)
    # All cells have as many decimals, enough to tell a hundredth of the range.
    decimals = max(0, 1 - math.floor(math.log10(reach)))

    def cell(place: tuple[int, int, int]) -> str:
        value, words = float(values[place]), f"{names[place[1]]}, {across} {columns[place[2]]}: "
        if math.isnan(value):
            text, words = "", words + "no value"
        elif agrees[place[2]]:
            text, words = "=", words + "prompts agree, nothing to patch"
        else:
            text, words = theme.signed(f"{value:.{decimals}f}"), words + number(value)
        current = ' aria-current="true"' if place == here else ""
        under = dict(zip(down, np.unravel_index(place[1], sizes), strict=True))
        under |= {"kind": place[0], across: place[2]}
        index = ",".join(str(under[dim]) for dim in result.dims)
        return f'<span title="{html.escape(words)}"{current} data-at="{index}">{text}</span>'

    tables = []
    for panel, caption in enumerate(entries(result, "kind") if lead else [""]):
        marked = [[cell((panel, row, column)) for column in range(len(columns))] for row in rows]
        frame = pd.DataFrame(marked, index=[names[row] for row in rows])
        heads = [_heading(column, across) for column in columns]
        tables.append(_styled(frame, looks[panel, rows], heads, caption))
    facts = filter(None, (what_was_patched(result), what_is_one_patch(result)))
    title = f"{attrs['metric']}: {', '.join(facts)}."
    title = title[0].upper() + title[1:]
    also = " Hatched: the prompts agree, nothing to patch." if agrees.any() else ""
    choose = html.escape(CHOOSE)
    also += f" Grey: no value. {why_missing(result)}" * bool(np.isnan(values).any())
    return _text_block(
        f"<p style='margin:4px 0'><b>{as_html(title)}</b>"
        f"{note}</p>{_legend(result, reach, toward_clean, also)}"
        '<div role="region" aria-label="heatmap: a click or an arrow key chooses a cell" '
        f'data-picture tabindex="0" onclick="{choose}" onkeydown="{choose}" style="cursor:pointer;'
        f'overflow-x:auto;display:flex;flex-wrap:wrap;gap:4px 20px">{"".join(tables)}</div>'
    )


def attention_table(patterns: xr.DataArray, layer: int, head: int, which: str) -> str:
    """Where a head attends from each token of a prompt, as a table of coloured cells.

    Args:
        patterns: as :func:`patching_demo.results.attention` returns them.
        layer: of the head.
        head: its number.
        which: the prompt's name, such as "clean".
    """
    weights = patterns.sel(layer=layer, head=head).values
    labels = entries(patterns, "key")
    looks = _colours(weights, theme.SEQUENTIAL)
    marked = [
        [f'<span title="{html.escape(f"from {a} to {b}")}">{100 * weight:.0f}</span>'
         for weight, b in zip(row, labels, strict=True)]
        for row, a in zip(weights, labels, strict=True)
    ]  # fmt: skip
    hidden = ~np.tri(len(labels), dtype=bool) & (weights == 0)
    looks[hidden] = "color:transparent"
    heads = [_heading(label, "position") for label in labels]
    caption = f"L{layer}H{head} in the {which} prompt: attention of each row's token, in percent"
    return _text_block(
        f'<div role="region" aria-label="{html.escape(caption)}" tabindex="0" '
        f'style="overflow-x:auto">'
        f"{_styled(pd.DataFrame(marked, index=labels), looks, heads, caption)}</div>"
    )


def _styled(frame: pd.DataFrame, looks: np.ndarray, heads: Sequence[str], caption: str) -> str:
    """One table of cells that are markup already, with the CSS of each."""
    css = pd.DataFrame(looks, index=frame.index, columns=frame.columns)
    style = frame.style.apply(lambda _: css, axis=None).set_table_styles(_STYLES)
    style = style.format_index(as_html, axis="index")
    style = style.format_index(lambda column: heads[column], axis="columns")
    if caption:
        style = style.set_caption(as_html(caption))
    table_of_cells = style.to_html(table_attributes='class="patching-heatmap"')
    return f"<div>{scoped(table_of_cells)}</div>"


def _legend(result: xr.DataArray, reach: float, toward_clean: float, also: str) -> str:
    """The colours from end to end, with the numbers they stand for."""
    clean, corrupted = (result.attrs[f"{which}_baseline"] for which in ("clean", "corrupted"))
    source, target = baseline_names(result)
    stops = ",".join(f"{colour} {at:.0%}" for at, colour in theme.DIVERGING)
    away, towards = (number(corrupted + toward_clean * side * reach) for side in (-1, 1))
    labels = (
        f"<span>{away} (away from {source})</span><span>{number(corrupted)}, the {target} baseline"
        f"</span><span>{towards} (towards {source})</span>"
    )
    return (
        '<div style="max-width:560px;font-size:12px">'
        f'<div aria-hidden="true" style="height:10px;background:linear-gradient(90deg,{stops})">'
        '</div><div style="display:flex;justify-content:space-between;gap:8px">'
        f"{labels}</div><div>{source.capitalize()} baseline: {number(clean)}.{also}</div></div>"
    )


def _colours(share: np.ndarray, scale: Any = theme.DIVERGING) -> np.ndarray:
    """CSS for each cell: background, and an ink that can be read on it.

    ``share`` is from -1 to 1 on the diverging scale, from 0 to 1 on another.
    """
    flat = np.nan_to_num(share, nan=0.0).clip(-1, 1).ravel()
    flat = flat / 2 + 0.5 if scale is theme.DIVERGING else flat
    found = []
    for red, green, blue in sample_colorscale(scale, flat.tolist(), colortype="tuple"):
        ink = "#1a1a1a" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "#ffffff"
        levels = (round(255 * level) for level in (red, green, blue))
        found.append("background:#{:02x}{:02x}{:02x};color:{}".format(*levels, ink))
    return np.array(found, dtype=object).reshape(share.shape)


def _heading(column: str, across: str) -> str:
    if across == "head":
        return f"H{column}"
    if across == "role":
        return as_html(column)
    word, _, place = theme.short_label(column).rpartition(" ")
    return f'<span title="{html.escape(column)}">{as_html(word)}\n{as_html(place)}</span>'
