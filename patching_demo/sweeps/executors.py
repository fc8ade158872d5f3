"""A question shared out to workers: any executor of ``concurrent.futures`` runs its units."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import torch
import xarray as xr
from tqdm.auto import tqdm

from patching_demo.engine import checks
from patching_demo.engine.runner import SHARE_OF_FREE_MEMORY, SweepStopped
from patching_demo.engine.tokens import device_of
from patching_demo.models import load_model
from patching_demo.sweeps.question import How, labelled
from patching_demo.tasks import Task

#: Each unit begins with the work of about five forward passes, so it gets several times as much.
PASSES_PER_UNIT = 30.0

_loaded: dict[str, Any] = {}
_lock = threading.Lock()


class Workers:
    """Whoever answers a question: this process with a model, or an executor's workers.

    Args:
        model: a TransformerBridge; with an executor a name for :func:`patching_demo.load_model`,
            or a function that makes a bridge. Each worker loads it once and keeps it.
        executor: any ``concurrent.futures.Executor``, such as a process pool that spawns its
            workers, or ``Client(...).get_executor()`` of Dask; None for this process.

    Raises:
        TypeError: if the executor is none, or the model can't be sent to its workers.
        ValueError: if the executor forks this process, as PyTorch hangs in a fork.
    """

    def __init__(self, model: Any, executor: Executor | None = None) -> None:
        self.model, self.executor = model, executor
        if executor is None:
            return
        if not callable(getattr(executor, "submit", None)):
            raise TypeError(
                f"executor must be a concurrent.futures.Executor, got {type(executor).__name__}"
            )
        if hasattr(model, "cfg") or not (isinstance(model, str) or callable(model)):
            raise TypeError(
                "with an executor, model must be a name or a function that makes the model, which "
                f"each worker calls once; got {type(model).__name__}"
            )
        context = getattr(executor, "_mp_context", None)
        if isinstance(executor, ProcessPoolExecutor) and context.get_start_method() == "fork":
            raise ValueError(
                "PyTorch hangs in a forked process: make the pool with ProcessPoolExecutor("
                "2, mp_context=multiprocessing.get_context('spawn'))"
            )
        self.key = _key_of(model)

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(model, *args)``, by one worker."""
        if self.executor is None:
            return function(self.model, *args)
        return self._result(self._submit(function, args))

    def spread(
        self,
        function: Callable[..., dict[str, np.ndarray]],
        tasks: Mapping[str, Task],
        cells: xr.DataArray,
        passes: np.ndarray,
        how: How,
    ) -> dict[str, xr.DataArray]:
        """Values ``[(prompt), ...cells]`` for each task, NaN where no cell is asked for.

        Args:
            function: called with the model, tasks, numbers of cells and ``how``; returns values
                ``[(prompt), cell]``.
            cells: the number of each cell, NaN where none is asked for, with the labels and facts
                of the result.
            passes: what each cell costs, in forward passes.

        Raises:
            RuntimeError: if a worker was killed, and the executor does not run its unit again.
        """
        asked = np.isfinite(cells.values)
        # A label may be asked for twice.
        numbers, at, again = np.unique(cells.values[asked], return_index=True, return_inverse=True)
        numbers = numbers.astype(int)
        if self.executor is None:
            found = function(self.model, tasks, numbers, how)
        else:
            found = self._gathered(function, tasks, numbers, _portions(passes[asked][at]), how)
        results = {}
        for name, values in found.items():
            placed = np.full((*values.shape[:-1], *cells.shape), np.nan, np.float32)
            placed[..., asked] = values[..., again]
            results[name] = labelled(tasks[name], placed, cells, how.source)
        return results

    def _gathered(
        self,
        function: Callable[..., dict[str, np.ndarray]],
        tasks: Mapping[str, Task],
        numbers: np.ndarray,
        portions: Sequence[np.ndarray],
        how: How,
    ) -> dict[str, np.ndarray]:
        """What ``function`` returns, gathered from units of some prompts and some cells each."""
        first = next(iter(tasks.values()))
        options, total, done = how.options, len(numbers), 0.0
        # Whether what is patched into a prompt, and its value, depend on no other prompt.
        apart = how.by_role and how.source in ("clean", "zero")
        for task in tasks.values():
            apart = apart and task.corrupted_values is not None and task.metric.selectable
        groups = first.groups() if apart else [list(range(len(first)))]
        by_prompt = how.per_prompt or len(groups) > 1
        units: dict[Future[Any], tuple[list[int], np.ndarray]] = {}
        for prompts in groups:
            whole = len(groups) == 1
            parts = {name: task if whole else task.part(prompts) for name, task in tasks.items()}
            for portion in portions:
                own = replace(options, progress=False, on_progress=None)
                if options.store is not None:
                    own = replace(own, store=f"{os.fspath(options.store)}-{len(units)}")
                kept = replace(how, per_prompt=by_prompt, options=own)
                future = self._submit(_unit, (function, parts, numbers[portion], kept))
                units[future] = prompts, portion
        shape = (len(first) if by_prompt else 1, len(numbers))
        found = {name: np.full(shape, np.nan, np.float32) for name in tasks}
        with tqdm(total=total, disable=not options.progress, leave=False, unit="cell") as bar:
            try:
                for future in as_completed(units):
                    prompts, portion = units[future]
                    rows = prompts if by_prompt else [0]
                    for name, values in self._result(future).items():
                        found[name][np.ix_(rows, portion)] = values
                    done += len(portion) * len(prompts) / len(first)
                    bar.update(round(done) - bar.n)
                    if options.on_progress is not None and options.on_progress(round(done), total):
                        raise SweepStopped(f"stopped after {round(done)} of {total} cells")
            finally:
                for future in units:
                    future.cancel()
        # One row already, or the prompts of all groups.
        return found if how.per_prompt else {name: own.mean(0) for name, own in found.items()}

    def _submit(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Future[Any]:
        with _unbroken():
            return self.executor.submit(_answer, self.key, self.model, function, args)

    def _result(self, future: Future[Any]) -> Any:
        """What a worker returned; its warnings are given here, once."""
        with _unbroken():
            result, heard = future.result()
        for message in heard:
            checks.warn_once(message)
        return result


@contextmanager
def _unbroken() -> Iterator[None]:
    try:
        yield
    except BrokenExecutor as error:
        raise RuntimeError(
            "a worker was killed, usually because memory ran out: make a new executor with fewer "
            "workers, or give a smaller memory=. What store= keeps is not run again"
        ) from error


def _portions(passes: np.ndarray) -> list[np.ndarray]:
    """The places of cells that cost so much, in portions of about the same cost."""
    cost = passes.cumsum()
    whole = cost.max(initial=0.0)
    count = max(1, round(whole / PASSES_PER_UNIT))
    number = np.minimum(cost / max(whole, 1e-9) * count, count - 1).astype(int)
    return [np.flatnonzero(number == part) for part in np.unique(number)]


def _key_of(model: Any) -> str:
    """Tells one model from another in the workers' memory."""
    if isinstance(model, str):
        return model
    # Dask sends functions by value, with the module that it brings.
    pickler = sys.modules.get("cloudpickle", pickle)
    try:
        return hashlib.sha256(pickler.dumps(model)).hexdigest()
    except Exception as error:
        raise TypeError(
            f"{model!r} cannot be sent to workers ({error}): define the function at the top of a "
            "module"
        ) from error


def _answer(key: str, model: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """In a worker: load the model unless it is there, answer, and say what was warned of."""
    with _lock:
        if key not in _loaded:
            _loaded.clear()  # Memory holds one at a time.
            _loaded[key] = load_model(model) if isinstance(model, str) else model()
        bridge = _loaded[key]
    checks.warned_of()
    return function(bridge, *args), checks.warned_of()


def _unit(
    model: Any,
    function: Callable[..., dict[str, np.ndarray]],
    tasks: Mapping[str, Task],
    numbers: np.ndarray,
    how: How,
) -> dict[str, np.ndarray]:
    """What a worker does; on a CPU it takes of free memory the share that it has of the cores."""
    if how.options.memory is None and torch.device(device_of(model)).type == "cpu":
        cores = min(1.0, torch.get_num_threads() / (os.cpu_count() or 1))
        memory = int(psutil.virtual_memory().available * SHARE_OF_FREE_MEMORY * cores)
        how = replace(how, options=replace(how.options, memory=max(1, memory)))
    return function(model, tasks, numbers, how)
