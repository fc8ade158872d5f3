"""Labelled results: run a sweep and keep what its numbers mean beside them.

A result is an ``xarray.DataArray`` of metric values. Its dimensions are ``layer`` and
``position`` or ``head``, after an optional ``kind``; its attributes say what was patched into
what, the metric and both baselines. :mod:`patching_demo.plots` draws it as it is, and
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

from patching_demo.tasks import Task

__all__ = [
    "BLOCK_KINDS",
    "HEAD_KINDS",
    "combine",
    "largest_cells",
    "load",
    "save",
    "share",
    "sweep",
    "sweep_metrics",
]

#: Activations with one value per layer and position, and the hook that each is read from.
BLOCK_KINDS = {
    "resid_pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}

#: Activations with one value per head.
HEAD_KINDS = {
    "out": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
}

_FORMAT = "patching_demo result"
_VERSION = 1
_WORDS = {"out": "head outputs", "q": "queries", "k": "keys", "v": "values", "pattern": "patterns"}


def sweep(
    model: Any,
    task: Task,
    kinds: str | Sequence[str],
    *,
    by: str = "pos",
    **engine_options: Any,
) -> xr.DataArray:
    """Patch clean activations into the corrupted run, one place at a time, and label the result.

    Each value is the task's metric, in its units, of a corrupted run in which a single
    activation was replaced by the one from the clean run (denoising; Meng et al., 2022).

    Args:
        model: a TransformerBridge.
        task: inputs, metric and baselines.
        kinds: one of :data:`BLOCK_KINDS` (by layer and position) or of :data:`HEAD_KINDS`, or
            several of the same group, which adds a leading ``kind`` dimension. "pattern" by
            position replaces one destination row of the pattern.
        by: "pos" patches one position at a time, "all_pos" a whole head at once (heads only).
        engine_options: of :mod:`patching_demo.patching`, such as ``progress`` or ``store``.

    Returns:
        float32 with dimensions ``([kind,] layer, position)`` for block kinds,
        ``([kind,] layer, position, head)`` for head kinds by position and
        ``([kind,] layer, head)`` over all positions. Where keys and values have fewer heads
        than queries, cells of heads that do not exist are NaN. The coordinate ``agrees`` is True
        at positions up to which clean and corrupted tokens are the same: a patch there replaces
        an activation by itself.

    Raises:
        ValueError: if a kind or ``by`` is unknown or does not fit the others.
        TypeError: if engine options ask for anything but one number per cell.
    """
    return sweep_metrics(model, {task.metric.name: task}, kinds, by=by, **engine_options)[
        task.metric.name
    ]


def sweep_metrics(
    model: Any,
    tasks: Mapping[str, Task],
    kinds: str | Sequence[str],
    *,
    by: str = "pos",
    **engine_options: Any,
) -> dict[str, xr.DataArray]:
    """One sweep scored by several metrics at once, at the price of one.

    Args:
        model: a TransformerBridge.
        tasks: the same prompts with different metrics, by name; see
            :meth:`patching_demo.tasks.Task.with_metric`.
        kinds: as for :func:`sweep`, like the other arguments.

    Returns:
        For each name what :func:`sweep` gives for that task.

    Raises:
        ValueError: as :func:`sweep`, and if the tasks have different prompts.
        TypeError: as :func:`sweep`.
    """
    several = not isinstance(kinds, str)
    names = list(kinds) if several else [kinds]
    _check_kinds(names, by)
    if not tasks:
        raise ValueError("there is no task to score the sweep by")
    first = next(iter(tasks.values()))
    for name, task in tasks.items():
        same = torch.equal(task.clean_tokens, first.clean_tokens)
        if not same or not torch.equal(task.corrupted_tokens, first.corrupted_tokens):
            raise ValueError(f"{name!r} has other prompts than the first task: sweep it by itself")
    for option in ("reduce", "baseline", "return_index_df"):
        if option in engine_options:
            raise TypeError(
                f"a labelled result has one number per cell, which {option!r} changes: call the "
                "functions of patching_demo.patching for that"
            )
    values = _values(model, first, tasks, names, by, engine_options)
    return {
        name: _labelled(model, task, values[i] if several else values[i, 0], names, by, several)
        for i, (name, task) in enumerate(tasks.items())
    }


def share(result: xr.DataArray) -> xr.DataArray:
    """Values as a share of clean minus corrupted: 0 at the corrupted, 1 at the clean baseline.

    Raises:
        ValueError: if the baselines are equal or missing.
    """
    clean, corrupted = baselines(result)
    if clean == corrupted:
        raise ValueError(
            f"clean and corrupted baseline are both {clean}: a share of their difference does "
            "not exist"
        )
    out = ((result - corrupted) / (clean - corrupted)).astype(np.float32)
    out.attrs = dict(result.attrs)
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
        k: v for k, v in arrays[0].attrs.items() if all(a.attrs.get(k) == v for a in arrays)
    }
    if "task" not in out.attrs:
        out.attrs["task"] = _common_name([str(a.attrs.get("task", "")) for a in arrays])
    return out


def largest_cells(result: xr.DataArray, n: int = 5) -> pd.DataFrame:
    """The n cells whose patch moves the metric furthest from the corrupted baseline.

    Cells that do not exist, and positions at which there is nothing to patch, are left out.

    Returns:
        One row per cell, largest effect first: a column for each further dimension (such as
        ``kind``), then ``label`` (L9H6 or L9), ``position`` and ``token`` where there are
        positions, ``value`` in the metric's units and ``share`` of clean minus corrupted (NaN
        where the baselines are equal).

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
    clean, corrupted = baselines(result)
    values = result.values.astype(float)
    if "agrees" in result.coords:
        values = result.where(~result["agrees"]).transpose(*result.dims).values.astype(float)
    effect = np.nan_to_num(np.abs(values - corrupted), nan=-1.0)
    order = np.argsort(-effect, axis=None, kind="stable")[:n]
    rows = []
    for flat in order:
        index = np.unravel_index(flat, values.shape)
        if effect[index] < 0:
            continue
        at = dict(zip(result.dims, index, strict=True))
        cell = result.isel(at)
        # As xarray has it: a dimension without labels is numbered.
        labels = {**at, **{name: coord.item() for name, coord in cell.coords.items()}}
        row = {str(d): str(labels[d]) for d in result.dims if d not in _CELL_DIMS}
        row["label"] = str(labels.get("head_label", f"L{labels['layer']}"))
        if "position" in at:
            row["position"] = str(labels["position"])
            if "token" in labels:
                row["token"] = str(labels["token"])
        row["value"] = float(values[index])
        spread = clean - corrupted
        row["share"] = (row["value"] - corrupted) / spread if spread else math.nan
        rows.append(row)
    return pd.DataFrame(rows)


