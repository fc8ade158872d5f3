"""What every result carries: its dimensions, its labels, and facts about how it was measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from patching_demo.engine import checks, runner
from patching_demo.engine.cells import Cell
from patching_demo.engine.isolation import isolated
from patching_demo.engine.kinds import BLOCK_KINDS, HEAD_KINDS, KINDS, kind_of_hook
from patching_demo.engine.tokens import device_of, heads_of, name_of
from patching_demo.metrics import Normalised
from patching_demo.tasks import Task

#: Where patched values may come from; a mapping from hook names to activations is one, too.
SOURCES = ("clean", "zero", "mean")
#: Runs that will take more seconds than this are announced.
LONG_SECONDS = 300.0


class Question:
    """A model and tasks on the same prompts, checked, with what their runs are patched from.

    Args:
        model: a TransformerBridge.
        tasks: the same prompts with different metrics, by name.
        hooks: the hooks that are patched.
        source: one of :data:`SOURCES`, or activations by hook name.
        per_prompt: whether to keep one value per prompt.
        options: of :class:`patching_demo.engine.runner.Options`.

    Raises:
        TypeError: if the model is no TransformerBridge, a task none, or an option unknown.
        ValueError: if there is no task, the tasks have different prompts, their baselines are
            another model's, or the source is unknown or does not fit.
    """

    def __init__(
        self,
        model: Any,
        tasks: Mapping[str, Task],
        hooks: Sequence[str],
        source: Any = "clean",
        per_prompt: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_tasks(tasks)
        known = list(runner.Options.__dataclass_fields__)
        for option in options or {}:
            if option not in known:
                raise TypeError(f"unknown option {option!r}: the options are {', '.join(known)}")
        checks.checked_model(model)
        self.model, self.tasks = isolated(model, self), dict(tasks)
        self.per_prompt = per_prompt
        self.task = first = next(iter(tasks.values()))
        self.options = runner.Options(**(options or {}))
        for name, task in tasks.items():
            same = torch.equal(task.clean_tokens, first.clean_tokens)
            if not same or not torch.equal(task.corrupted_tokens, first.corrupted_tokens):
                raise ValueError(
                    f"{name!r} has other prompts than the first task: measure it by itself"
                )
        self.tokens = checks.checked_tokens(model, first.corrupted_tokens, masked=True)
        begin = time.perf_counter()
        with torch.no_grad():
            logits, cache = self.model.run_with_cache(
                first.clean_tokens.to(device_of(model)), names_filter=list(hooks)
            )
            self._seconds = time.perf_counter() - begin  # of one forward pass, at most
            for task in tasks.values():
                _check_baseline(task, "clean", float(task.metric(logits)), logits)
            self.clean_values = {
                name: self.metric(task)(logits).float().cpu().numpy()
                for name, task in tasks.items()
            }
        self._logits = logits
        differing = (first.clean_tokens != first.corrupted_tokens).any(0)
        self.differing = tuple(differing.nonzero()[:, 0].tolist())
        checks.refuse_uncalled_hooks(self.model, self.tokens, cache, hooks)
        self.clean = {
            hook: checks.checked_activation(model, cache, hook, self.tokens) for hook in hooks
        }
        self.source = source if isinstance(source, str) else "given"
        if self.source != "clean":
            self.differing = tuple(range(self.tokens.shape[1]))
            self.clean = {hook: self._sourced(hook, source) for hook in hooks}

    def _sourced(self, hook: str, source: Any) -> Tensor:
        clean = self.clean[hook]
        if isinstance(source, Mapping):
            return checks.checked_activation(self.model, source, hook, self.tokens, "given")
        if source == "zero":
            return torch.zeros_like(clean)
        if source == "mean":
            # Over the prompts that have text at the position.
            kind = kind_of_hook(hook)
            shape = [1] * clean.ndim
            shape[0], shape[kind.position_axis] = self.tokens.shape
            text = self.task.attention_mask.to(clean).view(shape)
            return ((clean * text).sum(0) / text.sum(0).clamp(min=1)).expand_as(clean)
        raise ValueError(
            f"source must be one of {', '.join(SOURCES)} or a mapping from hook names to "
            f"activations, got {source!r}"
        )

    def metric(self, task: Task) -> Any:
        """A task's metric, per prompt where that was asked for."""
        return task.metric.per_example if self.per_prompt else task.metric

    def run(self, cells: Sequence[Cell]) -> dict[str, np.ndarray]:
        """Values ``[cell]``, or ``[cell, prompt]``, for each task.

        Raises:
            ValueError: if the corrupted baseline of a task is another model's.
        """
        self._announce(cells)
        values, base = runner.run_cells(
            self.model,
            self.tokens,
            self.clean,
            cells,
            {name: self.metric(task) for name, task in self.tasks.items()},
            differing=self.differing,
            lengths=self.task.lengths,
            per_example=self.per_prompt,
            options=self.options,
        )
        for task, value in zip(self.tasks.values(), base, strict=True):
            _check_baseline(task, "corrupted", float(value.mean()), self._logits)
        self.corrupted_values = dict(zip(self.tasks, base.float().cpu().numpy(), strict=True))
        found = values.detach().float().cpu().numpy()
        return dict(zip(self.tasks, found, strict=True))

    def _announce(self, cells: Sequence[Cell]) -> None:
        """Warn that the runs take minutes, estimated from what each must compute again."""
        n_layers, first = self.model.cfg.n_layers, min(self.differing, default=0)
        n_pos = self.tokens.shape[1]
        end = 1 + max(int(task.metric.positions.max()) for task in self.tasks.values())
        share = sum(
            (n_layers - cell.layer) * max(0, end - max(first, cell.start)) / n_layers / n_pos
            for cell in cells
            if max(patch.positions[-1] for patch in cell.patches) >= first
        )
        if share * self._seconds <= LONG_SECONDS:
            return
        begin = time.perf_counter()  # The first pass may have been slow for being the first.
        with torch.no_grad():
            self.model(self.tokens, return_type="logits")
        seconds = share * min(self._seconds, time.perf_counter() - begin)
        if seconds > LONG_SECONDS:
            checks.warn_once(
                f"{len(cells):,} patched runs will take about {max(1, round(seconds / 60))} "
                "minutes here: choose cells with where=, positions= or layers= (attribute "
                "estimates all of them in a few passes)"
            )

    def labelled(
        self, name: str, values: np.ndarray, dims: Sequence[str], coords: Any, **facts: Any
    ) -> xr.DataArray:
        """A result with the labels given, and what is known of the task that it was scored by."""
        task = self.tasks[name]
        if self.per_prompt:
            dims = ("prompt", *dims)
            coords = {
                **coords,
                "prompt": np.arange(len(values)),
                "clean_baseline": ("prompt", self.clean_values[name]),
                "corrupted_baseline": ("prompt", self.corrupted_values[name]),
            }
        attrs = {
            "metric": task.metric.name,
            "units": task.metric.units,
            "clean_baseline": float(task.clean_baseline),
            "corrupted_baseline": float(task.corrupted_baseline),
            "task": task.name,
            "model": name_of(self.model),
            "direction": task.direction,
            "source": self.source,
            **facts,
        }
        return xr.DataArray(values, dims=dims, coords=coords, attrs=attrs, name="value")


