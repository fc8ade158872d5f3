"""Path patching: one component's clean output reaches chosen receivers, and nothing else.

After Wang et al. (2022) and Goldowsky-Dill et al. (2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from patching_demo.engine import checks
from patching_demo.engine.bridge import Unsupported
from patching_demo.engine.cells import Cell, Patch, in_order
from patching_demo.engine.frozen import SENDERS, FrozenModel, recorded
from patching_demo.engine.kinds import KINDS
from patching_demo.engine.packs import CALL_TOKENS
from patching_demo.engine.scoring import Scorer
from patching_demo.sweeps.executors import Workers
from patching_demo.sweeps.question import (
    Question,
    check_tasks,
    checked_part,
    head_labels,
    in_shapes,
    labelled,
)
from patching_demo.tasks import Task

#: What a path may pass on its way; see :func:`paths`.
THROUGH = ("direct", "mlps")

Receiver = tuple[str, int, "int | None", "str | None"]


@contextmanager
def _refused_by_name() -> Iterator[None]:
    try:
        yield
    except Unsupported as reason:
        raise ValueError(
            f"paths cannot be told apart on this model: {reason}. sweep and patch run on it"
        ) from reason


def paths(
    model: Any,
    task: Task,
    receivers: str | Sequence[Receiver],
    *,
    senders: str = "out",
    through: str = "direct",
    per_prompt: bool = False,
    executor: Executor | None = None,
    **options: Any,
) -> xr.DataArray:
    """Patch the path from each sender to the receivers, and leave all other paths corrupted.

    A sender's clean output changes what the receivers take in. With those inputs alone, the
    corrupted run is then run again (Wang et al., 2022).

    Args:
        model: a TransformerBridge.
        task: inputs, metric and baselines.
        receivers: "logits", or parts ``(kind, layer, head)`` with kind "q", "k" or "v", such as
            ``[("q", 9, 6)]``; ``None`` as head means all heads of that kind. All of them receive,
            at every position, or where a role of the task is named, ``("q", 9, 6, "END")``, there.
        senders: "out" for each head, "attn_out" or "mlp_out" for each layer.
        through: "direct" freezes every other attention and MLP output on the way; "mlps"
            recomputes the MLPs and freezes attention.
        per_prompt: whether to keep one value per prompt, along the dimension ``prompt``.
        executor: as for :func:`patching_demo.sweep`; prompts are shared out, not senders.
        options: of :class:`patching_demo.engine.runner.Options`, such as ``progress``.

    Returns:
        float32 ``([prompt,] layer[, head])`` of senders, in the metric's units; NaN where no path
        leads from a sender to a receiver.

    Raises:
        TypeError: if the model is no TransformerBridge, or the task none.
        ValueError: if a receiver, sender or ``through`` is unknown or does not exist, if hooks are
            attached to the model, or if its blocks do more than add what attention and MLP return.

    >>> from patching_demo import induction_task, load_model
    >>> model = load_model("attn-only-2l-demo")
    >>> task = induction_task(model, batch=2, seq_len=6)
    >>> paths(model, task, [("k", 1, 5)], progress=False).dims
    ('layer', 'head')
    """
    if senders not in SENDERS:
        raise ValueError(f"senders must be one of {', '.join(SENDERS)}, got {senders!r}")
    if through not in THROUGH:
        raise ValueError(f"through must be one of {', '.join(THROUGH)}, got {through!r}")
    check_tasks({"task": task})
    workers = Workers(model, executor)
    parts, n_layers, per_layer = workers.ask(_checked, task, receivers, senders)
    found = workers.spread(
        partial(_values, parts=parts, senders=senders, through=through),
        {"metric": task}, np.zeros((n_layers, per_layer)), np.zeros((n_layers, per_layer)),
        cut=any(place is not None for *_, place in parts), per_prompt=per_prompt, options=options,
    )["metric"]  # fmt: skip
    dims, coords = ["layer", "head"], {"layer": np.arange(n_layers)}
    if senders == "out":
        coords |= head_labels(n_layers, per_layer)
    else:
        found, dims = found[..., 0], ["layer"]
    facts = {
        "by": "path",
        "kind": senders,
        "receivers": ", ".join(map(_words, parts)) or "logits",
        "through": through,
    }
    return labelled(task, found, dims, coords, per_prompt=per_prompt, **facts)


def _checked(
    model: Any, task: Task, receivers: Any, senders: str
) -> tuple[list[Receiver], int, int]:
    """The receivers, how many layers there are, and how many senders each has."""
    checks.check_bridge(model)
    parts = _checked_receivers(model, task, receivers)
    return parts, model.cfg.n_layers, model.cfg.n_heads if senders == "out" else 1


@_refused_by_name()
@torch.no_grad()
def _values(
    model: Any,
    tasks: Mapping[str, Task],
    cells: np.ndarray,
    per_prompt: bool,
    options: Mapping[str, Any],
    *,
    parts: Sequence[Receiver],
    senders: str,
    through: str,
) -> dict[str, np.ndarray]:
    """Values ``[(prompt), layer, sender]``, NaN from where no path leads to a receiver."""
    ((name, task),) = tasks.items()
    asked = partial(_measured, model, parts=parts, senders=senders, through=through)
    if any(place is not None for *_, place in parts):
        shapes, order = [], []
        for prompts, own in in_shapes(task, options):
            shapes.append(asked(task.part(prompts), per_prompt=True, options=own))
            order += prompts
        found = np.concatenate(shapes, axis=1)[:, np.argsort(order)]
        found = found if per_prompt else found.mean(1)
    else:
        found = asked(task, per_prompt=per_prompt, options=options)
    values = np.full((*found.shape[1:], cells.size), np.nan, np.float32)
    values[..., : len(found)] = found.T
    return {name: values.reshape(*found.shape[1:], *cells.shape)}


def _measured(
    model: Any,
    task: Task,
    parts: Sequence[Receiver],
    senders: str,
    through: str,
    per_prompt: bool,
    options: Mapping[str, Any],
) -> np.ndarray:
    """The metric ``[sender, (prompt)]`` of all senders before the receivers, layer by layer."""
    model = task.model_of(model)
    with recorded(model) as clean:
        question = Question(model, {"metric": task}, [], per_prompt=per_prompt, options=options)
    frozen = FrozenModel(model, question.tokens)
    last = max((layer for _, layer, *_ in parts), default=model.cfg.n_layers)
    at = torch.arange(task.agree_until, task.corrupted_tokens.shape[1])
    at = at.to(task.corrupted_tokens.device)
    if not parts:  # Nothing but the read positions matters where no attention comes after.
        at = at[torch.isin(at, task.metric.positions.to(at.device))]
    resid = frozen.run.resid
    states = resid[0].new_zeros(0, len(resid[0]), len(at), resid[0].shape[-1])
    seen: list[dict[str, Tensor]] = []
    for layer in range(last + bool(parts)):
        here = [part for part in parts if part[1] == layer]
        if here and len(states):
            names = sorted({f"blocks.{layer}.{KINDS[kind].hook}" for kind, *_ in here})
            seen.append(frozen.received(layer, states, at, names))
        if layer == last:
            break
        if through == "direct":
            states = states + (resid[layer + 1] - resid[layer])[:, at]
        else:
            states = _in_calls(lambda s, at_=layer: frozen.step(at_, s, at, "mlps"), states)
        sent = frozen.sent(clean, senders, layer, at, through)
        states = torch.cat([states, sent])
    if parts:
        places = {name: int(there[0]) for name, (_, there) in task.roles.items()}
        return question.run(_cells(seen, parts, at, places))["metric"]
    scorer = Scorer(model, frozen.run, {"metric": question.metric(task)}, per_prompt)
    scorer.check_logits()
    scored = _in_calls(lambda s: _scored(scorer, s, at), states)
    if per_prompt:
        scored = scored[:, :: task.rows_per_prompt]
    return scored.float().cpu().numpy()


def _checked_receivers(model: Any, task: Task, receivers: Any) -> list[Receiver]:
    """The receivers as parts with a position, or None for all, each; none for the logits."""
    if isinstance(receivers, str) and receivers == "logits":
        return []
    parts = [receivers] if isinstance(receivers, tuple) else list(receivers)
    if not parts:
        raise ValueError("receivers is empty: give 'logits' or parts such as ('q', 9, 6)")
    checked = []
    for part in parts:
        if not isinstance(part, tuple) or len(part) not in (3, 4) or part[0] not in ("q", "k", "v"):
            raise ValueError(
                f"a receiver is a part (kind, layer, head) with kind 'q', 'k' or 'v', and a role "
                f"as fourth if it receives there alone, or all is 'logits'; got {part!r}"
            )
        kind, layer, head, place = checked_part(model, part)
        if place is not None and place not in task.roles:
            known = ", ".join(map(repr, task.roles)) or "none"
            raise ValueError(f"{part!r}: the task has no role {place!r}, only {known}")
        checked.append((kind, layer, head, place))
    return checked


def _in_calls(function: Any, states: Tensor) -> Any:
    """A function of ``[n, batch, token, ...]``, over as many n at a time as one call takes well."""
    size = max(1, CALL_TOKENS["cpu"] // max(1, states[0].shape[:2].numel())) if len(states) else 1
    if not len(states):
        return states
    return torch.cat([function(part) for part in states.split(size)])


def _cells(
    seen: Sequence[dict[str, Tensor]],
    parts: Sequence[Receiver],
    at: Tensor,
    places: Mapping[str, int],
) -> list[Cell]:
    """One run for each sender: each receiver is patched with what it takes in."""
    count = max((len(value) for values in seen for value in values.values()), default=0)
    cells = []
    for sender in range(count):
        patches = []
        for kind, layer, head, role in parts:
            where = tuple(at.tolist()) if role is None else (places[role],)
            name = f"blocks.{layer}.{KINDS[kind].hook}"
            for values in seen:
                if name in values and sender < len(values[name]):
                    own = values[name][sender]
                    patches.append(Patch(KINDS[kind], name, layer, where, head=head, values=own))
        cells.append(Cell(len(cells), in_order(patches)))
    return cells


def _words(part: Receiver) -> str:
    kind, layer, head, role = part
    text = f"L{layer} {kind}" if head is None else f"L{layer}H{head} {kind}"
    return text if role is None else f"{text} at {role}"


def _scored(scorer: Scorer, states: Tensor, at: Tensor) -> Tensor:
    """The metric ``[n, (batch)]`` of final streams ``[n, batch, token, d_model]``."""
    positions, resid = scorer.metrics["metric"].positions.to(at.device), scorer.run.resid[-1]
    final = resid.expand(len(states), *resid.shape).clone()
    final[:, :, at] = states
    rows = torch.arange(len(resid), device=at.device)[:, None]
    return scorer.of_streams("metric", final[:, rows, positions])
