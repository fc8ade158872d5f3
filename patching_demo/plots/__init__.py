"""Figures of labelled results, drawn without further arguments.

Every figure is a plain plotly figure that adapts to its column, names what was patched into what
and which baselines bound the scale, and carries in ``layout.meta`` a text for screen readers
("alt") and a sentence on how to read it ("caption"). Token text is always shown as text.
"""

from __future__ import annotations

from patching_demo.plots.heatmaps import attention_patterns, heatmap
from patching_demo.plots.menus import explore
from patching_demo.plots.scatter import scatter
from patching_demo.plots.series import bars, curves
from patching_demo.plots.tables import table, tokens_table

__all__ = [
    "attention_patterns",
    "bars",
    "curves",
    "explore",
    "heatmap",
    "scatter",
    "table",
    "tokens_table",
]
