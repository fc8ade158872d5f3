"""The sweeps give the numbers of ``transformer_lens.patching``, or right ones where it errs."""

from __future__ import annotations

import warnings
from typing import Any

import architectures
import oracle
import pandas as pd
import pytest
import tiny
import torch
import transformer_lens.patching as plain_patching
from oracle import (
    N_POS,
    SINGLE,
    assert_close,
    expected,
    expected_cells,
    make_pair,
    pair,
    some_cells,
)
from torch import Tensor

from patching_demo import patching
from patching_demo.engine import bridge, checks, packs, runner
from patching_demo.metrics import LogitDifference

QUIET = {"progress": False}


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


@pytest.mark.parametrize(
    ("name", "sweep"),
    [
        (name, sweep)
        for name in tiny.NAMES
        for sweep in SINGLE
        # Of all entries of a pattern the plain loop takes ten seconds.
        if "dest_src" not in sweep or name in ("gpt2", "attn-only")
    ],
)
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
    sweeps, _, axes = oracle.COMBINED[combined]
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


@pytest.mark.parametrize("combined", oracle.COMBINED)
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
    assert found.patch_type_names == list(oracle.COMBINED[combined][1])


@pytest.mark.parametrize("combined", oracle.COMBINED)
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


@pytest.mark.parametrize("sweep", oracle.SWEEPS)
@pytest.mark.parametrize("name", architectures.FAST)
def test_other_architectures_agree_with_the_plain_loop(
    name: str, sweep: str, no_plain_loop: None
) -> None:
    if sweep == "resid_post":
        return
    index = some_cells(name, sweep, 10)
    wanted = expected_cells(name, sweep, index)
    activation, setter, _ = oracle.SWEEPS[sweep]
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
def test_families_with_masks_and_hooks_of_their_own_agree_with_the_plain_loop(
    name: str, sweep: str
) -> None:
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


def oracle_has(name: str, sweep: str) -> bool:
    return not (name == "gpt-j" and sweep == "resid_mid")


@pytest.mark.parametrize("sweep", [s for s in SINGLE if "pattern" in s])
@pytest.mark.parametrize("name", architectures.PATTERN_NOT_LIVE)
def test_patterns_that_cannot_be_patched_are_refused(name: str, sweep: str) -> None:
    with pytest.raises(ValueError, match=r"hook 'blocks.0.attn.hook_pattern' is not live"):
        sweep_of(name, sweep)


@pytest.mark.filterwarnings("ignore:this sweep takes the plain loop")
@pytest.mark.parametrize("name", ["opt", "gpt-j"])
def test_combinations_leave_out_a_pattern_that_is_not_live(name: str) -> None:
    with pytest.warns(UserWarning, match="'pattern' is NaN in this sweep") as caught:
        found = sweep_of(name, "attn_head_all_pos_every", reduce="none").values
    assert len([w for w in caught if "NaN" in str(w.message)]) == 1
    assert found[:, -1].isnan().all()
    for number, kind in enumerate(("out", "q", "k", "v")):
        assert_close(found[:, number], expected(name, f"attn_head_{kind}_all_pos").values)


# ---- where the plain loop is wrong, or has no such sweep


def by_hand(name: str, layer: int, position: int, kind: str, metric: Any) -> float:
    """One cell of resid_mid or resid_post, from the model's own modules and nothing patched."""
    model, data = oracle.model(name), pair(name)
    with torch.no_grad():
        _, cache = model.run_with_cache(data.corrupted)
        block = model.blocks[layer]
        stream = cache[f"blocks.{layer}.hook_{kind}"].clone()
        stream[:, position] = data.cache[f"blocks.{layer}.hook_{kind}"][:, position]
        if kind == "resid_mid":
            stream = stream + block.mlp(block.ln2(stream))
        if layer + 1 == model.cfg.n_layers:
            return float(metric(model.unembed(model.ln_final(stream))))
        entry = f"blocks.{layer + 1}.hook_resid_pre"
        hooks = [(entry, lambda activation, hook=None: stream)]
        return float(metric(model.run_with_hooks(data.corrupted, fwd_hooks=hooks)))


