"""Path patching: one component's clean output reaches chosen receivers, and nothing else.

After Wang et al. (2022) and Goldowsky-Dill et al. (2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
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
from patching_demo.engine.runner import Options
from patching_demo.engine.scoring import Scorer
from patching_demo.sweeps.executors import Workers
from patching_demo.sweeps.question import How, Question, ask, check_tasks, checked_part, head_labels
from patching_demo.tasks import Task

#: What a path may pass on its way; see :func:`paths`.
THROUGH = ("direct", "mlps")

Receiver = tuple[str, int, "int | None", "str | None"]
#: The layer and the head of each, lowest first; 0 as head where senders are whole layers.
Senders = Sequence[tuple[int, int]]


class Route(NamedTuple):
    """From which kind of senders, by what way, to which receivers; none of these: the logits."""

    senders: str
    through: str
    receivers: list[Receiver]


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
    parts, n_layers, n_heads = workers.ask(_checked, task, receivers)
    coords, shape = {"layer": np.arange(n_layers)}, [n_layers]
    if senders == "out":
        coords |= head_labels(n_layers, n_heads)
        shape.append(n_heads)
    numbers = np.arange(np.prod(shape), dtype=float).reshape(shape)
    layers = [layer for _, layer, *_ in parts] or [n_layers]
    numbers[max(layers) :] = np.nan
    facts = {
        "by": "path",
        "kind": senders,
        "receivers": ", ".join(map(_words, parts)) or "logits",
        "through": through,
    }
    cells = xr.DataArray(numbers, coords, ["layer", "head"][: len(shape)], attrs=facts)
    # A sender costs a patched run from the first receiver on, and next to nothing before.
    passes = np.full(shape, share_of_pass(min(layers), 0, n_layers, 1) + 1 / n_layers)
    measured = partial(_values, route=Route(senders, through, parts))
    by_role = any(role is not None for *_, role in parts)
    how = How("clean", per_prompt, by_role, Options.of(options))
    return workers.spread(measured, {"metric": task}, cells, passes, how)["metric"]


def _checked(model: Any, task: Task, receivers: Any) -> tuple[list[Receiver], int, int]:
    """The receivers, and how many layers and heads the model has.

    Receivers are parts with a position, or None for all, each; none stands for the logits.
    """
    checks.check_bridge(model)
    sizes = model.cfg.n_layers, model.cfg.n_heads
    if isinstance(receivers, str) and receivers == "logits":
        return [], *sizes
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
    return checked, *sizes


def _values(
    model: Any, tasks: Mapping[str, Task], numbers: np.ndarray, how: How, route: Route
) -> dict[str, np.ndarray]:
    """Values ``[(prompt), sender]`` of the senders of these numbers."""
    per_layer = model.cfg.n_heads if route.senders == "out" else 1
    senders = [divmod(number, per_layer) for number in numbers.tolist()]
    try:
        measured = partial(_measured, senders=senders, route=route)
        return ask(model, tasks, [], measured, how, listening=recorded)
    except Unsupported as reason:
        raise ValueError(
            f"paths cannot be told apart on this model: {reason}. sweep and patch run on it"
        ) from reason


@torch.no_grad()
def _measured(question: Question, senders: Senders, route: Route) -> dict[str, np.ndarray]:
    """The metric ``[(prompt), sender]``."""
    try:
        found = _frozen(question, senders, route)
    except Unsupported as reason:
        checks.warn_once(f"paths take the plain loop: {reason}")
        found = _plain(question, senders, route)
    if route.receivers:
        return question.run(_cells(found, len(senders), route.receivers, question.task))
    scored = found["metric"]
    if question.per_prompt:
        scored = question.task.over_rows(scored, -1)
    return {"metric": scored.float().cpu().numpy().T}


def _frozen(question: Question, senders: Senders, route: Route) -> dict[str, Tensor]:
    """What receivers take in, ``[sender, batch, pos, head, d_head]`` by hook.

    It is computed layer by layer, from what comes after each sender alone, where prompts differ.
    Where the receivers are the logits, it is the "metric", ``[sender, (batch)]``.

    Raises:
        Unsupported: as :class:`patching_demo.engine.frozen.FrozenModel`.
    """
    model, task = question.model, question.task
    frozen = FrozenModel(model, question.tokens)
    last = max((layer for _, layer, *_ in route.receivers), default=model.cfg.n_layers)
    at = torch.arange(task.agree_until, question.tokens.shape[1], device=question.tokens.device)
    if not route.receivers:  # Only the read positions matter where no attention comes after.
        at = at[torch.isin(at, task.metric.positions.to(at.device))]
    resid = frozen.run.resid
    states = resid[0].new_zeros(0, len(resid[0]), len(at), resid[0].shape[-1])
    found: dict[str, Tensor] = {}
    for layer in range(last + 1):
        here = sorted({_hook(part) for part in route.receivers if part[1] == layer})
        if here and len(states):
            found |= frozen.received(layer, states, at, here)
        if layer == last:
            break
        if route.through == "direct":
            states = states + (resid[layer + 1] - resid[layer])[:, at]
        else:
            states = _in_calls(partial(frozen.step, layer, at=at, through="mlps"), states)
        if heads := [head for own, head in senders if own == layer]:
            sent = frozen.sent(question.heard[layer], route.senders, layer, at, route.through)
            states = torch.cat([states, sent[heads]])
    if not route.receivers:
        scorer = Scorer(model, frozen.run, {"metric": question.metric(task)}, question.per_prompt)
        scorer.check_logits()
        found["metric"] = _in_calls(lambda part: _scored(scorer, part, at), states)
    return found


def _plain(question: Question, senders: Senders, route: Route) -> dict[str, Tensor]:
    """As :func:`_frozen`, by a whole forward pass for each sender."""
    tokens = question.task.clean_tokens.to(question.tokens.device)
    model = PlainPaths(question.model, tokens, question.tokens)
    names = {_hook(part): part[1] for part in route.receivers}
    found: dict[str, list[Tensor]] = {}
    for layer, head in tqdm(
        senders, disable=not question.options.progress, leave=False, unit="sender", delay=1.0
    ):
        seen: dict[str, Any] = {name: None for name, at in names.items() if at > layer}
        logits = model.logits(route.senders, layer, head, route.through, seen)
        if not route.receivers:
            seen["metric"] = question.metric(question.task)(logits)
        for name, value in seen.items():
            if value is None:
                raise Unsupported(f"the model does not call {name}")
            found.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in found.items()}


def _in_calls(function: Any, states: Tensor) -> Any:
    """A function of ``[n, batch, token, ...]``, over as many n at a time as one call takes well."""
    if not len(states):
        return states
    size = max(1, CALL_TOKENS["cpu"] // max(1, states[0].shape[:2].numel()))
    return torch.cat([function(part) for part in states.split(size)])


def _cells(
    found: Mapping[str, Tensor], count: int, receivers: Sequence[Receiver], task: Task
) -> list[Cell]:
    """One run for each sender: each receiver that comes after is patched with what it takes in."""
    every = tuple(range(task.agree_until, task.corrupted_tokens.shape[1]))
    cells = []
    for sender in range(count):
        patches = []
        for part in receivers:
            (kind, layer, head, role), name = part, _hook(part)
            where = every if role is None else (int(task.roles[role][1][0]),)
            if sender < len(found.get(name, ())):
                own = found[name][sender]
                patches.append(Patch(KINDS[kind], name, layer, where, head=head, values=own))
        cells.append(Cell(sender, in_order(patches)))
    return cells


def _hook(part: Receiver) -> str:
    return f"blocks.{part[1]}.{KINDS[part[0]].hook}"


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
