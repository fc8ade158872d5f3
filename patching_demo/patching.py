"""The sweeps of ``transformer_lens.patching``: same names, same arguments, same numbers, sooner.

Activation patching (Meng et al., 2022; Wang et al., 2022) copies one activation of a clean run
into a corrupted run and measures how much of the right answer comes back. A sweep does so for
every layer, position and head in turn. This module stands in for ``transformer_lens.patching``::

    import patching_demo.patching as patching

    patching.get_act_patch_resid_pre(model, corrupted_tokens, clean_cache, metric)

Each sweep is a row of :data:`SWEEPS`, each combination of sweeps a row of :data:`COMBINED`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.patching import (
    PatchingResult,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
    make_df_from_ranges,
)
from transformer_lens.patching import (
    get_act_patch_direct_path as _direct_path,
)
from transformer_lens.utilities import get_act_name

from patching_demo.engine import checks, runner
from patching_demo.engine.bridge import embedding
from patching_demo.engine.cells import Cell, differing_positions
from patching_demo.engine.isolation import isolated
from patching_demo.engine.kinds import HEAD_KINDS, kind_of_activation
from patching_demo.engine.scoring import measured

SETTERS = {
    layer_pos_patch_setter: ("layer", "pos"),
    layer_pos_head_vector_patch_setter: ("layer", "pos", "head"),
    layer_head_vector_patch_setter: ("layer", "head"),
    layer_head_pattern_patch_setter: ("layer", "head"),
    layer_head_pos_pattern_patch_setter: ("layer", "head", "pos"),
    layer_head_dest_src_pos_pattern_patch_setter: ("layer", "head", "pos", "source"),
}
"""What the indices given to each patch setter mean, in order."""

PATTERN_SETTERS = tuple(setter for setter in SETTERS if "_pattern_" in setter.__name__)

SWEEPS: dict[str, tuple[str, Callable[..., Tensor], tuple[str, ...]]] = {
    **{
        kind: (kind, layer_pos_patch_setter, ("layer", "pos"))
        for kind in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    },
    **{
        f"attn_head_{kind}_by_pos": (
            site,
            layer_pos_head_vector_patch_setter,
            ("layer", "pos", "head"),
        )
        for kind, site in (("out", "z"), ("q", "q"), ("k", "k"), ("v", "v"))
    },
    "attn_head_pattern_by_pos": (
        "pattern",
        layer_head_pos_pattern_patch_setter,
        ("layer", "head_index", "dest_pos"),
    ),
    "attn_head_pattern_dest_src_pos": (
        "pattern",
        layer_head_dest_src_pos_pattern_patch_setter,
        ("layer", "head_index", "dest_pos", "src_pos"),
    ),
    **{
        f"attn_head_{kind}_all_pos": (site, layer_head_vector_patch_setter, ("layer", "head"))
        for kind, site in (("out", "z"), ("q", "q"), ("k", "k"), ("v", "v"))
    },
    "attn_head_pattern_all_pos": (
        "pattern",
        layer_head_pattern_patch_setter,
        ("layer", "head_index"),
    ),
}
"""Name of a sweep: the activation it patches, how, and the axes of its result."""

COMBINED: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "block_every": (
        ("resid_pre", "attn_out", "mlp_out"),
        ("resid_pre", "attn_out", "mlp_out"),
        ("layer", "pos"),
    ),
    "attn_head_all_pos_every": (
        tuple(f"attn_head_{kind}_all_pos" for kind in HEAD_KINDS),
        HEAD_KINDS,
        ("layer", "head"),
    ),
    "attn_head_by_pos_every": (
        tuple(f"attn_head_{kind}_by_pos" for kind in HEAD_KINDS),
        HEAD_KINDS,
        ("layer", "pos", "head"),
    ),
}
"""Name of a combination: its sweeps, what each is called in the result, and the result's axes."""

_SAME_AXIS = {"head_index": "head", "dest_pos": "pos"}
_OPTIONS = tuple(runner.Options.__dataclass_fields__)


