"""Sets of patches in one run are held to joint hooks by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import MODELS, make_pair, model

from patching_demo.engine import runner
from patching_demo.engine.cells import Cell, Patch, in_order
from patching_demo.engine.kinds import KINDS


def random_patch(draw, bridge, data, kinds):
    kind = KINDS[kinds[draw.integers(len(kinds))]]
    layer = int(draw.integers(bridge.cfg.n_layers))
    n_pos = data.corrupted.shape[1]
    positions = tuple(sorted(draw.permutation(n_pos)[: draw.integers(1, 4)].tolist()))
    if draw.random() < 0.3:
        positions = tuple(range(n_pos))
    hook = f"blocks.{layer}.{kind.hook}"
    head = None
    if kind.of_heads and (kind.name == "pattern" or draw.random() < 0.8):
        head = int(draw.integers(data.cache[hook].shape[kind.head_axis]))
    values = None
    if draw.random() < 0.3 and kind.name != "pattern":
        values = data.cache[hook] + torch.randn(
            data.cache[hook].shape, generator=torch.Generator().manual_seed(int(draw.integers(99)))
        )
    return Patch(kind, hook, layer, positions, head=head, values=values)


def by_hand(bridge, data, patches, metric):
    def hook_for(patch):
        def write(activation, hook):
            values = data.cache[patch.hook_name] if patch.values is None else patch.values
            for position in patch.positions:
                if patch.kind.name == "pattern":
                    activation[:, patch.head, position] = values[:, patch.head, position]
                elif patch.head is None:
                    activation[:, position] = values[:, position]
                else:
                    activation[:, position, patch.head] = values[:, position, patch.head]
            return activation

        return write

    with torch.no_grad():
        hooks = [(patch.hook_name, hook_for(patch)) for patch in patches]
        return metric(bridge.run_with_hooks(data.corrupted, fwd_hooks=hooks))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_pos", [6, 24])
def test_sets_of_patches_are_joint_hooks(name, n_pos, recwarn):
    bridge, draw = model(name), np.random.default_rng(n_pos)
    data = make_pair(bridge, 2, n_pos, differ=(2, n_pos // 2))
    kinds = [k for k, v in KINDS.items() if f"blocks.0.{v.hook}" in bridge.hook_dict]
    sets = []
    for _ in range(40):
        chosen = [random_patch(draw, bridge, data, kinds) for _ in range(draw.integers(1, 6))]
        # One hook is patched once: what two patches of it would mean depends on their order.
        chosen = {(p.hook_name): p for p in chosen}.values()
        sets.append(in_order(chosen))
    metric = data.per_example["difference"]
    cells = [Cell(row, patches) for row, patches in enumerate(sets)]
    names = {patch.hook_name for patches in sets for patch in patches}
    found, _ = runner.run_cells(
        bridge,
        data.corrupted,
        {hook: data.cache[hook] for hook in names},
        cells,
        {"m": metric},
        differing=(2, n_pos - 2, n_pos // 2),
        per_example=True,
        options=runner.Options(progress=False, check=0),
    )
    wanted = torch.stack([by_hand(bridge, data, patches, metric) for patches in sets])
    assert not [w for w in recwarn if "plain loop" in str(w.message)]
    spread = (wanted.max() - wanted.min()).item()
    assert (found[0] - wanted).abs().max() <= 1e-4 * spread
