"""What a notebook needs around its experiments: a seeded start, a model, sentences with numbers."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import os
import platform
import random
import re
import sys
from typing import Any

import numpy as np
import torch
import xarray as xr

from patching_demo.engine.kinds import kind_label
from patching_demo.models import TaskName, load_model, resolve_model
from patching_demo.plots.facts import baseline_names
from patching_demo.plots.tables import Html, table
from patching_demo.results import baselines, largest_cells

__all__ = ["diagram", "in_colab", "largest", "model", "runtime", "say", "setup", "typeset"]

_LIBRARIES = ("torch", "transformer_lens", "transformers", "xarray", "plotly", "ipywidgets")


def in_colab() -> bool:
    """Whether the notebook runs in Google Colab, which loads its own module before any cell."""
    return "google.colab" in sys.modules


def runtime() -> str:
    """Where the notebook runs, on what, and with which versions, in three lines."""
    if in_colab():
        where = "Google Colab"
    elif "ipykernel" in sys.modules:
        where = "Jupyter"
    else:
        where = "plain Python"
    if torch.cuda.is_available():
        device = f"GPU ({torch.cuda.get_device_name()})"
    else:
        device = f"no GPU; CPU with {os.cpu_count()} cores, {torch.get_num_threads()} used"
        if in_colab():
            device += ". Runtime > Change runtime type offers a GPU, which makes sweeps faster"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)
    return (
        f"Runtime: {where}, Python {platform.python_version()}\n"
        f"Device: {device}\n"
        f"Versions: {versions}"
    )


def setup(seed: int = 0) -> None:
    """Print :func:`runtime`, seed every source of random numbers, turn gradients off.

    Patching needs no gradients, and keeping them costs memory. Everything else that is random
    in a notebook takes its own seed.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_grad_enabled(False)
    print(runtime())


def model(requested: str = "auto", task: TaskName = "ioi") -> Any:
    """The model that a notebook runs on, with a line that says which and why.

    Args:
        requested: the notebook's parameter; the variable PATCHING_DEMO_MODEL overrides it.
        task: "ioi" needs English, "induction" any model.

    Returns:
        a TransformerBridge, as :func:`patching_demo.load_model` returns it.

    Raises:
        ValueError: there is no such model, or it cannot do the task.
        ModelUnavailable: its files can neither be found here nor fetched.
    """
    return load_model(resolve_model(requested, task))


def diagram() -> Html:
    """The drawing that opens the first chapter: one activation moved from one run into another.

    It is drawn in the colour of the text around it, and says in words what it shows.
    """
    path = importlib.resources.files("patching_demo") / "data" / "patching.svg"
    drawing = path.read_text(encoding="utf-8")
    return Html(drawing, " ".join(re.search("<desc[^>]*>(.*)</desc>", drawing, re.S)[1].split()))


def say(text: str) -> None:
    """Display a paragraph of Markdown, for sentences whose numbers were computed."""
    from IPython.display import Markdown, display

    display(Markdown(typeset(text)))


def typeset(text: str) -> str:
    """Numbers as figures and tables write them, outside of code spans.

    >>> typeset("-3.5 nats, -71% in `x[-1]` of attn-only-2l")
    '−3.5 nats, −71 % in `x[-1]` of attn-only-2l'
    """
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?<![\w.)])-(?=\d)", "−", parts[i])
        parts[i] = re.sub(r"(?<=\d)%", " %", parts[i])
    return "`".join(parts)


def largest(result: xr.DataArray, n: int = 5) -> Html:
    """The n largest effects of a sweep as a table with a caption; errors as `largest_cells`."""
    cells = largest_cells(result, n)
    if "kind" in cells:
        cells["kind"] = [kind_label(kind) for kind in cells["kind"]]
    clean, corrupted = baseline_names(result)
    if baselines(result) == (1.0, 0.0):
        # The value is the share: once is enough.
        shares = {"value": "share", "low": "share, low", "high": "share, high"}
        cells = cells.drop(columns="share").rename(columns=shares)
    cells = cells.rename(columns={"label": "head" if "head" in result.dims else "layer"})
    metric = str(result.attrs.get("metric", "metric")).removesuffix(", normalised")
    return table(
        cells,
        f"The {len(cells)} patches that move the {metric} furthest from its {corrupted} baseline; "
        f"shares are of {clean} minus {corrupted}.",
    )