@pytest.mark.parametrize("kind", ["resid_mid", "resid_post"])
@pytest.mark.parametrize("name", ["gpt2", "neox-sequential", "llama-gqa", "attn-only"])
def test_residual_sweeps_are_right_with_autograd_on(name: str, kind: str) -> None:
    if not exists_on(name, kind):
        return
    metric = pair(name).metrics["all logits"]
    with torch.enable_grad():
        found = sweep_of(name, kind, metrics=metric)
    wanted = torch.tensor(
        [
            [by_hand(name, layer, position, kind, metric) for position in range(N_POS)]
            for layer in range(oracle.model(name).cfg.n_layers)
        ]
    )
    assert_close(found, wanted, metric_axis=False)


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_direct_paths_are_those_of_transformer_lens_and_nan_where_there_is_none(
    component: str,
) -> None:
    model, data = tiny.model("gpt2"), pair("gpt2")
    caches = (data.cache, oracle.corrupted_cache("gpt2"))
    inputs = (model, data.corrupted, *caches, data.metrics["difference"])
    with torch.no_grad(), oracle.quiet():
        wanted = plain_patching.get_act_patch_direct_path_all_sources(*inputs, component, False)
    found = patching.get_act_patch_direct_path_all_sources(*inputs, component, verbose=False)
    later = torch.arange(2)[:, None] < torch.arange(2)
    exists = later[:, None, :, None].expand_as(found)
    assert wanted[exists].std() > 1e-3
    assert torch.allclose(found[exists], wanted[exists], atol=1e-5)
    assert found[~exists].isnan().all() and not found.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src_layer": 2}, "src_layer must be a whole number from 0 to 1, got 2"),
        ({"src_layer": 0.0}, "src_layer must be a whole number"),
        ({"src_head": -1}, "src_head must be a whole number from 0 to 3, got -1"),
        ({"component": "z"}, "component must be 'q', 'k' or 'v', got 'z'"),
        ({"patching_metric": {"a": oracle.all_logits}}, "takes one metric, got a mapping"),
        (
            {"patching_metric": lambda logits: logits.sum() * float("nan")},
            "metric 'metric' is nan at the corrupted run",
        ),
        ({"patching_metric": lambda logits: "high"}, "must return a number"),
        (
            {"corrupted_cache": {}},
            r"the corrupted cache has no 'blocks.0.attn.hook_z': .*corrupted_",
        ),
        ({"clean_cache": {}}, r"the clean cache has no 'blocks.0.attn.hook_z': .*clean_tokens"),
    ],
)
def test_direct_paths_refuse(change: dict[str, Any], message: str) -> None:
    model, data = tiny.model("gpt2"), pair("gpt2")
    arguments = dict(
        model=model,
        corrupted_tokens=data.corrupted,
        clean_cache=data.cache,
        corrupted_cache=oracle.corrupted_cache("gpt2"),
        patching_metric=data.metrics["difference"],
        src_layer=0,
        src_head=1,
        verbose=False,
    )
    with pytest.raises((ValueError, TypeError), match=message):
        patching.get_act_patch_direct_path(**{**arguments, **change})


def direct_paths(every: bool, *inputs: Any) -> Tensor:
    if every:
        return patching.get_act_patch_direct_path_all_sources(*inputs, verbose=False)
    return patching.get_act_patch_direct_path(*inputs, 0, 1, verbose=False)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("same", ["prompts", "caches"])
def test_direct_paths_of_identical_runs_warn_once_and_give_the_baseline(
    every: bool, same: str
) -> None:
    model, data = tiny.model("gpt2"), pair("gpt2")
    tokens = data.clean if same == "prompts" else data.corrupted
    metric = data.metrics["difference"]
    checks._warned.clear()
    with pytest.warns(UserWarning, match="there is nothing to patch") as caught:
        for _ in range(2):
            found = direct_paths(every, model, tokens, data.cache, data.cache, metric)
    assert len(caught) == 1
    with torch.no_grad():
        base = metric(model(tokens))
    there = found[~found.isnan()]
    assert len(there) and torch.allclose(there, base.expand_as(there), atol=1e-6)


