"""A plan counts what a sweep then does."""

from __future__ import annotations

import numpy as np
import pytest
import test_roles
import tiny
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from patching_demo import induction_task, load_model, plan, sweep


class Count(TorchDispatchMode):
    """Operations of matrix products. Hooks would make the engine take the plain loop."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


QUESTIONS = {
    "resid_pre": ("resid_pre", {}),
    "a layer": ("attn_out", {"layers": [1]}),
    "heads": (["q", "out"], {}),
    "late heads": ("out", {"positions": slice("A6 16", None), "heads": slice(2, 5)}),
    "whole heads": ("v", {"by": "all_pos"}),
    "ablation": ("out", {"source": "zero"}),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_plan_counts_the_arithmetic_of_the_sweep(question: str) -> None:
    kinds, choice = QUESTIONS[question]
    model = load_model("attn-only-2l-demo")
    task = induction_task(model, batch=4, seq_len=10)
    planned = plan(model, task, kinds, speed=1e9, **choice)
    with Count() as count:
        found = sweep(model, task, kinds, **choice, progress=False)
    assert planned.cells == int(found.notnull().sum())
    # A patch that spreads to no other position needs less of its own block, one of two here.
    assert 0.55 < count.flops / planned.flops < 1.3
    assert planned.seconds == planned.flops / 1e9


def test_a_config_plans_as_its_model_does() -> None:
    model, task = tiny.model("llama-gqa"), test_roles.task_of("llama-gqa")
    config = model.original_model.config
    for kinds, by in ((["k", "v"], "role"), ("mlp_out", "role")):
        mine, theirs = (plan(m, task, kinds, by=by, speed=1e9) for m in (model, config))
        assert np.isclose(mine.flops, theirs.flops) and mine.cells == theirs.cells
        assert mine.memory == theirs.memory
    with pytest.raises(ValueError, match="give speed="):
        plan(config, task, "k", by="role")
    with pytest.raises(ValueError, match="does not say how many blocks"):
        plan(transformers.Gemma3Config(), task, "k", by="role", speed=1.0)
    measured = plan(model, task, "k", by="role")
    assert measured.seconds > 0 and "cells" in str(measured)
