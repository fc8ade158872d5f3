"""Sweeps and attention patterns as heatmaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
import xarray as xr

from patching_demo.plots import facts, panels, theme
from patching_demo.plots.theme import compact, escape, percent
from patching_demo.results import baselines, baselines_are_equal


def heatmap(
    result: xr.DataArray,
    *,
    title: str | None = None,
    caption: str | None = None,
    top: int | None = 30,
    collapse: bool = True,
) -> go.Figure:
    """A sweep as a heatmap, or as several side by side with one colour scale.

    Colours centre on the corrupted baseline and reach as far as the clean one (further if an
    effect does): blue is towards the clean run, orange away from it. Grey cells do not exist; at
    cells marked "=" there is nothing to patch.

    Args:
        result: from :func:`patching_demo.sweep` or :func:`patching_demo.combine`, with
            dimensions among ``layer``, ``position`` or ``role``, and ``head``, and up to two
            others, which become panels. With three, rows are heads (L9H6) and columns are
            positions or roles. Of a result with ``prompt``, the mean over prompts is drawn; the
            hover of one from :func:`patching_demo.interval` has its bounds.
        title: instead of the one made from the result's attributes.
        caption: instead of the sentence on how to read the figure.
        top: of more heads by position than this, only so many rows with the largest effects are
            drawn, largest first; a button shows all. None draws all. Layers stay in their order.
        collapse: draw three or more neighbouring positions that agree as one column.

    Raises:
        ValueError: if there is nothing to draw, a baseline is not finite, or the dimensions or
            attributes do not fit.
    """
    result = facts.drawn(result)
    clean, centre = baselines(result)
    grid = panels.Grid(*_panels(result, collapse))
    effect = np.stack([panel.values - centre for panel in grid.panels])
    every = np.arange(len(grid.rows.words))
    trimmed = top is not None and len(every) > top and grid.rows.title == "head"
    views = [panels.largest_rows(effect, top), every] if trimmed else [every]
    scale = panels.Scale(clean, centre, effect, facts.baseline_names(result))
    traces = [
        [trace for panel in zip(grid.panels, grid.axes, strict=True)
         for trace in _panel_traces(result, *panel, grid, scale, view, visible=i == 0)]
        for i, view in enumerate(views)
    ]  # fmt: skip
    # From the plot upwards: names of panels, colour bar, menus, title.
    bar = grid.over + panels.BAR_HEIGHT
    menus = [scale.menu(bar + 8 + panels.MENU_HEIGHT * trimmed)] if scale.small else []
    main, below = facts.title_of(result, title)
    heights = [grid.height(len(view)) for view in views]
    layouts = [grid.layout(v, every_row=trimmed and i == 0) for i, v in enumerate(views)]
    figure = panels.composed(
        [trace for view in traces for trace in view],
        (main, below),
        over=bar + panels.MENU_HEIGHT * (trimmed + scale.small),
        plot=heights[0],
        below=grid.columns.below(),
        left=grid.left,
        bar=bar,
        alt=_alt(result, f"{main} ({below})", grid),
        caption=caption or _caption(result, grid, len(views[0]) if trimmed else 0, scale.note),
        min_width=grid.min_width(),
        coloraxis={"colorscale": theme.DIVERGING, **scale.opening},
        annotations=grid.names(),
        **layouts[0],
    )
    if trimmed:
        labels = f"the {top} rows with the largest effects", f"all {len(every)}"
        bar_top = (1 - figure.layout.coloraxis.colorbar.y) * figure.layout.height
        buttons = []
        for i, (label, layout) in enumerate(zip(labels, layouts, strict=True)):
            total = figure.layout.height - heights[0] + heights[i]
            layout |= {"height": total, "coloraxis": {"colorbar": {"y": 1 - bar_top / total}}}
            visible = [k == i for k, view in enumerate(traces) for _ in view]
            changes = {"visible": visible}, panels.flattened(layout)
            buttons.append(panels.button(label, "update", *changes))
        menus.insert(0, panels.menu_above(buttons, bar + 8))
    figure.layout.updatemenus = menus
    return figure


def _panels(
    result: xr.DataArray, collapse: bool
) -> tuple[panels.Axis, panels.Axis, list[panels.Panel]]:
    cell_dims = [d for d in facts.CELL_DIMS if d in result.dims]
    lead = [str(d) for d in result.dims if d not in cell_dims]
    if len(cell_dims) < 2:
        raise ValueError(
            f"a heatmap needs two of layer, position (or role) and head, got {list(result.dims)}: "
            "draw it with curves or bars"
        )
    if {"position", "role"} <= set(cell_dims):
        raise ValueError("the result has both positions and roles: select from one")
    if len(lead) > 2:
        raise ValueError(f"panels can show two further dimensions, got {lead}: select from one")
    *row_dims, column_dim = cell_dims
    rows, order = panels.axis_of(result, row_dims), [*lead, *row_dims, column_dim]
    columns, *arrays, bounds = panels.arrays(result, order, collapse=collapse)
    size, made = (len(rows.words), len(columns.words)), []
    for where in np.ndindex(*(result.sizes[d] for d in lead)):
        kinds = facts.kinds_of(result.isel(dict(zip(lead, where, strict=True))))
        names = facts.names_at(result, lead, where)
        spot = where if len(lead) == 2 else (0, *where, 0)[:2]
        agrees, values = (array[where].reshape(size) for array in arrays)
        said = None
        if bounds is not None:
            said = facts.intervals(bounds[(slice(None), *where)].reshape(2, *size))
        made.append(panels.Panel(*spot, values, agrees, "".join(kinds[:1]), names, said))
    return rows, columns, made


def _panel_traces(
    result: xr.DataArray,
    panel: panels.Panel,
    axis: str,
    grid: panels.Grid,
    scale: panels.Scale,
    view: np.ndarray,
    *,
    visible: bool,
) -> list[Any]:
    """What :func:`panels.traces` draws of the rows in view."""
    clean, centre = baselines(result)
    values, name, own = panel.values[view], panel.name, {"name": panel.name}
    template = f"{name}<br>" * bool(name) + f"%{{y}}, %{{x}}{_grouped_heads(result, panel)}"
    template += f"<br>{escape(facts.metric_of(result))}: "
    near = template + "%{z:.3~g}"
    span = escape(" minus ".join(facts.baseline_names(result)))
    if (clean, centre) == (1.0, 0.0):
        near += f" (%{{z:.0%}} of {span})"
    elif not baselines_are_equal(result):
        near += f" (%{{customdata:.0%}} of {span})"
        own["customdata"] = compact((values - centre) / (clean - centre))
    if panel.intervals is not None:
        near += f"<br>{facts.interval_name(result)}: %{{hovertext}}"
        own["hovertext"] = panel.intervals[view]
    return panels.traces(
        values,
        panel.agrees[view],
        grid.columns.words,
        [grid.rows.words[i] for i in view],
        scale,
        hover=(near, template + "%{text}"),
        own=own,
        xaxis=f"x{axis}",
        yaxis=f"y{axis}",
        visible=visible,
    )


def _grouped_heads(result: xr.DataArray, panel: panels.Panel) -> str:
    key_value = result.attrs.get("n_key_value_heads")
    known = panel.kind in ("k", "v") and isinstance(key_value, (int, np.integer))
    if known and 0 < key_value < result.sizes.get("head", key_value):
        return " (key-value head)"
    return ""


def _caption(result: xr.DataArray, grid: panels.Grid, top: int, note: str) -> str:
    source, target = facts.baseline_names(result)
    values, agrees = (np.stack([getattr(p, n) for p in grid.panels]) for n in ("values", "agrees"))
    return theme.sentence(
        f"Each cell is the metric ({facts.metric_of(result)}) of the {target} run after one "
        f"patch: white means no change, blue a move towards the {source} run, orange a move away",
        facts.where_intervals_are(result, "hover texts have"),
        f"at {grid.columns.title}s marked = both inputs agree up to there: nothing to patch"
        * bool(agrees.any()),
        *facts.what_is_odd(result, values, agrees),
        "a row is named by the middle one of its layers" * ("window" in result.attrs),
        note,
        f"rows are sorted by their largest effect, the first {top} shown" * bool(top),
    )


def _alt(result: xr.DataArray, title: str, grid: panels.Grid) -> str:
    names = [" · ".join(panel.names) for panel in grid.panels if panel.names]
    text = f"Heatmap. {title}. " + " by ".join(
        f"{len(axis.words)} {side} ({axis.title})"
        for side, axis in (("rows", grid.rows), ("columns", grid.columns))
    )
    if names:
        text += f", in {len(names)} panels: {theme.listed(names)}"
    return f"{text}. {facts.baselines_in_words(result)}.{facts.largest_effects(result)}"


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
    batch, size = tokens.shape
    labels = [str(i) for i in range(size)] if labels is None else list(labels)
    if len(labels) != size:
        raise ValueError(f"there are {len(labels)} labels for {size} positions")
    hooks = {layer: f"blocks.{layer}.attn.hook_pattern" for layer, _ in heads}
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=list(hooks.values()))
    axis = panels.position_axis(labels, labels)
    shown = [f"L{layer}H{head}" for layer, head in heads]
    traces, said = [], []
    for name, (layer, head) in zip(shown, heads, strict=True):
        weights = cache[hooks[layer]][:, head].float().mean(0).cpu().numpy()
        # A causal head cannot look ahead: those cells do not exist.
        weights = np.where(np.tri(size, dtype=bool) | (weights > 0), weights, np.nan)
        template = f"{name}, from %{{y}}<br>to %{{x}}<br>attention %{{z:.0%}}<extra></extra>"
        traces.append(
            panels.cells(
                weights, axis.words, axis.words,
                name=name, visible=not traces, hovertemplate=template,
            )
        )  # fmt: skip
        flat = np.argsort(-np.nan_to_num(weights), axis=None, kind="stable")[:3]
        places = [np.unravel_index(k, weights.shape) for k in flat]
        strongest = [f"'{labels[a]}' to '{labels[b]}' {percent(weights[a, b])}" for a, b in places]
        said.append(f"{name} from {'; from '.join(strongest)}")
    several = len(heads) > 1
    main = title or f"Attention pattern{'s' * several} of {theme.listed(shown)}"
    below = str(getattr(model.cfg, "model_name", "model"))
    below += f" · mean over {batch} prompts" if batch > 1 else ""
    grid = panels.Grid(axis, axis)
    layout = grid.layout(np.arange(size), every_row=True)
    layout["yaxis"]["title"] = {"text": ""}
    menus, bar = [], 46
    if several:
        buttons = [
            panels.button(name, "restyle", {"visible": [n == name for n in shown]})
            for name in shown
        ]
        menus.append(panels.menu_above(buttons, bar + 6, type="dropdown"))
    return panels.composed(
        traces,
        (main, below),
        over=bar + panels.MENU_HEIGHT * several,
        plot=grid.height(size),
        below=axis.below(),
        left=grid.left,
        bar=bar,
        alt=f"Heatmap{', with a menu of heads' * several}. {main} ({below}), {size} positions. "
        f"Strongest: {'. '.join(said)}.",
        caption=caption
        or ("Choose a head above; each" if several else "Each")
        + " row says how the head, at that position, divides its attention among the "
        "positions up to there, and adds up to 1.",
        updatemenus=menus,
        coloraxis={
            "colorscale": theme.SEQUENTIAL,
            "cmin": 0,
            "cmax": 1,
            "colorbar": {"tickvals": [0, 0.5, 1], "ticktext": ["0", "0.5", "1"]},
        },
        **layout,
    )
