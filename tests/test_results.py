"""Labelled results carry the sweep's numbers under the right names, also through a file."""

from __future__ import annotations

import os
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest
import tiny
import xarray as xr

from patching_demo import patching
from patching_demo.engine.kinds import BLOCK_KINDS, HEAD_KINDS
from patching_demo.results import (
    combine,
    crossing_layer,
    effect_sizes,
    interval,
    largest_cells,
    load,
    save,
    share,
    strong_heads,
    top_head,
)
from patching_demo.sweeps import sweep, sweep_metrics
from patching_demo.sweeps.question import head_labels
from patching_demo.tasks import CORRUPTIONS, induction_task, prompt_task

QUIET = {"progress": False}


@lru_cache(None)
def _task(name, metric="logit difference"):
    model = tiny.model(name)
    return prompt_task(
        model,
        ["When John gave the bag to", "The cat sat on"],
        ["When Mary gave the bag to", "The dog sat on"],
        [(" Mary", " John")],
        metric=metric,
    )


@lru_cache(None)
def _result(name="gpt2", kinds="out", by="pos"):
    kinds = list(kinds) if isinstance(kinds, tuple) else kinds
    return sweep(tiny.model(name), _task(name), kinds, by=by, **QUIET)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize(
    ("kind", "by", "sweep_name", "dims"),
    [
        *((kind, "pos", kind, ("layer", "position")) for kind in BLOCK_KINDS),
        *(
            (kind, "pos", f"attn_head_{kind}_by_pos", ("layer", "position", "head"))
            for kind in HEAD_KINDS
        ),
        *((kind, "all_pos", f"attn_head_{kind}_all_pos", ("layer", "head")) for kind in HEAD_KINDS),
    ],
)
def test_one_kind_is_the_sweep_of_that_name_with_labels(name, kind, by, sweep_name, dims):
    model, task = tiny.model(name), _task(name)
    result = _result(name, kind, by)
    assert result.dims == dims and result.dtype == np.float32
    run = getattr(patching, f"get_act_patch_{sweep_name}")
    values = run(model, task.corrupted_tokens, task.clean_cache(model), task.metric, **QUIET)
    if sweep_name == "attn_head_pattern_by_pos":  # [layer, head, position]
        values = values.permute(0, 2, 1)
    np.testing.assert_allclose(result.values, values.numpy(), atol=1e-5)
    assert result.attrs["kind"] == kind


def test_several_kinds_are_stacked_in_the_order_given():
    result = _result("gpt2", ("v", "out"), "all_pos")
    assert result.dims == ("kind", "layer", "head")
    assert result["kind"].values.tolist() == ["v", "out"]
    for kind in ("v", "out"):
        np.testing.assert_allclose(
            result.sel(kind=kind).values, _result("gpt2", kind, "all_pos").values, atol=1e-5
        )


def test_heads_that_do_not_exist_are_gaps():
    result = _result("llama-gqa", tuple(HEAD_KINDS), "all_pos")
    missing = result.isnull().any("layer")
    for kind in HEAD_KINDS:
        expected = [False, False, kind in "kv", kind in "kv"]
        assert missing.sel(kind=kind).values.tolist() == expected
    assert result.attrs["n_key_value_heads"] == 2
    assert _result("llama-gqa", "k", "all_pos").sizes["head"] == 2


def test_labels_say_where_a_cell_is():
    result, task = _result("gpt2", "out"), _task("gpt2")
    assert result["position"].values.tolist() == task.position_labels
    assert result["token"].values.tolist() == task.position_tokens
    assert result["head_label"].sel(layer=1, head=3).item() == "L1H3"
    agree = int((task.clean_tokens != task.corrupted_tokens).any(0).int().argmax())
    assert agree > 0
    expected = [i < agree for i in range(task.clean_tokens.shape[1])]
    assert result["agrees"].values.tolist() == expected
    assert result.attrs["clean_baseline"] == task.clean_baseline
    assert result.attrs["corrupted_baseline"] == task.corrupted_baseline
    assert result.attrs["metric"] == "logit difference" and result.attrs["units"] == "logits"
    assert result.attrs["direction"] == "denoising"


