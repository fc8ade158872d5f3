"""What heatmaps are laid out with: axes, grids of panels, colour scales, menus.

Heights and margins are counted in pixels from the text that has to fit, so that labels never
overlap; widths are the reader's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from patching_demo.plots import theme
from patching_demo.plots.facts import NUMBERED, bounds_of, entries_of, entry_name
from patching_demo.plots.theme import compact, escape, number
from patching_demo.results import agreement

# Pixels that a telephone of 390 pixels leaves the horizontal axis.
NARROW = 238

# Wider than this, panels go below each other, as their labels would not be readable.
_MAX_COLUMNS = 48

AGREE = "clean and corrupted agree here: nothing to patch"

# Off the cell's centre by less than a pixel, and by more than plotly's tolerance for "same", which
# is a 10,000th of the axis: a tick exactly on a cell would replace the cell's words in the hover.
_OFF_CENTRE = 1 / 2000

AXIS = {
    "type": "category",
    "showgrid": False,
    "zeroline": False,
    "ticks": "",
    "tickmode": "array",
    "tickfont": {"size": 10},
    "automargin": False,
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
    "tickangle": 0,
}

BAR_HEIGHT, MENU_HEIGHT = 66, 38


@dataclass(frozen=True)
class Axis:
    """Rows, columns or groups: each entry in words, as a tick, and what all of them are.

    ``places`` has the position that each entry stands for, if they are positions. Ticks that are
    ``turned`` stand upright below a figure.
    """

    words: list[str]
    ticks: list[str]
    title: str
    places: Sequence[int] = ()
    turned: bool = False

    @property
    def longest(self) -> int:
        """Characters of the longest tick."""
        return max(map(len, self.ticks))

    @property
    def each(self) -> float:
        """Pixels that a tick needs beside the others."""
        return 11.5 if self.turned else 6.6 * self.longest + 6

    def upright(self, times: int = 1) -> Axis:
        """These names, standing if they do not fit a telephone so many times."""
        count = times * len(self.ticks)
        if self.turned or count < 2 or count * self.each <= NARROW:
            return self
        ticks = [tick if len(tick) <= 24 else f"{tick[:13]}…{tick[-10:]}" for tick in self.ticks]
        return replace(self, ticks=ticks, turned=True)

    def below(self) -> int:
        """Pixels below a figure whose columns these are."""
        return 6 * self.longest + 14 if self.turned else 46

    def ticked(self, at: Sequence[int], title: str | None = None) -> dict[str, Any]:
        """Ticks at the entries ``at``, as plotly takes them."""
        return {
            "tickvals": [i + min(_OFF_CENTRE * len(self.ticks), 0.04) for i in at],
            "ticktext": [escape(self.ticks[i]) for i in at],
            "tickangle": -90 if self.turned else 0,
            "title": axis_title(self.title if title is None else title),
        }


def axis_title(text: str) -> dict[str, Any]:
    """The title of an axis, a line for each of the text's."""
    shown = "<br>".join(map(escape, text.split("\n")))
    return {"text": shown, "standoff": 4, "font": {"size": 12}}


def axis_of(result: xr.DataArray, dims: Sequence[str]) -> Axis:
    """The axis of one dimension, or that of the heads of all layers."""
    if len(dims) > 1:
        pairs = [*itertools.product(*(entries_of(result, dim) for dim in dims))]
        words = [f"layer {i}, head {j}" for i, j in pairs]
        return Axis(words, [f"L{i}H{j}" for i, j in pairs], "head")
    (dim,) = dims
    entries = entries_of(result, dim)
    if dim == "position":
        tokens = result["token"].values if "token" in result.coords else entries
        return position_axis([str(entry) for entry in entries], tokens)
    if dim in ("layer", "head"):
        return Axis([f"{dim} {entry}" for entry in entries], [str(e) for e in entries], dim)
    names = [entry_name(dim, entry) for entry in entries]
    words = [f"role {name}" for name in names] if dim == "role" else names
    return Axis(words, names, dim.replace("_", " "))