def generic_activation_patch(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Mapping[str, Tensor],
    patching_metric: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    patch_setter: Callable[..., Tensor],
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: bool = False,
    *,
    reduce: str = "scalar",
    baseline: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, pd.DataFrame] | PatchingResult:
    """Patch one kind of activation at every index of some axes, and measure each time.

    Args:
        model: a decoder-only ``TransformerBridge`` in eval mode.
        corrupted_tokens: int ``[batch, pos]``.
        clean_cache: activations of the clean run, from ``model.run_with_cache``.
        patching_metric: from logits ``[batch, pos, d_vocab]`` to a number, or several by name. A
            metric that declares the positions it reads (``patching_demo.metrics``) is faster.
        patch_setter: writes a clean activation into a corrupted one. Those of
            ``transformer_lens.patching`` run fast; any other is called in the plain loop.
        activation_name: as for ``transformer_lens.utilities.get_act_name``, for instance "z".
        index_axis_names: axes to sweep in full: "layer", "pos", "head" ("head_index"),
            "dest_pos", "src_pos".
        index_df: instead, one row of indices per cell; the result is then flat.
        return_index_df: also return the indices.
        reduce: "scalar" (the metric returns a number), "mean" (it returns ``[batch]``, averaged)
            or "none" (``[batch]`` is kept, in a ``PatchingResult``).
        baseline: measure the unpatched corrupted run too, and return a ``PatchingResult``.
        **options: ``memory``, ``check``, ``seed``, ``progress``, ``store``, see
            :class:`patching_demo.engine.runner.Options`.

    Returns:
        A tensor with one dimension per axis in the metric's units (see ``patching_metric``), the
        indices too if asked for, or a ``PatchingResult``.

    Raises:
        TypeError: for inputs of the wrong type, as in ``checks``.
        ValueError: for inputs that do not fit each other or the model, and for a metric that
            gives NaN or infinity, naming the cell.

    Source: ``transformer_lens.patching.generic_activation_patch``.
    """
    metrics, has_metric_axis = _metrics(patching_metric)
    _check_choices(reduce, return_index_df, has_metric_axis or baseline)
    tokens, options_ = _prepare(model, corrupted_tokens, options)
    names, index = _indices(
        model, tokens, patch_setter, activation_name, index_axis_names, index_df
    )
    plan = _Plan(model, tokens, clean_cache)
    plan.add(patch_setter, activation_name, index)
    values, base = plan.run(metrics, reduce, options_)
    shape = tuple(index.max() + 1) if index_df is None else (len(index),)
    values = _shaped(values, shape, reduce)
    if not (has_metric_axis or baseline or reduce == "none"):
        return (values[0], index) if return_index_df else values[0]
    return PatchingResult(
        values=values if has_metric_axis else values[0],
        axis_names=names,
        index_df=index,
        metric_names=list(metrics),
        reduced=reduce != "none",
        baseline=_baseline(base, reduce, has_metric_axis) if baseline else None,
        has_metric_axis=has_metric_axis,
    )