def check_tasks(tasks: Mapping[str, Task]) -> None:
    """Refuse what are no tasks.

    Raises:
        TypeError: if one is none, as where arguments are swapped.
        ValueError: if there is none.
    """
    for task in tasks.values():
        if not isinstance(task, Task):
            raise TypeError(
                f"the call needs a Task as second argument, got {type(task).__name__}: make one "
                "with prompt_task"
            )
    if not tasks:
        raise ValueError("there is no task to score by")


def _check_baseline(task: Task, which: str, measured: float, logits: Tensor) -> None:
    """Refuse a task whose baseline was measured on another model.

    Raises:
        ValueError: with both numbers, if they differ by more than another machine's rounding.
    """
    expected = task.clean_baseline if which == "clean" else task.corrupted_baseline
    scale = 1.0
    if isinstance(task.metric, Normalised):
        scale = abs(task.metric.clean - task.metric.corrupted)
    share = max(1e-5, 4 * torch.finfo(logits.dtype).eps)
    if abs(measured - expected) > share * (float(logits.abs().max()) / scale + abs(expected)):
        raise ValueError(
            f"the {which} baseline of the task is {expected:.6g}, measured on {task.model_name!r}, "
            f"but this model's own is {measured:.6g} ({task.metric.name}): the task belongs to "
            "another model, or the model was changed. Sweep task.on(model)"
        )


