"""Runs a list of cells: fast where that is exact, plainly where it is not, and checked.

What a sweep needs around the engine: memory limits, progress, rechecks against plain hooked
forward passes, a file to resume from, and the plain loop itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm.auto import tqdm

from patching_demo.engine.bridge import Run, Unsupported, attached_hooks, capture, run_plain
from patching_demo.engine.cells import Cell
from patching_demo.engine.checks import refuse_dead_hooks, refuse_reading_pads, warn_once
from patching_demo.engine.isolation import isolated
from patching_demo.engine.kinds import KINDS
from patching_demo.engine.packs import CALL_TOKENS, keep_freed_memory, unforeseen
from patching_demo.engine.proof import prove
from patching_demo.engine.scoring import Scorer, tolerance
from patching_demo.engine.skipping import Survey, reaching
from patching_demo.engine.store import CellStore
from patching_demo.engine.sweeping import sweep_cells

SHARE_OF_FREE_MEMORY = 0.25
FEWEST_CELLS = 4  # With fewer live cells the plain loop costs no more than setting up.
CELLS_PER_RECHECK = 2000
MOST_RECHECKS = 4


class SweepStopped(BaseException):
    """``on_progress`` asked the sweep to stop. Like KeyboardInterrupt, this is not an error."""


@dataclass(frozen=True)
class Options:
    """How a sweep runs; none of these changes its numbers.

    Attributes:
        memory: bytes the patched runs may take; by default a quarter of what is free.
        check: how many cells to recheck with plain forward passes; by default one to four, the
            more the longer the sweep, 0 for none.
        seed: chooses the cells to recheck.
        progress: whether to show a progress bar over cells.
        store: a file that keeps finished cells and from which an interrupted sweep resumes.
        on_progress: called with the cells done and their total, several times a second as a rule;
            a sweep for which it returns True ends with :class:`SweepStopped`.
    """

    memory: int | None = None
    check: int | None = None
    seed: int = 0
    progress: bool = True
    store: str | os.PathLike[str] | None = None
    on_progress: Callable[[int, int], bool | None] | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any], *others: str) -> Options:
        """The options by name; ``others`` are those that the caller takes besides.

        Raises:
            TypeError: if one is unknown.
        """
        known = [*cls.__dataclass_fields__, *others]
        for option in options:
            if option not in known:
                raise TypeError(f"unknown option {option!r}: the options are {', '.join(known)}")
        return cls(**options)

    def __post_init__(self) -> None:
        for name, least, what in (
            ("memory", 1, "a positive number of bytes"),
            ("check", 0, "0 or more cells"),
            ("seed", 0, "0 or more"),
        ):
            value = getattr(self, name)
            if value is None and name != "seed":
                continue
            if not isinstance(value, (int, np.integer)) or value < least:
                raise ValueError(f"{name} must be {what}, a whole number, got {value!r}")
        if not isinstance(self.store, (str, os.PathLike, type(None))):
            raise TypeError(f"store must be a path, got {type(self.store).__name__}")
        if self.on_progress is not None and not callable(self.on_progress):
            raise TypeError(f"on_progress must be callable, got {type(self.on_progress).__name__}")


@torch.no_grad()
def run_cells(
    model: Any,
    tokens: Tensor,
    clean: Mapping[str, Tensor],
    cells: Sequence[Cell],
    metrics: Mapping[str, Callable[..., Any]],
    *,
    differing: Sequence[int],
    per_example: bool,
    options: Options,
    lengths: Tensor | None = None,
    expected: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Values ``[metric, cell, (batch)]`` of all cells and the baseline ``[metric, (batch)]``.

    ``differing`` are the positions at which the inputs of the two runs differ; ``lengths``
    ``[batch]`` are those of the prompts without padding, where a mask tells. ``expected`` are the
    seconds that the progress bar begins with.

    The model runs on modules of the sweep's own, see :func:`isolated`.

    Raises:
        ValueError: if a metric is NaN or infinite, naming the cell, or a hook is not live.
    """
    model = isolated(model)
    reasons = _reasons_for_plain_loop(model, clean, cells)
    run: Run | None = None
    with Survey(clean).listening(model) as survey:
        if not reasons:
            try:
                with unforeseen("a forward pass that is recorded"):
                    run = capture(model, tokens)
            except Unsupported as reason:
                reasons.append(str(reason))
        logits = run.logits if run else run_plain(model, tokens, (), clean)
    refuse_dead_hooks(model, tokens, run, cells)
    whole = {cell.row: cell for cell in cells}
    cells = survey.narrowed(cells, differing)
    if clean and all(patch.kind for cell in cells for patch in cell.patches):
        survey.warn_if_nothing_moves(differing)
    scorer = Scorer(model, run or Run(tokens=tokens, logits=logits, resid=[]), metrics, per_example)
    scored = {name: partial(scorer.full, name) for name in metrics}
    refuse_reading_pads(model, tokens, logits, scored, lengths)
    _refuse_not_finite(scorer, scorer.baseline[:, None], None)
    values = scorer.baseline[:, None].repeat(1, len(cells), *(1,) * (scorer.baseline.ndim - 1))
    with CellStore.open(options.store, model, tokens, clean, cells, scorer.probe) as store:
        todo = store.unfinished(values)
        # Whatever the model does, writing the same numbers changes nothing.
        plain = [cell for cell in todo if cell.patches]
        live = _live(plain, run, scorer) if run else plain
        few = 0 < len(live) == len(plain) < FEWEST_CELLS
        with _Progress(len(cells), len(cells) - len(live), options, expected) as bar:
            if run and not few:
                try:
                    slots = _run_fast(model, run, clean, live, scorer, values, store, bar, options)
                    _recheck(model, tokens, clean, whole, slots, scorer, values, options)
                    plain = []
                except Unsupported as reason:
                    reasons.append(str(reason))
                    # Cells that were not run, or are done, rest on the same assumptions.
                    plain = [cell for cell in cells if cell.patches]
                    store.forget()
                    bar.restart(len(cells) - len(plain))
            if plain and reasons:
                warn_once(f"this sweep takes the plain loop: {reasons[0]}")
            rows = {cell.row for cell in plain}
            store.finish(values, [cell for cell in cells if cell.row not in rows])
            for cell in (whole[cell.row] for cell in plain):
                values[:, cell.row] = _plain_value(model, tokens, clean, cell, scorer)
                _refuse_not_finite(scorer, values[:, [cell.row]], [cell])
                store.finish(values, [cell])
                bar.advance(1)
    return values, scorer.baseline