def combined_activation_patch(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Mapping[str, Tensor],
    metric: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    *,
    sweeps: Sequence[str],
    names: Sequence[str],
    axes: Sequence[str],
    reduce: str = "scalar",
    baseline: bool = False,
    **options: Any,
) -> Tensor | PatchingResult:
    """Several sweeps over the same axes in one pass, stacked on a leading axis.

    The result is ``[patch_type, *axes]``. Where a kind has fewer heads than the model (keys and
    values under grouped-query attention), the heads that do not exist are NaN.

    Args, Raises: as for :func:`generic_activation_patch`; ``sweeps`` are keys of :data:`SWEEPS`,
        ``names`` what to call them, ``axes`` the order of the result's axes.
    """
    metrics, has_metric_axis = _metrics(metric)
    _check_choices(reduce, False, has_metric_axis or baseline)
    tokens, options_ = _prepare(model, corrupted_tokens, options)
    plan = _Plan(model, tokens, clean_cache)
    parts = []
    for sweep in sweeps:
        activation, setter, axis_names = SWEEPS[sweep]
        own, index = _indices(model, tokens, setter, activation, axis_names, None)
        first = len(plan.cells)
        plan.add(setter, activation, index)
        parts.append((slice(first, len(plan.cells)), own, tuple(index.max() + 1)))
    values, base = plan.run(metrics, reduce, options_)
    sizes = [
        max(shape[[_SAME_AXIS.get(a, a) for a in own].index(axis)] for _, own, shape in parts)
        for axis in axes
    ]
    stacked = []
    for rows, own, shape in parts:
        part = _shaped(values[:, rows], shape, reduce)
        order = [1 + [_SAME_AXIS.get(a, a) for a in own].index(axis) for axis in axes]
        part = part.permute(0, *order, *range(1 + len(shape), part.ndim))
        whole = part.new_full((len(part), *sizes, *part.shape[1 + len(axes) :]), float("nan"))
        whole[(slice(None), *(slice(n) for n in part.shape[1 : 1 + len(axes)]))] = part
        stacked.append(whole)
    result = torch.stack(stacked, dim=1)
    if not (has_metric_axis or baseline or reduce == "none"):
        return result[0]
    return PatchingResult(
        values=result if has_metric_axis else result[0],
        axis_names=["patch_type", *axes],
        index_df=make_df_from_ranges([len(sweeps), *sizes], ["patch_type", *axes]),
        metric_names=list(metrics),
        reduced=reduce != "none",
        baseline=_baseline(base, reduce, has_metric_axis) if baseline else None,
        has_metric_axis=has_metric_axis,
        patch_type_names=list(names),
    )


