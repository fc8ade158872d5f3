"""Estimate what a sweep would measure, from gradients: a few passes for all cells at once.

Attribution patching (Nanda, 2023) replaces each patched run by its first-order estimate around
the corrupted run: the corrupted metric, plus the difference that the patch makes to the
activation times the gradient of the metric there. It is quick and can be far off, so it serves to
choose what to measure with :func:`patching_demo.sweep`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from patching_demo.engine import checks
from patching_demo.engine.kinds import KINDS, Kind
from patching_demo.engine.scoring import tolerance
from patching_demo.engine.tokens import heads_of
from patching_demo.sweeps.question import (
    How,
    Question,
    ask,
    check_tasks,
    grid_cells,
    labelled,
    names_of,
)
from patching_demo.tasks import Task

#: How the gradient is taken; see :func:`attribute`.
METHODS = ("gradient", "gradient+qk", "integrated")


@torch.inference_mode(False)  # Gradients are needed, also where the caller's mode has none.
def attribute(
    model: Any,
    task: Task,
    kinds: str | Sequence[str],
    *,
    by: str = "pos",
    method: str = "gradient",
    steps: int = 5,
    per_prompt: bool = False,
) -> xr.DataArray:
    """Estimate the result of :func:`patching_demo.sweep` to first order, for all cells at once.

    Args:
        model: a TransformerBridge.
        task, kinds, by: as for :func:`patching_demo.sweep`.
        method: "gradient" takes the gradient at the corrupted run (Nanda, 2023): two forward
            passes and one backward pass. "gradient+qk" also puts patched queries and keys through
            the softmax of the attention instead of its gradient (Kramár et al., 2024), at the
            price of up to three forward passes more. "integrated" averages gradients over
            ``steps`` inputs on the way from the corrupted to the clean embeddings (Hanna et al.,
            2024).
        steps: how many inputs "integrated" averages over.
        per_prompt: whether to keep one value per prompt, along the dimension ``prompt``.

    Returns:
        What ``sweep`` returns, with the same labels and units; the attribute ``method`` says that
        the values are estimates. Where clean and corrupted activations agree, the estimate is the
        corrupted baseline.

    Raises:
        ValueError: for kinds, ``by``, ``method`` or ``steps`` that do not exist or fit, and where
            the metric's gradient does not reach a hook (the attention is computed elsewhere).

    >>> from patching_demo import induction_task, load_model, sweep
    >>> model = load_model("attn-only-2l-demo")
    >>> task = induction_task(model, batch=2, seq_len=6)
    >>> estimate = attribute(model, task, "out", by="all_pos")
    >>> large = abs(estimate - task.corrupted_baseline) > 0.5
    >>> exact = sweep(model, task, "out", by="all_pos", where=large, progress=False)
    >>> bool((exact.notnull() == large).all())
    True
    """
    check_tasks({"task": task})
    cells, names = grid_cells(model, task, kinds, by), names_of(kinds)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    if any(weight.is_inference() for weight in model.parameters()):
        raise ValueError(
            "the model was made in torch.inference_mode(), so it has no gradients: load it outside"
        )
    task = deepcopy(task) if task.clean_tokens.is_inference() else task
    hooks = sorted(hook for name in names for hook in _hooks(model, name))
    estimated = partial(_estimate, names=names, by=by, method=method, steps=steps)
    how = How(per_prompt=True, by_role=by == "role")
    found = ask(model, {"metric": task}, hooks, estimated, how)["metric"]
    if isinstance(kinds, str):
        found = found[:, 0]
    values = (found if per_prompt else found.mean(0)).astype(np.float32)
    cells.attrs["method"] = method
    return labelled(task, values, cells)


def _hooks(model: Any, name: str) -> list[str]:
    """The hooks of a kind, layer by layer."""
    return [f"blocks.{layer}.{KINDS[name].hook}" for layer in range(model.cfg.n_layers)]


def _estimate(
    question: Question, names: Sequence[str], by: str, method: str, steps: int
) -> dict[str, np.ndarray]:
    """Estimates ``[prompt, kind, layer, (position or role), (head)]``."""
    model, task, clean, shares = question.model, question.task, dict(question.clean), [0.0]
    if method == "integrated":
        if not task.same_lengths:
            raise ValueError(
                "'integrated' goes from corrupted to clean embeddings position by position, and "
                "some pairs have other lengths: use method='gradient'"
            )
        clean |= task.clean_cache(model, ["hook_embed"])
        shares = [(step + 0.5) / steps for step in range(steps)]
    corrected = {"q", "k"} & set(names) if method == "gradient+qk" else set()
    wanted = {*question.clean, *(_hooks(model, "pattern") if corrected else ())}
    corrupted, gradient, logits = _gradients(model, task, clean, sorted(wanted), shares)
    n_heads = max(heads_of(model, KINDS[name]) for name in names)
    parts = []
    for name in names:
        if name in corrected:
            effects = _through_softmax(model, task, name, clean, corrupted, gradient, logits)
        else:
            effects = [
                _summed((clean[hook] - corrupted[hook]) * gradient[hook], KINDS[name])
                for hook in _hooks(model, name)
            ]
        effect = torch.stack(effects, dim=1)
        if by == "all_pos":
            effect = effect.sum(2)
        if by == "role":
            effect = effect[:, :, list(question.places.values())]
        if KINDS[name].of_heads:  # Keys and values may have fewer heads: NaN where there is none.
            missing = n_heads - effect.shape[-1]
            effect = torch.nn.functional.pad(effect, (0, missing), value=torch.nan)
        parts.append(effect)
    values = torch.stack(parts, dim=1)
    baseline = task.metric.per_example(logits)
    values = values + baseline.to(values).view(-1, *[1] * (values.ndim - 1))
    # A patch goes into all rows of a prompt, and each row's value is the prompt's.
    return {"metric": task.over_rows(values).cpu().double().numpy(force=True)}


def _gradients(
    model: Any, task: Task, clean: Any, wanted: Sequence[str], shares: Sequence[float]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Activations of the corrupted run, mean gradients there, and its logits.

    The input of each run lies the given share of the way from corrupted to clean embeddings.
    """
    found: dict[str, Tensor] = {}
    corrupted: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    metric, device = task.metric.per_example, task.corrupted_tokens.device
    for share in shares:

        def start(embedding: Tensor, hook: Any = None, share: float = share) -> Tensor:
            if share:
                embedding = torch.lerp(embedding, clean["hook_embed"].to(embedding), share)
            return embedding.detach().requires_grad_()

        def keep(activation: Tensor, hook: Any, name: str) -> Tensor:
            found[name] = activation
            return activation  # A hook on a reshaped copy joins the graph only by what it returns.

        hooks = [("hook_embed", start), *((name, partial(keep, name=name)) for name in wanted)]
        with torch.enable_grad():
            logits = model.run_with_hooks(
                task.corrupted_tokens, return_type="logits", fwd_hooks=hooks
            )
            if missing := set(wanted) - found.keys():
                raise checks.HookNotLive(min(missing), called=False)
            values = metric(logits)
            gradients = [None] * len(found)
            if values.requires_grad:
                gradients = torch.autograd.grad(values.sum(), [*found.values()], allow_unused=True)
        for name, gradient in zip(found, gradients, strict=True):
            if gradient is None:
                raise ValueError(
                    f"the metric's gradient does not reach hook {name!r}: the attention is "
                    "computed elsewhere, or by quantised weights. Use sweep, or another kind"
                )
            total[name] = total.get(name, 0) + gradient.to(device) / len(shares)
        if not share:
            corrupted = {name: found[name].detach().to(device) for name in found}
            unpatched = logits.detach().to(device)
        found.clear()
    if not corrupted:
        with torch.no_grad():
            logits, cache = model.run_with_cache(task.corrupted_tokens, names_filter=list(wanted))
        corrupted = {name: cache[name].to(device) for name in wanted}
        unpatched = logits.to(device)
    return corrupted, total, unpatched


