"""Activation patching, small enough to read and fast enough to use.

A model and a task make a sweep, a sweep gives a labelled result, a result makes a figure::

    from patching_demo import ioi_task, load_model, plots, sweep

    model = load_model()
    task = ioi_task(model).normalised()
    plots.heatmap(sweep(model, task, "resid_pre"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patching_demo.models import load_model
    from patching_demo.results import combine, largest_cells, load, save, share, sweep
    from patching_demo.tasks import Task, induction_task, ioi_task, prompt_task

__all__ = [
    "Task",
    "combine",
    "induction_task",
    "ioi_task",
    "largest_cells",
    "load",
    "load_model",
    "prompt_task",
    "save",
    "share",
    "sweep",
]

__version__ = "0.1.0"

_HOMES = {
    "load_model": "models",
    **dict.fromkeys(("Task", "induction_task", "ioi_task", "prompt_task"), "tasks"),
    **dict.fromkeys(("combine", "largest_cells", "load", "save", "share", "sweep"), "results"),
}
_MODULES = (
    "claims",
    "explorer",
    "metrics",
    "models",
    "notebook",
    "patching",
    "plots",
    "results",
    "tasks",
)


def __getattr__(name: str) -> Any:
    # Imported on first use: importing torch takes seconds, which a book build that needs only
    # the figure renderer should not spend.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
