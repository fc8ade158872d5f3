"""What every result carries: its dimensions, its labels, and facts about how it was measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import numpy as np
import psutil
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from patching_demo.engine import checks, runner
from patching_demo.engine.cells import Cell, share_of_pass
from patching_demo.engine.kinds import BLOCK_KINDS, HEAD_KINDS, KINDS, kind_of_hook
from patching_demo.engine.tokens import config_number, device_of, heads_of, key_value_heads
from patching_demo.metrics import Normalised
from patching_demo.tasks import Task
from patching_demo.tasks.prompts import aligned

#: Where patched values may come from; a mapping from hook names to activations is one, too.
SOURCES = ("clean", "zero", "mean")
#: Runs that will take more seconds than this are announced.
LONG_SECONDS = 300.0


@dataclass(frozen=True)
class How:
    """In what way runs are patched, and what is kept of them.

    Attributes:
        source: one of :data:`SOURCES`, or activations by hook name in the clean run's shapes.
        per_prompt: whether to keep one value per prompt.
        by_role: whether what is patched at a role's place in the corrupted prompts comes from its
            place in the clean ones, for prompts of one shape at a time.
        options: how the engine runs them.
    """

    source: Any = "clean"
    per_prompt: bool = False
    by_role: bool = False
    options: runner.Options = runner.Options()


class Question:
    """A model and tasks on the same prompts, checked, with what their runs are patched from.

    Args:
        model: a TransformerBridge.
        tasks: the same prompts with different metrics, by name, as :func:`check_tasks` wants them.
        hooks: the hooks that are patched.
        how: how they are patched; by role, the prompts have one shape.
        listening: makes of the model the context in which its clean run is done.
        of_all: how many times the work of these prompts all of them are, for the warning of long
            runs; 0 for none.

    Raises:
        TypeError: if the model is no TransformerBridge.
        ValueError: if the tasks' baselines are another model's, or the source is unknown or does
            not fit.
    """

    def __init__(
        self,
        model: Any,
        tasks: Mapping[str, Task],
        hooks: Sequence[str],
        how: How,
        listening: Any = nullcontext,
        of_all: float = 1.0,
    ) -> None:
        self.options, self.per_prompt, self.of_all = how.options, how.per_prompt, of_all
        checks.checked_model(model)
        self.task = first = next(iter(tasks.values()))
        self.model, self.tasks = first.model_of(model, self), dict(tasks)
        if not how.by_role:
            check_positions(self.model, first)
        self.tokens = checks.checked_tokens(self.model, first.corrupted_tokens, masked=True)
        _refuse_too_many(self.model, self.tokens)
        begin = time.perf_counter()
        with torch.no_grad(), listening(self.model) as self.heard:
            logits, cache = self.model.run_with_cache(
                first.clean_tokens.to(device_of(model)), names_filter=list(hooks)
            )
            self._seconds = time.perf_counter() - begin  # of one forward pass, at most
            # How large logits are. They are not kept, nor copied for it, as they may be most of
            # what a sweep holds.
            self._size = torch.stack(torch.aminmax(logits)).abs().max()
            for task in tasks.values():
                if task.clean_values is None:
                    measured = task.clean_metric(logits).view(1)
                else:
                    each = task.over_rows(task.clean_metric.per_example(logits))
                    measured = torch.cat([each.mean().view(1), each])
                _check_baseline(task, "clean", measured, self._size)
        del logits
        n_pos = self.tokens.shape[1]
        self.differing = tuple(range(first.agree_until, n_pos))
        if first.same_lengths:
            differs = (first.clean_tokens != first.corrupted_tokens).any(0)
            self.differing = tuple(differs.nonzero()[:, 0].tolist())
        device = self.tokens.device
        clean_tokens = first.clean_tokens.to(device)
        checks.refuse_uncalled_hooks(self.model, self.tokens, cache, hooks)
        self.clean = {
            hook: checks.checked_activation(self.model, cache, hook, clean_tokens).to(device)
            for hook in hooks
        }
        if not isinstance(how.source, str) or how.source != "clean":
            self.differing = tuple(range(n_pos))
            self.clean = {hook: self._sourced(hook, how.source, clean_tokens) for hook in hooks}
        #: Where each role stands in the corrupted prompts.
        self.places: dict[str, int] = {}
        if how.by_role:
            self.places = {name: int(there[0]) for name, (_, there) in first.roles.items()}
            self._align(hooks)

    def _sourced(self, hook: str, source: Any, tokens: Tensor) -> Tensor:
        clean = self.clean[hook]
        if isinstance(source, Mapping) or hasattr(source, "cache_dict"):
            return checks.checked_activation(self.model, source, hook, tokens, "given")
        if source == "zero":
            return torch.zeros_like(clean)
        if source == "mean":
            # Over the prompts that have text at the position.
            kind = kind_of_hook(hook)
            shape = [1] * clean.ndim
            shape[0], shape[kind.position_axis] = tokens.shape
            text = self.task.attention_mask.to(clean).view(shape)
            return ((clean * text).sum(0) / text.sum(0).clamp(min=1)).expand_as(clean)
        raise ValueError(
            f"source must be one of {', '.join(SOURCES)} or a mapping from hook names to "
            f"activations, got {source!r}"
        )

    def _align(self, hooks: Sequence[str]) -> None:
        """Move what is patched from the roles' places in the clean prompts to those in the others.

        Elsewhere, where lengths or places differ, the corrupted run's own activations stand.

        Raises:
            ValueError: if two roles share a place in one of the prompts only, or for patterns
                whose rows would have other sources.
        """
        roles = self.task.roles.items()
        moves = {name: (int(here[0]), int(there[0])) for name, (here, there) in roles}
        #: Whether positions of clean and corrupted prompts correspond.
        self.aligned = self.task.same_lengths and all(c == r for c, r in moves.values())
        if self.aligned:
            return
        comes: dict[int, tuple[str, int]] = {}
        for name, (here, there) in moves.items():
            other, place = comes.setdefault(there, (name, here))
            if place != here:
                raise ValueError(
                    f"roles {other!r} and {name!r} are the same token of a corrupted prompt and "
                    "two of its clean one, so there is no one value to patch: make tasks with one "
                    "of them each"
                )
        self.differing = tuple(range(self.tokens.shape[1]))
        with torch.no_grad():
            _, own = self.model.run_with_cache(self.tokens, names_filter=list(hooks))
        for hook in hooks:
            kind, clean = kind_of_hook(hook), self.clean[hook]
            if "source" in kind.axes:
                raise ValueError(
                    f"{kind.name!r} has no counterpart where the prompts of a pair have other "
                    "lengths or roles at other places: a row attends to other positions. Sweep "
                    "another kind, or select pairs of equal shape"
                )
            moved, axis = own[hook].to(clean.device, copy=True), kind.position_axis
            for here, there in moves.values():
                moved.select(axis, there).copy_(clean.select(axis, here))
            self.clean[hook] = moved

    def metric(self, task: Task) -> Any:
        """A task's metric, per prompt where that was asked for."""
        return task.metric.per_example if self.per_prompt else task.metric

    def run(self, cells: Sequence[Cell]) -> dict[str, np.ndarray]:
        """Values ``[cell]``, or ``[prompt, cell]``, for each task.

        Raises:
            ValueError: if the corrupted baseline of a task is another model's.
        """
        metrics = {name: self.metric(task) for name, task in self.tasks.items()}
        values, base = runner.run_cells(
            self.model, self.tokens, self.clean, cells, metrics, differing=self.differing,
            lengths=self.task.corrupted_lengths, per_example=self.per_prompt,
            options=self.options, expected=self._expected(cells),
        )  # fmt: skip
        for task, value in zip(self.tasks.values(), base, strict=True):
            _check_baseline(task, "corrupted", value.mean().view(1), self._size)
        if self.per_prompt:
            values = self.task.over_rows(values, -1)
        found = values.detach().float().cpu().numpy()
        return {name: own.T for name, own in zip(self.tasks, found, strict=True)}

    def _expected(self, cells: Sequence[Cell]) -> float:
        """Seconds that the runs will take, from what each must compute again; warns of minutes."""
        n_layers, first = self.model.cfg.n_layers, min(self.differing, default=0)
        n_pos = self.tokens.shape[1]
        end = 1 + max(int(task.metric.positions.max()) for task in self.tasks.values())
        share = sum(
            float(share_of_pass(cell.layer, max(first, cell.start), n_layers, n_pos, end))
            for cell in cells
            if max((patch.positions[-1] for patch in cell.patches), default=-1) >= first
        )
        # A patched run unembeds next to nothing.
        blocks, rest = (
            sum(weight.numel() for module in parts for weight in module.parameters())
            for parts in (self.model.blocks, filter(None, [getattr(self.model, "unembed", None)]))
        )
        share *= blocks / (blocks + rest)
        if share * self.of_all * self._seconds <= LONG_SECONDS:
            return share * self._seconds
        begin = time.perf_counter()  # The first pass may have been slow for being the first.
        with torch.no_grad():
            self.model(self.tokens, return_type="logits")
        seconds = share * min(self._seconds, time.perf_counter() - begin)
        if (whole := seconds * self.of_all) > LONG_SECONDS:
            runs = round(len(cells) * self.of_all)
            checks.warn_once(
                f"{runs:,} patched runs will take about {max(1, round(whole / 60))} minutes "
                "here: choose cells with where=, positions= or layers= (attribute "
                "estimates all of them in a few passes)"
            )
        return seconds


