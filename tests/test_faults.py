"""After a fault in the middle of a sweep, everything of the caller's is as it was."""

from __future__ import annotations

import gc
import pickle
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import oracle
import psutil
import pytest
import tiny
import torch
from oracle import assert_close, expected, pair
from torch import Tensor

from patching_demo import patching
from patching_demo.engine import checks, packs, runner, scoring, store


def sweep(kind: str = "attn_head_out_by_pos", name: str = "gpt2", **options: Any) -> Any:
    data = pair(name)
    return getattr(patching, f"get_act_patch_{kind}")(
        oracle.model(name),
        data.corrupted,
        data.cache,
        options.pop("metric", data.metrics["all logits"]),
        progress=False,
        **options,
    )


def state_of(name: str) -> dict[str, Any]:
    """All that belongs to the caller, in comparable form."""
    model, data = oracle.model(name), pair(name)
    roots = (model, model.original_model)
    modules = [module for root in roots if root is not None for module in root.modules()]
    return {
        "cache": {k: v.numpy(force=True).tobytes() for k, v in data.cache.items()},
        "tokens": data.corrupted.numpy().tobytes(),
        "weights": {k: v.numpy(force=True).tobytes() for k, v in model.state_dict().items()},
        "hooks": [
            list(getattr(module, kind))
            for module in modules
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        ],
        "listed hooks": {k: list(point.fwd_hooks) for k, point in model.hook_dict.items()},
        "training": [module.training for module in modules],
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "threads": torch.get_num_threads(),
        "random": torch.get_rng_state().numpy().tobytes(),
        "requires grad": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad is None for p in model.parameters()],
    }


@contextmanager
def all_as_before(name: str = "gpt2") -> Iterator[None]:
    pair(name)
    before = state_of(name)
    yield
    after = state_of(name)
    for part, value in before.items():
        assert after[part] == value, f"{part} changed"


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gpt2", "attn_head_by_pos_every"),
        ("gpt2", "resid_mid"),
        ("llama-gqa", "attn_head_by_pos_every"),
        ("llama-gqa", "block_every"),
        ("bloom", "resid_pre"),
    ],
)
@pytest.mark.filterwarnings("ignore:this sweep takes the plain loop")
def test_a_sweep_leaves_everything_as_it_was(name: str, kind: str, grad: bool) -> None:
    pair(name)
    with torch.set_grad_enabled(grad), all_as_before(name):
        found = sweep(kind, name)
        assert not found.requires_grad


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, ZeroDivisionError, SystemExit])
@pytest.mark.parametrize("after", [0, 1, 4, 15])
def test_an_exception_in_the_metric_passes_through(error: type[BaseException], after: int) -> None:
    calls = iter(range(after))

    def metric(logits: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise error("in the metric")
        return oracle.all_logits(logits)

    with all_as_before(), pytest.raises(error, match="in the metric"):
        sweep(metric=metric)


def test_an_exception_in_a_patch_setter_passes_through() -> None:
    def setter(activation: Tensor, index: Any, clean: Tensor) -> Tensor:
        activation[:] = 0
        raise LookupError("in the setter")

    data = pair("gpt2")
    with (
        all_as_before(),
        pytest.warns(UserWarning, match="takes the plain loop"),
        pytest.raises(LookupError, match="in the setter"),
    ):
        patching.generic_activation_patch(
            tiny.model("gpt2"),
            data.corrupted,
            data.cache,
            oracle.all_logits,
            setter,
            "z",
            ("layer", "pos", "head"),
            progress=False,
        )


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("after", [1, 3])
def test_an_exception_in_a_hook_of_the_callers_passes_through(
    error: type[BaseException], after: int
) -> None:
    """On a hook point, where it calls for the plain loop, and on a module, where it does not."""
    model = tiny.model("gpt2")
    pair("gpt2")
    for on_point in (True, False):
        calls = iter(range(after))

        def hook(*_: Any, calls: Iterator[int] = calls, **__: Any) -> None:
            if next(calls, None) is None:
                raise error("in the hook")

        if on_point:
            point = model.hook_dict["blocks.1.hook_resid_pre"]
            handle = point.add_hook(hook)
            listed = list(point.fwd_hooks)
        else:
            handle = model.blocks[1].register_forward_hook(hook)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "this sweep takes the plain loop")
                with all_as_before(), pytest.raises(error, match="in the hook"):
                    sweep()
        finally:
            if on_point:
                assert list(point.fwd_hooks) == listed, "the caller's own hook stays"
                handle.hook.remove()
                point.fwd_hooks.remove(handle)
            else:
                handle.remove()
    assert torch.isfinite(sweep()).all()


