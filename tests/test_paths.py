"""Paths are held to two hooked passes by hand: one that freezes, one that patches."""

from __future__ import annotations

import warnings
from functools import lru_cache, partial

import numpy as np
import pytest
import tiny
import torch
from oracle import MODELS, model, task_of

from patching_demo import patching, paths
from patching_demo.engine import checks

#: Blocks that hand the stream to attention and MLP, and blocks that run their MLP's parts.
PLAIN = ("bloom", "opt")


@lru_cache(None)
def runs(bridge, task):
    """The caches of both runs, and by layer where its MLP can be held and what to.

    That is what its last linear layer is given, or what the MLP returns where that is not called.
    """
    caches, mlps = [], []
    for tokens in (task.clean_tokens, task.corrupted_tokens):
        mlps.append({})
        handles = []
        for i, block in enumerate(bridge.blocks):
            if getattr(block, "mlp", None) is not None:
                found = partial(mlps[-1].__setitem__, i)
                own = block.mlp
                handles.append(
                    own.register_forward_hook(
                        lambda module, args, out, i=i, found=found, seen=mlps[-1]: (
                            None if i in seen else found((False, out))
                        )
                    )
                )
                handles.append(
                    own.out.register_forward_pre_hook(
                        lambda module, args, found=found: found((True, args[0]))
                    )
                )
        with torch.no_grad():
            caches.append(bridge.run_with_cache(tokens)[1])
        for handle in handles:
            handle.remove()
    return *caches, mlps


def by_hand(bridge, task, sender, receivers, through):
    """The metric per prompt: freeze with hooks, read what the receivers take in, run again."""
    clean, corrupted, mlps = runs(bridge, task)
    hooks, handles, seen = [], [], {}
    for layer in range(bridge.cfg.n_layers):

        def freeze(activation, hook, layer=layer):
            frozen = corrupted[f"blocks.{layer}.attn.hook_z"].clone()
            if sender[0] == "out" and sender[1] == layer:
                frozen[:, :, sender[2]] = clean[f"blocks.{layer}.attn.hook_z"][:, :, sender[2]]
            if sender[0] == "attn_out" and sender[1] == layer:
                frozen = clean[f"blocks.{layer}.attn.hook_z"].clone()
            return frozen

        hooks.append((f"blocks.{layer}.attn.hook_z", freeze))
        sends = sender[0] == "mlp_out" and sender[1] == layer
        if layer in mlps[0] and (sends or through == "direct"):
            inside, value = mlps[0][layer] if sends else mlps[1][layer]
            own = bridge.blocks[layer].mlp
            handles.append(
                own.out.register_forward_pre_hook(lambda *_, value=value: (value,))
                if inside
                else own.register_forward_hook(lambda *_, value=value: value)
            )
    for kind, layer, head in receivers or ():

        def keep(activation, hook, key=(kind, layer, head)):
            seen[key] = activation.clone()

        hooks.append((f"blocks.{layer}.attn.hook_{kind}", keep))
    with torch.no_grad():
        logits = bridge.run_with_hooks(task.corrupted_tokens, fwd_hooks=hooks)
    for handle in handles:
        handle.remove()
    if not receivers:
        return task.metric.per_example(logits)
    second = []
    for (kind, layer, head), value in seen.items():

        def put(activation, hook, head=head, value=value):
            if head is None:
                return value.clone()
            activation = activation.clone()
            activation[:, :, head] = value[:, :, head]
            return activation

        second.append((f"blocks.{layer}.attn.hook_{kind}", put))
    with torch.no_grad():
        logits = bridge.run_with_hooks(task.corrupted_tokens, fwd_hooks=second)
    return task.metric.per_example(logits)


@pytest.mark.filterwarnings("ignore:paths take the plain loop")
@pytest.mark.parametrize("name", [*MODELS, *PLAIN])
@pytest.mark.parametrize("through", ["direct", "mlps"])
@pytest.mark.parametrize(
    "receivers",
    ["logits", [("q", 1, 2)], [("k", 1, 1), ("v", 1, None)], [("q", 1, 0), ("v", 0, 1)]],
    ids=str,
)
@pytest.mark.parametrize("senders", ["out", "attn_out", "mlp_out"])
def test_paths_are_two_passes_by_hand(name, through, receivers, senders):
    bridge, task = model(name), task_of(name)
    if senders == "mlp_out" and name == "attn-only":
        pytest.skip("no MLP")
    checks.warned_of()
    found = paths(bridge, task, receivers, senders=senders, through=through, per_prompt=True)
    assert bool(checks.warned_of()) == (name in PLAIN)
    parts = [] if receivers == "logits" else receivers
    last = max((layer for _, layer, _ in parts), default=bridge.cfg.n_layers)
    assert_by_hand(found, bridge, task, parts, senders, through, last)


def assert_by_hand(found, bridge, task, parts, senders, through, last):
    scale = abs(task.clean_baseline - task.corrupted_baseline) + 1e-3
    for layer in range(bridge.cfg.n_layers):
        for head in range(bridge.cfg.n_heads) if senders == "out" else [None]:
            cell = found.sel(layer=layer) if head is None else found.sel(layer=layer, head=head)
            if layer >= last:
                assert cell.isnull().all()
                continue
            wanted = by_hand(bridge, task, (senders, layer, head), parts, through)
            assert np.allclose(cell, wanted, atol=1e-4 * scale), (layer, head)


