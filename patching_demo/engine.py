"""Exact activation-patching sweeps, many patched runs at a time.

A plain sweep runs one whole forward pass per cell of its result. Nearly all of that work has a
known answer, because a causal decoder computes each position from earlier ones only, layer by
layer. Five ideas remove it, and each has a name here:

1. *Start at the layer*: a patch at layer l changes nothing before l, so a patched run starts
   from the corrupted run's residual stream there (:meth:`Front.enter`).
2. *Start at the position*: it changes nothing at earlier positions, whose keys and values come
   from the corrupted run (``start`` of a :class:`Cell`, ``prefix`` of a ``Layout``).
3. *Skip what agrees*: where clean and corrupted inputs are the same so far, or nothing that the
   metric reads comes later, a patch does nothing at all (:func:`is_dead`).
4. *Read only what the metric reads*: logits are computed at its positions, and for its tokens if
   it names them (:class:`Scorer`).
5. *Pack*: the patched runs stand side by side in one sequence, under a mask that lets each see
   only itself and the shared prefix, and runs that start at later layers join the pack as it
   moves up through the blocks (:class:`Pack`, :class:`Front`).

None is an approximation. One run without any patch rides in the first pack: if it does not
arrive as it left, the model does something that the five ideas do not allow for, and the sweep
takes the plain loop. Related work: the field's plain loop is ``transformer_lens.patching``; tree
masks over a shared prefix are known from speculative decoding (SpecInfer, Miao et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from patching_demo.bridge import (
    Layout,
    Run,
    Unsupported,
    groups_of,
    hooked,
    logits_from_resid,
    run_block,
    run_block_rows,
    some_logits_from_resid,
)

# A block call is most efficient with a thousand tokens or more; a sequence longer than this spends
# its time on attention between runs that may not see each other.
SLOTS = 16
GROUPS_TRIED = 16  # Groups in which a run looks for room, the newest ones: more find little.
CALL_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class Site:
    """An activation that can be patched.

    Attributes:
        activation: its name to ``transformer_lens.utilities.get_act_name``.
        at_input: whether it is a function of the block's input at the same position alone.
        spreads: whether a patch at one position reaches later positions within its own block
            (keys and values do, a query or an output does not).
        enters: "hook" if the block must run to patch it, "input" if it is the residual stream a
            block starts from, "output" if it is the one a block ends with.
    """

    activation: str
    at_input: bool = False
    spreads: bool = False
    enters: str = "hook"


SITES = {
    site.activation: site
    for site in (
        Site("resid_pre", at_input=True, spreads=True, enters="input"),
        Site("resid_mid"),
        Site("resid_post", enters="output"),
        Site("attn_out"),
        Site("mlp_out"),
        Site("q", at_input=True),
        Site("k", at_input=True, spreads=True),
        Site("v", at_input=True, spreads=True),
        Site("z"),
        Site("pattern"),
    )
}


@dataclass(frozen=True)
class Cell:
    """One patched run: one clean activation copied into the corrupted run.

    Attributes:
        row: where its value goes in the result.
        site: what is patched.
        hook_name: the full hook name, layer included.
        layer: the block.
        positions: the patched positions (destinations for a pattern), ascending.
        head: the patched head, None for all of the activation.
        source: for one entry of a pattern, the source position.
        setter: the patch setter that does this patch in the plain loop.
        index: what the setter takes, layer first.
    """

    row: int
    site: Site | None
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
    site: Site, layer: int, positions: Sequence[int], differing: Sequence[int]
) -> tuple[int, ...]:
    """Of the positions that a patch writes to, those it may change (idea 3).

    Nothing changes before the first differing input. What block 0 computes from its input
    position by position changes at the differing positions only.
    """
    if layer == 0 and site.at_input:
        return tuple(position for position in positions if position in differing)
    first = min(differing, default=positions[-1] + 1)
    return tuple(position for position in positions if position >= first)


def is_dead(cell: Cell, last_read: int, last_layer: int, read: frozenset[int]) -> bool:
    """Whether a patch cannot reach any logit that the metric reads."""
    if not cell.positions or cell.start > last_read:
        return True
    if cell.source is not None and cell.source > cell.start:
        return True  # A pattern entry in the future: zero in both runs.
    stays = cell.site is not None and not cell.site.spreads
    return cell.layer == last_layer and stays and not read.intersection(cell.positions)


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
        self._place(members)

    def _place(self, members: Sequence[tuple[Cell, Sequence[int]]]) -> None:
        """Give each token of each new member a slot, in a group with room for the whole run."""
        # All groups are as wide as the longest run needs: filling that width costs nothing more.
        width = max([SLOTS, *(len(positions) for _, positions in members)])
        for cell, positions in members:
            groups, room = len(self._filled), width - len(positions)
            tried = range(max(0, groups - GROUPS_TRIED), groups)
            group = next((g for g in tried if self._filled[g] <= room), groups)
            if group == groups:
                self._filled.append(0)
            for slot, position in enumerate(positions, start=self._filled[group]):
                self._tokens.append((len(self.cells), group, slot, position, positions[0]))
            self._filled[group] += len(positions)
            self.cells.append(cell)
        device = self.run.tokens.device
        placed = torch.tensor(self._tokens, dtype=torch.int64).T
        owner, group_of, slots, positions, start = placed
        shape = (len(self._filled), max(self._filled))
        self.flat = (group_of * shape[1] + slots).to(device)
        self.owner, self.position = owner.to(device), positions.to(device)

        def spread(value: Tensor, empty: int) -> Tensor:
            grid = torch.full(shape, empty, dtype=torch.int64)
            grid[group_of, slots] = value
            return grid.to(device)

        self.layout = Layout(
            positions=spread(positions, 0),
            owner=spread(owner, -1),
            start=spread(start, 0),
            prefix=int(start.max()),
        )
        slot_of = torch.full((len(self.cells), self.run.tokens.shape[1]), -1, dtype=torch.int64)
        slot_of[owner, positions] = group_of * shape[1] + slots
        self.slot_of = slot_of.to(device)

    @property
    def n_tokens(self) -> int:
        """Tokens in use, counting each prompt of the batch."""
        return len(self._tokens) * len(self.run.tokens)

    def fill(self, resid: Tensor) -> None:
        """Start every token from the corrupted residual stream ``[batch, pos, d_model]``."""
        groups, slots = self.layout.positions.shape
        batch, _, d_model = resid.shape
        self.states = resid.new_zeros(groups, batch, slots, d_model)
        self.write(torch.arange(len(self._tokens)), resid[:, self.position])

    def write(self, tokens: Tensor, values: Tensor) -> None:
        """Put ``values`` [batch, token, d_model] at some of the pack's tokens."""
        slots = self.layout.positions.shape[1]
        flat = self.flat[tokens.to(self.flat.device)]
        self.states[flat // slots, :, flat % slots] = values.transpose(0, 1).to(self.states.dtype)

    def at(self, flat: Tensor) -> Tensor:
        """States ``[*flat.shape, batch, d_model]`` at flat slots."""
        slots = self.layout.positions.shape[1]
        return self.states[flat // slots, :, flat % slots]

    def add(self, members: Sequence[tuple[Cell, Sequence[int]]], resid: Tensor) -> None:
        """Take in more runs, which start from ``resid``; those aboard keep slots and states."""
        aboard, states = len(self._tokens), self.states
        self._place(members)
        groups, slots = self.layout.positions.shape
        self.states = states.new_zeros(groups, states.shape[1], slots, states.shape[3])
        self.states[: states.shape[0], :, : states.shape[2]] = states
        joined = torch.arange(aboard, len(self._tokens), device=self.flat.device)
        self.write(joined, resid[:, self.position[joined]])

    def step(self, model: Any, layer: int, read: frozenset[int] | None = None) -> None:
        """Move every run through one block; in the last, only the positions that are read."""
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


def chunked(
    members: Sequence[tuple[Cell, Sequence[int]]], batch: int, call_tokens: int
) -> Iterator[list[tuple[Cell, Sequence[int]]]]:
    """Cut members into lists that fill one block call each."""
    chunk: list[tuple[Cell, Sequence[int]]] = []
    tokens = 0
    for member in members:
        size = len(member[1]) * batch
        if chunk and tokens + size > call_tokens:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(member)
        tokens += size
    if chunk:
        yield chunk


@dataclass
class Front:
    """The patched runs under way, all at the same layer (ideas 1, 2 and 5)."""

    model: Any
    run: Run
    clean: Mapping[str, Tensor]
    end: int
    call_tokens: int
    packs: list[Pack] = field(default_factory=list)

    def enter(self, layer: int, cells: Sequence[Cell], changed: Callable[[Cell], Any]) -> None:
        """Let runs join at ``layer``, from the corrupted stream with some tokens changed.

        ``changed`` gives, for a cell, the positions that differ and their states
        ``[batch, position, d_model]``.
        """
        members = [(cell, range(cell.start, self.end)) for cell in cells]
        batch = len(self.run.tokens)
        resid = self.run.resid[layer]
        while members:
            open_pack = self.packs[-1] if self.packs else None
            room = self.call_tokens - open_pack.n_tokens if open_pack else 0
            fits = next(chunked(members, batch, max(room, 0)))
            if open_pack and sum(len(positions) for _, positions in fits) * batch <= room:
                first = len(open_pack.cells)
                open_pack.add(fits, resid)
            else:
                first, fits = 0, next(chunked(members, batch, self.call_tokens))
                open_pack = Pack(self.run, fits)
                open_pack.fill(resid)
                self.packs.append(open_pack)
            members = members[len(fits) :]
            for index, (cell, _) in enumerate(fits, start=first):
                positions, states = changed(cell)
                if len(positions):
                    flat = open_pack.slot_of[index, torch.as_tensor(positions)]
                    slots = open_pack.layout.positions.shape[1]
                    open_pack.states[flat // slots, :, flat % slots] = states.transpose(0, 1).to(
                        open_pack.states.dtype
                    )

    def step(self, layer: int, read: frozenset[int] | None = None) -> None:
        """Move all runs through one block, those that are patched inside it included."""
        for pack in self.packs:
            with _patch_hooks(self.model, pack, self.clean, layer):
                pack.step(self.model, layer, read)

    def changed_inside(self, cell: Cell) -> range:
        """The positions at which a patch inside a block changes what the block gives."""
        return range(cell.start, self.end if cell.site.spreads else cell.positions[-1] + 1)

    def patched_outputs(self, layer: int, cells: Sequence[Cell]) -> dict[int, Any]:
        """Run block ``layer`` on the tokens that a patch inside it changes.

        Gives, per cell row, the positions and the residual stream after the block
        ``[batch, position, d_model]``.
        """
        members = [(cell, self.changed_inside(cell)) for cell in cells]
        outputs: dict[int, Any] = {}
        for chunk in chunked(members, len(self.run.tokens), self.call_tokens):
            pack = Pack(self.run, chunk)
            pack.fill(self.run.resid[layer])
            with _patch_hooks(self.model, pack, self.clean, layer):
                pack.step(self.model, layer)
            for index, (cell, positions) in enumerate(chunk):
                flat = pack.slot_of[index, torch.as_tensor(positions)]
                outputs[cell.row] = positions, pack.at(flat).transpose(0, 1)
        return outputs


class _patch_hooks:  # noqa: N801 (used as a context manager, like a function)
    """Patch the cells of a pack inside one block: one hook per hook name, all rows at once."""

    def __init__(self, model: Any, pack: Pack, clean: Mapping[str, Tensor], layer: int) -> None:
        self.model, self.pack, self.clean, self.layer = model, pack, clean, layer

    def __enter__(self) -> None:
        by_name: dict[str, list[int]] = {}
        for index, cell in enumerate(self.pack.cells):
            if cell.layer == self.layer and cell.site and cell.site.enters == "hook":
                by_name.setdefault(cell.hook_name, []).append(index)
        self.hooks = [
            hooked(self.model, name, self._setter(name, members))
            for name, members in by_name.items()
        ]
        for hook in self.hooks:
            hook.__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in reversed(self.hooks):
            hook.__exit__(*error)

    def _setter(self, name: str, members: list[int]) -> Callable[..., Tensor]:
        """A hook that writes clean activations into the slots of its cells."""
        pack = self.pack
        groups, slots = pack.layout.positions.shape
        batch = len(pack.run.tokens)
        chosen = [
            (index, position, -1 if pack.cells[index].head is None else pack.cells[index].head)
            for index in members
            for position in pack.cells[index].positions
        ]
        device = pack.flat.device
        owner, position, head = torch.tensor(chosen, dtype=torch.int64, device=device).T
        flat = pack.slot_of[owner, position]
        group, slot = flat // slots, flat % slots
        clean = self.clean[name].to(device)

        def set_vectors(activation: Tensor, hook: Any = None) -> Tensor:
            view = activation.view(groups, batch, *activation.shape[1:])
            if head[0] < 0:
                view[group, :, slot] = clean[:, position].transpose(0, 1).to(view.dtype)
            else:
                picked = clean[:, position, head].transpose(0, 1)
                view[group, :, slot, head] = picked.to(view.dtype)
            return activation

        def set_patterns(activation: Tensor, hook: Any = None) -> Tensor:
            view = activation.view(groups, batch, *activation.shape[1:])
            rows = clean[:, head, position].transpose(0, 1).to(view.dtype)  # [token, batch, src]
            sources = pack.layout.columns[group]  # [token, column]
            seen = pack.layout.visible()[group, slot]
            patched = rows.gather(2, sources[:, None].expand(-1, batch, -1))
            one_source = torch.tensor(
                [
                    -1 if (source := pack.cells[index].source) is None else source
                    for index, *_ in chosen
                ],
                device=device,
            )
            replaced = seen & ((one_source[:, None] < 0) | (sources == one_source[:, None]))
            current = view[group, :, head, slot]
            view[group, :, head, slot] = torch.where(replaced[:, None], patched, current)
            return activation

        return set_patterns if pack.cells[members[0]].site.activation == "pattern" else set_vectors


def measured(name: str, metric: Callable[..., Any], logits: Tensor, per_example: bool) -> Tensor:
    """A metric on full logits ``[batch, pos, d_vocab]``: a scalar, or ``[batch]``.

    Raises:
        TypeError: if the metric returns something that is not a number.
        ValueError: if its shape is not the one that ``per_example`` asks for.
    """
    value = metric(logits)
    try:
        value = torch.as_tensor(value, device=logits.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"metric {name!r} must return a number or a tensor, got {type(value).__name__}"
        ) from error
    batch = len(logits)
    if per_example and value.shape != (batch,):
        raise ValueError(
            f"metric {name!r} must return a [batch] tensor of length {batch} with reduce="
            f"'mean' or 'none', got shape {tuple(value.shape)}"
        )
    if not per_example and value.ndim:
        raise ValueError(
            f"metric {name!r} must return a scalar with reduce='scalar', got shape "
            f"{tuple(value.shape)}: pass reduce='mean' or 'none' to keep [batch] values"
        )
    if value.is_complex():
        raise TypeError(f"metric {name!r} must return real numbers, got {value.dtype}")
    wide = torch.promote_types(value.dtype, torch.float32)
    return value.to(wide)


class Scorer:
    """Turns finished packs into metric values, computing no more logits than are read (idea 4).

    Args:
        metrics: by name. One with ``positions`` and ``from_read`` (see ``patching_demo.metrics``)
            is given just what it reads; any other callable gets full logits.
        per_example: whether the metrics return ``[batch]`` rather than a scalar.
    """

    def __init__(
        self, model: Any, run: Run, metrics: Mapping[str, Callable[..., Any]], per_example: bool
    ) -> None:
        self.model, self.run, self.per_example = model, run, per_example
        self.metrics = dict(metrics)
        self.baseline = self._on_a_copy(run.logits)
        n_pos = run.tokens.shape[1]
        self.plain = [name for name in self.metrics if not self._declares(name)]
        read = set(range(n_pos)) if self.plain else set()
        for name in self.metrics:
            if name not in self.plain:
                read |= set(self.metrics[name].positions.flatten().tolist())
        self.read = frozenset(read)
        self.last_read = max(self.read)

    def full(self, name: str, logits: Tensor) -> Tensor:
        """One metric on full logits ``[batch, pos, d_vocab]``, see :func:`measured`."""
        return measured(name, self.metrics[name], logits, self.per_example)

    def probe(self) -> Tensor:
        """Metrics on the corrupted logits and on those with the vocabulary turned round.

        Tells one metric from another, also where both are 0 on the corrupted run.
        """
        return torch.stack([self.baseline, self._on_a_copy(self.run.logits.flip(-1))])

    def rounding(self) -> Tensor:
        """How far each metric moves when the corrupted logits change in their last bits.

        Little, as a rule; but a metric that cancels to 0 (the mean of logits that are centred,
        for instance) is made of nothing else.
        """
        logits = self.run.logits
        place = torch.arange(logits.numel(), device=logits.device, dtype=torch.float64)
        bits = 16 * torch.finfo(logits.dtype).eps * torch.cos(place**2).view(logits.shape)
        return (self._on_a_copy(logits * (1 + bits).to(logits.dtype)) - self.baseline).abs()

    def _on_a_copy(self, logits: Tensor) -> Tensor:
        """All metrics: ``[metric, (batch)]``; one that writes into its logits harms nobody."""
        return torch.stack([self.full(name, logits.clone()) for name in self.metrics])

    def _declares(self, name: str) -> bool:
        """Whether what the metric says it reads gives what it computes, on the corrupted run."""
        metric = self.metrics[name]
        if not all(hasattr(metric, part) for part in ("positions", "read", "from_read")):
            return False
        index = list(self.metrics).index(name)
        read = metric.from_read(metric.read(self.run.logits))
        if not isinstance(read, Tensor) or not isinstance(metric.positions, Tensor):
            return False
        read, wanted = self._reduce(read), self.baseline[index]
        same = read.shape == wanted.shape
        return same and torch.allclose(read, wanted.to(read.dtype), rtol=1e-4, atol=1e-6)

    def _reduce(self, values: Tensor) -> Tensor:
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return values if self.per_example else values.mean(-1)

    def score(self, pack: Pack) -> Tensor:
        """Values ``[metric, cell, (batch)]`` of the runs in a finished pack."""
        full: dict[Any, Tensor] = {}
        rows = []
        plain = self._score_plain(pack) if self.plain else {}
        for name, metric in self.metrics.items():
            if name in plain:
                rows.append(plain[name])
                continue
            device = self.run.tokens.device
            positions, tokens = metric.positions.to(device), metric.tokens
            final = self._final(pack, positions)
            if tokens is not None:
                read = some_logits_from_resid(self.model, final, tokens.to(device))
            else:
                key = positions.numpy(force=True).tobytes()
                if key not in full:
                    flat = logits_from_resid(self.model, final.flatten(0, 1))
                    full[key] = flat.view(*final.shape[:-1], -1)
                read = full[key]
            rows.append(self._reduce(metric.from_read(read)))
        return torch.stack([row.to(self.baseline.dtype) for row in rows])

    def _final(self, pack: Pack, positions: Tensor) -> Tensor:
        """Final residual streams ``[cell, batch, n_positions, d_model]`` at some positions."""
        batch = torch.arange(len(positions), device=positions.device)
        slot = pack.slot_of[:, positions]  # [cell, batch, n_positions]
        slots = pack.layout.positions.shape[1]
        where = slot.clamp(min=0)
        recomputed = pack.states[where // slots, batch[None, :, None], where % slots]
        corrupted = self.run.resid[-1][batch[:, None], positions]
        return torch.where((slot >= 0)[..., None], recomputed, corrupted)

    def _score_plain(self, pack: Pack) -> dict[str, Tensor]:
        """Metrics of full logits: the corrupted run's, with the recomputed positions replaced."""
        logits = self.run.logits.clone()
        values: dict[str, list[Tensor]] = {name: [] for name in self.plain}
        groups, batch, slots, d_model = pack.states.shape
        computed = logits_from_resid(self.model, pack.states.reshape(-1, slots, d_model))
        computed = computed.view(groups, batch, slots, -1)
        for index in range(len(pack.cells)):
            # A run's positions follow each other, and so do their slots: slices copy fastest.
            flat = pack.slot_of[index, pack.slot_of[index] >= 0]
            group, slot = divmod(int(flat[0]), slots)
            start = pack.cells[index].start
            positions = slice(start, start + len(flat))
            logits[:, positions] = computed[group, :, slot : slot + len(flat)]
            version = logits._version
            for name in self.plain:
                values[name].append(self.full(name, logits).clone())
            if logits._version != version:  # The metric wrote into its argument.
                logits = self.run.logits.clone()
            else:
                logits[:, positions] = self.run.logits[:, positions]
        return {name: torch.stack(rows) for name, rows in values.items()}


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
        front.enter(layer, [c for c in here if c.site.enters == "input"], clean_stream)
        inside = [c for c in here if c.site.enters == "hook"]
        last = layer == n_layers - 1
        # A patch that changes all later positions joins before its block, except in the last, of
        # which the front runs the positions that are read only. Any other costs less on its own.
        aboard = [] if last else [c for c in inside if front.changed_inside(c).stop == end]
        apart = inside if last else [c for c in inside if front.changed_inside(c).stop < end]
        front.enter(layer, aboard, lambda cell: nothing)
        front.step(layer, scorer.read if last else None)
        outputs = front.patched_outputs(layer, apart)
        front.enter(layer + 1, apart, lambda cell, found=outputs: found[cell.row])
        front.enter(layer + 1, [c for c in here if c.site.enters == "output"], clean_stream)
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


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that rounding may cause over a forward pass in ``dtype``."""
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 1e-1)


def _check_arrival(run: Run, pack: Pack, scorer: Scorer) -> None:
    """The unpatched run must end in the corrupted run's residual stream and logits."""
    positions = torch.tensor(
        [position for position in sorted(scorer.read) if position >= pack.cells[0].start],
        device=run.tokens.device,
    )
    arrived = pack.at(pack.slot_of[0, positions]).transpose(0, 1)
    expected = run.resid[-1][:, positions]
    logits = logits_from_resid(scorer.model, expected[:, -1:])
    for got, want, what in (
        (arrived, expected, "residual stream"),
        (logits, run.logits[:, positions[-1:]], "logits"),
    ):
        error = (got - want).abs().max() / want.abs().max().clamp(min=1e-30)
        if not error <= tolerance(run.resid[-1].dtype):
            raise Unsupported(
                f"an unpatched run comes back with other {what} (relative error {error:.1e})"
            )


__all__ = [
    "SITES",
    "Cell",
    "Scorer",
    "Site",
    "changed_positions",
    "differing_positions",
    "is_dead",
    "measured",
    "sweep_cells",
]
