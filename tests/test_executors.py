"""Workers of an executor answer as one process does, whatever is killed on the way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_roles
import tiny
import torch
import xarray as xr
from torch import Tensor

from patching_demo import induction_task, ioi_task, load_model, patch, paths, sweep
from patching_demo.engine.runner import SweepStopped
from patching_demo.sweeps import executors
from patching_demo.tasks import Task

QUIET = {"progress": False, "check": 0}
MAKER = partial(tiny.fresh, "gpt2")


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "PASSES_PER_UNIT", 0.5)
    executors._loaded.clear()


def ioi(metric: Any = None) -> Task:
    task = ioi_task(tiny.model("gpt2"))
    return task.with_metric(tiny.model("gpt2"), metric) if metric else task


def by_role() -> Task:
    return test_roles.task_of("gpt2")


def pool() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(2, context, initializer=torch.set_num_threads, initargs=(1,))


def some(found: xr.DataArray) -> xr.DataArray:
    return xr.DataArray([True, False] * (found.sizes["head"] // 2), coords={"head": found.head})


SETS = {"one": [("out", 0, 1)], "two": [("out", 1, 2), ("mlp_out", 0)], "three": [("out", 1)]}
AT_ROLES = {"a": [("resid_pre", 1, None, "subject")], "b": [("out", 0, 1, "END")]}
QUESTIONS = {
    "kinds": lambda m, **o: sweep(m, ioi(), ["resid_pre", "mlp_out"], **o),
    "chosen": lambda m, **o: sweep(
        m, ioi(), "out", layers=[1], positions=["John 10", "gave 11"], heads=[0, 3], **o
    ),
    "where": lambda m, **o: sweep(
        m, ioi(), ["q", "k"], where=some(sweep(tiny.model("gpt2"), ioi(), "q", **QUIET)), **o
    ),
    "windows per prompt": lambda m, **o: sweep(
        m, ioi(), "attn_out", window=2, per_prompt=True, **o
    ),
    "whole heads, zero": lambda m, **o: sweep(m, ioi(), "v", by="all_pos", source="zero", **o),
    "roles": lambda m, **o: sweep(m, by_role(), "out", by="role", **o),
    "roles per prompt": lambda m, **o: sweep(
        m, by_role(), ["resid_pre"], by="role", per_prompt=True, **o
    ),
    "roles, mean": lambda m, **o: sweep(m, by_role(), "resid_pre", by="role", source="mean", **o),
    "sets": lambda m, **o: patch(m, ioi(), SETS, **o),
    "sets at roles": lambda m, **o: patch(m, by_role(), AT_ROLES, per_prompt=True, **o),
    "paths": lambda m, **o: paths(m, ioi(), [("k", 1, 2)], **o),
    "paths at a role": lambda m, **o: paths(m, ioi(), [("q", 1, 2, "END")], **o),
    "paths of layers": lambda m, **o: paths(m, ioi(), "logits", senders="mlp_out", **o),
}

SMALL = ("chosen", "paths of layers")


def same(found: xr.DataArray, wanted: xr.DataArray) -> None:
    xr.testing.assert_allclose(found, wanted, atol=1e-5)
    assert found.attrs == wanted.attrs


@pytest.mark.parametrize("question", QUESTIONS)
def test_workers_answer_as_one_process_does(question: str) -> None:
    heard: list[tuple[int, int]] = []
    wanted = QUESTIONS[question](tiny.model("gpt2"), **QUIET)
    with ThreadPoolExecutor(2) as threads:
        found = QUESTIONS[question](
            MAKER, executor=threads, on_progress=lambda *at: heard.append(at), **QUIET
        )
    same(found, wanted)
    done, totals = zip(*heard, strict=True)
    assert list(done) == sorted(done) and {done[-1]} == set(totals)
    assert (len(heard) > 1) == (question not in SMALL)


def test_a_model_is_loaded_once_and_kept() -> None:
    made: list[Any] = []

    class Maker:
        def __call__(self) -> Any:
            made.append(tiny.fresh("gpt2"))
            return made[-1]

        def __reduce__(self) -> Any:  # Always the same bytes.
            return str, ("maker",)

    with ThreadPoolExecutor(2) as threads:
        for _ in range(2):
            sweep(Maker(), ioi(), "resid_pre", executor=threads, **QUIET)
    assert len(made) == 1 and len(executors._loaded) == 1


def test_what_cannot_be_shared_out_is_refused() -> None:
    model, task = tiny.model("gpt2"), ioi()
    with ThreadPoolExecutor(1) as threads:
        with pytest.raises(TypeError, match="a name or a function that makes the model"):
            sweep(model, task, "out", executor=threads)
        with pytest.raises(TypeError, match="cannot be sent to workers"):
            sweep(threads.submit, task, "out", executor=threads)
        with pytest.raises(KeyError, match="layer 9 is not among"):
            sweep(MAKER, task, "out", layers=9, executor=threads)
        with pytest.raises(SweepStopped, match="stopped after"):
            sweep(MAKER, task, "out", executor=threads, on_progress=lambda *at: True)
        with pytest.raises(TypeError, match="unknown option 'stor': the options are memory"):
            sweep(MAKER, task, "out", executor=threads, stor="x")
    with pytest.raises(TypeError, match="must be a concurrent.futures.Executor, got int"):
        sweep(MAKER, task, "out", executor=2)
    with pytest.raises(TypeError, match="must be a TransformerBridge"):
        sweep("attn-only-2l-demo", task, "out")
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, fork) as forked, pytest.raises(ValueError, match="'spawn'"):
        patch(MAKER, task, SETS, executor=forked)


def test_units_are_cut_by_cost_and_lose_no_cell() -> None:
    passes = np.linspace(0.12, 0, 24)
    parts = list(executors._portions(passes))
    assert np.concatenate(parts).tolist() == list(range(24))
    costs = [passes[own].sum() for own in parts]
    assert len(parts) == 3 and max(costs) < 1.5 * min(costs)
    assert len(list(executors._portions(0 * passes))) == 1


def metric_that_kills_once(logits: Tensor, calls: list[int] = [0]) -> Tensor:  # noqa: B006
    """In a worker, kills its process after a while, unless a file says that this was done."""
    calls[0] += 1
    flag = os.environ.get("LETHAL")
    if flag and multiprocessing.parent_process() is not None and calls[0] > 25:
        if not Path(flag).exists():
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return logits[:, -1, 5].mean()


@pytest.fixture
def lethal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LETHAL", str(tmp_path / "killed"))
    return tmp_path / "killed"


def resumed(path: Path, task: Task, wanted: xr.DataArray) -> None:
    """Sweep on with what is kept: each unit that is finished is read, and only the rest is run."""
    files = [file for file in path.parent.glob(f"{path.name}-*") if file.name[-1].isdigit()]
    kept = {file: finished(file) for file in files}
    unit, cells = max(kept.items(), key=lambda item: len(item[1]))
    with closing(sqlite3.connect(unit)) as file, file:
        file.execute("UPDATE finished SET value = ?", (struct.pack("d", 42.0),))
    with ThreadPoolExecutor(2) as threads:
        found = sweep(MAKER, task, "out", executor=threads, store=path, **QUIET)
    assert int((found == 42).sum()) == len(cells) > 1
    same(found.where(found != 42, wanted), wanted)


def finished(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as file:
        return [cell for (cell,) in file.execute("SELECT cell FROM finished")]


@pytest.mark.slow
def test_a_process_pool_answers_and_tells_of_errors_and_deaths(
    lethal: Path, tmp_path: Path
) -> None:
    store = tmp_path / "cells"
    with pool() as workers:
        for question in ("where", "roles", "sets", "paths at a role"):
            wanted = QUESTIONS[question](tiny.model("gpt2"), **QUIET)
            same(QUESTIONS[question](MAKER, executor=workers, **QUIET), wanted)
        other = ioi_task(tiny.fresh("gpt2", seed=1))
        with pytest.raises(ValueError, match="belongs to another model") as error:
            sweep(MAKER, other, "out", executor=workers)
        assert "question.py" in str(error.value.__cause__)  # the worker's traceback
        task = ioi(metric_that_kills_once)
        with pytest.raises(RuntimeError, match="a worker was killed"):
            sweep(MAKER, task, "out", executor=workers, store=store, **QUIET)
        with pytest.raises(RuntimeError, match="make a new executor"):
            sweep(MAKER, task, "out", executor=workers, **QUIET)
    assert lethal.exists()
    resumed(store, task, sweep(tiny.model("gpt2"), task, "out", **QUIET))


@pytest.mark.slow
def test_after_kill_9_of_everything_only_the_rest_is_computed(tmp_path: Path) -> None:
    store = tmp_path / "cells"
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_executors import *

        def stop(done, total):
            if done > total / 2:
                os.killpg(0, signal.SIGKILL)

        if __name__ == "__main__":
            executors.PASSES_PER_UNIT = 0.5
            with pool() as workers:
                sweep(MAKER, ioi(), "out", executor=workers, store={str(store)!r},
                      on_progress=stop, **QUIET)
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, script], start_new_session=True, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed(store, ioi(), sweep(tiny.model("gpt2"), ioi(), "out", **QUIET))


@pytest.mark.slow
def test_dask_answers_and_runs_again_what_a_killed_worker_had(lethal: Path) -> None:
    from distributed import Client, LocalCluster

    task = ioi(metric_that_kills_once)
    wanted = sweep(tiny.model("gpt2"), task, "out", **QUIET)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        executor = client.get_executor()
        same(sweep(MAKER, task, "out", executor=executor, **QUIET), wanted)
        assert lethal.exists(), "no worker was killed"
        question = QUESTIONS["roles per prompt"]
        same(
            question(lambda: MAKER(), executor=executor, **QUIET),
            question(tiny.model("gpt2"), **QUIET),
        )
        named = load_model("attn-only-2l-demo")
        short = induction_task(named, batch=2, seq_len=6)
        wanted = sweep(named, short, "k", **QUIET)
        same(sweep("attn-only-2l-demo", short, "k", executor=executor, **QUIET), wanted)
