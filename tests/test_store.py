"""A sweep given a file keeps its finished cells there, and resumes; nothing gets mixed up."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import machines
import oracle
import pandas as pd
import pytest
import tiny
import torch
from oracle import make_pair, pair
from torch import Tensor

from patching_demo import patching
from patching_demo.engine import runner, store
from patching_demo.engine.cells import Cell, Patch

pytestmark = pytest.mark.filterwarnings("ignore:this sweep takes the plain loop")


@pytest.fixture(autouse=True)
def _small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny sweep, too, is written several times."""
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


KILLED = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from patching_demo.engine import store
    import oracle, test_store
    store.CellStore.most_cells = lambda self, total: 8
    def metric(logits, calls=iter(range(20))):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return oracle.all_logits(logits)
    test_store.sweep(sys.argv[2], metric)
"""


def python(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Code in a process of its own, which finds this folder and a file in its arguments."""
    command = [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parent), str(path)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("how", ["interrupted", "in a plain loop", "killed"])
def test_an_interrupted_sweep_resumes_where_it_was(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "in a plain loop":
        monkeypatch.setattr(runner, "_reasons_for_plain_loop", lambda *_: ["a test"])
    path = tmp_path / "here" / "there" / "a name with späces"
    whole = sweep(None)
    if how == "killed":
        path.parent.mkdir(parents=True)
        done = python(KILLED, path)
        assert done.returncode == -signal.SIGKILL, done.stderr
    else:
        with pytest.raises(Interrupt):
            sweep(path, interrupting(20))
    finished = kept(path)
    assert 0 < finished < whole.numel()
    metric, calls = counting()
    resumed = sweep(path, metric)
    assert torch.allclose(resumed, whole, rtol=1e-5)
    # The corrupted run is scored again (and a turned copy of it, to tell the metric); no cell is.
    assert calls[0] <= whole.numel() - finished + 3
    # It serves the same inputs from another place and under other options.
    moved, (again, calls) = path.rename(tmp_path / "moved.safetensors"), counting()
    assert torch.equal(sweep(moved, again, memory=5_000), resumed)
    assert calls[0] <= 3


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    before = path.read_bytes()
    yield
    assert path.read_bytes() == before


@pytest.mark.parametrize("what", ["short", "shorter", "text", "a folder", "another's", "newer"])
def test_what_is_no_store_is_named_and_stays(tmp_path: Path, what: str) -> None:
    path = tmp_path / "cells.sweep"
    if what == "a folder":
        with pytest.raises(ValueError, match="is not a complete store of a sweep"):
            sweep(tmp_path)
        return
    with closing(sqlite3.connect(path)) as file:
        if what == "another's":
            file.execute("CREATE TABLE finished (cell INTEGER PRIMARY KEY, value BLOB)")
        else:
            sweep(path)
        if what == "newer":
            file.execute("PRAGMA user_version = 99")
    if what == "text":
        path.write_text("not a database, but long enough to be looked at" * 9)
    if what.startswith("short"):
        path.write_bytes(path.read_bytes()[: {"short": -1, "shorter": 100}[what]])
    says = "store version 99, this is version" if what == "newer" else "is not a complete store"
    with unchanged(path), pytest.raises(ValueError, match=f"cells.sweep' .*{says}|{says}"):
        sweep(path)


def generic(path: Path, rows: list[list[int]], setter: Any = None) -> Tensor:
    """A sweep of chosen cells, by a setter of the user's own or TransformerLens's."""
    data = pair("gpt2")
    activation, usual, axes = oracle.SWEEPS["resid_pre"]
    return patching.generic_activation_patch(
        tiny.model("gpt2"),
        data.corrupted,
        data.cache,
        oracle.all_logits,
        setter or usual,
        activation,
        index_df=pd.DataFrame(rows, columns=axes),
        store=path,
        progress=False,
    )


def adding(corrupted: Tensor, index: list[int], clean: Tensor, times: float = 1) -> Tensor:
    """A patch setter of the user's own."""
    corrupted[:, index[1]] += clean[:, index[1]] * times
    return corrupted


def normalised(name: str) -> Any:
    """A metric that is 0 on the corrupted run, as every normalised one."""
    metric = pair("gpt2").metrics[name]
    with torch.no_grad():
        base = float(metric(tiny.model("gpt2")(pair("gpt2").corrupted)))
    return metric.normalised(clean=base + 1, corrupted=base)


def other_inputs() -> dict[str, tuple[Callable[..., Tensor], dict[str, Any], dict[str, Any]]]:
    """By what differs: a sweep, its inputs, and inputs that differ in that alone."""
    data, model = pair("gpt2"), tiny.model("gpt2")
    other = make_pair(model, seed=3)
    other = oracle.Pair(other.clean, data.corrupted, other.cache, data.metrics)
    rows = [[layer, pos] for layer in (0, 1) for pos in range(1, 5)]
    per_example = {"metric": oracle.all_logits_per_example, "reduce": "mean"}
    return {
        "prompts": (sweep, {}, {"data": make_pair(model, differ=(2,), seed=1)}),
        "clean prompts": (sweep, {}, {"data": other}),
        "model": (sweep, {}, {"model": tiny.fresh("gpt2", seed=1)}),
        "metric": (sweep, {}, {"metric": lambda logits: oracle.all_logits(logits) * 2}),
        "normalised metric": (
            sweep,
            {"metric": normalised("difference")},
            {"metric": normalised("log-probability")},
        ),
        "kind": (sweep, {}, {"kind": "attn_head_q_by_pos"}),
        "kind of cell": (sweep, {}, {"kind": "attn_head_out_all_pos"}),
        "reduction": (sweep, {}, per_example),
        "order of cells": (generic, {"rows": rows}, {"rows": rows[::-1]}),
        "setter": (
            generic,
            {"rows": rows, "setter": adding},
            {"rows": rows, "setter": partial(adding, times=2)},
        ),
    }


@pytest.mark.parametrize(
    "what",
    ["prompts", "clean prompts", "model", "metric", "normalised metric", "kind", "kind of cell"]
    + ["reduction", "order of cells", "setter"],
)
def test_a_file_of_other_inputs_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "cells.sweep"
    run, first, second = other_inputs()[what]
    values = run(path, **first)
    with unchanged(path), pytest.raises(ValueError, match="belongs to a sweep of another|shape"):
        run(path, **second)
    assert values.std() > 0 and torch.equal(run(path, **first), values)


def test_two_sweeps_do_not_share_a_file(tmp_path: Path) -> None:
    """The second is sent away, in this process and in another, and the first goes on."""
    path, refusals = tmp_path / "cells.sweep", []
    script = "import sys; sys.path.insert(0, sys.argv[1])\n"
    script += "import test_store; test_store.sweep(sys.argv[2])"

    def on_progress(done: int, total: int) -> None:
        if done and not refusals:
            with pytest.raises(RuntimeError, match="another sweep is writing to") as refusal:
                sweep(path)
            refusals.append(str(refusal.value))
            refusals.append(python(script, path).stderr)

    values = sweep(path, on_progress=on_progress)
    assert len(refusals) == 2 and "another sweep is writing to" in refusals[1]
    assert torch.allclose(values, sweep(None), rtol=1e-5)
    assert kept(path) == values.numel()


def test_a_finished_cell_is_never_written_again(tmp_path: Path) -> None:
    """The last of many cells costs no more than the first."""
    patches = [Patch(None, "hook", 0, (0,), index=(row,)) for row in range(3000)]
    cells = [Cell(row, (patch,)) for row, patch in enumerate(patches)]
    model = SimpleNamespace(state_dict=lambda: {"weight": torch.ones(3)})
    inputs = (model, torch.ones(1, 2), {"hook": torch.ones(2)}, cells, lambda: torch.ones(2, 1))
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


def test_a_full_disk_is_named_and_leaves_the_last_complete_state(tmp_path: Path) -> None:
    path = tmp_path / "cells.sweep"
    with pytest.raises(Interrupt):
        sweep(path, interrupting(20))
    finished = kept(path)
    with (
        machines.file_size_limit(64),
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


def test_each_of_several_metrics_tells_a_sweep_from_another(tmp_path: Path) -> None:
    """A small one is not lost beside a large one."""
    data, path = pair("gpt2"), tmp_path / "kept"

    def swept(token: int) -> Any:
        metrics = {
            "large": lambda logits: 100 * logits[:, -1, 5].mean(),
            "small": lambda logits: logits[:, -1].softmax(-1)[:, token].mean(),
        }
        return patching.get_act_patch_resid_pre(
            tiny.model("gpt2"), data.corrupted, data.cache, metrics, store=path, progress=False
        )

    swept(7)
    with pytest.raises(ValueError, match="belongs to a sweep of another"):
        swept(9)
    swept(7)
