"""What figures say of a result: its title, its baselines, its entries. Made from facts alone."""

from __future__ import annotations

from typing import Any

import xarray as xr

from patching_demo.engine.kinds import KINDS, kind_label
from patching_demo.plots.theme import number
from patching_demo.results import baselines, largest_cells

CELL_DIMS = ("layer", "head", "position")

#: The runs that activations come from and go to.
RUNS = {"denoising": ("clean", "corrupted"), "noising": ("corrupted", "clean")}


def baselines_of(result: xr.DataArray) -> tuple[float, float]:
    """(clean, corrupted) of a result.

    Raises:
        TypeError: if it has no labels.
        ValueError: if it lacks a baseline.
    """
    if not isinstance(result, xr.DataArray):
        raise TypeError(f"a figure needs a labelled result (xarray), got {type(result).__name__}")
    return baselines(result)


def baseline_names(result: xr.DataArray) -> tuple[str, str]:
    """What the runs are called that activations come from and go to.

    That is clean and corrupted, the other way round for noising, unless the result says otherwise.
    """
    # A result of both directions has neither.
    source, target = RUNS.get(str(result.attrs.get("direction", "denoising")), ("source", "target"))
    if "direction" in result.coords and result.coords["direction"].ndim == 0:
        source, target = RUNS.get(result.coords["direction"].item(), (source, target))
    return (
        str(result.attrs.get("clean_name", source)),
        str(result.attrs.get("corrupted_name", target)),
    )


def entry_name(dim: str, value: Any) -> str:
    """What an entry of a further dimension is called in a figure."""
    return kind_label(value) if dim == "kind" else str(value)


def entries_of(result: xr.DataArray, dim: str) -> list[Any]:
    """The labels along a dimension, or their numbers where it has none."""
    return result[dim].values.tolist() if dim in result.coords else list(range(result.sizes[dim]))


def kinds_of(result: xr.DataArray) -> list[str]:
    """The kinds of activation that were patched, empty if the result does not say."""
    if "kind" in result.coords:
        return [str(kind) for kind in result["kind"].values.reshape(-1)]
    return [str(result.attrs["kind"])] if result.attrs.get("kind") else []


def what_was_patched(result: xr.DataArray) -> str:
    """What was patched into what, in a few words.

    >>> what_was_patched(xr.DataArray(0.0, attrs={"kind": "q", "direction": "noising"}))
    'corrupted queries patched into the clean run'
    """
    kinds, (source, target) = kinds_of(result), baseline_names(result)
    known = len(kinds) == 1 and kinds[0] in KINDS
    return (
        f"{source} {KINDS[kinds[0]].plural if known else 'activations'} "
        f"patched into the {target} run"
    )


def what_is_one_patch(result: xr.DataArray) -> str:
    """How much each patch replaces, empty if the result does not say.

    >>> what_is_one_patch(xr.DataArray(0.0, attrs={"kind": "q", "by": "all_pos"}))
    'one head at a time, over all positions'
    """
    kinds = [KINDS[kind] for kind in kinds_of(result) if kind in KINDS]
    if result.attrs.get("by") == "all_pos":
        return "one head at a time, over all positions"
    if not kinds or result.attrs.get("by") != "pos":
        return ""
    return f"one {'head' if kinds[0].of_heads else 'layer'} and position at a time"


def title_of(result: xr.DataArray, given: str | None) -> tuple[str, str]:
    """What was patched into what, and below it the model, the task and the metric.

    What is no sweep, such as a reading of attention, is called by its metric.
    """
    attrs = result.attrs
    metric, units = str(attrs.get("metric", "")), str(attrs.get("units", ""))
    main = given
    if main is None:
        swept = "by" in attrs or kinds_of(result)
        what = what_was_patched(result) if swept else metric
        main = what[:1].upper() + what[1:]
    if units and units not in ("share of clean - corrupted", metric):
        metric += f" in {units}"
    facts = (what_is_one_patch(result), attrs.get("model"), attrs.get("task"), metric)
    return main, " · ".join(str(fact) for fact in facts if fact)


def largest_effects(result: xr.DataArray, n: int = 3) -> str:
    """The cells with the largest effects, in words for a screen reader."""
    lead = [str(d) for d in result.dims if d not in CELL_DIMS]
    said = []
    for _, cell in largest_cells(result, n).iterrows():
        place = [entry_name(d, cell[d]) for d in lead] + [str(cell["label"])]
        if "position" in cell:
            place.append(f"position '{cell['position']}'")
        said.append(f"{' '.join(place)}: {number(cell['value'])}")
    return f" Largest effects: {'; '.join(said)}." if said else ""


def baselines_in_words(result: xr.DataArray) -> str:
    """Both baselines for a screen reader."""
    pairs = zip(baseline_names(result), baselines_of(result), strict=True)
    return "Baselines: " + ", ".join(f"{name} {number(value)}" for name, value in [*pairs][::-1])
