"""The plain loop of ``transformer_lens.patching``, as what the sweeps are held to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import architectures
import pandas as pd
import tiny
import torch
import transformer_lens.patching as plain_patching
from torch import Tensor
from transformer_lens.patching import make_df_from_ranges

from patching_demo import prompt_task
from patching_demo.engine.tokens import device_of
from patching_demo.metrics import LogitDifference, LogProb

BATCH, N_POS = 2, 6
_PARTS = ("activation_name", "patch_setter", "index_axis_names")
#: The sweeps of ``transformer_lens.patching``: activation, patch setter and axes of each.
SWEEPS = {
    name.removeprefix("get_act_patch_"): tuple(found.keywords[part] for part in _PARTS)
    for name, found in vars(plain_patching).items()
    if isinstance(found, partial) and name.startswith("get_act_patch_")
}
SINGLE = tuple(SWEEPS)
#: And the one that is ours alone.
SWEEPS["resid_post"] = ("resid_post", *SWEEPS["resid_pre"][1:])
_HEADS = ("out", "q", "k", "v", "pattern")
#: Combinations: their sweeps, what each is called in the result, and the axes of the result.
COMBINED = {
    "block_every": (("resid_pre", "attn_out", "mlp_out"),) * 2 + (("layer", "pos"),),
    "attn_head_all_pos_every": (
        tuple(f"attn_head_{kind}_all_pos" for kind in _HEADS),
        _HEADS,
        ("layer", "head"),
    ),
    "attn_head_by_pos_every": (
        tuple(f"attn_head_{kind}_by_pos" for kind in _HEADS),
        _HEADS,
        ("layer", "pos", "head"),
    ),
}


def every_cell(model: Any, n_pos: int, sweep: str) -> pd.DataFrame:
    """The indices of all cells of a sweep."""
    activation, _, axes = SWEEPS[sweep]
    heads = model.cfg.n_heads
    if activation in ("k", "v"):
        heads = getattr(model.cfg, "n_key_value_heads", None) or heads
    sizes = {"layer": model.cfg.n_layers, "head": heads, "head_index": heads}
    return make_df_from_ranges([sizes.get(axis, n_pos) for axis in axes], axes)


def model(name: str) -> Any:
    """A shared tiny model by its name in ``tiny`` or ``architectures``."""
    return tiny.model(name) if name in tiny.NAMES else architectures.model(name)


#: Different blocks: learned and rotary positions, parallel, grouped queries, windows, no MLP.
MODELS = ("gpt2", "neox-parallel", "llama-gqa", "gemma2", "attn-only")


@lru_cache(None)
def task_of(name: str, start: int = 3, seed: int = 0) -> Any:
    """A task on random prompts of 7 tokens that differ at some positions from ``start`` on."""
    draw = torch.Generator().manual_seed(seed)
    clean = torch.randint(5, 100, (2, 7), generator=draw)
    corrupted = clean.clone()
    corrupted[:, start] += 1
    corrupted[1, 5] += 2
    return prompt_task(model(name), clean, corrupted, [[5, 9], [11, 6]])


@dataclass
class Pair:
    """Clean and corrupted tokens ``[batch, pos]``, the clean run's cache, and metrics."""

    clean: Tensor
    corrupted: Tensor
    cache: Any
    metrics: dict[str, Any]

    @property
    def per_example(self) -> dict[str, Any]:
        return {
            name: getattr(metric, "per_example", all_logits_per_example)
            for name, metric in self.metrics.items()
        }


_weights = torch.cos(torch.arange(tiny.D_VOCAB) ** 2)


def all_logits_per_example(logits: Tensor) -> Tensor:
    """A metric that reads every logit at every position: [batch]."""
    where = torch.arange(1, logits.shape[1] + 1, dtype=logits.dtype)
    return torch.einsum("bpv,v,p->b", logits, _weights.to(logits.dtype), where)