def get_act_patch_direct_path(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Mapping[str, Tensor],
    corrupted_cache: Mapping[str, Tensor],
    patching_metric: Callable[[Tensor], Any],
    src_layer: int,
    src_head: int,
    component: str = "q",
    verbose: bool = True,
) -> Tensor:
    """Patch the path from one head into each later head alone (Wang et al., 2022).

    The difference that the source head writes, clean minus corrupted, is added to what one later
    head reads. This is the plain loop of ``transformer_lens.patching``, one forward per head.

    Args:
        model, corrupted_tokens, clean_cache: as for :func:`generic_activation_patch`.
        corrupted_cache: activations of the corrupted run.
        patching_metric: from logits ``[batch, pos, d_vocab]`` to a number.
        src_layer, src_head: the source head.
        component: what of the later head is patched: its "q", "k" or "v" input.
        verbose: whether to show a progress bar.

    Returns:
        ``[layer, head]`` in the metric's units. At or before the source layer there is no path,
        and the value is NaN. Where the two caches agree there is nothing to patch, which is said
        once, in a warning.

    Raises:
        TypeError, ValueError: for inputs as in :func:`generic_activation_patch`, a source head or
            component that does not exist, a model on which such paths are not defined (grouped
            query heads with "k" or "v"), or a metric that gives NaN or infinity.
        NotImplementedError: if the model's attention cannot tell its heads' inputs apart.

    Source: ``transformer_lens.patching.get_act_patch_direct_path``.
    """
    checks.checked_model(model)
    tokens = checks.checked_tokens(model, corrupted_tokens)
    for what, value, size in (
        ("src_layer", src_layer, model.cfg.n_layers),
        ("src_head", src_head, model.cfg.n_heads),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size:
            raise ValueError(f"{what} must be a whole number from 0 to {size - 1}, got {value!r}")
    _check_component(component)
    paths = _Paths(model, tokens, clean_cache, corrupted_cache, patching_metric, [src_layer])
    return paths.of(src_layer, src_head, component, verbose)


def get_act_patch_direct_path_all_sources(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Mapping[str, Tensor],
    corrupted_cache: Mapping[str, Tensor],
    patching_metric: Callable[[Tensor], Any],
    component: str = "q",
    verbose: bool = True,
) -> Tensor:
    """Patch the path from each head into each later head alone.

    One forward pass per pair of heads: meant for small models.

    Args, Raises: as for :func:`get_act_patch_direct_path`.

    Returns:
        ``[source layer, source head, layer, head]`` in the metric's units, NaN where there is no
        path.

    Source: ``transformer_lens.patching.get_act_patch_direct_path_all_sources``.
    """
    checks.checked_model(model)
    tokens = checks.checked_tokens(model, corrupted_tokens)
    _check_component(component)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    paths = _Paths(
        model, tokens, clean_cache, corrupted_cache, patching_metric, list(range(n_layers))
    )
    sources = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    found = [
        paths.of(layer, head, component, verbose=False)
        for layer, head in tqdm(sources, disable=not verbose, leave=False, unit="head")
    ]
    return torch.stack(found).view(n_layers, n_heads, n_layers, n_heads)


def _check_component(component: Any) -> None:
    if component not in ("q", "k", "v"):
        raise ValueError(f"component must be 'q', 'k' or 'v', got {component!r}")


class _Paths:
    """Direct paths from heads of some layers, with the inputs checked as those of a sweep."""

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        clean_cache: Mapping[str, Tensor],
        corrupted_cache: Mapping[str, Tensor],
        patching_metric: Callable[[Tensor], Any],
        layers: Sequence[int],
    ) -> None:
        self.model, self.tokens = model, tokens = isolated(model), tokens
        names = [get_act_name("z", layer) for layer in layers]
        self.clean, self.corrupted = (
            {name: checks.checked_activation(model, cache, name, tokens, which) for name in names}
            for which, cache in (("clean", clean_cache), ("corrupted", corrupted_cache))
        )
        metrics, several = _metrics(patching_metric)
        if several:
            raise TypeError(
                "direct path patching takes one metric, got a mapping: give one function"
            )
        self.metric = partial(measured, "metric", metrics["metric"], per_example=False)
        survey = checks.Survey(self.clean)
        for name, activation in self.corrupted.items():
            survey.compare(name, activation)
        survey.warn_if_nothing_moves(_Plan(model, tokens, clean_cache).differing)
        with torch.no_grad():
            logits = model(tokens, return_type="logits")
            checks.refuse_reading_pads(model, tokens, logits, {"metric": self.metric})

    def of(self, src_layer: int, src_head: int, component: str, verbose: bool) -> Tensor:
        """``[layer, head]``: the path from one head into each later one."""
        caches = (self.clean, self.corrupted)
        with torch.no_grad():
            values = _direct_path(
                self.model,
                self.tokens,
                *caches,
                self.metric,
                src_layer,
                src_head,
                component,
                verbose,
            )
        values[: src_layer + 1] = float("nan")
        bad = (~torch.isfinite(values[src_layer + 1 :])).nonzero()
        if len(bad):
            layer, head = (bad[0] + torch.tensor([src_layer + 1, 0])).tolist()
            raise ValueError(
                f"the metric is {values[layer, head].item()} with the path from "
                f"L{src_layer}H{src_head} to L{layer}H{head} patched: a metric must be finite"
            )
        return values