def ask(
    model: Any,
    tasks: Mapping[str, Task],
    hooks: Sequence[str],
    answer: Callable[[Question], dict[str, np.ndarray]],
    how: How,
    listening: Any = nullcontext,
) -> dict[str, np.ndarray]:
    """What ``answer`` returns for a question: values by task, ``[prompt, ...]`` if per prompt.

    By role, prompts of one shape at a time make a question of their own. Progress is told over all
    shapes, and each has a store of its own. Unless more is asked for, cells are rechecked in as
    many shapes as a sweep rechecks cells.

    Args: as for :class:`Question`.

    Raises:
        As :class:`Question`, and, by role, ValueError if the tasks have no roles, or their metrics
        no values for single prompts.
    """
    if not how.by_role:
        return answer(Question(model, tasks, hooks, how, listening))
    first = next(iter(tasks.values()))
    for task in tasks.values():
        if not task.roles:
            raise ValueError(f"the task {task.name!r} has no roles: prompt_task makes some")
        if task.corrupted_values is None or not task.metric.selectable:
            raise ValueError(
                f"the metric {task.metric.name!r} cannot be taken apart by prompts, as a sweep by "
                "role needs it: score by one of the named metrics"
            )
    checks.checked_model(model)
    # The same modules for all shapes, until all are answered.
    model = first.model_of(model, answer)
    source, options = how.source, how.options
    if source == "mean":
        source = _mean_at_roles(model, first, hooks)
    order: list[int] = []
    found: dict[str, list[np.ndarray]] = {name: [] for name in tasks}
    groups, tokens = first.groups(), first.corrupted_lengths
    hidden = not options.progress or len(groups) < 2
    with tqdm(groups, disable=hidden, leave=False, unit="shape", delay=1.0) as bar:
        for number, prompts in enumerate(bar):
            order += prompts
            parts = {name: task.part(prompts) for name, task in tasks.items()}
            # The first shape tells what all will take.
            of_all = 0.0 if number else float(tokens.sum() / tokens[first.rows_of(prompts)].sum())
            own = How(
                source=_rows_of(first, source, hooks, prompts),
                per_prompt=True,
                by_role=bool(hooks),  # What is not patched needs no counterpart.
                options=_of_shape(options, number, len(groups)),
            )
            answers = answer(Question(model, parts, hooks, own, listening, of_all))
            for name, values in answers.items():
                found[name].append(values)
    joined = {name: np.concatenate(parts)[np.argsort(order)] for name, parts in found.items()}
    return joined if how.per_prompt else {name: values.mean(0) for name, values in joined.items()}


