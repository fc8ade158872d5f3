"""One patched run, and where it starts."""

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


def recomputed(cell: Cell, end: int) -> range:
    """The positions, of those before ``end``, that differ after the block of the patch."""
    inside = cell.kind is not None and cell.kind.enters == "hook" and not cell.kind.spreads
    return range(cell.start, min(end, cell.positions[-1] + 1) if inside else end)


def spans(cells: Sequence[Cell], end: int) -> list[range]:
    """The positions that some patched run recomputes at a time, shortest and latest first."""
    found = {span for cell in cells for span in (range(cell.start, end), recomputed(cell, end))}
    return sorted(found, key=lambda span: (len(span), -span.start))
