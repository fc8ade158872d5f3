"""The proof that a model's blocks work by position and not by slot, before any number is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import ge
from typing import Any

import torch
from torch import Tensor

from patching_demo.engine.bridge import Run, Unsupported
from patching_demo.engine.cells import Cell, spans
from patching_demo.engine.packs import SLOTS, Pack
from patching_demo.engine.scoring import Scorer, shaken, stranger, tolerance

BLOCKS_AGAIN = 8  # Blocks, evenly from first to last, of which what was proved is proved again.
SPANS_TRIED = 12  # Distinct (start, stop) of runs that control runs take; more find no more.


def prove(model: Any, run: Run, cells: Sequence[Cell], scorer: Scorer) -> Tensor:
    """Run unpatched control runs where patched ones would stand, and compare them.

    Returns how far rounding alone moves each metric over a pass: ``[metric, (batch)]``. It is
    measured on the control runs in types of few bits, and 0 elsewhere. What was proved of a model
    is proved again on one group of runs and some of the blocks only, for prompts and runs that are
    no longer, as long as its weights and modules are the same: what its code reads elsewhere may
    have changed.

    Raises:
        Unsupported: if a block computes anything for them that it does not in the corrupted run,
            or a position can attend to a later one.
    """
    try:
        return _proved(model, run, cells, scorer)
    except torch.OutOfMemoryError as error:
        raise Unsupported("there is no memory for control runs") from error


def _proved(model: Any, run: Run, cells: Sequence[Cell], scorer: Scorer) -> Tensor:
    for layer, arguments in enumerate(run.arguments):
        if misfit := _misfit(arguments.get("attention_mask")):
            raise Unsupported(f"block {layer} {misfit}")
    rising = _evenly(spans(cells, scorer.last_read + 1), SPANS_TRIED)
    groups = _crowded(rising)
    first, n_layers = min(cell.layer for cell in cells), len(run.resid) - 1
    few_bits = run.resid[0].element_size() <= 2
    # A change of its modules makes another isolated model, see there.
    proved = model.__dict__.setdefault("_proved", {}) if "_isolated" in vars(model) else {}
    tensors = (*model.parameters(), *model.buffers())
    weights = sum(w._version for w in tensors if not w.is_inference())
    one = _first_prompt(run)
    reach = (one.tokens.shape[1], len(rising[-1]), scorer.last_read, n_layers - first)
    reached = proved.setdefault((weights, len(one.tokens)), set())
    again = not few_bits and any(all(map(ge, earlier, reach)) for earlier in reached)
    pack = Pack(one, _members([*(groups[:1] if again else groups), rising[:1]]))
    # For blocks that go by the length of their input.
    alone = [] if again else [Pack(pack.run, _members([rising[:1]]))]
    read = torch.isin(pack.position, torch.tensor(sorted(scorer.read), device=pack.flat.device))
    for layer in _evenly(range(first, n_layers), BLOCKS_AGAIN if again else n_layers):
        for control in (pack, *alone):
            own = _start(control, layer)
            control.step(model, layer)
            _compare(control, layer, own)
    if read.any():
        own = _start(pack, n_layers - 1)
        pack.step(model, n_layers - 1, scorer.read)
        _compare(pack, n_layers - 1, read & own)
    reached.add(reach)
    if not few_bits:
        return torch.zeros_like(scorer.baseline)
    pack = Pack(run, _members(groups))
    pack.fill(run.resid[first])
    for layer in range(first, n_layers):
        pack.step(model, layer)
    return (scorer.score(pack) - scorer.baseline[:, None]).abs().amax(dim=1)


def _start(pack: Pack, layer: int) -> Tensor:
    """Start control runs off by a rounding, and the last of several as a stranger.

    Returns which tokens are not the stranger's: neither may matter to them.
    """
    pack.fill(shaken(pack.run.resid[layer], 16))
    strange = (pack.owner > 0) & (pack.owner == len(pack.cells) - 1)
    pack.put(pack.flat[strange], stranger(pack.run.resid[layer])[:, pack.position[strange]])
    return ~strange


def _evenly(every: Sequence[Any], most: int) -> list[Any]:
    """As many as allowed, evenly chosen, both ends included."""
    last = len(every) - 1
    chosen = {round(last * i / max(1, most - 1)) for i in range(most)}
    return [every[i] for i in sorted(chosen)]


def _crowded(rising: list[range]) -> list[list[range]]:
    """Three groups as full as they get: short runs first, long ones first, and a long one last."""
    longest = rising[-1]
    width = max(SLOTS, len(longest))
    return [
        _filled(rising, width),
        _filled(rising[::-1], width),
        [*_filled(rising, width - len(longest)), longest],
    ]


def _members(groups: Sequence[Sequence[range]]) -> list[tuple[Cell, range]]:
    return [(Cell(-1, ()), span) for group in groups for span in group]


def _filled(order: Sequence[range], room: int) -> list[range]:
    """Spans in this order, over and over, until none fits into the slots that are left."""
    out: list[range] = []
    while min(map(len, order)) <= room:
        for span in order:
            if len(span) <= room:
                out.append(span)
                room -= len(span)
    return out


def _compare(pack: Pack, layer: int, tokens: Tensor) -> None:
    """Hold some tokens of a pack to what the corrupted run has after the block.

    Each number is allowed a rounding of its own and of what the block added to its token, so that
    the few large numbers that streams have do not hide the others.
    """
    before, after = (
        pack.run.resid[at][:, pack.position[tokens]].transpose(0, 1).float()
        for at in (layer, layer + 1)
    )
    error = (pack.at(pack.flat[tokens]).float() - after).abs()
    added = (after - before).square().mean(dim=-1, keepdim=True).sqrt()
    excess = (error / (after.abs() + added).clamp(min=1e-30)).max()
    allowed = tolerance(pack.states.dtype)
    if not excess <= allowed:
        raise Unsupported(
            f"block {layer} computes something else for an unpatched run in a pack (relative error "
            f"{float(excess):.1e}, rounding explains {allowed:.0e}): it works by the place in its "
            "input or by what else is there, not by the position in the prompt"
        )


def _misfit(mask: Any) -> str | None:
    """What is wrong with a mask ``[..., dest, source]`` of a decoder, None if nothing is."""
    if not isinstance(mask, Tensor) or mask.ndim < 3 or mask.shape[-1] != mask.shape[-2]:
        return None
    seen = mask if mask.dtype == torch.bool else mask > -1e3
    if not seen.diagonal(dim1=-2, dim2=-1).any():
        return "has an attention mask that is not understood (it hides each position from itself)"
    later = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    return "lets a position attend to later ones" if seen[..., later].any() else None


def _first_prompt(run: Run) -> Run:
    """The run of the first prompt alone: the blocks are the same for all, and it costs less."""
    batch, n_pos = run.tokens.shape
    parts = [v for a in run.arguments for value in a.values() for v in _tensors(value)]
    if any(part.ndim > 1 and len(part) == n_pos and n_pos % batch == 0 for part in parts):
        return run  # Rows of prompts or of positions: there is no telling.

    def first(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(first(part) for part in value)
        if not isinstance(value, Tensor) or value.ndim < 2 or len(value) % batch:
            return value
        return value[: len(value) // batch]

    return replace(
        run,
        tokens=run.tokens[:1],
        logits=run.logits[:1],
        resid=[part[:1] for part in run.resid],
        keys=[part[:1] for part in run.keys],
        values=[part[:1] for part in run.values],
        arguments=[{name: first(value) for name, value in a.items()} for a in run.arguments],
    )


def _tensors(value: Any) -> list[Tensor]:
    return [
        part
        for part in (value if isinstance(value, tuple) else (value,))
        if isinstance(part, Tensor)
    ]