def _of_shape(options: runner.Options, number: int, count: int) -> runner.Options:
    """The options of a sweep over the prompts of one shape among several."""
    if count == 1:
        return options
    own: dict[str, Any] = {"progress": False}
    if options.check is None and number % -(-count // runner.MOST_RECHECKS):
        own["check"] = 0  # A few cells are rechecked of all shapes together.
    if options.store is not None:
        own["store"] = f"{os.fspath(options.store)}-{number}"
    if (listener := options.on_progress) is not None:
        own["on_progress"] = lambda done, total: listener(number * total + done, count * total)
    return replace(options, **own)


def _rows_of(task: Task, source: Any, hooks: Sequence[str], prompts: Sequence[int]) -> Any:
    """Of activations given for all clean prompts, those of some of them, without padding."""
    given = getattr(source, "cache_dict", source)
    if not isinstance(given, Mapping):
        return source
    rows, own = task.rows_of(prompts), {}
    n_pos = int(task.lengths[rows].max())
    for hook in hooks:
        activation = given.get(hook)
        # What it is otherwise, is refused with the shape that it should have.
        if isinstance(activation, Tensor) and len(activation) == len(task.clean_tokens):
            activation = activation[rows.to(activation.device)]
            for axis, name in enumerate(kind_of_hook(hook).axes):
                if name in ("pos", "source"):
                    activation = activation.narrow(axis, 0, n_pos)
        if activation is not None:
            own[hook] = activation
    return own


@torch.no_grad()
def _mean_at_roles(model: Any, task: Task, hooks: Sequence[str]) -> dict[str, Tensor]:
    """Clean activations with, at each role's place, the mean over all prompts' places of it."""
    for (one, (here, _)), (other, (there, _)) in combinations(task.roles.items(), 2):
        if 0 < int((here == there).sum()) < len(here):
            raise ValueError(
                f"roles {one!r} and {other!r} are the same token of some clean prompts only, so "
                "there is no one mean there: make tasks with one of them each"
            )
    axes = {hook: kind_of_hook(hook).position_axis for hook in hooks}
    if any("source" in kind_of_hook(hook).axes for hook in hooks):
        raise ValueError("patterns of prompts of several shapes have no mean by role")
    total: dict[tuple[str, str], Tensor] = {}
    for prompts in task.groups():
        part = task.part(prompts)
        tokens = part.clean_tokens.to(device_of(model))
        _, cache = model.run_with_cache(tokens, names_filter=list(hooks))
        for hook, (role, (here, _)) in product(hooks, part.roles.items()):
            at = cache[hook].select(axes[hook], int(here[0])).sum(0)
            total[hook, role] = total.get((hook, role), 0) + at
    whole: dict[str, Tensor] = {}
    for hook in hooks:
        shape = list(cache[hook].shape)
        shape[0], shape[axes[hook]] = task.clean_tokens.shape
        own = whole[hook] = cache[hook].new_zeros(shape)
        rows = torch.arange(len(own), device=own.device)
        for role, (here, _) in task.roles.items():
            own[rows, here.to(own.device)] = total[hook, role] / len(own)
    return whole


def labelled(
    task: Task, values: np.ndarray, cells: xr.DataArray, source: Any = "clean"
) -> xr.DataArray:
    """A result with the labels of its cells, and what is known of the task that it was scored by.

    Values are those of the cells, or ``[prompt, ...]``.
    """
    dims, coords = cells.dims, dict(cells.coords)
    if values.ndim > cells.ndim:
        dims = ("prompt", *dims)
        coords["prompt"] = np.arange(len(values))
        for name in ("clean", "corrupted"):
            own = getattr(task, f"{name}_values")
            if own is not None:
                coords[f"{name}_baseline"] = ("prompt", own.float().numpy())
    attrs = {
        "metric": task.metric.name,
        "units": task.metric.units,
        "clean_baseline": float(task.clean_baseline),
        "corrupted_baseline": float(task.corrupted_baseline),
        "task": task.name,
        "model": task.model_name,
        "direction": task.direction,
        "source": source if isinstance(source, str) else "given",
        **cells.attrs,
    }
    return xr.DataArray(values, dims=dims, coords=coords, attrs=attrs, name="value")


def check_positions(model: Any, task: Task) -> None:
    """Refuse a task in which positions of clean and corrupted prompts do not correspond.

    Raises:
        ValueError: showing the first pair of prompts of different lengths.
    """
    if task.same_lengths:
        return
    row = int((task.lengths != task.corrupted_lengths).nonzero()[0])
    pair = row // task.rows_per_prompt + 1
    n, m = int(task.lengths[row]), int(task.corrupted_lengths[row])
    one = task.clean_tokens[row, :n].tolist()
    other = task.corrupted_tokens[row, :m].tolist()
    raise ValueError(
        f"pair {pair}: the clean prompt has {n} tokens and the corrupted one {m}, so positions do "
        "not correspond. Name roles and use by='role', or change words until both have as many "
        f"tokens:\n{aligned(model, one, other)}"
    )


def check_tasks(tasks: Mapping[str, Task]) -> None:
    """Refuse what are no tasks, or tasks of different prompts.

    Raises:
        TypeError: if one is none, as where arguments are swapped.
        ValueError: if there is none, or they have different prompts.
    """
    for task in tasks.values():
        if not isinstance(task, Task):
            raise TypeError(
                f"the call needs a Task as second argument, got {type(task).__name__}: make one "
                "with prompt_task"
            )
    if not tasks:
        raise ValueError("there is no task to score by")
    first = next(iter(tasks.values()))
    for name, task in tasks.items():
        for own in ("clean_tokens", "corrupted_tokens"):
            if not torch.equal(getattr(task, own), getattr(first, own)):
                raise ValueError(
                    f"{name!r} has other prompts than the first task: measure it by itself"
                )


def _refuse_too_many(model: Any, tokens: Tensor) -> None:
    """Refuse prompts whose logits alone do not fit into memory, before that ends the process."""
    if tokens.device.type != "cpu":
        return  # It raises an error there.
    item = next(iter(model.parameters())).element_size()
    # Those of both runs, and a copy for the metric.
    needed = 3 * tokens.numel() * (config_number(model, "d_vocab") or 0) * item
    free = psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"the logits of {len(tokens):,} prompts of {tokens.shape[1]} tokens need "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: go by='role', which "
            "takes some prompts at a time, or take fewer with task.select"
        )


