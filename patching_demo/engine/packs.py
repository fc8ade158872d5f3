"""Patched runs side by side in one sequence, moving up through the blocks (ideas 1, 2 and 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patching_demo.engine.bridge import (
    Layout,
    Run,
    Unsupported,
    groups_of,
    hooked,
    run_block,
    run_block_rows,
)
from patching_demo.engine.cells import Cell, Patch, recomputed

# A block call is most efficient with a thousand tokens or more; a sequence longer than this spends
# its time on attention between runs that may not see each other.
SLOTS = 16
GROUPS_TRIED = 16  # Groups in which a run looks for room, the newest ones: more find little.
# With so few, what a call of smollm2-135m frees is kept, see keep_freed_memory.
CALL_TOKENS = {"cpu": 1792, "accelerator": 16384}


@contextmanager
def unforeseen(doing: str) -> Iterator[None]:
    """Turn whatever a model raises, lack of memory aside, into a reason for the plain loop."""
    try:
        yield
    except (Unsupported, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unsupported(f"{doing} raises {type(error).__name__}: {error}") from error


def keep_freed_memory() -> None:
    """Have the C library keep what one block call frees for the next, where it would not.

    glibc gives free memory back once there is twice the largest block that it mapped and then
    freed, at most 2 * 32 MiB (mallopt(3), M_MMAP_THRESHOLD). Each call would then wait for the same
    pages again, a tenth of its time. Blocks of that size, never written to, cost nothing; there
    are several, as the first may fit into memory freed before.
    """
    with suppress(RuntimeError):  # A limit on addresses.
        [torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu") for _ in range(16)]


class Pack:
    """Recomputed tokens of several patched runs, side by side (idea 5).

    Attributes:
        cells: the patched runs, in order of arrival.
        states: ``[group, batch, slot, d_model]``.
        slot_of: int64 ``[cell, pos]``, group * slots + slot, or -1 where not recomputed.
    """

    def __init__(self, run: Run, members: Sequence[tuple[Cell, Sequence[int]]]) -> None:
        self.run = run
        self.cells: list[Cell] = []
        self._tokens: list[tuple[int, int, int, int, int]] = []
        self._filled: list[int] = []
        self._patches: dict[int, list[tuple[int, Patch]]] = {}
        self._place(members)

    def _place(
        self, members: Sequence[tuple[Cell, Sequence[int]]], call_tokens: float = math.inf
    ) -> list[tuple[Cell, Sequence[int]]]:
        """Give each token of new members a slot, in a group with room for the whole run.

        Returns the members for which there is none, as one more group is too many for one call.
        """
        # All groups are as wide as the longest run needs: filling that width costs nothing more.
        batch = len(self.run.tokens)
        slots = int(min(SLOTS, call_tokens // batch))
        width = max([slots, *self._filled, *(len(positions) for _, positions in members)])
        left: list[tuple[Cell, Sequence[int]]] = []
        for cell, positions in members:
            groups, room = len(self._filled), width - len(positions)
            tried = range(max(0, groups - GROUPS_TRIED), groups)
            group = next((g for g in tried if self._filled[g] <= room), groups)
            if group == groups:
                if groups and (groups + 1) * width * batch > call_tokens:
                    left.append((cell, positions))
                    continue
                self._filled.append(0)
            for slot, position in enumerate(positions, start=self._filled[group]):
                self._tokens.append((len(self.cells), group, slot, position, positions[0]))
            self._filled[group] += len(positions)
            self.cells.append(cell)
        if len(left) < len(members):
            self._lay_out()
        return left

    def _lay_out(self) -> None:
        """Note where each token went, in tensors."""
        self._patches.clear()
        device = self.run.tokens.device
        placed = torch.tensor(self._tokens, dtype=torch.int64, device="cpu").T
        owner, group_of, slots, positions, start = placed
        shape = (len(self._filled), max(self._filled))
        self.flat = (group_of * shape[1] + slots).to(device)
        self.owner, self.position = owner.to(device), positions.to(device)

        def spread(value: Tensor, empty: int) -> Tensor:
            grid = torch.full(shape, empty, dtype=torch.int64, device="cpu")
            grid[group_of, slots] = value
            return grid.to(device)

        self.layout = Layout(
            positions=spread(positions, 0),
            owner=spread(owner, -1),
            start=spread(start, 0),
            prefix=int(start.max()),
        )
        every = len(self.cells), self.run.tokens.shape[1]
        slot_of = torch.full(every, -1, dtype=torch.int64, device="cpu")
        slot_of[owner, positions] = group_of * shape[1] + slots
        self.slot_of = slot_of.to(device)

    def fill(self, resid: Tensor) -> None:
        """Start every token from the corrupted residual stream ``[batch, pos, d_model]``."""
        # Also the slots not used, as some models divide by the size of a token.
        self.states = resid[:, self.layout.positions].transpose(0, 1).contiguous()

    def put(self, flat: Tensor, values: Tensor) -> None:
        """Write states ``[batch, token, d_model]`` at flat slots ``[token]``."""
        slots = self.layout.positions.shape[1]
        self.states[flat // slots, :, flat % slots] = values.transpose(0, 1).to(self.states.dtype)

    def at(self, flat: Tensor) -> Tensor:
        """States ``[*flat.shape, batch, d_model]`` at flat slots."""
        slots = self.layout.positions.shape[1]
        return self.states[flat // slots, :, flat % slots]

    def add(
        self, members: Sequence[tuple[Cell, Sequence[int]]], resid: Tensor, call_tokens: int
    ) -> list[tuple[Cell, Sequence[int]]]:
        """Take in more runs, which start from ``resid``; the others keep their slots and states.

        Returns those for which there is no room.
        """
        earlier, states = len(self._tokens), self.states
        left = self._place(members, call_tokens)
        if len(left) < len(members):
            self.fill(resid)
            self.states[: states.shape[0], :, : states.shape[2]] = states
            self.put(self.flat[earlier:], resid[:, self.position[earlier:]])
        return left

    def patches(self, layer: int, enters: str) -> list[tuple[int, Patch]]:
        """The patches at one place of a block, each with the number of its run."""
        if layer not in self._patches:
            self._patches[layer] = [
                (index, patch)
                for index, cell in enumerate(self.cells)
                for patch in cell.patches
                if patch.layer == layer
            ]
        return [(index, patch) for index, patch in self._patches[layer] if patch.enters == enters]

    def step(self, model: Any, layer: int, read: frozenset[int] | None = None) -> None:
        """Move every run through one block; in the last, only the positions that are read.

        Raises:
            Unsupported: if the block cannot be run on packs.
        """
        with unforeseen(f"running block {layer} on packed runs"):
            self._step(model, layer, read)

    def _step(self, model: Any, layer: int, read: frozenset[int] | None) -> None:
        if read is None:
            self.states = run_block(model, self.run, layer, self.layout, self.states)
            return
        positions, owner = self.layout.positions, self.layout.owner
        wanted = torch.isin(positions, torch.tensor(sorted(read), device=positions.device))
        wanted &= owner >= 0
        count = wanted.sum(dim=1)
        few = count <= wanted.shape[1] // 2
        for groups in (few.nonzero()[:, 0], (~few).nonzero()[:, 0]):
            if not len(groups):
                continue
            layout, states = groups_of(self.layout, groups), self.states[groups]
            if few[groups[0]]:
                # The rows of a group that reads fewer are filled up with other tokens of it.
                most = int(count[groups].max())
                slots = wanted[groups].long().argsort(dim=1, descending=True, stable=True)[:, :most]
                done = run_block_rows(model, self.run, layer, layout, states, slots)
                self.states[groups[:, None], :, slots] = done.transpose(1, 2)
            else:
                self.states[groups] = run_block(model, self.run, layer, layout, states)


def _longest_first(members: Mapping[Cell, range]) -> list[tuple[Cell, range]]:
    """Runs in the order in which to place them: shorter ones fill what is left of a group."""
    return sorted(members.items(), key=lambda member: -len(member[1]))


@dataclass
class Front:
    """The patched runs under way, all at the same layer (ideas 1, 2 and 5)."""

    model: Any
    run: Run
    clean: Mapping[str, Tensor]
    end: int
    call_tokens: int
    packs: list[Pack] = field(default_factory=list)

    def enter(
        self, layer: int, cells: Sequence[Cell], changed: Mapping[int, Any] | None = None
    ) -> None:
        """Let runs join at ``layer``, from the corrupted stream.

        ``changed`` has, by a cell's row, positions that differ and their states
        ``[batch, position, d_model]``.
        """
        members = _longest_first({cell: range(cell.start, self.end) for cell in cells})
        if self.packs:
            members = self.packs[-1].add(members, self.run.resid[layer], self.call_tokens)
        self.packs.extend(self._packed(members, layer))
        for pack in self.packs if changed else ():
            for index, cell in enumerate(pack.cells):
                if cell.row in changed:
                    positions, states = changed[cell.row]
                    flat = pack.slot_of[index, torch.as_tensor(positions, device="cpu")]
                    pack.put(flat, states)

    def _packed(self, members: Sequence[Any], layer: int) -> Iterator[Pack]:
        """New packs of runs, from the corrupted stream at ``layer``."""
        while members:
            pack = Pack(self.run, members[:1])
            pack.fill(self.run.resid[layer])
            members = pack.add(members[1:], self.run.resid[layer], self.call_tokens)
            yield pack

    def step(self, layer: int, read: frozenset[int] | None = None) -> None:
        """Move all runs through one block, those that are patched before or inside it included."""
        self.write(layer, "input")
        for pack in self.packs:
            with _patch_hooks(self.model, pack, self.clean, layer) as patched:
                # What is patched here may be elsewhere than what is read.
                pack.step(self.model, layer, None if patched else read)

    def write(self, layer: int, enters: str) -> None:
        """Patch the residual stream of the runs under way, before or after a block."""
        for pack in self.packs:
            if found := pack.patches(layer, enters):
                owner, position, _, _, values = _entries(found, self.clean, pack.flat.device)
                pack.put(pack.slot_of[owner, position], values)

    def patched_outputs(
        self, layer: int, cells: Sequence[Cell], read: frozenset[int] | None = None
    ) -> dict[int, Any]:
        """Run block ``layer`` on the tokens that a patch inside it changes.

        In the last block, of which only some positions are ``read``, the others are run no further
        than their keys and values, if nothing else is patched.

        Returns, per cell row, the positions and the residual stream after the block
        ``[batch, position, d_model]``.
        """
        whole: dict[Cell, range] = {}
        in_part: dict[Cell, range] = {}
        for cell in cells:
            positions = recomputed(cell, self.end)
            few = read is not None and len(read.intersection(positions)) <= len(positions) // 2
            keys_only = all(p.kind is not None and p.kind.spreads for p in cell.first)
            (in_part if few and keys_only else whole)[cell] = positions
        outputs: dict[int, Any] = {}
        for members, rows in ((whole, None), (in_part, read)):
            for pack in self._packed(_longest_first(members), layer):
                with _patch_hooks(self.model, pack, self.clean, layer):
                    pack.step(self.model, layer, rows)
                for index, cell in enumerate(pack.cells):
                    flat = pack.slot_of[index, torch.as_tensor(members[cell], device="cpu")]
                    outputs[cell.row] = members[cell], pack.at(flat).transpose(0, 1)
        return outputs


@contextmanager
def _patch_hooks(model: Any, pack: Pack, clean: Mapping[str, Tensor], layer: int) -> Iterator[bool]:
    """Patch the runs of a pack inside one block: one hook per hook name, all rows at once.

    Yields whether there is anything to patch.
    """
    by_name: dict[str, list[tuple[int, Patch]]] = {}
    for index, patch in pack.patches(layer, "hook"):
        by_name.setdefault(patch.hook_name, []).append((index, patch))
    with ExitStack() as hooks:
        for name, members in by_name.items():
            hooks.enter_context(hooked(model, name, _setter(pack, clean, members)))
        yield bool(by_name)


def _entries(
    members: Sequence[tuple[int, Patch]], clean: Mapping[str, Tensor], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What patches of one hook write: run, position, head and source ``[entry]``, and values.

    Head and source are -1 where there is none; values are ``[batch, entry, ...]``.
    """
    kind, name = members[0][1].kind, members[0][1].hook_name
    chosen: list[tuple[int, int, int, int]] = []
    parts: list[Tensor] = []

    def taken(values: Tensor, first: int) -> Tensor:
        at = torch.tensor(chosen[first:], dtype=torch.int64, device=values.device)
        if not kind.of_heads:
            return values[:, at[:, 1]].to(device)
        place = (
            (at[:, 1], at[:, 2]) if kind.position_axis < kind.head_axis else (at[:, 2], at[:, 1])
        )
        return values[(slice(None), *place)].to(device)

    def choose(index: int, patch: Patch) -> None:
        heads = [-1 if patch.head is None else patch.head]
        if patch.head is None and kind.of_heads:
            values = clean[name] if patch.values is None else patch.values
            heads = list(range(values.shape[kind.head_axis]))
        source = -1 if patch.source is None else patch.source
        chosen.extend((index, p, head, source) for head in heads for p in patch.positions)

    for index, patch in members:
        if patch.values is None:
            choose(index, patch)
    if chosen:
        parts.append(taken(clean[name], 0))
    for index, patch in members:
        if patch.values is not None:
            first = len(chosen)
            choose(index, patch)
            parts.append(taken(patch.values, first))
    owner, position, head, source = torch.tensor(chosen, dtype=torch.int64, device=device).T
    return owner, position, head, source, torch.cat(parts, dim=1)


