"""Sweeps and attention patterns as heatmaps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
import xarray as xr

from patching_demo.plots import theme
from patching_demo.plots.layout import (
    AGREE,
    BAR,
    BAR_HEIGHT,
    CELL_DIMS,
    MENU_HEIGHT,
    NAME_HEIGHT,
    Axis,
    Grid,
    Panel,
    Scale,
    axis_number,
    baseline_names,
    baselines_of,
    column_axis,
    common_layout,
    entry_name,
    flattened,
    menu_above,
    metric_words,
    row_axis,
    title_of,
)
from patching_demo.plots.theme import compact, escape, number
from patching_demo.results import largest_cells

__all__ = [
    "attention_patterns",
    "heatmap",
]


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
    clean, centre = baselines_of(result)
    panels, rows, columns = _panels(result)
    if collapse or (collapse is None and len(panels) > 1):
        panels, columns = _collapsed(panels, columns)
    grid = Grid(panels, rows, columns)
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
    main, below = title_of(result, title)
    heading, heading_height = theme.title(main, below)
    scale = Scale(clean, centre, float(effect.max()), baseline_names(result))
    # From the plot upwards: names of panels, colour bar, menus, title.
    over_names = NAME_HEIGHT * grid.has_names
    over_bar = over_names + BAR_HEIGHT
    margin = heading_height + MENU_HEIGHT * (trimmed + scale.small) + over_bar
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
            {"label": name, "method": "update", "args": [{"visible": shown}, flattened(layout)]}
            for name, shown, layout in zip(names, visible, layouts, strict=True)
        ]
        menus.append(menu_above(buttons, over_bar + 8))
    if scale.small:
        menus.append(scale.menu(over_bar + 8 + MENU_HEIGHT * trimmed))
    figure = go.Figure(traces)
    figure.update_layout(
        **common_layout(heading),
        coloraxis={"colorscale": theme.DIVERGING, **scale.opening()},
        margin={
            "l": grid.left,
            "r": 26,
            "t": margin,
            "b": grid.bottom,
            "pad": 0,
            "autoexpand": False,
        },
        plot_bgcolor=theme.GAP,
        updatemenus=menus,
        annotations=grid.annotations(),
        shapes=grid.hatching(len(views[0])),
        meta={
            "alt": _alt(result, main, below, panels, rows, columns),
            "min_width": grid.min_width(),
            "caption": caption
            or _caption(result, panels, len(views[0]) if trimmed else 0, scale.note),
        },
    )
    figure.update_layout(layouts[0])
    figure.update_coloraxes(colorbar=BAR)
    return figure


def _panels(result: xr.DataArray) -> tuple[list[Panel], Axis, Axis]:
    cell_dims = [d for d in CELL_DIMS if d in result.dims]
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
    rows, columns = row_axis(result, row_dims), column_axis(result, column_dim)
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
        names = [entry_name(d, part[d].item() if d in part.coords else i) for d, i in at.items()]
        kind = str(part["kind"].item()) if "kind" in part.coords else result.attrs.get("kind", "")
        spot = where if len(lead) == 2 else (0, where[0] if where else 0)
        sides = tuple(names) if len(names) == 2 else ("", "")
        panels.append(Panel(" · ".join(names), kind, *spot, values, agree, *sides))
    return panels, rows, columns


def _collapsed(panels: list[Panel], columns: Axis) -> tuple[list[Panel], Axis]:
    """Positions that agree in every panel, drawn as one column."""
    agree = min(panel.agree for panel in panels)
    if agree < 3:
        return panels, columns
    first, last = columns.words[0], columns.words[agree - 1]
    words = [f"{first} to {last}", *columns.words[agree:]]
    ticks = [f"0–{agree - 1}", *columns.ticks[agree:]]
    kept = [replace(p, values=p.values[:, agree - 1 :], agree=p.agree - agree + 1) for p in panels]
    return kept, Axis(words, ticks, columns.title)


def _effect(panel: Panel, centre: float) -> np.ndarray:
    """How far each cell is from the corrupted baseline; -1 where there is no cell."""
    effect = np.nan_to_num(np.abs(panel.values - centre), nan=-1.0)
    effect[:, : panel.agree] = -1.0
    return effect


def _panel_traces(
    result: xr.DataArray,
    panel: Panel,
    rows: Axis,
    columns: Axis,
    view: np.ndarray,
    *,
    visible: bool,
) -> list[Any]:
    """The measured cells, and those at which there is nothing to patch."""
    axis = axis_number(panel)
    shared = {
        "y": [rows.words[i] for i in view],
        "xaxis": f"x{axis}",
        "yaxis": f"y{axis}",
        "visible": visible,
        "hoverongaps": False,
    }
    values = panel.values[view].copy()
    values[:, : panel.agree] = np.nan
    clean, centre = baselines_of(result)
    name = f"{escape(panel.name)}<br>" if panel.name else ""
    grouped = _grouped_heads(result, panel)
    template = f"{name}%{{y}}, %{{x}}{grouped}<br>{metric_words(result)}: %{{z:.3~g}}"
    span = escape(" minus ".join(baseline_names(result)))
    more: dict[str, Any] = {}
    if clean == centre:
        pass
    elif (clean, centre) == (1.0, 0.0):
        template += f" (%{{z:.0%}} of {span})"
    else:
        template += f" (%{{customdata:.0%}} of {span})"
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
                colorscale=[[0, theme.BAND], [1, theme.BAND]],
                showscale=False,
                hovertemplate=f"%{{x}}<br>{AGREE}<extra></extra>",
                name="nothing to patch",
                **shared,
            )
        )
    return traces


def _grouped_heads(result: xr.DataArray, panel: Panel) -> str:
    key_value = int(result.attrs.get("n_key_value_heads", 0) or 0)
    if panel.kind in ("k", "v") and 0 < key_value < result.sizes.get("head", key_value):
        return " (key-value head)"
    return ""


def _caption(result: xr.DataArray, panels: list[Panel], top: int, note: str) -> str:
    parts = [
        f"Each cell is the metric ({result.attrs.get('metric', 'unnamed')}) of the corrupted run "
        "after one patch: white means no change, blue a move towards the clean run, orange a move "
        "away"
    ]
    if any(panel.agree for panel in panels):
        parts.append("hatched positions have nothing to patch, as both inputs agree up to there")
    if any(np.isnan(panel.values[:, panel.agree :]).any() for panel in panels):
        parts.append("grey cells do not exist in this model")
    if note:
        parts.append(note)
    if top:
        parts.append(f"rows are sorted by their largest effect, the first {top} shown")
    return "; ".join(parts) + "."


def _alt(
    result: xr.DataArray,
    main: str,
    below: str,
    panels: list[Panel],
    rows: Axis,
    columns: Axis,
) -> str:
    clean, centre = baselines_of(result)
    names = [panel.name for panel in panels if panel.name]
    shape = (
        f"{len(rows.words)} rows ({rows.title}) by {len(columns.words)} columns ({columns.title})"
    )
    text = f"Heatmap. {main} ({below}). {shape}"
    if names:
        text += f", in {len(names)} panels: {theme.listed(names)}"
    high, low = baseline_names(result)
    text += f". Baselines: {low} {number(centre)}, {high} {number(clean)}."
    cells = largest_cells(result, 3)
    lead = [d for d in result.dims if d not in CELL_DIMS]
    said = []
    for _, cell in cells.iterrows():
        place = [str(entry_name(str(d), cell[str(d)])) for d in lead]
        place.append(str(cell["label"]))
        if "position" in cell:
            place.append(f"position '{cell['position']}'")
        said.append(f"{' '.join(place)}: {number(cell['value'])}")
    if said:
        text += f" Largest effects: {'; '.join(said)}."
    return text


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
    axis = column_axis(
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
    main = title or f"Attention pattern{'s' * several} of {theme.listed(shown)}"
    batch = tokens.shape[0]
    below = str(getattr(model.cfg, "model_name", "model"))
    below += f" · mean over {batch} prompts" if batch > 1 else ""
    size = len(labels)
    grid = Grid(
        [Panel("", "", 0, 0, np.zeros((size, size)), 0)],
        Axis(axis.words, axis.ticks, "position"),
        axis,
    )
    heading, height = theme.title(main, below)
    bar_height = 42
    over_bar = height + MENU_HEIGHT * several
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
        menus.append(
            {**menu_above(buttons, bar_height + 6), "type": "dropdown", "direction": "down"}
        )
    layout = grid.layout(np.arange(size), sorted_rows=False)
    layout["yaxis"]["title"] = {"text": ""}
    bar = {"tickvals": [0, 0.5, 1], "ticktext": ["0", "0.5", "1"]}
    figure = go.Figure(traces)
    figure.update_layout(
        **common_layout(heading),
        **layout,
        height=total,
        margin={"l": grid.left, "r": 26, "t": top, "b": grid.bottom, "pad": 0, "autoexpand": False},
        plot_bgcolor=theme.GAP,
        updatemenus=menus,
        coloraxis={
            "colorscale": theme.SEQUENTIAL,
            "cmin": 0,
            "cmax": 1,
            "colorbar": {**BAR, **bar, "y": 1 - over_bar / total},
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
