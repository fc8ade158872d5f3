"""Idea 3 of the engine, *skip what agrees*: what a patch may change, and what is read of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patching_demo.engine.bridge import hooked
from patching_demo.engine.cells import Cell, Patch
from patching_demo.engine.checks import HookNotLive, warn_once
from patching_demo.engine.kinds import Kind
from patching_demo.engine.scoring import tolerance

#: Said where clean and corrupted runs are the same.
NOTHING = (
    "there is nothing to patch: clean and corrupted activations are the same at every position "
    "(are the prompts the same?), so every cell is the corrupted baseline"
)


def differing_positions(model: Any, tokens: Tensor, cache: Any) -> tuple[int, ...]:
    """Where the inputs of the two runs differ in any prompt; everywhere if the cache cannot tell.

    An embedding is looked up, not computed, so it is compared bit for bit.
    """
    try:
        with torch.no_grad():
            clean, corrupted = cache["hook_embed"], model.embed(tokens)
        if clean.shape == corrupted.shape:
            differs = (clean.to(corrupted.device) != corrupted).any(dim=-1).any(dim=0)
            return tuple(differs.nonzero()[:, 0].tolist())
    except (AttributeError, KeyError, IndexError, TypeError, RuntimeError):
        pass
    return tuple(range(tokens.shape[1]))


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


def reaching(cell: Cell, last_layer: int, read: frozenset[int]) -> Cell | None:
    """The cell without the patches that reach no logit that the metric reads; None if none does."""
    last_read = max(read)

    def reaches(patch: Patch) -> bool:
        if not patch.positions or patch.positions[0] > last_read:
            return False
        if patch.source is not None and patch.source > patch.positions[-1]:
            return False  # A pattern entry in the future: zero in both runs.
        stays = patch.kind is not None and not patch.kind.spreads
        return patch.layer < last_layer or not stays or bool(read.intersection(patch.positions))

    kept = [
        replace(patch, positions=tuple(p for p in patch.positions if p <= last_read))
        for patch in cell.patches
        if reaches(patch)
    ]
    return replace(cell, patches=tuple(kept)) if kept else None


class Survey:
    """What the swept hooks are given during one forward pass of the corrupted prompts.

    It costs no pass of its own: it listens to the one that a sweep starts with. Attributes:
        moved: per hook name, whether clean and corrupted differ at a position: bool ``[pos]``.
        far: the same, but only where they differ by more than rounding.
    """

    def __init__(self, clean: Mapping[str, Tensor]) -> None:
        self.clean = clean
        self.moved: dict[str, Tensor] = {}
        self.far: dict[str, Tensor] = {}

    @contextmanager
    def listening(self, model: Any) -> Iterator[Survey]:
        """Listen while the model runs.

        Raises:
            HookNotLive: on leaving, if a swept hook was not called.
            ValueError: if it has another shape.
        """
        with ExitStack() as stack:
            for name in self.clean:
                stack.enter_context(hooked(model, name, self._listener(name)))
            yield self
        for name in self.clean:
            if name not in self.moved:
                raise HookNotLive(name, called=False)

    def _listener(self, name: str) -> Callable[..., None]:
        return lambda activation, hook=None: self.compare(name, activation)

    def compare(self, name: str, activation: Tensor) -> None:
        """Note where a corrupted activation differs from the clean one.

        Raises:
            ValueError: if it has another shape, or is infinite where the other is not.
        """
        clean = self.clean[name].to(activation.device)
        if clean.shape != activation.shape:
            raise ValueError(
                f"{name!r} in the clean cache has shape {tuple(clean.shape)}, in the corrupted "
                f"run it has {tuple(activation.shape)}: the cache must come from this model"
            )
        position = 2 if name.endswith(("hook_pattern", "hook_attn_scores")) else 1
        others = [axis for axis in range(clean.ndim) if axis != position]
        moved = clean != activation
        # Scores of what is masked are -inf in both runs.
        apart = torch.where(moved, clean - activation, 0).abs()
        if not torch.isfinite(apart).all():
            raise ValueError(f"{name!r} in the clean cache holds NaN or infinity")
        allowed = 0.1 * tolerance(clean.dtype) * clean[clean.isfinite()].abs().max()
        self.moved[name] = moved.amax(dim=others).cpu()
        self.far[name] = (apart > allowed).amax(dim=others).cpu()

    def narrowed(self, cells: Sequence[Cell], differing: Sequence[int]) -> list[Cell]:
        """Cells with only the positions that the patch can change (idea 3 of the engine).

        That nothing changes before the first input that differs holds for the cache of a clean
        run, not for one that was edited (averaged over prompts, for instance). So it is believed
        only where the activations themselves agree.
        """
        known: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}

        def changes(patch: Patch) -> tuple[int, ...]:
            if patch.kind is None or patch.values is not None:
                return patch.positions
            key = patch.hook_name, patch.positions
            if key not in known:
                claimed = changed_positions(patch.kind, patch.layer, patch.positions, differing)
                moved, far = self.moved[patch.hook_name], self.far[patch.hook_name]
                known[key] = tuple(
                    p for p in patch.positions if moved[p] and (p in claimed or far[p])
                )
            return known[key]

        out = []
        for cell in cells:
            found = [changes(patch) for patch in cell.patches]
            if len(found) > 1:  # A patch may change what another one replaces, from its start on.
                start = min((positions[0] for positions in found if positions), default=math.inf)
                found = [tuple(p for p in patch.positions if p >= start) for patch in cell.patches]
            if any(f != patch.positions for f, patch in zip(found, cell.patches, strict=True)):
                patches = [
                    replace(patch, positions=positions)
                    for patch, positions in zip(cell.patches, found, strict=True)
                    if positions
                ]
                cell = replace(cell, patches=tuple(patches))
            out.append(cell)
        return out

    def warn_if_nothing_moves(self, differing: Sequence[int]) -> None:
        """Warn once if clean and corrupted activations are the same everywhere."""
        apart = self.moved if differing else self.far
        if not any(bool(moved.any()) for moved in apart.values()):
            warn_once(NOTHING)
