"""Path patching: one component's clean output reaches chosen receivers, and nothing else.

After Wang et al. (2022) and Goldowsky-Dill et al. (2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from patching_demo.engine import checks
from patching_demo.engine.bridge import Unsupported
from patching_demo.engine.cells import Cell, Patch, in_order, share_of_pass
from patching_demo.engine.frozen import SENDERS, FrozenModel, PlainPaths, recorded
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


class Route(NamedTuple):
    """From which kind of senders, by what way, to which receivers; none of these: the logits."""

    senders: str
    through: str
    receivers: list[Receiver]


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
        executor: as for :func:`patching_demo.sweep`.
        options: of :class:`patching_demo.engine.runner.Options`, such as ``progress``.

    Returns:
        float32 ``([prompt,] layer[, head])`` of senders, in the metric's units; NaN where no path
        leads from a sender to a receiver.

    Raises:
        TypeError: if the model is no TransformerBridge, or the task none.
        ValueError: if a receiver, sender or ``through`` is unknown or does not exist, or if a
            block has no attention with an output projection.

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
    last = max((layer for _, layer, *_ in parts), default=n_layers)
    cells = np.arange(n_layers * per_layer, dtype=float).reshape(n_layers, per_layer)
    cells[last:] = np.nan
    # A sender costs a patched run from the first receiver on, and next to nothing before.
    first = min((layer for _, layer, *_ in parts), default=n_layers)
    passes = np.full(cells.shape, share_of_pass(first, 0, n_layers, 1) + 1 / n_layers)
    found = workers.spread(
        partial(_values, route=Route(senders, through, parts)),
        {"metric": task}, cells, passes,
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
    route: Route,
) -> dict[str, np.ndarray]:
    """Values ``[(prompt), layer, sender]``, NaN from where no path leads to a receiver."""
    ((name, task),) = tasks.items()
    asked = np.isfinite(cells)
    measured = partial(_measured, model, asked=asked, route=route)
    if any(place is not None for *_, place in route.receivers):
        shapes, order = [], []
        for prompts, own in in_shapes(task, options):
            shapes.append(measured(task.part(prompts), per_prompt=True, options=own))
            order += prompts
        found = np.concatenate(shapes, axis=1)[:, np.argsort(order)]
        found = found if per_prompt else found.mean(1)
    else:
        found = measured(task, per_prompt=per_prompt, options=options)
    values = np.full((*found.shape[1:], *cells.shape), np.nan, np.float32)
    values[..., asked] = found.T
    return {name: values}


def _measured(
    model: Any,
    task: Task,
    asked: np.ndarray,
    route: Route,
    per_prompt: bool,
    options: Mapping[str, Any],
) -> np.ndarray:
    """The metric ``[sender, (prompt)]`` of the senders asked for, layer by layer."""
    model = task.model_of(model)
    with recorded(model) as clean:
        question = Question(model, {"metric": task}, [], per_prompt=per_prompt, options=options)
    try:
        taken, scored = _frozen(question, clean, asked, *route)
    except Unsupported as reason:
        checks.warn_once(f"paths take the plain loop: {reason}")
        taken, scored = _plain(question, asked, *route)
    if route.receivers:
        return question.run(_cells(taken, route.receivers, task))["metric"]
    if per_prompt:
        scored = task.over_rows(scored, -1)
    return scored.float().cpu().numpy()


#: What receivers take in, ``[sender, batch, pos, head, d_head]`` by hook, for each layer of them;
#: and the metric ``[sender, (batch)]``, where the receivers are the logits.
Found = tuple[list[dict[str, Tensor]], "Tensor | None"]


def _frozen(
    question: Question,
    clean: Sequence[Any],
    asked: np.ndarray,
    senders: str,
    through: str,
    parts: Sequence[Receiver],
) -> Found:
    """By what comes after each sender alone, and where prompts differ.

    Raises:
        Unsupported: as :class:`patching_demo.engine.frozen.FrozenModel`.
    """
    model, task = question.model, question.task
    frozen = FrozenModel(model, question.tokens)
    last = max((layer for _, layer, *_ in parts), default=model.cfg.n_layers)
    at = torch.arange(task.agree_until, question.tokens.shape[1], device=question.tokens.device)
    if not parts:  # Nothing but the read positions matters where no attention comes after.
        at = at[torch.isin(at, task.metric.positions.to(at.device))]
    resid = frozen.run.resid
    states = resid[0].new_zeros(0, len(resid[0]), len(at), resid[0].shape[-1])
    taken: list[dict[str, Tensor]] = []
    for layer in range(last + bool(parts)):
        here = [part for part in parts if part[1] == layer]
        if here and len(states):
            names = sorted({f"blocks.{layer}.{KINDS[kind].hook}" for kind, *_ in here})
            taken.append(frozen.received(layer, states, at, names))
        if layer == last:
            return taken, None
        if through == "direct":
            states = states + (resid[layer + 1] - resid[layer])[:, at]
        else:
            states = _in_calls(lambda s, at_=layer: frozen.step(at_, s, at, "mlps"), states)
        if asked[layer].any():
            sent = frozen.sent(clean[layer], senders, layer, at, through)
            states = torch.cat([states, sent[torch.as_tensor(asked[layer], device=sent.device)]])
    scorer = Scorer(model, frozen.run, {"metric": question.metric(task)}, question.per_prompt)
    scorer.check_logits()
    return [], _in_calls(lambda s: _scored(scorer, s, at), states)


def _plain(
    question: Question, asked: np.ndarray, senders: str, through: str, parts: Sequence[Receiver]
) -> Found:
    """By a whole forward pass for each sender."""
    tokens = question.task.clean_tokens.to(question.tokens.device)
    model = PlainPaths(question.model, tokens, question.tokens)
    layers = sorted({layer for _, layer, *_ in parts})
    names = {f"blocks.{layer}.{KINDS[kind].hook}": layer for kind, layer, *_ in parts}
    taken: dict[int, dict[str, list[Tensor]]] = {layer: {} for layer in layers}
    scored: list[Tensor] = []
    sent = [tuple(map(int, sender)) for sender in np.argwhere(asked)]
    for layer, head in tqdm(
        sent, disable=not question.options.progress, leave=False, unit="sender", delay=1.0
    ):
        seen: dict[str, Any] = {name: None for name, at in names.items() if at > layer}
        logits = model.logits(senders, layer, head, through, seen)
        for name, activation in seen.items():
            if activation is None:
                raise Unsupported(f"the model does not call {name}")
            taken[names[name]].setdefault(name, []).append(activation)
        if not parts:
            scored.append(question.metric(question.task)(logits))
    stacked = [{name: torch.stack(v) for name, v in taken[layer].items()} for layer in layers]
    return stacked, None if parts else torch.stack(scored)


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


def _cells(seen: Sequence[dict[str, Tensor]], parts: Sequence[Receiver], task: Task) -> list[Cell]:
    """One run for each sender: each receiver is patched with what it takes in."""
    count = max((len(value) for values in seen for value in values.values()), default=0)
    every = tuple(range(task.agree_until, task.corrupted_tokens.shape[1]))
    places = {name: int(there[0]) for name, (_, there) in task.roles.items()}
    cells = []
    for sender in range(count):
        patches = []
        for kind, layer, head, role in parts:
            where = every if role is None else (places[role],)
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