@pytest.mark.parametrize("every", [False, True])
def test_direct_paths_refuse_a_metric_that_reads_a_pad(every: bool) -> None:
    model, data = tiny.model("gpt2"), pair("gpt2")
    runs = [data.clean.clone(), data.corrupted.clone()]
    for tokens in runs:
        tokens[1, 4:] = tiny.tokenizer().pad_token_id
    with torch.no_grad():
        caches = [model.run_with_cache(tokens)[1] for tokens in runs]
    inputs = (model, runs[1], *caches)
    answers = [[9, 11], [12, 30]]
    with pytest.raises(ValueError, match="prompt 1 is padded on the right .* metric 'metric'"):
        direct_paths(every, *inputs, LogitDifference(answers, positions=[5, 4]))
    found = direct_paths(every, *inputs, LogitDifference(answers, positions=[5, 3]))
    assert found[~found.isnan()].std() > 0


# ---- arguments and results


def plainly(
    index: Any, setter: Any, activation: str, model: Any = None, data: Any = None
) -> Tensor:
    """Some cells by the plain loop of ``transformer_lens``, with a metric of all logits."""
    data = data or pair("gpt2")
    with torch.no_grad(), oracle.quiet():
        return plain_patching.generic_activation_patch(
            model or tiny.model("gpt2"),
            data.corrupted,
            data.cache,
            data.metrics["all logits"],
            setter,
            activation,
            index_df=index,
        )


def generic(index: Any, name: str = "gpt2", sweep: str = "resid_pre", **options: Any) -> Any:
    data = pair(name)
    activation, setter, _ = oracle.SWEEPS[sweep]
    return patching.generic_activation_patch(
        oracle.model(name),
        data.corrupted,
        data.cache,
        options.pop("metric", data.metrics["difference"]),
        options.pop("setter", setter),
        options.pop("activation", activation),
        index_df=index,
        **QUIET,
        **options,
    )


def test_an_index_df_gives_a_flat_result() -> None:
    index = pd.DataFrame({"layer": [1, 0, 1], "pos": [3, 2, 5]})
    whole = sweep_of("gpt2", "resid_pre", metrics=pair("gpt2").metrics["difference"])
    flat = generic(index)
    assert flat.shape == (3,)
    assert_close(flat, whole[index["layer"], index["pos"]], metric_axis=False)


@pytest.mark.parametrize("dtype", ["float64", "int32", "object"])
def test_an_index_df_may_count_from_the_end_and_hold_floats(dtype: str) -> None:
    """A data frame that was joined or filtered easily turns its whole numbers into floats."""
    index = pd.DataFrame({"layer": [1, 0], "pos": [-1, -4]}).astype({"layer": dtype, "pos": dtype})
    straight = generic(pd.DataFrame({"layer": [1, 0], "pos": [N_POS - 1, N_POS - 4]}))
    assert torch.equal(generic(index), straight)