def _reasons_for_plain_loop(
    model: Any, clean: Mapping[str, Tensor], cells: Sequence[Cell]
) -> list[str]:
    reasons = []
    patches = {patch.hook_name: patch for cell in cells for patch in cell.patches}
    unknown = sorted(n.split(".", 2)[-1] for n, patch in patches.items() if patch.kind is None)
    if unknown:
        reasons.append(f"the patch setter or activation ({unknown[0]}) is not one the engine knows")
    hooks = attached_hooks(model)
    if hooks:
        reasons.append(f"the model has hooks attached ({hooks[0]})")
    for name, patch in patches.items():
        values = clean.get(name) if patch.values is None else patch.values
        if patch.kind is KINDS["pattern"] and values.triu(1).any():
            reasons.append(f"the clean {name} attends to later positions")
    return reasons


def _live(cells: Sequence[Cell], run: Run, scorer: Scorer) -> list[Cell]:
    """The cells whose patch can reach what the metrics read (idea 3)."""
    last_layer = len(run.resid) - 2
    found = (reaching(cell, last_layer, scorer.read) for cell in cells if cell.patches)
    return [cell for cell in found if cell is not None]


def _run_fast(
    model: Any,
    run: Run,
    clean: Mapping[str, Tensor],
    cells: Sequence[Cell],
    scorer: Scorer,
    values: Tensor,
    store: CellStore,
    bar: _Progress,
    options: Options,
) -> dict[int, int]:
    """Fill in ``values`` portion by portion; returns how far down its group each run stood.

    Raises:
        Unsupported: if the model does not stand the proof, or cannot be run on packs.
    """
    device = run.tokens.device
    if device.type == "cpu":
        keep_freed_memory()
    call_tokens = CALL_TOKENS["cpu" if device.type == "cpu" else "accelerator"]
    budget, scorer.logits_held = _budgets(run, options)
    left = sorted(cells, key=lambda cell: cell.layer)
    slots: dict[int, int] = {}
    if left:
        scorer.check_logits()
        scorer.noise = prove(model, run, left, scorer)
    while left:
        portion = _portion(left, scorer, budget, store.most_cells(len(cells)))
        size = len(portion)
        try:
            part, stood = sweep_cells(
                model,
                run,
                clean,
                portion,
                scorer,
                call_tokens=min(call_tokens, budget),
                advance=lambda share, size=size: bar.within(share * size),
            )
        except torch.OutOfMemoryError:
            if size == 1 and budget <= 1:
                raise
            budget = max(1, min(budget, sum(scorer.last_read + 1 - c.start for c in portion)) // 2)
            scorer.logits_held //= 2
            if device.type != "cpu":
                torch.accelerator.empty_cache()
            continue
        _refuse_not_finite(scorer, part, portion)
        values[:, [cell.row for cell in portion]] = part
        store.finish(values, portion)
        slots.update(stood)
        bar.advance(size)
        left = left[size:]
    return slots


def _budgets(run: Run, options: Options) -> tuple[int, int]:
    """How many recomputed tokens, and how many logits, may be held at once."""
    memory = options.memory
    if memory is None:
        device = run.tokens.device
        ask = getattr(getattr(torch, device.type, None), "mem_get_info", None)
        free = ask(device)[0] if ask else psutil.virtual_memory().available
        memory = int(free * SHARE_OF_FREE_MEMORY)
    resid, logits = run.resid[-1], run.logits
    # A token holds its residual stream, and once more while a pack is rebuilt or scored; a logit
    # is copied for the metric, which may need as much again in float32.
    tokens = memory // 2 // (3 * resid.shape[-1] * resid.element_size())
    return max(1, tokens), memory // 2 // (2 * logits.element_size() + 8)


def _portion(cells: Sequence[Cell], scorer: Scorer, budget: int, most_cells: int) -> list[Cell]:
    """As many cells, in order, as the budget of tokens holds; at least one."""
    tokens = 0
    for count, cell in enumerate(cells):
        tokens += (scorer.last_read + 1 - cell.start) * len(scorer.run.tokens)
        if count and (tokens > budget or count >= most_cells):
            return list(cells[:count])
    return list(cells)


def _plain_value(
    model: Any, tokens: Tensor, clean: Mapping[str, Tensor], cell: Cell, scorer: Scorer
) -> Tensor:
    """A cell by a whole hooked forward pass: ``[metric, (batch)]``."""
    return scorer.all(run_plain(model, tokens, cell.patches, clean))


def _recheck(
    model: Any,
    tokens: Tensor,
    clean: Mapping[str, Tensor],
    whole: Mapping[int, Cell],
    slots: Mapping[int, int],
    scorer: Scorer,
    values: Tensor,
    options: Options,
) -> None:
    """Compare a few cells with plain forward passes.

    First one of those that stood behind most others, as ``slots`` says of the rows that were run,
    then one with the longest run, then any, those that were skipped among them.

    Raises:
        Unsupported: if they differ by more than rounding.
    """
    cells, count = list(whole.values()), options.check
    if count is None:
        count = min(1 + len(cells) // CELLS_PER_RECHECK, MOST_RECHECKS)
    rng = np.random.default_rng(options.seed)
    chosen: list[Cell] = []
    ran = [cell for cell in cells if cell.row in slots]
    for hardest in (lambda cell: -slots[cell.row], lambda cell: cell.start):
        among = sorted(ran, key=hardest)[: 1 + len(ran) // 10]
        chosen += [among[i] for i in rng.permutation(len(among))[:1] if among[i] not in chosen]
    chosen += [cells[i] for i in rng.permutation(len(cells)) if cells[i] not in chosen]
    allowed_share = tolerance(scorer.run.logits.dtype)
    for cell in chosen[:count]:
        expected, found = _plain_value(model, tokens, clean, cell, scorer), values[:, cell.row]
        scale = torch.maximum(expected.abs(), scorer.baseline.abs())
        spread = (values - scorer.baseline[:, None]).abs().flatten(1).max(dim=1).values
        scale = torch.maximum(scale, spread.view(-1, *(1,) * (scale.ndim - 1)))
        allowed = allowed_share * scale.clamp(min=1e-6) + 4 * scorer.noise
        error = (found - expected).abs()
        if not (error <= allowed).all() and not (error <= allowed + scorer.rounding()).all():
            raise Unsupported(
                f"a plain forward pass gives {expected.tolist()} for {cell.describe()}, the engine "
                f"{found.tolist()}"
            )


def _refuse_not_finite(scorer: Scorer, values: Tensor, cells: Sequence[Cell] | None) -> None:
    bad = ~torch.isfinite(values)
    if not bad.any():
        return
    metric, index = bad.nonzero()[0][:2].tolist()
    where = cells[index].describe() if cells else "the corrupted run"
    raise ValueError(
        f"metric {list(scorer.metrics)[metric]!r} is {values[metric, index].flatten()[0].item()} "
        f"at {where}: a metric must be finite"
    )


class _Progress:
    """A progress bar over cells that leaves nothing behind, and who else wants to know."""

    def __init__(
        self, total: int, done: int, options: Options, expected: float | None = None
    ) -> None:
        self.bar = tqdm(
            total=total, initial=done, disable=not options.progress, leave=False, unit="cell",
            delay=1.0, desc=f"about {max(1, expected):,.0f} s" if expected else None,
        )  # fmt: skip
        self.total, self.done, self.shown = total, done, done
        self.on_progress = options.on_progress

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def restart(self, done: int) -> None:
        """Begin anew, with so many cells done."""
        self.done = done
        self.within(0)

    def advance(self, cells: int) -> None:
        self.done += cells
        self.within(0)

    def within(self, cells: float) -> None:
        """Show the finished cells plus those that the work of the current pass amounts to.

        Raises:
            SweepStopped: if ``on_progress`` asks for it.
        """
        done = int(self.done + cells)
        self.bar.update(done - self.shown)
        self.shown = done
        if self.on_progress is not None and self.on_progress(done, self.total):
            raise SweepStopped(f"stopped after {done} of {self.total} cells")