def test_an_exception_in_a_direct_path_passes_through() -> None:
    model, data = tiny.model("gpt2"), pair("gpt2")
    calls = iter(range(2))

    def metric(logits: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return oracle.all_logits(logits)

    split = model.cfg.use_split_qkv_input
    inputs = (model, data.corrupted, data.cache, oracle.corrupted_cache("gpt2"))
    with all_as_before(), torch.enable_grad(), pytest.raises(KeyboardInterrupt):
        patching.get_act_patch_direct_path(*inputs, metric, 0, 1, verbose=False)
    assert model.cfg.use_split_qkv_input == split


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("stage", ["capture", "run_block", "hooked", "logits_from_resid"])
def test_an_interrupt_in_the_middle_of_the_engine(
    stage: str, isolated: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the sweep has no modules of its own (as with hooks for every module)."""
    module = {"capture": runner, "logits_from_resid": scoring}.get(stage, packs)
    right, calls = (
        getattr(module, stage),
        iter(range({"capture": 0, "run_block": 3, "hooked": 3, "logits_from_resid": 0}[stage])),
    )

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return right(*arguments, **options)

    with all_as_before(name), monkeypatch.context() as patch:
        patch.setattr(module, stage, interrupted)
        for user in () if isolated else (runner, patching):
            patch.setattr(user, "isolated", lambda model, *_: model)
        with pytest.raises(KeyboardInterrupt):
            sweep("attn_head_by_pos_every", name)


def test_a_metric_that_writes_into_its_logits_harms_no_other_cell() -> None:
    def metric(logits: Tensor) -> Tensor:
        value = oracle.all_logits(logits)
        logits[:] = 0
        return value

    wanted = expected("gpt2", "attn_head_out_by_pos")["all logits"].mean()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sweep(metric=metric)
    assert_close(found, wanted, metric_axis=False)


def out_of_memory_above(tokens: int, right: Callable[..., Tensor], log: list[int]) -> Any:
    """A device that holds no more than so many tokens in a block call."""

    def run_block(model: Any, run: Any, layer: int, layout: Any, states: Tensor, *rest: Any) -> Any:
        size = states.shape[0] * states.shape[1] * states.shape[2]
        log.append(size)
        if size > tokens:
            raise torch.OutOfMemoryError("out of memory, says the test")
        return right(model, run, layer, layout, states, *rest)

    return run_block


@pytest.mark.parametrize("kind", ["resid_pre", "attn_head_out_by_pos", "attn_head_k_all_pos"])
def test_running_out_of_memory_halves_the_batch_and_goes_on(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[int] = []
    limited = out_of_memory_above(24, packs.run_block, log)
    with all_as_before(), monkeypatch.context() as patch:
        patch.setattr(packs, "run_block", limited)
        patch.setattr(runner, "prove", lambda *_: torch.zeros(1))
        found = sweep(kind, check=0)
    assert max(log) > 24, "the test never ran out of memory"
    assert log[-1] <= 24
    wanted = expected("gpt2", kind)["all logits"].mean()
    assert_close(found, wanted, metric_axis=False)


def test_running_out_of_memory_for_good_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = out_of_memory_above(0, packs.run_block, [])
    with all_as_before(), monkeypatch.context() as patch:
        patch.setattr(packs, "run_block", limited)
        with pytest.warns(UserWarning, match="plain loop: there is no memory for control runs"):
            sweep("resid_pre")
        patch.setattr(runner, "prove", lambda *_: torch.zeros(1))
        with pytest.raises(torch.OutOfMemoryError):
            sweep("resid_pre")


def test_finished_cells_survive_running_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cells.sqlite"
    monkeypatch.setattr(store.CellStore, "most_cells", lambda self, total: 8)
    right, calls = runner.sweep_cells, iter(range(2))

    def twice(*arguments: Any, **options: Any) -> Tensor:
        if next(calls, None) is None:
            raise MemoryError("the machine is full")
        return right(*arguments, **options)

    with all_as_before(), monkeypatch.context() as patch:
        patch.setattr(runner, "sweep_cells", twice)
        with pytest.raises(MemoryError):
            sweep(store=path)
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("SELECT count(*) FROM finished").fetchone()[0] >= 8
    assert_close(
        sweep(store=path),
        expected("gpt2", "attn_head_out_by_pos")["all logits"].mean(),
        metric_axis=False,
    )


def test_the_progress_bar_is_closed_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    right = runner.tqdm

    def eager(*arguments: Any, **options: Any) -> Any:
        made.append(right(*arguments, **{**options, "delay": 0, "mininterval": 0}))
        return made[-1]

    monkeypatch.setattr(runner, "tqdm", eager)
    data = pair("gpt2")
    patching.get_act_patch_resid_pre(
        tiny.model("gpt2"), data.corrupted, data.cache, oracle.all_logits
    )
    (bar,) = made
    assert bar.n == bar.total
    assert not bar.leave
    shown = capsys.readouterr().err
    assert shown.endswith("\r")
    assert not shown.split("\r")[-2].strip(), "the bar is wiped off"
    sweep("resid_pre")
    assert made[1].disable
    assert capsys.readouterr().err == ""


def test_many_sweeps_take_no_more_memory_than_a_few() -> None:
    process = psutil.Process()

    def resident() -> int:
        gc.collect()
        return process.memory_info().rss

    metric = pair("gpt2").metrics["difference"]
    for _ in range(60):  # Allocators settle meanwhile.
        sweep("resid_mid", metric=metric, check=1)
    # The list of all objects takes memory itself, so that it comes first.
    tensors = sum(type(thing) is Tensor for thing in gc.get_objects())
    before = resident()
    for _ in range(60):
        sweep("resid_mid", metric=metric, check=1)
    grown = resident() - before
    assert sum(type(thing) is Tensor for thing in gc.get_objects()) <= tensors + 5
    assert grown < 4e6, f"{grown / 1e6:.1f} MB more after 60 sweeps"


def test_patches_are_copied_out_of_the_cache_and_never_into_it() -> None:
    """The field's setters write in place, so a cache that shares memory would change."""
    model, data = tiny.model("gpt2"), pair("gpt2")
    shared = {name: value.clone() for name, value in data.cache.items()}
    before = {name: value.clone() for name, value in shared.items()}
    for kind in ("resid_pre", "attn_head_pattern_by_pos", "attn_head_q_all_pos"):
        getattr(patching, f"get_act_patch_{kind}")(
            model, data.corrupted, shared, oracle.all_logits, progress=False, check=5
        )
    assert all(torch.equal(shared[name], before[name]) for name in shared)


def test_a_setter_may_write_in_place_and_return_nothing(tmp_path: Path) -> None:
    data = pair("gpt2")

    def put(activation: Tensor, index: Any, clean: Tensor) -> None:
        activation[:, index[1]] = clean[:, index[1]]

    inputs = oracle.model("gpt2"), data.corrupted, data.cache, data.metrics["difference"]
    with pytest.warns(UserWarning, match="takes the plain loop: the patch setter"):
        found = patching.generic_activation_patch(
            *inputs, put, "resid_pre", ("layer", "pos"), progress=False, store=tmp_path / "kept"
        )
    wanted = patching.get_act_patch_resid_pre(*inputs, progress=False)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_errors_reach_the_process_that_asked() -> None:
    error = checks.HookNotLive("blocks.0.attn.hook_pattern", True)
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.hook) == (str(error), error.hook)
