"""Estimates beside measurements, a point for each cell."""

from __future__ import annotations

import itertools
import math

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from patching_demo.plots import facts, panels, theme
from patching_demo.plots.theme import compact, escape, number
from patching_demo.results import agreement, baselines

# Panels beside each other, and pixels: of a panel's height, of its least width, between two rows.
_ACROSS, _HEIGHT, _WIDTH, _BETWEEN = 3, 210, 190, 56


def scatter(
    estimate: xr.DataArray,
    exact: xr.DataArray,
    *,
    title: str | None = None,
    caption: str | None = None,
) -> go.Figure:
    """Each cell's estimate against its measured value; on the diagonal the two are equal.

    Args:
        estimate: of :func:`patching_demo.attribute`, or several combined. Up to two dimensions
            that are not layer, position, role or head become panels, such as ``kind`` and
            ``method``.
        exact: of :func:`patching_demo.sweep`, with the same cells. Cells that were not measured
            are left out, and so are infinite ones and those at which there is nothing to patch.
        title: instead of the default one.
        caption: instead of the sentence on how to read the figure.

    Raises:
        TypeError: if one has no labels.
        ValueError: if their labels, units or baselines differ, no cell has both values, or there
            are too many dimensions.

    >>> from patching_demo import attribute, induction_task, load_model, sweep
    >>> model = load_model("attn-only-2l-demo")
    >>> task = induction_task(model, batch=2, seq_len=6)
    >>> exact = sweep(model, task, "out", by="all_pos", progress=False)
    >>> points = scatter(attribute(model, task, "out", by="all_pos"), exact).data[1]
    >>> len(points.x) == exact.size
    True
    """
    estimate, exact = facts.drawn(estimate), facts.drawn(exact)
    scales = [(part.attrs.get("units"), *baselines(part)) for part in (estimate, exact)]
    if scales[0][0] != scales[1][0] or not np.allclose(scales[0][1:], scales[1][1:], rtol=1e-3):
        raise ValueError(
            "estimate and exact are on other scales, (units, clean, corrupted baseline) "
            f"{scales[0]} and {scales[1]}: take the share of both, or of neither"
        )
    lead = [str(d) for d in estimate.dims if d not in facts.CELL_DIMS]
    if len(lead) > 2:
        raise ValueError(f"panels can show two further dimensions, got {lead}: select from one")
    try:
        found, measured = xr.align(
            estimate.reset_coords(drop=True), exact.reset_coords(drop=True), join="exact"
        )
    except ValueError as error:
        raise ValueError(f"estimate and exact are not about the same cells: {error}") from None
    measured = measured.where(~agreement(exact).reset_coords(drop=True))
    found, measured = xr.broadcast(found, measured)
    cell_dims = [d for d in facts.CELL_DIMS if d in found.dims]
    if set(found.dims) - {*lead, *cell_dims}:
        raise ValueError(
            f"the estimate has dimensions {list(estimate.dims)} and exact {list(exact.dims)}: "
            "select from exact what the estimate does not have"
        )
    # Differences of large numbers do not fit single precision.
    found, measured = (
        part.transpose(*lead, *cell_dims).astype(float) for part in (found, measured)
    )
    both = np.isfinite(found.values) & np.isfinite(measured.values)
    if not both.any():
        raise ValueError("no cell has an estimate and a measured value: there is nothing to draw")
    axes = [panels.axis_of(estimate, [dim]).words for dim in cell_dims]
    words = np.array([", ".join(map(str, cell)) for cell in itertools.product(*axes)])

    shape = [found.sizes[dim] for dim in lead]
    across = shape[-1] if len(lead) == 2 else min(_ACROSS, *shape, 3) if lead else 1
    down = math.ceil(math.prod(shape) / across)
    height = down * _HEIGHT + (down - 1) * _BETWEEN
    grid = make_subplots(
        down,
        across,
        horizontal_spacing=0.08 if across > 1 else 0,
        vertical_spacing=_BETWEEN / height if down > 1 else 0,
    ).layout
    shown = np.concatenate([found.values[both], measured.values[both]])
    pad = 0.06 * (float(np.ptp(shown)) or 1.0)
    ends = [float(shown.min()) - pad, float(shown.max()) + pad]
    ticks = panels.round_numbers(*ends)
    # Beside each other, panels have room for every second of many numbers.
    values = list(ticks)
    step = values[1] - values[0] if across > 1 and len(values) > 5 else 0.0
    below_panels = [value for value in values if not step or round(value / step) % 2 == 0]
    metric, units = escape(facts.metric_of(exact)), str(exact.attrs.get("units", ""))
    in_units = ", as a share of clean minus corrupted"
    if units != facts.SHARE:
        in_units = f", in {units}" * bool(units)
    axis = {
        "range": ends,
        "tickmode": "array",
        "tickvals": list(ticks),
        "ticktext": list(ticks.values()),
        "tickfont": {"size": 11},
        "gridcolor": "rgba(127,127,127,0.25)",
        "zeroline": False,
    }
    traces, notes, layout, said = [], [], {}, []
    for i, where in enumerate(np.ndindex(*shape)):
        own = "" if i == 0 else str(i + 1)
        row, column = divmod(i, across)
        name = " · ".join(facts.names_at(estimate, lead, where))
        keep = both[where].ravel()
        x, y = (part.values[where].ravel()[keep] for part in (measured, found))
        here = {"xaxis": f"x{own}", "yaxis": f"y{own}"}
        traces += [
            go.Scatter(
                x=ends,
                y=ends,
                mode="lines",
                line={"color": theme.INK, "width": 1, "dash": "dash"},
                hoverinfo="skip",
                **here,
            ),
            go.Scatter(
                x=compact(x),
                y=compact(y),
                mode="markers",
                name=escape(name),
                marker={"color": theme.LINES[0], "size": 6, "opacity": 0.65},
                hovertext=[escape(word) for word in words[keep]],
                hovertemplate=f"{escape(name)}<br>"
                * bool(name)
                + f"%{{hovertext}}<br>{metric}: measured %{{x:.3~g}}, estimated %{{y:.3~g}}"
                "<extra></extra>",
                **here,
            ),
        ]
        if len(x):
            worst = int(np.argmax(np.abs(y - x)))
            said.append(
                f"{name or 'furthest'}: {words[keep][worst]}, measured {number(float(x[worst]))}, "
                f"estimated {number(float(y[worst]))}"
            )
        last = row == down - 1 or i + across >= math.prod(shape)
        layout[f"xaxis{own}"] = {
            **axis,
            "tickvals": below_panels,
            "ticktext": [ticks[value] for value in below_panels],
            "domain": list(grid[f"xaxis{own}"].domain),
            "anchor": f"y{own}",
            "title": panels.axis_title("measured" if last else ""),
        }
        layout[f"yaxis{own}"] = {
            **axis,
            "domain": list(grid[f"yaxis{own}"].domain),
            "anchor": f"x{own}",
            "title": panels.axis_title("" if column else "estimated"),
        }
        if name:
            place = {"xref": f"x{own} domain", "yref": f"y{own} domain", "x": 0.5}
            notes.append(panels.note_above(name, 3, **place))
    main, below = facts.title_of(estimate, title or "Estimated and measured effects")
    return panels.composed(
        traces,
        (main, below),
        over=26 if notes else 8,
        plot=height,
        below=46,
        left=58,
        alt=f"Scatter plots. {main} ({below}). Furthest from the diagonal: {'; '.join(said)}.",
        caption=caption
        or theme.sentence(
            "Each point is one cell, at its measured value to the right and its estimate upwards"
            + in_units,
            "on the dashed diagonal the two are equal",
            "cells with an infinite value are left out"
            * bool(np.isinf(found.values).any() or np.isinf(measured.values).any()),
        ),
        min_width=84 + across * _WIDTH if across > 1 else None,
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        annotations=notes,
        **layout,
    )