def _steered(bridge):
    bridge.add_hook("blocks.1.hook_mlp_out", lambda activation, hook: 2 * activation)


def _steered_module(bridge):
    bridge.blocks[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)


def _mixing(bridge):
    """An MLP that mixes positions, before its last linear layer."""
    out = bridge.blocks[1].mlp.out
    kind = type(out)

    def forward(self, given, *args, **kwargs):
        return kind.forward(self, given + 0.3 * given.roll(1, dims=1), *args, **kwargs)

    out.__class__ = type(kind.__name__, (kind,), {"forward": forward})


@pytest.mark.parametrize("senders", ["out", "mlp_out"])
@pytest.mark.parametrize("receivers", ["logits", [("k", 1, 1), ("q", 1, 0)]], ids=str)
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_steered, "the model has hooks attached"),
        (_steered_module, "the model has hooks attached"),
        (_mixing, "block 1 works on more than one position at a time"),
    ],
)
def test_what_is_not_known_to_be_exact_takes_the_plain_loop(change, why, receivers, senders):
    bridge = tiny.fresh("gpt2")
    change(bridge)
    task = task_of("gpt2").on(bridge)
    checks._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = paths(bridge, task, receivers, senders=senders, through="mlps", per_prompt=True)
    assert any(f"paths take the plain loop: {why}" in str(w.message) for w in caught)
    parts, last = ([], bridge.cfg.n_layers) if receivers == "logits" else (receivers, 1)
    assert_by_hand(found, bridge, task, parts, senders, "mlps", last)


@pytest.mark.filterwarnings("ignore:paths take the plain loop")
@pytest.mark.parametrize("what", ["attention", "MLP"])
def test_paths_refuse_what_cannot_be_held(what):
    bridge = tiny.fresh("gpt2")
    block = bridge.blocks[1]
    for module in [block.attn.o] if what == "attention" else [block.mlp, block.mlp.out]:
        kind = type(module)  # It is called in a way that no hook sees.
        unseen = {"__call__": lambda self, *args, **named: self.forward(*args, **named)}
        module.__class__ = type(kind.__name__, (kind,), unseen)
    bridge.add_hook("blocks.0.hook_mlp_out", lambda activation, hook: activation)
    task = task_of("gpt2").on(bridge)
    with pytest.raises(ValueError, match=f"paths cannot be told apart.*the {what} of block 1 has"):
        paths(bridge, task, "logits")


def drop_in(name, task, component, *source, **other):
    """The direct paths of the drop-in for ``transformer_lens.patching``."""
    bridge = other.get("bridge") or model(name)
    caches = task.clean_cache(bridge), task.corrupted_cache(bridge)
    inputs = bridge, task.corrupted_tokens, *caches, task.metric
    if source:
        return patching.get_act_patch_direct_path(*inputs, *source, component, verbose=False)
    return patching.get_act_patch_direct_path_all_sources(*inputs, component, verbose=False)


@pytest.mark.parametrize("component", ["q", "k", "v"])
@pytest.mark.parametrize("name", MODELS)
def test_each_direct_path_is_two_passes_by_hand(name, component):
    bridge, task = model(name), task_of(name)
    found = drop_in(name, task, component)
    layers, heads = range(bridge.cfg.n_layers), range(bridge.cfg.n_heads)
    of_component = heads
    if component != "q":
        of_component = range(getattr(bridge.cfg, "n_key_value_heads", None) or len(heads))
    scale = abs(task.clean_baseline - task.corrupted_baseline) + 1e-3
    for source, head, layer in [(0, 1, 1), (0, 3, layers[-1]), (layers[-2], 2, layers[-1])]:
        for into in of_component:
            parts = [(component, layer, into)]
            wanted = by_hand(bridge, task, ("out", source, head), parts, "direct").mean()
            assert np.allclose(found[source, head, layer, into], wanted, atol=1e-4 * scale)
    exists = found.isfinite().numpy()
    later = np.array([[source < layer for layer in layers] for source in layers])
    there = np.array([head in of_component for head in heads])
    assert (exists == later[:, None, :, None] & there).all()
    alone = drop_in(name, task, component, 0, 1)
    assert torch.equal(alone.isnan(), found[0, 1].isnan())
    assert torch.allclose(alone[1:], found[0, 1, 1:], atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_direct_path_that_cannot_be_served_is_transformer_lenss_own(name):
    """A hook of the caller's acts on whole sequences."""
    bridge, task = tiny.fresh(name), task_of("gpt2")
    task = task.on(bridge)
    plain = drop_in(name, task, "q", 0, 1, bridge=bridge)

    def steer(module, args, output):
        output[:, 5, 0] += 1
        return output

    handle = bridge.blocks[0].mlp.register_forward_hook(steer)
    checks._warned.clear()
    with pytest.warns(UserWarning, match="direct paths take the plain loop: the model has hooks"):
        found = drop_in(name, task, "q", 0, 1, bridge=bridge)
    caches = task.clean_cache(bridge), task.corrupted_cache(bridge)
    with torch.no_grad():
        wanted = patching._direct_path(
            bridge, task.corrupted_tokens, *caches, task.metric, 0, 1, "q", False
        )
    handle.remove()
    assert found[0].isnan().all() and torch.equal(found[1:], wanted[1:])
    assert (found[1:] - plain[1:]).abs().max() > 1e-3
