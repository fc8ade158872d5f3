"""The sweeps give the numbers of ``transformer_lens.patching``, or better ones where it is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import architectures
import oracle
import pandas as pd
import pytest
import tiny
import torch
import transformer_lens.patching as plain_patching
from oracle import SINGLE, assert_close, expected, expected_cells, make_pair, pair, some_cells
from torch import Tensor

from patching_demo import checks, patching, runner

QUIET = {"progress": False}


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Tiny models run slower on two threads than on one; warnings come once per test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    checks._warned.clear()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rechecks aside, the fast engine must not hand a cell to the plain loop."""

    def refuse(message: str) -> None:
        pytest.fail(message)

    monkeypatch.setattr(runner, "warn_once", refuse)
    monkeypatch.setattr(runner, "FEWEST_CELLS", 1)


def exists_on(name: str, sweep: str) -> bool:
    """Parallel blocks have no resid_mid, attention-only ones no MLP."""
    missing = {"neox-parallel": ("resid_mid",), "attn-only": ("mlp_out", "resid_mid")}
    return sweep not in missing.get(name, ())


@pytest.mark.parametrize("sweep", SINGLE)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_each_sweep_agrees_with_the_plain_loop(name: str, sweep: str, no_plain_loop: None) -> None:
    if not exists_on(name, sweep):
        with pytest.raises(ValueError, match="has no hook .*parallel block has no resid_mid"):
            sweep_of(name, sweep)
        return
    wanted = expected(name, sweep)
    found = sweep_of(name, sweep, reduce="none", baseline=True)
    assert_close(found.values, wanted.values)
    assert_close(found.baseline, wanted.baseline)
    assert found.axis_names == wanted.axis_names
    pd.testing.assert_frame_equal(found.index_df, wanted.index_df)


def sweep_of(name: str, sweep: str, **options: Any) -> Any:
    data = pair(name)
    metrics = data.metrics if options.get("reduce", "scalar") == "scalar" else data.per_example
    metrics = options.pop("metrics", metrics)
    return getattr(patching, f"get_act_patch_{sweep}")(
        oracle.model(name), data.corrupted, data.cache, metrics, **QUIET, **options
    )


def combined_from_singles(name: str, combined: str) -> Tensor:
    """What the plain loop would stack, with NaN for heads that do not exist."""
    sweeps, _, axes = patching.COMBINED[combined]
    parts = []
    for sweep in sweeps:
        values = expected(name, sweep).values.mean(-1)
        if sweep == "attn_head_pattern_by_pos":
            values = values.transpose(-1, -2)
        if "head" in axes:
            lacking = oracle.model(name).cfg.n_heads - values.shape[-1]
            values = torch.nn.functional.pad(values, (0, lacking), value=float("nan"))
        parts.append(values)
    return torch.stack(parts, dim=1)


@pytest.mark.parametrize("combined", patching.COMBINED)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_each_combination_agrees_with_its_sweeps(
    name: str, combined: str, no_plain_loop: None
) -> None:
    if (name, combined) == ("attn-only", "block_every"):
        with pytest.raises(ValueError, match="an attention-only block no mlp_out"):
            sweep_of(name, combined)
        return
    found, wanted = sweep_of(name, combined), combined_from_singles(name, combined)
    assert torch.equal(found.values.isnan(), wanted.isnan())
    for number in range(wanted.shape[1]):
        exists = ~wanted[:, number].isnan()
        assert_close(
            found.values[:, number][exists].view(len(wanted), -1),
            wanted[:, number][exists].view(len(wanted), -1),
        )
    assert found.patch_type_names == list(patching.COMBINED[combined][1])


