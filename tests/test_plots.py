"""Figures show the numbers, say what they show, and treat every label as text."""

from __future__ import annotations

import itertools
import json
import re
from functools import lru_cache

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import tiny
import torch
import xarray as xr
from plotly.offline import get_plotlyjs

from patching_demo import attribute, interval, patch, paths, plots, sweep
from patching_demo.engine.kinds import BLOCK_KINDS, HEAD_KINDS, KINDS, kind_label
from patching_demo.plots import theme
from patching_demo.results import combine, share
from patching_demo.tasks import ioi_task, prompt_task

TOKENS = ["<bos>", "When", " John", " gave", " it", " to"]
ROLES = ["IO", "S1", "S2", "END"]
NASTY = ["<bos>", "<b>bold", "$x$", "a&b", "%{z}", "<script>alert(1)</script>"]


@lru_cache(None)
def _made(dims, kinds=None, layers=3, heads=4, agree=2, clean=2.0, corrupted=-1.0, nasty=False):
    """A result with known numbers; cells before ``agree`` have no effect."""
    tokens = NASTY if nasty else TOKENS
    roles = NASTY if nasty else ROLES
    sizes = {"kind": len(kinds or ()), "layer": layers, "position": len(tokens), "head": heads}
    sizes["role"] = len(roles)
    shape = [sizes[d] for d in dims]
    values = corrupted + np.random.default_rng(0).normal(size=shape).astype(np.float32)
    coords = {"layer": np.arange(layers)}
    if kinds:
        coords["kind"] = list(kinds)
    if "position" in dims:
        coords["position"] = [f"{t.strip()} {i}" for i, t in enumerate(tokens)]
        coords["token"] = ("position", tokens)
        coords["agrees"] = ("position", np.arange(len(tokens)) < agree)
    if "role" in dims:
        coords["role"] = roles
    if "head" in dims:
        labels = [[f"L{i}H{j}" for j in range(heads)] for i in range(layers)]
        coords |= {"head": np.arange(heads), "head_label": (("layer", "head"), labels)}
    result = xr.DataArray(values, dims=dims, coords=coords, name="value")
    if "position" in dims:
        result = result.where(~result["agrees"], corrupted)
    return result.assign_attrs(
        metric="logit difference",
        units="logits",
        clean_baseline=clean,
        corrupted_baseline=corrupted,
        task="<i>task</i> $y$" if nasty else "a task",
        model="tiny",
        by="role" if "role" in dims else "pos",
        kind="" if kinds else "out",
        n_key_value_heads=heads,
    )


SHAPES = {
    "layer x position": dict(dims=("layer", "position")),
    "layer x head": dict(dims=("layer", "head")),
    "head rows": dict(dims=("layer", "position", "head")),
    "layer x role": dict(dims=("layer", "role")),
    "heads by role": dict(dims=("kind", "layer", "role", "head"), kinds=("out", "q")),
    "blocks": dict(dims=("kind", "layer", "position"), kinds=tuple(BLOCK_KINDS)),
    "heads": dict(dims=("kind", "layer", "head"), kinds=tuple(HEAD_KINDS)),
    "heads by position": dict(dims=("kind", "layer", "position", "head"), kinds=tuple(HEAD_KINDS)),
}


def _z(trace) -> np.ndarray:
    return np.asarray(trace.z, dtype=float)


def _measured(figure) -> list[go.Heatmap]:
    return [t for t in figure.data if t.coloraxis and t.visible is not False]


def _nothing(figure, axis="x"):
    return [t for t in figure.data if t.name == "nothing to patch" and t.xaxis == axis]


