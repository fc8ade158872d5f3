"""What one patched run changes, and whether anything that is read depends on it.

Idea 3 of the engine, *skip what agrees*, stands here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from patching_demo.engine.kinds import Kind


@dataclass(frozen=True)
class Cell:
    """One patched run: one clean activation copied into the corrupted run.

    Attributes:
        row: where its value goes in the result.
        kind: what is patched, None if the engine does not know it.
        hook_name: the full hook name, layer included.
        layer: the block.
        positions: the patched positions (destinations for a pattern), ascending.
        head: the patched head, None for all of the activation.
        source: for one entry of a pattern, the source position.
        setter: the patch setter that does this patch in the plain loop.
        index: what the setter takes, layer first.
    """

    row: int
    kind: Kind | None
    hook_name: str
    layer: int
    positions: tuple[int, ...]
    head: int | None = None
    source: int | None = None
    setter: Callable[..., Tensor] | None = None
    index: tuple[int, ...] = ()

    @property
    def start(self) -> int:
        """The first position that may differ from the corrupted run."""
        return self.positions[0]

    def describe(self) -> str:
        """The cell in words, for messages."""
        return f"{self.hook_name}, index {list(self.index)}"


def differing_positions(clean: Tensor, corrupted: Tensor) -> tuple[int, ...]:
    """The positions at which two embeddings ``[batch, pos, d_model]`` differ in any prompt.

    An embedding is looked up, not computed, so it is compared bit for bit.
    """
    return tuple((clean != corrupted).any(dim=-1).any(dim=0).nonzero()[:, 0].tolist())


def changed_positions(
    kind: Kind, layer: int, positions: Sequence[int], differing: Sequence[int]
) -> tuple[int, ...]:
    """Of the positions that a patch writes to, those it may change (idea 3).

    Nothing changes before the first differing input. What block 0 computes from its input
    position by position changes at the differing positions only.
    """
    if layer == 0 and kind.at_input:
        return tuple(position for position in positions if position in differing)
    first = min(differing, default=positions[-1] + 1)
    return tuple(position for position in positions if position >= first)


def recomputed(cell: Cell, end: int) -> range:
    """The positions, of those before ``end``, that differ after the block of the patch."""
    inside = cell.kind is not None and cell.kind.enters == "hook" and not cell.kind.spreads
    return range(cell.start, min(end, cell.positions[-1] + 1) if inside else end)


def spans(cells: Sequence[Cell], end: int) -> list[range]:
    """The positions that some patched run recomputes at a time, shortest and latest first."""
    found = {span for cell in cells for span in (range(cell.start, end), recomputed(cell, end))}
    return sorted(found, key=lambda span: (len(span), -span.start))


def is_dead(cell: Cell, last_read: int, last_layer: int, read: frozenset[int]) -> bool:
    """Whether a patch cannot reach any logit that the metric reads."""
    if not cell.positions or cell.start > last_read:
        return True
    if cell.source is not None and cell.source > cell.start:
        return True  # A pattern entry in the future: zero in both runs.
    stays = cell.kind is not None and not cell.kind.spreads
    return cell.layer == last_layer and stays and not read.intersection(cell.positions)