def test_one_sweep_scored_by_several_metrics_is_each_of_them():
    model = tiny.model("gpt2")
    tasks = {m: _task("gpt2", m) for m in ("logit difference", "probability")}
    together = sweep_metrics(model, tasks, ["out", "q"], by="all_pos", **QUIET)
    for metric, task in tasks.items():
        alone = sweep(model, task, ["out", "q"], by="all_pos", **QUIET)
        np.testing.assert_allclose(together[metric].values, alone.values, atol=1e-5)
        assert together[metric].attrs == alone.attrs
    with pytest.raises(ValueError, match="no task"):
        sweep_metrics(model, {}, "out")
    with pytest.raises(ValueError, match="'other' has other prompts"):
        sweep_metrics(model, {**tasks, "other": induction_task(model, seq_len=3)}, "out")


@pytest.mark.parametrize(
    ("kinds", "by", "message"),
    [
        ("resid", "pos", "'resid'"),
        ([], "pos", "empty"),
        (["out", "out"], "pos", "twice"),
        (["out", "resid_pre"], "pos", "two sweeps"),
        ("out", "position", "'position'"),
        ("resid_pre", "all_pos", "by='pos'"),
    ],
)
def test_unknown_kinds_are_refused_before_anything_runs(kinds, by, message):
    class NeverCalled:
        def __getattr__(self, name):
            raise AssertionError(f"the model was touched: {name}")

    with pytest.raises(ValueError, match=message):
        sweep(NeverCalled(), _task("gpt2"), kinds, by=by)


def test_share_is_zero_at_corrupted_and_one_at_clean():
    result = _result("gpt2", "resid_pre")
    clean, corrupted = (result.attrs[f"{w}_baseline"] for w in ("clean", "corrupted"))
    scaled = share(result)
    np.testing.assert_allclose(scaled * (clean - corrupted) + corrupted, result, atol=1e-5)
    assert (scaled.attrs["clean_baseline"], scaled.attrs["corrupted_baseline"]) == (1.0, 0.0)
    assert scaled.attrs["units"] == "share of clean - corrupted"
    again = share(scaled)
    assert again.identical(scaled)
    assert result.attrs["units"] == "logits"
    # Patching everything the last position will read makes the run the clean one.
    task = sweep(tiny.model("gpt2"), _task("gpt2").normalised(), "resid_pre", **QUIET)
    np.testing.assert_allclose(task.values, scaled.values, atol=1e-4)


@pytest.mark.parametrize("apart", [0.0, 1e-7])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_share_needs_two_different_baselines(name, apart):
    flat = _result(name, "out").copy()
    flat.attrs["clean_baseline"] = flat.attrs["corrupted_baseline"] + apart
    with pytest.raises(ValueError, match="share of their difference"):
        share(flat)
    assert largest_cells(flat, 3)["share"].isna().all()
    with pytest.raises(ValueError, match="keep_attrs"):
        share(xr.DataArray([1.0], dims="layer"))


def _drawn(n: int, clean: float = 2.0) -> xr.DataArray:
    """2,500 cells of as many studies with n prompts each, whose values have the mean 1."""
    draw = np.random.default_rng(0)
    values = draw.exponential(size=(n, 25, 100))
    attrs = {"clean_baseline": clean, "corrupted_baseline": 0.0, "units": "nats", "kind": "q"}
    coords = {"head_label": (("layer", "head"), np.full((25, 100), "L"))}
    return xr.DataArray(values, coords, ("prompt", "layer", "head"), attrs=attrs, name="value")