def _check_baseline(task: Task, which: str, measured: Tensor, largest: Tensor) -> None:
    """Refuse a task whose baseline was measured on another model.

    ``measured`` is the baseline, and may go on with the values of each prompt; ``largest`` is the
    logits' size, in their dtype.

    Raises:
        ValueError: with both numbers, if they differ by more than another machine's rounding.
    """
    found = measured.cpu().double()  # Not every device has this type.
    expected = torch.tensor([getattr(task, f"{which}_baseline")], dtype=found.dtype, device="cpu")
    if len(found) > 1:
        expected = torch.cat([expected, getattr(task, f"{which}_values").to(expected)])
    metric, scale, least = task.metric, 1.0, 0.0
    if isinstance(metric, Normalised):
        metric, scale, least = metric.metric, metric.clean - metric.corrupted, metric.corrupted
    size = float(largest) * torch.ones_like(expected)
    if metric.units == "probability":  # What its logits are off by, a probability is off by a part.
        size *= torch.maximum(expected.abs(), found.abs()) * abs(scale) + abs(least)
    allowed = max(1e-5, 4 * torch.finfo(largest.dtype).eps) * (size / abs(scale) + expected.abs())
    wrong = ((found - expected).abs() > allowed).nonzero()[:, 0].tolist()
    if wrong:
        at = wrong[0]
        of = f"the {which} baseline of the task" + f" on prompt {at}" * bool(at)
        raise ValueError(
            f"{of} is {float(expected[at]):.6g}, measured on {task.model_name!r}, but this "
            f"model's own is {float(found[at]):.6g} ({task.metric.name}): the task belongs to "
            "another model, or the model was changed. Sweep task.on(model), unless its answer to "
            "one prompt depends on the others of the batch, as quantised activations let it"
        )


