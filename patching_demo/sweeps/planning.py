"""What a sweep will cost, before it is run, and on models that are not here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from patching_demo.engine import checks
from patching_demo.engine.kinds import KINDS
from patching_demo.engine.packs import CALL_TOKENS
from patching_demo.engine.tokens import device_of, key_value_heads
from patching_demo.sweeps.grid import chosen_cells
from patching_demo.sweeps.question import check_tasks, names_of
from patching_demo.tasks import Task

#: Forward passes of a sweep besides its cells: both runs, the proof and the rechecks.
PASSES_AROUND = 5


@dataclass(frozen=True)
class Plan:
    """The cost of a sweep.

    Attributes:
        cells: how many patched runs there are.
        passes: the forward passes over all prompts that their arithmetic amounts to.
        flops: floating-point operations of the matrix products.
        seconds: at the speed that was measured or given.
        weights: bytes of the model.
        memory: bytes beside the weights that one group of prompts needs at least: activations of
            both runs and logits. Patched runs take more where it is free, a quarter of it at most.
    """

    cells: int
    passes: float
    flops: float
    seconds: float
    weights: int
    memory: int

    def __str__(self) -> str:
        return (
            f"{self.cells:,} cells, the work of {self.passes:,.0f} forward passes: "
            f"{self.flops:.1e} floating-point operations, about {self.seconds:,.1f} s; "
            f"{self.memory / 2**20:,.0f} MiB beside {self.weights / 2**20:,.0f} MiB of weights"
        )


def plan(
    model: Any,
    task: Task,
    kinds: str | Sequence[str],
    *,
    by: str = "pos",
    layers: Any = None,
    positions: Any = None,
    heads: Any = None,
    where: xr.DataArray | None = None,
    source: Any = "clean",
    speed: float | None = None,
) -> Plan:
    """Estimate what a sweep will cost, without running it.

    Args:
        model: a TransformerBridge, or the ``transformers`` config of a causal language model, of
            which nothing is loaded. Of a mixture of experts all count, as if each token used them.
        task: the prompts, of which only lengths and roles matter.
        kinds, by, layers, positions, heads, where, source: as for :func:`patching_demo.sweep`.
        speed: floating-point operations per second. By default what this machine reaches in a
            forward pass of the model, which is run twice.

    Returns:
        a :class:`Plan`, for one process.

    Raises:
        ValueError: as :func:`patching_demo.sweep`, or if a config comes without a speed, or is of
            something else.

    >>> from patching_demo import induction_task, load_model
    >>> model = load_model("attn-only-2l-demo")
    >>> task = induction_task(model, batch=2, seq_len=6)
    >>> plan(model, task, "out", by="all_pos").cells
    16
    """
    check_tasks({"task": task})
    size = _Size.of(model)
    cells, passes = chosen_cells(size, task, kinds, by, layers, positions, heads, where, source)
    asked = np.isfinite(cells.values)
    groups = task.groups() if by == "role" else [range(len(task))]
    lengths = [task.corrupted_lengths[task.rows_of(prompts)] for prompts in groups]
    of_group = [int(own.max()) * len(own) for own in lengths]
    if speed is None:
        speed = size.measured(task)
    total = float(passes[asked].sum()) + PASSES_AROUND
    n_pos = float(task.corrupted_lengths.float().mean())
    flops = size.flops(int(sum(of_group)), n_pos)
    cfg = size.cfg
    widths = {"d_model": cfg.d_model, "d_head": cfg.d_head, "source": n_pos}
    widths |= {"head": cfg.n_heads, "kv_head": key_value_heads(size)}
    axes = [KINDS[name].axes for name in names_of(kinds)]
    kept = sum(np.prod([widths.get(axis, 1) for axis in own]) for own in axes)
    layers_held = cfg.n_layers * (kept + cfg.d_model) + 3 * cfg.d_vocab
    return Plan(
        cells=int(asked.sum()),
        passes=total,
        flops=total * flops,
        seconds=total * flops / speed,
        weights=size.weights,
        memory=int(max(of_group) * layers_held * size.item),
    )


class _Size(SimpleNamespace):
    """The numbers of a model on which costs depend."""

    @classmethod
    def of(cls, model: Any) -> _Size:
        if hasattr(model, "to_diff_dict"):  # A config of transformers.
            from transformers import AutoModelForCausalLM

            with torch.device("meta"):
                whole = AutoModelForCausalLM.from_config(model)
            n_layers = getattr(model, "num_hidden_layers", None)
            lists = [part for part in whole.modules() if isinstance(part, nn.ModuleList)]
            blocks = next((part for part in lists if len(part) == n_layers), None)
            if blocks is None:
                raise ValueError(
                    f"{type(model).__name__} does not say how many blocks the model has: give the "
                    "config of its language model alone"
                )
            n_heads, d_model = model.num_attention_heads, model.hidden_size
            bridge, cfg = None, SimpleNamespace(
                n_layers=n_layers, n_heads=n_heads, d_model=d_model, d_vocab=model.vocab_size,
                d_head=getattr(model, "head_dim", None) or d_model // n_heads,
                n_key_value_heads=getattr(model, "num_key_value_heads", None),
            )  # fmt: skip
        else:
            checks.checked_model(model)
            whole, blocks, bridge, cfg = model, model.blocks, model, model.cfg
        weights = {id(weight): weight for weight in whole.parameters()}.values()
        return cls(
            bridge=bridge,
            cfg=cfg,
            block=sum(w.numel() for w in blocks.parameters() if w.ndim > 1) / cfg.n_layers,
            weights=sum(w.numel() * w.element_size() for w in weights),
            item=next(iter(weights)).element_size(),
        )

    def flops(self, tokens: int, n_pos: float) -> float:
        """Operations of the blocks in a forward pass: two for each weight and token."""
        attention = 4 * n_pos * self.cfg.n_heads * self.cfg.d_head
        return tokens * self.cfg.n_layers * (2 * self.block + attention)

    @torch.no_grad()
    def measured(self, task: Task) -> float:
        """Operations per second in a forward pass on as many tokens as a sweep runs at once."""
        if self.bridge is None:
            raise ValueError("a config has no speed to measure: give speed= in FLOP per second")
        model, tokens = task.model_of(self.bridge), task.corrupted_tokens
        device = torch.device(device_of(self.bridge))
        at_once = CALL_TOKENS["cpu" if device.type == "cpu" else "accelerator"]
        tokens = tokens.repeat(1 + at_once // tokens.numel(), 1).to(device)
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            float(model(tokens, return_type="logits", stop_at_layer=self.cfg.n_layers).sum())
            seconds.append(time.perf_counter() - begin)
        return self.flops(tokens.numel(), tokens.shape[1]) / min(seconds)