def all_logits(logits: Tensor) -> Tensor:
    return all_logits_per_example(logits).mean()


def make_pair(
    model: Any,
    batch: int = BATCH,
    n_pos: int = N_POS,
    differ: tuple[int, ...] = (2,),
    seed: int = 0,
) -> Pair:
    """Random prompts that differ at some positions, and in the first prompt at the last but one."""
    draw = torch.Generator().manual_seed(seed)
    clean = torch.randint(5, tiny.D_VOCAB, (batch, n_pos), generator=draw)
    corrupted = clean.clone()
    for position in differ:
        # A shift by 1 to 100 within the vocabulary is never the same token.
        shift = torch.randint(1, 100, (batch,), generator=draw)
        corrupted[:, position] = (clean[:, position] - 5 + shift) % (tiny.D_VOCAB - 5) + 5
    if differ and n_pos > 2:
        corrupted[0, n_pos - 2] = (clean[0, n_pos - 2] - 5 + 7) % (tiny.D_VOCAB - 5) + 5
    clean, corrupted = (tokens.to(device_of(model)) for tokens in (clean, corrupted))
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
    last = n_pos - 1
    answers = torch.randint(5, tiny.D_VOCAB, (batch, 2), generator=draw)
    metrics = {
        # Each prompt is read elsewhere.
        "difference": LogitDifference(
            answers, positions=[last - (row % 2) * (last > 0) for row in range(batch)]
        ),
        "log-probability": LogProb(answers, positions=[[max(last - 2, 0), last]] * batch),
        "all logits": all_logits,
    }
    return Pair(clean, corrupted, cache, metrics)


@lru_cache(None)
def pair(name: str) -> Pair:
    """The shared pair of prompts of a shared model; tests must leave it as it is."""
    return make_pair(model(name))


@lru_cache(None)
def corrupted_cache(name: str) -> Any:
    """The cache of the corrupted run of the shared pair of prompts."""
    with torch.no_grad():
        return model(name).run_with_cache(pair(name).corrupted)[1]


def quiet() -> Any:
    """The plain loop has no switch for its progress bar."""
    return mock.patch.object(plain_patching, "tqdm", lambda rows, **_: rows)


@lru_cache(None)
def expected(name: str, sweep: str) -> Any:
    """A whole sweep by the plain loop: per example, all metrics, with its baseline."""
    data = pair(name)
    with torch.no_grad(), quiet():
        return getattr(plain_patching, f"get_act_patch_{sweep}")(
            model(name),
            data.corrupted,
            data.cache,
            data.per_example,
            reduce="none",
            baseline=True,
        )


def some_cells(name: str, sweep: str, count: int, seed: int = 0) -> pd.DataFrame:
    """Indices of a few cells of a sweep, drawn at random."""
    data = pair(name)
    index = every_cell(model(name), data.corrupted.shape[1], sweep)
    return index.sample(min(count, len(index)), random_state=seed).reset_index(drop=True)


def expected_cells(name: str, sweep: str, index: pd.DataFrame) -> Any:
    """Some cells of a sweep by the plain loop, as :func:`expected`, flat."""
    data = pair(name)
    activation, setter, _ = SWEEPS[sweep]
    with torch.no_grad(), quiet():
        return plain_patching.generic_activation_patch(
            model(name),
            data.corrupted,
            data.cache,
            data.per_example,
            setter,
            activation,
            index_df=index,
            reduce="none",
            baseline=True,
        )


def assert_close(found: Tensor, wanted: Tensor, metric_axis: bool = True) -> None:
    """At most 1e-4 of the range of the values, metric by metric."""
    assert found.shape == wanted.shape, f"{tuple(found.shape)} is not {tuple(wanted.shape)}"
    if not metric_axis:
        found, wanted = found[None], wanted[None]
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        spread = float(other.max() - other.min())
        error = float((one - other).abs().max())
        assert error <= 1e-4 * spread, f"metric {number}: error {error:.2e}, range {spread:.2e}"
