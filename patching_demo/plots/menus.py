"""Many sweeps in one figure with a menu for each choice, which works without a kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from patching_demo.plots import theme
from patching_demo.plots.layout import (
    AGREE,
    AXIS,
    BAR,
    BAR_HEIGHT,
    CELL_DIMS,
    MENU_HEIGHT,
    OFF_CENTRE,
    Axis,
    Grid,
    Panel,
    Scale,
    axis_title,
    baselines_of,
    column_axis,
    common_layout,
    entries_of,
    entry_name,
    menu_above,
    row_axis,
)
from patching_demo.plots.theme import compact, escape, number
from patching_demo.results import combine, largest_cells
from patching_demo.results import share as to_share

__all__ = [
    "explore",
]


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
        cells = [d for d in CELL_DIMS if d in result.dims]
        lead = [str(d) for d in result.dims if d not in cells]
        if len(cells) < 2:
            raise ValueError(f"the explorer needs two of layer, position, head, got {cells}")
        if not lead and len(cells) < 3:
            raise ValueError("there is nothing to choose from: draw the result with heatmap")
        if len(lead) > 3:
            raise ValueError(f"the explorer has menus for three dimensions, got {lead}")
        self.clean, self.centre = baselines_of(result)
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
        kinds = entries_of(result, self.across) if self.across else [None]
        layers = entries_of(result, "layer") if self.sliding else [None]
        columns = column_axis(result, self.column_dim)
        rows = row_axis(result, [self.row_dim])
        # One blank column and row between blocks, so that a window never shows a neighbour.
        x_words, x_ticks = _blocks(kinds, columns, self._entry(self.across))
        y_words, y_ticks = _blocks(layers, rows, lambda layer: f"layer {layer}")
        states = list(itertools.product(*(entries_of(result, d) for d in self.rest)))
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
        return lambda value: entry_name(dim or "", value)

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
        chosen = [s == entries_of(self.result, d)[0] for d, s in zip(self.rest, state, strict=True)]
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
            colorscale=[[0, theme.BAND], [1, theme.BAND]],
            showscale=False,
            hoverongaps=False,
            hovertemplate=f"%{{x}}<br>{AGREE}<extra></extra>",
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
        columns: Axis,
        rows: Axis,
        x_ticks: list[str],
        y_ticks: list[str],
        first: int,
    ) -> go.Figure:
        width, height = len(columns.words), len(rows.words)
        panel = Panel("", "", 0, 0, np.zeros((height, width)), 0)
        grid = Grid([panel], rows, columns)

        def window(index: int, size: int, upward: bool = False) -> list[float]:
            low, high = index * (size + 1) - 0.5, index * (size + 1) + size - 0.5
            return [high, low] if upward else [low, high]

        choices = []
        if len(kinds) > 1:
            buttons = [
                {
                    "label": escape(entry_name(self.across or "", kind)),
                    "method": "relayout",
                    "args": [{"xaxis.range": window(i, width)}],
                }
                for i, kind in enumerate(kinds)
            ]
            choices.append((self.across, buttons))
        for place, dim in enumerate(self.rest):
            values = entries_of(self.result, dim)
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
        heading, heading_height = theme.title(main, below)
        largest = float(np.nanmax(np.abs(self.result.values)))
        scale = Scale(1.0, 0.0, largest)
        over_bar = BAR_HEIGHT + 8
        over_scale = over_bar + MENU_HEIGHT * scale.small
        # Two in a row, as more would not fit a telephone.
        menu_rows = math.ceil(len(choices) / 2)
        top = heading_height + over_scale + _CHOICE_HEIGHT * menu_rows
        menus, notes = [], []
        for i, (dim, buttons) in enumerate(choices):
            x = 0.5 * (i % 2)
            over = over_scale + _CHOICE_HEIGHT * (menu_rows - 1 - i // 2)
            menus.append(
                {
                    **menu_above(buttons, over),
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
                    "yshift": over + 32,
                    "showarrow": False,
                    "font": {"size": 12},
                }
            )
        sliders = []
        slider_height = start = 0
        if self.sliding:
            slider_height = 86
            # Open where the first choice of every menu has most to show.
            opening = self.result.isel({d: 0 for d in self.result.dims if d not in CELL_DIMS})
            effect = np.abs(np.nan_to_num(opening.transpose("layer", ...).values))
            start = int(effect.reshape(len(layers), -1).max(axis=1).argmax())
            sliders.append(
                {
                    "active": start,
                    "currentvalue": {"prefix": "layer ", "font": {"size": 13}},
                    "pad": {"t": grid.bottom - 4, "b": 6},
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
            menus.append(scale.menu(over_bar))
        bottom = grid.bottom + slider_height
        total = top + max(grid.height(height), 160) + bottom
        figure = go.Figure(traces)
        figure.update_layout(
            **common_layout(heading),
            height=total,
            margin={
                "l": grid.left + 12,
                "r": 26,
                "t": top,
                "b": bottom,
                "pad": 0,
                "autoexpand": False,
            },
            plot_bgcolor=theme.GAP,
            coloraxis={"colorscale": theme.DIVERGING, **scale.opening()},
            updatemenus=menus,
            sliders=sliders,
            annotations=notes,
            xaxis={
                **AXIS,
                "range": window(0, width),
                "tickvals": [i + OFF_CENTRE for i in shown],
                "ticktext": [x_ticks[i] for i in shown],
                "tickangle": -90 if grid.turned else 0,
                "title": axis_title("" if grid.turned else columns.title),
            },
            yaxis={
                **AXIS,
                "range": window(start, height, upward=True),
                "tickvals": [i + OFF_CENTRE for i in y_shown],
                "ticktext": [y_ticks[i] for i in y_shown],
                "title": axis_title(self.row_dim),
            },
            meta={
                "alt": self._alt(main, below, [str(d) for d, _ in choices]),
                "caption": self.caption or self._caption(first, scale),
            },
        )
        figure.update_coloraxes(colorbar={**BAR, "y": 1 - (top - BAR_HEIGHT) / total})
        return figure

    def _caption(self, first: int, scale: Scale) -> str:
        text = (
            "Choose above what to patch; each cell is the share of clean minus corrupted that one "
            "patch covers: 0 (white) changes nothing, 1"
            + (" " if scale.tiny else " (dark blue) ")
            + "makes the corrupted run as good as the clean one"
        )
        if scale.tiny:
            text += f"; {scale.note}"
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
            text += f" Menus: {theme.listed(names)}."
        cells = largest_cells(self.result, 3)
        lead = [str(d) for d in self.result.dims if d not in CELL_DIMS]
        said = []
        for _, cell in cells.iterrows():
            place = [entry_name(d, cell[d]) for d in lead] + [str(cell["label"])]
            if "position" in cell:
                place.append(f"position '{cell['position']}'")
            said.append(f"{' '.join(place)} {cell['share']:.0%}")
        return f"{text} Largest shares: {'; '.join(said)}." if said else text


#: Pixels for a menu with its name above it.
_CHOICE_HEIGHT = 56
_MENU_NAMES = {"kind": "activation", "corrupted": "corrupted input", "metric": "metric"}


def _agree_everywhere(result: xr.DataArray) -> int:
    if "agrees" not in result.coords or "position" not in result.dims:
        return 0
    agrees = (
        result["agrees"].transpose(..., "position").values.reshape(-1, result.sizes["position"])
    )
    return int(agrees.all(axis=0).sum())


def _blocks(entries: list[Any], axis: Axis, named: Any) -> tuple[list[str], list[str]]:
    """Names and tick labels of blocks laid one after another, each followed by a blank."""
    words, ticks = [], []
    for i, entry in enumerate(entries):
        prefix = "" if entry is None else f"{escape(named(entry))}, "
        words += [prefix + word for word in axis.words] + [" " * (i + 1)]
        ticks += [*axis.ticks, ""]
    return words, ticks
