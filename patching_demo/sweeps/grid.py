"""The sweep: one activation at a time, over layers, positions and heads."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from patching_demo.engine import checks
from patching_demo.engine.cells import Cell, Patch, share_of_pass
from patching_demo.engine.kinds import KINDS, Kind
from patching_demo.engine.runner import Options
from patching_demo.engine.tokens import heads_of
from patching_demo.sweeps.executors import Workers
from patching_demo.sweeps.question import How, Question, ask, check_tasks, grid_cells, names_of
from patching_demo.tasks import Task


def sweep(
    model: Any,
    task: Task,
    kinds: str | Sequence[str],
    *,
    by: str = "pos",
    layers: Any = None,
    positions: Any = None,
    heads: Any = None,
    where: xr.DataArray | None = None,
    window: int = 1,
    source: Any = "clean",
    per_prompt: bool = False,
    executor: Executor | None = None,
    **options: Any,
) -> xr.DataArray:
    """Patch clean activations into the corrupted run, one place at a time, and label the result.

    Each value is the task's metric, in its units, of a corrupted run in which a single
    activation was replaced by the one from the clean run (denoising; Meng et al., 2022).

    Args:
        model: a TransformerBridge.
        task: inputs, metric and baselines.
        kinds: one of :data:`patching_demo.engine.kinds.BLOCK_KINDS` (by layer and position) or of
            ``HEAD_KINDS``, or several of the same group, which adds a leading ``kind`` dimension.
            "pattern" by position replaces one destination row of the pattern.
        by: "pos" patches one position at a time, "role" one of the task's named positions, from
            its place in each clean prompt to its place in the corrupted one, and "all_pos" a whole
            head at once (heads only). By role, prompts may have any lengths.
        layers, positions, heads: what ``.sel`` of the result takes (a value, a list, a slice), or
            positions by number; only these cells are computed. By role, ``positions`` are roles.
        where: booleans with dimensions and labels of the result, such as those of an estimate by
            :func:`patching_demo.attribute`; other cells are NaN and cost nothing.
        window: patches so many consecutive layers at once, labelled by the middle one (Meng et
            al., 2022, use 10).
        source: where patched values come from: "clean", "zero", "mean" (over the prompts of the
            clean run, at each position or role), or a mapping from hook names to activations.
        per_prompt: whether to keep one value per prompt, along the dimension ``prompt``.
        executor: any ``concurrent.futures.Executor`` whose workers share the cells out among them,
            such as a process pool that spawns them. ``model`` is then a name, or a function that
            makes a bridge, and each worker loads it once.
        options: of :class:`patching_demo.engine.runner.Options`, such as ``progress``.

    Returns:
        float32 with dimensions ``([prompt,] [kind,] layer, position)`` for block kinds,
        ``([prompt,] [kind,] layer, position, head)`` for head kinds by position and
        ``([prompt,] [kind,] layer, head)`` over all positions; ``role`` stands for ``position`` by
        role. Where keys and values have fewer heads than queries, cells of heads that do not exist
        are NaN. The coordinate ``agrees`` is True at positions up to which clean and corrupted
        tokens are the same: a clean patch there replaces an activation by itself.

    Raises:
        ValueError: if a kind, ``by``, ``where``, ``window`` or ``source`` is unknown or does not
            fit the others, or the task's baselines are another model's.
        KeyError: if a layer, position or head to select does not exist.
        TypeError: if the model is no TransformerBridge, the task none, or an option unknown.

    >>> from patching_demo import induction_task, load_model
    >>> model = load_model("attn-only-2l-demo")
    >>> task = induction_task(model, batch=2, seq_len=6)
    >>> sweep(model, task, "out", by="all_pos", layers=[1], progress=False).sizes["layer"]
    1
    """
    return sweep_metrics(
        model, {"metric": task}, kinds, by=by, layers=layers, positions=positions, heads=heads,
        where=where, window=window, source=source, per_prompt=per_prompt, executor=executor,
        **options,
    )["metric"]  # fmt: skip


def sweep_metrics(
    model: Any,
    tasks: Mapping[str, Task],
    kinds: str | Sequence[str],
    *,
    by: str = "pos",
    layers: Any = None,
    positions: Any = None,
    heads: Any = None,
    where: xr.DataArray | None = None,
    window: int = 1,
    source: Any = "clean",
    per_prompt: bool = False,
    executor: Executor | None = None,
    **options: Any,
) -> dict[str, xr.DataArray]:
    """One sweep scored by several metrics at once, at the price of one.

    Args:
        model: a TransformerBridge.
        tasks: the same prompts with different metrics, by name; see
            :meth:`patching_demo.tasks.Task.with_metric`.
        kinds: as for :func:`sweep`, like the other arguments.

    Returns:
        For each name what :func:`sweep` returns for that task.

    Raises:
        As :func:`sweep`, and ValueError if the tasks have different prompts.
    """
    check_tasks(tasks)
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"window must be a whole number of layers, at least 1, got {window!r}")
    workers = Workers(model, executor)
    first = next(iter(tasks.values()))
    cells, passes = workers.ask(
        chosen_cells, first, kinds, by, layers, positions, heads, where, source
    )
    if source != "clean" and "agrees" in cells.coords:
        cells["agrees"] = cells["agrees"] & False
    if window > 1:
        cells.attrs["window"] = window
    measured = partial(_values, names=names_of(kinds), by=by, window=window)
    how = How(source, per_prompt, by == "role", Options.of(options))
    return workers.spread(measured, tasks, cells, passes, how)


def chosen_cells(
    model: Any,
    task: Task,
    kinds: str | Sequence[str],
    by: str,
    layers: Any,
    positions: Any,
    heads: Any,
    where: xr.DataArray | None,
    source: Any,
) -> tuple[xr.DataArray, np.ndarray]:
    """The number of each cell with the labels of the result, NaN where none is asked for.

    And what each costs, in forward passes. What is selected here is what is computed.
    """
    cells = grid_cells(model, task, kinds, by)
    dims, sizes = list(cells.dims), cells.sizes
    place = "role" if by == "role" else "position"
    for dim, labels in {"layer": layers, place: positions, "head": heads}.items():
        if labels is not None:
            if dim not in dims:
                raise ValueError(f"this sweep has no {dim}: its dimensions are {dims}")
            ends = (labels.start, labels.stop) if isinstance(labels, slice) else ()
            if any(isinstance(end, (int, np.integer)) and end < 0 for end in ends):
                raise ValueError(
                    f"{dim} {labels!r}: slices go by label, as in .sel of the result, and no label "
                    "is negative"
                )
            try:
                numbered = dim == "position" and np.asarray(labels).dtype.kind in "iu"
                cells = cells.sel({dim: cells[dim].values[labels] if numbered else labels})
            except (KeyError, TypeError, IndexError):
                known = reprlib.repr(cells[dim].values.tolist())
                known += "; by number, in a list or a range" * (dim == "position")
                raise KeyError(f"{dim} {labels!r} is not among {known}") from None
    if where is not None:
        if (
            not isinstance(where, xr.DataArray)
            or where.dtype != bool
            or set(where.dims) - set(dims)
        ):
            raise ValueError(
                f"where must be a DataArray of booleans with dimensions among {dims}, such as "
                f"result > 1, got {getattr(where, 'dtype', type(where).__name__)} with dimensions "
                f"{list(getattr(where, 'dims', ()))}"
            )
        cells = cells.where(where.reset_coords(drop=True))
    n_heads = [heads_of(model, KINDS[name]) for name in names_of(kinds)]
    at = _places(cells.values, sizes)
    exists = at.get("head", 0) < np.take(n_heads, at.get("kind", 0))
    cells = cells.copy(data=np.where(exists, cells, np.nan))
    # Before the first token that differs nothing is patched, and a run begins there at the latest.
    n_pos = float(task.corrupted_lengths.float().mean())
    places = [float(there.float().mean()) for _, there in task.roles.values()]
    agree = task.agree_until if source == "clean" else 0
    start = np.take(places, at["role"]) if "role" in at else at.get("position", agree)
    passes = share_of_pass(at["layer"], start, model.cfg.n_layers, n_pos) * (start >= agree)
    return cells, passes


def _places(cells: np.ndarray, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Where cells are, by their numbers: an index along each dimension."""
    numbers = np.nan_to_num(cells).astype(int)
    return dict(zip(sizes, np.unravel_index(numbers, list(sizes.values())), strict=True))