def _assert_drawn_from(result, measured, nothing):
    """Each cell of one panel is its number, a mark where both inputs agree, or a gap."""
    *rows, column = [d for d in ("layer", "head", "position", "role") if d in result.dims]
    result = result.transpose(*rows, column)
    agrees = xr.zeros_like(result, dtype=bool)
    if column == "position":
        agrees = (agrees | result["agrees"]).transpose(*result.dims)
    shape = (-1, result.sizes[column])
    np.testing.assert_allclose(_z(measured), result.where(~agrees).values.reshape(shape), rtol=1e-3)
    assert measured.hoverongaps is False
    entries = itertools.product(*(result[row].values for row in rows))
    assert list(measured.y) == [
        ", ".join(f"{row} {i}" for row, i in zip(rows, entry, strict=True)) for entry in entries
    ]
    marked = np.zeros(_z(measured).shape, bool)
    for trace in nothing:
        assert not trace.coloraxis and "nothing to patch" in trace.hovertemplate
        np.testing.assert_array_equal(np.array(trace.text) == "=", np.isfinite(_z(trace)))
        columns = [list(measured.x).index(x) for x in trace.x]
        marked[:, columns] |= np.isfinite(_z(trace))
    np.testing.assert_array_equal(marked, agrees.values.reshape(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_cell_is_drawn_with_its_number(shape):
    result = _made(**SHAPES[shape])
    figure = plots.heatmap(result, collapse=False)
    kinds = result["kind"].values if "kind" in result.dims else []
    parts = [result.sel(kind=kind) for kind in kinds] or [result]
    assert [t.name for t in _measured(figure)] == ([*map(kind_label, kinds)] or [""])
    for trace, part in zip(_measured(figure), parts, strict=True):
        _assert_drawn_from(part, trace, _nothing(figure, trace.xaxis))


@pytest.mark.parametrize("baselines", [(2.0, -1.0), (-4.0, 1.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_colours_centre_on_the_corrupted_baseline_and_reach_the_clean_one(shape, baselines):
    clean, corrupted = baselines
    result = _made(**SHAPES[shape], clean=clean, corrupted=corrupted)
    axis = plots.heatmap(result).layout.coloraxis
    assert (axis.cmin + axis.cmax) / 2 == pytest.approx(corrupted)
    reach = max(abs(clean - corrupted), float(np.abs(result - corrupted).max()))
    assert axis.cmax - corrupted == pytest.approx(reach, rel=1e-3)
    ticks = dict(zip(axis.colorbar.tickvals, axis.colorbar.ticktext, strict=True))
    for value, name in ((corrupted, "corrupted"), (clean, "clean")):
        assert theme.number(value) in ticks[value] and name in ticks[value]
    assert [c for at, c in axis.colorscale if at == 0.5] == ["#f7f7f7"]


@pytest.mark.parametrize(("times", "opens"), [(50.0, "narrow"), (3.0, "wide")])
def test_small_effects_get_a_button_that_spreads_the_colours(times, opens):
    largest = float(np.abs(_made(("layer", "head"), clean=1.0) + 1.0).max())
    clean = -1.0 + times * largest
    figure = plots.heatmap(_made(("layer", "head"), clean=clean))
    (menu,) = figure.layout.updatemenus
    reach = {"wide": clean, "narrow": -1.0 + largest}
    for button, end in zip(menu.buttons, reach.values(), strict=True):
        assert button.args[0]["coloraxis.cmax"] == pytest.approx(end, rel=1e-5)
    # Cells that would be too pale to see open the figure with less range, and it says so.
    assert list(reach)[menu.active] == opens
    assert figure.layout.coloraxis.cmax == pytest.approx(reach[opens], rel=1e-5)
    note = f"the largest effect, {100 / times:.1f} % of clean minus corrupted"
    assert (note in figure.layout.meta["caption"]) == (opens == "narrow")
    assert not plots.heatmap(_made(("layer", "head"), clean=0.0)).layout.updatemenus


def test_labels_of_many_panels_have_the_room_that_they_need():
    kinds = ("out", "q", "k", "v", "pattern")
    several = plots.heatmap(_made(("kind", "layer", "position"), kinds=kinds)).layout
    single = plots.heatmap(_made(("layer", "position"))).layout
    axes = [name for name in several.to_plotly_json() if name.startswith("xaxis")]
    labels = sum(len(several[name].ticktext) for name in axes)
    assert len(axes) == len(kinds)
    assert several.meta["min_width"] >= several.margin.l + several.margin.r + 10 * labels
    assert single.meta["min_width"] < 340  # a telephone's column


def test_baselines_are_called_what_the_result_calls_them():
    named = _made(("layer", "head"), clean=2.0).assign_attrs(
        clean_name="ruined", corrupted_name="intact"
    )
    figure = plots.heatmap(named)
    assert figure.layout.coloraxis.colorbar.ticktext[:2] == ("−1<br>intact", "2<br>ruined")
    assert "of ruined minus intact" in figure.data[0].hovertemplate
    bars = plots.bars(named.isel(layer=0))
    assert [note.text for note in bars.layout.annotations] == ["ruined<br>2", "intact<br>−1"]
    for shown in (figure, bars):
        assert "intact −1, ruined 2" in shown.layout.meta["alt"]


def test_curves_draw_no_value_where_inputs_agree_and_mark_it_by_a_band():
    result = _made(("layer", "position"), agree=5).isel(layer=0)
    figure = plots.curves(result, along="position")
    drawn = np.asarray(figure.data[0].y, float)
    assert figure.layout.xaxis.ticktext == ("0–4", "to 5")
    assert np.isnan(drawn[0]) and drawn[1] == pytest.approx(result.values[5], rel=1e-3)
    assert _bands(figure) == [(-0.5, 0.5)]
    assert "nothing to patch" in figure.layout.meta["caption"]
    # The band goes where the positions go.
    for order, bands in (([-1, 0], [(0.5, 1.5)]), ([1, 5, 2], [(-0.5, 0.5), (1.5, 2.5)])):
        moved = plots.curves(result.isel(position=order), along="position")
        expected = result.where(~result["agrees"]).isel(position=order)
        np.testing.assert_allclose(np.asarray(moved.data[0].y, float), expected, rtol=1e-3)
        assert _bands(moved) == bands


def _bands(figure):
    return [(shape.x0, shape.x1) for shape in figure.layout.shapes if shape.type == "rect"]


@pytest.mark.parametrize("dims", [("layer", "position"), ("layer", "position", "head")])
@pytest.mark.parametrize(
    "order", [[0, 1, 2, 3, 4, 5], [-1, 0], [0, -1], [5, 4, 3, 2, 1, 0], [5], [0, 1], [1, 5, 2]]
)
def test_what_agrees_is_marked_wherever_its_position_stands(dims, order):
    result = _made(dims, agree=3).isel(position=order)
    figure = plots.heatmap(result, collapse=False, top=None)
    (measured,) = _measured(figure)
    _assert_drawn_from(result, measured, _nothing(figure))
    agreeing = bool(result["agrees"].any())
    assert ("marked =" in figure.layout.meta["caption"]) == agreeing
    places = [position % 6 for position in order]
    assert [int(x.split()[1]) for x in measured.x] == places


def test_each_panel_marks_what_agrees_in_its_own_inputs():
    """Also where combined inputs agree for different lengths."""
    parts = {
        name: _made(("layer", "position", "head"), agree=n, layers=2)
        for name, n in (("AB", 4), ("BA", 1))
    }
    together = combine(parts)
    figure = plots.heatmap(together, collapse=False)
    for trace, part in zip(_measured(figure), parts.values(), strict=True):
        _assert_drawn_from(part, trace, _nothing(figure, trace.xaxis))
    explored = plots.explore(parts)
    for entry, part in enumerate(parts.values()):
        for layer in range(2):
            after = _pressed(explored, (0, entry), ("slider", layer))
            _, values = _in_view(after)
            expected = share(part.where(~part["agrees"])).isel(layer=layer)
            np.testing.assert_allclose(values, expected.transpose("head", ...), rtol=5e-3)
            # Cells are blank for one reason each.
            nothing = _in_view(after, "nothing to patch")
            assert (np.isfinite(nothing).any(0) == part["agrees"].values).all()
    assert "light grey both inputs agree" in explored.layout.meta["caption"]


@pytest.mark.parametrize("kinds", [None, tuple(BLOCK_KINDS)])
def test_neighbours_that_agree_are_one_narrow_column(kinds):
    dims = ("kind", "layer", "position") if kinds else ("layer", "position")
    result = _made(dims, kinds=kinds, agree=4)
    figure = plots.heatmap(result)
    for trace in _measured(figure):
        kind = {kind.label: name for name, kind in KINDS.items()}.get(trace.name)
        assert trace.x[0] == "position 0 '&lt;bos&gt;' to position 3 ' gave'"
        part = result.sel(kind=kind) if kinds else result
        assert np.isnan(_z(trace)[:, 0]).all()
        np.testing.assert_allclose(_z(trace)[:, 1:], part[:, 4:], rtol=1e-3)
    assert figure.layout.xaxis.ticktext[0] == "0–3"
    # Only neighbours, only where every panel agrees, and never heads.
    (trace,) = _measured(plots.heatmap(_made(("layer", "position"), agree=4)[:, [3, 5, 0, 1, 2]]))
    assert [x.split("'")[0] for x in trace.x] == ["position 3 ", "position 5 ", "position 0 "]
    assert "to position 2" in trace.x[2]
    heads = _made(("layer", "position", "head"), agree=4).isel(position=0)
    assert len(plots.heatmap(heads).data[0].x) == 4


def test_missing_cells_are_gaps():
    result = _made(("kind", "layer", "head"), kinds=("out", "k")).copy(deep=True)
    result.loc[dict(kind="k", head=[2, 3])] = np.nan
    figure = plots.heatmap(result.assign_attrs(n_key_value_heads=2))
    out, key = _measured(figure)
    assert np.isfinite(_z(out)).all()
    assert np.isnan(_z(key)[:, 2:]).all() and np.isfinite(_z(key)[:, :2]).all()
    assert key.hoverongaps is False
    assert "key-value head" in key.hovertemplate and "key-value" not in out.hovertemplate
    assert "do not exist" in figure.layout.meta["caption"]


def test_hover_is_in_words_with_the_share():
    figure = plots.heatmap(_made(("layer", "position", "head")))
    # A tick that sat on a cell would replace the words.
    for axis in (figure.layout.xaxis, figure.layout.yaxis):
        off = np.asarray(axis.tickvals) - np.round(axis.tickvals)
        span = abs(axis.range[1] - axis.range[0])
        assert (np.abs(off) > span / 10_000).all() and (np.abs(off) < 0.1).all()
    (trace,) = _measured(figure)
    assert trace.x[5] == "position 5 ' to'"
    assert "%{y}, %{x}" in trace.hovertemplate and "logit difference" in trace.hovertemplate
    assert "%{customdata:.0%} of clean minus corrupted" in trace.hovertemplate
    np.testing.assert_allclose(
        np.asarray(trace.customdata, float)[:, 2:], (_z(trace)[:, 2:] + 1) / 3, atol=2e-3
    )
    (scaled,) = _measured(plots.heatmap(share(_made(("layer", "position", "head")))))
    assert "%{z:.0%} of clean minus corrupted" in scaled.hovertemplate
    assert scaled.customdata is None


def test_many_rows_are_trimmed_to_the_largest_with_the_whole_a_click_away():
    result = _made(("layer", "position", "head"), layers=12, heads=4)
    figure = plots.heatmap(result, top=5)
    (shown,) = _measured(figure)
    effect = np.abs(result + 1.0).where(~result["agrees"]).max("position")
    order = np.argsort(-effect.transpose("layer", "head").values.ravel(), kind="stable")[:5]
    assert list(shown.y) == [f"layer {i // 4}, head {i % 4}" for i in order]
    few, every = figure.layout.updatemenus[0].buttons
    assert every.label == "all 48"
    applied = go.Figure(figure)
    for trace, visible in zip(applied.data, every.args[0]["visible"], strict=True):
        trace.visible = visible
    (whole,) = _measured(applied)
    assert len(whole.y) == 48 and whole.y[5] == "layer 1, head 1"
    assert every.args[1]["yaxis.range"] == [47.5, -0.5]
    assert every.args[1]["height"] > figure.layout.height == few.args[1]["height"]
    # Each row keeps enough height to read its label.
    plot = every.args[1]["height"] - figure.layout.margin.t - figure.layout.margin.b
    assert plot / 48 >= 12
    assert not plots.heatmap(result, top=None).layout.updatemenus


@pytest.mark.parametrize("shape", SHAPES)
def test_figures_say_what_they_show(shape):
    result = _made(**SHAPES[shape])
    figure = plots.heatmap(result)
    title = figure.layout.title.text
    assert "patched into the corrupted run" in title.replace("<br>", " ")
    assert "tiny" in title and "a task" in title and "logit difference" in title
    # It adapts to its column, and a page can replace the one colour that all text has.
    layout, meta = figure.layout, figure.layout.meta
    assert layout.width is None and layout.autosize and layout.paper_bgcolor == "rgba(0,0,0,0)"
    texts = layout.title, layout.coloraxis.colorbar.title, *layout.annotations
    assert layout.font.color == theme.INK and all(text.font.color is None for text in texts)
    assert meta["caption"].endswith(".") and meta["caption"].count(". ") == 0
    effect = np.abs(result + 1.0)
    top = effect.where(effect == effect.max(), drop=True)
    assert "Largest effects" in meta["alt"]
    first = meta["alt"].split("Largest effects: ")[1].split(";")[0]
    place = {dim: top[dim].item() for dim in result.dims}
    head = f"H{place['head']}" if "head" in place else ""
    assert f"L{place['layer']}{head}" in first
    assert place.get("position", "") in first and place.get("role", "") in first
    assert kind_label(place.get("kind", "")) in first
    given = plots.heatmap(result, title="My title", caption="My caption.")
    assert "My title" in given.layout.title.text and given.layout.meta["caption"] == "My caption."


def test_panels_wrap_before_they_get_too_narrow_to_read():
    wide = _made(("kind", "layer", "head"), kinds=tuple(HEAD_KINDS), heads=16)
    layout = plots.heatmap(wide).layout
    for letter, count in (("x", 3), ("y", 2)):
        axes = [layout[name] for name in layout if re.fullmatch(rf"{letter}axis\d*", name)]
        assert len(axes) == 5 and len({axis.domain for axis in axes}) == count
        assert all(0 <= axis.domain[0] < axis.domain[1] <= 1 for axis in axes)


def test_two_further_dimensions_make_a_grid_with_one_colour_scale():
    inner = _made(("kind", "layer", "head"), kinds=("out", "q", "k"))
    other = inner.assign_attrs(corrupted_baseline=-3.0)
    figure = plots.heatmap(combine({"AB": inner, "BA": other}))
    panels = _measured(figure)
    assert [t.name for t in panels] == [
        f"{c} · {k}" for c in ("AB", "BA") for k in ("output", "query", "key")
    ]
    assert {t.coloraxis for t in panels} == {"coloraxis"}
    assert len({t.xaxis for t in panels}) == 6
    assert "clean" in figure.layout.coloraxis.colorbar.ticktext[1]


def test_what_cannot_be_drawn_is_refused():
    result = _made(("layer", "head"))
    deep = combine({"s": _explorer(dims=("kind", "layer", "head"))}, "seed")
    for draw, given, error, match in (
        (plots.heatmap, result.values, TypeError, "ndarray"),
        (plots.heatmap, result.drop_attrs(), ValueError, "keep_attrs"),
        (plots.heatmap, result.isel(layer=0), ValueError, "curves or bars"),
        (plots.heatmap, result.where(False), ValueError, "no cell"),
        (plots.heatmap, result.isel(layer=[]), ValueError, "empty"),
        (plots.heatmap, deep.isel(seed=0), ValueError, "two further dimensions"),
        (plots.curves, result.values, TypeError, "ndarray"),
        (plots.curves, _explorer().isel(kind=0), ValueError, "select or reduce"),
        (plots.explore, result, ValueError, "nothing to choose"),
        (plots.explore, result.isel(layer=0), ValueError, "two of layer"),
        (plots.explore, deep, ValueError, "three dimensions"),
    ):
        with pytest.raises(error, match=match):
            draw(given)


LARGEST, SMALLEST = (float(getattr(np.finfo(np.float32), n)) for n in ("max", "smallest_subnormal"))
DRAWS = {
    "heatmap": plots.heatmap,
    "curves": lambda result: plots.curves(result.isel(head=0)),
    "bars": lambda result: plots.bars(result.isel(layer=0)),
    "explore": lambda result: plots.explore({"a": result, "b": result}),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("odd", [np.inf, -np.inf, 1e30, -1e30, LARGEST, -LARGEST, SMALLEST, 1e200])
@pytest.mark.parametrize("where", ["one", "all"])
def test_any_number_can_be_drawn_and_leaves_the_scale_to_finite_ones(draw, odd, where):
    made = _made(("layer", "head"))
    result = made.astype(float)
    result[(0, 0) if where == "one" else ...] = odd
    figure = DRAWS[draw](result)
    json.loads(figure.to_json().replace("Infinity", "null"))
    layout = figure.layout
    low, high = (
        layout.yaxis.range if draw in ("curves", "bars")
        else (layout.coloraxis.cmin, layout.coloraxis.cmax)
    )  # fmt: skip
    assert np.isfinite([low, high, high - low]).all() and low < high
    if abs(odd) <= LARGEST:
        # The value, or its share of clean minus corrupted.
        share = (odd + 1) / 3 if draw == "explore" else odd
        assert low - 1e-6 * abs(low) <= share <= high + 1e-6 * abs(high)
        return
    assert "infinite values stand at the ends" in layout.meta["caption"]
    if where == "one":
        # As if the cell were not there.
        without = DRAWS[draw](made.where((made["layer"] > 0) | (made["head"] > 0)))
        same = without.layout.coloraxis.cmax or without.layout.yaxis.range[1]
        assert high == pytest.approx(same)
    if draw in ("curves", "bars"):
        trace = figure.data[0]
        top = np.asarray(trace.y, float)[0] + (draw == "bars" and trace.base)
        assert top == pytest.approx(high if odd > 0 else low)
        assert np.asarray(trace.customdata, float)[0] == np.sign(odd) * np.inf
        return
    ends = [t for t in figure.data if t.text is not None and t.coloraxis]
    assert ends[0].text[0][0] == ("∞" if odd > 0 else "−∞") and "%{text}" in ends[0].hovertemplate
    assert _z(ends[0])[0, 0] == pytest.approx(high if odd > 0 else low)
    copies = 2 if draw == "explore" else 1
    marked = np.isfinite(_z(ends[0])).sum()
    assert marked == copies * (1 if where == "one" else made.size)


@pytest.mark.parametrize("name", ["clean_baseline", "corrupted_baseline"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e300])
def test_baselines_that_no_scale_reaches_are_refused(name, value):
    result = _made(("layer", "head")).assign_attrs({name: value})
    for draw in DRAWS.values():
        with pytest.raises(ValueError, match=re.escape(str(value))):
            draw(result)


@pytest.mark.parametrize("apart", [0.0, 1e-7])
def test_equal_baselines_can_be_drawn(apart):
    result = _made(("layer", "head"), clean=-1.0 + apart)
    assert "of clean minus" not in plots.heatmap(result).data[0].hovertemplate
    axis = plots.heatmap(xr.full_like(result, -1.0)).layout.coloraxis
    assert axis.cmin < axis.cmax


TEXTS = re.compile(r"<(?!/?(b|br|span)\b)[^>]*>|\$")


def _nasty_figures():
    """Figures whose tokens, metrics, units, baselines and further dimensions have any name."""
    for shape in SHAPES.values():
        result = _made(**shape, nasty=True)
        yield plots.heatmap(result)
        yield plots.heatmap(result, title="<script>$z$")
    one = _made(("kind", "layer", "position"), kinds=tuple(BLOCK_KINDS), nasty=True).assign_attrs(
        metric="<script>metric</script> $m$ & more",
        units="<i>u</i> $u$",
        clean_name="<i>clean</i> $a$",
        corrupted_name="<i>corrupted</i> $b$",
    )
    over = "<script>over</script>"
    result = combine({name: one for name in NASTY[:3]}, over).isel(kind=slice(2))
    line, row = result.isel(kind=0, position=2), result.isel(kind=0, layer=0)
    yield from (
        plots.heatmap(result),
        plots.heatmap(result.isel(kind=0)),
        plots.explore(result, title="<script>$z$"),
        plots.explore(result.isel(kind=0)),
        plots.curves(line),
        plots.curves(line, along=over),
        plots.curves(row, along="position"),
        plots.bars(row),
        plots.bars(row, along=over),
    )


def test_names_are_text_to_the_eye_and_as_they_are_to_screen_readers():
    for figure in _nasty_figures():
        content = json.loads(figure.to_json())
        meta = content["layout"].pop("meta")
        texts = re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(content, ensure_ascii=False))
        texts += [title["title.text"] for title in meta["title"].values()]
        for text in texts:
            assert not TEXTS.search(text.replace("<extra></extra>", "")), text
            assert "script>" not in text
        # Whatever shows the figure escapes these: they must not come escaped.
        assert "<i>task</i>" in meta["alt"]
        assert not re.search(r"&(lt|gt|amp|#\d+);", meta["alt"] + meta["caption"])


@pytest.mark.parametrize("make", ["heatmap", "explore"])
def test_figures_of_the_largest_sweeps_stay_small(make):
    kinds = tuple(HEAD_KINDS)
    result = _made(("kind", "layer", "position", "head"), kinds=kinds, layers=30, heads=9, agree=1)
    if make == "explore":
        result = combine({m: result for m in ("one", "two")}, "metric")
    size = len(getattr(plots, make)(result).to_json())
    assert size < 400_000


def _explorer(layers=3, dims=("kind", "layer", "position", "head")):
    kinds = ("out", "q", "k")
    base = _made(dims, kinds=kinds, layers=layers)
    states = {}
    for i, corrupted in enumerate(("AB", "BA")):
        metrics = {
            m: (base + i + 10 * j).assign_attrs(
                {**base.attrs, "metric": m, "corrupted_baseline": -1.0 - i - j}
            )
            for j, m in enumerate(("logit difference", "probability"))
        }
        states[corrupted] = combine(metrics, "metric")
    return combine(states, "corrupted")


def _pressed(figure, *presses):
    """The figure after some buttons, by (menu or "slider", entry)."""
    figure = go.Figure(figure)
    for menu, entry in presses:
        if menu == "slider":
            step = figure.layout.sliders[0].steps[entry]
        else:
            step = figure.layout.updatemenus[menu].buttons[entry]
        change = step.args[0]
        if step.method == "restyle":
            for key, values in change.items():
                for trace, value in zip(figure.data, values, strict=True):
                    trace[key] = value
        else:
            assert step.method == "relayout"
            for key, value in change.items():
                figure.layout[key] = value
    return figure


def _in_view(figure, name=None):
    """The numbers that the window shows of the one trace that is visible and opaque."""
    shown = [t for t in figure.data if t.visible and t.opacity == 1 and t.hoverinfo != "skip"]
    x, y = (sorted(axis.range) for axis in (figure.layout.xaxis, figure.layout.yaxis))
    rows, columns = (slice(int(r[0] + 0.5), int(r[1] + 0.5)) for r in (y, x))
    seen = [t for t in shown if (t.name == "nothing to patch") == (name is not None)]
    if name is not None:
        every = _measured(figure)[0].x
        full = np.full((len(_measured(figure)[0].y), len(every)), np.nan)
        for trace in seen:
            full[:, [list(every).index(x) for x in trace.x]] = _z(trace)
        return full[rows, columns]
    assert len(seen) == 1
    return seen[0], _z(seen[0])[rows, columns]


@pytest.mark.parametrize("order", [(0, 1, 2, "slider"), ("slider", 2, 1, 0)])
def test_explorer_shows_what_its_menus_say_in_whichever_order_they_are_used(order):
    result = _explorer()
    figure = plots.explore(result)
    names = {m: [b.label for b in menu.buttons] for m, menu in enumerate(figure.layout.updatemenus)}
    assert names[0] == ["output", "query", "key"]
    assert names[1] == ["AB", "BA"] and names[2] == ["logit difference", "probability"]
    for places in itertools.product(range(3), range(2), range(2), range(3)):
        at = dict(zip((0, 1, 2, "slider"), places, strict=True))
        trace, values = _in_view(_pressed(figure, *((menu, at[menu]) for menu in order)))
        dims = ("kind", "corrupted", "metric", "layer")
        cell = result.isel(dict(zip(dims, places, strict=True))).transpose("head", "position")
        np.testing.assert_allclose(values, cell.where(~cell["agrees"]).values, rtol=5e-3)
        assert trace.name == f"{names[1][places[1]]} · {names[2][places[2]]}"
    baseline = result["corrupted_baseline"].sel(corrupted="BA", metric="probability").item()
    assert f"corrupted {theme.number(baseline)}" in trace.hovertemplate


def test_explorer_opens_at_the_layer_with_most_to_show_or_shows_all():
    result = _made(("layer", "position", "head"), layers=4)
    figure = plots.explore({"AB": result, "BA": result})
    start = figure.layout.sliders[0].active
    assert start == int(np.abs(share(result)).max(("position", "head")).values.argmax())
    step = figure.layout.sliders[0].steps[start]
    assert list(figure.layout.yaxis.range) == list(step.args[0]["yaxis.range"])
    alone = plots.explore(result, caption="Mine.")
    assert not alone.layout.updatemenus and alone.layout.meta["caption"] == "Mine."
    np.testing.assert_array_equal(_in_view(alone)[1], _in_view(figure)[1])
    whole = _explorer(dims=("kind", "layer", "head"))
    figure = plots.explore(whole)
    assert not figure.layout.sliders
    _, values = _in_view(_pressed(figure, (0, 2)))
    np.testing.assert_allclose(values, whole.isel(kind=2, corrupted=0, metric=0), rtol=5e-3)
    assert "Menus: activation, corrupted input and metric" in figure.layout.meta["alt"]


def test_curves_are_the_numbers_with_both_baselines():
    result = _made(("kind", "layer", "position"), kinds=("resid_pre", "mlp_out"))
    best = result.max("position", keep_attrs=True)
    figure = plots.curves(best)
    assert [t.name for t in figure.data] == ["resid_pre", "mlp_out"]
    for trace, row in zip(figure.data, best.values, strict=True):
        np.testing.assert_allclose(np.asarray(trace.y, float), row, rtol=1e-3)
    assert sorted(s.y0 for s in figure.layout.shapes) == [-1.0, 2.0]
    assert {a.text for a in figure.layout.annotations} == {"clean<br>2", "corrupted<br>−1"}
    low, high = figure.layout.yaxis.range
    assert low < -1.0 and high > 2.0
    along = plots.curves(result.sel(kind="mlp_out"), along="position")
    assert len(along.data) == 3 and along.data[0].name == "layer 0"


@pytest.mark.parametrize("count", [6, 7, 13, 40, 60])
def test_no_two_series_look_the_same(count):
    result = _made(("layer", "head"), layers=count)
    lines = [
        (t.line.color, t.line.dash, t.marker.symbol)
        for t in plots.curves(result, along="head").data
    ]
    bars = [
        (t.marker.color, t.marker.pattern.shape, t.marker.line.width)
        for t in plots.bars(result, along="head").data
    ]
    assert len(set(lines)) == len(set(bars)) == count
    # Without colour as well, as far as there are signs.
    assert all(len({look[i] for look in lines[:6]}) == 6 for i in range(3))
    assert len({pattern for _, pattern, _ in bars[:6]}) == 6


@pytest.mark.parametrize(
    ("facts", "main", "below"),
    [
        ({"kind": "mlp_out"}, "Clean mlp_out patched into the corrupted run", "layer and position"),
        ({"kind": "q"}, "Clean queries patched into the corrupted run", "head and position"),
        ({"kind": "q", "by": "all_pos"}, "Clean queries patched", "one head at a time, over all"),
        ({"kind": "v", "direction": "noising"}, "Corrupted values patched into the clean", ""),
        ({"kind": ""}, "Clean activations patched into the corrupted run", "tiny · a task"),
    ],
)
def test_titles_are_made_from_facts(facts, main, below):
    result = _made(("layer", "position")).assign_attrs(facts, what="an old sentence")
    for figure in (plots.heatmap(result), plots.bars(result.isel(layer=0))):
        title = _plain_title(figure)
        assert main in title and below in title and "sentence" not in title
    names = ("corrupted", "clean") if "noising" in facts.values() else ("clean", "corrupted")
    assert " minus ".join(names) in plots.heatmap(result).data[0].hovertemplate


def test_what_is_selected_names_the_figure():
    one = _made(("layer", "position")).assign_attrs(direction="denoising")
    other = one.assign_attrs(direction="noising", clean_baseline=-1.0, corrupted_baseline=2.0)
    both = combine({"denoising": one, "noising": other}, "direction")
    assert "Source head outputs patched into the target run" in _plain_title(plots.heatmap(both))
    selected = plots.heatmap(both.sel(direction="noising"))
    assert "Corrupted head outputs patched into the clean run" in _plain_title(selected)
    kinds = _made(("kind", "layer", "head"), kinds=("q", "pattern"))
    assert "Clean patterns patched" in _plain_title(plots.heatmap(kinds.sel(kind="pattern")))
    reading = one.drop_attrs().assign_attrs(metric="attention to the start")
    reading.attrs |= {"clean_baseline": 1.0, "corrupted_baseline": 0.0}
    assert _plain_title(plots.heatmap(reading)).split("  ")[0].strip() == "Attention to the start"


def _plain_title(figure):
    return re.sub(r"<[^>]*>", " ", figure.layout.title.text.replace("<br>", " "))


@pytest.mark.parametrize("baselines", [(3.4, -0.506), (-2.7, 9.13), (0.0132, 0.00117), (1.0, 0.0)])
def test_colour_bars_are_ticked_at_the_baselines_and_at_round_numbers(baselines):
    clean, corrupted = baselines
    values = _made(("layer", "head")) * 0 + corrupted + 0.9 * (clean - corrupted)
    values.attrs = _made(("layer", "head"), clean=clean, corrupted=corrupted).attrs
    axis = plots.heatmap(values).layout.coloraxis
    others = set(axis.colorbar.tickvals) - {clean, corrupted}
    assert len(others) == len(axis.colorbar.tickvals) - 2 >= 1
    for value in others:
        digits = f"{abs(value):.12g}".replace(".", "").strip("0")
        assert len(digits) <= 2 and axis.cmin <= value <= axis.cmax


def test_results_of_every_verb_say_what_was_done():
    model = tiny.model("gpt2")
    task = ioi_task(model)
    options = dict(progress=False)
    to_q = paths(model, task, [("q", 1, 2)], **options)
    ablated = sweep(model, task.reversed(), "out", by="all_pos", source="mean", **options)
    for result, said, below in (
        (to_q, "Clean head outputs sent to L1H2 q in the corrupted run", "by direct paths"),
        (
            paths(model, task, "logits", senders="mlp_out", through="mlps", **options),
            "Clean mlp_out sent to the logits in the corrupted run",
            "one sender at a time, by paths through MLPs",
        ),
        (
            attribute(model, task, "q", method="gradient+qk"),
            "Clean queries patched into the corrupted run, estimated",
            "estimated by 'gradient+qk'",
        ),
        (ablated, "Mean ablation of head outputs in the clean run", "all positions"),
        (
            sweep(model, task, "mlp_out", source="zero", window=2, **options),
            "Zero ablation of mlp_out in the corrupted run",
            "one position at a time, in 2 layers at once",
        ),
    ):
        figure = (plots.heatmap if result.ndim > 1 else plots.bars)(result)
        title = _plain_title(figure)
        assert said in title and below in title and said in figure.layout.meta["alt"]
        assert ("estimated: %{" in figure.data[0].hovertemplate) == ("method" in result.attrs)
        assert ("estimated)" in figure.layout.meta["caption"]) == ("method" in result.attrs)
    figure = plots.heatmap(to_q)
    assert "no path leads to the receivers" in figure.layout.meta["caption"]
    np.testing.assert_allclose(_z(figure.data[0]), to_q, rtol=1e-3)
    # What combined results do not share, a title does not say of all of them.
    both = combine({"to q": to_q, "to k": paths(model, task, [("k", 1, 2)], **options)}, "into")
    assert "sent to several receivers" in _plain_title(plots.heatmap(both))
    zero = sweep(model, task.reversed(), "out", by="all_pos", source="zero", **options)
    figure = plots.explore({"mean": ablated, "zero": zero})
    assert "one head at a time" in _plain_title(figure)
    assert "Head outputs patched into" in _plain_title(
        plots.heatmap(combine({"mean": ablated, "zero": zero}, "ablation"))
    )
    estimate = attribute(model, task, ["q", "k"])
    figure = plots.explore(estimate)
    assert "estimated" in _plain_title(figure) and "estimated" in figure.data[0].hovertemplate


@pytest.mark.parametrize("count", [2, 9])
def test_bars_of_sets_have_their_names_in_full(count):
    model = tiny.model("gpt2")
    task = ioi_task(model)
    names = [f"the <b> heads of layer {i % 2} and an MLP, {i}" for i in range(count)]
    sets = {name: [("out", i % 2, i % 4), ("mlp_out", 1)] for i, name in enumerate(names)}
    result = patch(model, task, sets, progress=False)
    figure = plots.bars(result)
    (trace,) = figure.data
    np.testing.assert_allclose(np.asarray(trace.customdata, float), result, rtol=1e-3)
    assert list(trace.x) == [theme.escape(name) for name in names]
    axis = figure.layout.xaxis
    assert len(set(axis.ticktext)) == count and axis.tickangle == -90
    assert figure.layout.margin.b > 6 * max(len(tick) for tick in axis.ticktext) - 30
    assert "one set of activations at a time" in _plain_title(figure)
    assert plots.bars(result[:1]).layout.xaxis.tickangle == 0
    with pytest.raises(ValueError, match="curves or bars"):
        plots.heatmap(result)


def test_a_figure_of_prompts_shows_their_mean_and_says_of_how_many():
    model = tiny.model("gpt2")
    task = ioi_task(model)
    each = sweep(model, task, "mlp_out", per_prompt=True, progress=False)
    assert each.sizes["prompt"] == 8
    for draw in (plots.heatmap, lambda r: plots.bars(r.isel(layer=0))):
        figure, plain = draw(each), draw(each.mean("prompt", keep_attrs=True))
        assert "mean over 8 prompts" in _plain_title(figure)
        assert len(figure.data) == len(plain.data)
        for one, other in zip(figure.data, plain.data, strict=True):
            field = "z" if one.type == "heatmap" else "y"
            np.testing.assert_allclose(one[field], other[field], rtol=1e-3, atol=1e-4)
    # The baselines are those of the prompts that are drawn.
    for some, said in (
        ([1, 3], "mean over 2 prompts"),
        ([5], "mean over 1 prompt"),
        (5, "prompt 5"),
    ):
        part = each.isel(prompt=some)
        figure = plots.heatmap(part)
        assert said in _plain_title(figure)
        ticks = figure.layout.coloraxis.colorbar.tickvals
        for name in ("clean_baseline", "corrupted_baseline"):
            own = float(np.mean(each[name].values[some]))
            assert min(abs(own - tick) for tick in ticks) < 1e-5
    shares = plots.heatmap(share(each))
    assert set(shares.layout.coloraxis.colorbar.tickvals) >= {0.0, 1.0}
    assert "mean over 8 prompts" in _plain_title(plots.explore({"a": each, "b": each}))
    some = each.where((each["prompt"] > 0) | (each["layer"] > 0))
    assert np.isnan(_z(plots.heatmap(some).data[0])[0]).all()
    with pytest.raises(ValueError, match="mean over prompts"):
        plots.bars(each.isel(layer=0, position=-1), along="prompt")
    with pytest.raises(ValueError, match="empty"):
        plots.heatmap(each.isel(prompt=[]))


def test_intervals_are_drawn_and_said():
    rng = np.random.default_rng(0)
    one = _made(("kind", "layer", "head"), kinds=("out", "q"))
    each = xr.concat([one + part for part in rng.normal(size=9)], "prompt").assign_attrs(one.attrs)
    result = interval(each.where(each["head"] != 2))
    low, high = (result[name].sel(kind="q", layer=1).values for name in ("low", "high"))
    for draw in (plots.curves, plots.bars):
        figure = draw(result.sel(layer=1), along="head")
        trace = figure.data[1]
        drawn = np.asarray(trace.customdata if trace.type == "bar" else trace.y, float)
        np.testing.assert_allclose(drawn + np.asarray(trace.error_y.array, float), high, rtol=1e-3)
        below = np.asarray(trace.error_y.arrayminus, float)
        np.testing.assert_allclose(drawn - below, low, rtol=1e-3)
        assert trace.hovertext[0] == f"{theme.number(low[0])} to {theme.number(high[0])}"
        bottom, top = figure.layout.yaxis.range
        assert bottom < np.nanmin(result["low"][:, 1]) and top > np.nanmax(result["high"][:, 1])
        assert "whiskers are 95 % intervals by bootstrap" in figure.layout.meta["caption"]
    explored = plots.explore(result).data[0]
    assert "95 % interval: %{hovertext}" in explored.hovertemplate
    columns = list(explored.x)
    scaled = share(result).sel(kind="q", layer=1, head=3)
    words = " to ".join(theme.percent(float(scaled[bound])) for bound in ("low", "high"))
    assert explored.hovertext[1][columns.index("query, head 3")] == words
    other = interval(each.where(each["head"] != 2), level=0.5)
    several = plots.heatmap(combine({"a": result, "b": other}))
    assert "; hover texts have intervals by bootstrap" in several.layout.meta["caption"]
    # Bounds that combined results share stand in each of them.
    twice = _measured(plots.heatmap(combine({"a": result, "b": result})))
    np.testing.assert_array_equal(twice[0].hovertext, twice[2].hovertext)
    assert "hover texts have 95 %" in plots.explore(result).layout.meta["caption"]
    trace = _measured(plots.heatmap(result))[1]
    assert trace.hovertext[1][3] == f"{theme.number(low[3])} to {theme.number(high[3])}"
    assert "%{hovertext}" in trace.hovertemplate and trace.text is None


def _by_role(dims=("layer", "role"), **more):
    """The interval of nine prompts' values, with every role at its own place in each."""
    one, rng = _made(dims, **more), np.random.default_rng(0)
    each = xr.concat([one + part for part in rng.normal(size=9)], "prompt")
    return interval(each.assign_attrs(one.attrs))


def test_roles_are_columns_by_name():
    """Also where inputs agree up to one of them; a role's name has no number of a position."""
    result = _made(("layer", "role", "head"))
    agrees = result.assign_coords(agrees=("role", [True, False, True, False]))
    for given in (result, agrees):
        figure = plots.heatmap(given)
        (trace,) = _measured(figure)
        assert list(trace.x) == [f"role {name}" for name in ROLES]
        assert list(trace.y)[:2] == ["layer 0, head 0", "layer 0, head 1"]
        expected = result.transpose("layer", "head", "role").values.reshape(12, 4)
        marked = np.array([given is agrees] * 2) * [True, False]
        columns = np.flatnonzero(~np.tile(marked, 2))
        np.testing.assert_allclose(_z(trace)[:, columns], expected[:, columns], rtol=1e-3)
        assert ("at roles marked =" in figure.layout.meta["caption"]) == (given is agrees)
        assert figure.layout.xaxis.ticktext == tuple(ROLES) and figure.layout.xaxis.tickangle == 0
        assert "one head and named position at a time" in _plain_title(figure)
    explored = plots.explore(result)
    for layer in range(3):
        _, values = _in_view(_pressed(explored, ("slider", layer)))
        expected = share(result).isel(layer=layer).transpose("head", "role")
        np.testing.assert_allclose(values, expected, rtol=5e-3)
    line = result.isel(head=0)
    assert [trace.name for trace in plots.curves(line).data] == ROLES
    for draw in (plots.curves, plots.bars):
        shown = draw(line.isel(layer=[0, 2]), along="role")
        assert shown.layout.xaxis.ticktext == tuple(ROLES)
        assert list(shown.data[0].x) == [f"role {name}" for name in ROLES]
    both = result.rename(head="position").isel(layer=0)
    for draw in (plots.heatmap, plots.explore):
        with pytest.raises(ValueError, match="both positions and roles"):
            draw(both)


@pytest.mark.parametrize("panels", [1, 3])
def test_many_roles_stand_upright_and_none_is_left_out(panels):
    names = [f"the last token of subject {i}" for i in range(12)]
    result = _made(("layer", "position"), agree=0).rename(position="role").drop_vars("token")
    result = result.isel(role=[0] * 12).assign_coords(role=names, agrees=("role", [False] * 12))
    figure = plots.heatmap(combine({str(i): result for i in range(panels)}, "run"))
    axis, margin = figure.layout.xaxis, figure.layout.margin
    assert len(set(axis.ticktext)) == 12 and axis.tickangle == -90
    assert margin.b > 6 * max(map(len, axis.ticktext))
    assert figure.layout.meta["min_width"] >= margin.l + margin.r + 10 * 12


def test_intervals_along_layers_are_bands_around_their_lines():
    result = _by_role(layers=6).copy()
    result["low"][2, 1] = result["high"][2, 1] = np.nan
    figure = plots.curves(result)
    lines = [trace for trace in figure.data if trace.fill is None]
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert [line.name for line in lines] == ROLES and len(bands) == 4
    assert not any(trace.error_y.array is not None for trace in lines)
    for role, line, band in zip(ROLES, lines, bands, strict=True):
        assert line.legendgroup == band.legendgroup and band.showlegend is False
        x, y = np.array(band.x, dtype=object), np.asarray(band.y, float)
        for layer in range(6):
            bounds = [float(result[b].sel(role=role, layer=layer)) for b in ("low", "high")]
            edges = sorted(y[x == f"layer {layer}"])
            np.testing.assert_allclose(edges, [] if np.isnan(bounds[0]) else bounds, rtol=1e-3)
    # A band never spans an entry that has no interval.
    gaps = [np.isnan(np.asarray(band.y, float)).sum() for band in bands]
    assert gaps == [1, 2, 1, 1]
    # The axis keeps its order where the first line starts late.
    late = plots.curves(result.where(result["layer"] > 2).assign_coords(low=result["low"] * np.nan))
    assert late.layout.xaxis.categoryarray == tuple(f"layer {i}" for i in range(6))
    assert "bands are 95 % intervals by bootstrap over prompts" in figure.layout.meta["caption"]
    assert "mean over 9 prompts" in _plain_title(figure)
    assert "no interval" in lines[1].hovertext[2]


def test_tokens_of_prompts_of_any_lengths_mark_what_was_exchanged():
    task = prompt_task(
        tiny.model("gpt2"),
        ["When Mary and John went home, John gave the ball to", "The cat sat on"],
        ["When Mary and John went home, the cat gave the ball to", "The dog sat on"],
        [(" Mary and John", " John the cat"), (" Mary", " John")],
        roles={"subject": ([", John", "cat"], ["the cat", "dog"])},
    )
    assert not task.same_lengths and task.rows_per_prompt > 1
    html = plots.tokens_table(task)._repr_html_()
    marked = re.findall(r"<mark[^>]*><code[^>]*>([^<]*)</code></mark>", html)
    assert "".join(marked) == " John the cat cat dog" and html.count("<tr>") == 5
    # No answer is shown, and no padding.
    text = html.split("<table")[1]
    tokens = "".join(re.findall(r"<code[^>]*>([^<]*)</code>", text))
    assert tokens.count("gave the ball to") == 2 and tokens.endswith("The dog sat on")
    one = plots.tokens_table(task, rows=1)
    assert one._repr_html_().count("<tr>") == 3 and repr(one).count("\n") == 2


def test_curves_leave_out_numbers_that_would_overlap_and_no_names():
    layers = _made(("layer", "head"), layers=30).isel(head=0)
    shown = plots.curves(layers, along="layer").layout.xaxis.ticktext
    # A telephone leaves the axis some 238 pixels, and a digit takes some 6.
    assert shown[0] == "0" and 5 < len(shown) <= 238 / (2 * 6 + 6)
    kinds = xr.concat([layers.isel(layer=0)] * 12, "kind").assign_coords(
        kind=[f"a long name {i}" for i in range(12)]
    )
    assert len(plots.bars(kinds, along="kind").layout.xaxis.ticktext) == 12


def test_bars_start_at_the_corrupted_baseline():
    result = _made(("kind", "layer", "head"), kinds=("out", "v")).isel(layer=1)
    figure = plots.bars(result)
    for trace, row in zip(figure.data, result.values, strict=True):
        assert trace.base == -1.0
        np.testing.assert_allclose(np.asarray(trace.y, float) - 1.0, row, rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(np.asarray(trace.customdata, float), row, rtol=1e-3)
    single = plots.bars(result.isel(kind=0))
    assert len(single.data) == 1 and single.layout.showlegend is False
    top = int(np.abs(result.values[0] + 1.0).argmax())
    assert f"at {top}" in single.layout.meta["alt"]


def test_attention_patterns_are_those_of_the_head_that_the_menu_names():
    model = tiny.model("gpt2")
    task = ioi_task(model)
    heads = [(1, 2), (0, 3), (1, 0)]
    figure = plots.attention_patterns(model, task.clean_tokens, heads, task.position_labels)
    with torch.no_grad():
        _, cache = model.run_with_cache(task.clean_tokens)
    (menu,) = figure.layout.updatemenus
    assert [trace.visible for trace in figure.data] == [True, False, False]
    for button, trace, (layer, head) in zip(menu.buttons, figure.data, heads, strict=True):
        expected = cache[f"blocks.{layer}.attn.hook_pattern"][:, head].mean(0).numpy()
        lower = np.tri(len(expected), dtype=bool)
        np.testing.assert_allclose(_z(trace)[lower], expected[lower], rtol=1e-2, atol=1e-6)
        assert np.isnan(_z(trace)[~lower]).all()
        assert button.label == trace.name == f"L{layer}H{head}"
        assert [figure.data[i] is trace for i in range(3)] == button.args[0]["visible"]
        assert trace.name in figure.layout.title.text and trace.name in figure.layout.meta["alt"]
    assert figure.layout.yaxis.tickangle == 0
    plain = plots.attention_patterns(model, task.clean_tokens[0], [(0, 0)])
    assert plain.layout.xaxis.ticktext[3] == "3" and not plain.layout.updatemenus
    # Labels that end in the same number are positions of their own.
    alike = plots.attention_patterns(model, task.clean_tokens[0, :3], [(0, 0)], ["7", "1", "7"])
    assert len(set(alike.data[0].x)) == 3
    for layer, head in ((2, 0), (0, 4), (-1, 0)):
        with pytest.raises(ValueError, match=f"no L{layer}H{head}"):
            plots.attention_patterns(model, task.clean_tokens, [(layer, head)])
    with pytest.raises(ValueError, match="2 labels for 15 positions"):
        plots.attention_patterns(model, task.clean_tokens, [(0, 0)], labels=["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        plots.attention_patterns(model, task.clean_tokens, [])


def test_tokens_table_marks_exactly_what_differs():
    task = ioi_task(tiny.model("gpt2"))
    shown = plots.tokens_table(task, rows=2)
    html = shown._repr_html_()
    marked = re.findall(r"<mark[^>]*><code[^>]*>([^<]*)</code></mark>", html)
    assert marked == [" John", " Mary", " Mary", " John"] and html.count("<mark") == 4
    assert html.count("<tr>") == 5 and 'tabindex="0"' in html
    # The start that all shown prompts share is one cell, so that what differs is in view.
    shared = int((task.clean_tokens == task.corrupted_tokens)[:2].all(0).tolist().index(False))
    heads = re.findall(r'<th scope="col"[^>]*>([^<]+)</th>', html)
    assert heads == [f"0–{shared - 1}", *map(str, range(shared, task.clean_tokens.shape[1]))]
    tokens = re.findall(r"<code[^>]*>([^<]*)</code>", html)
    assert tokens[: len(heads) + shared - 1] == list(map(theme.as_html, task.clean_strings[0]))
    assert len(re.findall(r'<th scope="row"', html)) == 6
    assert "tokens that differ are marked" in html.split("<table")[0]
    assert "* John*" in repr(shown) and repr(shown).count("\n") == 4
    assert plots.tokens_table(task)._repr_html_().count("<tr>") == 17
    with pytest.raises(ValueError, match="rows"):
        plots.tokens_table(task, rows=0)


def test_tables_show_markup_and_formulas_as_text():
    model = tiny.model("gpt2")
    task = prompt_task(model, "The <b> $x$ cat", "The <b> $x$ dog", (" Mary", " John"))
    for html in (
        plots.tokens_table(task, caption="<script>$z$")._repr_html_(),
        plots.table(pd.DataFrame({"token": ["<script>$z$", "a\nb"]}), "<script>")._repr_html_(),
    ):
        assert "<script" not in html and "&lt;script&gt;" in html
        # A formula needs both of its dollars in one piece of text.
        body = html.split(">", 1)[1]
        assert all(text.count("$") < 2 for text in re.split(r"<[^>]*>", body))
    assert "mathjax_ignore" in html


def test_table_writes_numbers_for_people_and_names_its_heads():
    frame = pd.DataFrame({"label": ["L9H6"], "value": [-1.23456], "share": [-0.4211], "n": [3]})
    html = plots.table(frame, "Largest effects.")._repr_html_()
    assert re.findall(r"<td[^>]*>([^<]*)</td>", html) == ["L9H6", "−1.23", "−42 %", "3"]
    assert re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', html) == list(frame.columns)
    assert ">–<" in plots.table(pd.DataFrame({"share": [float("nan")]}), "x")._repr_html_()
    rows = plots.table(frame.set_index(pd.Index(["<i>one</i>"], name="claim")), "x")._repr_html_()
    assert re.findall(r'<th scope="row"[^>]*>(.*?)</th>', rows) == ["&lt;i&gt;one&lt;/i&gt;"]
    assert html == plots.table(frame, "Largest effects.")._repr_html_()


# Machado, Oliveira and Fernandes (2009), severity 1.0, for linear RGB.
DEFICIENCIES = {
    "full colour vision": "1 0 0  0 1 0  0 0 1",
    "protanopia": "0.152286 1.052583 -0.204868  0.114503 0.786281 0.099216  "
    "-0.003882 -0.048116 1.051998",
    "deuteranopia": "0.367322 0.860646 -0.227968  0.280085 0.672501 0.047413  "
    "-0.011820 0.042940 0.968881",
    "tritanopia": "1.255528 -0.076749 -0.178779  -0.078411 0.930809 0.147602  "
    "0.004733 0.691367 0.303900",
}


def _linear(colour):
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _as_seen(colour, vision):
    """CIELAB lightness, green to red, blue to yellow."""
    linear = np.array(DEFICIENCIES[vision].split(), float).reshape(3, 3) @ _linear(colour)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = to_xyz @ np.clip(linear, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", DEFICIENCIES)
def test_colours_tell_their_sides_and_strengths_apart_to_every_eye(vision):
    seen = [_as_seen(colour, vision) for _, colour in theme.DIVERGING]
    middle = len(seen) // 2
    for i in range(middle):
        # Same strength, opposite direction; a distance of about 2 is just noticeable.
        assert np.linalg.norm(seen[i] - seen[-1 - i]) > 20
    lightness = [colour[0] for colour in seen]
    assert lightness[: middle + 1] == sorted(lightness[: middle + 1])
    assert lightness[middle:] == sorted(lightness[middle:], reverse=True)
    attention = [_as_seen(colour, vision)[0] for _, colour in theme.SEQUENTIAL]
    assert min(-np.diff(attention)) > 8


def _contrast(one, other):
    weights = np.array([0.2126, 0.7152, 0.0722])
    low, high = sorted(float(weights @ _linear(c)) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_text_reads_on_white_and_on_dark_paper():
    assert _contrast(theme.INK, "#ffffff") >= 4.5
    assert _contrast(theme.INK, "#121212") >= 4.0
    assert _contrast(theme.MENU["font"]["color"], theme.MENU["bgcolor"]) >= 4.5
    # What plotly paints the chosen button with, whichever colour the others have.
    chosen = "#F4FAFF"
    assert chosen in get_plotlyjs()
    assert _contrast(chosen, theme.MENU["bgcolor"]) >= 1.4
    assert _contrast(theme.MENU["font"]["color"], chosen) >= 4.5
    for colour in theme.LINES:
        assert _contrast(colour, "#ffffff") >= 3 and _contrast(colour, "#14181e") >= 3


@pytest.mark.parametrize("dims", [("layer", "position"), ("layer", "head")])
def test_layers_stay_in_their_order(dims):
    """However many there are: sorted by effect, a staircase is none."""
    result = _made(dims, layers=36)
    figure = plots.heatmap(result)
    shown = [word for word in figure.data[0].y]
    assert len(shown) == 36 and not figure.layout.updatemenus
    assert [int(re.search(r"\d+", word)[0]) for word in shown] == list(range(36))


@pytest.mark.parametrize("draw", ["heatmap", "curves", "bars", "explore"])
def test_figures_without_a_number_are_refused(draw):
    result = _made(("kind", "layer", "head"), kinds=("out", "v"))
    more = {"along": "layer"} if draw in ("curves", "bars") else {}
    part = result if draw == "explore" else result[0]
    part = part.isel(head=0, drop=True) if more else part
    with pytest.raises(ValueError, match="no cell with a number in it"):
        getattr(plots, draw)(part * np.nan, **more)


def test_what_has_no_layer_is_drawn():
    result = _made(("layer", "position", "head"))
    figure = plots.heatmap(result.max("layer", keep_attrs=True))
    assert "Baselines" in figure.layout.meta["alt"]
