"""Activation patching, small enough to read and fast enough to use.

A model and a task make a sweep, a sweep gives a labelled result, a result makes a figure::

    from patching_demo import ioi_task, load_model, plots, sweep

    model = load_model()
    task = ioi_task(model).normalised()
    plots.heatmap(sweep(model, task, "resid_pre"))
"""

from __future__ import annotations

from patching_demo import claims, explorer, metrics, notebook, patching, plots
from patching_demo.models import load_model
from patching_demo.results import combine, interval, largest_cells, load, save, share
from patching_demo.sweeps import attribute, complement, patch, paths, plan, sweep
from patching_demo.tasks import (
    Task,
    capital_task,
    induction_task,
    ioi_task,
    noise_task,
    prompt_task,
)

__all__ = [
    "Task",
    "attribute",
    "capital_task",
    "claims",
    "combine",
    "complement",
    "explorer",
    "induction_task",
    "interval",
    "ioi_task",
    "largest_cells",
    "load",
    "load_model",
    "metrics",
    "noise_task",
    "notebook",
    "patch",
    "patching",
    "paths",
    "plan",
    "plots",
    "prompt_task",
    "save",
    "share",
    "sweep",
]

__version__ = "0.2.0"