def _values(
    model: Any,
    tasks: Mapping[str, Task],
    numbers: np.ndarray,
    how: How,
    names: Sequence[str],
    by: str,
    window: int,
) -> dict[str, np.ndarray]:
    """Values ``[(prompt), cell]`` of cells given by number, for each task."""
    first = next(iter(tasks.values()))
    places = _places(numbers, grid_cells(model, first, names, by).sizes)
    rows: list[int] = []

    def swept(live: Sequence[str]) -> dict[str, np.ndarray]:
        layers = range(model.cfg.n_layers)
        hooks = [f"blocks.{layer}.{KINDS[name].hook}" for name in live for layer in layers]
        rows[:] = [row for row, kind in enumerate(places["kind"]) if names[kind] in live]

        def answer(question: Question) -> dict[str, np.ndarray]:
            cells = []
            for row in rows:
                at = {dim: int(index[row]) for dim, index in places.items()}
                if by == "role":
                    at["position"] = question.places[list(first.roles)[at["role"]]]
                patches = _patches(KINDS[names[at["kind"]]], at, window, question)
                cells.append(Cell(len(cells), patches))
            return question.run(cells)

        return ask(model, tasks, hooks, answer, how)

    results = {}
    for name, values in checks.without_dead_kinds(names, swept).items():
        results[name] = np.full((*values.shape[:-1], len(numbers)), np.nan, values.dtype)
        results[name][..., rows] = values
    return results


def _patches(
    kind: Kind, at: Mapping[str, int], window: int, question: Question
) -> tuple[Patch, ...]:
    """What one cell patches: a kind at one place, in one layer or in several."""
    everywhere = tuple(range(question.tokens.shape[1]))
    positions = (at["position"],) if "position" in at else everywhere
    lowest = at["layer"] - window // 2
    return tuple(
        Patch(kind, f"blocks.{layer}.{kind.hook}", layer, positions, head=at.get("head"))
        for layer in range(max(0, lowest), min(question.model.cfg.n_layers, lowest + window))
    )
