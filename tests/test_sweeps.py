"""The verbs are held to hooks by hand: what is chosen, what is patched with, several at once."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tiny
import torch
import xarray as xr
from oracle import MODELS, model
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from patching_demo import (
    attribute,
    complement,
    induction_task,
    ioi_task,
    patch,
    paths,
    prompt_task,
    sweep,
)
from patching_demo.engine import checks, runner
from patching_demo.engine.kinds import KINDS
from patching_demo.sweeps import question

PLAIN = "takes the plain loop"


def task_of(bridge, lengths=(7, 7), start=3):
    draw = torch.Generator().manual_seed(0)
    clean = [torch.randint(5, 100, (n,), generator=draw).tolist() for n in lengths]
    corrupted = [[token + (i == start) + 2 * (i == 5) for i, token in enumerate(c)] for c in clean]
    return prompt_task(bridge, clean, corrupted, [[5, 9], [11, 6], [8, 7]][: len(lengths)])


def swept(bridge, task, kinds, **options):
    return sweep(bridge, task, kinds, progress=False, **options)


def by_hand(bridge, task, writes):
    """The metric per prompt with hooks: (hook name, place in the activation, values)."""

    def hook_for(place, values):
        def write(activation, hook):
            activation[place] = values[place]
            return activation

        return write

    hooks = [(name, hook_for(place, values)) for name, place, values in writes]
    with torch.no_grad():
        logits = bridge.run_with_hooks(task.corrupted_tokens, fwd_hooks=hooks)
    return task.metric.per_example(logits).numpy()


def close(found, wanted, task):
    largest = np.nan_to_num(np.abs(np.asarray(wanted))).max(initial=0)
    scale = abs(task.clean_baseline - task.corrupted_baseline) + largest
    return np.allclose(found, wanted, atol=1e-4 * scale, equal_nan=True)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("kinds", ["resid_pre", "k", ("out", "q", "k")], ids=str)
def test_what_is_selected_before_is_what_is_selected_after(name, kinds):
    bridge = model(name)
    task = task_of(bridge)
    whole = swept(bridge, task, kinds)
    labels = list(task.position_labels)
    for chosen in (
        {"layer": 1},
        {"layer": [1, 0], "position": labels[5]},
        {"layer": slice(1, None), "position": [labels[6], labels[0], labels[4]]},
        {"position": slice(labels[3], labels[5]), "head": [1, 0]},
        {"layer": slice(None, None, -1), "head": 1, "position": slice(None, None, 2)},
        {"layer": []},
    ):
        chosen = {dim: labels for dim, labels in chosen.items() if dim in whole.dims}
        runs = []
        found = swept(
            bridge, task, kinds, **{f"{dim}s": labels for dim, labels in chosen.items()},
            on_progress=lambda done, total, runs=runs: runs.append(total),
        )  # fmt: skip
        wanted = whole.sel(chosen)
        assert found.dims == wanted.dims and found.attrs == wanted.attrs
        assert found.coords.equals(wanted.coords)
        assert close(found, wanted, task)
        assert set(runs) <= {int(wanted.notnull().sum())}
    with pytest.raises(KeyError, match=r"layer \[9\] is not among \[0, 1"):
        swept(bridge, task, kinds, layers=[9])
    if "position" in whole.dims:
        with pytest.raises(KeyError, match=r"'nowhere' is not among \[.*; by number"):
            swept(bridge, task, kinds, positions="nowhere")
    if kinds == "resid_pre":
        with pytest.raises(ValueError, match="this sweep has no head"):
            swept(bridge, task, kinds, heads=[0])


@pytest.mark.parametrize(
    "numbers", [4, -1, [6, 0], range(2, 5), np.array([5]), np.int32(3)], ids=str
)
def test_positions_may_be_numbers(numbers):
    bridge = model("gpt2")
    task = task_of(bridge)
    labels = np.array(task.position_labels)[numbers].tolist()
    found = swept(bridge, task, "attn_out", positions=numbers)
    assert found.identical(swept(bridge, task, "attn_out", positions=labels))


@pytest.mark.parametrize("wrong", [99, [-62], slice(2, 5), True, [True, False], [1.0]], ids=str)
def test_what_names_no_position_says_how_to_name_one(wrong):
    bridge = model("gpt2")
    long = induction_task(bridge, batch=2, seq_len=30)
    with pytest.raises(KeyError, match="is not among .*; by number") as refused:
        swept(bridge, long, "attn_out", positions=wrong)
    assert len(str(refused.value)) < 200  # Not the labels of all positions.


@pytest.mark.parametrize("per_prompt", [False, True])
@pytest.mark.parametrize("kinds", ["attn_out", ("out", "v")], ids=str)
def test_where_before_is_where_after(kinds, per_prompt):
    bridge = model("llama-gqa")
    task = task_of(bridge)
    whole = swept(bridge, task, kinds, per_prompt=per_prompt)
    one = swept(bridge, task, kinds)
    large = abs(attribute(bridge, task, kinds) - task.corrupted_baseline) > 0.05
    for mask, chosen in (
        (large, {}),
        (large, {"layer": [2, 1]}),
        (large.isel(layer=[1]), {}),
        (xr.DataArray([True, False, True], dims="layer"), {}),
        (xr.ones_like(one, dtype=bool), {}),
        (xr.zeros_like(one, dtype=bool), {}),
    ):
        runs = []
        found = swept(
            bridge, task, kinds, where=mask, layers=chosen.get("layer"), per_prompt=per_prompt,
            on_progress=lambda done, total, runs=runs: runs.append(total),
        )  # fmt: skip
        wanted = whole.sel(chosen).where(mask)
        assert found.dims == wanted.dims and found.coords.equals(wanted.coords)
        assert close(found, wanted, task)
        assert set(runs) <= {int(one.sel(chosen).where(mask).notnull().sum())}
    for wrong in (one, (one > 0).values, (one > 0).expand_dims("prompt")):
        with pytest.raises(ValueError, match="where must be a DataArray of booleans"):
            swept(bridge, task, kinds, where=wrong)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("window", [1, 2, 3, 10])
def test_a_window_is_joint_hooks(name, window):
    bridge = model(name)
    task, n_layers = task_of(bridge), bridge.cfg.n_layers
    clean = task.clean_cache(bridge)
    for kind in ("attn_out", "out", "k"):
        found = swept(bridge, task, kind, window=window, positions=list(task.position_labels)[4:])
        assert found.attrs.get("window", 1) == window
        for layer in range(n_layers):
            patched = range(max(0, layer - window // 2), layer - window // 2 + window)
            hooks = [f"blocks.{i}.{KINDS[kind].hook}" for i in patched if i < n_layers]
            for column, position in enumerate(range(4, 7)):
                place = (slice(None), position, *([1] if kind != "attn_out" else []))
                wanted = by_hand(bridge, task, [(h, place, clean[h]) for h in hooks]).mean()
                cell = found.isel(layer=layer, position=column)
                cell = cell.sel(head=1) if kind != "attn_out" else cell
                assert close(cell, wanted, task), (kind, layer, position)
    with pytest.raises(ValueError, match="window must be a whole number"):
        swept(bridge, task, "out", window=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("source", ["zero", "mean", "given"])
def test_sources_are_joint_hooks(name, source):
    """Prompts of different lengths: a mean is over those that have text at the position."""
    bridge = model(name)
    task = task_of(bridge, (7, 5, 7))
    clean = dict(task.clean_cache(bridge))
    text = task.attention_mask.bool()
    draw = torch.Generator().manual_seed(1)
    kinds = [
        k for k in ("resid_pre", "mlp_out", "out", "k") if name != "attn-only" or k != "mlp_out"
    ]
    for kind in kinds:
        hooks = [f"blocks.{i}.{KINDS[kind].hook}" for i in range(bridge.cfg.n_layers)]
        values = {}
        for hook in hooks:
            values[hook] = {
                "zero": torch.zeros_like(clean[hook]),
                "mean": torch.stack(
                    [clean[hook][text[:, p], p].mean(0) for p in range(7)]
                ).expand_as(clean[hook]),
                "given": clean[hook] + torch.randn(clean[hook].shape, generator=draw),
            }[source]
        given = values if source == "given" else source
        found = swept(bridge, task, kind, source=given, per_prompt=True)
        assert found.attrs["source"] == source and not found["agrees"].any()
        for layer, hook in enumerate(hooks):
            for position in (0, 2, 5):
                place = (slice(None), position, *([1] if KINDS[kind].of_heads else []))
                cell = found.isel(layer=layer, position=position)
                cell = cell.sel(head=1) if KINDS[kind].of_heads else cell
                wanted = by_hand(bridge, task, [(hook, place, values[hook])])
                assert close(cell, wanted, task), (kind, layer, position)
        whole = swept(bridge, task, kind, source=given)
        assert close(found.mean("prompt"), whole, task)
    with pytest.raises(ValueError, match="source must be one of clean, zero, mean"):
        swept(bridge, task, "out", source="noise")


@pytest.mark.parametrize("name", MODELS)
def test_a_set_of_patches_is_one_run(name):
    bridge = model(name)
    task, n_layers = task_of(bridge), bridge.cfg.n_layers
    clean = task.clean_cache(bridge)
    label = task.position_labels[5]
    heads, both = [("out", 0, 1), ("out", 1, 3)], slice(None)
    sets = {
        "two heads": heads,
        "a head and a key": [("out", 0, 2, 3), ("k", 1, 0, label)],
        "a query, a value": [("q", 1, None, -1), ("v", n_layers - 1, 1)],
        "one": [("out", 1, 2, 4)],
        "stream": [("resid_pre", 1)],
        "all but": complement(bridge, heads),
    }
    found = patch(bridge, task, sets, per_prompt=True, progress=False)

    def write(kind, layer, head=None, position=None):
        at = both if position is None else {label: 5}.get(position, position)
        place = (both, at, *([both if head is None else head] if KINDS[kind].of_heads else []))
        hook = f"blocks.{layer}.{KINDS[kind].hook}"
        return hook, place, clean[hook]

    for set_name, parts in sets.items():
        cell = found.sel(set=set_name)
        assert close(cell, by_hand(bridge, task, [write(*part) for part in parts]), task), set_name
    assert close(found.sel(set="stream").mean(), task.clean_baseline, task)
    cell = swept(bridge, task, "out", layers=1, positions=task.position_labels[4], heads=2)
    assert close(found.sel(set="one").mean(), cell, task)
    assert close(patch(bridge, task, sets, progress=False), found.mean("prompt"), task)
    named = {*heads, *complement(bridge, heads)}
    assert {part for part in named if part[0] == "out"} == {
        ("out", i, h) for i in range(n_layers) for h in range(bridge.cfg.n_heads)
    }
    for wrong, message in (
        ({}, "with at least one"),
        ({"a": [("out",)]}, "a part is"),
        ({"a": [("out", 99)]}, "layer must be from 0"),
        ({"a": [("out", 0, True)]}, "head must be a whole number"),
        ({"a": [("attn_out", 0, 1)]}, "has no heads"),
        ({"a": [("out", 0, 1, "nowhere")]}, "no position 'nowhere'"),
        ({"a": [("out", 0, 1, 7)]}, "only 7 positions"),
        ({"a": [("out", 0, 1, 2.0)]}, "a number, a label or a role"),
    ):
        with pytest.raises(ValueError, match=message):
            patch(bridge, task, wrong)
    with pytest.raises(ValueError, match="a complement is one of whole heads"):
        complement(bridge, [("q", 0, 1)])


def linear_model():
    config = TransformerBridgeConfig(
        n_layers=3, d_model=32, n_heads=4, d_head=8, n_ctx=64, d_vocab=tiny.D_VOCAB,
        attn_only=True, act_fn=None, normalization_type=None, seed=0,
    )  # fmt: skip
    return TransformerBridge.boot_native(config).eval()


def test_direct_effects_add_up_without_a_final_norm():
    bridge = linear_model()
    task = task_of(bridge)
    found = paths(bridge, task, "logits")
    every = patch(bridge, task, {"all": [("out", i) for i in range(3)]}, progress=False)
    effect = (found - task.corrupted_baseline).sum() + task.corrupted_baseline
    assert close(effect, every[0], task)


@pytest.mark.parametrize("receivers", ["logits", [("q", 1, 0), ("v", 1, 2)]], ids=str)
def test_without_mlps_there_is_one_kind_of_path(receivers):
    bridge = model("attn-only")
    task = task_of(bridge)
    direct, through = (paths(bridge, task, receivers, through=t) for t in ("direct", "mlps"))
    assert close(direct, through, task)


@pytest.mark.parametrize("change", [None, "normalised", "reversed", "padded", "start", "induction"])
@pytest.mark.parametrize("receivers", ["logits", [("k", 1, 1)]], ids=str)
def test_paths_of_any_task(receivers, change):
    """Onto the logits they are the unembedding's; normalised, reversed or per prompt, the same."""
    bridge = model("llama-gqa")
    task = {
        "padded": lambda: task_of(bridge, (7, 5, 6)),
        "start": lambda: task_of(bridge, start=0),
        "induction": lambda: induction_task(bridge, batch=2, seq_len=4),
    }.get(change, lambda: task_of(bridge))()
    usual = paths(bridge, task, receivers, progress=False)
    each = paths(bridge, task, receivers, per_prompt=True, progress=False)
    assert each.dims == ("prompt", *usual.dims) and close(each.mean("prompt"), usual, task)
    if change == "normalised":
        scaled = paths(bridge, task.normalised(), receivers, progress=False)
        span = task.clean_baseline - task.corrupted_baseline
        assert close(scaled * span + task.corrupted_baseline, usual, task)
    if change == "reversed":
        task = task.reversed()
        usual = paths(bridge, task, receivers, progress=False)
        assert usual.attrs["direction"] == task.direction
    if receivers == "logits":  # The last layer's heads: no block comes after them.
        last = bridge.cfg.n_layers - 1
        hook = f"blocks.{last}.attn.hook_z"
        clean = task.clean_cache(bridge, [hook])[hook]
        frozen = f"blocks.{last}.hook_mlp_out"
        mlp = task.corrupted_cache(bridge, [frozen])[frozen]
        for head in range(bridge.cfg.n_heads):
            place = (slice(None), slice(None), head)
            writes = [(hook, place, clean), (frozen, (slice(None),), mlp)]
            wanted = by_hand(bridge, task, writes).mean()
            assert close(usual.sel(layer=last, head=head), wanted, task)


