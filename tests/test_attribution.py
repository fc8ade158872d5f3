"""Estimates are held to derivatives taken by hand, and to runs that patch one query or key."""

from __future__ import annotations

import architectures
import numpy as np
import pytest
import tiny
import torch
from oracle import MODELS, model, task_of

from patching_demo import attribute, prompt_task, sweep
from patching_demo.engine.kinds import BLOCK_KINDS, HEAD_KINDS, KINDS
from patching_demo.sweeps import attribution


def live(name, kinds):
    hooks = model(name).hook_dict
    return [kind for kind in kinds if f"blocks.0.{KINDS[kind].hook}" in hooks]


def run_with(name, task, hooks):
    with torch.no_grad():
        logits = model(name).run_with_hooks(task.corrupted_tokens, fwd_hooks=hooks)
    return task.metric.per_example(logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("by_heads", [False, True])
def test_an_estimate_is_the_derivative_of_a_patch(name, by_heads):
    """A thousandth of the difference, patched, moves the metric by a thousandth of it."""
    task, small = task_of(name), 1e-3
    kinds = live(name, HEAD_KINDS if by_heads else BLOCK_KINDS)
    found = attribute(model(name), task, kinds, per_prompt=True)
    clean, corrupted = task.clean_cache(model(name)), task.corrupted_cache(model(name))
    base = run_with(name, task, [])
    scale = max(float(abs(found - base.mean().item()).max()), 1e-3)
    for kind in kinds:
        for layer in range(model(name).cfg.n_layers):
            hook = f"blocks.{layer}.{KINDS[kind].hook}"
            step = small * (clean[hook] - corrupted[hook])
            place = (slice(None),) * KINDS[kind].position_axis + (5,)
            values = []
            for sign in (1, -1):

                def nudge(activation, hook, sign=sign, step=step, place=place):
                    activation[place] += sign * step[place]
                    return activation

                values.append(run_with(name, task, [(hook, nudge)]))
            slope = (values[0] - values[1]) / 2 / small
            cell = found.sel(kind=kind, layer=layer).isel(position=5)
            whole = (
                cell.sum("head") - base.numpy() * int(cell.notnull().sum("head")[0]) + base.numpy()
                if by_heads
                else cell
            )
            assert np.allclose(whole, (base + slope), atol=0.03 * scale), (kind, layer)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gemma2", "attn-only"])
@pytest.mark.parametrize("start", [0, 3])
def test_queries_and_keys_go_through_the_softmax(name, start):
    """One patched query or key, its own layer's pattern exact, the rest of the model linear."""
    task = task_of(name, start)
    bridge = model(name)
    found = attribute(bridge, task, ["q", "k"], method="gradient+qk", per_prompt=True)
    clean, corrupted = task.clean_cache(bridge), task.corrupted_cache(bridge)
    base = run_with(name, task, [])
    hooks = {f"blocks.{layer}.attn.hook_pattern" for layer in range(bridge.cfg.n_layers)}
    _, gradient, _ = attribution._gradients(bridge, task, clean, hooks, [0.0])
    for kind in ("q", "k"):
        for layer in range(bridge.cfg.n_layers):
            hook, pattern = f"blocks.{layer}.attn.hook_{kind}", f"blocks.{layer}.attn.hook_pattern"
            for position, head in ((start, 0), (5, 1)):
                seen = {}

                def put(activation, hook, position=position, head=head):
                    activation = activation.clone()
                    activation[:, position, head] = clean[hook.name][:, position, head]
                    return activation

                def keep(activation, hook, seen=seen):
                    seen["pattern"] = activation.clone()

                run_with(name, task, [(hook, put), (pattern, keep)])
                change = ((seen["pattern"] - corrupted[pattern]) * gradient[pattern]).sum((1, 2, 3))
                cell = found.sel(kind=kind, layer=layer, head=head).isel(position=position)
                assert np.allclose(cell, base + change, atol=1e-4), (kind, layer, position)


def test_integrated_gradients_of_the_input_add_up():
    """Completeness: over the embeddings, the effects add up to clean minus corrupted."""
    task = task_of("gpt2")
    found = attribute(tiny.model("gpt2"), task, "resid_pre", method="integrated", steps=50)
    effect = (found.sel(layer=0) - task.corrupted_baseline).sum()
    wanted = task.clean_baseline - task.corrupted_baseline
    assert abs(float(effect) - wanted) < 0.02 * abs(wanted)


@pytest.mark.parametrize(
    "kinds", ["resid_pre", ("attn_out", "mlp_out"), "k", ("out", "k", "pattern")]
)
@pytest.mark.parametrize("by", ["pos", "all_pos"])
@pytest.mark.parametrize("method", attribution.METHODS)
def test_labels_are_those_of_the_sweep(kinds, by, method):
    name = "llama-gqa"
    if by == "all_pos" and ("resid_pre" in kinds or "attn_out" in kinds):
        with pytest.raises(ValueError, match="all_pos"):
            attribute(model(name), task_of(name), kinds, by=by, method=method)
        return
    task = task_of(name)
    found = attribute(model(name), task, kinds, by=by, method=method)
    exact = sweep(model(name), task, kinds, by=by, progress=False)
    assert found.dims == exact.dims and found.coords.equals(exact.coords)
    assert (found.isnull() == exact.isnull()).all()
    assert {**found.attrs, "method": ""} == {**exact.attrs, "method": ""}
    if by == "pos":
        nothing = ~exact["agrees"] | exact.isnull()
        assert np.allclose(found.where(~nothing, 0), exact.where(~nothing, 0), atol=1e-5)
    each = attribute(model(name), task, kinds, by=by, method=method, per_prompt=True)
    assert each.dims == ("prompt", *found.dims)
    assert np.allclose(each.mean("prompt"), found, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("method", attribution.METHODS)
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_an_estimate_may_be_asked_for_in_inference_mode(name, method):
    outside = task_of(name)
    wanted = attribute(model(name), outside, ("out", "q"), by="all_pos", method=method)
    with torch.inference_mode():
        for task in (outside, task_of(name)):
            found = attribute(model(name), task, ("out", "q"), by="all_pos", method=method)
            np.testing.assert_allclose(found, wanted, rtol=1e-5)
        made = tiny.fresh(name)
    with pytest.raises(ValueError, match=r"made in torch.inference_mode\(\)"):
        attribute(made, task_of(name), "out")


def test_unknown_choices_are_refused():
    bridge, task = tiny.model("gpt2"), task_of("gpt2")
    with pytest.raises(ValueError, match="method must be one of gradient"):
        attribute(bridge, task, "out", method="magic")
    with pytest.raises(ValueError, match="steps must be a whole number"):
        attribute(bridge, task, "out", method="integrated", steps=0)
    opt = architectures.model("opt")  # Its hook on the pattern is called after the fact.
    task = prompt_task(opt, [[5, 6, 7, 8]], [[5, 8, 7, 8]], [[5, 9]])
    with pytest.raises(ValueError, match="can be read but not patched"):
        attribute(opt, task, "q", method="gradient+qk")


@pytest.mark.parametrize("method", attribution.METHODS)
def test_rows_of_a_prompt_count_once(method):
    """Another prompt's long answers give this one a second row, and change none of its values."""
    bridge = model("gpt2")
    clean = ["When John gave the bag to", "When Amy gave the bag to"]
    corrupted = ["When Mary gave the bag to", "When Dan gave the bag to"]
    answers = [(" Mary", " John"), (" Dan home", " Amy home")]
    one = prompt_task(bridge, clean[:1], corrupted[:1], answers[:1])
    two = prompt_task(bridge, clean, corrupted, answers)
    assert (one.rows_per_prompt, two.rows_per_prompt) == (1, 2)
    options = {"by": "role", "per_prompt": True, "method": method}
    alone, beside = (attribute(bridge, task, ["q", "out"], **options) for task in (one, two))
    scale = abs(one.clean_baseline - one.corrupted_baseline)
    assert np.allclose(alone[0], beside[0], atol=1e-5 * scale, equal_nan=True)


def test_an_estimate_of_long_answers_is_the_derivative_of_a_patch():
    bridge = model("gpt2")
    answers = [(" Mary home", [" John", " Dan home"])]
    task = prompt_task(
        bridge, ["When John gave the bag to"], ["When Mary gave the bag to"], answers
    )
    found = attribute(bridge, task, "mlp_out", per_prompt=True)[0]
    hook, small = "blocks.1.hook_mlp_out", 1e-3
    step = task.clean_cache(bridge)[hook] - task.corrupted_cache(bridge)[hook]
    values = []
    for sign in (1, -1):

        def nudge(activation, hook, sign=sign):
            activation[:, 4] += sign * small * step[:, 4]
            return activation

        with torch.no_grad():
            logits = bridge.run_with_hooks(task.corrupted_tokens, fwd_hooks=[(hook, nudge)])
        values.append(float(task.metric(logits)))
    slope = (values[0] - values[1]) / 2 / small
    effect = float(found.sel(layer=1).isel(position=4)) - task.corrupted_baseline
    assert effect == pytest.approx(slope, rel=0.03, abs=1e-3)


def test_queries_are_corrected_by_role_where_lengths_differ():
    bridge = model("gpt2")
    task = prompt_task(
        bridge, "When John gave the bag to", "When Mary and John gave the bag to",
        (" Mary", " John"), roles={"giver": ("When John", "and John")},
    )  # fmt: skip
    plain, corrected = (
        attribute(bridge, task, ["q", "out"], by="role", method=method)
        for method in ("gradient", "gradient+qk")
    )
    assert corrected.notnull().all()
    assert np.allclose(plain.sel(kind="out"), corrected.sel(kind="out"), atol=1e-6)
    # To first order in the difference, the two agree.
    exact = sweep(bridge, task, "q", by="role", progress=False)
    errors = [float(abs(one.sel(kind="q") - exact).sum()) for one in (plain, corrected)]
    assert errors[1] <= errors[0] * 1.5


def test_a_correction_needs_a_pattern_that_is_called():
    bridge = tiny.fresh("gpt2")
    task, attn = task_of("gpt2").on(bridge), bridge.blocks[1].attn
    # The attention calls another hook point than the one that has the name.
    attn._modules["hook_pattern"] = torch.nn.Identity().eval()
    assert attribute(bridge, task, "q").notnull().all()
    with pytest.raises(ValueError, match="a forward pass never calls it"):
        attribute(bridge, task, "q", method="gradient+qk")