@pytest.mark.parametrize(("level", "least", "most"), [(0.95, 0.92, 0.96), (0.5, 0.46, 0.54)])
def test_an_interval_holds_the_mean_as_often_as_its_level_says(level, least, most):
    result = _drawn(60)
    found = interval(result, level)
    covered = ((found["low"] <= 1) & (1 <= found["high"])).mean().item()
    assert least < covered < most
    np.testing.assert_allclose(found, result.mean("prompt"), rtol=1e-6)
    assert found["head_label"].identical(result["head_label"].assign_coords(found.coords))
    said = {"level": level, "prompts": "mean over 60 prompts"}
    assert found.attrs == {**result.attrs, **said} and "prompt" not in found.coords
    # The textbook's standard error of a mean.
    sigma = result.std("prompt", ddof=1) / 60**0.5
    quantile = {0.95: 1.96, 0.5: 0.674}[level]
    width = (found["high"] - found["low"]) / (2 * quantile * sigma)
    assert width.mean().item() == pytest.approx(1, abs=0.03)
    assert interval(result, level).identical(found)
    assert not interval(result, level, seed=1).identical(found)


def test_an_interval_of_equal_prompts_has_no_width_and_gaps_stay_gaps():
    result = _drawn(2).isel(prompt=[0] * 7).copy()
    result[:, 3, 4] = np.nan
    found = interval(result)
    np.testing.assert_array_equal(found["low"], found)
    np.testing.assert_array_equal(found["high"], found)
    assert found.isnull().sum() == 1


def test_an_interval_of_shares_draws_the_baselines_with_the_prompts():
    """Prompts that each recover exactly a half say so without doubt, however different."""
    draw = np.random.default_rng(1)
    clean, corrupted = draw.normal(3, 1, 30), draw.normal(-1, 1, 30)
    half = (clean + corrupted) / 2
    result = xr.DataArray(
        np.stack([half, corrupted], 1),
        {"clean_baseline": ("prompt", clean), "corrupted_baseline": ("prompt", corrupted)},
        ("prompt", "layer"),
        attrs={"clean_baseline": clean.mean(), "corrupted_baseline": corrupted.mean()},
    )
    found = interval(share(result))
    for bound in (found, found["low"], found["high"]):
        np.testing.assert_allclose(bound, [0.5, 0], atol=1e-6)
    measured = interval(result)
    assert (measured["high"] - measured["low"] > 0.3).all()
    # A difference between cells has no baselines to draw.
    between = interval((result[:, 0] - result[:, 1]).drop_attrs())
    assert between.low < (clean - corrupted).mean() / 2 < between.high
    # Bounds are shares where the means are, the lower one below the other.
    flipped = result.assign_attrs(clean_baseline=-5.0)
    for scaled, sign in ((share(measured), 1), (share(interval(flipped)), -1)):
        assert (scaled["low"] < scaled).all() and (scaled < scaled["high"]).all()
        width = (scaled["high"] - scaled["low"]) / (measured["high"] - measured["low"])
        spread = scaled.attrs["clean_baseline"] and {1: clean.mean(), -1: -5.0}[sign]
        np.testing.assert_allclose(width, 1 / abs(spread - corrupted.mean()), rtol=1e-4)
    assert "low" not in effect_sizes(measured).coords
    # Where the baselines of single prompts are not known, those of all stand.
    bare = share(result.drop_vars(["clean_baseline", "corrupted_baseline"]))
    both = interval(combine({"a": bare, "b": bare}))
    np.testing.assert_allclose(both["low"].isel(corrupted=1), share(measured)["low"], atol=1e-6)


@pytest.mark.parametrize("odd", [np.inf, -np.inf, 3e38, -3e38])
def test_a_value_too_large_to_add_up_is_read_as_it_is(odd):
    """Such a cell is the largest effect, has its share, and no interval if it is infinite."""
    result, plain = _drawn(2).astype(np.float32), interval(_drawn(2).astype(np.float32))
    result[:, 3, 4] = odd
    found, table = interval(result), largest_cells(result, 2)
    for bound in (found, found["low"], found["high"]):
        cell = float(bound[3, 4])
        assert cell == np.float32(odd) or (np.isinf(odd) and bound is not found and cell != cell)
    np.testing.assert_array_equal(found["low"][0], plain["low"][0])
    assert table["value"][0] == np.float32(odd) and table["share"][0] == np.float32(odd) / 2
    assert share(found)[3, 4] == effect_sizes(found)[3, 4] * np.sign(odd) == np.float32(odd) / 2
    largest = top_head(found.assign_coords(layer=range(25), head=range(100)))
    assert (largest["layer"] == 3) == (odd > 0)