def test_the_index_df_comes_back_if_asked_for() -> None:
    index = pd.DataFrame({"layer": [0, 1], "pos": [2, 3]})
    values, back = generic(index, return_index_df=True)
    assert values.shape == (2,)
    pd.testing.assert_frame_equal(back, index)
    whole, index = sweep_of(
        "gpt2", "resid_pre", return_index_df=True, metrics=pair("gpt2").metrics["difference"]
    )
    assert len(index) == whole.numel()
    assert list(index.columns) == ["layer", "pos"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"layer": [9], "pos": [0]}, "index_df has layer 9, but there are only 2 of them"),
        ({"layer": [0], "pos": [-7]}, "index_df has pos -7, but there are only 6 of them"),
        ({"layer": [0], "pos": [0.5]}, "index_df must hold whole numbers only"),
        ({"layer": [0], "pos": [float("nan")]}, "index_df must hold whole numbers only"),
        ({"layer": ["one"], "pos": [0]}, "index_df must hold whole numbers only"),
        ({"layer": [], "pos": []}, "and not empty"),
        ({"position": [0], "layer": [0]}, "takes 2 indices by name"),
        ({"layer": [0]}, "takes 2 indices"),
        ({"layer": [0], "pos": [0], "head": [0]}, "takes 2 indices"),
    ],
)
def test_an_index_df_that_does_not_fit_is_refused(index: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generic(pd.DataFrame(index))
    with pytest.raises(ValueError, match="index_df must be a DataFrame"):
        generic([index])


@pytest.mark.parametrize("axes", [None, [], ["pos", "layer"], ["layer", "neuron"]])
def test_axes_that_do_not_exist_are_refused(axes: Any) -> None:
    data = pair("gpt2")
    with pytest.raises(ValueError, match="index_axis_names"):
        patching.generic_activation_patch(
            tiny.model("gpt2"),
            data.corrupted,
            data.cache,
            data.metrics["difference"],
            plain_patching.layer_pos_patch_setter,
            "resid_pre",
            index_axis_names=axes,
            **QUIET,
        )


def test_reductions_agree_with_each_other_and_with_the_plain_loop() -> None:
    metric = pair("gpt2").per_example["difference"]
    kept = sweep_of("gpt2", "mlp_out", reduce="none", baseline=True, metrics=metric)
    mean = sweep_of("gpt2", "mlp_out", reduce="mean", metrics=metric)
    scalar = sweep_of("gpt2", "mlp_out", metrics=pair("gpt2").metrics["difference"])
    wanted = expected("gpt2", "mlp_out")["difference"]
    assert_close(kept.values, wanted.values, metric_axis=False)
    assert_close(mean, wanted.mean(), metric_axis=False)
    assert_close(scalar, wanted.mean(), metric_axis=False)
    assert torch.allclose(kept.baseline, wanted.baseline)


def test_a_result_has_its_statistics() -> None:
    found = sweep_of("gpt2", "attn_head_out_by_pos", reduce="none", baseline=True)
    wanted = expected("gpt2", "attn_head_out_by_pos")
    # A metric that shows a change in every cell, so that no statistic rests on rounding.
    one, other = found["all logits"], wanted["all logits"]
    assert_close(one.effect(), other.effect(), metric_axis=False)
    clean = other.baseline + 1.0
    assert_close(one.normalized(clean), other.normalized(clean), metric_axis=False)
    assert_close(one.mean(), other.mean(), metric_axis=False)
    assert_close(one.stderr(), other.stderr(), metric_axis=False)
    for ours, theirs in zip(one.bootstrap_ci(), other.bootstrap_ci(), strict=True):
        assert_close(ours, theirs, metric_axis=False)
    assert one.permutation_pvalue().shape == other.permutation_pvalue().shape
    frame = found.to_dataframe()
    assert len(frame) == found.values.numel()
    assert set(frame["metric"]) == set(found.metric_names)


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="reduce must be 'scalar', 'mean' or 'none', got 'sum'"):
        sweep_of("gpt2", "resid_pre", reduce="sum")
    with pytest.raises(ValueError, match="return_index_df goes with a tensor result"):
        sweep_of("gpt2", "resid_pre", baseline=True, return_index_df=True)
    with pytest.raises(TypeError, match="unknown option 'cheque': the options are memory"):
        sweep_of("gpt2", "resid_pre", cheque=1)
    with pytest.raises(ValueError, match="memory must be a positive number of bytes, .* got 0"):
        sweep_of("gpt2", "resid_pre", memory=0)
    with pytest.raises(ValueError, match="check must be 0 or more cells, .* got -1"):
        sweep_of("gpt2", "resid_pre", check=-1)
    with pytest.raises(TypeError, match="store must be a path, got int"):
        sweep_of("gpt2", "resid_pre", store=3)


# ---- what the engine leaves to the plain loop


def scaled_setter(activation: Tensor, index: Any, clean: Tensor) -> Tensor:
    """Half way between corrupted and clean; returns a new tensor."""
    layer, position = index
    out = activation.clone()
    out[:, position] = (activation[:, position] + clean[:, position]) / 2
    return out