def position_axis(labels: Sequence[str], tokens: Sequence[str]) -> Axis:
    """Positions by their labels; what is selected or reordered keeps the numbers in its labels."""
    numbers = [label.rpartition(" ")[2] for label in labels]
    told = all(n.isdecimal() for n in numbers) and len(set(numbers)) == len(numbers)
    places = [int(n) for n in numbers] if told else list(range(len(labels)))
    words = [f"position {i} '{token}'" for i, token in zip(places, tokens, strict=True)]
    return Axis(words, [theme.short_label(label) for label in labels], "position", places, True)


def arrays(
    result: xr.DataArray, dims: Sequence[Any], *, collapse: bool = True
) -> tuple[Axis, np.ndarray, np.ndarray, np.ndarray | None]:
    """What a figure draws of a result with its dimensions in this order, columns last.

    Returns:
        what the columns are called, :func:`collapsed` unless that is not wanted; bool, where both
        inputs agree; the values, NaN there; and bounds ``[bound, ...]`` of intervals, or None.
    """
    agrees = agreement(result).transpose(*dims).values
    values = np.where(agrees, np.nan, result.transpose(*dims).values.astype(float))
    columns, bounds, kept = axis_of(result, dims[-1:]), bounds_of(result), slice(None)
    if collapse:
        kept, columns = collapsed(agrees, columns)
    if bounds is not None:
        bounds = bounds.transpose("bound", *dims).values[..., kept]
    return columns, agrees[..., kept], values[..., kept], bounds


def collapsed(agrees: np.ndarray, columns: Axis) -> tuple[list[int], Axis]:
    """The columns to draw, one for each run of three or more positions that agree everywhere.

    Args:
        agrees: bool ``[..., column]``.
        columns: what they are called; only neighbouring positions are joined.
    """
    if not columns.places:
        return list(range(len(columns.words))), columns
    everywhere = agrees.reshape(-1, agrees.shape[-1]).all(axis=0)
    kept, words, ticks = [], [], []
    for (agree, _), group in itertools.groupby(
        range(len(everywhere)), lambda i: (everywhere[i], columns.places[i] - i)
    ):
        run = list(group)
        if agree and len(run) >= 3:
            first, last = run[0], run[-1]
            kept.append(first)
            words.append(f"{columns.words[first]} to {columns.words[last]}")
            ticks.append(f"{columns.places[first]}–{columns.places[last]}")
        else:
            kept += run
            words += [columns.words[i] for i in run]
            ticks += [columns.ticks[i] for i in run]
    return kept, Axis(words, ticks, columns.title, [columns.places[i] for i in kept], True)


def largest_rows(effect: np.ndarray, top: int) -> np.ndarray:
    """The ``top`` rows with the largest effects, largest first.

    Args:
        effect: ``[..., row, column]``, NaN where there is no cell or nothing to patch.
    """
    size = np.nan_to_num(np.abs(effect), nan=-1.0)
    largest = size.reshape(-1, *size.shape[-2:]).max(axis=(0, 2))
    return np.argsort(-largest, kind="stable")[:top]


def cells(values: np.ndarray, x: Sequence[str], y: Sequence[str], **more: Any) -> go.Heatmap:
    """Measured cells, coloured by the figure's one scale; NaN is a gap."""
    return go.Heatmap(
        z=compact(values),
        x=[escape(word) for word in x],
        y=[escape(word) for word in y],
        coloraxis="coloraxis",
        hoverongaps=False,
        **{"xgap": 1, "ygap": 1, **more},
    )