def _through_softmax(
    model: Any,
    task: Task,
    name: str,
    clean: Mapping[str, Tensor],
    corrupted: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    unpatched: Tensor,
) -> list[Tensor]:
    """Effects of a query or key ``[batch, pos, head]``, linear from the pattern on, by layer.

    A row of the pattern depends on its own query alone, so one run with all clean queries shows
    every row that a patched query makes. A key changes one column of each row, and thereby the sum
    that the row is divided by. With clean keys at every other position, that sum is told by the
    columns between, which differ from those of the corrupted run in nothing else.
    """
    hooks, pattern_hooks = _hooks(model, name), _hooks(model, "pattern")

    def patterns(positions: slice) -> dict[str, Tensor]:
        """Each layer's pattern with clean queries or keys there, no layer changing the next."""
        seen: dict[str, Tensor] = {}

        def put(activation: Tensor, hook: Any, own: str) -> Tensor:
            patched = activation.clone()
            patched[:, positions] = clean[own][:, positions].to(patched)
            return patched

        def keep(pattern: Tensor, hook: Any, own: str) -> Tensor:
            seen[own] = pattern.detach().to(corrupted[own].device, copy=True)
            return corrupted[own].to(pattern.device, copy=True)

        fwd_hooks = [(own, partial(put, own=own)) for own in hooks]
        fwd_hooks += [(own, partial(keep, own=own)) for own in pattern_hooks]
        with torch.no_grad():
            logits = model.run_with_hooks(
                task.corrupted_tokens, return_type="logits", fwd_hooks=fwd_hooks
            )
        # Queries and keys act through the pattern alone, and each pattern was put back.
        apart = (logits.to(unpatched.device) - unpatched).abs().max()
        if apart > tolerance(logits.dtype) * unpatched.abs().max():
            raise ValueError(
                f"{pattern_hooks[0]!r} can be read but not patched on this model (the attention "
                "is computed elsewhere), which 'gradient+qk' needs: use method='gradient'"
            )
        return seen

    if name == "q":
        return [
            _summed((pattern - corrupted[own]) * gradient[own], KINDS["pattern"])
            for own, pattern in patterns(slice(None)).items()
        ]
    # In double precision, which not every device has.
    effects = [torch.zeros(clean[own].shape[:3], dtype=torch.double, device="cpu") for own in hooks]
    for first in (0, 1):
        swapped, between = slice(first, None, 2), slice(1 - first, None, 2)
        after = patterns(swapped)
        for own, whole in zip(pattern_hooks, effects, strict=True):
            before, changed, slope = (
                part.cpu().double() for part in (corrupted[own], after.pop(own), gradient[own])
            )  # [batch, head, query, key]
            row = (before * slope).sum(-1, keepdim=True)
            rest, changed_rest = (part[..., between].sum(-1, True) for part in (before, changed))
            # Of one column, in parts of the sum.
            grown = (changed * (rest / changed_rest) - before)[..., swapped]
            change = (row + grown * slope[..., swapped]) / (1 + grown) - row
            # A row that sees nothing between sees one position, and no key changes that.
            effect = change.nan_to_num(0, 0, 0).sum(2)  # [batch, head, key]
            # Heads may share a key.
            effect = effect.unflatten(1, (whole.shape[2], -1)).sum(2)
            whole[:, swapped] = effect.transpose(1, 2)
    return [whole.float().to(clean[own].device) for own, whole in zip(hooks, effects, strict=True)]


def _summed(products: Tensor, kind: Kind) -> Tensor:
    """Sum over all axes but prompt, position and head: ``[batch, pos, (head)]``."""
    letters = {"batch": "b", "pos": "p", "head": "h", "kv_head": "h"}
    axes = "".join(letters.get(axis, "x") for axis in kind.axes)
    return torch.einsum(f"{axes}->{'bph' if kind.of_heads else 'bp'}", products)