def check_kinds(names: Sequence[str], by: str) -> None:
    """Refuse kinds that are unknown, or do not fit each other or ``by``."""
    known = [*BLOCK_KINDS, *HEAD_KINDS]
    if not names:
        raise ValueError(f"kinds is empty: choose among {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"kind must be among {', '.join(known)}, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"a kind is named twice: {names}")
    if len({name in HEAD_KINDS for name in names}) > 1:
        raise ValueError(
            f"{names} mixes kinds with and without heads, which have different dimensions: run "
            "two sweeps"
        )
    if by not in ("pos", "all_pos"):
        raise ValueError(f"by must be 'pos' or 'all_pos', got {by!r}")
    if by == "all_pos" and names[0] in BLOCK_KINDS:
        raise ValueError(f"{names[0]!r} can only be swept by='pos'; all_pos is for head kinds")


def grid_labels(
    model: Any, task: Task, names: Sequence[str], by: str, several: bool
) -> tuple[list[str], dict[str, int], dict[str, Any]]:
    """Dimensions, their sizes and coordinates of a sweep."""
    heads = names[0] in HEAD_KINDS
    dims = ["kind"] * several + ["layer"] + ["position"] * (by == "pos") + ["head"] * heads
    n_heads = max(heads_of(model, KINDS[name]) for name in names)
    n_pos = task.corrupted_tokens.shape[1]
    sizes = {"kind": len(names), "layer": model.cfg.n_layers, "position": n_pos, "head": n_heads}
    sizes = {dim: sizes[dim] for dim in dims}
    coords: dict[str, Any] = {"layer": np.arange(sizes["layer"])}
    if several:
        coords["kind"] = list(names)
    if "position" in dims:
        coords["position"] = list(task.position_labels)
        coords["token"] = ("position", list(task.position_tokens))
        coords["agrees"] = ("position", np.arange(n_pos) < task.agree_until)
    if heads:
        coords |= head_labels(sizes["layer"], n_heads)
    return dims, sizes, coords


def head_labels(n_layers: int, n_heads: int) -> dict[str, Any]:
    """Coordinates of heads: their numbers, and labels such as L9H6."""
    labels = [[f"L{i}H{j}" for j in range(n_heads)] for i in range(n_layers)]
    return {"head": np.arange(n_heads), "head_label": (("layer", "head"), labels)}


#: (kind, layer), (kind, layer, head) or (kind, layer, head, position).
Part = tuple[Any, ...]


def checked_part(model: Any, part: Any) -> tuple[str, int, int | None, Any]:
    """A part with all its four entries, refused if it does not exist."""
    if not isinstance(part, tuple) or not 2 <= len(part) <= 4 or part[0] not in KINDS:
        raise ValueError(
            "a part is (kind, layer), (kind, layer, head) or (kind, layer, head, position) with a "
            f"kind among {', '.join(KINDS)}; got {part!r}"
        )
    kind, layer, head, position = (*part, None, None)[:4]
    heads = heads_of(model, KINDS[kind])
    for what, value, size in (("layer", layer, model.cfg.n_layers), ("head", head, heads)):
        if what == "head" and value is None:
            continue
        if what == "head" and not KINDS[kind].of_heads:
            raise ValueError(f"{part!r}: {kind!r} has no heads, so its head must be None")
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"{part!r}: {what} must be a whole number, got {value!r}")
        if not 0 <= value < size:
            raise ValueError(f"{part!r}: {what} must be from 0 to {size - 1}, got {value}")
    return kind, int(layer), None if head is None else int(head), position