def traces(
    values: np.ndarray,
    agrees: np.ndarray,
    x: Sequence[str],
    y: Sequence[str],
    scale: Scale,
    *,
    hover: tuple[str, str],
    signed: bool = True,
    own: Mapping[str, Any],
    **shared: Any,
) -> list[go.Heatmap]:
    """The measured cells, the infinite ones, and those at which both inputs agree.

    Args:
        values: ``[row, column]``.
        agrees: bool ``[row, column]``.
        x, y: what columns and rows are called.
        scale: infinite cells, which plotly leaves out, stand at its ends.
        hover: templates of measured cells and of infinite ones, whose sign is ``%{text}``.
        signed: put a sign into cells that are not measured ones; a figure of many thousands would
            grow too large by it.
        own, shared: properties of the measured cells alone, and of all.
    """
    sign = {"texttemplate": "%{text}"} if signed else {}
    near, far = (f"{template}<extra></extra>" for template in hover)
    drawn = [cells(values, x, y, hovertemplate=near, **own, **shared)]
    beyond = np.isinf(values)
    if beyond.any():
        ends = np.where(values > 0, scale.wide["cmax"], scale.wide["cmin"])
        text = np.where(beyond, np.where(values > 0, "∞", "−∞"), "").tolist()
        ends = np.where(beyond, ends, np.nan)
        drawn.append(cells(ends, x, y, hovertemplate=far, text=text, **sign, **shared))
    some = np.flatnonzero(agrees.any(axis=0))
    if len(some):
        if signed:
            # Plotly finds a sign's place by counting from the first column.
            some = np.arange(some[-1] + 1)
            sign["text"] = np.where(agrees[:, some], "=", "").tolist()
            sign["textfont"] = {"color": "#6e6e6e"}
        drawn.append(
            go.Heatmap(
                z=np.where(agrees[:, some], 0, np.nan).astype(np.float32),
                x=[escape(x[i]) for i in some],
                y=[escape(word) for word in y],
                colorscale=[[0, theme.BAND], [1, theme.BAND]],
                showscale=False,
                hoverongaps=False,
                hovertemplate=f"%{{x}}<br>{AGREE}<extra></extra>",
                name="nothing to patch",
                **sign,
                **shared,
            )
        )
    return drawn


@dataclass(frozen=True)
class Panel:
    """One heatmap of a figure, in a row and column of the grid."""

    row: int
    column: int
    values: np.ndarray  # [row, column], NaN where there is no cell or nothing to patch
    agrees: np.ndarray  # bool [row, column]
    kind: str = ""
    names: tuple[str, ...] = ()  # one for each further dimension
    intervals: np.ndarray | None = None  # [row, column], in words

    @property
    def name(self) -> str:
        """Its whole name, escaped."""
        return escape(" · ".join(self.names))


