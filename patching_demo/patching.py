"""The sweeps of ``transformer_lens.patching``: same names, same arguments, same numbers, faster.

Activation patching (Meng et al., 2022; Wang et al., 2022) copies one activation of a clean run
into a corrupted run and measures how much of the right answer comes back. A sweep does so for
every layer, position and head in turn. This module stands in for ``transformer_lens.patching``::

    import patching_demo.patching as patching

    patching.get_act_patch_resid_pre(model, corrupted_tokens, clean_cache, metric)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypedDict

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
from patching_demo.engine.bridge import Unsupported
from patching_demo.engine.cells import Cell, Patch
from patching_demo.engine.frozen import FrozenModel
from patching_demo.engine.isolation import isolated
from patching_demo.engine.kinds import HEAD_KINDS, KINDS, Kind, kind_of_activation
from patching_demo.engine.packs import unforeseen
from patching_demo.engine.scoring import measured
from patching_demo.engine.skipping import NOTHING, differing_positions
from patching_demo.engine.tokens import heads_of, text_lengths

if TYPE_CHECKING:
    from typing_extensions import Unpack

Cache = Mapping[str, Tensor]
Setter = Callable[..., Tensor]
Metrics = Callable[..., Any] | Mapping[str, Callable[..., Any]]
Values = Tensor | tuple[Tensor, pd.DataFrame] | PatchingResult

SETTERS: dict[Setter, tuple[str, ...]] = {
    layer_pos_patch_setter: ("layer", "pos"),
    layer_pos_head_vector_patch_setter: ("layer", "pos", "head"),
    layer_head_vector_patch_setter: ("layer", "head"),
    layer_head_pattern_patch_setter: ("layer", "head_index"),
    layer_head_pos_pattern_patch_setter: ("layer", "head_index", "dest_pos"),
    layer_head_dest_src_pos_pattern_patch_setter: ("layer", "head_index", "dest_pos", "src_pos"),
}
"""The indices that each patch setter takes, in order; a sweep over all of them has these axes."""

_SAME_AXIS = {"head_index": "head", "dest_pos": "pos"}


class SweepOptions(TypedDict, total=False):
    """What every sweep takes by keyword: see :func:`generic_activation_patch`."""

    return_index_df: bool
    reduce: str
    baseline: bool
    attention_mask: Any
    memory: int | None
    check: int | None
    seed: int
    progress: bool
    on_progress: Callable[[int, int], bool | None] | None
    store: str | os.PathLike[str] | None


def generic_activation_patch(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: bool = False,
    *,
    reduce: str = "scalar",
    baseline: bool = False,
    **options: Any,
) -> Values:
    """Patch one kind of activation at every index of some axes, and measure each time.

    Args:
        model: a decoder-only ``TransformerBridge`` in eval mode.
        corrupted_tokens: int ``[batch, pos]``.
        clean_cache: activations of the clean run, from ``model.run_with_cache``.
        patching_metric: from logits ``[batch, pos, d_vocab]`` to a number, or several by name. A
            metric that declares the positions it reads (``patching_demo.metrics``) is faster. Any
            other is called once for each cell that its patch can change, and a few times more for
            the baseline and for checks, each time with logits of its own.
        patch_setter: writes a clean activation into a corrupted one. Those of
            ``transformer_lens.patching`` run fast; any other is called in the plain loop.
        activation_name: as for ``transformer_lens.utilities.get_act_name``, for instance "z".
        index_axis_names: axes to sweep in full: "layer", "pos", "head" ("head_index"),
            "dest_pos", "src_pos".
        index_df: instead, one row of indices per cell, its columns named like those axes, in any
            order; the result is then flat. A setter of your own takes them in the order given.
        return_index_df: also return the indices.
        reduce: "scalar" (the metric returns a number), "mean" (it returns ``[batch]``, averaged)
            or "none" (``[batch]`` is kept, in a ``PatchingResult``).
        baseline: measure the unpatched corrupted run too, and return a ``PatchingResult``.
        **options: ``attention_mask`` ``[batch, pos]`` says which tokens are padding (on the
            right); for ``memory``, ``check``, ``seed``, ``progress`` and ``store`` see
            :class:`patching_demo.engine.runner.Options`.

    Returns:
        A tensor with one dimension per axis in the metric's units (see ``patching_metric``), the
        indices too if asked for, or a ``PatchingResult``.

    Raises:
        TypeError: for inputs of the wrong type, as in ``checks``.
        ValueError: for inputs that do not fit each other or the model, and for a metric that
            returns NaN or infinity, naming the cell.

    Source: ``transformer_lens.patching.generic_activation_patch``.
    """
    how = _How(patching_metric, reduce, baseline, return_index_df)
    tokens, lengths, options_ = _prepare(model, corrupted_tokens, options)
    index, rows = _indices(model, tokens, patch_setter, activation_name, index_axis_names, index_df)
    plan = _Plan(model, tokens, clean_cache)
    plan.add(patch_setter, activation_name, rows)
    values, base = plan.run(how, lengths, options_)
    axes = list(index.columns) if index_df is None else []
    values = how.shaped(values, _shape(index) if axes else (len(index),))
    result = how.answer(values, base, axes, index)
    return (result, index) if return_index_df else result


def combined_activation_patch(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    metric: Metrics,
    *,
    kinds: Sequence[str],
    by: str = "pos",
    reduce: str = "scalar",
    baseline: bool = False,
    **options: Any,
) -> Tensor | PatchingResult:
    """Sweep several kinds of activation over the same axes in one pass.

    The result is ``[patch_type, layer, pos]``, ``[patch_type, layer, pos, head]`` or, with
    ``by="all_pos"``, ``[patch_type, layer, head]``. Cells that do not exist are NaN: heads beyond
    those of keys and values under grouped-query attention, and, after a warning, a kind whose
    hook is not live on this model.

    Args, Raises: as for :func:`generic_activation_patch`; ``kinds`` are names of
        :data:`patching_demo.engine.kinds.KINDS`, all with heads or all without.
    """
    how = _How(metric, reduce, baseline)
    tokens, lengths, options_ = _prepare(model, corrupted_tokens, options)
    axes = ["layer"] + ["pos"] * (by == "pos") + ["head"] * KINDS[kinds[0]].of_heads

    def swept(live: Sequence[str]) -> tuple[Any, ...]:
        plan, parts = _Plan(model, tokens, clean_cache), {}
        for name in live:
            activation, setter = KINDS[name].activation, _setter_of(KINDS[name], by)
            hooks = [get_act_name(activation, layer) for layer in range(model.cfg.n_layers)]
            checks.refuse_uncalled_hooks(plan.model, tokens, clean_cache, hooks)
            index, rows = _indices(model, tokens, setter, activation, axes, None)
            first = len(plan.cells)
            plan.add(setter, activation, rows)
            parts[name] = slice(first, len(plan.cells)), _shape(index)
        return parts, *plan.run(how, lengths, options_)

    parts, values, base = checks.without_dead_kinds(kinds, swept)
    sizes = [max(each) for each in zip(*(shape for _, shape in parts.values()), strict=True)]
    if "head" in axes:
        sizes[-1] = max(heads_of(model, KINDS[name]) for name in kinds)
    trailing = values.shape[2:] if reduce == "none" else ()
    result = values.new_full((len(values), len(kinds), *sizes, *trailing), float("nan"))
    for name, (rows, shape) in parts.items():
        part = how.shaped(values[:, rows], shape)
        result[(slice(None), kinds.index(name), *(slice(size) for size in shape))] = part
    axes = ["patch_type", *axes]
    index = make_df_from_ranges([len(kinds), *sizes], axes)
    return how.answer(result, base, axes, index, list(kinds))


def get_act_patch_resid_pre(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch the residual stream before each block: ``[layer, pos]``."""
    return _sweep("resid_pre", "pos", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_resid_mid(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch the residual stream between attention and MLP: ``[layer, pos]``."""
    return _sweep("resid_mid", "pos", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_resid_post(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch the residual stream after each block: ``[layer, pos]``. Not in TransformerLens."""
    return _sweep("resid_post", "pos", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_attn_out(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch the output of each attention layer: ``[layer, pos]``."""
    return _sweep("attn_out", "pos", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_mlp_out(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch the output of each MLP: ``[layer, pos]``."""
    return _sweep("mlp_out", "pos", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_attn_head_out_by_pos(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch each head's output at one position: ``[layer, pos, head]``."""
    return _sweep("out", "pos", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_attn_head_q_by_pos(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch each head's query at one position: ``[layer, pos, head]``."""
    return _sweep("q", "pos", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_attn_head_k_by_pos(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch each head's key at one position: ``[layer, pos, head]``."""
    return _sweep("k", "pos", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_attn_head_v_by_pos(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch each head's value at one position: ``[layer, pos, head]``."""
    return _sweep("v", "pos", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_attn_head_pattern_by_pos(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch one destination row of each head's pattern: ``[layer, head_index, dest_pos]``."""
    return _sweep("pattern", "pos", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_attn_head_pattern_dest_src_pos(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch single entries of patterns: ``[layer, head_index, dest_pos, src_pos]``."""
    return _sweep("pattern", "entry", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_attn_head_out_all_pos(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch each head's outputs at all positions: ``[layer, head]``."""
    return _sweep("out", "all_pos", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_attn_head_q_all_pos(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch each head's queries at all positions: ``[layer, head]``."""
    return _sweep("q", "all_pos", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_attn_head_k_all_pos(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch each head's keys at all positions: ``[layer, head]``."""
    return _sweep("k", "all_pos", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_attn_head_v_all_pos(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch each head's values at all positions: ``[layer, head]``."""
    return _sweep("v", "all_pos", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_attn_head_pattern_all_pos(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Patch each head's whole pattern: ``[layer, head_index]``."""
    return _sweep("pattern", "all_pos", model, corrupted_tokens, clean_cache, patching_metric, how)


def get_act_patch_block_every(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Sweep resid_pre, attn_out and mlp_out: ``[patch_type, layer, pos]``."""
    kinds = ("resid_pre", "attn_out", "mlp_out")
    return combined_activation_patch(
        model, corrupted_tokens, clean_cache, metric, kinds=kinds, **how
    )


def get_act_patch_attn_head_all_pos_every(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Sweep out, q, k, v and pattern of heads: ``[patch_type, layer, head]``."""
    return combined_activation_patch(
        model, corrupted_tokens, clean_cache, metric, kinds=HEAD_KINDS, by="all_pos", **how
    )


def get_act_patch_attn_head_by_pos_every(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    metric: Metrics,
    **how: Unpack[SweepOptions],
) -> Values:
    """Sweep out, q, k, v and pattern of heads: ``[patch_type, layer, pos, head]``."""
    return combined_activation_patch(
        model, corrupted_tokens, clean_cache, metric, kinds=HEAD_KINDS, **how
    )


def get_act_patch_direct_path(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    corrupted_cache: Cache,
    patching_metric: Callable[[Tensor], Any],
    src_layer: int,
    src_head: int,
    component: str = "q",
    verbose: bool = True,
) -> Tensor:
    """Patch the path from one head into each later head alone (Wang et al., 2022).

    The difference that the source head writes, clean minus corrupted, is added to what one later
    head reads.

    Args:
        model, corrupted_tokens, clean_cache: as for :func:`generic_activation_patch`.
        corrupted_cache: activations of the corrupted run.
        patching_metric: from logits ``[batch, pos, d_vocab]`` to a number.
        src_layer, src_head: the source head.
        component: what of the later head is patched: its "q", "k" or "v" input.
        verbose: whether to show a progress bar.

    Returns:
        ``[layer, head]`` in the metric's units. At or before the source layer there is no path,
        and the value is NaN, as at heads beyond those of keys and values under grouped-query
        attention. Where the two caches agree there is nothing to patch, which is said once, in a
        warning.

    Raises:
        TypeError, ValueError: for inputs as in :func:`generic_activation_patch`, a source head or
            component that does not exist, a model on which such paths are not defined, or a
            metric that returns NaN or infinity.
        NotImplementedError: if the model's attention cannot tell its heads' inputs apart.

    Source: ``transformer_lens.patching.get_act_patch_direct_path``.
    """
    checks.checked_model(model)
    for what, value, size in (
        ("src_layer", src_layer, model.cfg.n_layers),
        ("src_head", src_head, model.cfg.n_heads),
    ):
        if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= value < size:
            raise ValueError(f"{what} must be a whole number from 0 to {size - 1}, got {value!r}")
    caches, source = (clean_cache, corrupted_cache), (int(src_layer), int(src_head))
    return _direct_paths(
        model, corrupted_tokens, caches, patching_metric, [source], component, verbose
    )[0]


def get_act_patch_direct_path_all_sources(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    corrupted_cache: Cache,
    patching_metric: Callable[[Tensor], Any],
    component: str = "q",
    verbose: bool = True,
) -> Tensor:
    """Patch the path from each head into each later head alone.

    Args, Raises: as for :func:`get_act_patch_direct_path`.

    Returns:
        ``[source layer, source head, layer, head]`` in the metric's units, NaN where there is no
        path.

    Source: ``transformer_lens.patching.get_act_patch_direct_path_all_sources``.
    """
    checks.checked_model(model)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    sources = list(product(range(n_layers), range(n_heads)))
    caches = (clean_cache, corrupted_cache)
    found = _direct_paths(
        model, corrupted_tokens, caches, patching_metric, sources, component, verbose
    )
    return found.view(n_layers, n_heads, n_layers, n_heads)


@torch.no_grad()
def _direct_paths(
    model: Any,
    corrupted_tokens: Tensor,
    caches: tuple[Cache, Cache],
    metric: Any,
    sources: Sequence[tuple[int, int]],
    component: str,
    verbose: bool,
) -> Tensor:
    """``[source, layer, head]``: the paths from some heads, lowest layer first."""
    if component not in ("q", "k", "v"):
        raise ValueError(f"component must be 'q', 'k' or 'v', got {component!r}")
    if isinstance(metric, Mapping):
        raise TypeError("direct path patching takes one metric, got a mapping: give one function")
    metrics, tokens = _How(metric).metrics, checks.checked_tokens(model, corrupted_tokens)
    names = {layer: get_act_name("z", layer) for layer, _ in sources}
    clean, corrupted = (
        {n: checks.checked_activation(model, cache, n, tokens, which) for n in names.values()}
        for which, cache in zip(("clean", "corrupted"), caches, strict=True)
    )
    change = {layer: clean[name] - corrupted[name] for layer, name in names.items()}
    moved = torch.stack([each.flatten(2).any(-1).any(0) for each in change.values()]).any(0)
    if not moved.any():
        checks.warn_once(NOTHING)
        moved = ~moved
    try:
        return _frozen_paths(
            isolated(model), tokens, change, moved, metrics, sources, component, verbose
        )
    except (Unsupported, checks.HookNotLive) as reason:
        checks.warn_once(f"direct paths take the plain loop: {reason}")
    # On the caller's own modules: TransformerLens's paths come out otherwise on isolated ones.
    loop = partial(_direct_path, model, tokens, clean, corrupted)
    scored = partial(measured, "metric", metric, per_example=False)
    shown = tqdm(sources, disable=not verbose, leave=False)
    found = torch.stack([loop(scored, *source, component, False) for source in shown])
    for values, (layer, _) in zip(found, sources, strict=True):
        values[: layer + 1] = float("nan")
    return found


def _frozen_paths(
    model: Any,
    tokens: Tensor,
    change: Mapping[int, Tensor],
    moved: Tensor,
    metrics: Mapping[str, Callable[..., Any]],
    sources: Sequence[tuple[int, int]],
    component: str,
    verbose: bool,
) -> Tensor:
    """The paths by the engine: what the later heads take in is computed, then patched.

    Raises:
        Unsupported: if the model's blocks do more than add what attention and MLP return.
    """
    kind, frozen, at = KINDS[component], FrozenModel(model, tokens), moved.nonzero()[:, 0]
    resid, changes = frozen.run.resid, []
    for layer, writes in change.items():
        call = frozen.outputs[layer]["attn.o"]
        own = call.given[0]
        with unforeseen("a change of the heads' outputs"):
            sent = {"attn.o": call._replace(given=[own + writes.to(own).view_as(own)])}
        # Without attention and MLPs on the way, the stream carries a change as it is.
        after = frozen.sent(sent, "out", layer, at, "direct") - resid[layer + 1][:, at]
        changes.append(after[[head for source, head in sources if source == layer]])
    every = torch.cat(changes)
    found = every.new_full(
        (len(every), model.cfg.n_layers, model.cfg.n_heads), float("nan")
    ).float()
    for layer in range(min(change) + 1, model.cfg.n_layers):
        count = sum(source < layer for source, _ in sources)
        name = f"blocks.{layer}.{kind.hook}"
        taken = frozen.received(layer, resid[layer][:, at] + every[:count], at, [name])[name]
        into = range(taken.shape[3])
        cells = [
            Cell(row, (Patch(kind, name, layer, tuple(at.tolist()), head=head, values=own),))
            for row, (own, head) in enumerate(product(taken, into))
        ]
        scored, _ = runner.run_cells(
            model, tokens, {}, cells, metrics,
            differing=at.tolist(), per_example=False, options=runner.Options(progress=verbose),
        )  # fmt: skip
        found = found.to(scored.dtype)
        found[:count, layer, : len(into)] = scored[0].view(count, -1)
    return found


class _Plan:
    """The cells of a sweep, and the clean activations they copy from."""

    def __init__(self, model: Any, tokens: Tensor, clean_cache: Mapping[str, Tensor]) -> None:
        self.model, self.tokens, self.clean_cache = isolated(model, self), tokens, clean_cache
        self.clean: dict[str, Tensor] = {}
        self.cells: list[Cell] = []
        self.differing = differing_positions(self.model, tokens, clean_cache)

    def add(self, setter: Setter, activation: str, rows: Sequence[Sequence[int]]) -> None:
        """Add one cell for each row of the indices that ``setter`` takes."""
        kind = _known_kind(setter, activation)
        everywhere = tuple(range(self.tokens.shape[1]))
        names = [_SAME_AXIS.get(axis, axis) for axis in SETTERS[setter]] if kind else []
        for row in rows:
            name = get_act_name(activation, row[0])
            if name not in self.clean:
                self.clean[name] = checks.checked_activation(
                    self.model, self.clean_cache, name, self.tokens
                )
            where = dict(zip(names, row, strict=False))
            patch = Patch(
                kind=kind,
                hook_name=name,
                layer=row[0],
                positions=(where["pos"],) if "pos" in where else everywhere,
                head=where.get("head"),
                source=where.get("src_pos"),
                setter=setter,
                index=tuple(row),
            )
            self.cells.append(Cell(len(self.cells), (patch,)))

    def run(
        self, how: _How, lengths: Tensor | None, options: runner.Options
    ) -> tuple[Tensor, Tensor]:
        """Values ``[metric, cell, (batch)]`` and baselines, see :func:`runner.run_cells`."""
        return runner.run_cells(
            self.model, self.tokens, self.clean, self.cells, how.metrics, differing=self.differing,
            lengths=lengths, per_example=how.reduce != "scalar", options=options,
        )  # fmt: skip


class _How:
    """The metrics of a sweep, and the form in which their values are returned.

    Raises:
        TypeError: if a metric is not a function.
        ValueError: if there is no metric, or the choices are unknown or exclude each other.
    """

    def __init__(
        self, metric: Any, reduce: str = "scalar", baseline: bool = False, index: bool = False
    ) -> None:
        self.several = isinstance(metric, Mapping)
        self.metrics: dict[str, Any] = dict(metric) if self.several else {"metric": metric}
        self.reduce, self.baseline = reduce, baseline
        if not self.metrics:
            raise ValueError("patching_metric is an empty mapping: give at least one metric")
        for name, function in self.metrics.items():
            if not callable(function):
                raise TypeError(
                    f"metric {name!r} must be a function of logits, got {type(function).__name__}"
                )
        if reduce not in ("scalar", "mean", "none"):
            raise ValueError(f"reduce must be 'scalar', 'mean' or 'none', got {reduce!r}")
        self.plain = not (self.several or baseline or reduce == "none")
        if index and not self.plain:
            raise ValueError(
                "return_index_df goes with a tensor result; a PatchingResult has its index_df "
                "already"
            )

    def shaped(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """``[metric, cell, (batch)]`` to ``[metric, *shape, (batch)]``, averaged for "mean"."""
        values = values.view(len(values), *shape, *values.shape[2:])
        return values.mean(dim=-1) if self.reduce == "mean" else values

    def answer(
        self,
        values: Tensor,
        base: Tensor,
        axes: list[str],
        index: pd.DataFrame,
        kinds: list[str] | None = None,
    ) -> Tensor | PatchingResult:
        """A tensor, or a ``PatchingResult`` where more than that is asked for."""
        if self.plain:
            return values[0]
        if self.reduce == "mean":
            base = base.mean(dim=-1)
        values, base = (values, base) if self.several else (values[0], base[0])
        return PatchingResult(
            values=values,
            axis_names=axes,
            index_df=index,
            metric_names=list(self.metrics),
            reduced=self.reduce != "none",
            baseline=base if self.baseline else None,
            has_metric_axis=self.several,
            patch_type_names=kinds,
        )


def _prepare(
    model: Any, corrupted_tokens: Any, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None, runner.Options]:
    """Checked tokens, the lengths of their texts if a mask tells them, and the engine's options."""
    mask = options.pop("attention_mask", None)
    known = runner.Options.of(options, "attention_mask")
    checks.checked_model(model)
    tokens = checks.checked_tokens(model, corrupted_tokens, masked=mask is not None)
    lengths = None if mask is None else text_lengths(mask, tokens)
    return tokens, lengths, known


def _sweep(
    kind: str,
    by: str,
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Cache,
    patching_metric: Metrics,
    options: SweepOptions,
) -> Values:
    """One kind over all that its patch setter takes."""
    setter = _setter_of(KINDS[kind], by)
    how = {"index_axis_names": SETTERS[setter], **options}
    return generic_activation_patch(
        model, corrupted_tokens, clean_cache, patching_metric, setter, KINDS[kind].activation, **how
    )


def _setter_of(kind: Kind, by: str) -> Setter:
    """The patch setter that writes one cell of a kind."""
    if not kind.of_heads:
        return layer_pos_patch_setter
    if by == "entry":
        return layer_head_dest_src_pos_pattern_patch_setter
    at_position, everywhere = layer_pos_head_vector_patch_setter, layer_head_vector_patch_setter
    if "source" in kind.axes:
        at_position = layer_head_pos_pattern_patch_setter
        everywhere = layer_head_pattern_patch_setter
    return at_position if by == "pos" else everywhere


def _known_kind(setter: Setter, activation: str) -> Kind | None:
    """The kind that ``setter`` patches, None if the engine does not know what it does there.

    The same setter means something else on an activation of another layout: on a pattern
    ``[batch, head, dest, src]``, the setter of positions would pick heads.
    """
    axes, kind = SETTERS.get(setter, ()), kind_of_activation(activation)
    if not axes or kind is None or ("head_index" in axes) != ("source" in kind.axes):
        return None
    return kind if kind.of_heads or "head" not in axes else None


def _indices(
    model: Any,
    tokens: Tensor,
    setter: Setter,
    activation: str,
    axis_names: Sequence[str] | None,
    index_df: pd.DataFrame | None,
) -> tuple[pd.DataFrame, list[list[int]]]:
    """One row of whole numbers per cell: as asked for, and in the order that the setter takes.

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
    heads = heads_of(model, kind_of_activation(activation))
    sizes = {"layer": model.cfg.n_layers}
    sizes |= dict.fromkeys(("pos", "dest_pos", "src_pos"), tokens.shape[1])
    sizes |= dict.fromkeys(("head", "head_index"), heads)
    if index_df is None:
        axes = [axis_names] if isinstance(axis_names, str) else list(axis_names)
        if axes[:1] != ["layer"] or set(axes) - set(sizes) or len(set(axes)) < len(axes):
            raise ValueError(
                f"index_axis_names must start with 'layer' and hold only {', '.join(sizes)}, each "
                f"once, got {axes}"
            )
        index = make_df_from_ranges([sizes[axis] for axis in axes], axes)
    else:
        index = _whole_numbers(index_df)
    columns = [_SAME_AXIS.get(column, column) for column in index.columns]
    takes = SETTERS.get(setter)
    if takes is None and columns[0] != "layer":
        raise ValueError(f"the first column of index_df must be 'layer', got {index.columns[0]!r}")
    order = columns if takes is None else [_SAME_AXIS.get(axis, axis) for axis in takes]
    if sorted(map(str, columns)) != sorted(map(str, order)):
        raise ValueError(
            f"{setter.__name__} takes {len(takes)} indices by name ({', '.join(takes)}), got "
            f"{list(index.columns)}"
        )
    counted = index.to_numpy(copy=True)
    for place, column in enumerate(index.columns):
        if (size := sizes.get(column)) is None:
            continue
        own = counted[:, place]
        outside = own[(own < -size) | (own >= size)]
        if len(outside):
            raise ValueError(
                f"index_df has {column} {outside[0]}, but there are only {size} of them"
            )
        own[own < 0] += size
    index = pd.DataFrame(counted, index=index.index, columns=index.columns)
    return index, counted[:, [columns.index(axis) for axis in order]].tolist()


def _whole_numbers(index_df: Any) -> pd.DataFrame:
    """A copy of ``index_df`` in int64."""
    if not isinstance(index_df, pd.DataFrame) or index_df.empty:
        raise ValueError("index_df must be a DataFrame with one row per cell, and not empty")
    whole = index_df.apply(pd.to_numeric, errors="coerce")
    if whole.isna().any(axis=None) or (whole % 1 != 0).any(axis=None):
        raise ValueError("index_df must hold whole numbers only")
    return whole.astype("int64")


def _shape(index: pd.DataFrame) -> tuple[int, ...]:
    return tuple(index.max() + 1)
