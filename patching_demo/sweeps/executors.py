"""A question shared out to workers: any executor of ``concurrent.futures`` runs its units."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    as_completed,
)
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm

from patching_demo.engine import checks
from patching_demo.engine.runner import SHARE_OF_FREE_MEMORY, Options, SweepStopped
from patching_demo.engine.tokens import device_of
from patching_demo.models import load_model
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
        cells: np.ndarray,
        passes: np.ndarray,
        *,
        cut: bool,
        per_prompt: bool,
        options: Mapping[str, Any],
    ) -> dict[str, np.ndarray]:
        """Values ``[(prompt), ...cells]`` for each task, NaN where no cell is asked for.

        Args:
            function: called with the model, tasks, cells, per_prompt and options; returns the
                values of those cells.
            cells: the number of each cell, NaN where none is asked for.
            passes: what each cell costs, in forward passes.
            cut: whether prompts can be measured apart from each other.

        Raises:
            RuntimeError: if a worker was killed, and the executor does not run its unit again.
        """
        if self.executor is None:
            return function(self.model, tasks, cells, per_prompt, options)
        given = Options.of(options)
        first = next(iter(tasks.values()))
        apart = cut and all(
            task.corrupted_values is not None and task.metric.selectable for task in tasks.values()
        )
        groups = first.groups() if apart else [list(range(len(first)))]
        own = {name: value for name, value in options.items() if name != "on_progress"}
        own["progress"], by_prompt = False, per_prompt or len(groups) > 1
        units: dict[Future[Any], tuple[list[int], np.ndarray]] = {}
        for prompts in groups:
            parts = dict(tasks)
            if len(groups) > 1:
                parts = {name: task.part(prompts) for name, task in tasks.items()}
            for portion in _portions(cells, passes):
                if given.store is not None:
                    own["store"] = f"{os.fspath(given.store)}-{len(units)}"
                unit = (function, parts, portion, by_prompt, dict(own))
                units[self._submit(_unit, unit)] = prompts, portion
        shape = (len(first) if by_prompt else 1, cells.size)
        found = {name: np.full(shape, np.nan, np.float32) for name in tasks}
        total, done = np.isfinite(cells).sum(), 0.0
        with tqdm(total=total, disable=not given.progress, leave=False, unit="cell") as bar:
            try:
                for future in as_completed(units):
                    prompts, portion = units[future]
                    asked = np.isfinite(portion).ravel().nonzero()[0]
                    rows = prompts if by_prompt else [0]
                    for name, values in self._result(future).items():
                        values = values.reshape(len(rows), -1)[:, asked]
                        found[name][np.ix_(rows, asked)] = values
                    done += len(asked) * len(prompts) / len(first)
                    bar.update(round(done) - bar.n)
                    if given.on_progress is not None and given.on_progress(round(done), int(total)):
                        raise SweepStopped(f"stopped after {round(done)} of {total} cells")
            finally:
                for future in units:
                    future.cancel()
        if not per_prompt:  # One row already, or the prompts of all groups.
            found = {name: values.mean(0, keepdims=True) for name, values in found.items()}
        lead = (len(first),) if per_prompt else ()
        return {name: values.reshape(*lead, *cells.shape) for name, values in found.items()}

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


def _portions(cells: np.ndarray, passes: np.ndarray) -> Iterator[np.ndarray]:
    """The cells in parts of about the same cost, each with NaN in place of the others."""
    asked = np.isfinite(cells)
    cost = np.where(asked, passes, 0.0).cumsum().reshape(cells.shape)
    whole = cost.max(initial=0.0)
    count = max(1, round(whole / PASSES_PER_UNIT))
    number = np.minimum(cost / max(whole, 1e-9) * count, count - 1).astype(int)
    for part in range(count):
        if (asked & (number == part)).any():
            yield np.where(number == part, cells, np.nan)


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
    cells: np.ndarray,
    per_prompt: bool,
    options: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """What a worker does; on a CPU it takes of free memory the share that it has of the cores."""
    if torch.device(device_of(model)).type == "cpu":
        cores = min(1.0, torch.get_num_threads() / (os.cpu_count() or 1))
        memory = int(psutil.virtual_memory().available * SHARE_OF_FREE_MEMORY * cores)
        options = {"memory": max(1, memory), **options}
    return function(model, tasks, cells, per_prompt, options)
