"""One pass over the blocks that serves every cell of a portion."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from patching_demo.engine.bridge import Run
from patching_demo.engine.cells import Cell, recomputed
from patching_demo.engine.packs import Front
from patching_demo.engine.scoring import Scorer


def sweep_cells(
    model: Any,
    run: Run,
    clean: Mapping[str, Tensor],
    cells: Sequence[Cell],
    scorer: Scorer,
    *,
    call_tokens: int,
    advance: Callable[[float], None] = lambda share: None,
) -> tuple[Tensor, dict[int, int]]:
    """Values ``[metric, cell, (batch)]`` of live cells, in one pass over the blocks.

    And, for each cell's row, the last slot that its run had within its group.

    Raises:
        Unsupported: if a block cannot be run on packs.
    """
    n_layers = len(run.resid) - 1
    end = scorer.last_read + 1
    front = Front(model, run, clean, end, call_tokens)
    starting: dict[tuple[int, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        starting[cell.layer, cell.patches[0].enters].append(cell)
    # Scoring counts as one more block: a sweep that is stopped before is not shown as done.
    work = sum((n_layers + 1 - cell.layer) * (end - cell.start) for cell in cells)
    moving = done = 0
    for layer in range(min(cell.layer for cell in cells), n_layers):
        before, inside, after = (starting[layer, enters] for enters in ("input", "hook", "output"))
        # A patch that changes all later positions joins before its block, except in the last, of
        # which the front runs the positions that are read only. Any other costs less on its own.
        last = layer == n_layers - 1
        joins = {c.row: not last and recomputed(c, end).stop == end for c in inside}
        apart = [cell for cell in inside if not joins[cell.row]]
        front.enter(layer, before + [cell for cell in inside if joins[cell.row]])
        read = scorer.read if last else None
        front.step(layer, read)
        outputs = front.patched_outputs(layer, apart, read)
        front.enter(layer + 1, apart, outputs)
        front.enter(layer + 1, after)
        front.write(layer, "output")
        moving += sum(end - cell.start for cell in before + inside + after)
        done += moving
        advance(done / work if work else 1.0)
    values: dict[int, Tensor] = {}
    slots: dict[int, int] = {}
    for pack in front.packs:
        rows = [cell.row for cell in pack.cells]
        last_slots = pack.slot_of.amax(dim=1) % pack.layout.positions.shape[1]
        values.update(zip(rows, scorer.score(pack).unbind(1), strict=True))
        slots.update(zip(rows, last_slots.tolist(), strict=True))
    return torch.stack([values[cell.row] for cell in cells], dim=1), slots
