"""What every test may rely on: the checkout's own files, and the same start for every test."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def untraced() -> Iterator[None]:
    """Without coverage, which traces all Python that runs, ours or not: it takes twice as long."""
    tracer = sys.gettrace()
    if type(tracer).__name__ == "CTracer":  # A debugger may stay.
        sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)


# One thread for each of two test processes (pytest -n 2), two for a single one: CI has two cores.
# A worker overrides what it inherits, for threads that wait for a taken core are many times slower.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    with untraced():
        for name in "jupytext plotly.graph_objects scipy.stats transformer_lens xarray".split():
            importlib.import_module(name)
else:
    os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))


def pytest_collection_finish() -> None:
    """What was imported is never garbage, and a million objects to look through each time."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Coverage is measured on a test's first model and kind: others run the same lines."""
    indices = item.callspec.indices if hasattr(item, "callspec") else {}
    over = ("name", "architecture", "dtype", "kind", "sweep")
    first = not any(map(indices.get, over))
    with nullcontext() if first else untraced():
        return (yield)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's root folder."""
    return ROOT


@pytest.fixture(autouse=True)
def _alone() -> None:
    """Tests run in random order: none may depend on the draws or the warnings of the one before."""
    # A test that has not imported torch draws nothing, and need not wait for it.
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "patching_demo.engine.checks" in sys.modules:
        sys.modules["patching_demo.engine.checks"]._warned.clear()
