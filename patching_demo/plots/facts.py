"""What figures say of a result: its title, its baselines, its entries. Made from facts alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from patching_demo.engine.kinds import KINDS, kind_label
from patching_demo.plots.theme import number
from patching_demo.results import CELL_DIMS, baselines, largest_cells, over_prompts, single

#: Dimensions whose entries are numbers.
NUMBERED = CELL_DIMS[:3]

#: The units of :func:`patching_demo.share`.
SHARE = "share of clean - corrupted"

#: The largest number of single precision.
LARGEST = float(np.finfo(np.float32).max)

#: Of values that no scale reaches.
INFINITE = "infinite values stand at the ends of the scale"

#: What stands in place of a fact in which combined results differ.
SEVERAL = "several"

#: The runs that activations come from and go to.
RUNS = {"denoising": ("clean", "corrupted"), "noising": ("corrupted", "clean")}


def drawn(result: xr.DataArray) -> xr.DataArray:
    """What a figure of a result shows: the mean over its prompts, with the baselines of these.

    Figures have single precision: what is larger than that is infinite to them.

    Raises:
        TypeError: if it has no labels.
        ValueError: if a baseline is missing or not finite, or the result has no numbers.
    """
    if not isinstance(result, xr.DataArray):
        raise TypeError(f"a figure needs a labelled result (xarray), got {type(result).__name__}")
    for name, value in zip(("clean", "corrupted"), baselines(result), strict=True):
        if not abs(value) <= LARGEST:
            raise ValueError(
                f"the {name} baseline is {value}: a figure needs finite ones, up to {LARGEST:.3g}"
            )
    if result.size == 0:
        raise ValueError(f"the result is empty: {dict(result.sizes)}")
    if not bool(result.notnull().any()):
        raise ValueError("the result has no cell with a number in it: there is nothing to draw")
    if "prompt" not in result.dims and "prompt" not in result.coords:
        return single(result)
    own: dict[str, Any] = {}
    for name in ("clean_baseline", "corrupted_baseline"):
        # What was turned into shares keeps the baselines that were measured beside it.
        measured = name in result.coords and result.attrs.get("units") != SHARE
        if measured and set(result[name].dims) <= {"prompt"}:
            own[name] = float(result[name].mean())
    if "prompt" in result.dims:
        count = result.sizes["prompt"]
        own["prompts"] = f"mean over {count} prompt{'s' * (count > 1)}"
        result = over_prompts(result)
    else:
        own["prompts"] = f"prompt {result['prompt'].item()}"
    return single(result).assign_attrs(own)


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


def names_at(result: xr.DataArray, dims: Sequence[str], at: Sequence[int]) -> tuple[str, ...]:
    """What the entries at these places along further dimensions are called in a figure."""
    return tuple(entry_name(d, entries_of(result, d)[i]) for d, i in zip(dims, at, strict=True))


def kinds_of(result: xr.DataArray) -> list[str]:
    """The kinds of activation that were patched, empty if the result does not say."""
    if "kind" in result.coords:
        return [str(kind) for kind in result["kind"].values.reshape(-1)]
    return [str(result.attrs["kind"])] if result.attrs.get("kind") else []


def what_was_patched(result: xr.DataArray) -> str:
    """What was patched into what, in a few words.

    >>> what_was_patched(xr.DataArray(0.0, attrs={"kind": "q", "direction": "noising"}))
    'corrupted queries patched into the clean run'
    >>> what_was_patched(xr.DataArray(0.0, attrs={"kind": "v", "source": "zero"}))
    'zero ablation of values in the corrupted run'
    """
    attrs, kinds, (source, target) = result.attrs, kinds_of(result), baseline_names(result)
    known = len(kinds) == 1 and kinds[0] in KINDS
    what = KINDS[kinds[0]].plural if known else "activations"
    values = attrs.get("source", "clean")
    if attrs.get("by") == "path":
        receivers = str(attrs.get("receivers", "the receivers"))
        receivers = {"logits": "the logits", SEVERAL: "several receivers"}.get(receivers, receivers)
        text = f"{source} {what} sent to {receivers} in the {target} run"
    elif values in ("zero", "mean"):
        text = f"{values} ablation of {what} in the {target} run"
    elif values == "clean":
        text = f"{source} {what} patched into the {target} run"
    else:
        text = f"{'given ' * (values == 'given')}{what} patched into the {target} run"
    return text + estimated(result)


def estimated(result: xr.DataArray) -> str:
    """That values are estimates and were not measured, empty if they were."""
    method = result.attrs.get("method")
    return "" if method is None else ", partly estimated" if method == SEVERAL else ", estimated"


def metric_of(result: xr.DataArray) -> str:
    """The metric, and that its values are estimates if they are.

    >>> metric_of(xr.DataArray(0.0, attrs={"metric": "logit difference", "method": "gradient"}))
    'logit difference, estimated'
    """
    return str(result.attrs.get("metric", "metric")) + estimated(result)


def what_is_one_patch(result: xr.DataArray) -> str:
    """How much each patch replaces, empty if the result does not say.

    >>> what_is_one_patch(xr.DataArray(0.0, attrs={"kind": "q", "by": "all_pos"}))
    'one head at a time, over all positions'
    >>> what_is_one_patch(xr.DataArray(0.0, attrs={"kind": "mlp_out", "by": "pos", "window": 5}))
    'one position at a time, in 5 layers at once'
    >>> what_is_one_patch(xr.DataArray(0.0, attrs={"kind": "q", "by": "role"}))
    'one head and named position at a time'
    """
    attrs, kinds = result.attrs, [KINDS[kind] for kind in kinds_of(result) if kind in KINDS]
    by, window = attrs.get("by"), attrs.get("window", 1)
    if by == "set":
        return "one set of activations at a time"
    if by == "path":
        how = {"direct": ", by direct paths", "mlps": ", by paths through MLPs"}
        return "one sender at a time" + how.get(attrs.get("through"), "")
    if by not in ("pos", "role", "all_pos") or (by != "all_pos" and not kinds):
        return ""
    layers = f", in {window if window != SEVERAL else 'several'} layers at once"
    if by == "all_pos":
        text = "one head at a time, over all positions"
    else:
        what = "head and " if kinds[0].of_heads else "layer and " if window == 1 else ""
        text = f"one {what}{'named ' * (by == 'role')}position at a time"
    return text + layers * (window != 1)


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
    if units and units not in (SHARE, metric):
        metric += f" in {units}"
    return main, " · ".join(filter(None, [what_is_one_patch(result), *origin(result), metric]))


def origin(result: xr.DataArray) -> list[str]:
    """Where the numbers of a result come from: model, task, prompts, and a method of estimating."""
    attrs = result.attrs
    facts = [attrs.get(name) for name in ("model", "task", "prompts")]
    method = attrs.get("method", SEVERAL)
    facts += [f"estimated by {method!r}"] if method != SEVERAL else []
    return [str(fact) for fact in facts if fact]


def bounds_of(result: xr.DataArray) -> xr.DataArray | None:
    """``[bound, ...]`` of a result of :func:`patching_demo.interval`, None of any other."""
    if "low" not in result.coords or "high" not in result.coords:
        return None
    low, high = (result[name].broadcast_like(result) for name in ("low", "high"))
    return xr.concat([part.drop_vars(["low", "high"]) for part in (low, high)], "bound")


def intervals(bounds: np.ndarray, write: Callable[[float], str] = number) -> np.ndarray:
    """Bounds ``[2, ...]`` in words."""
    words = [
        "no interval" if np.isnan([low, high]).any() else f"{write(low)} to {write(high)}"
        for low, high in bounds.reshape(2, -1).T
    ]
    return np.array(words, dtype=object).reshape(bounds.shape[1:])


def interval_name(result: xr.DataArray) -> str:
    """What the intervals of a result are called, by their level where they have one."""
    level = result.attrs.get("level")  # Combined results may have several.
    return f"{number(100 * level)} % interval" if level else "interval"


def where_intervals_are(result: xr.DataArray, shown_by: str) -> str:
    """What shows the intervals of a result, empty if it has none."""
    if bounds_of(result) is None:
        return ""
    return f"{shown_by} {interval_name(result)}s by bootstrap over prompts"


def what_is_odd(result: xr.DataArray, values: np.ndarray, agrees: np.ndarray) -> list[str]:
    """Why cells of a figure are grey, and where infinite ones stand, as far as there are any."""
    missing = "grey cells do not exist in this model or were not measured"
    if result.attrs.get("by") == "path":
        missing = "from grey cells no path leads to the receivers"
    found = [missing] if (np.isnan(values) & ~agrees).any() else []
    return found + [INFINITE] * bool(np.isinf(values).any())


def largest_effects(result: xr.DataArray) -> str:
    """The three cells with the largest effects, in words for a screen reader."""
    if "layer" not in result.dims and "layer" not in result.coords:
        return ""  # Such as the largest over all layers.
    lead = [str(d) for d in result.dims if d not in CELL_DIMS]
    said = []
    for _, cell in largest_cells(result, 3).iterrows():
        place = [entry_name(d, cell[d]) for d in lead] + [str(cell["label"])]
        place += [f"{d} '{cell[d]}'" for d in ("position", "role") if d in cell]
        said.append(f"{' '.join(place)}: {number(cell['value'])}")
    return f" Largest effects: {'; '.join(said)}." if said else ""


def baselines_in_words(result: xr.DataArray) -> str:
    """Both baselines for a screen reader."""
    pairs = zip(baseline_names(result), baselines(result), strict=True)
    return "Baselines: " + ", ".join(f"{name} {number(value)}" for name, value in [*pairs][::-1])
