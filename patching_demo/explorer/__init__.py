"""An interactive panel over sweeps, for notebooks with a kernel."""

from __future__ import annotations

import warnings
from typing import Any

from patching_demo.explorer.widgets import Panel, panel

__all__ = ["Panel", "panel"]


def __getattr__(name: str) -> Any:
    if name == "explore":
        warnings.warn("explorer.explore is now called panel", DeprecationWarning, stacklevel=2)
        return panel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
