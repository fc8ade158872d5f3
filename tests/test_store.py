"""A sweep given a file keeps its finished cells there, and resumes; nothing gets mixed up."""

from __future__ import annotations

import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pandas as pd
import pytest
import tiny
import torch
from oracle import make_pair, pair
from torch import Tensor

from patching_demo import patching
from patching_demo.engine import checks, runner, store
from patching_demo.engine.cells import Cell

pytestmark = pytest.mark.filterwarnings("ignore:this sweep takes the plain loop")


@pytest.fixture(autouse=True)
def _small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny sweep, too, is written several times."""
    torch.set_num_threads(1)
    checks._warned.clear()
    monkeypatch.setattr(store.CellStore, "most_cells", lambda self, total: 8)


def kept(path: Path, query: str = "SELECT count(*) FROM finished") -> int:
    """What another program reads in the file; by default how many cells are finished."""
    with closing(sqlite3.connect(path)) as file:
        return file.execute(query).fetchone()[0]


def sweep(path: Path | None, metric: Any = None, name: str = "gpt2", **options: Any) -> Tensor:
    data = options.pop("data", None) or pair(name)
    metric = metric or data.metrics["all logits"]
    kind = options.pop("kind", "attn_head_out_by_pos")
    return getattr(patching, f"get_act_patch_{kind}")(
        options.pop("model", None) or oracle.model(name),
        data.corrupted,
        data.cache,
        metric,
        store=path,
        progress=False,
        check=0,
        **options,
    )


class Interrupt(Exception):
    """Stands for the power cut."""


def interrupting(after: int) -> Callable[[Tensor], Tensor]:
    """The usual metric, until it has been asked ``after`` times."""
    calls = iter(range(after))

    def metric(logits: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise Interrupt
        return oracle.all_logits(logits)

    return metric


def counting() -> tuple[Callable[[Tensor], Tensor], list[int]]:
    calls = [0]

    def metric(logits: Tensor) -> Tensor:
        calls[0] += 1
        return oracle.all_logits(logits)

    return metric, calls


@pytest.mark.parametrize("plain", [False, True])
def test_an_interrupted_sweep_resumes_where_it_was(
    tmp_path: Path, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(runner, "_reasons_for_plain_loop", lambda *_: ["a test"])
    path = tmp_path / "cells.sweep"
    whole = sweep(None)
    with pytest.raises(Interrupt):
        sweep(path, interrupting(20))
    finished = kept(path)
    assert 0 < finished < whole.numel()
    metric, calls = counting()
    resumed = sweep(path, metric)
    assert torch.allclose(resumed, whole, rtol=1e-5)
    # The corrupted run is scored again (and a turned copy of it, to tell the metric); no cell is.
    assert calls[0] <= whole.numel() - finished + 3
    again, calls = counting()
    assert torch.equal(sweep(path, again), resumed)
    assert calls[0] <= 3


def test_a_killed_process_leaves_a_store_to_resume_from(tmp_path: Path) -> None:
    path = tmp_path / "cells.sweep"
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        torch.set_num_threads(1)
        from patching_demo.engine import store
        import oracle, test_store
        store.CellStore.most_cells = lambda self, total: 8
        def metric(logits, calls=iter(range(20))):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return oracle.all_logits(logits)
        test_store.sweep({str(path)!r}, metric)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    finished = kept(path)
    assert finished > 0
    metric, calls = counting()
    resumed = sweep(path, metric)
    assert torch.allclose(resumed, sweep(None), rtol=1e-5)
    assert calls[0] <= resumed.numel() - finished + 3


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    before = path.read_bytes()
    yield
    assert path.read_bytes() == before


@pytest.mark.parametrize("keep", [4, 100, 5000, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cells.sweep"
    sweep(path)
    path.write_bytes(path.read_bytes()[:keep])
    with unchanged(path), pytest.raises(ValueError, match="cells.sweep' is not a complete store"):
        sweep(path)


@pytest.mark.parametrize("made_by", ["text", "another program", "a newer version"])
def test_another_file_is_named(tmp_path: Path, made_by: str) -> None:
    path = tmp_path / "cells.sweep"
    with closing(sqlite3.connect(path)) as file:
        if made_by == "text":
            path.write_text("not a database, but long enough to be looked at" * 9)
        elif made_by == "another program":
            file.execute("CREATE TABLE finished (cell INTEGER PRIMARY KEY, value BLOB)")
        else:
            sweep(path)
            file.execute("PRAGMA user_version = 99")
    says = "store version 99, this is version" if "newer" in made_by else "is not a complete store"
    with unchanged(path), pytest.raises(ValueError, match=says):
        sweep(path)


def other_inputs() -> dict[str, dict[str, Any]]:
    model = tiny.model("gpt2")
    other = tiny.fresh("gpt2", seed=1)
    return {
        "prompts": {"data": make_pair(model, differ=(2,), seed=1)},
        "clean prompts": {"data": with_cache_of(make_pair(model, seed=3))},
        "model": {"model": other},
        "metric": {"metric": lambda logits: oracle.all_logits(logits) * 2},
        "kind": {"kind": "attn_head_q_by_pos"},
        "cells": {"kind": "attn_head_out_all_pos"},
        "reduction": {"metric": oracle.all_logits_per_example, "reduce": "mean"},
    }


def with_cache_of(other: Any) -> Any:
    """The usual corrupted prompts and another clean run."""
    data = pair("gpt2")
    return oracle.Pair(other.clean, data.corrupted, other.cache, data.metrics)


@pytest.mark.parametrize(
    "what", ["prompts", "clean prompts", "model", "metric", "kind", "cells", "reduction"]
)
def test_a_file_of_other_inputs_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "cells.sweep"
    sweep(path)
    with unchanged(path), pytest.raises(ValueError, match="belongs to a sweep of another|shape"):
        sweep(path, **other_inputs()[what])


def test_a_file_of_as_many_other_cells_is_refused(tmp_path: Path) -> None:
    """Of the same activations, so that nothing but their indices tells them apart."""
    path, data = tmp_path / "cells.sweep", pair("gpt2")
    activation, setter, axes = oracle.SWEEPS["resid_pre"]
    cells = pd.DataFrame([[layer, pos] for layer in (0, 1) for pos in range(1, 5)], columns=axes)

    def sweep_of(index: pd.DataFrame) -> Tensor:
        return patching.generic_activation_patch(
            tiny.model("gpt2"),
            data.corrupted,
            data.cache,
            oracle.all_logits,
            setter,
            activation,
            index_df=index,
            store=path,
            progress=False,
        )

    values = sweep_of(cells)
    with unchanged(path), pytest.raises(ValueError, match="belongs to a sweep of another"):
        sweep_of(cells[::-1].reset_index(drop=True))
    assert values.std() > 0 and torch.equal(sweep_of(cells), values)


def test_a_file_serves_the_same_inputs_from_another_place(tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "a name with späces.safetensors"
    values = sweep(first)
    first.rename(second)
    metric, calls = counting()
    assert torch.equal(sweep(second, metric), values)
    assert calls[0] <= 3


def test_two_sweeps_do_not_share_a_file(tmp_path: Path) -> None:
    """The second is sent away, in this process and in another, and the first goes on."""
    path, refusals = tmp_path / "cells.sweep", []
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_store
        test_store.sweep({str(path)!r})
    """

    def on_progress(done: int, total: int) -> None:
        if done and not refusals:
            with pytest.raises(RuntimeError, match="another sweep is writing to") as refusal:
                sweep(path)
            refusals.append(str(refusal.value))
            command = [sys.executable, "-c", textwrap.dedent(script)]
            refusals.append(subprocess.run(command, capture_output=True, text=True).stderr)

    values = sweep(path, on_progress=on_progress)
    assert len(refusals) == 2 and "another sweep is writing to" in refusals[1]
    assert torch.allclose(values, sweep(None), rtol=1e-5)
    assert kept(path) == values.numel()