class _Plan:
    """The cells of a sweep, and the clean activations they copy from."""

    def __init__(self, model: Any, tokens: Tensor, clean_cache: Mapping[str, Tensor]) -> None:
        self.model, self.tokens, self.clean_cache = isolated(model), tokens, clean_cache
        self.clean: dict[str, Tensor] = {}
        self.cells: list[Cell] = []
        self.differing = self._differing_positions()

    def _differing_positions(self) -> tuple[int, ...]:
        """Where the inputs of the two runs differ; every position if the cache cannot tell."""
        everywhere = tuple(range(self.tokens.shape[1]))
        try:
            clean = self.clean_cache["hook_embed"]
        except (KeyError, TypeError, IndexError):
            return everywhere
        with torch.no_grad():
            corrupted = embedding(self.model, self.tokens)
        if corrupted is None or not isinstance(clean, Tensor) or clean.shape != corrupted.shape:
            return everywhere
        return differing_positions(clean.to(corrupted.device), corrupted)

    def add(self, setter: Callable[..., Tensor], activation: str, index: pd.DataFrame) -> None:
        """Add one cell per row of ``index``."""
        known = _is_known(setter, activation)
        n_pos = self.tokens.shape[1]
        columns = index.to_numpy().tolist()
        for row in columns:
            layer = row[0]
            name = get_act_name(activation, layer)
            if name not in self.clean:
                self.clean[name] = checks.checked_activation(
                    self.model, self.clean_cache, name, self.tokens
                )
            where = dict(zip(SETTERS[setter], row, strict=True)) if known else {}
            positions = (where["pos"],) if "pos" in where else tuple(range(n_pos))
            self.cells.append(
                Cell(
                    row=len(self.cells),
                    kind=kind_of_activation(activation) if known else None,
                    hook_name=name,
                    layer=layer,
                    positions=positions,
                    head=where.get("head"),
                    source=where.get("source"),
                    setter=setter,
                    index=tuple(row),
                )
            )

    def run(
        self, metrics: Mapping[str, Callable[..., Any]], reduce: str, options: runner.Options
    ) -> tuple[Tensor, Tensor]:
        return runner.run_cells(
            self.model,
            self.tokens,
            self.clean,
            self.cells,
            metrics,
            differing=self.differing,
            per_example=reduce != "scalar",
            options=options,
        )


def _metrics(metric: Any) -> tuple[dict[str, Callable[..., Any]], bool]:
    if isinstance(metric, Mapping):
        if not metric:
            raise ValueError("patching_metric is an empty mapping: give at least one metric")
        metrics = dict(metric)
    else:
        metrics = {"metric": metric}
    for name, function in metrics.items():
        if not callable(function):
            raise TypeError(
                f"metric {name!r} must be a function of logits, got {type(function).__name__}"
            )
    return metrics, isinstance(metric, Mapping)


def _check_choices(reduce: str, return_index_df: bool, rich: bool) -> None:
    if reduce not in ("scalar", "mean", "none"):
        raise ValueError(f"reduce must be 'scalar', 'mean' or 'none', got {reduce!r}")
    if return_index_df and (rich or reduce == "none"):
        raise ValueError(
            "return_index_df goes with a tensor result; a PatchingResult has its index_df already"
        )


def _prepare(
    model: Any, corrupted_tokens: Any, options: dict[str, Any]
) -> tuple[Tensor, runner.Options]:
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}: the options are {', '.join(_OPTIONS)}")
    checks.checked_model(model)
    return checks.checked_tokens(model, corrupted_tokens), runner.Options(**options)


def _indices(
    model: Any,
    tokens: Tensor,
    setter: Callable[..., Tensor],
    activation: str,
    axis_names: Sequence[str] | None,
    index_df: pd.DataFrame | None,
) -> tuple[list[str], pd.DataFrame]:
    """The axes of the result (none if flat), and one row of whole numbers per cell.

    Raises:
        TypeError: if the setter is not a function or the activation's name not a string.
        ValueError: if both or neither are given, an axis is unknown, or an index out of range.
    """
    if not callable(setter):
        raise TypeError(f"patch_setter must be a function, got {type(setter).__name__}")
    if not isinstance(activation, str):
        raise TypeError(f"activation_name must be a str, got {type(activation).__name__}")
    if (axis_names is None) == (index_df is None):
        raise ValueError("give either index_axis_names or index_df, and not both")
    heads = model.cfg.n_heads
    if activation in ("k", "v"):
        heads = getattr(model.cfg, "n_key_value_heads", None) or heads
    sizes = {"layer": model.cfg.n_layers}
    sizes |= dict.fromkeys(("pos", "dest_pos", "src_pos"), tokens.shape[1])
    sizes |= dict.fromkeys(("head", "head_index"), heads)
    if index_df is None:
        axes = [axis_names] if isinstance(axis_names, str) else list(axis_names)
        if (
            not axes
            or axes[0] != "layer"
            or any(axis not in sizes for axis in axes)
            or len(set(axes)) < len(axes)
        ):
            raise ValueError(
                f"index_axis_names must start with 'layer' and hold only {', '.join(sizes)}, each "
                f"once, got {axes}"
            )
        whole = make_df_from_ranges([sizes[axis] for axis in axes], axes)
    else:
        axes, whole = [], _whole_numbers(index_df)
    meaning = SETTERS.get(setter) if _is_known(setter, activation) else None
    if setter in SETTERS and len(SETTERS[setter]) != whole.shape[1]:
        raise ValueError(
            f"{setter.__name__} takes {len(SETTERS[setter])} indices "
            f"({', '.join(SETTERS[setter])}), got {list(whole.columns)}"
        )
    counted = whole.to_numpy(copy=True)
    for place, column in enumerate(whole.columns):
        kind = meaning[place] if meaning else column
        size = sizes.get("src_pos" if kind == "source" else kind)
        if size is None:
            continue
        outside = counted[(counted[:, place] < -size) | (counted[:, place] >= size), place]
        if len(outside):
            what = "index_df" if index_df is not None else "the index"
            raise ValueError(f"{what} has {column} {outside[0]}, but there are only {size} of them")
        counted[counted[:, place] < 0, place] += size
    return axes, pd.DataFrame(counted, index=whole.index, columns=whole.columns)


