"""Time every sweep against ``transformer_lens.patching``, in one run on one machine.

    python scripts/bench.py                 everything this machine can run
    python scripts/bench.py --models smollm2-135m --sweeps resid_pre attn_head_out_by_pos
    python scripts/bench.py --models smollm2-135m --sweeps "200 sets of 10 heads"

Both sides of a row are measured one after the other, with the machine's own matrix multiplication
before, between and after them, so that a row can be judged on a noisy machine. A sweep is timed up
to five times and its median taken. Where the plain loop would take more than two minutes, a random
sample of its cells is timed instead and the row says so. A plain loop that stacks several cells of
a layer in the batch of one forward pass is timed on such a sample too, and held to the other's
numbers. A run of everything writes benchmark/results.json and benchmark/table.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
import transformer_lens.patching as plain
from transformer_lens.patching import make_df_from_ranges
from transformer_lens.utilities import get_act_name

from patching_demo import attribute, induction_task, ioi_task, load_model, patch, patching, paths
from patching_demo import sweep as labelled_sweep
from patching_demo.engine.kinds import HEAD_KINDS, kind_of_activation
from patching_demo.engine.scoring import tolerance

OUT = Path(__file__).resolve().parent.parent / "benchmark"
WHOLE_UNDER_SECONDS = 120
SAMPLE_CELLS = 20
STACKED_CELLS = 16
MOST_RUNS, REPEAT_FOR_SECONDS = 5, 12

BLOCKS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
BY_POS = tuple(f"attn_head_{kind}_by_pos" for kind in HEAD_KINDS)
ALL_POS = tuple(f"attn_head_{kind}_all_pos" for kind in HEAD_KINDS)
NOTEBOOK_2 = (
    "resid_pre", "resid_mid", "attn_out", "mlp_out",
    "attn_head_all_pos_every", "attn_head_by_pos_every",
)  # fmt: skip
_PARTS = ("activation_name", "patch_setter", "index_axis_names")
# The sweeps of transformer_lens.patching, and resid_post: activation, patch setter, axes.
SWEEPS = {
    name.removeprefix("get_act_patch_"): tuple(found.keywords[part] for part in _PARTS)
    for name, found in vars(plain).items()
    if isinstance(found, partial) and name.startswith("get_act_patch_")
}
SWEEPS["resid_post"] = ("resid_post", *SWEEPS["resid_pre"][1:])
# Combinations: their sweeps, and the axes of the result.
COMBINED = {
    "block_every": (("resid_pre", "attn_out", "mlp_out"), ("layer", "pos")),
    "attn_head_all_pos_every": (ALL_POS, ("layer", "head")),
    "attn_head_by_pos_every": (BY_POS, ("layer", "pos", "head")),
}
PLAIN_METRIC = ("resid_pre", "attn_head_out_by_pos", "attn_head_out_all_pos")
"""Sweeps that are also timed with a metric that is a bare function of full logits."""

# Questions that transformer_lens.patching has no function for: what is asked of a model and task,
# and how many forward passes the natural loop takes for each of its values.


def _late_head(model: Any) -> list[tuple[str, int, int]]:
    return [("q", model.cfg.n_layers * 9 // 10, 0)]


def _random_sets(model: Any) -> dict[str, list[tuple[str, int, int]]]:
    draw, n_heads = np.random.default_rng(0), model.cfg.n_heads
    heads = [("out", layer, h) for layer in range(model.cfg.n_layers) for h in range(n_heads)]
    size = min(10, len(heads))
    return {
        str(i): [heads[j] for j in draw.choice(len(heads), size, replace=False)] for i in range(200)
    }


QUESTIONS: dict[str, tuple[Callable[[Any, Any], Any], int]] = {
    "paths to a late query": (lambda m, t: paths(m, t, _late_head(m), progress=False), 2),
    "paths to a late query, through MLPs": (
        lambda m, t: paths(m, t, _late_head(m), through="mlps", progress=False), 2,
    ),
    "paths to the logits": (lambda m, t: paths(m, t, "logits", progress=False), 2),
    "200 sets of 10 heads": (lambda m, t: patch(m, t, _random_sets(m), progress=False), 1),
    "window of 10 layers": (
        lambda m, t: labelled_sweep(m, t, ["attn_out", "mlp_out"], window=10, progress=False), 1,
    ),
    "attribution of all kinds": (
        lambda m, t: np.concatenate(
            [np.ravel(attribute(m, t, kinds)) for kinds in (BLOCKS, HEAD_KINDS)]
        ), 1,
    ),
    "roles of 100 prompts": (
        lambda m, t: np.concatenate(
            [
                np.ravel(labelled_sweep(m, t, kind, by="role", progress=False))
                for kind in ("resid_pre", "out")
            ]
        ), 1,
    ),
}  # fmt: skip
# Questions that are asked of other prompts than the model's usual ones.
TASKS: dict[str, Callable[[Any], Any]] = {"roles of 100 prompts": lambda m: ioi_task(m, n=100)}

# The least ratio each row must reach on two CPU cores.
MARKS = {
    "smollm2-135m": (
        dict.fromkeys((*BY_POS, "attn_head_by_pos_every", "attn_head_pattern_dest_src_pos"), 45.0)
        | dict.fromkeys((*BLOCKS, "block_every"), 40.0)
        | dict.fromkeys((*ALL_POS, "attn_head_all_pos_every"), 8.0)
        | {"all of notebook 2": 35.0}
        | {
            "paths to a late query": 20.0,
            "paths to a late query, through MLPs": 12.0,
            "paths to the logits": 100.0,
            "200 sets of 10 heads": 4.0,
            "window of 10 layers": 25.0,
            "roles of 100 prompts": 20.0,
        }
    ),
    "attn-only-2l-demo": dict.fromkeys((*SWEEPS, *COMBINED), 10.0),
}
PLAIN_METRIC_SHARE_OF_MARK = 2 / 3


@dataclass
class Row:
    """One measured sweep; times in seconds, memory in MiB over the loaded model.

    ``less_arithmetic`` is how many times less arithmetic the sweep needs than the plain loop, the
    unpatched run and one rechecked cell included. On a machine that does nothing else it would be
    the ratio; a ratio above it comes from larger and so more efficient products. It is not known
    for the questions of ``QUESTIONS``, nor is their largest difference: tests hold their numbers.
    """

    model: str
    dtype: str
    sweep: str
    cells: int
    seconds: float
    plain_seconds: float
    sampled: bool
    ratio: float
    mark: float | None
    max_difference: float | None
    value_range: float
    peak_mib: float
    matmul_gflops: float
    share_of_matmul: float | None
    less_arithmetic: float | None
    stacked_seconds: float | None = None
    stacked_ratio: float | None = None

    @property
    def passed(self) -> bool | None:
        return None if self.mark is None else self.ratio >= self.mark


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    synchronise(device)
    begin = time.perf_counter()
    result = call()
    synchronise(device)
    return time.perf_counter() - begin, result


def matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """The machine's own speed at square matrix products, best of five."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = [timed(lambda: a @ a, device)[0] for _ in range(6)][1:]
    return 2 * size**3 / min(times) / 1e9


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Collects the most memory in MiB that the block used over what it began with."""
    found: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append((torch.cuda.max_memory_allocated(device) - before) / 2**20)
        return
    process, done, most = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.append(max(0, most[0] - before) / 2**20)


def needed_flops(model: Any, task: Any, sweep: str) -> tuple[float, float]:
    """The multiplications and additions that the patched runs of a sweep cannot do without.

    Matrix products with the blocks' weights, for the positions that a patch can change and the
    metric can see: in the patch's own block only what comes after the patch, in the last block
    keys and values for positions that are not read. Attention's own products are left out, so the
    share of matmul speed is understated.

    Returns:
        That of the blocks, and that of the unembedding.
    """
    sweeps = COMBINED[sweep][0] if sweep in COMBINED else (sweep,)
    clean, corrupted = task.clean_tokens, task.corrupted_tokens
    differ = (clean != corrupted).any(0).nonzero()[:, 0].tolist()
    read = set(task.metric.positions.flatten().tolist())
    vocabulary = model.cfg.d_vocab if task.metric.tokens is None else task.metric.tokens.shape[1]
    end, n_layers = max(read) + 1, len(model.blocks)
    in_blocks = in_unembedding = 0.0
    for name in sweeps:
        activation, _, axes = SWEEPS[name]
        heads = model.cfg.n_heads
        if activation in ("k", "v"):
            heads = getattr(model.cfg, "n_key_value_heads", None) or heads
        each = heads if {"head", "head_index"} & set(axes) else 1
        positions = {"pos", "dest_pos"} & set(axes)
        starts = range(differ[0], end) if positions else [differ[0]]
        for layer in range(n_layers):
            whole, kv, after = _block_weights(model.blocks[layer], activation)
            for start in starts:
                if layer == 0 and kind_of_activation(activation).at_input and start not in differ:
                    continue
                sources = start + 1 if "src_pos" in axes else 1
                tokens = end - start
                own = tokens if kind_of_activation(activation).spreads or not positions else 1
                if layer == n_layers - 1:
                    own = sum(start <= p < start + own for p in read)
                    if not own:
                        continue
                weights = after * own
                last_whole, last_kv, _ = _block_weights(model.blocks[-1], activation)
                later = n_layers - 1 - layer
                read_here = sum(p >= start for p in read)
                if later:
                    weights += whole * tokens * (later - 1)
                    weights += last_whole * read_here + last_kv * (tokens - read_here)
                runs = 2.0 * each * sources * len(clean)
                in_blocks += runs * weights
                in_unembedding += runs * read_here * model.cfg.d_model * vocabulary
    return in_blocks, in_unembedding


def forward_flops(model: Any, task: Any) -> float:
    """The same for one plain forward pass, logits at every position included."""
    weights = sum(_block_weights(block, "resid_pre")[0] for block in model.blocks)
    return 2.0 * task.clean_tokens.numel() * (weights + model.cfg.d_model * model.cfg.d_vocab)


def _block_weights(block: Any, activation: str) -> tuple[int, int, int]:
    """Weights of a block: all, those of keys and values, those used after the patch."""

    def size(*parts: str) -> int:
        count = 0
        for part in parts:
            owner: Any = block
            for name in part.split("."):
                owner = getattr(owner, name, None)
            if owner is not None:
                count += sum({id(w): w.numel() for w in owner.parameters() if w.ndim == 2}.values())
        return count

    mlp, kv, out = size("mlp"), size("attn.k", "attn.v"), size("attn.o")
    whole = mlp + kv + size("attn.q") + out
    after = {
        "resid_pre": whole,
        "resid_mid": mlp,
        "attn_out": mlp,
        "mlp_out": 0,
        "resid_post": 0,
    }.get(activation, mlp + out)
    return whole, kv, after


def plain_sweep(name: str) -> Callable[..., Any]:
    """The sweep of transformer_lens.patching; resid_post, which it lacks, from its generic one."""
    found = getattr(plain, f"get_act_patch_{name}", None)
    if found is not None:
        return found
    activation, setter, axes = SWEEPS[name]
    return lambda *inputs: plain.generic_activation_patch(
        *inputs, patch_setter=setter, activation_name=activation, index_axis_names=axes
    )


def parts_of(
    model: Any, name: str, result: torch.Tensor
) -> Iterator[tuple[str, Any, pd.DataFrame, torch.Tensor]]:
    """The sweeps in one: activation, patch setter, the indices of all cells, and their values."""
    sweeps = COMBINED[name][0] if name in COMBINED else (name,)
    for number, sweep in enumerate(sweeps):
        activation, setter, axes = SWEEPS[sweep]
        own = result[number] if name in COMBINED else result
        order = COMBINED[name][1] if name in COMBINED else axes
        short = [{"head_index": "head", "dest_pos": "pos"}.get(axis, axis) for axis in axes]
        if name in COMBINED:
            own = own.permute(*[list(order).index(axis) for axis in short])
            if activation in ("k", "v"):
                own = own[..., : getattr(model.cfg, "n_key_value_heads", None) or own.shape[-1]]
        yield activation, setter, make_df_from_ranges(list(own.shape), list(axes)), own


def sample_plain(
    model: Any, task: Any, cache: Any, metric: Any, name: str, result: torch.Tensor
) -> tuple[float, float]:
    """Seconds per cell of the plain loop on some random cells, and their largest difference."""
    rng = np.random.default_rng(0)
    parts = list(parts_of(model, name, result))
    seconds, worst, count = 0.0, 0.0, 0
    for activation, setter, index, own in parts:
        cells = max(2, SAMPLE_CELLS // len(parts))
        rows = rng.choice(len(index), size=min(cells, len(index)), replace=False)
        chosen = index.iloc[rows].reset_index(drop=True)
        took, values = timed(
            lambda chosen=chosen, setter=setter, activation=activation: (
                plain.generic_activation_patch(
                    model, task.corrupted_tokens, cache, metric, setter, activation, None, chosen
                )
            ),
            task.corrupted_tokens.device,
        )
        seconds, count = seconds + took, count + len(chosen)
        found = torch.stack([own[tuple(row)] for row in chosen.to_numpy().tolist()])
        worst = max(worst, (found - values).abs().max().item())
    return seconds / count, worst


def sample_stacked(
    model: Any, task: Any, cache: Any, metric: Any, name: str, result: torch.Tensor
) -> float:
    """Seconds per cell of a loop that runs several cells of a random layer in one forward pass.

    Raises:
        AssertionError: if its values are not the plain loop's.
    """
    rng, tokens = np.random.default_rng(0), task.corrupted_tokens
    seconds, count = 0.0, 0
    for activation, setter, index, _ in parts_of(model, name, result):
        layer = int(rng.integers(model.cfg.n_layers))
        own = index[index["layer"] == layer]
        own = own.sample(min(len(own), STACKED_CELLS), random_state=0).reset_index(drop=True)
        name_of_hook, cells = get_act_name(activation, layer), own.to_numpy().tolist()
        stack = partial(_stacked, model, tokens, cache, metric, setter, name_of_hook, cells)
        took, values = timed(stack, tokens.device)
        wanted = plain.generic_activation_patch(
            model, tokens, cache, metric, setter, activation, None, own
        )
        allowed = 4 * tolerance(next(model.parameters()).dtype) * max(1, wanted.abs().max())
        assert (values - wanted).abs().max() <= allowed, f"{name}: stacked cells are otherwise"
        seconds, count = seconds + took, count + len(cells)
    return seconds / count


def _stacked(
    model: Any, tokens: torch.Tensor, cache: Any, metric: Any, setter: Any, name: str, cells: Any
) -> torch.Tensor:
    """The metric for each of some cells of one hook, each in rows of its own."""

    def write(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        for rows, cell in zip(activation.split(len(tokens)), cells, strict=True):
            setter(rows, cell, cache[name])  # In place.
        return activation

    logits = model.run_with_hooks(tokens.repeat(len(cells), 1), fwd_hooks=[(name, write)])
    return torch.stack([metric(rows) for rows in logits.split(len(tokens))])


@torch.no_grad()
def measure(model: Any, model_name: str, task: Any, cache: Any, name: str, bare: bool) -> Row:
    device, dtype = task.corrupted_tokens.device, next(model.parameters()).dtype
    metric = (lambda logits: task.metric(logits)) if bare else task.metric
    inputs = (model, task.corrupted_tokens, cache, metric)
    ours = getattr(patching, f"get_act_patch_{name}")
    speed = [matmul_gflops(device, dtype)]
    with peak_memory(device) as peak:
        first, result = timed(lambda: ours(*inputs, progress=False), device)
    times = [first]
    while len(times) < MOST_RUNS and sum(times) < REPEAT_FOR_SECONDS:
        times.append(timed(lambda: ours(*inputs, progress=False), device)[0])
    seconds = statistics.median(times)
    speed.append(matmul_gflops(device, dtype))
    per_cell, worst = sample_plain(model, task, cache, metric, name, result)
    cells = int(torch.isfinite(result).sum())
    sampled = per_cell * cells > WHOLE_UNDER_SECONDS
    plain_seconds = per_cell * cells
    if not sampled:
        plain_seconds, expected = timed(lambda: plain_sweep(name)(*inputs), device)
        differences = (result - expected)[torch.isfinite(result)]
        worst = differences.abs().max().item()
    stacked_seconds = cells * sample_stacked(model, task, cache, metric, name, result)
    speed.append(matmul_gflops(device, dtype))
    gflops = statistics.median(speed)
    mark = MARKS.get(model_name, {}).get(name) if device.type == "cpu" else None
    if mark and bare:
        mark *= PLAIN_METRIC_SHARE_OF_MARK
    finite = result[torch.isfinite(result)]
    in_blocks, in_unembedding = needed_flops(model, task, name)
    whole = forward_flops(model, task)
    return Row(
        model=model_name,
        dtype=str(dtype)[6:],
        sweep=name + (" (bare function)" if bare else ""),
        cells=cells,
        seconds=seconds,
        plain_seconds=plain_seconds,
        sampled=sampled,
        ratio=plain_seconds / seconds,
        mark=mark,
        max_difference=worst,
        value_range=(finite.max() - finite.min()).item(),
        peak_mib=peak[0],
        matmul_gflops=gflops,
        share_of_matmul=None if bare else in_blocks / seconds / gflops / 1e9,
        less_arithmetic=cells * whole / (in_blocks + in_unembedding + 2 * whole),
        stacked_seconds=stacked_seconds,
        stacked_ratio=stacked_seconds / seconds,
    )


@torch.no_grad()
def measure_question(model: Any, model_name: str, task: Any, name: str) -> Row:
    """A question of ``QUESTIONS`` against its natural loop, of which some passes are timed."""
    device, dtype = task.corrupted_tokens.device, next(model.parameters()).dtype
    ask, passes = QUESTIONS[name]
    task = TASKS[name](model) if name in TASKS else task
    speed = [matmul_gflops(device, dtype)]
    with peak_memory(device) as peak:
        times = [timed(lambda: ask(model, task), device)]
    while len(times) < MOST_RUNS and sum(took for took, _ in times) < REPEAT_FOR_SECONDS:
        times.append(timed(lambda: ask(model, task), device))
    seconds, values = statistics.median(took for took, _ in times), np.asarray(times[0][1])
    speed.append(matmul_gflops(device, dtype))
    # With a hook on every attention, as freezing and patching need.
    hooks = [
        (f"blocks.{layer}.attn.hook_z", lambda activation, hook: activation)
        for layer in range(model.cfg.n_layers)
    ]
    # One pass for each length of prompts.
    lengths = task.corrupted_lengths
    shapes = [task.corrupted_tokens[lengths == n][:, :n] for n in lengths.unique().tolist()]
    runs = max(2, SAMPLE_CELLS // 2 // len(shapes))
    forward = sum(
        statistics.median(
            timed(lambda own=own: model.run_with_hooks(own, fwd_hooks=hooks), device)[0]
            for _ in range(runs)
        )
        for own in shapes
    )
    cells = int(np.isfinite(values).sum())
    plain_seconds = forward * passes * cells
    speed.append(matmul_gflops(device, dtype))
    return Row(
        model_name, str(dtype)[6:], name, cells, seconds, plain_seconds, True,
        plain_seconds / seconds,
        MARKS.get(model_name, {}).get(name) if device.type == "cpu" else None,
        None, float(np.nanmax(values) - np.nanmin(values)), peak[0], statistics.median(speed),
        None, None,
    )  # fmt: skip


def total_row(rows: list[Row], name: str, parts: tuple[str, ...]) -> Row | None:
    """The sum of some rows, as one."""
    found = [row for row in rows if row.sweep in parts]
    if len(found) < len(parts):
        return None
    seconds = sum(row.seconds for row in found)
    plain_seconds = sum(row.plain_seconds for row in found)
    gflops = statistics.median(row.matmul_gflops for row in found)
    work = sum(row.share_of_matmul * row.seconds * row.matmul_gflops for row in found)
    first, stacked = found[0], sum(row.stacked_seconds for row in found)
    return Row(
        first.model, first.dtype, name, sum(row.cells for row in found), seconds, plain_seconds,
        any(row.sampled for row in found), plain_seconds / seconds,
        MARKS.get(first.model, {}).get(name) if first.mark else None,
        max(row.max_difference for row in found), max(row.value_range for row in found),
        max(row.peak_mib for row in found), gflops, work / seconds / gflops,
        sum(row.cells for row in found) / sum(row.cells / row.less_arithmetic for row in found),
        stacked, stacked / seconds,
    )  # fmt: skip


def table(rows: list[Row], about: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        f"Measured on {about['device']}, {about['threads']} threads, torch {about['torch']}, "
        f"transformer_lens {about['transformer_lens']}, {about['date']}. Times are in seconds; "
        "`~` marks a plain loop timed on a random sample of its cells. *Less arithmetic* is how "
        "many times fewer operations the sweep needs than the plain loop. The *stacked loop* runs "
        f"up to {STACKED_CELLS} cells of a layer in the batch of one forward pass, timed on a "
        "sample.",
        "",
        "| model | dtype | sweep | cells | here | plain loop | ratio | mark | less arithmetic "
        "| largest difference | peak memory (MiB) | share of matmul speed | stacked loop "
        "| ratio to it |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        mark = "" if row.mark is None else f"{row.mark:.0f}{'' if row.passed else ' (missed)'}"
        share = "" if row.share_of_matmul is None else f"{row.share_of_matmul:.0%}"
        less = "" if row.less_arithmetic is None else f"{row.less_arithmetic:.1f}"
        difference = "" if row.max_difference is None else f"{row.max_difference:.1e}"
        stacked = " | "
        if row.stacked_seconds is not None:
            stacked = f"~{row.stacked_seconds:,.1f} | {row.stacked_ratio:.1f}"
        lines.append(
            f"| {row.model} | {row.dtype} | {row.sweep} | {row.cells:,} | {row.seconds:.2f} | "
            f"{'~' if row.sampled else ''}{row.plain_seconds:,.1f} | {row.ratio:.1f} | {mark} | "
            f"{less} | {difference} | {row.peak_mib:.0f} | {share} | {stacked} |"
        )
    return "\n".join(lines) + "\n"


def write(rows: list[Row], about: dict[str, Any]) -> None:
    """Write what was measured so far: a run takes the better part of an hour."""
    OUT.mkdir(exist_ok=True)
    (OUT / "results.json").write_text(
        json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    )
    (OUT / "table.md").write_text(table(rows, about))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--sweeps", nargs="+")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    whole = not (arguments.models or arguments.sweeps)  # A few rows don't take the table's place.
    models = arguments.models or ["attn-only-2l-demo", "smollm2-135m"]
    sweeps = arguments.sweeps or [*SWEEPS, *COMBINED, *QUESTIONS]
    device = torch.device(arguments.device)
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
        or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformer_lens": version("transformer_lens"),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    rows: list[Row] = []
    plain.tqdm = lambda cells, **_: cells  # The plain loop's own bar cannot be turned off.
    for name in models:
        for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
            model = load_model(name, device=device).to(dtype)
            build = induction_task if name.startswith("attn-only") else ioi_task
            task = build(model)
            with torch.no_grad():
                _, cache = model.run_with_cache(task.clean_tokens)
            own: list[Row] = []
            for sweep in sweeps:
                for bare in (False, True) if sweep in PLAIN_METRIC else (False,):
                    try:
                        if sweep in QUESTIONS:
                            row = measure_question(model, name, task, sweep)
                        else:
                            row = measure(model, name, task, cache, sweep, bare)
                    except ValueError as error:
                        print(f"{name} {sweep}: not on this model ({error})", flush=True)
                        continue
                    own.append(row)
                    if whole:
                        write([*rows, *own], about)
                    print(table([row], about).splitlines()[-1], flush=True)
            total = total_row(own, "all of notebook 2", NOTEBOOK_2)
            rows += own + ([total] if total else [])
    if whole:
        write(rows, about)
    print("\n" + table(rows, about))
    missed = [row.sweep for row in rows if row.passed is False]
    print("every mark reached" if not missed else f"below their mark: {', '.join(missed)}")


if __name__ == "__main__":
    main()