class Grid:
    """Where the panels of a figure stand, in a plot of known height."""

    def __init__(self, rows: Axis, columns: Axis, panels: Sequence[Panel] = ()) -> None:
        self.rows = rows
        blank = np.zeros((len(rows.words), len(columns.words)))
        self.panels = list(panels) or [Panel(0, 0, blank, blank > 0)]
        across, down = (max(getattr(p, i) for p in self.panels) + 1 for i in ("column", "row"))
        width = len(columns.words)
        if down == 1 and across * width > _MAX_COLUMNS:
            down = math.ceil(across / max(1, _MAX_COLUMNS // width))
            across = math.ceil(across / down)
            spots = [divmod(i, across) for i in range(len(self.panels))]
            self.panels = [
                replace(panel, row=i, column=j)
                for panel, (i, j) in zip(self.panels, spots, strict=True)
            ]
        self.across, self.down = across, down
        named = columns.title not in NUMBERED
        self.columns = columns.upright(across) if named else columns
        #: The number that plotly gives each panel's axes.
        numbers = [p.row * across + p.column + 1 for p in self.panels]
        self.axes = ["" if n == 1 else str(n) for n in numbers]
        depth = len(self.panels[0].names)
        self.over = 22 if depth else 0
        self._between = 26 if depth else 14
        self.left = 22 + 7 * rows.longest + 16 * (depth == 2)
        # Every how many columns there is a label; names are never left out.
        self.step = 1 if named else math.ceil(width * across / 33)
        self._each = self.columns.each if named else 11 if columns.turned else 6

    def height(self, n_rows: int) -> int:
        """Pixels of the whole plot; the more rows there are, the fewer for each."""
        each = 22 if n_rows <= 12 else 15 if n_rows <= 40 else 12
        return self.down * max(n_rows * each, 44) + (self.down - 1) * self._between

    def min_width(self) -> int:
        """Pixels below which labels would overlap."""
        labels = self.across * math.ceil(len(self.columns.words) / self.step)
        return self.left + 26 + math.ceil(labels * self._each)

    def layout(self, view: np.ndarray, *, every_row: bool) -> dict[str, Any]:
        """The axes of every panel for the rows in view, ``every_row`` of them with a label."""
        n = len(view)
        domains = make_subplots(
            self.down,
            self.across,
            horizontal_spacing=0.025 if self.across > 1 else 0,
            vertical_spacing=self._between / self.height(n) if self.down > 1 else 0,
        ).layout
        most = n if every_row else 20 if self.rows.title == "layer" else 300
        shown = Axis([], [self.rows.ticks[i] for i in view], self.rows.title)
        y_at = range(0, n, math.ceil(n / most))
        x_at = range(0, len(self.columns.words), self.step)
        own = "layer" if self.rows.title == "layer" else ""
        layout: dict[str, Any] = {}
        for panel, axis in zip(self.panels, self.axes, strict=True):
            lowest = not any(p.column == panel.column and p.row > panel.row for p in self.panels)
            words = self.columns.title if lowest and not self.columns.turned else ""
            layout[f"xaxis{axis}"] = {
                **AXIS,
                **self.columns.ticked(x_at, words),
                "domain": list(domains[f"xaxis{axis}"].domain),
                "anchor": f"y{axis}",
                "range": [-0.5, len(self.columns.words) - 0.5],
                "showticklabels": lowest,
            }
            row_name = panel.names[:1] if len(panel.names) == 2 else ()
            words = "" if panel.column else "\n".join(filter(None, [*row_name, own]))
            layout[f"yaxis{axis}"] = {
                **AXIS,
                **shown.ticked(y_at, words),
                "domain": list(domains[f"yaxis{axis}"].domain),
                "anchor": f"x{axis}",
                "range": [n - 0.5, -0.5],
                "tickangle": 0,
                "showticklabels": panel.column == 0,
            }
        return layout

    def names(self) -> list[dict[str, Any]]:
        """Names over the panels; over the columns of a grid once."""
        notes = []
        for panel, axis in zip(self.panels, self.axes, strict=True):
            # Rows of a grid are named at its left, and its columns once.
            if panel.names and not (len(panel.names) == 2 and panel.row):
                place = {"xref": f"x{axis} domain", "yref": f"y{axis} domain", "x": 0.5}
                notes.append(note_above(panel.names[-1], 2, **place))
        return notes


class Scale:
    """A colour scale symmetric about the corrupted baseline.

    It reaches to the clean one, or to the largest finite effect if that is further: ``wide``. Where
    effects use less than half of the colours, buttons let the reader choose the largest effect:
    ``narrow``. Where they would be too pale to see, the figure opens so, and a ``note`` says it.
    """

    def __init__(
        self,
        clean: float,
        centre: float,
        effects: np.ndarray,
        names: tuple[str, str],
    ) -> None:
        self.clean, self.centre, self.names = clean, centre, names
        span = abs(clean - centre)
        largest = float(np.abs(effects[np.isfinite(effects)]).max(initial=0.0))
        self.small, self.tiny = 0 < largest < 0.5 * span, 0 < largest < 0.2 * span
        self.wide = self._reaching(max(span, largest) or 1.0)
        self.narrow = self._reaching(largest) if self.small else self.wide
        self.opening = self.narrow if self.tiny else self.wide
        self.note = ""
        if self.tiny:
            part = theme.percent(largest / span, digits=1)
            self.note = (
                f"the darkest colour is the largest effect, {part} of {' minus '.join(names)}"
            )

    def menu(self, bottom: int) -> dict[str, Any]:
        """Buttons that choose how far the colours reach, ``bottom`` pixels above the plot."""
        wide, narrow = (flattened({"coloraxis": part}) for part in (self.wide, self.narrow))
        buttons = [
            button(f"colours up to {self.names[0]}", "relayout", wide),
            button("up to the largest effect", "relayout", narrow),
        ]
        return menu_above(buttons, bottom, active=int(self.tiny))

    def _reaching(self, half: float) -> dict[str, Any]:
        half = max(half, 1e-12 * abs(self.centre))  # Else a float would not tell the ends apart.
        low, high = self.centre - half, self.centre + half
        ticks = {self.centre: f"{number(self.centre)}<br>{escape(self.names[1])}"}
        distance = abs(self.clean - self.centre)
        if 0 < distance <= half * 1.0001:
            # Below the other one where there is no room beside it.
            words = number(self.clean), escape(self.names[0])
            close = distance < 0.45 * half
            ticks[self.clean] = "<br><br>" + " ".join(words) if close else "<br>".join(words)
        # Between the baselines, round numbers where there is room for them.
        for value, text in round_numbers(low, high).items():
            if all(abs(value - other) > 0.3 * half for other in ticks):
                ticks[value] = text
        return {
            "cmin": low,
            "cmax": high,
            "colorbar": {"tickvals": list(ticks), "ticktext": list(ticks.values())},
        }


def round_numbers(low: float, high: float) -> dict[float, str]:
    """Four to nine round numbers between two others, with how they are written.

    >>> list(round_numbers(-4.4, 3.4).values())
    ['−4', '−3', '−2', '−1', '0', '1', '2', '3']
    """
    if not low < high:
        return {}
    power = math.floor(math.log10(high - low))
    step = next(s * 10.0**power for s in (0.2, 0.5, 1, 2) if (high - low) < 8 * s * 10.0**power)
    multiples = range(math.ceil(low / step), math.floor(high / step) + 1)
    values = [round(i * step, max(0, 1 - power)) for i in multiples]
    return {value: f"{value:.12g}".replace("-", "−") for value in values}


def button(label: str, method: str, *changes: dict[str, Any]) -> dict[str, Any]:
    """An entry of a menu or a slider, with what it sets."""
    return {"label": escape(label), "method": method, "args": list(changes)}


def menu_above(buttons: list[dict[str, Any]], bottom: int, **more: Any) -> dict[str, Any]:
    """A row of buttons, ``bottom`` pixels above the plot; "dropdown" as type hides all but one."""
    return {
        "type": "buttons",
        "direction": "down" if more.get("type") == "dropdown" else "right",
        "buttons": buttons,
        "x": 0,
        "xanchor": "left",
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": bottom, "t": 0, "l": 0, "r": 0},
        "showactive": True,
        **theme.MENU,
        **more,
    }


def note_above(text: str, bottom: int, **place: Any) -> dict[str, Any]:
    """Words ``bottom`` pixels above the plot."""
    font = {"size": 12}
    shared = {"y": 1, "yanchor": "bottom", "showarrow": False, "font": font}
    return {"text": escape(text), "yshift": bottom, **shared, **place}


def flattened(layout: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested layout entries by path, so that an update changes them and keeps their siblings."""
    flat: dict[str, Any] = {}
    for key, value in layout.items():
        if isinstance(value, Mapping):
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def composed(
    traces: Sequence[Any],
    title: tuple[str, str],
    *,
    over: int,
    plot: int,
    below: int,
    left: int,
    right: int = 26,
    alt: str,
    caption: str,
    min_width: int | None = None,
    bar: int | None = None,
    spare: int = 0,
    **layout: Any,
) -> go.Figure:
    """A figure of stacked parts, each of so many pixels; below ``min_width`` it is scrolled.

    From the top: the title and the line below it, ``over`` for menus, a colour bar whose upper
    edge is ``bar`` above the plot, names of panels, then the ``plot`` and what is ``below``.
    Of ``over``, only a telephone needs what is ``spare``.
    """
    settings, title_height = theme.title(*title)
    settings["wide"]["title.pad.t"] += spare
    top = title_height + over
    meta = {"alt": alt, "caption": caption, "title": settings}
    figure = go.Figure(traces)
    figure.update_layout(
        title={
            "x": 0,
            "xanchor": "left",
            "xref": "container",
            "y": 1,
            "yanchor": "top",
            "yref": "container",
            "pad": {"l": 6},
            "font": {"size": 14},
        },
        font={"color": theme.INK, "family": "Helvetica Neue, Helvetica, Arial, sans-serif"},
        paper_bgcolor="rgba(0,0,0,0)",
        autosize=True,
        dragmode=False,
        hoverlabel={"align": "left"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": theme.INK},
        template="none",
        height=top + plot + below,
        margin={"l": left, "r": right, "t": top, "b": below, "pad": 0, "autoexpand": False},
        meta=meta if min_width is None else {**meta, "min_width": min_width},
        **layout,
    )
    figure.update_layout({k.replace(".", "_"): v for k, v in settings["wide"].items()})
    if bar is not None:
        figure.update_layout(
            plot_bgcolor=theme.GAP,
            coloraxis_colorbar={**_BAR, "y": 1 - (top - bar) / figure.layout.height},
        )
    return figure