def _whole_numbers(index_df: Any) -> pd.DataFrame:
    """A copy of ``index_df`` in int64."""
    if not isinstance(index_df, pd.DataFrame) or index_df.empty:
        raise ValueError("index_df must be a DataFrame with one row per cell, and not empty")
    if index_df.columns[0] != "layer":
        raise ValueError(
            f"the first column of index_df must be 'layer', got {index_df.columns[0]!r}"
        )
    whole = index_df.apply(pd.to_numeric, errors="coerce")
    if whole.isna().any(axis=None) or (whole % 1 != 0).any(axis=None):
        raise ValueError("index_df must hold whole numbers only")
    return whole.astype("int64")


def _is_known(setter: Callable[..., Tensor], activation: str) -> bool:
    """Whether the engine knows what ``setter`` does to ``activation``.

    The same setter means something else on an activation of another layout: on a pattern
    ``[batch, head, dest, src]``, the setter of positions would pick heads.
    """
    meaning, kind = SETTERS.get(setter), kind_of_activation(activation)
    if meaning is None or kind is None:
        return False
    of_patterns = setter in PATTERN_SETTERS
    return of_patterns == (activation == "pattern") and ("head" not in meaning or kind.of_heads)


def _shaped(values: Tensor, shape: Sequence[int], reduce: str) -> Tensor:
    """``[metric, cell, (batch)]`` to ``[metric, *shape, (batch)]``, averaged for "mean"."""
    values = values.view(len(values), *shape, *values.shape[2:])
    return values.mean(dim=-1) if reduce == "mean" else values


def _baseline(base: Tensor, reduce: str, has_metric_axis: bool) -> Tensor:
    base = base.mean(dim=-1) if reduce == "mean" else base
    return base if has_metric_axis else base[0]


def _documented(name: str, function: Callable[..., Any], what: str, axes: Sequence[str]) -> Any:
    function.__doc__ = f"""Patch {what}; the result is ``[{", ".join(axes)}]``.

    Args: ``(model, corrupted_tokens, clean_cache, metric, *, reduce, baseline, ...)`` as for
    :func:`generic_activation_patch`. Source: ``transformer_lens.patching.{name}``.
    """
    return function


for _name, (_activation, _setter, _axes) in SWEEPS.items():
    globals()[f"get_act_patch_{_name}"] = _documented(
        f"get_act_patch_{_name}",
        partial(
            generic_activation_patch,
            patch_setter=_setter,
            activation_name=_activation,
            index_axis_names=_axes,
        ),
        f"'{_activation}' at each {', '.join(_axes)}",
        _axes,
    )
for _name, (_sweeps, _names, _axes) in COMBINED.items():
    globals()[f"get_act_patch_{_name}"] = _documented(
        f"get_act_patch_{_name}",
        partial(combined_activation_patch, sweeps=_sweeps, names=_names, axes=_axes),
        f"{', '.join(_names)} in turn",
        ("patch_type", *_axes),
    )
