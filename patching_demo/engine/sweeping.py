"""One pass over the blocks that serves every cell of a portion, and the proof that it is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patching_demo.engine.bridge import Run, Unsupported, logits_from_resid
from patching_demo.engine.cells import Cell
from patching_demo.engine.packs import Front, Pack
from patching_demo.engine.scoring import Scorer, tolerance


def sweep_cells(
    model: Any,
    run: Run,
    clean: Mapping[str, Tensor],
    cells: Sequence[Cell],
    scorer: Scorer,
    *,
    call_tokens: int,
    advance: Callable[[float], None] = lambda share: None,
    passenger: bool = False,
) -> Tensor:
    """Values ``[metric, cell, (batch)]`` of live cells, in one pass over the blocks.

    With ``passenger``, an unpatched run rides along and must arrive unchanged.

    Raises:
        Unsupported: if it does not, or if a block cannot be run on packs.
    """
    n_layers = len(run.resid) - 1
    end = scorer.last_read + 1
    front = Front(model, run, clean, end, call_tokens)
    rider = Cell(-1, None, "", 0, (min(cell.start for cell in cells),))
    nothing: tuple[tuple[int, ...], None] = ((), None)
    if passenger:
        front.enter(0, [rider], lambda cell: nothing)
    by_layer: dict[int, list[Cell]] = {}
    for cell in cells:
        # What is patched after the last position that is read has no slot and no effect.
        read = tuple(position for position in cell.positions if position < end)
        by_layer.setdefault(cell.layer, []).append(replace(cell, positions=read))

    def clean_stream(cell: Cell) -> tuple[tuple[int, ...], Tensor]:
        return cell.positions, clean[cell.hook_name][:, list(cell.positions)].to(run.tokens.device)

    work = sum((n_layers - cell.layer) * (end - cell.start) for cell in cells)
    for layer in range(0 if passenger else min(by_layer), n_layers):
        here = by_layer.get(layer, [])
        front.enter(layer, [c for c in here if c.kind.enters == "input"], clean_stream)
        inside = [c for c in here if c.kind.enters == "hook"]
        last = layer == n_layers - 1
        # A patch that changes all later positions joins before its block, except in the last, of
        # which the front runs the positions that are read only. Any other costs less on its own.
        aboard = [] if last else [c for c in inside if front.changed_inside(c).stop == end]
        apart = inside if last else [c for c in inside if front.changed_inside(c).stop < end]
        front.enter(layer, aboard, lambda cell: nothing)
        front.step(layer, scorer.read if last else None)
        outputs = front.patched_outputs(layer, apart)
        front.enter(layer + 1, apart, lambda cell, found=outputs: found[cell.row])
        front.enter(layer + 1, [c for c in here if c.kind.enters == "output"], clean_stream)
        done = sum(end - c.start for done in range(layer + 1) for c in by_layer.get(done, []))
        advance(done / work if work else 1.0)
    values: list[Tensor] = []
    order: list[int] = []
    for pack in front.packs:
        values.append(scorer.score(pack))
        order += [cell.row for cell in pack.cells]
    if passenger:
        _check_arrival(run, front.packs[0], scorer)
    place = {row: index for index, row in enumerate(order)}
    scored = torch.cat(values, dim=1)
    return scored[:, torch.tensor([place[cell.row] for cell in cells], device=scored.device)]


def _check_arrival(run: Run, pack: Pack, scorer: Scorer) -> None:
    """The unpatched run must end in the corrupted run's residual stream and logits."""
    positions = torch.tensor(
        [position for position in sorted(scorer.read) if position >= pack.cells[0].start],
        device=run.tokens.device,
    )
    arrived = pack.at(pack.slot_of[0, positions]).transpose(0, 1)
    expected = run.resid[-1][:, positions]
    logits = logits_from_resid(scorer.model, expected[:, -1:], run.logit_scale)
    for got, want, what in (
        (arrived, expected, "residual stream"),
        (logits, run.logits[:, positions[-1:]], "logits"),
    ):
        error = (got - want).abs().max() / want.abs().max().clamp(min=1e-30)
        if not error <= tolerance(run.resid[-1].dtype):
            raise Unsupported(
                f"an unpatched run comes back with other {what} (relative error {error:.1e})"
            )
