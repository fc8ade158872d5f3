"""Labelled results: what their numbers mean, kept beside them.

A result is an ``xarray.DataArray`` of metric values. Its dimensions are ``layer`` and ``position``,
``role`` or ``head``, after an optional ``prompt`` and ``kind``; its attributes say what was patched
into what, the metric and both baselines. :mod:`patching_demo.plots` draws it as it is, and
:func:`save` and :func:`load` keep all of it in a file.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from patching_demo.metrics import as_good_as_equal, check_scale

__all__ = [
    "attention",
    "attention_back",
    "combine",
    "crossing_layer",
    "effect_sizes",
    "interval",
    "largest_cells",
    "load",
    "save",
    "share",
    "strong_heads",
    "top_head",
]

_VERSION = 2
_VERSION_KEY, _JSON_KEY = "patching_demo_version", "patching_demo_json"


def share(result: xr.DataArray) -> xr.DataArray:
    """Values as a share of clean minus corrupted: 0 at the corrupted, 1 at the clean baseline.

    The baselines are means over prompts, of a result with the dimension ``prompt``, too: the mean
    of its shares is the share of its means. The baselines of single prompts are kept as they were
    measured, as the coordinates ``clean_baseline`` and ``corrupted_baseline``.

    Raises:
        ValueError: if the baselines are missing, equal, or differ by rounding alone.
    """
    clean, corrupted = baselines(result)
    attrs = result.attrs
    check_scale(clean, corrupted, attrs.get("metric", "metric"), attrs.get("units", ""))

    def part(values: xr.DataArray) -> xr.DataArray:
        # Differences of large numbers need more digits and a wider range than single precision.
        return single((values.astype(float) - corrupted) / (clean - corrupted))

    out = part(result)
    out.attrs = dict(result.attrs)
    if "low" in result.coords:
        bounds = [part(result[name]) for name in ("low", "high")]
        low, high = bounds if clean > corrupted else bounds[::-1]
        out = out.assign_coords(low=low, high=high)
    if (clean, corrupted) != (1.0, 0.0):
        out.attrs["metric"] = f"{result.attrs.get('metric', 'metric')}, normalised"
    out.attrs.update(units="share of clean - corrupted", clean_baseline=1.0, corrupted_baseline=0.0)
    out.name = result.name
    return out


def combine(results: Mapping[str, xr.DataArray], dim: str = "corrupted") -> xr.DataArray:
    """Lay several results of the same shape beside each other along a new first dimension.

    Where their baselines differ, each is turned into shares of its own clean minus corrupted
    first (see :func:`share`), so that one colour scale is right for all. The baselines that were
    measured stay as the coordinates ``clean_baseline`` and ``corrupted_baseline`` along ``dim``.

    Raises:
        ValueError: if there is none, or shapes or labels differ.
    """
    if not results:
        raise ValueError("there are no results to combine")
    names, arrays = list(results), list(results.values())
    first = arrays[0]
    for name, array in zip(names, arrays, strict=True):
        same = array.dims == first.dims and array.shape == first.shape
        same = same and array.coords.keys() == first.coords.keys()
        if not same or any(
            not np.array_equal(array[d].values, first[d].values)
            for d in first.dims
            if d in first.coords
        ):
            raise ValueError(
                f"{name!r} has dimensions {dict(array.sizes)} and {names[0]!r} "
                f"{dict(first.sizes)}, or other labels: only results of the same sweep can be "
                "combined"
            )
    pairs = [baselines(array) for array in arrays]
    if len(set(pairs)) > 1:
        arrays = [share(array) for array in arrays]
    coords: dict[str, Any] = {dim: names}
    for key, coord in first.coords.items():
        varies = any(not np.array_equal(a[key].values, first[key].values) for a in arrays)
        values = np.stack([a[key].values for a in arrays]) if varies else coord.values
        coords[str(key)] = ((dim, *coord.dims) if varies else coord.dims, values)
    # What was combined before has its measured baselines as coordinates already.
    coords.setdefault("clean_baseline", (dim, [clean for clean, _ in pairs]))
    coords.setdefault("corrupted_baseline", (dim, [corrupted for _, corrupted in pairs]))
    out = xr.DataArray(
        np.stack([a.values for a in arrays]),
        dims=(dim, *first.dims),
        coords=coords,
        name=first.name,
    )
    out.attrs = {
        k: v
        for k, v in arrays[0].attrs.items()
        if all(a.attrs.get(k) is v or a.attrs.get(k) == v for a in arrays)
    }
    for fact in ("direction", "source", "method", "window", "receivers"):
        if len({a.attrs.get(fact) for a in arrays}) > 1:
            out.attrs[fact] = "several"
    if "task" not in out.attrs:
        out.attrs["task"] = _common_name([str(a.attrs.get("task", "")) for a in arrays])
    return out


def interval(result: xr.DataArray, level: float = 0.95, seed: int = 0) -> xr.DataArray:
    """The mean over prompts, with how far it may be off: a bootstrap over prompts.

    The bounds are percentiles of the means of 2,000 draws of as many prompts, with replacement
    (Efron and Tibshirani, 1993). For shares, each draw has its own baselines, too.

    Args:
        result: with the dimension ``prompt``, of a sweep with ``per_prompt=True``.
        level: the part of draws between the bounds, above 0 and below 1.
        seed: of the draws.

    Returns:
        The mean, with the other labels of ``result`` and its bounds as the coordinates ``low``
        and ``high``, NaN where a prompt has no finite value; its attribute ``level`` is that of
        the interval, and ``prompts`` says how many there were.

    Raises:
        ValueError: if there are fewer than two prompts, or the level is not between 0 and 1.
    """
    from scipy.stats import bootstrap  # A second to import, for this alone.

    n = result.sizes.get("prompt", 0)
    if n < 2:
        raise ValueError(
            f"an interval needs a dimension 'prompt' of at least 2, got {dict(result.sizes)}: "
            "sweep with per_prompt=True"
        )
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    result, mean = result.astype(float), over_prompts(result)
    one = xr.ones_like(result["prompt"], float)
    start, spread = 0 * one, one
    measured = {
        name: labels
        for name in ("clean_baseline", "corrupted_baseline")
        if (labels := result.coords.get(name)) is not None and "prompt" in labels.dims
    }
    facts = [result.attrs.get(f"{which}_baseline") for which in ("clean", "corrupted")]
    if measured and facts == [1.0, 0.0]:
        # A share is one of means, and those of the baselines change with the prompts drawn.
        start = measured["corrupted_baseline"]
        spread = measured["clean_baseline"] - start
    moved = result * spread.mean("prompt") + start.mean("prompt") - start
    values, scale = (
        part.transpose("prompt", *mean.dims).values.reshape(n, -1)
        for part in xr.broadcast(moved, spread)
    )
    known = np.isfinite(values).all(0)
    values, scale = values[:, known], scale[:, known]

    def of_means(drawn: np.ndarray, axis: int) -> np.ndarray:
        counts = np.stack([np.bincount(prompts, minlength=n) for prompts in drawn])
        return (counts @ values / (counts @ scale)).T

    bounds = np.full((2, mean.size), np.nan, np.float32)
    bounds[:, known] = bootstrap(
        (np.arange(n),),
        of_means,
        n_resamples=2000,
        batch=100,
        vectorized=True,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = ((mean.dims, bound.reshape(mean.shape)) for bound in bounds)
    # What was combined keeps the measured baselines of each part.
    means = {name: labels.mean("prompt") for name, labels in measured.items() if labels.ndim > 1}
    mean = single(mean).assign_coords(low=low, high=high, **means)
    return mean.assign_attrs(level=level, prompts=f"mean over {n} prompts")


def largest_cells(result: xr.DataArray, n: int = 5) -> pd.DataFrame:
    """The n cells whose patch moves the metric furthest from the corrupted baseline.

    Cells that do not exist, and positions at which there is nothing to patch, are left out. Values
    of single prompts are averaged first.

    Returns:
        One row per cell, largest effect first: a column for each further dimension (such as
        ``kind``), then ``label`` (L9H6 or L9), ``position`` and ``token`` where there are
        positions, ``role`` where these have names, ``value`` in the metric's units, ``low`` and
        ``high`` in the same units where there is an interval (see :func:`interval`), and
        ``share`` of clean minus corrupted (NaN where the baselines differ by rounding at most).

    Raises:
        ValueError: if n is not positive, or a baseline or the layer is missing.
        TypeError: if n is not a whole number.
    """
    if not isinstance(n, (int, np.integer)) or isinstance(n, bool):
        raise TypeError(f"n must be a whole number, got {n!r}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if "layer" not in result.dims and "layer" not in result.coords:
        raise ValueError(f"the result has no layer, only {list(result.dims)}")
    result = over_prompts(result)
    clean, corrupted = baselines(result)
    values = result.where(~agreement(result)).values.astype(float)
    effect = np.nan_to_num(np.abs(values - corrupted), nan=-1.0)
    order = np.argsort(-effect, axis=None, kind="stable")[:n]
    order = order[effect.ravel()[order] >= 0]
    at = dict(zip(result.dims, np.unravel_index(order, values.shape), strict=True))
    cells = result.isel({dim: ("cell", index) for dim, index in at.items()})
    # As xarray has it: a dimension without labels is numbered.
    labels = {**at, **{name: coord.values for name, coord in cells.coords.items()}}
    table = pd.DataFrame({name: np.broadcast_to(own, len(order)) for name, own in labels.items()})
    table["label"] = table.get("head_label", "L" + table["layer"].astype(str))
    table["value"] = values.ravel()[order]
    spread = math.nan if baselines_are_equal(result) else clean - corrupted
    table["share"] = (table["value"] - corrupted) / spread
    words = [dim for dim in result.dims if dim not in CELL_DIMS] + ["label"]
    words += ["position", "token"] * ("position" in at) + ["role"] * ("role" in at)
    words = [name for name in words if name in table]
    numbers = [name for name in ("value", "low", "high", "share") if name in table]
    return table[words].astype(str).join(table[numbers].astype(float))


def effect_sizes(result: xr.DataArray) -> xr.DataArray:
    """How far each patch moves the metric, in either direction: the absolute :func:`share`.

    0 where there is nothing to patch: at positions at which both inputs agree, and at heads that
    do not exist. Dimensions, labels and errors are those of :func:`share`.
    """
    shares = share(result)
    sizes = abs(shares).fillna(0.0).assign_attrs(shares.attrs)
    sizes = sizes.drop_vars(["low", "high"], errors="ignore")
    return sizes.where(~agreement(sizes), 0.0)


def top_head(result: xr.DataArray) -> xr.DataArray:
    """The head whose patch brings back most, as one labelled cell.

    Args:
        result: with dimensions layer and head.

    Returns:
        The cell of ``result``: ``float(cell)`` is its value, and its coordinates name the head:
        ``other.sel(layer=cell["layer"], head=cell["head"])`` reads it in another result.

    Raises:
        ValueError: if no head has a value, or as :func:`share` does.
    """
    if not bool(result.notnull().any()):
        raise ValueError(
            "no head of the result has a value, so there is none that brings back most"
        )
    at = share(result).fillna(-np.inf).argmax(["layer", "head"])
    return result.isel(at)


def strong_heads(result: xr.DataArray, part: float = 0.5) -> xr.DataArray:
    """The heads that bring back at least ``part`` of what the best one does, best first.

    Args:
        result: with dimensions layer and head.
        part: a part of the largest share; 0 keeps all heads that do not move the score away.

    Returns:
        Shares along ``head_label``, with ``layer`` and ``head`` as coordinates. Empty if no head
        brings anything back.
    """
    shares = share(result).stack(cell=("layer", "head")).dropna("cell")
    shares = shares.isel(cell=np.argsort(-shares.values, kind="stable"))
    least = part * shares.max() if part else 0
    return shares[shares >= least].reset_index("cell").swap_dims(cell="head_label")


def crossing_layer(result: xr.DataArray, first: int | str, then: int | str) -> int:
    """The first layer at which a patch at position ``then`` brings back more than at ``first``.

    Args:
        result: with dimensions layer and position, or layer and role.
        first: a position, counted from 0, or a role's name.
        then: another one; of positions, -1 is the last.

    Returns:
        The layer, or the one after the last where there is no such layer.

    Raises:
        ValueError: if there is no such role, the result has other dimensions, or as :func:`share`
            does.
    """
    shares = share(result)
    if set(result.dims) not in ({"layer", "position"}, {"layer", "role"}):
        raise ValueError(
            f"curves cross along layers at two positions or roles, got dimensions "
            f"{list(result.dims)}: select from the others, or take their mean"
        )
    if "role" in result.dims:
        names = [str(name) for name in shares["role"].values]
        if unknown := [place for place in (first, then) if place not in names]:
            raise ValueError(f"there is no role {unknown[0]!r}: choose among {', '.join(names)}")
        one, other = (shares.sel(role=place) for place in (first, then))
    else:
        one, other = (shares.isel(position=place) for place in (first, then))
    ahead = (other > one).values
    layers = result["layer"].values  # xarray numbers a dimension without labels.
    return int(layers[ahead.argmax()] if ahead.any() else layers[-1] + 1)


def attention(
    model: Any, tokens: torch.Tensor, labels: Sequence[str] | None = None
) -> xr.DataArray:
    """Where every head looks: its attention pattern, averaged over the batch.

    Args:
        model: a TransformerBridge.
        tokens: int ``[batch, pos]``.
        labels: one for each position, such as a task's ``position_labels``.

    Returns:
        float32 ``[layer, head, query, key]``; each row along ``key`` adds up to 1.

    Raises:
        ValueError: if a layer has no attention pattern to read.
    """
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(model.cfg.n_layers)]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names)
    for name in names:
        if name not in cache:
            raise ValueError(f"the model has no {name}: this layer shows no attention pattern")
    values = np.stack([cache[name].float().mean(0).numpy(force=True) for name in names])
    layers, heads = range(values.shape[0]), range(values.shape[1])
    places = list(labels) if labels is not None else range(values.shape[2])
    coords = {
        "layer": layers,
        "head": heads,
        "query": places,
        "key": places,
        "head_label": (("layer", "head"), [[f"L{i}H{j}" for j in heads] for i in layers]),
    }
    attrs = {
        "metric": "mean attention",
        "units": "mean attention",
        "clean_baseline": 1.0,
        "corrupted_baseline": 0.0,
        "clean_name": "all",
        "corrupted_name": "none",
        "model": str(model.cfg.model_name),
    }
    dims = ("layer", "head", "query", "key")
    return xr.DataArray(values, dims=dims, coords=coords, attrs=attrs, name="value")


def attention_back(pattern: xr.DataArray, steps: int, start: int = 0) -> xr.DataArray:
    """How much each head attends to the position ``steps`` before its own, on average.

    With ``steps=1`` this finds previous-token heads. On a sequence of length n that is repeated
    once, ``steps=n - 1`` from the second copy on finds induction heads, which look at the token
    after the first occurrence of the current one (Olsson et al., 2022).

    Args:
        pattern: of :func:`attention`.
        steps: how far back, at least 0.
        start: only positions from this one on count.

    Returns:
        Mean attention with dimensions layer and head.

    Raises:
        ValueError: if no position from ``start`` on has one ``steps`` before it.
    """
    query = np.arange(max(start, steps), pattern.sizes["query"])
    if steps < 0 or not len(query):
        raise ValueError(
            f"no position from {start} on has one {steps} before it: there are "
            f"{pattern.sizes['query']} positions"
        )
    place = xr.DataArray(query, dims="place")
    looked = pattern.isel(query=place, key=place - steps)
    return looked.mean("place").assign_attrs(pattern.attrs)


def save(result: xr.DataArray, path: str | os.PathLike[str]) -> Path:
    """Write a result with its labels and attributes to a netCDF file, whole or not at all.

    ``xarray.open_dataarray`` reads it as well as :func:`load`.

    Returns:
        The path written.

    Raises:
        OSError: if the file cannot be written; an earlier file of that name is then kept.
        TypeError: if an attribute is not a number, a string, None, a list or a mapping of such,
            or ``path`` is no path.
    """
    path = _file(path)
    kept = result.copy(deep=False)
    kept.attrs, others = {_VERSION_KEY: _VERSION}, {}
    for name, value in result.attrs.items():
        value = value.item() if isinstance(value, np.generic) else value
        (kept.attrs if _is_plain(value) else others)[str(name)] = value
    if others:
        kept.attrs[_JSON_KEY] = _as_json(others)
    for name, labels in result.coords.items():
        if labels.dtype.kind in "UO" and not all(map(_is_plain, map(str, labels.values.flat))):
            text = np.vectorize(json.dumps, otypes=[object])(labels.values)
            kept = kept.assign_coords({name: (labels.dims, text, {_JSON_KEY: "each"})})
    # In a folder beside it, so that the final rename cannot be a half-done copy, and the file
    # itself is made with the rights that any new file has.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = os.path.join(folder, "part")
        kept.to_netcdf(part, engine="h5netcdf")
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    return path


def load(path: str | os.PathLike[str]) -> xr.DataArray:
    """Read what :func:`save` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a whole result of a version known here.
        TypeError: if ``path`` is no path.
    """
    path = _file(path)
    try:
        with xr.open_dataarray(path, engine="h5netcdf", decode_times=False) as file:
            result = file.load()
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a saved result, or is cut short: {error}") from None
    version = result.attrs.pop(_VERSION_KEY, None)
    if version is None:
        raise ValueError(f"{path} is not a saved result: patching_demo.save did not write it")
    if version != _VERSION:
        raise ValueError(
            f"{path} has version {version}, this package reads {_VERSION}: run the sweep again"
        )
    others = json.loads(result.attrs.pop(_JSON_KEY, "{}"))
    plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in result.attrs.items()}
    result.attrs = plain | others
    for name, labels in result.coords.items():
        if labels.attrs.pop(_JSON_KEY, None):
            text = np.vectorize(json.loads, otypes=[object])(labels.values).astype(str)
            result = result.assign_coords({name: (labels.dims, text)})
    return result.drop_encoding()


#: Dimensions that say where a cell is. The entries of the first three are numbers.
CELL_DIMS = ("layer", "head", "position", "role")


def baselines(result: xr.DataArray) -> tuple[float, float]:
    """(clean, corrupted) of a result; ValueError if it lacks one."""
    try:
        return float(result.attrs["clean_baseline"]), float(result.attrs["corrupted_baseline"])
    except KeyError as error:
        raise ValueError(
            f"the result has no attribute {error}: arithmetic on it may have dropped the "
            "attributes (xarray.set_options(keep_attrs=True) keeps them)"
        ) from None


def agreement(result: xr.DataArray) -> xr.DataArray:
    """Where both inputs agree, so that there is nothing to patch: bool, as large as the result."""
    everywhere = xr.ones_like(result, dtype=bool)
    if "agrees" not in result.coords:
        return ~everywhere
    return (everywhere & result.coords["agrees"]).transpose(*result.dims)


def over_prompts(result: xr.DataArray) -> xr.DataArray:
    """The mean over prompts, if there are any; what one of them does not have, it has not."""
    if "prompt" not in result.dims:
        return result
    return result.astype(float).mean("prompt", skipna=False, keep_attrs=True)


def single(values: xr.DataArray) -> xr.DataArray:
    """The same in single precision; what is too large for it becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def baselines_are_equal(result: xr.DataArray) -> bool:
    """Whether the baselines of a result differ by rounding at most, so that there are no shares."""
    return as_good_as_equal(*baselines(result), str(result.attrs.get("units", "")))


def _file(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a path, got {type(path).__name__}")
    if "\0" in os.fspath(path):
        raise ValueError(f"path must be a path, got {path!r}")
    return Path(path)


def _common_name(names: list[str]) -> str:
    """What several names share, then what tells them apart."""
    start = os.path.commonprefix(names)
    start = start[: start.rfind(" ") + 1]
    return start + ", ".join(name[len(start) :] for name in names)


def _is_plain(value: Any) -> bool:
    """Whether netCDF has a type for it: no text with a NUL or half of a surrogate pair, say."""
    if isinstance(value, str):
        return "\0" not in value and value == value.encode("utf-8", "replace").decode()
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _as_json(attrs: Mapping[str, Any]) -> str:
    """Attributes that netCDF has no type for: truth values, None, lists, mappings."""
    for name, value in attrs.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"the attribute {name!r} cannot be kept in a file ({error}): drop it, or make it "
                "a number, a string or a list"
            ) from None
    return json.dumps(attrs)
