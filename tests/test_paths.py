"""Paths are held to two hooked passes by hand: one that freezes, one that patches."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import tiny
import torch
from oracle import MODELS, model, task_of

from patching_demo import patching, paths
from patching_demo.engine import checks


@lru_cache(None)
def runs(name, task):
    """The caches of the clean and the corrupted run, and what their MLPs returned by layer."""
    caches, mlps = [], []
    for tokens in (task.clean_tokens, task.corrupted_tokens):
        mlps.append({})
        handles = [
            block.mlp.register_forward_hook(
                lambda module, args, out, i=i: mlps[-1].__setitem__(i, out)
            )
            for i, block in enumerate(model(name).blocks)
            if getattr(block, "mlp", None) is not None
        ]
        with torch.no_grad():
            caches.append(model(name).run_with_cache(tokens)[1])
        for handle in handles:
            handle.remove()
    return *caches, mlps


def by_hand(name, task, sender, receivers, through):
    """The metric per prompt: freeze with hooks, read what the receivers take in, run again."""
    bridge = model(name)
    clean, corrupted, mlps = runs(name, task)
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
            value = mlps[0][layer] if sends else mlps[1][layer]
            handles.append(
                bridge.blocks[layer].mlp.register_forward_hook(lambda *_, value=value: value)
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


@pytest.mark.parametrize("name", MODELS)
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
    found = paths(bridge, task, receivers, senders=senders, through=through, per_prompt=True)
    parts = [] if receivers == "logits" else receivers
    last = max((layer for _, layer, _ in parts), default=bridge.cfg.n_layers)
    scale = abs(task.clean_baseline - task.corrupted_baseline) + 1e-3
    for layer in range(bridge.cfg.n_layers):
        for head in range(bridge.cfg.n_heads) if senders == "out" else [None]:
            cell = found.sel(layer=layer) if head is None else found.sel(layer=layer, head=head)
            if layer >= last:
                assert cell.isnull().all()
                continue
            wanted = by_hand(name, task, (senders, layer, head), parts, through)
            assert np.allclose(cell, wanted, atol=1e-4 * scale), (layer, head)


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
            wanted = by_hand(name, task, ("out", source, head), parts, "direct").mean()
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