@pytest.mark.parametrize(
    ("result", "level", "message"),
    [
        (lambda: _drawn(1), 0.9, "'prompt' of at least 2"),
        (lambda: _drawn(2).mean("prompt"), 0.9, "per_prompt=True"),
        (lambda: _drawn(2), 95, "level must be between 0 and 1, got 95"),
        (lambda: _drawn(2), float("nan"), "got nan"),
    ],
)
def test_no_interval_without_prompts_or_level(result, level, message):
    with pytest.raises(ValueError, match=message):
        interval(result(), level)


def test_results_of_single_prompts_keep_their_baselines():
    model, tasks = (
        tiny.model("gpt2"),
        {m: _task("gpt2", m) for m in ("logit difference", "probability")},
    )
    results = {m: sweep(model, t, "out", per_prompt=True, **QUIET) for m, t in tasks.items()}
    result, combined = results["probability"], combine(results, "metric")
    whole = sweep(model, tasks["probability"], "out", **QUIET)
    np.testing.assert_allclose(share(result).mean("prompt"), share(whole), atol=1e-4)
    np.testing.assert_allclose(interval(result), whole, atol=1e-6)
    for which in ("clean_baseline", "corrupted_baseline"):
        assert result[which].dims == ("prompt",)
        assert result[which].mean().item() == pytest.approx(result.attrs[which], abs=1e-6)
        np.testing.assert_array_equal(share(result)[which], result[which])
        np.testing.assert_array_equal(combined[which].sel(metric="probability"), result[which])
    alone, together = interval(share(result)), interval(combined)
    for metric, one in results.items():
        measured = together["clean_baseline"].sel(metric=metric).item()
        assert measured == pytest.approx(one.attrs["clean_baseline"], abs=1e-6)
    np.testing.assert_allclose(together.sel(metric="probability"), alone, atol=1e-6)
    np.testing.assert_allclose(together["low"].sel(metric="probability"), alone["low"], atol=1e-6)
    pd.testing.assert_frame_equal(largest_cells(result), largest_cells(whole), atol=1e-4)


def _corruptions(kinds="out"):
    model = tiny.model("attn-only")
    return {
        c: sweep(model, induction_task(model, c, batch=2, seq_len=4), kinds, **QUIET)
        for c in CORRUPTIONS
    }


def test_combined_results_are_shares_of_their_own_baselines():
    results = _corruptions()
    combined = combine(results)
    assert combined.dims == ("corrupted", "layer", "position", "head")
    for name, result in results.items():
        np.testing.assert_allclose(combined.sel(corrupted=name).values, share(result).values)
        for which in ("clean", "corrupted"):
            measured = combined[f"{which}_baseline"].sel(corrupted=name).item()
            assert measured == result.attrs[f"{which}_baseline"]
        agrees = combined["agrees"].sel(corrupted=name).values
        assert agrees.tolist() == result["agrees"].values.tolist()
    assert combined.attrs["task"] == "induction, AA against AB, BA, BB, BC"
    # What has the same baselines stays in the metric's units, and the measured ones stay.
    twice = combine({"x": combined, "y": combined}, "run")
    assert twice.dims == ("run", *combined.dims)
    np.testing.assert_array_equal(twice.sel(run="y").values, combined.values)
    np.testing.assert_array_equal(twice["clean_baseline"], combined["clean_baseline"])
    result = _result("gpt2", "out")
    assert combine({"one": result, "two": result}, "run").attrs["units"] == "logits"


def test_only_like_results_combine():
    with pytest.raises(ValueError, match="no results"):
        combine({})
    with pytest.raises(ValueError, match="same sweep"):
        combine({"a": _result("gpt2", "out"), "b": _result("gpt2", "resid_pre")})
    moved = _result("gpt2", "out").assign_coords(head=[4, 5, 6, 7])
    with pytest.raises(ValueError, match="other labels"):
        combine({"a": _result("gpt2", "out"), "b": moved})
    bare = _result("gpt2", "out").drop_vars("agrees")
    with pytest.raises(ValueError, match="other labels"):
        combine({"a": _result("gpt2", "out"), "b": bare})