def _setter(
    pack: Pack, clean: Mapping[str, Tensor], members: Sequence[tuple[int, Patch]]
) -> Callable[..., Tensor]:
    """A hook that writes the values of its patches into the slots of their runs."""
    groups, slots = pack.layout.positions.shape
    batch = len(pack.run.tokens)
    owner, position, head, source, values = _entries(members, clean, pack.flat.device)
    flat = pack.slot_of[owner, position]
    index = torch.stack([flat // slots, flat % slots, head])
    by_head = bool(head[0] >= 0)
    met: list[Any] = []

    def set_vectors(activation: Tensor, hook: Any = None) -> Tensor:
        if met and activation.shape[1] < slots:
            return activation  # The rows that are read: their keys and values are there already.
        met.append(hook)
        view = activation.view(groups, batch, *activation.shape[1:])
        group, slot, own = index.to(view.device)  # The block may be on another device.
        written = values.transpose(0, 1).to(view)
        if by_head:
            view[group, :, slot, own] = written
        else:
            view[group, :, slot] = written
        return activation

    def set_patterns(activation: Tensor, hook: Any = None) -> Tensor:
        view = activation.view(groups, batch, *activation.shape[1:])
        group, slot, _ = index
        sources = pack.layout.columns[group]  # [entry, column]
        seen = pack.layout.visible()[group, slot]
        patched = values.transpose(0, 1).gather(2, sources[:, None].expand(-1, batch, -1))
        replaced = seen & ((source[:, None] < 0) | (sources == source[:, None]))
        group, slot, own = index.to(view.device)
        current = view[group, :, own, slot]
        view[group, :, own, slot] = torch.where(
            replaced[:, None].to(view.device), patched.to(view), current
        )
        return activation

    return set_patterns if members[0][1].kind.name == "pattern" else set_vectors