@pytest.mark.parametrize(
    ("setter", "activation"),
    [
        (scaled_setter, "resid_pre"),
        (plain_patching.layer_pos_patch_setter, "post"),
        # On a pattern [batch, head, dest, src], the setter of positions picks a head.
        (plain_patching.layer_pos_patch_setter, "pattern"),
    ],
)
def test_setters_and_activations_not_in_the_table_take_the_plain_loop(
    setter: Any, activation: str
) -> None:
    index = pd.DataFrame({"layer": [0, 1], "pos": [2, 3]})
    metric = pair("gpt2").metrics["all logits"]
    with pytest.warns(UserWarning, match="the patch setter or activation") as caught:
        found = generic(index, setter=setter, activation=activation, metric=metric)
        generic(index, setter=setter, activation=activation, metric=metric)
    assert len(caught) == 1
    assert torch.equal(found, plainly(index, setter, activation))


@pytest.mark.parametrize("permanent", [False, True])
def test_the_callers_hooks_take_part_and_stay(permanent: bool) -> None:
    model, data = tiny.model("gpt2"), pair("gpt2")
    name = "blocks.0.hook_mlp_out"
    point = model.hook_dict.get(name) or model.blocks[0].hook_mlp_out

    def damp(activation: Tensor, hook: Any = None) -> Tensor:
        return activation * 0.5

    handle = point.add_hook(damp, is_permanent=permanent)
    before = list(point.fwd_hooks)
    try:
        with torch.no_grad(), oracle.quiet():
            wanted = plain_patching.get_act_patch_resid_pre(
                model, data.corrupted, data.cache, data.metrics["all logits"]
            )
        with pytest.warns(UserWarning, match="the model has hooks attached"):
            found = sweep_of("gpt2", "resid_pre", metrics=data.metrics["all logits"])
        assert point.fwd_hooks == before
        assert_close(found, wanted, metric_axis=False)
    finally:
        handle.hook.remove()
        point.fwd_hooks.remove(handle)
    undamped = sweep_of("gpt2", "resid_pre", metrics=data.metrics["all logits"])
    assert (undamped - wanted).abs().max() > 1e-3


# ---- caches and prompts


def test_a_cache_edited_where_inputs_agree_is_taken_as_it_is() -> None:
    """A mean over prompts, say: no clean run, so agreeing inputs say nothing about it."""
    model, data = tiny.model("gpt2"), pair("gpt2")
    edited = {name: value.clone() for name, value in data.cache.items()}
    for name in edited:
        if name.endswith(("hook_z", "hook_resid_pre")):
            edited[name][:] = edited[name].mean(dim=0, keepdim=True)
    metric = data.metrics["all logits"]
    for sweep in ("attn_head_out_by_pos", "resid_pre"):
        with torch.no_grad(), oracle.quiet():
            wanted = getattr(plain_patching, f"get_act_patch_{sweep}")(
                model, data.corrupted, edited, metric
            )
        found = getattr(patching, f"get_act_patch_{sweep}")(
            model, data.corrupted, edited, metric, check=0, **QUIET
        )
        assert_close(found, wanted, metric_axis=False)
        assert (found[:, 0] - found[0, 0].flatten()[0]).abs().max() > 1e-3


@pytest.mark.parametrize("keep", ["z", "all but the embedding"])
def test_a_cache_may_hold_no_more_than_what_is_swept(keep: str, no_plain_loop: None) -> None:
    data = pair("gpt2")
    kept = {
        name: value
        for name, value in data.cache.items()
        if (name.endswith("hook_z") if keep == "z" else name != "hook_embed")
    }
    metric = data.metrics["all logits"]
    found = patching.get_act_patch_attn_head_out_by_pos(
        tiny.model("gpt2"), data.corrupted, kept, metric, **QUIET
    )
    wanted = expected("gpt2", "attn_head_out_by_pos")["all logits"].mean()
    assert_close(found, wanted, metric_axis=False)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_right_padded_prompts_read_as_if_alone(name: str) -> None:
    """Each prompt is read at its own last token, and never at a pad."""
    model = tiny.model(name)
    data = make_pair(model, batch=2, n_pos=7)
    short = 5  # The second prompt is short, and padded.
    pad = model.tokenizer.pad_token_id
    clean, corrupted = data.clean.clone(), data.corrupted.clone()
    clean[1, short:] = corrupted[1, short:] = pad
    answers = torch.tensor([[9, 11], [12, 30]])
    metric = oracle.LogitDifference(answers, positions=[6, short - 1]).per_example
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
    together = patching.get_act_patch_attn_head_out_by_pos(
        model, corrupted, cache, metric, reduce="none", **QUIET
    ).values
    for row, length in ((0, 7), (1, short)):
        with torch.no_grad():
            _, own = model.run_with_cache(clean[[row], :length])
            with oracle.quiet():
                alone = plain_patching.get_act_patch_attn_head_out_by_pos(
                    model,
                    corrupted[[row], :length],
                    own,
                    oracle.LogitDifference(answers[[row]], positions=length - 1),
                )
        assert_close(together[:, :length, :, row], alone, metric_axis=False)
        rest = together[:, length:, :, row]
        if rest.numel():
            assert rest.std() <= 1e-6 * rest.abs().max()


