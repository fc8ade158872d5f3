"""Four questions to a model: sweep, patch, paths and attribute, each answered by labelled values.

A result is an ``xarray.DataArray`` of metric values. Its dimensions are what was varied, such as
``layer`` and ``position``; its attributes are facts: the task, the metric and both baselines, what
was patched and from where.
"""

from patching_demo.sweeps.attribution import attribute
from patching_demo.sweeps.grid import sweep, sweep_metrics
from patching_demo.sweeps.path_patching import paths
from patching_demo.sweeps.planning import Plan, plan
from patching_demo.sweeps.sets import complement, patch

__all__ = ["Plan", "attribute", "complement", "patch", "paths", "plan", "sweep", "sweep_metrics"]