def test_a_finished_cell_is_never_written_again(tmp_path: Path) -> None:
    """The last of many cells costs no more than the first."""
    cells = [Cell(row, None, "hook", 0, (0,), index=(row,)) for row in range(3000)]
    model = SimpleNamespace(state_dict=lambda: {"weight": torch.ones(3)})
    inputs = (model, torch.ones(1, 2), {"hook": torch.ones(2)}, cells, lambda: torch.ones(2))
    values, written = torch.rand(1, len(cells)), []

    def bytes_written() -> int:
        return int(re.search(r"wchar: (\d+)", Path("/proc/self/io").read_text())[1])

    with store.CellStore.open(tmp_path / "cells.sweep", *inputs) as file:
        for portion in (cells[:1], cells[1:-1], cells[-1:]):
            before = bytes_written()
            file.finish(values, portion)
            written.append(bytes_written() - before)
    assert written[2] < 3 * written[0] < written[1]
    with store.CellStore.open(tmp_path / "cells.sweep", *inputs) as file:
        read = torch.zeros(1, len(cells))
        assert file.unfinished(read) == [] and torch.equal(read, values)
        file.forget()
        assert file.unfinished(read) == cells


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """What a full disk does, as a process without other rights can have it: writes fail."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_is_named_and_leaves_the_last_complete_state(tmp_path: Path) -> None:
    path = tmp_path / "cells.sweep"
    with pytest.raises(Interrupt):
        sweep(path, interrupting(20))
    finished = kept(path)
    with (
        file_size_limit(64),
        pytest.raises(OSError, match="cannot write .*what it held before is intact"),
    ):
        sweep(path)
    assert kept(path) >= finished and kept(path, "PRAGMA integrity_check") == "ok"
    assert torch.allclose(sweep(path), sweep(None), rtol=1e-5)


def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path: Path) -> None:
    # Root may write to a read-only folder, but not to this one.
    folder = Path("/proc") if os.geteuid() == 0 else tmp_path
    folder.chmod(0o500) if folder == tmp_path else None
    metric, calls = counting()
    with pytest.raises(OSError, match=r"cannot write '.*cells.sweep' .*ame a file elsewh"):
        sweep(folder / "cells.sweep", metric)
    assert calls[0] <= 3


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a complete store of a sweep"):
        sweep(tmp_path)


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "here" / "there" / "cells.sweep"
    assert torch.equal(sweep(path), sweep(path))


def test_metrics_that_agree_on_the_corrupted_run_are_told_apart(tmp_path: Path) -> None:
    """Every normalised metric is 0 there."""
    path = tmp_path / "cells.sweep"
    data = pair("gpt2")
    with torch.no_grad():
        logits = tiny.model("gpt2")(data.corrupted)
    metrics = []
    for name in ("difference", "log-probability"):
        base = float(data.metrics[name](logits))
        metrics.append(data.metrics[name].normalised(clean=base + 1, corrupted=base))
    one, other = metrics
    assert max(abs(float(metric(logits))) for metric in metrics) < 1e-5
    sweep(path, one)
    with unchanged(path), pytest.raises(ValueError, match="belongs to a sweep of another"):
        sweep(path, other)


def test_finished_cells_are_not_computed_again_under_other_options(tmp_path: Path) -> None:
    path = tmp_path / "cells.sweep"
    first = sweep(path, memory=100_000)
    metric, calls = counting()
    assert torch.equal(sweep(path, metric, memory=5_000), first)
    assert calls[0] <= 3