def save(result: xr.DataArray, path: str | os.PathLike[str]) -> Path:
    """Write a result with its labels and attributes to a JSON file, whole or not at all.

    Returns:
        The path written.

    Raises:
        OSError: if the file cannot be written; an earlier file of that name is then kept.
        TypeError: if an attribute is not a number, a string, a list or a mapping of such, or
            ``path`` is no path.
        ValueError: if a number is infinite, or an attribute is NaN.
    """
    path = _file(path)
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "name": result.name,
        "attrs": {str(k): _plain(k, v) for k, v in result.attrs.items()},
        "values": _encode(result.variable),
        "coords": {str(k): _encode(v.variable) for k, v in result.coords.items()},
    }
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    # In the same folder, so that the final rename cannot be a half-done copy.
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a saved result, or is cut short: {error}") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a saved result (no format '{_FORMAT}')")
    if content.get("version") != _VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')!r}, this package reads {_VERSION}: run "
            "the sweep again"
        )
    try:
        values = _decode(content["values"])
        coords = {name: _decode(entry) for name, entry in content["coords"].items()}
        return xr.DataArray(
            values[1], dims=values[0], coords=coords, attrs=content["attrs"], name=content["name"]
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is a damaged result: {error!r}") from None


_CELL_DIMS = ("layer", "position", "head")


def _check_kinds(names: list[str], by: str) -> None:
    known = [*BLOCK_KINDS, *HEAD_KINDS]
    if not names:
        raise ValueError(f"kinds is empty: choose among {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"kind must be among {', '.join(known)}, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"a kind is named twice: {names}")
    if len({name in HEAD_KINDS for name in names}) > 1:
        raise ValueError(
            f"{names} mixes kinds with and without heads, which have different dimensions: run "
            "two sweeps"
        )
    if by not in ("pos", "all_pos"):
        raise ValueError(f"by must be 'pos' or 'all_pos', got {by!r}")
    if by == "all_pos" and names[0] in BLOCK_KINDS:
        raise ValueError(f"{names[0]!r} can only be swept by='pos'; all_pos is for head kinds")


def _hook_names(model: Any, names: Sequence[str]) -> list[str]:
    hooks = {**BLOCK_KINDS, **HEAD_KINDS}
    return [f"blocks.{i}.{hooks[name]}" for i in range(model.cfg.n_layers) for name in names]


def _values(
    model: Any,
    first: Task,
    tasks: Mapping[str, Task],
    names: list[str],
    by: str,
    options: dict[str, Any],
) -> np.ndarray:
    """Metric values, float32 ``[metric, kind, layer, pos and/or head]``."""
    from patching_demo import patching

    heads = names[0] in HEAD_KINDS
    suffix = "by_pos" if by == "pos" else "all_pos"
    out = patching.combined_activation_patch(
        model,
        first.corrupted_tokens,
        first.clean_cache(model, _hook_names(model, names)),
        {name: task.metric for name, task in tasks.items()},
        sweeps=[f"attn_head_{name}_{suffix}" if heads else name for name in names],
        names=names,
        axes=_axes(names, by, position="pos"),
        **options,
    )
    return out.values.detach().float().cpu().numpy()


def _axes(names: list[str], by: str, position: str) -> tuple[str, ...]:
    if names[0] in BLOCK_KINDS:
        return ("layer", position)
    return ("layer", position, "head") if by == "pos" else ("layer", "head")


def _labelled(
    model: Any, task: Task, values: np.ndarray, names: list[str], by: str, several: bool
) -> xr.DataArray:
    dims = _axes(names, by, position="position")
    dims = ("kind", *dims) if several else dims
    sizes = dict(zip(dims, values.shape, strict=True))
    coords: dict[str, Any] = {"layer": np.arange(sizes["layer"])}
    if several:
        coords["kind"] = names
    if "position" in dims:
        agrees = np.arange(sizes["position"]) < task.agree_until
        coords["position"] = list(task.position_labels)
        coords["token"] = ("position", list(task.position_tokens))
        coords["agrees"] = ("position", agrees)
    if "head" in dims:
        labels = [[f"L{i}H{j}" for j in range(sizes["head"])] for i in range(sizes["layer"])]
        coords["head"] = np.arange(sizes["head"])
        coords["head_label"] = (("layer", "head"), labels)
    attrs = {
        "metric": task.metric.name,
        "units": task.metric.units,
        "clean_baseline": float(task.clean_baseline),
        "corrupted_baseline": float(task.corrupted_baseline),
        "task": task.name,
        "model": task.model_name,
        "by": by,
        "kind": "" if several else names[0],
        "n_key_value_heads": _key_value_heads(model) if names[0] in HEAD_KINDS else 0,
        "what": _what(names),
        "each": _each(names, by),
    }
    return xr.DataArray(values, dims=dims, coords=coords, attrs=attrs, name="value")


def _key_value_heads(model: Any) -> int:
    return int(getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads)


def _what(names: Sequence[str]) -> str:
    what = _WORDS.get(names[0], names[0]) if len(names) == 1 else "activations"
    return f"clean {what} patched into the corrupted run"


def _each(names: Sequence[str], by: str) -> str:
    if by == "all_pos":
        return "one head at a time, over all positions"
    if names[0] in HEAD_KINDS:
        return "one head and position at a time"
    return "one layer and position at a time"


def baselines(result: xr.DataArray) -> tuple[float, float]:
    """(clean, corrupted) of a result; ValueError if it lacks one."""
    try:
        return float(result.attrs["clean_baseline"]), float(result.attrs["corrupted_baseline"])
    except KeyError as error:
        raise ValueError(
            f"the result has no attribute {error}: arithmetic on it may have dropped the "
            "attributes (xarray.set_options(keep_attrs=True) keeps them)"
        ) from None


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


def _plain(name: Any, value: Any) -> Any:
    """An attribute as JSON can hold it."""
    value = value.item() if isinstance(value, np.generic) else value
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"the attribute {name!r} cannot be kept in a file ({error}): drop it, or make it a "
            "number, a string or a list"
        ) from None
    return value


def _encode(variable: xr.Variable) -> dict[str, Any]:
    values = np.asarray(variable.values)
    kind = values.dtype.kind
    if kind == "f":
        if np.isinf(values).any():
            raise ValueError(
                "a result with an infinite value cannot be saved: look for an overflow"
            )
        # Nine significant digits bring every float32 back exactly; 17 every float64.
        digits = 9 if values.dtype.itemsize <= 4 else 17
        flat = [
            None if math.isnan(x) else float(f"{x:.{digits}g}") for x in values.ravel().tolist()
        ]
    else:
        flat = values.ravel().tolist()
    dtype = values.dtype.str if kind in "fiub" else "str"
    return {"dims": list(variable.dims), "shape": list(values.shape), "dtype": dtype, "data": flat}


def _decode(entry: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    data = entry["data"]
    if entry["dtype"] == "str":
        values = np.array([str(x) for x in data])
    else:
        dtype = np.dtype(entry["dtype"])
        values = np.array([np.nan if x is None else x for x in data], dtype=dtype)
    return entry["dims"], values.reshape(entry["shape"])
