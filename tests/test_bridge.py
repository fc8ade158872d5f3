"""What ``patching_demo.engine.bridge`` relies on inside TransformerLens, one test for each thing.

Where a release of TransformerLens moves one of them, the name of the failing test says which.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import architectures
import oracle
import pytest
import tiny
import torch
from oracle import pair
from torch import Tensor
from transformer_lens import patching as plain_patching
from transformer_lens.hook_points import HookPoint

from patching_demo import patching
from patching_demo.engine import bridge, skipping
from patching_demo.engine.cells import Patch


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with torch.no_grad():
        yield


MODELS = pytest.mark.parametrize("name", [*tiny.NAMES, *architectures.FAST])


@MODELS
def test_blocks_are_called_with_hidden_states_and_known_arguments(name: str) -> None:
    """model.blocks[i].original_component.forward names its first argument hidden_states."""
    model = oracle.model(name)
    for block in model.blocks:
        assert "hidden_states" in inspect.signature(block.original_component.forward).parameters
    run = bridge.capture(model, pair(name).corrupted)
    assert all("hidden_states" not in arguments for arguments in run.arguments)
    assert all("attention_mask" in arguments for arguments in run.arguments)


@MODELS
def test_blocks_return_the_stream_that_the_next_one_gets(name: str) -> None:
    model, data = oracle.model(name), pair(name)
    run = bridge.capture(model, data.corrupted)
    _, cache = model.run_with_cache(data.corrupted)
    n_layers = model.cfg.n_layers
    assert len(run.resid) == n_layers + 1
    for layer in range(n_layers):
        assert torch.equal(run.resid[layer], cache[f"blocks.{layer}.hook_resid_pre"])
    assert torch.equal(run.resid[-1], cache[f"blocks.{n_layers - 1}.hook_resid_post"])
    assert torch.equal(run.logits, model(data.corrupted))


@MODELS
def test_a_block_called_on_its_own_gives_what_it_gave(name: str) -> None:
    """With the captured arguments, model.blocks[i] is a function of its input."""
    model = oracle.model(name)
    run = bridge.capture(model, pair(name).corrupted)
    for layer in range(model.cfg.n_layers):
        found = bridge.block_output(model, run, layer)
        assert torch.allclose(found, run.resid[layer + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "llama-gqa", "gemma2", "qwen3"])
def test_attention_writes_to_a_cache_passed_by_keyword(name: str) -> None:
    """A stand-in with ``update`` and ``get_seq_length`` is enough to see keys and values."""
    model = oracle.model(name)
    run = bridge.capture(model, pair(name).corrupted)
    batch, n_pos = run.tokens.shape
    heads = getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
    assert len(run.keys) == model.cfg.n_layers
    for keys, values in zip(run.keys, run.values, strict=True):
        assert keys.shape[:3] == values.shape[:3] == (batch, heads, n_pos)


@pytest.mark.parametrize("name", ["attn-only", "native"])
def test_native_attention_with_a_cache_is_its_own_forward(name: str) -> None:
    """NativeAttention's parts (q, k, v, o, rotary, scale, soft cap), and what hooks k and v give.

    The second half of a prompt, run behind the first half's keys and values, ends as in the whole.
    """
    model, tokens = oracle.model(name), pair(name).corrupted
    run = bridge.capture(model, tokens)
    half, n_pos = tokens.shape[1] // 2, tokens.shape[1]
    layout = bridge.Layout(
        positions=torch.arange(half, n_pos)[None],
        owner=torch.zeros(1, n_pos - half, dtype=torch.int64),
        start=torch.full((1, n_pos - half), half),
        prefix=half,
    )
    for layer in range(model.cfg.n_layers):
        found = bridge.run_block(model, run, layer, layout, run.resid[layer][None, :, half:])
        assert torch.allclose(found[0], run.resid[layer + 1][:, half:], rtol=1e-5, atol=1e-5)
        attention = bridge._native_attention(model.blocks[layer])
        assert "forward" not in vars(attention)


@MODELS
def test_logits_are_unembed_of_ln_final_and_a_soft_cap(name: str) -> None:
    """model.ln_final, model.unembed and cfg.output_logits_soft_cap."""
    model = oracle.model(name)
    run = bridge.capture(model, pair(name).corrupted)
    found = bridge.logits_from_resid(model, run.resid[-1])
    assert torch.allclose(found, run.logits, rtol=1e-4, atol=1e-4)


@MODELS
def test_single_logits_are_columns_of_w_u_and_b_u(name: str) -> None:
    """model.W_U is [d_model, d_vocab] and model.b_U, if there is one, [d_vocab]."""
    model = oracle.model(name)
    run = bridge.capture(model, pair(name).corrupted)
    assert model.W_U.shape == (model.cfg.d_model, model.cfg.d_vocab)
    tokens = torch.tensor([[3, 7, 100], [5, 5, 9]])
    found = bridge.some_logits_from_resid(model, run.resid[-1][None], tokens)[0]
    wanted = run.logits.gather(-1, tokens[:, None].expand(-1, run.logits.shape[1], -1))
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@MODELS
def test_positions_of_other_tokens_are_told_from_the_embedding_bit_for_bit(name: str) -> None:
    model, data = oracle.model(name), pair(name)
    differ = (data.clean != data.corrupted).any(0).nonzero()[:, 0].tolist()
    assert skipping.differing_positions(model, data.corrupted, data.cache) == tuple(differ)
    assert skipping.differing_positions(model, data.clean, data.cache) == ()
    assert skipping.differing_positions(object(), data.clean, data.cache) == tuple(range(6))


@MODELS
def test_hook_points_are_found_by_their_hooked_transformer_names(name: str) -> None:
    """blocks.i.hook_x and blocks.i.attn.hook_x lead to HookPoints, aliases included."""
    model = oracle.model(name)
    _, cache = model.run_with_cache(pair(name).corrupted)
    kinds = [
        kind
        for kind in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
        if f"blocks.0.hook_{kind}" in cache
    ]
    names = [f"blocks.1.hook_{kind}" for kind in kinds]
    names += [f"blocks.1.attn.hook_{kind}" for kind in ("q", "k", "v", "z", "pattern")]
    for hook_name in names:
        assert isinstance(bridge.hook_point(model, hook_name), HookPoint), hook_name
    assert bridge.hook_point(model, "blocks.1.hook_nonsense") is None
    assert bridge.hook_point(model, "nonsense.1.hook_resid_pre") is None


def test_hook_handles_can_be_taken_off_again() -> None:
    """HookPoint.add_hook returns a handle with .hook.remove(), listed in .fwd_hooks."""
    model, tokens, seen = tiny.model("gpt2"), pair("gpt2").corrupted, []
    point = bridge.hook_point(model, "blocks.0.hook_attn_out")
    with bridge.hooked(model, "blocks.0.hook_attn_out", lambda value, hook: seen.append(hook)):
        assert len(point.fwd_hooks) == 1
        assert "blocks.0" in bridge.attached_hooks(model)[0]
        model(tokens)
    assert len(seen) == 1
    assert point.fwd_hooks == []
    assert bridge.attached_hooks(model) == []
    model(tokens)
    assert len(seen) == 1


def test_a_setter_that_returns_a_new_tensor_counts() -> None:
    model, data = tiny.model("gpt2"), pair("gpt2")

    def zeros(activation: Tensor, index: Any, clean: Tensor) -> Tensor:
        return torch.zeros_like(activation)

    patch = Patch(None, "blocks.1.hook_resid_pre", 1, (0,), setter=zeros, index=(1,))
    logits = bridge.run_plain(model, data.corrupted, [patch], dict(data.cache.items()))
    assert torch.allclose(logits[:, 0], logits[:, 1], atol=1e-5)


def test_patch_setters_and_helpers_have_their_names() -> None:
    """What patching_demo.patching imports from transformer_lens.patching."""
    for setter, meaning in patching.SETTERS.items():
        assert getattr(plain_patching, setter.__name__) is setter
        assert list(inspect.signature(setter).parameters)[1] == "index"
        assert meaning[0] == "layer"
    fields = inspect.signature(plain_patching.PatchingResult).parameters
    assert {"values", "axis_names", "index_df", "metric_names", "reduced"} <= set(fields)
    assert (
        list(inspect.signature(plain_patching.generic_activation_patch).parameters)
        == list(inspect.signature(patching.generic_activation_patch).parameters)[:-1]
    )
    for name in (*oracle.SWEEPS, *oracle.COMBINED):
        assert callable(getattr(patching, f"get_act_patch_{name}"))
        if name != "resid_post":
            assert callable(getattr(plain_patching, f"get_act_patch_{name}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(1, 4, 6, 6)}, r"'bias' of shape \(1, 4, 6, 6\) cannot be sliced"),
        ({"attention_mask": ...}, "block 0 takes no attention mask"),
        ({"attention_mask": torch.zeros(2, 1, 6, 9)}, r"shape \(2, 1, 6, 9\) cannot be sliced"),
        ({"position_ids": torch.zeros(3, 9)}, r"'position_ids' of shape \(3, 9\)"),
    ],
)
def test_arguments_that_cannot_be_sliced_are_unsupported(
    change: dict[str, Any], message: str
) -> None:
    model = tiny.model("llama")
    run = bridge.capture(model, pair("llama").corrupted)
    arguments = {**run.arguments[0], **change}
    run.arguments[0] = {k: v for k, v in arguments.items() if v is not ...}
    layout = bridge.Layout(
        positions=torch.tensor([[3, 4, 5]]),
        owner=torch.tensor([[0, 0, 0]]),
        start=torch.tensor([[3, 3, 3]]),
        prefix=3,
    )
    states = run.resid[0][:, 3:][None]
    with pytest.raises(bridge.Unsupported, match=message):
        bridge.run_block(model, run, 0, layout, states)


def test_a_block_that_is_not_called_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny.model("gpt2"), pair("gpt2").corrupted
    monkeypatch.setattr(type(model), "forward", lambda self, *_, **__: torch.zeros(2, 6, 128))
    with pytest.raises(bridge.Unsupported, match="not every block ran in a forward pass"):
        bridge.capture(model, tokens)


def test_a_block_without_hidden_states_is_unsupported() -> None:
    model = tiny.fresh("gpt2")
    handle = model.blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: ((args[0][:, :2], *args[1:]), kwargs), with_kwargs=True
    )
    with pytest.raises(bridge.Unsupported, match="block 0 is not called with hidden states"):
        bridge.capture(model, pair("gpt2").corrupted)
    handle.remove()
