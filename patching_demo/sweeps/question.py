"""What every result carries: its dimensions, its labels, and facts about how it was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
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
from patching_demo.engine.tokens import config_number, device_of, heads_of
from patching_demo.metrics import Normalised
from patching_demo.tasks import Task
from patching_demo.tasks.prompts import aligned

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
        source: one of :data:`SOURCES`, or activations by hook name in the clean run's shapes.
        per_prompt: whether to keep one value per prompt.
        options: of :class:`patching_demo.engine.runner.Options`.
        by_role: whether what is patched at a role's place in the corrupted prompts comes from its
            place in the clean ones; both are then the same for all prompts.
        of_all: how many times the work of these prompts all of them are, for the warning of long
            runs; 0 for none.

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
        by_role: bool = False,
        of_all: float = 1.0,
    ) -> None:
        check_tasks(tasks)
        self.of_all = of_all
        self.options = runner.Options.of(options or {})
        checks.checked_model(model)
        self.task = first = next(iter(tasks.values()))
        self.model, self.tasks = first.model_of(model, self), dict(tasks)
        self.per_prompt = per_prompt
        if not by_role:
            check_positions(self.model, first)
        self.tokens = checks.checked_tokens(self.model, first.corrupted_tokens, masked=True)
        _refuse_too_many(self.model, self.tokens)
        begin = time.perf_counter()
        with torch.no_grad():
            logits, cache = self.model.run_with_cache(
                first.clean_tokens.to(device_of(model)), names_filter=list(hooks)
            )
            self._seconds = time.perf_counter() - begin  # of one forward pass, at most
            #: How large logits are. They are not kept, as they may be most of what a sweep holds.
            self._size = _size_of(logits)
            for task in tasks.values():
                metric = task.clean_metric
                if task.clean_values is None:
                    measured = metric(logits).view(1)
                else:
                    each = task.over_rows(metric.per_example(logits))
                    measured = torch.cat([each.mean().view(1), each])
                _check_baseline(task, "clean", measured, self._size)
        del logits
        n_pos, start = self.tokens.shape[1], first.agree_until
        if first.same_lengths:
            differing = (first.clean_tokens != first.corrupted_tokens).any(0)
            self.differing = tuple(differing.nonzero()[:, 0].tolist())
        else:
            self.differing = tuple(range(start, n_pos))
        clean_tokens = first.clean_tokens.to(self.tokens.device)
        checks.refuse_uncalled_hooks(self.model, self.tokens, cache, hooks)
        self.clean = {
            hook: checks.checked_activation(self.model, cache, hook, clean_tokens).to(
                self.tokens.device
            )
            for hook in hooks
        }
        self.source = source if isinstance(source, str) else "given"
        if self.source != "clean":
            self.differing = tuple(range(n_pos))
            self.clean = {hook: self._sourced(hook, source, clean_tokens) for hook in hooks}
        #: Where each role stands in the corrupted prompts.
        self.places: dict[str, int] = {}
        if by_role:
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
        moves = {
            name: (int(here[0]), int(there[0])) for name, (here, there) in self.task.roles.items()
        }
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
            moved = own[hook].to(clean.device, copy=True)
            for here, there in moves.values():
                moved.select(kind.position_axis, there).copy_(
                    clean.select(kind.position_axis, here)
                )
            self.clean[hook] = moved

    def metric(self, task: Task) -> Any:
        """A task's metric, per prompt where that was asked for."""
        return task.metric.per_example if self.per_prompt else task.metric

    def run(self, cells: Sequence[Cell]) -> dict[str, np.ndarray]:
        """Values ``[cell]``, or ``[cell, prompt]``, for each task.

        Raises:
            ValueError: if the corrupted baseline of a task is another model's.
        """
        expected = self._expected(cells)
        values, base = runner.run_cells(
            self.model,
            self.tokens,
            self.clean,
            cells,
            {name: self.metric(task) for name, task in self.tasks.items()},
            differing=self.differing,
            lengths=self.task.corrupted_lengths,
            per_example=self.per_prompt,
            options=self.options,
            expected=expected,
        )
        for task, value in zip(self.tasks.values(), base, strict=True):
            _check_baseline(task, "corrupted", value.mean().view(1), self._size)
        if self.per_prompt:
            values = self.task.over_rows(values, -1)
        found = values.detach().float().cpu().numpy()
        return dict(zip(self.tasks, found, strict=True))

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
    cells_of: Callable[[Question], Sequence[Cell]],
    *,
    source: Any = "clean",
    per_prompt: bool = False,
    options: Mapping[str, Any] | None = None,
    by_role: bool = False,
) -> dict[str, np.ndarray]:
    """Values ``[cell]``, or ``[prompt, cell]``, of the cells that a question makes.

    By role, prompts of one shape at a time make a question of their own.

    Args and errors are those of :class:`Question`; ``cells_of`` returns as many cells for each.
    """
    if not by_role:
        question = Question(model, tasks, hooks, source, per_prompt, options)
        found = question.run(cells_of(question))
        return {name: value.T for name, value in found.items()}
    parts: list[dict[str, np.ndarray]] = []

    def answered(question: Question) -> None:
        parts.append(question.run(cells_of(question)))

    order = by_shape(model, tasks, hooks, answered, source, options)
    found = {
        name: np.concatenate([part[name] for part in parts], axis=1).T[order] for name in tasks
    }
    return found if per_prompt else {name: value.mean(0) for name, value in found.items()}


