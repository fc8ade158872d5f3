"""Paths are held to two hooked passes by hand: one that freezes, one that patches."""

from __future__ import annotations

import architectures
import numpy as np
import pytest
import tiny
import torch

from patching_demo import paths, prompt_task

MODELS = ("gpt2", "neox-parallel", "llama-gqa", "gemma2", "attn-only")


def model(name):
    return tiny.model(name) if name in tiny.NAMES else architectures.model(name)


def task_of(name, start=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    clean = torch.randint(5, 100, (2, 7), generator=draw)
    corrupted = clean.clone()
    corrupted[:, start] += 1
    corrupted[1, 5] += 2
    return prompt_task(model(name), clean, corrupted, [[5, 9], [11, 6]])


def by_hand(name, task, sender, receivers, through):
    """The metric per prompt: freeze with hooks, read what the receivers take in, run again."""
    bridge = model(name)
    layers = range(bridge.cfg.n_layers)

    def mlp_hooks(into):
        def keep(layer):
            return lambda module, args, out: into.__setitem__(layer, out)

        return [
            block.mlp.register_forward_hook(keep(i))
            for i, block in enumerate(bridge.blocks)
            if getattr(block, "mlp", None) is not None
        ]

    caches, mlps = [], []
    for tokens in (task.clean_tokens, task.corrupted_tokens):
        mlps.append({})
        handles = mlp_hooks(mlps[-1])
        with torch.no_grad():
            caches.append(bridge.run_with_cache(tokens)[1])
        for handle in handles:
            handle.remove()
    clean, corrupted = caches
    hooks, handles, seen = [], [], {}
    for layer in layers:

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
