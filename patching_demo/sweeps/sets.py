"""Several activations at once: does a set of components bring the answer back?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from patching_demo.engine import checks
from patching_demo.engine.bridge import hook_point
from patching_demo.engine.cells import Cell, Patch, in_order
from patching_demo.engine.kinds import KINDS
from patching_demo.engine.runner import Options
from patching_demo.sweeps.executors import Workers
from patching_demo.sweeps.question import How, Part, Question, ask, check_tasks, checked_part
from patching_demo.tasks import Task


def patch(
    model: Any,
    task: Task,
    sets: Mapping[str, Sequence[Part]],
    *,
    source: Any = "clean",
    per_prompt: bool = False,
    executor: Executor | None = None,
    **options: Any,
) -> xr.DataArray:
    """Patch all parts of a set in one run, and measure, for each set.

    Args:
        model: a TransformerBridge.
        task: inputs, metric and baselines.
        sets: by name, parts ``(kind, layer)``, ``(kind, layer, head)`` or ``(kind, layer, head,
            position)``. A head is None where the kind has none, or for all heads; a position is a
            number, a label or one of the task's roles, and without it all positions are patched.
        source, per_prompt, executor, options: as for :func:`patching_demo.sweep`.

    Returns:
        float32 ``([prompt,] set)``, in the metric's units.

    Raises:
        ValueError: if there is no set, a part does not exist, or parts with and without roles ask
            for means.
        TypeError: as :func:`patching_demo.sweep`.

    >>> from patching_demo import induction_task, load_model
    >>> model = load_model("attn-only-2l-demo")
    >>> task = induction_task(model, batch=2, seq_len=6)
    >>> patch(model, task, {"two heads": [("out", 0, 1), ("out", 1, 5)]}).sizes
    Frozen({'set': 1})
    """
    if not isinstance(sets, Mapping) or not sets:
        raise ValueError(f"sets must be a mapping from names to parts, with at least one: {sets!r}")
    check_tasks({"metric": task})
    sets = {name: list(parts) for name, parts in sets.items()}
    every = [part for parts in sets.values() for part in parts]
    elsewhere = [part for part in every if not _at_role(task, part)]
    by_role = not task.same_lengths or len(elsewhere) < len(every)
    if by_role and source == "mean" and elsewhere:
        raise ValueError(
            f"{elsewhere[0]!r}: with source='mean', a part at a role is the mean over all prompts' "
            "places of it, and this part names no role: measure such sets in a call of their own"
        )
    numbers, facts = np.arange(len(sets), dtype=float), {"by": "set", "kind": ""}
    cells = xr.DataArray(numbers, {"set": list(sets)}, ["set"], attrs=facts)
    how = How(source, per_prompt, by_role, Options.of(options))
    measured = partial(_values, sets=list(sets.values()))
    workers = Workers(model, executor)
    return workers.spread(measured, {"metric": task}, cells, np.ones(len(sets)), how)["metric"]


def _at_role(task: Task, part: Any) -> bool:
    """Whether a part's position is a role; other slips are named where parts are checked."""
    place = part[3] if isinstance(part, tuple) and len(part) == 4 else None
    return isinstance(place, str) and place in task.roles


def _values(
    model: Any, tasks: Mapping[str, Task], numbers: np.ndarray, how: How, sets: Sequence[list[Part]]
) -> dict[str, np.ndarray]:
    """Values ``[(prompt), set]`` of the sets of these numbers."""
    checks.check_bridge(model)
    asked = [sets[number] for number in numbers]
    task = next(iter(tasks.values()))
    hooks = {_patch(model, task, part, None).hook_name for parts in asked for part in parts}

    def answer(question: Question) -> dict[str, np.ndarray]:
        cells = []
        for parts in asked:
            patches = [_patch(model, question.task, part, question) for part in parts]
            cells.append(Cell(len(cells), in_order(patches)))
        return question.run(cells)

    return ask(model, tasks, sorted(hooks), answer, how)


def complement(model: Any, parts: Sequence[Part]) -> list[Part]:
    """Every head's output and every MLP's that ``parts`` does not name.

    Args:
        model: a TransformerBridge.
        parts: ``("out", layer, head)`` and ``("mlp_out", layer)``.

    Raises:
        ValueError: if a part is another one, or does not exist.

    >>> from patching_demo import load_model
    >>> rest = complement(load_model("attn-only-2l-demo"), [("out", 0, 3)])
    >>> len(rest), ("out", 0, 3) in rest
    (15, False)
    """
    checks.check_bridge(model)
    named = set()
    for part in parts:
        if len(part) > 3 or part[0] not in ("out", "mlp_out"):
            raise ValueError(
                f"a complement is one of whole heads and MLPs, ('out', layer, head) and "
                f"('mlp_out', layer); got {part!r}"
            )
        named.add(checked_part(model, part)[:3])
    every: list[Part] = []
    for layer in range(model.cfg.n_layers):
        every += [("out", layer, head) for head in range(model.cfg.n_heads)]
        if hook_point(model, f"blocks.{layer}.hook_mlp_out") is not None:
            every.append(("mlp_out", layer))
    # A layer's heads are named by one, or all together by None.
    return [part for part in every if not named & {(*part, None)[:3], (*part[:2], None)}]


def _patch(model: Any, task: Task, part: Part, question: Question | None) -> Patch:
    name, layer, head, position = checked_part(model, part)
    kind, n_pos = KINDS[name], task.corrupted_tokens.shape[1]
    positions = tuple(range(n_pos))
    if isinstance(position, str) and position in task.roles:
        positions = (question.places[position] if question else 0,)
    elif question is not None and question.places and not question.aligned:
        raise ValueError(
            f"{part!r}: some pairs have other lengths, or roles at other places, so only roles "
            f"correspond: name one of {', '.join(map(repr, task.roles))} as position"
        )
    elif position is not None:
        if isinstance(position, str):
            if position not in task.position_labels:
                known = ", ".join(map(repr, [*task.roles, *task.position_labels]))
                raise ValueError(f"{part!r}: there is no position {position!r}, only {known}")
            position = task.position_labels.index(position)
        if isinstance(position, bool) or not isinstance(position, (int, np.integer)):
            raise ValueError(
                f"{part!r}: position must be a number, a label or a role, got {position!r}"
            )
        if not -n_pos <= position < n_pos:
            raise ValueError(f"{part!r}: there are only {n_pos} positions")
        positions = (int(position) % n_pos,)
    return Patch(kind, f"blocks.{layer}.{kind.hook}", layer, positions, head=head)