@pytest.mark.filterwarnings("ignore:the model runs in bfloat16")
def test_paths_in_bfloat16_are_those_of_float32_but_for_rounding():
    single, half = tiny.fresh("llama-gqa"), tiny.fresh("llama-gqa").to(torch.bfloat16)
    for receivers in ("logits", [("q", 2, 1)]):
        wanted = paths(single, task_of(single), receivers, progress=False)
        found = paths(half, task_of(half), receivers, progress=False)
        spread = float(abs(task_of(single).clean_baseline - task_of(single).corrupted_baseline))
        assert (found.isnull() == wanted.isnull()).all()
        assert float(abs(found - wanted).max()) < 0.1 * (spread + float(abs(wanted).max()))


@pytest.mark.parametrize("where", ["hook point", "module"])
def test_left_over_hooks_act_in_every_verb(where):
    """The plain loop and the gradients have them, as paths do (their own test)."""
    bridge = tiny.fresh("gpt2")
    if where == "module":
        bridge.blocks[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        bridge.add_hook("blocks.1.hook_mlp_out", lambda activation, hook: 2 * activation)
    task = task_of(bridge)
    hook = "blocks.0.attn.hook_z"
    clean = task.clean_cache(bridge, [hook])[hook]
    wanted = by_hand(bridge, task, [(hook, (slice(None), slice(None), 1), clean)]).mean()
    with pytest.warns(UserWarning, match=PLAIN):
        found = swept(bridge, task, "out", by="all_pos")
    assert close(found.sel(layer=0, head=1), wanted, task)
    checks._warned.clear()
    with pytest.warns(UserWarning, match=PLAIN):
        several = {str(i): [("out", 0, i)] for i in range(4)}
        assert close(patch(bridge, task, several, progress=False)[1], wanted, task)
    estimate = attribute(bridge, task, "out", by="all_pos")
    assert close(estimate.attrs["corrupted_baseline"], task.corrupted_baseline, task)


def test_an_estimate_takes_two_forward_passes():
    bridge = tiny.fresh("gpt2")
    task, passes = task_of(bridge), []
    own = type(bridge).forward

    class Counted(type(bridge)):
        def forward(self, *args, **kwargs):
            passes.append(1)
            return own(self, *args, **kwargs)

    bridge.__class__ = Counted
    attribute(bridge, task, ["out", "q", "k", "v", "pattern"])
    passes.clear()  # The first call also finds out how the activations are laid out.
    attribute(bridge, task, ["out", "q", "k", "v", "pattern"])
    assert len(passes) == 2


def test_long_sweeps_are_announced(monkeypatch):
    bridge = model("gpt2")
    task = task_of(bridge)
    monkeypatch.setattr(question, "LONG_SECONDS", 0.0)
    with pytest.warns(UserWarning, match=r"14 patched runs will take about \d+ minutes .*where="):
        swept(bridge, task, "resid_pre")
    monkeypatch.setattr(question, "LONG_SECONDS", 300.0)
    checks._warned.clear()
    swept(bridge, task, "resid_pre")  # A warning of the package would be an error here.
    monkeypatch.setattr(question.time, "perf_counter", iter(range(0, 10**6, 1000)).__next__)
    bars = []
    bar = runner.tqdm
    monkeypatch.setattr(runner, "tqdm", lambda **options: bars.append(options) or bar(**options))
    with pytest.warns(UserWarning, match="14 patched runs will take about") as caught:
        swept(bridge, task, "resid_pre")
    # The bar begins with the same time.
    minutes = int(re.search(r"about (\d+) min", str(caught[0].message))[1])
    seconds = int(re.fullmatch(r"about ([\d,]+) s", bars[0]["desc"])[1].replace(",", ""))
    assert minutes == round(seconds / 60) > 1


VERBS = {
    "sweep": lambda bridge, task: sweep(bridge, task, "out", progress=False),
    "attribute": lambda bridge, task: attribute(bridge, task, "out"),
    "patch": lambda bridge, task: patch(bridge, task, {"one": [("out", 0, 1)]}, progress=False),
    "paths": lambda bridge, task: paths(bridge, task, "logits", progress=False),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_arguments_of_another_kind_or_order_are_named(name, verb):
    bridge, call = model(name), VERBS[verb]
    task = task_of(bridge)
    expected = r"must be a TransformerBridge.*got {}|needs a Task as second argument, got {}"
    for first, second, got in (
        (bridge.original_model, task, type(bridge.original_model).__name__),
        (task, bridge, "Task|TransformerBridge"),
        (bridge, "out", "str"),
        (bridge, task.corrupted_tokens, "Tensor"),
    ):
        with pytest.raises(TypeError, match=expected.format(f"({got})", f"({got})")):
            call(first, second)


def test_sets_may_be_empty_or_read_once():
    bridge = model("gpt2")
    task = task_of(bridge)
    sets = {"none": [], "two": zip(["out"] * 2, [0, 1], [1, 2], strict=True)}
    found = patch(bridge, task, sets, progress=False)
    assert float(found.sel(set="none")) == pytest.approx(task.corrupted_baseline, abs=1e-5)
    wanted = patch(bridge, task, {"two": [("out", 0, 1), ("out", 1, 2)]}, progress=False)
    assert close(found.sel(set="two"), wanted[0], task)


@pytest.mark.parametrize("by", ["pos", "role"])
def test_a_whole_cache_may_be_the_source(by):
    bridge = model("gpt2")
    task = ioi_task(bridge)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(task.clean_tokens)
    found = sweep(bridge, task, "mlp_out", by=by, source=cache, progress=False)
    wanted = sweep(bridge, task, "mlp_out", by=by, source=dict(cache.items()), progress=False)
    assert found.equals(wanted) and found.attrs["source"] == "given"


def test_a_slice_by_place_from_the_end_is_refused():
    """By label it is every layer."""
    bridge = model("gpt2")
    for end in (-1, np.int64(-1)):
        for chosen in (slice(end, None), slice(None, end)):
            with pytest.raises(ValueError, match="slices go by label"):
                sweep(bridge, task_of(bridge), "resid_pre", layers=chosen)
