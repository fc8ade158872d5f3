"""Each point of a scatter plot is one cell, with what was measured and what was estimated."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr
from test_plots import LARGEST, NASTY, SHAPES, SMALLEST, TEXTS, _made

from patching_demo import combine, plots, share
from patching_demo.plots import theme

METHODS = ("gradient", "gradient+qk", "integrated")


def guessed(exact: xr.DataArray, seed: int = 1) -> xr.DataArray:
    """Estimates of what was measured, each a little off."""
    noise = np.random.default_rng(seed).normal(size=exact.shape).astype(np.float32)
    return exact.copy(data=exact.values + noise).assign_attrs(method="gradient")


def points(figure):
    return [trace for trace in figure.data if trace.mode == "markers"]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_cell_is_a_point_with_both_numbers(shape):
    exact = _made(**SHAPES[shape]).copy()
    exact[{dim: 0 for dim in exact.dims if dim != "position"}] = np.nan
    estimate = guessed(exact)
    drawn = points(plots.scatter(estimate, exact))
    assert len(drawn) == exact.sizes.get("kind", 1)
    for i, trace in enumerate(drawn):
        pair = exact, estimate
        if "position" in exact.dims:
            pair = [part.where(~part["agrees"]) for part in pair]
        pair = [part.isel(kind=i) if "kind" in part.dims else part for part in pair]
        order = [d for d in ("layer", "head", "position", "role") if d in exact.dims]
        x, y = (part.transpose(*order).values.ravel() for part in pair)
        there = np.isfinite(x)
        np.testing.assert_allclose(trace.x, x[there], rtol=1e-3)
        np.testing.assert_allclose(trace.y, y[there], rtol=1e-3)
        # The words of a point name its cell.
        cell = dict(
            zip(
                order,
                np.unravel_index(np.flatnonzero(there)[-1], [exact.sizes[d] for d in order]),
                strict=True,
            )
        )
        assert f"layer {cell['layer']}" in trace.hovertext[-1]
        assert "head" not in cell or f"head {cell['head']}" in trace.hovertext[-1]
        assert "position" not in cell or f"position {cell['position']} " in trace.hovertext[-1]


def test_methods_and_kinds_make_a_grid_with_the_same_axes():
    exact = _made(("kind", "layer", "head"), kinds=("q", "k"))
    estimates = {name: guessed(exact, i) for i, name in enumerate(METHODS)}
    figure = plots.scatter(combine(estimates, "method").transpose("kind", "method", ...), exact)
    assert [trace.name for trace in points(figure)] == [
        f"{kind} · {method}" for kind in ("query", "key") for method in METHODS
    ]
    for trace, kind in zip(points(figure), ["q"] * 3 + ["k"] * 3, strict=True):
        np.testing.assert_allclose(trace.x, exact.sel(kind=kind).values.ravel(), rtol=1e-3)
    axes = [figure.layout[f"{axis}axis{i or ''}"] for axis in "xy" for i in ("", 2, 3, 4, 5, 6)]
    assert len({tuple(axis.range) for axis in axes}) == 1
    rows = {figure.layout[f"yaxis{i}"].domain for i in ("", 2, 3)}
    assert len(rows) == 1 and figure.layout.yaxis4.domain not in rows
    assert figure.layout.meta["min_width"] > 390


def test_the_worst_cell_is_said():
    exact = _made(("layer", "head"))
    estimate = exact.assign_attrs(method="gradient").copy()
    estimate[2, 1] += 3.0
    meta = plots.scatter(estimate, exact).layout.meta
    assert "layer 2, head 1" in meta["alt"] and "estimated" in meta["caption"] + meta["alt"]
    assert f"estimated {theme.number(float(estimate[2, 1]))}" in meta["alt"]


def test_names_are_shown_as_text():
    result = _made(("kind", "layer", "position"), kinds=("q", "k"), nasty=True)
    over = combine({name: guessed(result) for name in NASTY[:3]}, "<script>over")
    content = json.loads(plots.scatter(over, result).to_json())
    content["layout"].pop("meta")
    for text in json.dumps(content, ensure_ascii=False).split('"'):
        assert not TEXTS.search(text.replace("<extra></extra>", "")), text


@pytest.mark.parametrize("odd", [np.inf, -np.inf, LARGEST, -LARGEST, SMALLEST, 1e200])
def test_any_number_can_be_drawn(odd):
    exact = _made(("layer", "head"))
    estimate = guessed(exact).astype(float)
    estimate[1, 2] = odd
    estimate[1, 3] = -LARGEST
    figure = plots.scatter(estimate, exact)
    (drawn,) = points(figure)
    left_out = abs(odd) > LARGEST
    assert len(drawn.x) == exact.size - left_out
    assert ("infinite value are left out" in figure.layout.meta["caption"]) == left_out
    low, high = figure.layout.yaxis.range
    assert np.isfinite([low, high]).all() and low < float(np.min(drawn.y))
    assert high > float(np.max(drawn.y)) and figure.layout.yaxis.tickvals


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda exact: exact.isel(layer=[0, 1]), "not about the same cells"),
        (lambda exact: exact.where(False), "nothing to draw"),
        (lambda exact: exact.expand_dims(metric=["a"]), "select from exact"),
        (share, "on other scales"),
        (lambda exact: exact.assign_attrs(clean_baseline=5.0), "on other scales"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, match):
    exact = _made(("layer", "head"))
    with pytest.raises(ValueError, match=match):
        plots.scatter(guessed(exact), change(exact))
    deep = combine({"a": guessed(exact)}, "a").expand_dims(b=[0], c=[0])
    with pytest.raises(ValueError, match="two further dimensions"):
        plots.scatter(deep, exact)
