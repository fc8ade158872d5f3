"""What all figures are laid out with: axes, grids of panels, colour bars, menus and titles.

Heights and margins are counted in pixels from the text that has to fit, so that labels never
overlap; widths are the reader's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from patching_demo.engine.kinds import kind_label
from patching_demo.plots import theme
from patching_demo.plots.theme import escape, number
from patching_demo.results import baselines

__all__ = [
    "AGREE",
    "AXIS",
    "Axis",
    "BAR",
    "BAR_HEIGHT",
    "CELL_DIMS",
    "Grid",
    "MENU_HEIGHT",
    "NAME_HEIGHT",
    "OFF_CENTRE",
    "Panel",
    "Scale",
    "as_shown",
    "axis_number",
    "axis_title",
    "baseline_names",
    "baselines_of",
    "column_axis",
    "common_layout",
    "entries_of",
    "entry_name",
    "flattened",
    "menu_above",
    "metric_words",
    "row_axis",
    "title_of",
]


CELL_DIMS = ("layer", "head", "position")


# Wider than this, panels go below each other, as their labels would not be readable.
_MAX_COLUMNS = 48


AGREE = "clean and corrupted agree here: nothing to patch"


@dataclass(frozen=True)
class Axis:
    """Rows or columns of a heatmap: a name in words for each, and what stands on the axis."""

    words: list[str]
    ticks: list[str]
    title: str


@dataclass(frozen=True)
class Panel:
    """One heatmap of a figure."""

    name: str
    kind: str
    grid_row: int
    grid_column: int
    values: np.ndarray  # [row, column]
    agree: int  # the first `agree` columns have nothing to patch
    row_name: str = ""  # where panels stand in rows and columns that each have a name
    column_name: str = ""


def baselines_of(result: xr.DataArray) -> tuple[float, float]:
    """(clean, corrupted) of a result.

    Raises:
        TypeError: if it has no labels.
        ValueError: if it lacks a baseline.
    """
    if not isinstance(result, xr.DataArray):
        raise TypeError(f"a figure needs a labelled result (xarray), got {type(result).__name__}")
    return baselines(result)


def baseline_names(result: xr.DataArray) -> tuple[str, str]:
    """What the two baselines are called: clean and corrupted, unless the result says otherwise."""
    names = (result.attrs.get(f"{which}_name", which) for which in ("clean", "corrupted"))
    clean, corrupted = map(str, names)
    return clean, corrupted


def entry_name(dim: str, value: Any) -> str:
    """What an entry of a further dimension is called in a figure."""
    return kind_label(value) if dim == "kind" else str(value)


def row_axis(result: xr.DataArray, dims: list[str]) -> Axis:
    """The rows of a heatmap: layers, heads, or the heads of all layers."""
    index = [entries_of(result, d) for d in dims]
    if dims == ["layer"]:
        return Axis([f"layer {i}" for i in index[0]], [str(i) for i in index[0]], "layer")
    if dims == ["head"]:
        return Axis([f"head {i}" for i in index[0]], [str(i) for i in index[0]], "head")
    pairs = list(itertools.product(*index))
    return Axis([f"layer {i}, head {j}" for i, j in pairs], [f"L{i}H{j}" for i, j in pairs], "head")


def column_axis(result: xr.DataArray, dim: str) -> Axis:
    """The columns of a heatmap: heads or positions."""
    values = entries_of(result, dim)
    if dim == "head":
        return Axis([f"head {i}" for i in values], [str(i) for i in values], "head")
    tokens = result["token"].values if "token" in result.coords else [None] * len(values)
    words = []
    for place, (label, token) in enumerate(zip(values, tokens, strict=True)):
        number_ = str(label).rpartition(" ")[2]
        place = int(number_) if number_.isdigit() else place
        shown = label if token is None else token
        words.append(f"position {place} '{escape(shown)}'")
    return Axis(words, [escape(theme.short_label(str(v))) for v in values], "position")


def entries_of(result: xr.DataArray, dim: str) -> list[Any]:
    """The labels along a dimension, or their numbers where it has none."""
    return result[dim].values.tolist() if dim in result.coords else list(range(result.sizes[dim]))


def axis_number(panel: Panel) -> str:
    """The number that plotly gives the axes of a panel, empty for the first."""
    # Two panels never share an axis: each can be zoomed, and the first is plain "x" and "y".
    index = panel.grid_row * 100 + panel.grid_column
    return "" if index == 0 else str(index + 1)


def metric_words(result: xr.DataArray) -> str:
    """The name of the metric, as plotly shows it."""
    return escape(result.attrs.get("metric", "metric"))


class Grid:
    """Where the panels of a figure stand, in fractions of a plot of known height."""

    def __init__(self, panels: list[Panel], rows: Axis, columns: Axis) -> None:
        self.rows, self.columns = rows, columns
        across = max(p.grid_column for p in panels) + 1
        down = max(p.grid_row for p in panels) + 1
        width = len(columns.words)
        if down == 1 and across * width > _MAX_COLUMNS:
            fit = max(1, min(across, _MAX_COLUMNS // width))
            down = math.ceil(across / fit)
            across = math.ceil(across / down)
            panels = [
                replace(p, grid_row=i // across, grid_column=i % across)
                for i, p in enumerate(panels)
            ]
        self.panels, self.across, self.down = panels, across, down
        self.axes = [axis_number(p) for p in panels]
        self.has_names = any(p.name for p in panels)
        longest = max(len(as_shown(t)) for t in rows.ticks)
        self.left = 22 + 7 * longest + 16 * any(p.row_name for p in panels)
        label = max(len(as_shown(t)) for t in columns.ticks)
        self.turned = columns.title == "position"
        self.bottom = int(6.0 * label + 12) if self.turned else 46
        # Panels below each other repeat their axis only if it cannot be read off the lowest.
        self.between = 26 if self.has_names else 14

    def cell_height(self, n_rows: int) -> int:
        """Pixels of a row; the more rows there are, the fewer."""
        return 22 if n_rows <= 12 else 15 if n_rows <= 40 else 12

    def height(self, n_rows: int) -> int:
        """Pixels of the whole plot."""
        panel = max(n_rows * self.cell_height(n_rows), 44)
        return self.down * panel + (self.down - 1) * self.between

    def _step(self) -> int:
        """Every how many columns there is a label."""
        return math.ceil(len(self.columns.words) * self.across / 33)

    def min_width(self) -> int:
        """Pixels below which labels would overlap."""
        labels = self.across * math.ceil(len(self.columns.words) / self._step())
        return self.left + 26 + labels * (11 if self.turned else 6)

    def layout(self, view: np.ndarray, sorted_rows: bool) -> dict[str, Any]:
        """The axes of every panel for the rows in view."""
        n = len(view)
        total = self.height(n)
        panel_height = (total - (self.down - 1) * self.between) / self.down
        gap = 0.025 if self.across > 1 else 0.0
        panel_width = (1 - gap * (self.across - 1)) / self.across
        step = self._step()
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
                **AXIS,
                "domain": [left, min(1.0, left + panel_width)],
                "anchor": f"y{axis}",
                "range": [-0.5, len(self.columns.words) - 0.5],
                # A tick exactly on a cell would replace the cell's words in the hover text.
                "tickvals": (x_ticks + OFF_CENTRE).tolist(),
                "ticktext": [self.columns.ticks[i] for i in x_ticks],
                "tickangle": -90 if self.turned else 0,
                "showticklabels": lowest,
                "title": axis_title(self.columns.title if lowest and not self.turned else ""),
            }
            layout[f"yaxis{axis}"] = {
                **AXIS,
                "domain": [max(0.0, top - panel_height / total), min(1.0, top)],
                "anchor": f"x{axis}",
                "range": [n - 0.5, -0.5],
                "tickvals": (y_ticks + OFF_CENTRE).tolist(),
                "ticktext": [self.rows.ticks[view[i]] for i in y_ticks],
                "showticklabels": column == 0,
                "title": axis_title(self._left_title(panel)),
            }
        return layout

    def _left_title(self, panel: Panel) -> str:
        if panel.grid_column:
            return ""
        own = self.rows.title if self.rows.title == "layer" else ""
        return "\n".join(filter(None, [panel.row_name, own]))

    def annotations(self) -> list[dict[str, Any]]:
        """Names over the panels, and what the hatching means where there is room to say so."""
        notes = []
        for panel, axis in zip(self.panels, self.axes, strict=True):
            name = panel.column_name or panel.name
            if name and not (panel.column_name and panel.grid_row):
                notes.append(
                    {
                        "text": escape(name),
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
                        "text": theme.wrapped(AGREE, 21),
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
        """Slanted lines over the columns that agree, for so many rows."""
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
                        "line": {"color": theme.HATCH, "width": 1},
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
OFF_CENTRE = 0.04


AXIS = {
    "type": "category",
    "showgrid": False,
    "zeroline": False,
    "ticks": "",
    "tickmode": "array",
    "tickfont": {"size": 10},
    "automargin": False,
}


def axis_title(text: str) -> dict[str, Any]:
    """The title of an axis."""
    lines = map(escape, text.split("\n"))
    return {"text": "<br>".join(lines), "standoff": 4, "font": {"size": 12}}


def as_shown(text: str) -> str:
    """Text with one character for each that a reader sees, to count them."""
    for entity in ("&amp;", "&lt;", "&gt;", "&#36;", "&#37;"):
        text = text.replace(entity, "?")
    return text


@dataclass(frozen=True)
class Scale:
    """A colour scale symmetric about the corrupted baseline."""

    clean: float
    centre: float
    largest: float
    names: tuple[str, str] = ("clean", "corrupted")

    @property
    def tiny(self) -> bool:
        """Whether the effects would be too pale to see: then the figure opens with less range."""
        return 0 < self.largest < 0.2 * abs(self.clean - self.centre)

    @property
    def small(self) -> bool:
        """Whether the effects use less than half of the colours."""
        return 0 < self.largest < 0.5 * abs(self.clean - self.centre)

    def wide(self) -> dict[str, Any]:
        """Colours that reach to the clean baseline, or to the largest effect if that is further."""
        return self._part(max(abs(self.clean - self.centre), self.largest) or 1.0)

    def narrow(self) -> dict[str, Any]:
        """Colours that reach as far as the largest effect."""
        return self._part(self.largest)

    def opening(self) -> dict[str, Any]:
        """The colours with which the figure opens."""
        return self.narrow() if self.tiny else self.wide()

    def menu(self, bottom: int) -> dict[str, Any]:
        """Buttons that choose how far the colours reach, ``bottom`` pixels above the plot."""
        choices = (
            (f"colours up to {escape(self.names[0])}", self.wide()),
            ("up to the largest effect", self.narrow()),
        )
        buttons = [
            {"label": name, "method": "relayout", "args": [flattened({"coloraxis": part})]}
            for name, part in choices
        ]
        return {**menu_above(buttons, bottom), "active": int(self.tiny)}

    @property
    def note(self) -> str:
        """For a caption: how far the colours reach where it is not to the clean baseline."""
        if not self.tiny:
            return ""
        part = self.largest / abs(self.clean - self.centre)
        return (
            f"the darkest colour is the largest effect, {100 * part:.1f} % of {self.names[0]} "
            f"minus {self.names[1]}"
        )

    def _part(self, half: float) -> dict[str, Any]:
        ticks = {self.centre: f"{number(self.centre)}<br>{escape(self.names[1])}"}
        if abs(self.clean - self.centre) <= half * 1.0001 and self.clean != self.centre:
            ticks[self.clean] = f"{number(self.clean)}<br>{escape(self.names[0])}"
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
BAR = {
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


BAR_HEIGHT, MENU_HEIGHT, NAME_HEIGHT = 58, 38, 22


def menu_above(buttons: list[dict[str, Any]], bottom: int) -> dict[str, Any]:
    """A row of buttons, ``bottom`` pixels above the plot."""
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
        **theme.MENU,
    }


def flattened(layout: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested layout entries by path, so that an update changes them and keeps their siblings."""
    flat: dict[str, Any] = {}
    for key, value in layout.items():
        if isinstance(value, Mapping):
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def common_layout(heading: str) -> dict[str, Any]:
    """What every figure has: its title, font and transparent paper."""
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
        "font": {"color": theme.INK, "family": "Helvetica Neue, Helvetica, Arial, sans-serif"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "autosize": True,
        "dragmode": False,
        "hoverlabel": {"align": "left"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": theme.INK},
        "template": "none",
    }


def title_of(result: xr.DataArray, given: str | None) -> tuple[str, str]:
    """What was patched into what, and below it the model, the task and the metric."""
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