def names_of(kinds: str | Sequence[str]) -> list[str]:
    """The kinds that are asked for, one or several."""
    return [kinds] if isinstance(kinds, str) else list(kinds)


def check_kinds(names: Sequence[str], by: str) -> None:
    """Refuse kinds that are unknown, or do not fit each other or ``by``."""
    known = [*BLOCK_KINDS, *HEAD_KINDS]
    if not names:
        raise ValueError(f"kinds is empty: choose among {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"kind must be among {', '.join(known)} (out is z), got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"a kind is named twice: {names}")
    if len({name in HEAD_KINDS for name in names}) > 1:
        raise ValueError(
            f"{names} mixes kinds with and without heads, which have different dimensions: run "
            "two sweeps"
        )
    if by not in ("pos", "role", "all_pos"):
        raise ValueError(f"by must be 'pos', 'role' or 'all_pos', got {by!r}")
    if by == "all_pos" and names[0] in BLOCK_KINDS:
        raise ValueError(
            f"{names[0]!r} can only be swept by='pos' or 'role'; all_pos is for head kinds"
        )


def grid_cells(model: Any, task: Task, kinds: str | Sequence[str], by: str) -> xr.DataArray:
    """The number of each cell of a sweep, with the dimensions, labels and facts of its result.

    Raises:
        ValueError: if kinds are unknown or do not fit, or positions of clean and corrupted prompts
            do not correspond.
        TypeError: if the model is no TransformerBridge.
    """
    names = names_of(kinds)
    check_kinds(names, by)
    checks.check_bridge(model)
    of_heads, coords = names[0] in HEAD_KINDS, {"layer": np.arange(model.cfg.n_layers)}
    if not isinstance(kinds, str):
        coords["kind"] = names
    if by == "role":
        coords["role"] = list(task.roles)
        coords["agrees"] = ("role", [task.agrees_at(role) for role in task.roles])
    else:
        check_positions(model, task)
    if by == "pos":
        coords["position"] = list(task.position_labels)
        coords["token"] = ("position", list(task.position_tokens))
        n_pos = task.corrupted_tokens.shape[1]
        coords["agrees"] = ("position", np.arange(n_pos) < task.agree_until)
    if of_heads:
        n_heads = max(heads_of(model, KINDS[name]) for name in names)
        coords |= head_labels(model.cfg.n_layers, n_heads)
    dims = [dim for dim in ("kind", "layer", "position", "role", "head") if dim in coords]
    shape = [len(coords[dim]) for dim in dims]
    numbers = np.arange(np.prod(shape), dtype=float).reshape(shape)
    facts = {
        "by": by,
        "kind": kinds if isinstance(kinds, str) else "",
        "n_key_value_heads": key_value_heads(model) if of_heads else 0,
    }
    return xr.DataArray(numbers, coords, dims, attrs=facts)


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
            raise ValueError(f"{part!r}: {kind!r} has no heads: ({kind!r}, layer, None, position)")
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"{part!r}: {what} must be a whole number, got {value!r}")
        if not 0 <= value < size:
            raise ValueError(f"{part!r}: {what} must be from 0 to {size - 1}, got {value}")
    return kind, int(layer), None if head is None else int(head), position