# ---- the sweep checks itself


def test_a_wrong_cell_leads_to_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an engine that is off by a little everywhere, any rechecked cell shows it."""
    right = runner.sweep_cells

    def wrong(*arguments: Any, **options: Any) -> Any:
        values, slots = right(*arguments, **options)
        return values + 0.05, slots

    monkeypatch.setattr(runner, "sweep_cells", wrong)
    metric = pair("gpt2").metrics["difference"]
    unchecked = sweep_of("gpt2", "resid_pre", metrics=metric, check=0)
    with pytest.warns(UserWarning, match="plain loop: a plain forward pass gives .* the engine"):
        found = sweep_of("gpt2", "resid_pre", metrics=metric)
    wanted = expected("gpt2", "resid_pre")["difference"].mean()
    assert_close(found, wanted, metric_axis=False)
    assert (unchecked - wanted).abs().max() > 0.04


def test_the_rechecked_cells_follow_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    right = runner.run_plain

    def spy(model: Any, tokens: Tensor, patches: Any, clean: Any) -> Any:
        seen.append(patches[0].index)
        return right(model, tokens, patches, clean)

    monkeypatch.setattr(runner, "run_plain", spy)
    for seed in (0, 0, 1):
        sweep_of("gpt2", "resid_pre", metrics=oracle.all_logits, check=4, seed=seed)
    assert seen[:4] == seen[4:8] != seen[8:]
    assert len(seen) == 12


@pytest.mark.parametrize(
    ("setter", "activation", "message"),
    [
        ("layer_pos_patch_setter", "resid_pre", "patch_setter must be a function, got str"),
        (None, "resid_pre", "patch_setter must be a function, got NoneType"),
        (scaled_setter, 3, "activation_name must be a str, got int"),
        (scaled_setter, "hook_embed", "this model has no hook 'blocks.0.hook_hook_embed'"),
        (scaled_setter, "nonsense", "this model has no hook 'blocks.0.hook_nonsense'"),
    ],
)
def test_setters_and_activations_that_do_not_exist_are_refused(
    setter: Any, activation: Any, message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        generic(pd.DataFrame({"layer": [0], "pos": [1]}), setter=setter, activation=activation)


def test_a_hook_that_is_never_called_is_refused() -> None:
    """Whatever a cache holds for it: the heads' results are not computed unless asked for."""
    data = pair("gpt2")
    results = torch.zeros(*data.corrupted.shape, 4, 32)
    cache = {**dict(data.cache.items()), "blocks.0.attn.hook_result": results}
    with pytest.raises(ValueError, match="is not live on this model: a forward pass never calls"):
        patching.generic_activation_patch(
            tiny.model("gpt2"),
            data.corrupted,
            cache,
            oracle.all_logits,
            plain_patching.layer_pos_head_vector_patch_setter,
            "result",
            index_df=pd.DataFrame({"layer": [0], "pos": [2], "head": [1]}),
            **QUIET,
        )


