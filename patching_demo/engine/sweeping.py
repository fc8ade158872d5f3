"""One pass over the blocks that serves every cell of a portion."""

from __future__ import annotations

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
    by_layer: dict[int, list[Cell]] = {}
    for cell in cells:
        by_layer.setdefault(cell.layer, []).append(cell)
    work = sum((n_layers - cell.layer) * (end - cell.start) for cell in cells)
    for layer in range(min(by_layer), n_layers):
        here = {enters: [] for enters in ("input", "hook", "output")}
        for cell in by_layer.get(layer, []):
            here[cell.patches[0].enters].append(cell)
        # A patch that changes all later positions joins before its block, except in the last, of
        # which the front runs the positions that are read only. Any other costs less on its own.
        last = layer == n_layers - 1
        joins = {c.row: not last and recomputed(c, end).stop == end for c in here["hook"]}
        apart = [cell for cell in here["hook"] if not joins[cell.row]]
        front.enter(layer, here["input"] + [c for c in here["hook"] if joins[c.row]])
        front.step(layer, scorer.read if last else None)
        outputs = front.patched_outputs(layer, apart)
        front.enter(layer + 1, apart, outputs)
        front.enter(layer + 1, here["output"])
        front.write(layer, "output")
        done = sum(end - c.start for done in range(layer + 1) for c in by_layer.get(done, []))
        advance(done / work if work else 1.0)
    values: list[Tensor] = []
    order: list[int] = []
    slots: list[int] = []
    for pack in front.packs:
        values.append(scorer.score(pack))
        order += [cell.row for cell in pack.cells]
        slots += (pack.slot_of.amax(dim=1) % pack.layout.positions.shape[1]).tolist()
    place = {row: index for index, row in enumerate(order)}
    scored = torch.cat(values, dim=1)
    wanted = torch.tensor([place[cell.row] for cell in cells], device=scored.device)
    return scored[:, wanted], dict(zip(order, slots, strict=True))
