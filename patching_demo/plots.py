"""Figures of labelled results, drawn without further arguments.

Every figure is a plain plotly figure that adapts to its column, names what was patched into what
and which baselines bound the scale, and carries in ``layout.meta`` a text for screen readers
("alt") and a sentence on how to read it ("caption"). Token text is always shown as text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr

from patching_demo import style
from patching_demo.results import combine, largest_cells
from patching_demo.results import share as to_share
from patching_demo.style import compact, escape, number
from patching_demo.tables import table, tokens_table

__all__ = [
    "attention_patterns",
    "bars",
    "curves",
    "explore",
    "heatmap",
    "table",
    "tokens_table",
]

#: What a kind of activation is called in a figure.
KIND_NAMES = {
    "resid_pre": "resid_pre",
    "attn_out": "attn_out",
    "resid_mid": "resid_mid",
    "mlp_out": "mlp_out",
    "resid_post": "resid_post",
    "out": "output",
    "q": "query",
    "k": "key",
    "v": "value",
    "pattern": "pattern",
}

_CELL_DIMS = ("layer", "head", "position")
# Wider than this, panels go below each other, as their labels would not be readable.
_MAX_COLUMNS = 48
_AGREE = "clean and corrupted agree here: nothing to patch"


@dataclass(frozen=True)
class _Axis:
    """Rows or columns of a heatmap: a name in words for each, and what stands on the axis."""

    words: list[str]
    ticks: list[str]
    title: str


@dataclass(frozen=True)
class _Panel:
    """One heatmap of a figure."""

    name: str
    kind: str
    grid_row: int
    grid_column: int
    values: np.ndarray  # [row, column]
    agree: int  # the first `agree` columns have nothing to patch


def heatmap(
    result: xr.DataArray,
    *,
    title: str | None = None,
    caption: str | None = None,
    top: int | None = 30,
    collapse: bool | None = None,
) -> go.Figure:
    """A sweep as a heatmap, or as several side by side with one colour scale.

    Colours centre on the corrupted baseline and reach as far as the clean one (further if an
    effect does): blue is towards the clean run, orange away from it. Grey cells do not exist,
    hatched positions have nothing to patch.

    Args:
        result: from :func:`patching_demo.sweep` or :func:`patching_demo.combine`, with
            dimensions among ``layer``, ``position`` and ``head`` and up to two others, which
            become panels. With all three, rows are heads (L9H6) and columns are positions.
        title: instead of the one made from the result's attributes.
        caption: instead of the sentence on how to read the figure.
        top: of more rows than this, only so many with the largest effects are drawn, largest
            first; a button shows all. None draws all.
        collapse: draw the positions that agree as one column; by default where there are
            several panels.

    Raises:
        ValueError: if there is nothing to draw, or the dimensions or attributes do not fit.
    """
    clean, centre = _baselines(result)
    panels, rows, columns = _panels(result)
    if collapse or (collapse is None and len(panels) > 1):
        panels, columns = _collapsed(panels, columns)
    grid = _Grid(panels, rows, columns)
    panels = grid.panels
    effect = np.stack([_effect(panel, centre) for panel in panels])
    if not (effect >= 0).any():
        raise ValueError("the result has no cell with a number in it: there is nothing to draw")
    order = np.argsort(-effect.max(axis=(0, 2)), kind="stable")
    every = np.arange(len(rows.words))
    trimmed = top is not None and len(every) > top
    views = [order[:top], every] if trimmed else [every]
    traces: list[Any] = []
    for shown, view in enumerate(views):
        for panel in panels:
            traces += _panel_traces(result, panel, rows, columns, view, visible=shown == 0)
    main, below = _title_of(result, title)
    heading, heading_height = style.title(main, below)
    scale = _Scale(clean, centre, float(effect.max()))
    # From the plot upwards: names of panels, colour bar, menus, title.
    over_names = _NAME_HEIGHT * grid.has_names
    over_bar = over_names + _BAR_HEIGHT
    margin = heading_height + _MENU_HEIGHT * (trimmed + scale.small) + over_bar
    heights = [margin + grid.height(len(view)) + grid.bottom for view in views]
    layouts = [
        {
            **grid.layout(view, trimmed and i == 0),
            "height": heights[i],
            "coloraxis": {"colorbar": {"y": 1 - (margin - over_bar) / heights[i]}},
        }
        for i, view in enumerate(views)
    ]
    menus: list[dict[str, Any]] = []
    if trimmed:
        names = (f"the {top} rows with the largest effects", f"all {len(every)}")
        per_view = len(traces) // len(views)
        visible = [[j // per_view == i for j in range(len(traces))] for i in range(len(views))]
        buttons = [
            {"label": name, "method": "update", "args": [{"visible": shown}, _flat(layout)]}
            for name, shown, layout in zip(names, visible, layouts, strict=True)
        ]
        menus.append(_menu(buttons, over_bar + 8))
    if scale.small:
        menus.append(_menu(scale.buttons(), over_bar + 8 + _MENU_HEIGHT * trimmed))
    figure = go.Figure(traces)
    figure.update_layout(
        **_base(heading),
        coloraxis={"colorscale": style.DIVERGING, **scale.wide()},
        margin={
            "l": grid.left,
            "r": 26,
            "t": margin,
            "b": grid.bottom,
            "pad": 0,
            "autoexpand": False,
        },
        plot_bgcolor=style.GAP,
        updatemenus=menus,
        annotations=grid.annotations(),
        shapes=grid.hatching(len(views[0])),
        meta={
            "alt": _alt(result, main, below, panels, rows, columns),
            "caption": caption or _caption(result, panels, len(views[0]) if trimmed else 0),
        },
    )
    figure.update_layout(layouts[0])
    figure.update_coloraxes(colorbar=_BAR)
    return figure


def _baselines(result: xr.DataArray) -> tuple[float, float]:
    if not isinstance(result, xr.DataArray):
        raise TypeError(f"a figure needs a labelled result (xarray), got {type(result).__name__}")
    try:
        return float(result.attrs["clean_baseline"]), float(result.attrs["corrupted_baseline"])
    except KeyError as error:
        raise ValueError(
            f"the result has no attribute {error}: arithmetic on it may have dropped the "
            "attributes (xarray.set_options(keep_attrs=True) keeps them)"
        ) from None


def _panels(result: xr.DataArray) -> tuple[list[_Panel], _Axis, _Axis]:
    cell_dims = [d for d in _CELL_DIMS if d in result.dims]
    lead = [str(d) for d in result.dims if d not in cell_dims]
    if len(cell_dims) < 2:
        raise ValueError(
            f"a heatmap needs two of layer, position and head, got {list(result.dims)}: draw it "
            "with curves or bars"
        )
    if len(lead) > 2:
        raise ValueError(f"panels can show two further dimensions, got {lead}: select from one")
    if result.size == 0:
        raise ValueError(f"the result is empty: {dict(result.sizes)}")
    column_dim = cell_dims[-1] if "position" in cell_dims else "head"
    row_dims = [d for d in cell_dims if d != column_dim]
    rows, columns = _row_axis(result, row_dims), _column_axis(result, column_dim)
    stacked = result.transpose(*lead, *row_dims, column_dim)
    sizes = [result.sizes[d] for d in lead]
    panels = []
    for where in itertools.product(*map(range, sizes)):
        at = dict(zip(lead, where, strict=True))
        part = stacked.isel(at)
        values = part.values.reshape(-1, len(columns.words)).astype(float)
        agree = 0
        if column_dim == "position" and "agrees" in part.coords:
            agree = int(part["agrees"].values.sum())
        names = [_entry_name(d, part[d].item() if d in part.coords else i) for d, i in at.items()]
        kind = str(part["kind"].item()) if "kind" in part.coords else result.attrs.get("kind", "")
        spot = where if len(lead) == 2 else (0, where[0] if where else 0)
        panels.append(_Panel(" · ".join(names), kind, spot[0], spot[1], values, agree))
    return panels, rows, columns


def _entry_name(dim: str, value: Any) -> str:
    return KIND_NAMES.get(str(value), str(value)) if dim == "kind" else str(value)


def _row_axis(result: xr.DataArray, dims: list[str]) -> _Axis:
    index = [_values(result, d) for d in dims]
    if dims == ["layer"]:
        return _Axis([f"layer {i}" for i in index[0]], [str(i) for i in index[0]], "layer")
    if dims == ["head"]:
        return _Axis([f"head {i}" for i in index[0]], [str(i) for i in index[0]], "head")
    pairs = list(itertools.product(*index))
    return _Axis(
        [f"layer {i}, head {j}" for i, j in pairs], [f"L{i}H{j}" for i, j in pairs], "head"
    )


def _column_axis(result: xr.DataArray, dim: str) -> _Axis:
    values = _values(result, dim)
    if dim == "head":
        return _Axis([f"head {i}" for i in values], [str(i) for i in values], "head")
    tokens = result["token"].values if "token" in result.coords else [None] * len(values)
    words = []
    for place, (label, token) in enumerate(zip(values, tokens, strict=True)):
        number_ = str(label).rpartition(" ")[2]
        place = int(number_) if number_.isdigit() else place
        shown = label if token is None else token
        words.append(f"position {place} '{escape(shown)}'")
    return _Axis(words, [escape(style.short_label(str(v))) for v in values], "position")


def _values(result: xr.DataArray, dim: str) -> list[Any]:
    return result[dim].values.tolist() if dim in result.coords else list(range(result.sizes[dim]))


def _collapsed(panels: list[_Panel], columns: _Axis) -> tuple[list[_Panel], _Axis]:
    """Positions that agree in every panel, drawn as one column."""
    agree = min(panel.agree for panel in panels)
    if agree < 3:
        return panels, columns
    first, last = columns.words[0], columns.words[agree - 1]
    words = [f"{first} to {last}", *columns.words[agree:]]
    ticks = [f"0–{agree - 1}", *columns.ticks[agree:]]
    kept = [
        _Panel(
            p.name, p.kind, p.grid_row, p.grid_column, p.values[:, agree - 1 :], p.agree - agree + 1
        )
        for p in panels
    ]
    return kept, _Axis(words, ticks, columns.title)


def _effect(panel: _Panel, centre: float) -> np.ndarray:
    """How far each cell is from the corrupted baseline; -1 where there is no cell."""
    effect = np.nan_to_num(np.abs(panel.values - centre), nan=-1.0)
    effect[:, : panel.agree] = -1.0
    return effect


def _panel_traces(
    result: xr.DataArray,
    panel: _Panel,
    rows: _Axis,
    columns: _Axis,
    view: np.ndarray,
    *,
    visible: bool,
) -> list[Any]:
    """The measured cells, and those at which there is nothing to patch."""
    axis = _axis_number(panel)
    shared = {
        "y": [rows.words[i] for i in view],
        "xaxis": f"x{axis}",
        "yaxis": f"y{axis}",
        "visible": visible,
        "hoverongaps": False,
    }
    values = panel.values[view].copy()
    values[:, : panel.agree] = np.nan
    clean, centre = _baselines(result)
    name = f"{escape(panel.name)}<br>" if panel.name else ""
    grouped = _grouped_heads(result, panel)
    template = f"{name}%{{y}}, %{{x}}{grouped}<br>{_metric_words(result)}: %{{z:.3~g}}"
    more: dict[str, Any] = {}
    if clean == centre:
        pass
    elif (clean, centre) == (1.0, 0.0):
        template += " (%{z:.0%} of clean minus corrupted)"
    else:
        template += " (%{customdata:.0%} of clean minus corrupted)"
        more["customdata"] = compact((values - centre) / (clean - centre), digits=3)
    traces: list[Any] = [
        go.Heatmap(
            z=compact(values),
            x=columns.words,
            coloraxis="coloraxis",
            hovertemplate=template + "<extra></extra>",
            name=escape(panel.name),
            xgap=1,
            ygap=1,
            **more,
            **shared,
        )
    ]
    if panel.agree:
        traces.append(
            go.Heatmap(
                z=np.zeros((len(view), panel.agree), dtype=np.int8),
                x=columns.words[: panel.agree],
                colorscale=[[0, style.BAND], [1, style.BAND]],
                showscale=False,
                hovertemplate=f"%{{x}}<br>{_AGREE}<extra></extra>",
                name="nothing to patch",
                **shared,
            )
        )
    return traces


def _axis_number(panel: _Panel) -> str:
    # Two panels never share an axis: each can be zoomed, and the first is plain "x" and "y".
    index = panel.grid_row * 100 + panel.grid_column
    return "" if index == 0 else str(index + 1)


def _metric_words(result: xr.DataArray) -> str:
    return escape(result.attrs.get("metric", "metric"))


def _grouped_heads(result: xr.DataArray, panel: _Panel) -> str:
    key_value = int(result.attrs.get("n_key_value_heads", 0) or 0)
    if panel.kind in ("k", "v") and 0 < key_value < result.sizes.get("head", key_value):
        return " (key-value head)"
    return ""


class _Grid:
    """Where the panels of a figure stand, in fractions of a plot of known height."""

    def __init__(self, panels: list[_Panel], rows: _Axis, columns: _Axis) -> None:
        self.rows, self.columns = rows, columns
        across = max(p.grid_column for p in panels) + 1
        down = max(p.grid_row for p in panels) + 1
        width = len(columns.words)
        if down == 1 and across * width > _MAX_COLUMNS:
            fit = max(1, min(across, _MAX_COLUMNS // width))
            down = math.ceil(across / fit)
            across = math.ceil(across / down)
            panels = [_replaced(p, i // across, i % across) for i, p in enumerate(panels)]
        self.panels, self.across, self.down = panels, across, down
        self.axes = [_axis_number(p) for p in panels]
        self.has_names = any(p.name for p in panels)
        longest = max(len(_visible(t)) for t in rows.ticks)
        self.left = 22 + 7 * longest
        label = max(len(_visible(t)) for t in columns.ticks)
        self.turned = columns.title == "position"
        self.bottom = int(6.0 * label + 12) if self.turned else 46
        # Panels below each other repeat their axis only if it cannot be read off the lowest.
        self.between = 26 if self.has_names else 14

    def cell_height(self, n_rows: int) -> int:
        return 22 if n_rows <= 12 else 15 if n_rows <= 40 else 12

    def height(self, n_rows: int) -> int:
        panel = max(n_rows * self.cell_height(n_rows), 44)
        return self.down * panel + (self.down - 1) * self.between

    def layout(self, view: np.ndarray, sorted_rows: bool) -> dict[str, Any]:
        """The axes of every panel for the rows in view."""
        n = len(view)
        total = self.height(n)
        panel_height = (total - (self.down - 1) * self.between) / self.down
        gap = 0.025 if self.across > 1 else 0.0
        panel_width = (1 - gap * (self.across - 1)) / self.across
        step = math.ceil(len(self.columns.words) * self.across / 33)
        x_ticks = np.arange(len(self.columns.words))
        x_ticks = x_ticks[x_ticks % step == 0] if step > 1 else x_ticks
        y_step = 1 if self.cell_height(n) >= 12 and n <= 300 else math.ceil(n / 100)
        if not sorted_rows and self.rows.title == "layer" and n > 16:
            y_step = 2 if n <= 40 else math.ceil(n / 20)
        y_ticks = np.arange(n)[::y_step]
        layout: dict[str, Any] = {}
        for panel, axis in zip(self.panels, self.axes, strict=True):
            row, column = panel.grid_row, panel.grid_column
            top = 1 - row * (panel_height + self.between) / total
            left = column * (panel_width + gap)
            lowest = not any(p.grid_column == column and p.grid_row > row for p in self.panels)
            layout[f"xaxis{axis}"] = {
                **_AXIS,
                "domain": [left, min(1.0, left + panel_width)],
                "anchor": f"y{axis}",
                "range": [-0.5, len(self.columns.words) - 0.5],
                # A tick exactly on a cell would replace the cell's words in the hover text.
                "tickvals": (x_ticks + _OFF).tolist(),
                "ticktext": [self.columns.ticks[i] for i in x_ticks],
                "tickangle": -90 if self.turned else 0,
                "showticklabels": lowest,
                "title": _axis_title(self.columns.title if lowest and not self.turned else ""),
            }
            layout[f"yaxis{axis}"] = {
                **_AXIS,
                "domain": [max(0.0, top - panel_height / total), min(1.0, top)],
                "anchor": f"x{axis}",
                "range": [n - 0.5, -0.5],
                "tickvals": (y_ticks + _OFF).tolist(),
                "ticktext": [self.rows.ticks[view[i]] for i in y_ticks],
                "showticklabels": column == 0,
                "title": _axis_title(
                    self.rows.title if column == 0 and self.rows.title == "layer" else ""
                ),
            }
        return layout

    def annotations(self) -> list[dict[str, Any]]:
        notes = []
        for panel, axis in zip(self.panels, self.axes, strict=True):
            if panel.name:
                notes.append(
                    {
                        "text": escape(panel.name),
                        "xref": f"x{axis} domain",
                        "yref": f"y{axis} domain",
                        "x": 0.5,
                        "y": 1,
                        "yanchor": "bottom",
                        "yshift": 2,
                        "showarrow": False,
                        "font": {"size": 12},
                    }
                )
            if panel.agree >= 5 and len(self.panels) == 1:
                notes.append(
                    {
                        "text": style.wrapped(_AGREE, 21),
                        "xref": f"x{axis}",
                        "yref": f"y{axis} domain",
                        "x": panel.agree / 2 - 0.5,
                        "y": 0.5,
                        "showarrow": False,
                        "font": {"size": 12, "color": "#222222"},
                        "bgcolor": "#e4e4e4",
                        "borderpad": 4,
                        # Hover belongs to the cells below.
                        "captureevents": False,
                    }
                )
        return notes

    def hatching(self, n_rows: int) -> list[dict[str, Any]]:
        panel_height = (self.height(n_rows) - (self.down - 1) * self.between) / self.down
        shapes = []
        for panel, axis in zip(self.panels, self.axes, strict=True):
            if panel.agree:
                shapes.append(
                    {
                        "type": "path",
                        "xref": f"x{axis}",
                        "yref": f"y{axis} domain",
                        "path": self._hatch(panel.agree, panel_height),
                        "line": {"color": style.HATCH, "width": 1},
                        "layer": "above",
                    }
                )
        return shapes

    def _hatch(self, agree: int, panel_height: float) -> str:
        """Slanted lines over the columns that agree, as an SVG path."""
        # The width is the reader's; in a usual column the lines then rise at about 45 degrees.
        width = 640 / self.across * agree / len(self.columns.words)
        rise, spacing = width / panel_height, 13 / panel_height
        right = agree - 0.5
        parts = []
        for start in np.arange(spacing / 2 - rise, 1, spacing):
            # Cut to the panel: where the line enters and leaves, as fractions of its length.
            enter, leave = max(0.0, -start / rise), min(1.0, (1 - start) / rise)
            x0, x1 = (-0.5 + f * (right + 0.5) for f in (enter, leave))
            y0, y1 = (start + f * rise for f in (enter, leave))
            parts.append(f"M{x0:.2f},{y0:.3f}L{x1:.2f},{y1:.3f}")
        return "".join(parts)


# Off the cell's centre by less than a pixel, and by more than plotly's tolerance for "same".
_OFF = 0.04
_AXIS = {
    "type": "category",
    "showgrid": False,
    "zeroline": False,
    "ticks": "",
    "tickmode": "array",
    "tickfont": {"size": 10},
    "automargin": False,
}


def _axis_title(text: str) -> dict[str, Any]:
    return {"text": escape(text), "standoff": 4, "font": {"size": 12}}


def _replaced(panel: _Panel, row: int, column: int) -> _Panel:
    return _Panel(panel.name, panel.kind, row, column, panel.values, panel.agree)


def _visible(text: str) -> str:
    for entity in ("&amp;", "&lt;", "&gt;", "&#36;", "&#37;"):
        text = text.replace(entity, "?")
    return text


@dataclass(frozen=True)
class _Scale:
    """A colour scale symmetric about the corrupted baseline."""

    clean: float
    centre: float
    largest: float

    @property
    def small(self) -> bool:
        """Whether the effects use less than half of the colours."""
        return 0 < self.largest < 0.5 * abs(self.clean - self.centre)

    def wide(self) -> dict[str, Any]:
        return self._part(max(abs(self.clean - self.centre), self.largest) or 1.0)

    def narrow(self) -> dict[str, Any]:
        return self._part(self.largest)

    def buttons(self) -> list[dict[str, Any]]:
        """Buttons that choose how far the colours reach."""
        choices = (
            ("colours up to clean", self.wide()),
            ("up to the largest effect", self.narrow()),
        )
        return [
            {"label": name, "method": "relayout", "args": [_flat({"coloraxis": part})]}
            for name, part in choices
        ]

    def _part(self, half: float) -> dict[str, Any]:
        ticks = {self.centre: f"{number(self.centre)}<br>corrupted"}
        if abs(self.clean - self.centre) <= half * 1.0001 and self.clean != self.centre:
            ticks[self.clean] = f"{number(self.clean)}<br>clean"
        for fraction in (-1, -0.5, 0.5, 1):
            value = self.centre + fraction * half
            if all(abs(value - other) > 0.3 * half for other in ticks):
                ticks[value] = number(value)
        return {
            "cmin": self.centre - half,
            "cmax": self.centre + half,
            "colorbar": {"tickvals": list(ticks), "ticktext": list(ticks.values())},
        }


# A colour bar over the plot: beside it, it would take a third of a telephone's width. Its place
# is given from the container's top, as one tied to the plot makes plotly move the title.
_BAR = {
    "orientation": "h",
    "x": 0.5,
    "xanchor": "center",
    "len": 1,
    "yref": "container",
    "yanchor": "top",
    "ypad": 0,
    "thickness": 12,
    "tickfont": {"size": 11},
    "ticks": "outside",
    "ticklen": 3,
    "outlinewidth": 0,
    "tickmode": "array",
}
_BAR_HEIGHT, _MENU_HEIGHT, _NAME_HEIGHT = 58, 38, 22


def _menu(buttons: list[dict[str, Any]], bottom: int) -> dict[str, Any]:
    return {
        "type": "buttons",
        "direction": "right",
        "buttons": buttons,
        "x": 0,
        "xanchor": "left",
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": bottom, "t": 0, "l": 0, "r": 0},
        "showactive": True,
        **style.MENU,
    }


def _flat(layout: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested layout entries by path, so that an update changes them and keeps their siblings."""
    flat: dict[str, Any] = {}
    for key, value in layout.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _base(heading: str) -> dict[str, Any]:
    return {
        "title": {
            "text": heading,
            "x": 0,
            "xanchor": "left",
            "xref": "container",
            "y": 1,
            "yanchor": "top",
            "yref": "container",
            # The top anchor of a title of several lines is the baseline of its first.
            "pad": {"t": 23, "l": 6},
            "font": {"size": 14},
        },
        "font": {"color": style.INK, "family": "Helvetica Neue, Helvetica, Arial, sans-serif"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "autosize": True,
        "dragmode": False,
        "hoverlabel": {"align": "left"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": style.INK},
        "template": "none",
    }


def _title_of(result: xr.DataArray, given: str | None) -> tuple[str, str]:
    attrs = result.attrs
    what = str(attrs.get("what", "")) or "clean activations patched into the corrupted run"
    main = given if given is not None else what[:1].upper() + what[1:]
    metric = str(attrs.get("metric", ""))
    units = str(attrs.get("units", ""))
    if units and units not in ("share of clean - corrupted", metric):
        metric += f" in {units}"
    below = " · ".join(
        str(x) for x in (*(attrs.get(k) for k in ("each", "model", "task")), metric) if x
    )
    return main, below


def _caption(result: xr.DataArray, panels: list[_Panel], top: int) -> str:
    parts = [
        f"Each cell is the metric ({result.attrs.get('metric', 'unnamed')}) of the corrupted run "
        "after one patch: white means no change, blue a move towards the clean run, orange a move "
        "away"
    ]
    if any(panel.agree for panel in panels):
        parts.append("hatched positions have nothing to patch, as both inputs agree up to there")
    if any(np.isnan(panel.values[:, panel.agree :]).any() for panel in panels):
        parts.append("grey cells do not exist in this model")
    if top:
        parts.append(f"rows are sorted by their largest effect, the first {top} shown")
    return "; ".join(parts) + "."


def _alt(
    result: xr.DataArray,
    main: str,
    below: str,
    panels: list[_Panel],
    rows: _Axis,
    columns: _Axis,
) -> str:
    clean, centre = _baselines(result)
    names = [panel.name for panel in panels if panel.name]
    shape = (
        f"{len(rows.words)} rows ({rows.title}) by {len(columns.words)} columns ({columns.title})"
    )
    text = f"Heatmap. {main} ({below}). {shape}"
    if names:
        text += f", in {len(names)} panels: {style.listed(names)}"
    text += f". Corrupted baseline {number(centre)}, clean baseline {number(clean)}."
    cells = largest_cells(result, 3)
    lead = [d for d in result.dims if d not in _CELL_DIMS]
    said = []
    for _, cell in cells.iterrows():
        place = [str(_entry_name(str(d), cell[str(d)])) for d in lead]
        place.append(str(cell["label"]))
        if "position" in cell:
            place.append(f"position '{cell['position']}'")
        said.append(f"{' '.join(place)}: {number(cell['value'])}")
    if said:
        text += f" Largest effects: {'; '.join(said)}."
    return text


def curves(
    result: xr.DataArray,
    *,
    along: str = "layer",
    title: str | None = None,
    caption: str | None = None,
) -> go.Figure:
    """Values along one dimension, a line for each entry of the other.

    Args:
        result: one or two dimensions, one of them ``along``. Reduce a larger one first, for
            instance by ``result.max("head", keep_attrs=True)``.
        along: the dimension of the horizontal axis.
        title: instead of the one made from the result's attributes.
        caption: instead of the default sentence.

    Raises:
        ValueError: if the dimensions do not fit.
    """
    words, series = _series(result, along)
    main, below = _title_of(result, title)
    traces = []
    for i, (name, values) in enumerate(series.items()):
        traces.append(
            go.Scatter(
                x=words.words,
                y=compact(values),
                name=escape(name),
                mode="lines+markers",
                line={"color": style.LINES[i % 6], "dash": style.DASHES[i % 6], "width": 2},
                marker={"symbol": style.SYMBOLS[i % 6], "size": 7},
                hovertemplate=_value_template(result, name, "%{x}", "%{y:.3~g}"),
            )
        )
    how = caption or f"Each line is the metric ({result.attrs.get('metric', '')}) after one patch"
    return _value_figure(result, traces, words, main, below, how, caption is None)


def bars(
    result: xr.DataArray | pd.DataFrame,
    *,
    along: str | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> go.Figure:
    """Values as bars that start at the corrupted baseline, a colour for each group.

    Args:
        result: one or two dimensions, the bars along the last one unless ``along`` says
            otherwise.
        along: the dimension of the horizontal axis.
        title: instead of the one made from the result's attributes.
        caption: instead of the default sentence.

    Raises:
        ValueError: if the dimensions do not fit.
        TypeError: if ``result`` is not labelled.
    """
    _, centre = _baselines(result)
    words, series = _series(result, along or (str(result.dims[-1]) if result.dims else ""))
    main, below = _title_of(result, title)
    traces = [
        go.Bar(
            x=words.words,
            y=compact(values - centre),
            base=centre,
            customdata=compact(values),
            name=escape(name),
            marker={
                "color": style.LINES[i % 6],
                "pattern": {
                    "shape": ["", "/", "x", ".", "\\", "-"][i % 6],
                    "fillmode": "overlay",
                    "fgcolor": "#ffffff",
                    "fgopacity": 0.7,
                },
            },
            hovertemplate=_value_template(result, name, "%{x}", "%{customdata:.3~g}"),
        )
        for i, (name, values) in enumerate(series.items())
    ]
    how = caption or (
        "Each bar runs from the corrupted baseline to the metric "
        f"({result.attrs.get('metric', '')}) after one patch"
    )
    return _value_figure(result, traces, words, main, below, how, caption is None)


def attention_patterns(
    model: Any,
    tokens: torch.Tensor,
    heads: Sequence[tuple[int, int]],
    labels: Sequence[str] | None = None,
    *,
    title: str | None = None,
    caption: str | None = None,
) -> go.Figure:
    """Where heads attend, averaged over the batch; with several heads, a menu chooses one.

    Args:
        model: a TransformerBridge.
        tokens: int ``[batch, pos]`` or ``[pos]``.
        heads: ``(layer, head)`` of each, the one shown first in front.
        labels: one for each position, such as a task's ``position_labels``.
        title: instead of the default one.
        caption: instead of the default sentence.

    Raises:
        ValueError: if no head is given or there is no such head, or labels and tokens do not fit.
    """
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    if not len(heads):
        raise ValueError("there is no head to draw: give at least one (layer, head)")
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(
                f"there is no L{layer}H{head}: the model has {n_layers} layers of {n_heads} heads"
            )
    if labels is None:
        labels = [str(i) for i in range(tokens.shape[1])]
    if len(labels) != tokens.shape[1]:
        raise ValueError(f"there are {len(labels)} labels for {tokens.shape[1]} positions")
    layers = sorted({layer for layer, _ in heads})
    names = {layer: f"blocks.{layer}.attn.hook_pattern" for layer in layers}
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=list(names.values()))
    axis = _column_axis(
        xr.DataArray(list(labels), dims="position", coords={"position": list(labels)}), "position"
    )
    shown = [f"L{layer}H{head}" for layer, head in heads]
    traces, said = [], []
    for i, (layer, head) in enumerate(heads):
        weights = cache[names[layer]][:, head].float().mean(0).cpu().numpy()
        # A causal head cannot look ahead: those cells do not exist.
        weights = np.where(np.tri(len(weights), dtype=bool), weights, np.nan)
        traces.append(
            go.Heatmap(
                z=compact(weights, digits=3),
                x=axis.words,
                y=axis.words,
                coloraxis="coloraxis",
                hoverongaps=False,
                xgap=1,
                ygap=1,
                name=shown[i],
                visible=i == 0,
                hovertemplate=f"{shown[i]}, from %{{y}}<br>to %{{x}}<br>"
                "attention %{z:.0%}<extra></extra>",
            )
        )
        flat = np.argsort(-np.nan_to_num(weights), axis=None, kind="stable")[:3]
        places = [np.unravel_index(k, weights.shape) for k in flat]
        strongest = [f"'{labels[a]}' to '{labels[b]}' {weights[a, b]:.0%}" for a, b in places]
        said.append(f"{shown[i]} from {'; from '.join(strongest)}")
    several = len(heads) > 1
    main = title or f"Attention pattern{'s' * several} of {style.listed(shown)}"
    batch = tokens.shape[0]
    below = str(getattr(model.cfg, "model_name", "model"))
    below += f" · mean over {batch} prompts" if batch > 1 else ""
    size = len(labels)
    grid = _Grid(
        [_Panel("", "", 0, 0, np.zeros((size, size)), 0)],
        _Axis(axis.words, axis.ticks, "position"),
        axis,
    )
    heading, height = style.title(main, below)
    bar_height = 42
    over_bar = height + _MENU_HEIGHT * several
    top = over_bar + bar_height
    total = top + grid.height(size) + grid.bottom
    menus = []
    if several:
        buttons = [
            {
                "label": name,
                "method": "restyle",
                "args": [{"visible": [j == i for j in range(len(shown))]}],
            }
            for i, name in enumerate(shown)
        ]
        menus.append({**_menu(buttons, bar_height + 6), "type": "dropdown", "direction": "down"})
    layout = grid.layout(np.arange(size), sorted_rows=False)
    layout["yaxis"]["title"] = {"text": ""}
    bar = {"tickvals": [0, 0.5, 1], "ticktext": ["0", "0.5", "1"]}
    figure = go.Figure(traces)
    figure.update_layout(
        **_base(heading),
        **layout,
        height=total,
        margin={"l": grid.left, "r": 26, "t": top, "b": grid.bottom, "pad": 0, "autoexpand": False},
        plot_bgcolor=style.GAP,
        updatemenus=menus,
        coloraxis={
            "colorscale": style.SEQUENTIAL,
            "cmin": 0,
            "cmax": 1,
            "colorbar": {**_BAR, **bar, "y": 1 - over_bar / total},
        },
        meta={
            "alt": f"Heatmap{', with a menu of heads' * several}. {main} ({below}), {size} "
            f"positions. Strongest: {'. '.join(said)}.",
            "caption": caption
            or ("Choose a head above; each" if several else "Each")
            + " row says how the head, at that position, divides its attention among the "
            "positions up to there, and adds up to 1.",
        },
    )
    return figure


def explore(
    results: xr.DataArray | Mapping[str, xr.DataArray],
    *,
    title: str | None = None,
    caption: str | None = None,
) -> go.Figure:
    """Many sweeps in one figure, with a menu for each choice, that needs no kernel.

    Values are shares of clean minus corrupted, so that one colour scale is right for every
    choice.

    Args:
        results: a result with further dimensions, such as ``kind``, ``corrupted`` and
            ``metric`` (see :func:`patching_demo.combine`, which can be nested), or results by
            name, which are then combined. With layer, position and head, a slider chooses the
            layer; otherwise all layers are rows.
        title: instead of the default one.
        caption: instead of the default sentence.

    Raises:
        ValueError: if there are more than three further dimensions, or nothing to choose from.
    """
    if isinstance(results, Mapping):
        results = combine(results)
    return _Explorer(results, title, caption).figure()


class _Explorer:
    """Independent menus over one figure.

    A plotly menu cannot know what another one has chosen. So each menu sets a property that no
    other touches: one moves the window on the horizontal axis, one on the vertical, one shows
    and hides traces, one makes them opaque.
    """

    def __init__(self, result: xr.DataArray, title: str | None, caption: str | None) -> None:
        cells = [d for d in _CELL_DIMS if d in result.dims]
        lead = [str(d) for d in result.dims if d not in cells]
        if len(cells) < 2:
            raise ValueError(f"the explorer needs two of layer, position, head, got {cells}")
        if not lead and len(cells) < 3:
            raise ValueError("there is nothing to choose from: draw the result with heatmap")
        if len(lead) > 3:
            raise ValueError(f"the explorer has menus for three dimensions, got {lead}")
        self.clean, self.centre = _baselines(result)
        self.measured = result
        self.result = to_share(result)
        self.column_dim = "position" if "position" in cells else "head"
        self.sliding = len(cells) == 3
        self.row_dim = "head" if self.sliding else next(d for d in cells if d != self.column_dim)
        # The kind moves the window sideways: its labels are then right for each kind.
        across = "kind" if "kind" in lead else (lead[-1] if lead else None)
        self.across = across
        self.down = "layer" if self.sliding else None
        self.rest = [d for d in lead if d != across]
        self.title, self.caption = title, caption

    def figure(self) -> go.Figure:
        result = self.result
        agree = _agree_everywhere(result)
        first = agree if self.column_dim == "position" and agree >= 3 else 0
        if first:
            result = result.isel(position=slice(first, None))
        kinds = _values(result, self.across) if self.across else [None]
        layers = _values(result, "layer") if self.sliding else [None]
        columns = _column_axis(result, self.column_dim)
        rows = _row_axis(result, [self.row_dim])
        # One blank column and row between blocks, so that a window never shows a neighbour.
        x_words, x_ticks = _blocks(kinds, columns, self._entry(self.across))
        y_words, y_ticks = _blocks(layers, rows, lambda layer: f"layer {layer}")
        states = list(itertools.product(*(_values(result, d) for d in self.rest)))
        traces, owners = [], []
        for state in states:
            part = result.sel(dict(zip(self.rest, state, strict=True)))
            order = [d for d in (self.down, self.row_dim, self.across, self.column_dim) if d]
            part = part.transpose(*order)
            grid = part.values.astype(float)
            if "agrees" in part.coords:
                grid = part.where(~part["agrees"]).transpose(*order).values.astype(float)
            if not self.across:
                grid = grid[..., None, :]
            if not self.sliding:
                grid = grid[None]
            padded = np.pad(grid, [(0, 0), (0, 1), (0, 0), (0, 1)], constant_values=np.nan)
            flat = padded.reshape(padded.shape[0] * padded.shape[1], -1)
            drawn = [self._trace(flat, x_words, y_words, part, state)]
            agree = int(part["agrees"].values.sum()) if "agrees" in part.coords else 0
            if agree and self.column_dim == "position":
                step = len(columns.words) + 1
                names = [x_words[k * step + i] for k in range(len(kinds)) for i in range(agree)]
                drawn.append(self._nothing(names, y_words, drawn[0]))
            traces += drawn
            owners += [state] * len(drawn)
        return self._laid_out(traces, owners, kinds, layers, columns, rows, x_ticks, y_ticks, first)

    def _entry(self, dim: str | None) -> Any:
        return lambda value: _entry_name(dim or "", value)

    def _trace(
        self, values: np.ndarray, x: list[str], y: list[str], part: xr.DataArray, state: tuple
    ) -> go.Heatmap:
        baselines = [part.coords.get(f"{w}_baseline") for w in ("corrupted", "clean")]
        given = [float(b) for b in baselines if b is not None and b.size == 1]
        if len(given) != 2:
            given = [self.centre, self.clean]
        name = " · ".join(escape(s) for s in state)
        template = (
            (f"{name}<br>" if name else "")
            + "%{x}<br>%{y}<br>%{z:.0%} of clean minus corrupted"
            + f"<br>corrupted {number(given[0])}, clean {number(given[1])}<extra></extra>"
        )
        chosen = [s == _values(self.result, d)[0] for d, s in zip(self.rest, state, strict=True)]
        return go.Heatmap(
            z=compact(values, digits=3),
            x=x,
            y=y,
            coloraxis="coloraxis",
            hoverongaps=False,
            hovertemplate=template,
            hoverinfo="all" if all(chosen[1:]) else "skip",
            opacity=1.0 if all(chosen[1:]) else 0.0,
            visible=bool(all(chosen[:1])),
            name=name,
            xgap=1,
            ygap=1,
        )

    def _nothing(self, x: list[str], y: list[str], beside: go.Heatmap) -> go.Heatmap:
        """The positions at which there is nothing to patch, shown and hidden with the rest."""
        blank = [word.isspace() for word in y]
        return go.Heatmap(
            z=[[None if empty else 0] * len(x) for empty in blank],
            x=x,
            y=y,
            colorscale=[[0, style.BAND], [1, style.BAND]],
            showscale=False,
            hoverongaps=False,
            hovertemplate=f"%{{x}}<br>{_AGREE}<extra></extra>",
            hoverinfo=beside.hoverinfo,
            opacity=beside.opacity,
            visible=beside.visible,
            name="nothing to patch",
        )

    def _laid_out(
        self,
        traces: list[go.Heatmap],
        owners: list[tuple],
        kinds: list[Any],
        layers: list[Any],
        columns: _Axis,
        rows: _Axis,
        x_ticks: list[str],
        y_ticks: list[str],
        first: int,
    ) -> go.Figure:
        width, height = len(columns.words), len(rows.words)
        panel = _Panel("", "", 0, 0, np.zeros((height, width)), 0)
        grid = _Grid([panel], rows, columns)

        def window(index: int, size: int, upward: bool = False) -> list[float]:
            low, high = index * (size + 1) - 0.5, index * (size + 1) + size - 0.5
            return [high, low] if upward else [low, high]

        choices = []
        if len(kinds) > 1:
            buttons = [
                {
                    "label": escape(_entry_name(self.across or "", kind)),
                    "method": "relayout",
                    "args": [{"xaxis.range": window(i, width)}],
                }
                for i, kind in enumerate(kinds)
            ]
            choices.append((self.across, buttons))
        for place, dim in enumerate(self.rest):
            values = _values(self.result, dim)
            buttons = []
            for value in values:
                on = [state[place] == value for state in owners]
                if place == 0:
                    change: dict[str, Any] = {"visible": on}
                else:
                    change = {
                        "opacity": [1.0 if x else 0.0 for x in on],
                        "hoverinfo": ["all" if x else "skip" for x in on],
                    }
                buttons.append({"label": escape(value), "method": "restyle", "args": [change]})
            if len(values) > 1:
                choices.append((dim, buttons))
        main = self.title if self.title is not None else "Explore: one patch at a time"
        below = " · ".join(
            str(self.measured.attrs[k]) for k in ("model", "task") if self.measured.attrs.get(k)
        )
        heading, heading_height = style.title(main, below)
        largest = float(np.nanmax(np.abs(self.result.values)))
        scale = _Scale(1.0, 0.0, largest)
        over_bar = _BAR_HEIGHT + 8
        over_scale = over_bar + _MENU_HEIGHT * scale.small
        top = heading_height + over_scale + 56 * bool(choices)
        menus, notes = [], []
        for i, (dim, buttons) in enumerate(choices):
            x = i / max(len(choices), 1)
            menus.append(
                {
                    **_menu(buttons, over_scale),
                    "type": "dropdown",
                    "direction": "down",
                    "x": x,
                    "showactive": True,
                    "active": 0,
                }
            )
            notes.append(
                {
                    "text": escape(_MENU_NAMES.get(str(dim), str(dim))),
                    "xref": "paper",
                    "yref": "paper",
                    "x": x,
                    "y": 1,
                    "xanchor": "left",
                    "yanchor": "bottom",
                    "yshift": over_scale + 32,
                    "showarrow": False,
                    "font": {"size": 12},
                }
            )
        sliders = []
        slider_height = start = 0
        if self.sliding:
            slider_height = 72
            # Open where the first choice of every menu has most to show.
            opening = self.result.isel({d: 0 for d in self.result.dims if d not in _CELL_DIMS})
            effect = np.abs(np.nan_to_num(opening.transpose("layer", ...).values))
            start = int(effect.reshape(len(layers), -1).max(axis=1).argmax())
            sliders.append(
                {
                    "active": start,
                    "currentvalue": {"prefix": "layer ", "font": {"size": 13}},
                    "pad": {"t": grid.bottom - 18, "b": 6},
                    "len": 1,
                    "steps": [
                        {
                            "label": str(layer),
                            "method": "relayout",
                            "args": [{"yaxis.range": window(i, height, upward=True)}],
                        }
                        for i, layer in enumerate(layers)
                    ],
                    "bgcolor": "#c9c9c9",
                    "activebgcolor": "#8c8c8c",
                    "bordercolor": "#8c8c8c",
                    "ticklen": 3,
                    "font": {"size": 10},
                }
            )
        step = math.ceil(width / 33)
        shown = [i for i, tick in enumerate(x_ticks) if tick and (i % (width + 1)) % step == 0]
        y_step = 2 if self.row_dim == "layer" and 16 < height <= 40 else math.ceil(height / 40)
        y_shown = [i for i, tick in enumerate(y_ticks) if tick and (i % (height + 1)) % y_step == 0]
        if scale.small:
            menus.append(_menu(scale.buttons(), over_bar))
        bottom = grid.bottom + slider_height
        total = top + max(grid.height(height), 160) + bottom
        figure = go.Figure(traces)
        figure.update_layout(
            **_base(heading),
            height=total,
            margin={
                "l": grid.left + 12,
                "r": 26,
                "t": top,
                "b": bottom,
                "pad": 0,
                "autoexpand": False,
            },
            plot_bgcolor=style.GAP,
            coloraxis={"colorscale": style.DIVERGING, **scale.wide()},
            updatemenus=menus,
            sliders=sliders,
            annotations=notes,
            xaxis={
                **_AXIS,
                "range": window(0, width),
                "tickvals": [i + _OFF for i in shown],
                "ticktext": [x_ticks[i] for i in shown],
                "tickangle": -90 if grid.turned else 0,
                "title": _axis_title("" if grid.turned else columns.title),
            },
            yaxis={
                **_AXIS,
                "range": window(start, height, upward=True),
                "tickvals": [i + _OFF for i in y_shown],
                "ticktext": [y_ticks[i] for i in y_shown],
                "title": _axis_title(self.row_dim),
            },
            meta={
                "alt": self._alt(main, below, [str(d) for d, _ in choices]),
                "caption": self.caption or self._caption(first),
            },
        )
        figure.update_coloraxes(colorbar={**_BAR, "y": 1 - (top - _BAR_HEIGHT) / total})
        return figure

    def _caption(self, first: int) -> str:
        text = (
            "Choose above what to patch; each cell is the share of clean minus corrupted that one "
            "patch covers: 0 (white) changes nothing, 1 (dark blue) makes the corrupted run as "
            "good as the clean one"
        )
        if self.sliding:
            text += "; the slider chooses the layer"
        if bool(self.result.isnull().any()):
            text += "; grey cells do not exist in this model"
        if first:
            text += f"; positions 0 to {first - 1} are left out, as both inputs agree up to there"
        return text + "."

    def _alt(self, main: str, below: str, menus: list[str]) -> str:
        names = [_MENU_NAMES.get(m, m) for m in menus]
        text = f"Interactive heatmap. {main} ({below})."
        if names:
            text += f" Menus: {style.listed(names)}."
        cells = largest_cells(self.result, 3)
        lead = [str(d) for d in self.result.dims if d not in _CELL_DIMS]
        said = []
        for _, cell in cells.iterrows():
            place = [_entry_name(d, cell[d]) for d in lead] + [str(cell["label"])]
            if "position" in cell:
                place.append(f"position '{cell['position']}'")
            said.append(f"{' '.join(place)} {cell['share']:.0%}")
        return f"{text} Largest shares: {'; '.join(said)}." if said else text


_MENU_NAMES = {"kind": "activation", "corrupted": "corrupted input", "metric": "metric"}


def _agree_everywhere(result: xr.DataArray) -> int:
    if "agrees" not in result.coords or "position" not in result.dims:
        return 0
    agrees = (
        result["agrees"].transpose(..., "position").values.reshape(-1, result.sizes["position"])
    )
    return int(agrees.all(axis=0).sum())


def _blocks(entries: list[Any], axis: _Axis, named: Any) -> tuple[list[str], list[str]]:
    """Names and tick labels of blocks laid one after another, each followed by a blank."""
    words, ticks = [], []
    for i, entry in enumerate(entries):
        prefix = "" if entry is None else f"{escape(named(entry))}, "
        words += [prefix + word for word in axis.words] + [" " * (i + 1)]
        ticks += [*axis.ticks, ""]
    return words, ticks


def _series(result: xr.DataArray, along: str) -> tuple[_Axis, dict[str, np.ndarray]]:
    _baselines(result)
    if along not in result.dims or result.ndim > 2:
        raise ValueError(
            f"lines and bars need one or two dimensions, one of them {along!r}, got "
            f"{dict(result.sizes)}: select or reduce the others"
        )
    others = [str(d) for d in result.dims if d != along]
    if along in ("head", "position"):
        words = _column_axis(result, along)
    elif along == "layer":
        words = _row_axis(result, ["layer"])
    else:
        names = [escape(_entry_name(along, v)) for v in _values(result, along)]
        words = _Axis(names, names, along)
    if not others:
        return words, {str(result.attrs.get("metric", "value")): result.values.astype(float)}
    entries = _values(result, others[0])
    values = result.transpose(others[0], along).values.astype(float)
    if others[0] in ("layer", "head"):
        names = [f"{others[0]} {entry}" for entry in entries]
    else:
        names = [_entry_name(others[0], entry) for entry in entries]
    return words, dict(zip(names, values, strict=True))


def _value_template(result: xr.DataArray, name: str, place: str, value: str) -> str:
    metric = _metric_words(result)
    lead = "" if escape(name) == metric else f"{escape(name)}<br>"
    return f"{lead}{place}<br>{metric}: {value}<extra></extra>"


def _value_figure(
    result: xr.DataArray,
    traces: list[Any],
    words: _Axis,
    main: str,
    below: str,
    caption: str,
    explain: bool,
) -> go.Figure:
    clean, centre = _baselines(result)
    heading, height = style.title(main, below)
    legend_rows = math.ceil(len(traces) / 3) if len(traces) > 1 else 0
    top = height + 24 * legend_rows + 8
    turned = words.title == "position"
    label = max(len(_visible(t)) for t in words.ticks)
    bottom = int((6.4 * label + 12) if turned else 44)
    step = math.ceil(len(words.words) / 33)
    ticks = np.arange(len(words.words))[::step]
    lines, notes = [], []
    for which, value in (("clean", clean), ("corrupted", centre)):
        lines.append(
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": value,
                "y1": value,
                "line": {"color": style.INK, "width": 1, "dash": "dash"},
                "layer": "below",
            }
        )
        notes.append(
            {
                "text": f"{which}<br>{number(value)}",
                "xref": "paper",
                "x": 1,
                "xanchor": "left",
                "xshift": 3,
                "align": "left",
                "y": value,
                "yanchor": "middle",
                "showarrow": False,
                "font": {"size": 11},
            }
        )
    figure = go.Figure(traces)
    units = str(result.attrs.get("units", ""))
    values = np.concatenate([np.asarray(t.y, float) for t in traces])
    if traces and isinstance(traces[0], go.Bar):
        values = values + centre
    low, high = (f([np.nanmin(values), np.nanmax(values), clean, centre]) for f in (min, max))
    pad = 0.08 * ((high - low) or 1.0)
    figure.update_layout(
        **_base(heading),
        height=top + 280 + bottom,
        margin={"l": 56, "r": 64, "t": top, "b": bottom, "pad": 0, "autoexpand": False},
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=len(traces) > 1,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 12}},
        bargap=0.2,
        xaxis={
            "type": "category",
            "showgrid": False,
            "tickmode": "array",
            "tickvals": (ticks + _OFF).tolist(),
            "ticktext": [words.ticks[i] for i in ticks],
            "tickangle": -90 if turned else 0,
            "tickfont": {"size": 11},
            "title": _axis_title("" if turned else words.title),
        },
        yaxis={
            "title": _axis_title(units),
            "range": [low - pad, high + pad],
            "gridcolor": "rgba(127,127,127,0.25)",
            "zeroline": False,
            "tickfont": {"size": 11},
        },
        shapes=lines,
        annotations=notes,
    )
    best = []
    for trace in traces:
        y = np.asarray(trace.y, float) + (centre if isinstance(trace, go.Bar) else 0)
        if np.isfinite(y).any():
            i = int(np.nanargmax(np.abs(y - centre)))
            best.append(f"{trace.name} {number(float(y[i]))} at {words.ticks[i]}")
    if explain:
        caption += "; dashed lines mark the clean and the corrupted baseline."
    figure.update_layout(
        meta={
            "alt": f"{'Bars' if isinstance(traces[0], go.Bar) else 'Curves'}. {main} ({below}). "
            f"Corrupted baseline {number(centre)}, clean baseline {number(clean)}. "
            f"Furthest from corrupted: {'; '.join(best)}.",
            "caption": caption,
        }
    )
    return figure
