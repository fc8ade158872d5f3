"""What every test may rely on: the checkout's own files, and the same seed for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Two threads at most: CI machines have two cores, and two test runs may share them.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's root folder."""
    return ROOT


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests run in random order, so none may depend on the draws of the one before it."""
    import torch

    torch.manual_seed(0)