def test_largest_cells_are_the_largest_effects_in_order():
    result = _result("gpt2", "out").copy(deep=True)
    base = result.attrs["corrupted_baseline"]
    result.values[:] = base
    marked = [((1, 4, 2), 5.0), ((0, 5, 3), -4.0), ((1, 6, 0), 3.0)]
    for index, change in marked:
        result.values[index] += change
    result.values[0, 0, 0] += 100.0  # before the inputs differ: not an effect of any patch
    table = largest_cells(result, 3)
    assert table["label"].tolist() == ["L1H2", "L0H3", "L1H0"]
    assert table["position"].tolist() == [result["position"].values[i] for i in (4, 5, 6)]
    assert table["token"].tolist() == [result["token"].values[i] for i in (4, 5, 6)]
    assert table["value"].tolist() == pytest.approx([base + c for _, c in marked], abs=1e-5)
    spread = result.attrs["clean_baseline"] - base
    assert table["share"].tolist() == pytest.approx([c / spread for _, c in marked], abs=1e-4)


def test_largest_cells_name_kinds_and_skip_gaps():
    table = largest_cells(_result("llama-gqa", tuple(HEAD_KINDS), "all_pos"), 1000)
    assert len(table) == 3 * (3 * 4 + 2 * 2)
    assert set(table["kind"]) == set(HEAD_KINDS)
    assert "position" not in table and not table["value"].isna().any()
    effect = (table["value"] - _task("llama-gqa").corrupted_baseline).abs()
    assert effect.is_monotonic_decreasing
    bare = _result("gpt2", ("v", "out"), "all_pos").drop_vars(["kind", "layer", "head_label"])
    table = largest_cells(bare, 100)
    assert set(table["kind"]) == {"0", "1"} and set(table["label"]) == {"L0", "L1"}
    for count in (0, 2.0, "2", True, None):
        with pytest.raises((ValueError, TypeError), match="n must be"):
            largest_cells(_result(), count)
    with pytest.raises(ValueError, match="no layer"):
        largest_cells(_result("gpt2", "resid_pre").rename(layer="row"))


def _by_role(head: bool = False) -> xr.DataArray:
    """Nine prompts' values by role; S2 carries the stream early and END late."""
    rng = np.random.default_rng(0)
    mean = np.array([[0.1, 0.9, 0.0], [0.0, 0.8, 0.1], [0.0, 0.2, 0.7]])
    values = mean + 0.1 * rng.normal(size=(9, 3, 3))
    attrs = {"clean_baseline": 1.0, "corrupted_baseline": 0.0, "metric": "m", "by": "role"}
    coords = {"layer": range(3), "role": ["IO", "S2", "END"]}
    dims = ("prompt", "layer", "role")
    result = xr.DataArray(values, coords, dims, "value", {**attrs, "units": "logits"})
    if head:
        result = xr.concat([0.1 * result, result], "head").transpose(*dims, "head")
        result = result.assign_coords(head_labels(3, 2))
    return result


@pytest.mark.parametrize("head", [False, True])
def test_results_by_role_are_read_by_their_names(head):
    result = _by_role(head)
    found = interval(result)
    table = largest_cells(found, 3)
    assert list(table) == ["label", "role", "value", "low", "high", "share"]
    assert table["role"].tolist() == ["S2", "S2", "END"]
    assert table["label"].tolist() == [f"L{layer}{'H1' * head}" for layer in (0, 1, 2)]
    for _, row in table.iterrows():
        place = {"role": row["role"], "layer": int(row["label"][1])} | ({"head": 1} if head else {})
        for name, values in (("value", found), ("low", found["low"]), ("high", found["high"])):
            assert row[name] == float(values.sel(place))
        assert row["low"] < row["value"] < row["high"]
    assert "low" not in largest_cells(result)
    stream = found.isel(head=1) if head else found
    assert crossing_layer(stream, "S2", "END") == 2 == crossing_layer(stream.T, "S2", "END")
    assert crossing_layer(stream, "S2", "IO") == 3
    with pytest.raises(ValueError, match="no role 1: choose among IO, S2, END"):
        crossing_layer(stream, 1, "END")
    if head:
        assert top_head(found.sel(role="END"))["head_label"].item() == "L2H1"
        assert strong_heads(found.sel(role="S2"))["head_label"].values.tolist() == ["L0H1", "L1H1"]
    assert effect_sizes(found).dims == found.dims


