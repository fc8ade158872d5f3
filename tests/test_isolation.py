"""A sweep and whatever else uses the model meanwhile do not reach each other."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType

import numpy as np
import pytest
import tiny
import torch
import xarray as xr

from patching_demo import ioi_task, prompt_task, sweep
from patching_demo.engine import isolation, runner
from patching_demo.engine.isolation import isolated

pytestmark = pytest.mark.filterwarnings("ignore:this sweep takes the plain loop")

PROMPTS = ("When John gave the bag to", "When Mary gave the bag to")
HEADS = ["out", "q", "pattern"]


def modules(model) -> dict[int, torch.nn.Module]:
    roots = (model, model.original_model)
    return {id(module): module for root in roots for module in root.modules()}


def tokens(model) -> torch.Tensor:
    return torch.randint(3, model.cfg.d_vocab, (2, 9), generator=torch.Generator().manual_seed(1))


def run(model, task) -> np.ndarray:
    return sweep(model, task, HEADS, by="all_pos", progress=False).values


@pytest.mark.parametrize("name", tiny.NAMES)
def test_isolated_modules_are_others_with_the_same_weights(name):
    model = tiny.model(name)
    own = isolated(model)
    assert not modules(own).keys() & modules(model).keys()
    assert len(modules(own)) == len(modules(model)) and set(own.hook_dict) == set(model.hook_dict)
    for (_, one), (_, other) in zip(own.named_parameters(), model.named_parameters(), strict=True):
        assert one is other
    called = []
    handles = [
        module.register_forward_pre_hook(lambda module, args: called.append(module))
        for module in modules(model).values()
    ]
    with torch.no_grad():
        logits, cache = own.run_with_cache(tokens(model))
        for handle in handles:
            handle.remove()
        assert not called and torch.equal(logits, model(tokens(model)))
    assert "blocks.1.attn.hook_pattern" in cache and isolated(own) is own


def test_what_was_put_in_place_of_a_modules_own_method_is_isolated_too():
    """As libraries do that move weights between devices, and bridges of unusual blocks."""
    model = tiny.fresh("gpt2")
    seen, mlp = [], model.blocks[0].mlp.original_component
    mlp.forward = partial(lambda module, f, x: seen.append(module) or f(x), mlp, mlp.forward)
    other = model.blocks[1].mlp.original_component
    bound = other.forward

    def through_a_cell(self, x):
        seen.append(other)
        return bound(x)

    other.forward = MethodType(through_a_cell, other)
    own = isolated(model)
    with torch.no_grad():
        assert torch.equal(own(tokens(model)), model(tokens(model)))
    originals = modules(model)
    assert [id(module) in originals for module in seen] == [False, False, True, True]


def test_hooks_that_the_caller_left_are_kept_and_stay_the_callers():
    model = tiny.fresh("gpt2")
    calls = []
    model.add_hook("blocks.0.hook_mlp_out", lambda act, hook: calls.append(hook.name) or act * 0)
    model.blocks[1].register_forward_hook(lambda module, args, output: calls.append("block"))
    with torch.no_grad():
        expected = model(tokens(model))
        own = isolated(model)
        model.reset_hooks()
        assert torch.equal(own(tokens(model)), expected) and len(calls) == 4
        assert not torch.equal(model(tokens(model)), expected)
    with model.hooks(fwd_hooks=[("hook_embed", lambda act, hook: act * 0)]):
        assert len(isolated(model).hook_dict["hook_embed"].fwd_hooks) == 1


class User:
    """Whoever asks for a copy, and has it until it is gone."""


def change(model, what: str) -> None:
    linear = model.original_model.lm_head
    linear = getattr(linear, "original_component", linear)
    if what == "a weight in place":
        linear.weight.data.mul_(2)
    elif what == "another weight":
        linear.weight = torch.nn.Parameter(linear.weight * 2)
    elif what == "another module":
        new = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
        model.blocks[1].attn.o.original_component = new
        model.unembed.set_original_component(new)
    elif what == "another type":
        model.double()
    elif what == "a wrapped forward":
        own = linear.forward
        linear.forward = lambda x: own(x) * 2
    elif what == "another class":
        kind = type(linear)
        forward = lambda self, x: kind.forward(self, x) * 2  # noqa: E731
        linear.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    elif what == "a hook":
        linear.register_forward_hook(lambda module, args, out: out * 2)
    elif what == "a hook point":
        model.add_hook("ln_final.hook_normalized", lambda act, hook: act * 2)


@pytest.mark.parametrize(
    "what",
    [
        "a weight in place",
        "another weight",
        "another module",
        "another type",
        "a wrapped forward",
        "another class",
        "a hook",
        "a hook point",
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_a_copy_serves_its_next_user_unless_the_model_was_changed(name, what):
    model, user = tiny.fresh(name), User()
    ids = tokens(model)
    own = isolated(model, user)
    assert isolated(model, other := User()) is not own, "it is another's still"
    del user, other
    again = isolated(model, user := User())
    assert again is own or isolated(model, User()) is own
    del again, user
    with torch.no_grad():
        before = model(ids)
        change(model, what)
        after = model(ids)
        assert not torch.equal(before.to(after), after), "the change shows"
        assert torch.equal(isolated(model, User())(ids), after)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("run_before", [True, False])
def test_a_task_hands_its_copy_on(name, run_before):
    model = tiny.fresh(name)
    if run_before:  # The first pass of all attaches hooks of the libraries' own.
        model(tokens(model))
    task = prompt_task(model, *PROMPTS, (" Mary", " John"))
    ((first, _),) = model.__dict__["_isolated_copies"].copies
    task.with_metric(model, "probability")
    ((second, _),) = model.__dict__["_isolated_copies"].copies
    assert second is first


def test_a_copy_on_which_a_hook_was_left_serves_nobody_else():
    model, user = tiny.fresh("gpt2"), User()
    isolated(model, user).add_hook("blocks.0.hook_mlp_out", lambda act, hook: act * 0)
    del user
    with torch.no_grad():
        assert torch.equal(isolated(model, User())(tokens(model)), model(tokens(model)))


@contextmanager
def meanwhile(*uses: Callable[[], None]) -> Iterator[None]:
    """Each use over and over in a thread of its own, for as long as the block runs."""
    stop, errors = threading.Event(), []

    def over_and_over(use: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                use()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=over_and_over, args=(use,)) for use in uses]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors, errors


@pytest.mark.parametrize("use", ["forward", "cache", "hooks", "sweep", "plain loop"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "neox-parallel"])
def test_a_sweep_beside_another_use_of_the_model(name, use, monkeypatch):
    if use == "plain loop":
        monkeypatch.setattr(runner, "_reasons_for_plain_loop", lambda *_: ["a test"])
    model, calls = tiny.model(name), []
    task = prompt_task(model, *PROMPTS, (" Mary", " John"))
    other = prompt_task(model, "The cat sat on the mat", "The dog sat on the mat", (" on", " John"))
    ids, double = tokens(model), [("blocks.1.hook_in", lambda act, hook: act * 2)]
    with torch.no_grad():
        alone, cached = model.run_with_cache(ids)
        doubled = model.run_with_hooks(ids, fwd_hooks=double)
    expected, expected_other = run(model, task), run(model, other)

    def check() -> None:
        calls.append(use)
        with torch.no_grad():
            if use == "forward":
                assert torch.equal(model(ids), alone)
            elif use == "hooks":
                assert torch.equal(model.run_with_hooks(ids, fwd_hooks=double), doubled)
            elif use == "cache":
                _, again = model.run_with_cache(ids)
                assert all(torch.equal(again[key], value) for key, value in cached.items())
            else:
                np.testing.assert_allclose(run(model, other), expected_other, atol=1e-5)

    with meanwhile(check):
        for _ in range(3):
            np.testing.assert_allclose(run(model, task), expected, atol=1e-5)
            again = prompt_task(model, *PROMPTS, (" Mary", " John"))
            assert again.clean_baseline == pytest.approx(task.clean_baseline, abs=1e-5)
    assert len(calls) > 1


def _by_default(forward):
    return lambda *args, _forward=forward, **kwargs: _forward(*args, **kwargs)


def _by_name(forward):
    def wrapped(*args, _forward=forward, **kwargs):
        return _forward(*args, **kwargs)

    def named(*args, call=None, **kwargs):
        return (call or wrapped)(*args, **kwargs)

    named.__kwdefaults__ = {"call": wrapped}
    return named


def _twice(forward):
    def inner(*args, **kwargs):
        return forward(*args, **kwargs)

    @functools.wraps(forward)
    def outer(*args, **kwargs):
        return inner(*args, **kwargs)

    return outer


def _partly(forward):
    return functools.partial(lambda call, *args, **kwargs: call(*args, **kwargs), forward)


@pytest.mark.parametrize("wrap", [_by_default, _by_name, _twice, _partly])
def test_a_wrapped_forward_reaches_the_copys_own_module(wrap):
    """However it refers to the module that it wraps."""
    bridge, wanted = tiny.fresh("gpt2"), tiny.model("gpt2")
    for block in bridge.blocks:
        block.original_component.forward = wrap(block.original_component.forward)
    copied = isolation.isolated(bridge)
    theirs = {id(module) for module in bridge.original_model.modules()}
    seen = []
    for module in copied.modules():
        module.register_forward_hook(lambda module, args, out: seen.append(id(module)))
    copied(torch.tensor([[5, 6, 7]]))
    assert seen and not theirs & set(seen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It takes the plain loop: the wrapper is the caller's.
        found = sweep(bridge, ioi_task(bridge), "out", by="all_pos", progress=False)
    xr.testing.assert_allclose(
        found, sweep(wanted, ioi_task(wanted), "out", by="all_pos", progress=False), atol=1e-5
    )
