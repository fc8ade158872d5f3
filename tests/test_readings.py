"""Readings of results: the best heads, the layer where two positions cross, what heads look at."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import xarray as xr

from patching_demo.results import (
    attention,
    attention_back,
    crossing_layer,
    effect_sizes,
    strong_heads,
    top_head,
)
from patching_demo.sweeps.question import head_labels


def labelled(values, dims, clean=1.0, corrupted=0.0, **coords) -> xr.DataArray:
    out = xr.DataArray(np.array(values, dtype=np.float32), dims=dims, coords=coords)
    out.attrs.update(clean_baseline=clean, corrupted_baseline=corrupted, metric="m")
    if "head" in dims:
        out = out.assign_coords({**head_labels(*out.shape), "layer": range(len(out))})
    return out


HEADS = [[0.1, -0.9, np.nan], [0.3, 0.8, 0.4]]


@pytest.mark.parametrize("sign", [1, -1])
def test_top_and_strong_heads_bring_back_most(sign):
    """Also of a metric that falls when the answer comes back, and with heads that do not exist."""
    result = labelled(np.multiply(HEADS, 2 * sign), ("layer", "head"), clean=2 * sign)
    for given in (result, result.transpose("head", "layer")):
        best = top_head(given)
        assert float(best) == pytest.approx(1.6 * sign) and best["head_label"].item() == "L1H1"
        assert float(result.sel(layer=best["layer"], head=best["head"])) == float(best)
        strong = strong_heads(given)
        assert strong["head_label"].values.tolist() == ["L1H1", "L1H2"]
        np.testing.assert_allclose(strong, [0.8, 0.4], rtol=1e-6)
        assert [int(place["head"]) for place in strong] == [1, 2]
        assert len(strong_heads(given, part=0)) == 4
    assert not strong_heads(labelled([[-0.5, -0.1]], ("layer", "head"))).size


def test_effect_sizes_count_both_directions_and_nothing_where_there_is_nothing_to_patch():
    sizes = effect_sizes(labelled(np.add(HEADS, 1), ("layer", "head"), clean=3.0, corrupted=1.0))
    np.testing.assert_allclose(sizes, [[0.05, 0.45, 0], [0.15, 0.4, 0.2]], rtol=1e-5)
    assert (sizes.attrs["clean_baseline"], sizes.attrs["corrupted_baseline"]) == (1.0, 0.0)
    agrees = ("position", [True, False])
    stream = labelled([[0.2, -0.5]], ("layer", "position"), agrees=agrees)
    np.testing.assert_allclose(effect_sizes(stream), [[0, 0.5]])


@pytest.mark.parametrize("sign", [1, -1])
def test_two_positions_cross_at_the_first_layer_that_has_more_at_the_second(sign):
    values = [[1.0, 0.0], [0.9, 0.2], [0.3, 0.3], [0.1, 0.9], [0.5, 0.1]]
    stream = labelled(np.multiply(values, sign), ("layer", "position"), clean=sign)
    assert crossing_layer(stream, 0, -1) == 3
    assert crossing_layer(stream.transpose(), 0, 1) == 3
    assert crossing_layer(stream[:3], 0, 1) == 3, "the number of layers where they do not cross"
    # A layer, and not its place.
    part = stream.assign_coords(layer=range(5, 10))
    assert crossing_layer(part, 0, 1) == crossing_layer(part[2:], 0, 1) == 8
    assert crossing_layer(part[:2], 0, 1) == 7
    with pytest.raises(ValueError, match="select from the others"):
        crossing_layer(stream.expand_dims(prompt=2), 0, 1)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "attn-only"])
def test_attention_is_the_mean_pattern_and_steps_back_are_its_diagonals(name):
    model = tiny.model(name)
    tokens = torch.randint(3, 60, (3, 9))
    looks = attention(model, tokens, list("abcdefghi"))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    for layer in range(model.cfg.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]  # [batch, head, query, key]
        np.testing.assert_allclose(looks.sel(layer=layer), pattern.mean(0), atol=1e-6)
        for steps, start in ((1, 2), (3, 5), (0, 0), (2, 0)):
            back = attention_back(looks, steps, start)
            wanted = [pattern[:, :, i, i - steps] for i in range(max(start, steps), 9)]
            wanted = torch.stack(wanted).mean((0, 1))
            np.testing.assert_allclose(back.sel(layer=layer), wanted, atol=1e-6)
    best = top_head(back)
    assert best["head_label"].item() == f"L{int(best['layer'])}H{int(best['head'])}"
    assert looks.isel(layer=0, head=0, query=0).idxmax().item() == "a"
    for steps, start in ((9, 0), (1, 9), (-1, 0)):
        with pytest.raises(ValueError, match="there are 9 positions"):
            attention_back(looks, steps, start)


def test_a_layer_without_a_pattern_is_named(monkeypatch):
    model = tiny.model("gpt2")
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(model.cfg.n_layers)]

    def run(tokens, names_filter):
        assert names_filter == names
        return None, {names[0]: torch.zeros(1, 4, 3, 3)}

    monkeypatch.setattr(model, "run_with_cache", run)
    with pytest.raises(ValueError, match=r"no blocks\.1\.attn\.hook_pattern"):
        attention(model, torch.zeros(1, 3, dtype=torch.long))


def test_there_is_no_best_head_where_none_has_a_value():
    with pytest.raises(ValueError, match="no head of the result has a value"):
        top_head(labelled(np.full((2, 3), np.nan), ("layer", "head")))