@pytest.mark.parametrize("combined", patching.COMBINED)
def test_combinations_have_the_plain_loops_layout(combined: str) -> None:
    """Also held to the plain loop's own combinations, on a model where those are right."""
    data = pair("gpt2")
    with torch.no_grad(), oracle.quiet():
        wanted = getattr(plain_patching, f"get_act_patch_{combined}")(
            tiny.model("gpt2"), data.corrupted, data.cache, data.metrics, baseline=True
        )
    found = sweep_of("gpt2", combined, baseline=True)
    assert_close(found.values, wanted.values)
    assert_close(found.baseline, wanted.baseline)
    assert found.axis_names == wanted.axis_names
    assert found.patch_type_names == wanted.patch_type_names
    pd.testing.assert_frame_equal(
        found.to_dataframe().drop(columns="value"), wanted.to_dataframe().drop(columns="value")
    )


def test_heads_that_do_not_exist_are_nan() -> None:
    found = sweep_of("llama-gqa", "attn_head_all_pos_every")
    kinds = dict(zip(found.patch_type_names, found.values.transpose(0, 1), strict=True))
    n_kv = tiny.model("llama-gqa").cfg.n_key_value_heads
    for kind in ("k", "v"):
        assert kinds[kind][..., n_kv:].isnan().all()
        assert not kinds[kind][..., :n_kv].isnan().any()
    assert not any(kinds[kind].isnan().any() for kind in ("out", "q", "pattern"))


@pytest.mark.parametrize("sweep", patching.SWEEPS)
@pytest.mark.parametrize("name", architectures.FAST)
def test_other_architectures_agree_with_the_plain_loop(
    name: str, sweep: str, no_plain_loop: None
) -> None:
    if sweep == "resid_post":
        return
    index = some_cells(name, sweep, 10)
    wanted = expected_cells(name, sweep, index)
    activation, setter, _ = patching.SWEEPS[sweep]
    data = pair(name)
    found = patching.generic_activation_patch(
        oracle.model(name),
        data.corrupted,
        data.cache,
        data.per_example,
        setter,
        activation,
        index_df=index,
        reduce="none",
        baseline=True,
        check=0,
        **QUIET,
    )
    assert_close(found.values, wanted.values)
    assert_close(found.baseline, wanted.baseline)


@pytest.mark.parametrize("sweep", ["resid_pre", "resid_mid", "attn_head_k_by_pos", "mlp_out"])
@pytest.mark.parametrize("name", ["bloom", *architectures.PATTERN_NOT_LIVE])
def test_what_the_engine_cannot_serve_takes_the_plain_loop(name: str, sweep: str) -> None:
    if not oracle_has(name, sweep):
        with pytest.raises(ValueError, match="has no hook"):
            sweep_of(name, sweep)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = sweep_of(name, sweep, reduce="none")
        sweep_of(name, sweep, reduce="none")
    own = [str(w.message) for w in caught if "plain loop" in str(w.message)]
    assert len(own) <= 1, own
    assert_close(found.values, expected(name, sweep).values)


def test_alibi_takes_the_plain_loop_and_says_so_once() -> None:
    with pytest.warns(UserWarning, match="takes the plain loop: block 0 takes a tensor 'alibi'"):
        sweep_of("bloom", "resid_pre")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep_of("bloom", "resid_pre")


def oracle_has(name: str, sweep: str) -> bool:
    return not (name == "gpt-j" and sweep == "resid_mid")


@pytest.mark.parametrize("sweep", [s for s in SINGLE if "pattern" in s])
@pytest.mark.parametrize("name", architectures.PATTERN_NOT_LIVE)
def test_patterns_that_cannot_be_patched_are_refused(name: str, sweep: str) -> None:
    with pytest.raises(ValueError, match=r"hook 'blocks.0.attn.hook_pattern' is not live"):
        sweep_of(name, sweep)


def test_the_plain_loop_reads_zero_where_the_pattern_is_not_live() -> None:
    """What the refusal is for: no effect anywhere, in silence."""
    index = some_cells("opt", "attn_head_pattern_all_pos", 4)
    found = expected_cells("opt", "attn_head_pattern_all_pos", index)
    assert torch.equal(found.effect(), torch.zeros_like(found.values))


def test_combinations_refuse_a_pattern_that_is_not_live() -> None:
    with pytest.raises(ValueError, match="is not live"):
        sweep_of("opt", "attn_head_all_pos_every")