def by_shape(
    model: Any,
    tasks: Mapping[str, Task],
    hooks: Sequence[str],
    answer: Callable[[Question], None],
    source: Any = "clean",
    options: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """Make a question by role of the prompts of each shape, and answer it.

    Returns:
        where each prompt of the tasks is found in the answers, one after the other.

    Raises:
        As :class:`Question`, and ValueError if the tasks have no roles, or their metrics no values
        for single prompts.
    """
    check_tasks(tasks)
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
    if source == "mean":
        source = _mean_at_roles(model, first, hooks)
    order: list[int] = []
    for prompts, own in in_shapes(first, options or {}):
        order += prompts
        parts = {name: task.part(prompts) for name, task in tasks.items()}
        given = getattr(source, "cache_dict", source)
        if isinstance(given, Mapping):
            given = {
                hook: _rows_of(first, given[hook], hook, prompts, parts)
                for hook in hooks
                if hook in given
            }
        # The first shape tells what all will take.
        of_all = 0.0
        if len(order) == len(prompts):
            tokens = first.corrupted_lengths
            of_all = float(tokens.sum() / tokens[first.rows_of(prompts)].sum())
        answer(Question(model, parts, hooks, given, True, own, by_role=True, of_all=of_all))
    return np.argsort(order)


def in_shapes(task: Task, options: Mapping[str, Any]) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """The prompts of each shape, and the options of a sweep over them alone.

    Progress is told over all shapes, and each has a store of its own. Unless more is asked for,
    cells are rechecked in as many shapes as a sweep rechecks cells.
    """
    options, groups = dict(options), task.groups()
    store, progress = options.pop("store", None), options.pop("progress", True)
    listener = options.pop("on_progress", None)
    with tqdm(
        total=len(groups), disable=not progress or len(groups) < 2, leave=False, unit="shape",
        delay=1.0,
    ) as bar:  # fmt: skip
        for number, prompts in enumerate(groups):
            own = dict(options, progress=progress and len(groups) == 1)
            if options.get("check") is None and number % -(-len(groups) // runner.MOST_RECHECKS):
                own["check"] = 0  # A few cells are rechecked of all shapes together.
            if store is not None:
                own["store"] = store if len(groups) == 1 else f"{store}-{number}"
            if listener is not None:
                own["on_progress"] = partial(_overall, listener, number, len(groups))
            yield prompts, own
            bar.update(1)


def _overall(
    listener: Callable[[int, int], bool | None], number: int, count: int, done: int, total: int
) -> bool | None:
    return listener(number * total + done, count * total)


def _rows_of(
    task: Task, activation: Any, hook: str, prompts: Sequence[int], parts: Mapping[str, Task]
) -> Any:
    """Of a given activation of all clean prompts, that of some of them, without padding."""
    kind = kind_of_hook(hook)
    if not isinstance(activation, Tensor) or len(activation) != len(task.clean_tokens):
        return activation  # What it is, is refused with the shape that it should have.
    n_pos = next(iter(parts.values())).clean_tokens.shape[1]
    part = activation[task.rows_of(prompts).to(activation.device)]
    for axis, name in enumerate(kind.axes):
        if name in ("pos", "source"):
            part = part.narrow(axis, 0, n_pos)
    return part


@torch.no_grad()
def _mean_at_roles(model: Any, task: Task, hooks: Sequence[str]) -> dict[str, Tensor]:
    """Clean activations with, at each role's place, the mean over all prompts' places of it."""
    for (one, (here, _)), (other, (there, _)) in combinations(task.roles.items(), 2):
        if 0 < int((here == there).sum()) < len(here):
            raise ValueError(
                f"roles {one!r} and {other!r} are the same token of some clean prompts only, so "
                "there is no one mean there: make tasks with one of them each"
            )
    total: dict[str, dict[str, Tensor]] = {hook: {} for hook in hooks}
    whole: dict[str, Tensor] = {}
    for prompts in task.groups():
        part = task.part(prompts)
        _, cache = model.run_with_cache(
            part.clean_tokens.to(device_of(model)), names_filter=list(hooks)
        )
        for hook in hooks:
            kind = kind_of_hook(hook)
            if "source" in kind.axes:
                raise ValueError("patterns of prompts of several shapes have no mean by role")
            for role, (here, _) in part.roles.items():
                at = cache[hook].select(kind.position_axis, int(here[0])).sum(0)
                total[hook][role] = total[hook].get(role, 0) + at
            if hook not in whole:
                shape = list(cache[hook].shape)
                shape[0], shape[kind.position_axis] = task.clean_tokens.shape
                whole[hook] = cache[hook].new_zeros(shape)
    for hook, own in whole.items():
        for role, (here, _) in task.roles.items():
            rows = torch.arange(len(own), device=own.device)
            own[rows, here.to(own.device)] = total[hook][role] / len(own)
    return whole


def labelled(
    task: Task,
    values: np.ndarray,
    dims: Sequence[str],
    coords: Any,
    *,
    per_prompt: bool = False,
    source: Any = "clean",
    **facts: Any,
) -> xr.DataArray:
    """A result with the labels given, and what is known of the task that it was scored by.

    Values are ``[prompt, ...]`` where ``per_prompt`` says so.
    """
    if per_prompt:
        dims = ("prompt", *dims)
        coords = {**coords, "prompt": np.arange(len(values))}
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
        **facts,
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


def _size_of(logits: Tensor) -> Tensor:
    """The largest logit by size, of their dtype; no copy of them is made for it."""
    return torch.stack(torch.aminmax(logits)).abs().max()


def _check_baseline(task: Task, which: str, measured: Tensor, largest: Tensor) -> None:
    """Refuse a task whose baseline was measured on another model.

    ``measured`` is the baseline, and may go on with the values of each prompt; ``largest`` is the
    logits' size, in their dtype.

    Raises:
        ValueError: with both numbers, if they differ by more than another machine's rounding.
    """
    found = measured.double().cpu()
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
            raise ValueError(f"kind must be among {', '.join(known)}, got {name!r}")
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


def grid_labels(
    model: Any, task: Task, names: Sequence[str], by: str, several: bool
) -> tuple[list[str], dict[str, int], dict[str, Any]]:
    """Dimensions, their sizes and coordinates of a sweep.

    Raises:
        ValueError: if positions of clean and corrupted prompts do not correspond.
    """
    if by != "role":
        check_positions(model, task)
    heads = names[0] in HEAD_KINDS
    place = {"pos": ["position"], "role": ["role"], "all_pos": []}[by]
    dims = ["kind"] * several + ["layer"] + place + ["head"] * heads
    n_heads = max(heads_of(model, KINDS[name]) for name in names)
    n_pos = task.corrupted_tokens.shape[1]
    sizes = {"kind": len(names), "layer": model.cfg.n_layers, "position": n_pos, "head": n_heads}
    sizes["role"] = len(task.roles)
    sizes = {dim: sizes[dim] for dim in dims}
    coords: dict[str, Any] = {"layer": np.arange(sizes["layer"])}
    if several:
        coords["kind"] = list(names)
    if "position" in dims:
        coords["position"] = list(task.position_labels)
        coords["token"] = ("position", list(task.position_tokens))
        coords["agrees"] = ("position", np.arange(n_pos) < task.agree_until)
    if "role" in dims:
        coords["role"] = list(task.roles)
        coords["agrees"] = ("role", [task.agrees_at(role) for role in task.roles])
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
