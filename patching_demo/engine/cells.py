"""What is patched in one run: a set of patches, each with its values, and where it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patching_demo.engine.kinds import Kind


@dataclass(frozen=True, eq=False)
class Patch:
    """One activation that is replaced, at some positions, in the corrupted run.

    Attributes:
        kind: what is patched, None if the engine does not know it.
        hook_name: the full hook name, layer included.
        layer: the block.
        positions: the patched positions (destinations for a pattern), ascending.
        head: the patched head, None for all of the activation.
        source: for one entry of a pattern, the source position.
        setter: the patch setter of the plain loop; without one, the patch writes by itself.
        index: what the setter takes, layer first.
        values: what is written, in the shape of the activation; the clean activation if None.
    """

    kind: Kind | None
    hook_name: str
    layer: int
    positions: tuple[int, ...]
    head: int | None = None
    source: int | None = None
    setter: Callable[..., Tensor] | None = None
    index: tuple[int, ...] = ()
    values: Tensor | None = None

    @property
    def enters(self) -> str:
        """Where in its block it acts; see :class:`patching_demo.engine.kinds.Kind`."""
        return self.kind.enters if self.kind is not None else "hook"

    def write(self, activation: Tensor, clean: Tensor | None) -> Tensor:
        """Patch a whole activation in place, as the plain loop does."""
        values = (clean if self.values is None else self.values).to(activation.device)
        if self.setter is not None:
            written = self.setter(activation, list(self.index), values)
            return activation if written is None else written  # It may write in place.
        at = torch.tensor(self.positions, dtype=torch.int64, device=activation.device)
        place: list[Any] = [slice(None)] * activation.ndim
        place[self.kind.position_axis] = at
        if self.head is not None:
            place[self.kind.head_axis] = torch.full_like(at, self.head)
        if self.source is not None:
            place[self.kind.axes.index("source")] = torch.full_like(at, self.source)
        activation[tuple(place)] = values[tuple(place)].to(activation.dtype)
        return activation

    def __str__(self) -> str:
        if self.index:
            return f"{self.hook_name}, index {list(self.index)}"
        head = "" if self.head is None else f" of head {self.head}"
        first, last = self.positions[0], self.positions[-1]
        run = self.positions == tuple(range(first, last + 1)) and last > first
        where = f"{first} to {last}" if run else list(self.positions)
        return f"{self.hook_name}{head} at positions {where}"


@dataclass(frozen=True, eq=False)
class Cell:
    """One patched run: a set of patches, in the order in which a forward pass meets them.

    ``row`` is where its value goes in the result.
    """

    row: int
    patches: tuple[Patch, ...]

    @property
    def layer(self) -> int:
        """The first block that is patched."""
        return self.patches[0].layer

    @property
    def first(self) -> tuple[Patch, ...]:
        """The patches with which the run leaves the corrupted one, all at one place in a block."""
        lead = self.patches[0]
        return tuple(p for p in self.patches if (p.layer, p.enters) == (lead.layer, lead.enters))

    @property
    def start(self) -> int:
        """The first position that may differ from the corrupted run."""
        return min(patch.positions[0] for patch in self.patches)

    def describe(self) -> str:
        """The cell in words, for messages."""
        return " and ".join(map(str, self.patches[:3])) + ", ..." * (len(self.patches) > 3)


_ORDER = ("input", "hook", "output")


def in_order(patches: Iterable[Patch]) -> tuple[Patch, ...]:
    """Patches in the order in which a forward pass meets them."""
    return tuple(sorted(patches, key=lambda patch: (patch.layer, _ORDER.index(patch.enters))))


def recomputed(cell: Cell, end: int) -> range:
    """The positions, of those before ``end``, that differ after the first patched block."""
    first = cell.first
    start = min(patch.positions[0] for patch in first)
    if all(p.enters == "hook" and p.kind is not None and not p.kind.spreads for p in first):
        return range(start, min(end, max(patch.positions[-1] for patch in first) + 1))
    return range(start, end)


def share_of_pass(
    layer: Any, start: Any, n_layers: int, n_pos: float, end: float | None = None
) -> Any:
    """What a run from a layer and position on costs, up to ``end``, in whole forward passes."""
    length = (n_pos if end is None else end) - start
    return (1 - layer / n_layers) * np.clip(length / n_pos, 0, 1)


def spans(cells: Sequence[Cell], end: int) -> list[range]:
    """The positions that some patched run recomputes at a time, shortest and latest first."""
    found = {span for cell in cells for span in (range(cell.start, end), recomputed(cell, end))}
    return sorted(found, key=lambda span: (len(span), -span.start))
