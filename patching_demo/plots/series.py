"""Values along one dimension as curves or bars."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from patching_demo.plots import facts, panels, theme
from patching_demo.plots.theme import compact, escape, number
from patching_demo.results import baselines


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

    Intervals (see :func:`patching_demo.interval`) are bands along layers, and whiskers elsewhere.

    Raises:
        ValueError: if a baseline is not finite, or the dimensions do not fit.
        TypeError: if ``result`` is not labelled.
    """

    def line(i: int, values: np.ndarray) -> go.Scatter:
        # The first six differ in everything, and no two of 216 are alike.
        dash, symbol = (i + i // 6) % 6, (i + i // 6 + i // 36) % 6
        return go.Scatter(
            y=compact(values),
            mode="lines+markers",
            line={"color": theme.LINES[i % 6], "dash": theme.DASHES[dash], "width": 2},
            marker={"symbol": theme.SYMBOLS[symbol], "size": 7},
        )

    result = facts.drawn(result)
    how = f"Each line is the metric ({facts.metric_of(result)}) after one patch"
    return _figure(result, along, line, title, caption, how)


def bars(
    result: xr.DataArray,
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
        ValueError: if a baseline is not finite, or the dimensions do not fit.
        TypeError: if ``result`` is not labelled.
    """
    result = facts.drawn(result)
    _, centre = baselines(result)

    def bar(i: int, values: np.ndarray) -> go.Bar:
        # Colour, pattern and outline together: no two are alike.
        return go.Bar(
            y=compact(values - centre),
            base=centre,
            marker={
                "color": theme.LINES[i % 6],
                "line": {"color": theme.INK, "width": 1.5 * (i // 48)},
                "pattern": {
                    "shape": theme.PATTERNS[(i + i // 6) % 8],
                    "fillmode": "overlay",
                    "fgcolor": "#ffffff",
                    "fgopacity": 0.7,
                },
            },
        )

    along = along or (str(result.dims[-1]) if result.dims else "")
    how = (
        f"Each bar runs from the {facts.baseline_names(result)[1]} baseline to the metric "
        f"({facts.metric_of(result)}) after one patch"
    )
    return _figure(result, along, bar, title, caption, how)


def _figure(
    result: xr.DataArray,
    along: str,
    draw: Callable[[int, np.ndarray], Any],
    title: str | None,
    caption: str | None,
    how: str,
) -> go.Figure:
    """A trace for each series between the two baselines."""
    clean, centre = baselines(result)
    source, target = facts.baseline_names(result)
    if along == "prompt":
        raise ValueError(
            "figures show the mean over prompts: select one, by result.isel(prompt=0) for instance"
        )
    if along not in result.dims or result.ndim > 2:
        raise ValueError(
            f"lines and bars need one or two dimensions, one of them {along!r}, got "
            f"{dict(result.sizes)}: select or reduce the others"
        )
    metric, measure = str(result.attrs.get("metric", "value")), escape(facts.metric_of(result))
    other = next((str(d) for d in result.dims if d != along), None)
    names = [metric]
    if other is not None:
        lead = f"{other} " if other in ("layer", "head") else ""
        names = [
            f"{lead}{facts.entry_name(other, entry)}" for entry in facts.entries_of(result, other)
        ]
    axis, agrees, values, bounds = panels.arrays(result, (..., along))
    shape = (len(names), len(axis.words))
    agrees, values = agrees.reshape(shape), values.reshape(shape)
    value = "%{customdata:.3~g}"
    if bounds is not None:
        bounds = bounds.reshape(2, *shape)
        value += f"<br>{facts.interval_name(result)}: %{{hovertext}}"
    shown = [values] if bounds is None else [values, np.where(np.isnan(values), np.nan, bounds)]
    ends = [*np.concatenate([part[np.isfinite(part)] for part in shown]), clean, centre]
    pad = 0.08 * ((max(ends) - min(ends)) or 1.0)
    bottom, top = min(ends) - pad, max(ends) + pad
    traces, bands, furthest = [], [], []
    for i, (name, row) in enumerate(zip(names, values, strict=True)):
        lead = "" if name == metric else f"{escape(name)}<br>"
        drawn = np.clip(row, bottom, top)  # Plotly would leave infinite ones out.
        trace = draw(i, drawn)
        if bounds is not None:
            trace.hovertext = facts.intervals(bounds[:, i])
            if along == "layer" and trace.type == "scatter":
                bands.append(_band(axis.words, *bounds[:, i], trace.line.color, str(i)))
                trace.legendgroup = str(i)
            else:
                low, high = bounds[:, i]
                trace.error_y = {
                    "array": compact(high - drawn),
                    "arrayminus": compact(drawn - low),
                    "symmetric": False,
                    "color": theme.INK,
                    "thickness": 2,
                    "width": 3,
                }
        trace.update(
            x=[escape(word) for word in axis.words],
            name=escape(name),
            customdata=compact(row),
            hovertemplate=f"{lead}%{{x}}<br>{measure}: {value}<extra></extra>",
        )
        traces.append(trace)
        if not np.isnan(row).all():
            at = int(np.nanargmax(np.abs(row - centre)))
            furthest.append(f"{name} {number(row[at])} at {axis.ticks[at]}")
    main, below = facts.title_of(result, title)
    at = range(len(axis.words))
    if axis.title in facts.NUMBERED:
        # As many numbers as fit beside each other on a telephone; names are never left out.
        at = at[:: math.ceil(len(at) * axis.each / panels.NARROW)]
    else:
        axis = axis.upright()
    everywhere = agrees.all(axis=0)
    if caption is None:
        caption = theme.sentence(
            f"{how}; dashed lines mark the {source} and the {target} baseline",
            facts.where_intervals_are(result, "bands are" if bands else "whiskers are"),
            facts.INFINITE * bool(np.isinf(values).any()),
            "in grey bands both inputs agree: nothing to patch" * bool(everywhere.any()),
        )
    # Of short names, two stand beside each other on a telephone, and five in a window.
    each = 45 + 6.6 * max(map(len, names))
    beside = [max(1, min(most, int(room // each))) for most, room in ((2, 240), (5, 640))]
    legend_rows = [math.ceil(len(traces) / n) if len(traces) > 1 else 0 for n in beside]
    figure = panels.composed(
        [*bands, *traces],
        (main, below),
        over=24 * legend_rows[0] + 8,
        spare=24 * (legend_rows[0] - legend_rows[1]),
        plot=280,
        below=axis.below(),
        left=56,
        right=64,
        alt=f"{type(traces[0]).__name__.replace('Scatter', 'Curve').rstrip('s')}s. {main} "
        f"({below}). {facts.baselines_in_words(result)}. Furthest from {target}: "
        f"{'; '.join(furthest)}.",
        caption=caption,
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=len(traces) > 1,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 12}},
        bargap=0.2,
        xaxis={
            "type": "category",
            "categoryorder": "array",
            "categoryarray": [escape(word) for word in axis.words],
            "showgrid": False,
            "tickmode": "array",
            "tickfont": {"size": 11},
            **axis.ticked(at, "" if axis.turned else None),
        },
        yaxis={
            "title": panels.axis_title(str(result.attrs.get("units", ""))),
            "range": [bottom, top],
            "gridcolor": "rgba(127,127,127,0.25)",
            "zeroline": False,
            "tickfont": {"size": 11},
        },
    )
    for name, baseline in ((source, clean), (target, centre)):
        figure.add_hline(
            baseline,
            line={"color": theme.INK, "width": 1, "dash": "dash"},
            layer="below",
            annotation={"text": f"{escape(name)}<br>{number(baseline)}", "font": {"size": 11}},
            annotation_position="right",
            annotation_align="left",
            annotation_xshift=3,
        )
    for agree, group in itertools.groupby(range(len(everywhere)), everywhere.__getitem__):
        run = list(group)
        if agree:
            edges = run[0] - 0.5, run[-1] + 0.5
            figure.add_vrect(*edges, fillcolor=theme.GAP, line_width=0, layer="below")
    return figure


def _band(
    words: list[str], low: np.ndarray, high: np.ndarray, color: str, group: str
) -> go.Scatter:
    """The area between two bounds: one closed line around each run of entries that have both."""
    x: list[str | None] = []
    y: list[float] = []
    known = np.isfinite(low) & np.isfinite(high)
    for has, run in itertools.groupby(range(len(words)), known.__getitem__):
        there = list(run)
        if has:
            back = there[::-1]
            x += [*(escape(words[i]) for i in [*there, *back]), None]
            y += [*high[there], *low[back], np.nan]
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return go.Scatter(
        x=x,
        y=compact(y),
        mode="lines",
        # The edge shows a run of a single entry, too.
        line={"width": 1, "color": f"rgba({red},{green},{blue},0.4)"},
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.18)",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=group,
        name="interval",
    )
