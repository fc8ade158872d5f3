"""Values along one dimension as curves or bars."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from patching_demo.plots import theme
from patching_demo.plots.layout import (
    OFF_CENTRE,
    Axis,
    as_shown,
    axis_title,
    baseline_names,
    baselines_of,
    column_axis,
    common_layout,
    entries_of,
    entry_name,
    metric_words,
    row_axis,
    title_of,
)
from patching_demo.plots.theme import compact, escape, number

__all__ = [
    "bars",
    "curves",
]


# Pixels that a telephone of 390 pixels leaves the horizontal axis.
_NARROW = 238


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
    main, below = title_of(result, title)
    traces = []
    for i, (name, values) in enumerate(series.items()):
        traces.append(
            go.Scatter(
                x=words.words,
                y=compact(values),
                name=escape(name),
                mode="lines+markers",
                line={"color": theme.LINES[i % 6], "dash": theme.DASHES[i % 6], "width": 2},
                marker={"symbol": theme.SYMBOLS[i % 6], "size": 7},
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
    _, centre = baselines_of(result)
    words, series = _series(result, along or (str(result.dims[-1]) if result.dims else ""))
    main, below = title_of(result, title)
    traces = [
        go.Bar(
            x=words.words,
            y=compact(values - centre),
            base=centre,
            customdata=compact(values),
            name=escape(name),
            marker={
                "color": theme.LINES[i % 6],
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
        f"Each bar runs from the {baseline_names(result)[1]} baseline to the metric "
        f"({result.attrs.get('metric', '')}) after one patch"
    )
    return _value_figure(result, traces, words, main, below, how, caption is None)


def _series(result: xr.DataArray, along: str) -> tuple[Axis, dict[str, np.ndarray]]:
    baselines_of(result)
    if along not in result.dims or result.ndim > 2:
        raise ValueError(
            f"lines and bars need one or two dimensions, one of them {along!r}, got "
            f"{dict(result.sizes)}: select or reduce the others"
        )
    others = [str(d) for d in result.dims if d != along]
    if along in ("head", "position"):
        words = column_axis(result, along)
    elif along == "layer":
        words = row_axis(result, ["layer"])
    else:
        names = [escape(entry_name(along, v)) for v in entries_of(result, along)]
        words = Axis(names, names, along)
    if not others:
        values = _measured(result).values.astype(float)
        return words, {str(result.attrs.get("metric", "value")): values}
    entries = entries_of(result, others[0])
    values = _measured(result).transpose(others[0], along).values.astype(float)
    if others[0] in ("layer", "head"):
        names = [f"{others[0]} {entry}" for entry in entries]
    else:
        names = [entry_name(others[0], entry) for entry in entries]
    return words, dict(zip(names, values, strict=True))


def _agree(result: xr.DataArray, words: Axis) -> int:
    """How many positions of the horizontal axis have nothing to patch, from the first on."""
    along = words.title == "position" and result.coords.get("agrees") is not None
    return int(result["agrees"].values.sum()) if along and result["agrees"].ndim == 1 else 0


def _measured(result: xr.DataArray) -> xr.DataArray:
    """The result without positions at which there is nothing to patch."""
    return result.where(~result["agrees"]) if "agrees" in result.coords else result


def _value_template(result: xr.DataArray, name: str, place: str, value: str) -> str:
    metric = metric_words(result)
    lead = "" if escape(name) == metric else f"{escape(name)}<br>"
    return f"{lead}{place}<br>{metric}: {value}<extra></extra>"


def _value_figure(
    result: xr.DataArray,
    traces: list[Any],
    words: Axis,
    main: str,
    below: str,
    caption: str,
    explain: bool,
) -> go.Figure:
    clean, centre = baselines_of(result)
    high_name, low_name = baseline_names(result)
    heading, height = theme.title(main, below)
    legend_rows = math.ceil(len(traces) / 3) if len(traces) > 1 else 0
    top = height + 24 * legend_rows + 8
    turned = words.title == "position"
    label = max(len(as_shown(t)) for t in words.ticks)
    bottom = int((6.4 * label + 12) if turned else 44)
    ticks = np.arange(len(words.words))
    if words.title in ("layer", "head", "position"):
        # As many numbers as fit beside each other on a telephone; names are never left out.
        each = 11.5 if turned else 6.6 * label + 6
        ticks = ticks[:: math.ceil(len(ticks) * each / _NARROW)]
    lines, notes = [], []
    for which, value in ((high_name, clean), (low_name, centre)):
        lines.append(
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": value,
                "y1": value,
                "line": {"color": theme.INK, "width": 1, "dash": "dash"},
                "layer": "below",
            }
        )
        notes.append(
            {
                "text": f"{escape(which)}<br>{number(value)}",
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
    agree = _agree(result, words)
    if agree:
        lines.append(
            {
                "type": "rect",
                "yref": "paper",
                "x0": -0.5,
                "x1": agree - 0.5,
                "y0": 0,
                "y1": 1,
                "fillcolor": theme.GAP,
                "line": {"width": 0},
                "layer": "below",
            }
        )
        notes.append(
            {
                "text": "nothing<br>to patch",
                "yref": "paper",
                "x": agree / 2 - 0.5,
                "y": 0.5,
                "showarrow": False,
                "font": {"size": 12},
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
        **common_layout(heading),
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
            "tickvals": (ticks + OFF_CENTRE).tolist(),
            "ticktext": [words.ticks[i] for i in ticks],
            "tickangle": -90 if turned else 0,
            "tickfont": {"size": 11},
            "title": axis_title("" if turned else words.title),
        },
        yaxis={
            "title": axis_title(units),
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
        caption += f"; dashed lines mark the {high_name} and the {low_name} baseline"
        caption += "; in the grey band there is nothing to patch." if agree else "."
    figure.update_layout(
        meta={
            "alt": f"{'Bars' if isinstance(traces[0], go.Bar) else 'Curves'}. {main} ({below}). "
            f"Baselines: {low_name} {number(centre)}, {high_name} {number(clean)}. "
            f"Furthest from {low_name}: {'; '.join(best)}.",
            "caption": caption,
        }
    )
    return figure
