"""What is patched: pairs of clean and corrupted prompts, the answers, and how they are scored.

A :class:`Task` holds everything a sweep needs besides the model. What builds one checks the
mistakes that otherwise give a plausible, meaningless figure: answers that lack their leading
space, prompts that do not differ, roles that are not there.
"""

from patching_demo.tasks.datasets import (
    CORRUPTIONS,
    IOI_ANSWERS,
    IOI_PROMPTS,
    capital_task,
    induction_task,
    ioi_task,
)
from patching_demo.tasks.prompts import noise_task, prompt_task
from patching_demo.tasks.task import METRICS, Task

__all__ = [
    "CORRUPTIONS",
    "METRICS",
    "IOI_ANSWERS",
    "IOI_PROMPTS",
    "Task",
    "capital_task",
    "induction_task",
    "ioi_task",
    "noise_task",
    "prompt_task",
]
