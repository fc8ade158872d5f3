"""An interactive panel over sweeps, for notebooks with a kernel."""

from patching_demo.explorer.panel import *  # noqa: F403
