"""An interactive panel over sweeps, for notebooks with a kernel."""

from __future__ import annotations

import warnings
from typing import Any

from patching_demo.explorer.widgets import Panel

__all__ = ["Panel"]


def __getattr__(name: str) -> Any:
    if name == "explore":
        warnings.warn("explorer.explore is now explorer.Panel", DeprecationWarning, stacklevel=2)
        return Panel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