def _odd() -> xr.DataArray:
    """Everything that a sweep's labels and attributes may hold, and more."""
    words = ["<b>\n$x$ é 0", "a\0b", "\ud800 half", "", "😀", "∅", '"quoted"']
    out = _result("gpt2", "resid_pre").copy(deep=True).assign_coords(position=words, run=0.1)
    out.values[0, :2] = np.nan, np.inf
    out.attrs |= {"note": "Ω\0", "list": [1, 2.5, None], "numpy": np.float32(0.5), "none": None}
    out.attrs |= {"flag": True, "nan": float("nan"), "large": 2**70, "units": "seconds"}
    return out


@pytest.mark.parametrize("which", ["one", "gaps", "combined", "odd", "prompts", "interval", "role"])
def test_a_result_survives_its_file(tmp_path, which):
    result = {
        "one": lambda: _result("gpt2", "resid_pre"),
        "gaps": lambda: _result("llama-gqa", tuple(HEAD_KINDS), "pos"),
        "combined": lambda: combine(_corruptions(["out", "v"])),
        "odd": _odd,
        "prompts": lambda: _drawn(3).assign_coords(clean_baseline=("prompt", [1.0, 2.0, 3.0])),
        "interval": lambda: interval(_drawn(3)),
        "role": lambda: interval(_by_role(head=True)),
    }[which]().copy(deep=True)
    folder = tmp_path / "with space é"
    folder.mkdir()
    path = save(result, folder / "r.nc")
    back = load(path)
    if which == "odd":
        result.attrs["numpy"] = 0.5  # a plain number, as netCDF has no other
    assert repr(sorted(back.attrs.items())) == repr(sorted(result.attrs.items()))
    assert back.drop_attrs().identical(result.drop_attrs()) and back.dtype == result.dtype
    for name, coord in result.coords.items():
        assert back[name].dtype.kind == coord.dtype.kind
    # Other programs can read it, too.
    np.testing.assert_array_equal(xr.open_dataarray(path).values, result.values)


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_a_saved_file_has_the_rights_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        mode = save(_result(), tmp_path / "r.nc").stat().st_mode & 0o777
    finally:
        os.umask(before)
    assert mode == 0o666 & ~umask


@pytest.mark.parametrize("fault", ["fsync", "to_netcdf"])
def test_a_failed_save_keeps_the_earlier_file(tmp_path, monkeypatch, fault):
    path = tmp_path / "r.nc"
    save(_result(), path)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if fault == "fsync" else xr.DataArray, fault, full)
    with pytest.raises(OSError, match="No space left"):
        save(_result("gpt2", "resid_pre"), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.nc"]


def test_what_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(TypeError, match="'bad' cannot be kept"):
        save(_result().assign_attrs(bad=object()), tmp_path / "r.nc")
    for path in (None, 3, b"r.nc"):
        with pytest.raises(TypeError, match="path must be a path, got"):
            save(_result(), path)
        with pytest.raises(TypeError, match="path must be a path, got"):
            load(path)
    with pytest.raises(ValueError, match="path must be a path, got"):
        load("r\0.nc")
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_results_are_refused_by_name(tmp_path):
    path = save(_result(), tmp_path / "r.nc")
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b'{"format": "patching_demo result"}'):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="r.nc is not a saved result, or is cut short"):
            load(path)
    _result().to_netcdf(path, engine="h5netcdf")
    with pytest.raises(ValueError, match="r.nc is not a saved result: patching_demo.save"):
        load(path)
    _result().assign_attrs(patching_demo_version=99).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(ValueError, match="r.nc has version 99"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.nc")