@pytest.mark.parametrize("name", ["attn-only", "gpt2"])
def test_prompts_may_fill_the_context(name: str, no_plain_loop: None) -> None:
    """A pack stands behind its prefix, and may be longer than what the context leaves room for."""
    model = tiny.model(name)
    data = make_pair(model, batch=1, n_pos=tiny.N_CTX, differ=(0,))
    index = pd.DataFrame({"layer": [0, 0, 1, 1, 1], "pos": [0, 62, 1, 30, 62]})
    arguments = (model, data.corrupted, data.cache, data.metrics["all logits"])
    setter = plain_patching.layer_pos_patch_setter
    wanted = plainly(index, setter, "resid_pre", model, data)
    found = patching.generic_activation_patch(
        *arguments, setter, "resid_pre", index_df=index, **QUIET
    )
    assert_close(found, wanted, metric_axis=False)


def test_a_block_that_keeps_no_keys_and_values_takes_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge, "_listen_to_native", lambda block, recorder: [])
    with pytest.warns(UserWarning, match="block 0 writes no keys and values to a cache"):
        found = sweep_of("attn-only", "resid_pre", metrics=oracle.all_logits)
    monkeypatch.undo()
    assert torch.allclose(found, sweep_of("attn-only", "resid_pre", metrics=oracle.all_logits))


def test_an_activation_that_is_switched_on_is_swept() -> None:
    model = tiny.fresh("gpt2")
    model.set_use_attn_result(True)
    data = make_pair(model)
    index = pd.DataFrame({"layer": [0, 1], "pos": [2, 4], "head": [1, 3]})
    arguments = (model, data.corrupted, data.cache, data.metrics["all logits"])
    setter = plain_patching.layer_pos_head_vector_patch_setter
    wanted = plainly(index, setter, "result", model, data)
    with pytest.warns(UserWarning, match="takes the plain loop"):
        found = patching.generic_activation_patch(
            *arguments, setter, "result", index_df=index, **QUIET
        )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("sweep", ["resid_pre", "attn_head_q_by_pos", "attn_head_k_by_pos"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_block_calls_are_full_and_no_larger_than_asked(name, sweep, monkeypatch):
    model, asked, sizes, used = tiny.model(name), 4 * packs.SLOTS * 2, [], []
    data = make_pair(model, 2, 23, (7, 9))
    monkeypatch.setitem(packs.CALL_TOKENS, "cpu", asked)
    step = packs.Pack.step

    def noted(pack, *arguments):
        sizes.append(pack.states[..., 0].numel())
        used.append(int((pack.slot_of >= 0).sum()) * len(data.corrupted))
        return step(pack, *arguments)

    monkeypatch.setattr(packs.Pack, "step", noted)
    call = getattr(patching, f"get_act_patch_{sweep}")
    call(model, data.corrupted, data.cache, data.metrics["difference"], progress=False)
    assert max(sizes) == asked
    assert sum(used) > 0.9 * sum(sizes)


@pytest.mark.parametrize("kind", ["k", "v"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "neox-parallel"])
def test_of_the_last_block_only_rows_that_are_read_are_run(name, kind, monkeypatch):
    """Keys and values, too, when they are patched there."""
    model, reads = tiny.model(name), []
    data = make_pair(model, 2, 23, (7, 9))
    last, step = model.cfg.n_layers - 1, packs.Pack.step

    def noted(pack, model, layer, read=None):
        if layer == last and pack.patches(layer, "hook"):
            reads.append(read)
        return step(pack, model, layer, read)

    monkeypatch.setattr(packs.Pack, "step", noted)
    sweep, metric = f"attn_head_{kind}_by_pos", data.metrics["difference"]
    cells = oracle.every_cell(model, 23, sweep).query("layer == @last and pos < 15")
    index = cells.reset_index(drop=True)
    activation, setter, _ = oracle.SWEEPS[sweep]
    inputs = model, data.corrupted, data.cache, metric, setter, activation
    found = patching.generic_activation_patch(*inputs, index_df=index, progress=False)
    assert reads and None not in reads
    with torch.no_grad(), oracle.quiet():
        plain = oracle.plain_patching.generic_activation_patch(*inputs, index_df=index)
    assert_close(found, plain, metric_axis=False)
