"""Many sweeps in one figure with a menu for each choice, which works without a kernel.

A plotly menu cannot know what another one has chosen. So each menu sets a property that no other
touches: one moves the window on the horizontal axis, one on the vertical (a slider), one shows and
hides traces, one makes them opaque.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from patching_demo.plots import facts, panels, theme
from patching_demo.plots.theme import escape, number, percent
from patching_demo.results import baselines, combine
from patching_demo.results import share as to_share

#: Pixels for a menu with its name above it.
_CHOICE_HEIGHT = 56
_MENU_NAMES = {"kind": "activation", "corrupted": "corrupted input", "metric": "metric"}


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
            name, which are then combined. With layer, head and position or role, a slider
            chooses the layer; otherwise all layers are rows.
        title: instead of the default one.
        caption: instead of the default sentence.

    Raises:
        ValueError: if there are more than three further dimensions, or nothing to choose from.
    """
    measured = facts.drawn(combine(results) if isinstance(results, Mapping) else results)
    here = [d for d in facts.CELL_DIMS if d in measured.dims]
    lead = [str(d) for d in measured.dims if d not in here]
    if len(here) < 2:
        raise ValueError(f"the explorer needs two of layer, position (or role), head, got {here}")
    if {"position", "role"} <= set(here):
        raise ValueError("the result has both positions and roles: select from one")
    if not lead and len(here) < 3:
        raise ValueError("there is nothing to choose from: draw the result with heatmap")
    if len(lead) > 3:
        raise ValueError(f"the explorer has menus for three dimensions, got {lead}")
    *_, row_dim, column_dim = here
    # The kind moves the window sideways: its labels are then right for each kind.
    across = "kind" if "kind" in lead else (lead[-1] if lead else None)
    rest = [d for d in lead if d != across]
    names = facts.baseline_names(measured)

    # One array [state of the menus in `rest`, layer if it slides, row, entry across, column].
    shares = to_share(measured)
    layers = facts.entries_of(shares, "layer") if len(here) == 3 else [None]
    entries = facts.entries_of(shares, across) if across else [None]
    states = [*itertools.product(*(facts.entries_of(shares, d) for d in rest))]
    order = [*rest, *(["layer"] * (len(here) == 3)), row_dim, *filter(None, [across]), column_dim]
    columns, agrees, values, bounds = panels.arrays(shares, order)
    columns = columns.upright() if column_dim == "role" else columns
    rows = panels.axis_of(shares, [row_dim])
    shape = (len(states), len(layers), len(rows.words), len(entries), len(columns.words))
    agrees, values = agrees.reshape(shape), values.reshape(shape)
    said = np.full(len(states), None)
    if bounds is not None:
        said = _side_by_side(facts.intervals(bounds.reshape(2, *shape), percent), "")
    all_values, all_agrees = _side_by_side(values, np.nan), _side_by_side(agrees, False)
    x = _axis_of_blocks(
        [facts.entry_name(across or "", e) if across else "" for e in entries], columns
    )
    y = _axis_of_blocks([f"layer {e}" if e is not None else "" for e in layers], rows)

    scale = panels.Scale(1.0, 0.0, values, names)
    estimated = facts.estimated(measured)
    first = [facts.entries_of(shares, d)[0] for d in rest]
    traces, owners = [], []
    for i, state in enumerate(states):
        part = measured.sel(dict(zip(rest, state, strict=True)))
        chosen = [one == other for one, other in zip(state, first, strict=True)]
        shown = {
            "visible": all(chosen[:1]),
            "opacity": float(all(chosen[1:])),
            "hoverinfo": "all" if all(chosen[1:]) else "skip",
        }
        name = " · ".join(map(escape, state))
        levels = ", ".join(
            f"{escape(which)} {number(value)}"
            for which, value in zip(names[::-1], _baselines_in(part)[::-1], strict=True)
        )
        template = f"{name}<br>" * bool(name) + "%{x}<br>%{y}<br>"
        tail = f" of {escape(' minus '.join(names))}{estimated}<br>"
        if bounds is not None:
            tail += f"{facts.interval_name(shares)}: %{{hovertext}}<br>"
        tail += levels
        drawn = panels.traces(
            all_values[i],
            all_agrees[i],
            x.words,
            y.words,
            scale,
            hover=(f"{template}%{{z:.0%}}{tail}", f"{template}%{{text}}{tail}"),
            signed=False,
            own={"name": name, "hovertext": said[i]},
            **shown,
        )
        traces += drawn
        owners += [state] * len(drawn)

    def window(index: int, size: int) -> list[float]:
        return [index * (size + 1) - 0.5, index * (size + 1) + size - 0.5]

    height, width = len(rows.words), len(columns.words)
    choices: dict[str, list[dict[str, Any]]] = {}
    if across:
        choices[across] = [
            panels.button(
                facts.entry_name(across, entry), "relayout", {"xaxis.range": window(i, width)}
            )
            for i, entry in enumerate(entries)
        ]
    for place, dim in enumerate(rest):
        choices[dim] = []
        for entry in facts.entries_of(shares, dim):
            on = [state[place] == entry for state in owners]
            change: dict[str, list[Any]] = {"visible": on}
            if place:
                hover = ["all" if shown else "skip" for shown in on]
                change = {"opacity": [float(shown) for shown in on], "hoverinfo": hover}
            choices[dim].append(panels.button(facts.entry_name(dim, entry), "restyle", change))
    choices = {dim: buttons for dim, buttons in choices.items() if len(buttons) > 1}

    # Two menus in a row, as more would not fit a telephone.
    menu_rows = math.ceil(len(choices) / 2)
    over = panels.BAR_HEIGHT + 8 + panels.MENU_HEIGHT * scale.small
    menus, notes = [], []
    for i, (dim, buttons) in enumerate(choices.items()):
        at, above = 0.5 * (i % 2), over + _CHOICE_HEIGHT * (menu_rows - 1 - i // 2)
        menus.append(panels.menu_above(buttons, above, type="dropdown", x=at, active=0))
        place = {"xref": "paper", "yref": "paper", "x": at, "xanchor": "left"}
        notes.append(panels.note_above(_MENU_NAMES.get(dim, dim), above + 32, **place))
    if scale.small:
        menus.append(scale.menu(panels.BAR_HEIGHT + 8))
    below, start, sliders = columns.below(), 0, []
    if len(here) == 3:
        # Open where the first choice of every menu has most to show.
        size = np.nan_to_num(np.abs(values[0, :, :, 0]))
        start = int(size.reshape(len(layers), -1).max(axis=1).argmax())
        steps = [
            panels.button(str(layer), "relayout", {"yaxis.range": window(i, height)[::-1]})
            for i, layer in enumerate(layers)
        ]
        sliders.append(
            {
                "active": start,
                "currentvalue": {"prefix": "layer ", "font": {"size": 13}},
                "pad": {"t": below - 4, "b": 6},
                "len": 1,
                "steps": steps,
                "bgcolor": "#c9c9c9",
                "activebgcolor": "#8c8c8c",
                "bordercolor": "#8c8c8c",
                "ticklen": 3,
                "font": {"size": 10},
            }
        )
    grid = panels.Grid(rows, columns)
    y_step = math.ceil(height / (20 if row_dim == "layer" else 40))
    sources = " · ".join(filter(None, [facts.what_is_one_patch(measured), *facts.origin(measured)]))
    main = title if title is not None else f"Explore: one patch at a time{estimated}"
    alt = f"Interactive heatmap. {main} ({sources})."
    if choices:
        alt += f" Menus: {theme.listed([_MENU_NAMES.get(dim, dim) for dim in choices])}."
    source, target = names
    how = theme.sentence(
        f"Choose above what to patch; each cell is the share of {source} minus {target} that one "
        f"patch covers: 0 (white) changes nothing, 1{' (dark blue)' * (not scale.tiny)} makes the "
        f"{target} run as good as the {source} one",
        scale.note,
        "the slider chooses the layer" * bool(sliders),
        *facts.what_is_odd(measured, values, agrees),
        facts.where_intervals_are(shares, "hover texts have"),
        "on plain light grey both inputs agree: nothing to patch" * bool(agrees.any()),
    )
    return panels.composed(
        traces,
        (main, sources),
        over=over + _CHOICE_HEIGHT * menu_rows,
        plot=max(grid.height(height), 160),
        below=below + 86 * bool(sliders),
        left=grid.left + 12,
        bar=panels.BAR_HEIGHT,
        alt=alt + facts.largest_effects(shares),
        caption=caption or how,
        coloraxis={"colorscale": theme.DIVERGING, **scale.opening},
        updatemenus=menus,
        sliders=sliders,
        annotations=notes,
        xaxis={
            **panels.AXIS,
            **x.ticked(_ticks(len(entries), width, grid.step), None if not x.turned else ""),
            "range": window(0, width),
        },
        yaxis={
            **panels.AXIS,
            **y.ticked(_ticks(len(layers), height, y_step), row_dim),
            "range": window(start, height)[::-1],
        },
    )


def _side_by_side(blocks: np.ndarray, blank: Any) -> np.ndarray:
    """``[state, down, row, across, column]`` as one table for each state.

    One blank row and column stand after each block, so that a window never shows a neighbour.
    """
    padded = np.pad(blocks, [(0, 0), (0, 0), (0, 1), (0, 0), (0, 1)], constant_values=blank)
    states, down, row, across, column = padded.shape
    return padded.reshape(states, down * row, across * column)


def _axis_of_blocks(entries: list[str], axis: panels.Axis) -> panels.Axis:
    """The axis of blocks laid one after another, each followed by a blank."""
    words, ticks = [], []
    for i, entry in enumerate(entries):
        words += [f"{entry}, {word}" if entry else word for word in axis.words] + [" " * (i + 1)]
        ticks += [*axis.ticks, ""]
    return replace(axis, words=words, ticks=ticks)


def _ticks(blocks: int, size: int, step: int) -> list[int]:
    return [i * (size + 1) + j for i in range(blocks) for j in range(0, size, step)]


def _baselines_in(part: xr.DataArray) -> list[float]:
    """(clean, corrupted) as measured, before results were made shares."""
    given = [part.coords.get(f"{which}_baseline") for which in ("clean", "corrupted")]
    known = [float(value) for value in given if value is not None and value.size == 1]
    return known if len(known) == 2 else list(baselines(part))
