"""Run a sweep and label its result.

A result is an ``xarray.DataArray`` of metric values. Its dimensions are ``layer`` and
``position`` or ``head``, after an optional ``kind``; its attributes say what was patched into
what, the metric and both baselines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from patching_demo import patching
from patching_demo.engine import checks
from patching_demo.engine.isolation import isolated
from patching_demo.engine.kinds import BLOCK_KINDS, HEAD_KINDS, KINDS
from patching_demo.engine.tokens import device_of, key_value_heads, name_of
from patching_demo.metrics import Normalised
from patching_demo.tasks import Task

__all__ = ["sweep", "sweep_metrics"]


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
        ValueError: if a kind or ``by`` is unknown or does not fit the others, or the task's
            baselines are another model's.
        TypeError: if the model is no TransformerBridge, the task none, or an option asks for
            anything but one number per cell.
    """
    return sweep_metrics(model, {"metric": task}, kinds, by=by, **engine_options)["metric"]


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
        For each name what :func:`sweep` returns for that task.

    Raises:
        ValueError: as :func:`sweep`, and if the tasks have different prompts.
        TypeError: as :func:`sweep`.
    """
    for task in tasks.values():
        if not isinstance(task, Task):
            raise TypeError(
                f"sweep(model, task, kinds) needs a Task, got {type(task).__name__}: make one with "
                "prompt_task"
            )
    several = not isinstance(kinds, str)
    names = list(kinds) if several else [kinds]
    _check_kinds(names, by)
    checks.check_bridge(model)
    if not tasks:
        raise ValueError("there is no task to score the sweep by")
    first = next(iter(tasks.values()))
    for name, task in tasks.items():
        same = torch.equal(task.clean_tokens, first.clean_tokens)
        if not same or not torch.equal(task.corrupted_tokens, first.corrupted_tokens):
            raise ValueError(f"{name!r} has other prompts than the first task: sweep it by itself")
    for option in ("reduce", "baseline", "return_index_df", "attention_mask"):
        if option in engine_options:
            raise TypeError(
                f"a labelled result has one number per cell, which {option!r} changes: call the "
                "functions of patching_demo.patching for that"
            )
    model = isolated(model)
    with torch.no_grad():
        logits, cache = model.run_with_cache(
            first.clean_tokens.to(device_of(model)), names_filter=_hook_names(model, names)
        )
        for task in tasks.values():
            _check_baseline(task, "clean", float(task.metric(logits)), logits)
    out = patching.combined_activation_patch(
        model,
        first.corrupted_tokens,
        cache,
        {name: task.metric for name, task in tasks.items()},
        kinds=names,
        by=by,
        baseline=True,
        attention_mask=first.attention_mask,
        **engine_options,
    )
    for task, value in zip(tasks.values(), out.baseline.tolist(), strict=True):
        _check_baseline(task, "corrupted", value, logits)
    values = out.values.detach().float().cpu().numpy()
    return {
        name: _labelled(model, task, values[i] if several else values[i, 0], names, by, several)
        for i, (name, task) in enumerate(tasks.items())
    }


def _check_baseline(task: Task, which: str, measured: float, logits: Tensor) -> None:
    """Refuse a task whose baseline was measured on another model.

    Raises:
        ValueError: with both numbers, if they differ by more than another machine's rounding.
    """
    expected = task.clean_baseline if which == "clean" else task.corrupted_baseline
    scale = 1.0
    if isinstance(task.metric, Normalised):
        scale = abs(task.metric.clean - task.metric.corrupted)
    share = max(1e-5, 4 * torch.finfo(logits.dtype).eps)
    if abs(measured - expected) > share * (float(logits.abs().max()) / scale + abs(expected)):
        raise ValueError(
            f"the {which} baseline of the task is {expected:.6g}, measured on {task.model_name!r}, "
            f"but this model's own is {measured:.6g} ({task.metric.name}): the task belongs to "
            "another model, or the model was changed. Sweep task.on(model)"
        )


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
    return [f"blocks.{i}.{KINDS[name].hook}" for i in range(model.cfg.n_layers) for name in names]


def _labelled(
    model: Any, task: Task, values: np.ndarray, names: list[str], by: str, several: bool
) -> xr.DataArray:
    heads = names[0] in HEAD_KINDS
    dims = ["kind"] * several + ["layer"] + ["position"] * (by == "pos") + ["head"] * heads
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
        "model": name_of(model),
        "by": by,
        "kind": "" if several else names[0],
        "direction": task.direction,
        "n_key_value_heads": key_value_heads(model) if heads else 0,
    }
    return xr.DataArray(values, dims=dims, coords=coords, attrs=attrs, name="value")
