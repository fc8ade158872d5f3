"""Inputs that a sweep would turn into a meaningless number are refused, or served rightly."""

from __future__ import annotations

import copy
import re
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from oracle import assert_close, make_pair, pair
from torch import Tensor
from transformer_lens import ActivationCache

from patching_demo import patching
from patching_demo.engine import checks, runner, scoring
from patching_demo.metrics import LogitDifference


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal must come before any forward pass."""
    pair("gpt2"), pair("neox-sequential")

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a forward pass ran")

    monkeypatch.setattr(type(tiny.model("gpt2")), "forward", refuse)


def sweep(name: str = "gpt2", **change: Any) -> Any:
    data = pair(name)
    arguments = dict(
        model=oracle.model(name),
        corrupted_tokens=data.corrupted,
        clean_cache=data.cache,
        patching_metric=data.metrics["difference"],
    )
    positional = [change.pop(key, usual) for key, usual in arguments.items()]
    kind = change.pop("kind", "resid_pre")
    return getattr(patching, f"get_act_patch_{kind}")(*positional, progress=False, **change)


def renamed(cache: Any, change: Any) -> dict[str, Tensor]:
    return {name: change(value) for name, value in cache.items()}


# ---- clean and corrupted must fit


@pytest.mark.parametrize(
    ("rows", "length"),
    [(2, 5), (2, 7), (1, 6), (3, 6)],
    ids=["longer clean prompts", "shorter clean prompts", "one for both", "fewer"],
)
@pytest.mark.parametrize("kind", ["resid_pre", "attn_head_pattern_by_pos", "attn_head_v_all_pos"])
def test_lengths_and_batches_must_agree(
    rows: int, length: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("gpt2")
    pair("gpt2")
    other = make_pair(model, batch=rows, n_pos=length)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("a forward pass ran"))
    with pytest.raises(
        ValueError, match=r"has shape \(2, .*the corrupted tokens need \["
    ) as caught:
        sweep(kind=kind, corrupted_tokens=other.corrupted)
    assert f"[{rows}, " in str(caught.value)
    assert "the same number of prompts and of tokens" in str(caught.value)


def with_hook_z(change: Any) -> dict[str, Tensor]:
    """The clean cache with the heads' outputs changed."""
    cache = pair("gpt2").cache.items()
    return {name: change(value) if name.endswith("hook_z") else value for name, value in cache}


#: The cache, what is swept with it, and what is said.
UNFIT = {
    "one prompt does not broadcast": (
        lambda usual: renamed(usual, lambda value: value[:1]),
        "resid_pre",
        r"'blocks.0.hook_resid_pre' .* \(1, 6, 32\).*\[2, 6, 32\]",
    ),
    "a model with a layer less": (
        lambda usual: {k: v for k, v in usual.items() if not k.startswith("blocks.1")},
        "resid_pre",
        "the clean cache has no 'blocks.1.hook_resid_pre'",
    ),
    # As wide, with as many heads: every entry that is read would fit.
    "a model with a layer more": (
        lambda usual: pair("neox-sequential").cache,
        "resid_pre",
        "has 'blocks.2.hook_resid_pre', but .* only 2 blocks",
    ),
    "a narrower model": (
        lambda usual: renamed(usual, lambda value: value[..., :16]),
        "resid_pre",
        "the cache must come from this model",
    ),
    "fewer heads": (
        lambda usual: with_hook_z(lambda value: value[:, :, :2]),
        "attn_head_out_by_pos",
        r"hook_z' in the clean cache has shape \(2, 6, 2, 8\)",
    ),
    "without the activation": (
        lambda usual: {"blocks.0.hook_resid_pre": usual["blocks.0.hook_resid_pre"]},
        "attn_head_out_by_pos",
        "names_filter that keeps names ending in 'attn.hook_z'",
    ),
    # As multi-head latent attention has them, [batch, head, pos, d_head]; and split otherwise.
    "heads before positions": (
        lambda usual: with_hook_z(lambda value: value.transpose(1, 2)),
        "attn_head_out_by_pos",
        "this model's hook has heads before positions",
    ),
    "heads split otherwise": (
        lambda usual: with_hook_z(lambda value: value.reshape(2, 6, 2, 16)),
        "attn_head_out_by_pos",
        "the number of heads is another",
    ),
    **{
        f"no cache but {cache!r}": (
            lambda usual, cache=cache: cache,
            "resid_pre",
            "the clean cache has no 'blocks.0.hook_resid_pre'",
        )
        for cache in (None, 3, [], "cache", torch.zeros(3))
    },
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_cache_that_does_not_fit_is_refused_before_any_forward(
    what: str, no_forward: None
) -> None:
    cache, kind, message = UNFIT[what]
    with pytest.raises(ValueError, match=message):
        sweep(clean_cache=cache(pair("gpt2").cache), kind=kind)


def test_a_head_of_another_width_is_named() -> None:
    cache = with_hook_z(lambda value: value[..., :4])
    with pytest.raises(ValueError, match=r"in the corrupted run it has \(2, 6, 4, 8\)"):
        sweep(clean_cache=cache, kind="attn_head_out_by_pos")


@pytest.mark.parametrize("kind", ["resid_pre", "attn_head_out_by_pos", "attn_head_pattern_all_pos"])
def test_a_cache_that_lost_its_batch_axis_is_named(kind: str, no_forward: None) -> None:
    model = tiny.model("gpt2")
    cache = {name: value[:1] for name, value in pair("gpt2").cache.items()}
    lost = ActivationCache(cache, model).remove_batch_dim()
    with pytest.raises(ValueError, match=r"no batch axis .*remove_batch_dim\(\)"):
        sweep(clean_cache=lost, corrupted_tokens=pair("gpt2").corrupted[:1], kind=kind)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
@pytest.mark.filterwarnings("ignore:this sweep takes the plain loop")
def test_scores_that_are_masked_by_infinity_are_patched(name: str) -> None:
    data, model = pair(name), tiny.model(name)
    assert data.cache["blocks.0.attn.hook_attn_scores"].isneginf().any() or name != "gpt2"
    index = oracle.pd.DataFrame({"layer": [0, 1, 1], "head": [1, 0, 3], "pos": [3, 4, 5]})
    index = index.rename(columns={"head": "head_index", "pos": "dest_pos"})
    setter = oracle.plain_patching.layer_head_pos_pattern_patch_setter
    cache = data.cache
    arguments = (model, data.corrupted, cache, oracle.all_logits, setter, "attn_scores")
    found = patching.generic_activation_patch(*arguments, index_df=index, progress=False)
    with torch.no_grad(), oracle.quiet():
        wanted = oracle.plain_patching.generic_activation_patch(*arguments, index_df=index)
    assert wanted.std() > 0 and torch.allclose(found, wanted, atol=1e-5)
    broken = dict(cache.items())
    broken["blocks.1.attn.hook_attn_scores"] = broken["blocks.1.attn.hook_attn_scores"].clone()
    broken["blocks.1.attn.hook_attn_scores"][0, 0, 3, 0] = float("-inf")
    arguments = (model, data.corrupted, broken, oracle.all_logits, setter, "attn_scores")
    with pytest.raises(ValueError, match="hook_attn_scores' in the clean cache holds NaN or inf"):
        patching.generic_activation_patch(*arguments, index_df=index, progress=False)


def test_a_cache_with_nan_is_refused(no_forward: None) -> None:
    cache = renamed(pair("gpt2").cache, torch.clone)
    cache["blocks.1.hook_resid_pre"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="'blocks.1.hook_resid_pre' .* holds NaN or infinity"):
        sweep(clean_cache=cache)


def test_a_cache_may_be_a_plain_dict_or_an_activation_cache() -> None:
    data, model = pair("gpt2"), tiny.model("gpt2")
    plain = dict(data.cache.items())
    assert torch.equal(sweep(clean_cache=plain), sweep(clean_cache=ActivationCache(plain, model)))


# ---- indices


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize(
    "kind", ["resid_pre", "attn_head_v_by_pos", "attn_head_pattern_dest_src_pos"]
)
def test_indices_are_taken_by_name_in_any_order(name: str, kind: str) -> None:
    """Those of transformer_lens.patching are taken by place: held to it in the setter's order."""
    data = pair(name)
    activation, setter, _ = oracle.SWEEPS[kind]
    index = oracle.some_cells(name, kind, 4)
    arguments = (oracle.model(name), data.corrupted, data.cache, oracle.all_logits, setter)
    with torch.no_grad(), oracle.quiet():
        wanted = oracle.plain_patching.generic_activation_patch(
            *arguments, activation, index_df=index
        )
    for columns in (list(index), list(index)[::-1], sorted(index)):
        found, back = patching.generic_activation_patch(
            *arguments, activation, index_df=index[columns], progress=False, return_index_df=True
        )
        assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
        assert list(back) == columns


def test_axes_are_taken_by_name_in_any_order() -> None:
    usual = sweep(kind="attn_head_out_by_pos")
    turned = sweep(kind="attn_head_out_by_pos", index_axis_names=("layer", "head", "pos"))
    assert_close(turned, usual.transpose(1, 2), metric_axis=False)


# ---- nothing to patch


@pytest.mark.parametrize("embedding", [True, False])
@pytest.mark.parametrize("kind", ["resid_pre", "attn_head_pattern_all_pos", "block_every"])
def test_identical_prompts_give_the_baseline_and_one_warning(kind: str, embedding: bool) -> None:
    data, model = pair("gpt2"), tiny.model("gpt2")
    cache = {k: v for k, v in data.cache.items() if embedding or k != "hook_embed"}
    with pytest.warns(UserWarning, match="there is nothing to patch") as caught:
        for _ in range(2):
            found = sweep(kind=kind, corrupted_tokens=data.clean, clean_cache=cache, baseline=True)
    assert len(caught) == 1
    assert torch.equal(found.values, found.baseline.expand_as(found.values))
    with torch.no_grad():
        assert torch.allclose(found.baseline, data.metrics["difference"](model(data.clean)))


def test_prompts_that_differ_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep()


# ---- tokens


@pytest.mark.parametrize("text", ["When Mary and John went", ["When Mary", "When John"]])
def test_text_is_refused_with_the_way_to_tokens(text: Any, no_forward: None) -> None:
    with pytest.raises(TypeError, match=r"corrupted_tokens must be token ids: pass model.to_tok"):
        sweep(corrupted_tokens=text)


@pytest.mark.parametrize(
    "convert",
    [Tensor.numpy, Tensor.tolist, Tensor.int, lambda t: t.to(torch.uint8), np.asarray],
    ids=["numpy", "lists", "int32", "uint8", "asarray"],
)
def test_whole_numbers_in_any_form_are_tokens(convert: Any) -> None:
    assert torch.equal(sweep(corrupted_tokens=convert(pair("gpt2").corrupted)), sweep())


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.full((2, 6), 5.0), TypeError, "must be whole numbers, got torch.float32"),
        (torch.ones(2, 6, dtype=torch.bool), TypeError, "must be whole numbers, got torch.bool"),
        (
            torch.full((6,), 5),
            ValueError,
            r"must be \[batch, pos\], got shape \(6,\): for one prompt",
        ),
        (torch.full((1, 2, 6), 5), ValueError, r"must be \[batch, pos\], got shape \(1, 2, 6\)"),
        (torch.zeros(0, 6, dtype=torch.long), ValueError, r"is empty, of shape \(0, 6\)"),
        ([], ValueError, "corrupted_tokens is empty"),
        (None, TypeError, "got NoneType"),
        ([[1, 2], [3]], TypeError, "rows of equal length, got list"),
        ({"input_ids": [[1, 2]]}, TypeError, r"got dict: pass its \['input_ids'\]"),
        (tiny.tokenizer()(["a", "b"]), TypeError, r"got BatchEncoding: pass its \['input_ids'\]"),
        (pair("gpt2").cache, TypeError, "got ActivationCache"),
        (
            torch.full((2, 6), 128),
            ValueError,
            "token id 128 is not in the model's vocabulary of 128",
        ),
        (torch.full((2, 6), 5, device="meta"), TypeError, "got a tensor on the meta device"),
        (torch.full((2, 6), 5).to_sparse(), TypeError, "in the layout torch.sparse_coo"),
        (torch.full((2, 6), -1), ValueError, "token id -1 is not in the model's vocabulary"),
        (torch.full((2, 65), 5), ValueError, "has 65 tokens, the model takes at most 64"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    tokens: Any, error: type[Exception], message: str, no_forward: None
) -> None:
    with pytest.raises(error, match=message):
        sweep(corrupted_tokens=tokens)


def test_left_padded_prompts_are_refused_by_number(no_forward: None) -> None:
    tokens = pair("gpt2").corrupted.clone()
    tokens[1, :2] = tiny.tokenizer().pad_token_id
    with pytest.raises(ValueError, match="prompt 1 is padded on the left"):
        sweep(corrupted_tokens=tokens)


def with_pad(token: str, name: str = "gpt2") -> Any:
    """A model whose pad token is another one, as GPT-2's is the token that begins a text."""
    model = tiny.fresh(name)
    model.tokenizer = copy.deepcopy(tiny.tokenizer())
    model.tokenizer.pad_token = token
    model.cfg.d_vocab = tiny.D_VOCAB  # More than the tokenizer has.
    return model


BOS = tiny.tokenizer().bos_token_id  # It ends texts, too.
PAD = tiny.tokenizer().pad_token_id


@pytest.mark.parametrize("leading", [(0, 1), (1, 2), (3, 3), (1, 6)])
def test_left_padding_with_the_bos_token_is_refused(leading: tuple[int, int]) -> None:
    tokens = pair("gpt2").corrupted.clone()
    for row, count in enumerate(leading):
        tokens[row, :count] = BOS
    padded = 0 if leading[0] > 1 else 1
    with pytest.raises(ValueError, match=f"prompt {padded} is padded on the left"):
        sweep(model=with_pad("<bos>"), corrupted_tokens=tokens)


@pytest.mark.parametrize("pad", ["<pad>", "<bos>"])
def test_a_prompt_that_starts_and_ends_with_bos_is_not_padded(pad: str) -> None:
    model, data = with_pad(pad), pair("gpt2")
    tokens = data.corrupted.clone()
    tokens[:, 0] = tokens[:, -1] = BOS
    with torch.no_grad():
        _, cache = model.run_with_cache(data.clean)
    found = sweep(model=model, corrupted_tokens=tokens, clean_cache=cache)
    assert found.std() > 0


def padded_pair(pads: tuple[int, ...] = (0, 2), pad: int = PAD) -> Any:
    """Prompts that end in so many pad tokens each."""
    data, model = pair("gpt2"), tiny.model("gpt2")
    clean, corrupted = data.clean.clone(), data.corrupted.clone()
    for row, count in enumerate(pads):
        for tokens in (clean, corrupted):
            tokens[row, tokens.shape[1] - count :] = pad
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
    last = [clean.shape[1] - 1 - count for count in pads]
    return clean, corrupted, cache, LogitDifference([[9, 11], [12, 30]], positions=last)


#: Metrics that read where the second prompt has its pads.
LAST_POSITION = {
    "a function": lambda logits: (logits[:, -1, 9] - logits[:, -1, 11]).mean(),
    "a declared metric": LogitDifference([[9, 11], [12, 30]], positions=5),
    "all positions": oracle.all_logits,
    "a number": lambda logits: float(logits[1, -1, 3]),
}


@pytest.mark.parametrize("metric", LAST_POSITION)
@pytest.mark.parametrize("pad", ["<pad>", "<bos>"])
def test_a_metric_that_reads_a_pad_is_refused(metric: str, pad: str) -> None:
    model = with_pad(pad)
    _, corrupted, cache, _ = padded_pair(pad=model.tokenizer.pad_token_id)
    with pytest.raises(ValueError, match="prompt 1 is padded on the right .* metric 'metric'"):
        sweep(
            model=model,
            corrupted_tokens=corrupted,
            clean_cache=cache,
            patching_metric=LAST_POSITION[metric],
        )


def test_equal_prompts_that_cancel_each_other_do_not_hide_that_a_pad_is_read() -> None:
    model, (_, corrupted, *_) = tiny.model("gpt2"), padded_pair(pads=(1, 1))
    corrupted = corrupted[[1, 1]]
    with torch.no_grad():
        logits = model(corrupted)
    last = {"metric": lambda logits: logits[0, -1, 9] - logits[1, -1, 9]}
    with pytest.raises(ValueError, match="prompt 0 is padded on the right .* metric 'metric'"):
        checks.refuse_reading_pads(model, corrupted, logits, last)


def test_pads_of_many_prompts_take_few_copies_of_all_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, corrupted, _, metric = padded_pair(pads=(1, 2))
    copied, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t: copied.append(t.shape) or clone(t))
    tokens = corrupted.repeat(20, 1)
    logits = torch.rand(*tokens.shape, tiny.D_VOCAB)
    first_two = {"metric": lambda logits: metric(logits[:2])}
    checks.refuse_reading_pads(tiny.model("gpt2"), tokens, logits, first_two)
    assert copied.count(logits.shape) == 2


def test_what_may_be_padding_is_text_and_said_so() -> None:
    """The pad token ends texts, too: one of it at the end of one prompt is no proof of padding."""
    model = with_pad("<bos>")
    _, corrupted, cache, _ = padded_pair(pads=(0, 1), pad=BOS)
    metric = LAST_POSITION["a function"]
    arguments = dict(model=model, clean_cache=cache, patching_metric=metric)
    with pytest.warns(UserWarning, match="prompt 1 ends in token 0, which ends texts and pads"):
        found = sweep(corrupted_tokens=corrupted, **arguments)
    # The mask tells.
    mask = torch.ones_like(corrupted)
    assert torch.equal(sweep(corrupted_tokens=corrupted, attention_mask=mask, **arguments), found)
    mask[1, -1] = 0
    with pytest.raises(ValueError, match="prompt 1 is padded on the right .* metric 'metric'"):
        sweep(corrupted_tokens=corrupted, attention_mask=mask, **arguments)


def test_of_many_prompts_that_may_be_padded_the_first_is_named() -> None:
    corrupted = padded_pair(pads=(0, 1), pad=BOS)[1][[0, 1, 1, 1]]
    logits, metrics = torch.rand(*corrupted.shape, tiny.D_VOCAB), {"all": oracle.all_logits}
    with pytest.warns(UserWarning, match="prompt 1 ends in token 0") as said:
        checks.refuse_reading_pads(with_pad("<bos>"), corrupted, logits, metrics)
    assert len(said) == 1


@pytest.mark.parametrize("pad", ["<bos>", "<pad>"])
def test_a_doubled_bos_is_no_padding_and_said_so_once(pad: str) -> None:
    model = with_pad(pad)
    tokens = pair("gpt2").corrupted.clone()
    tokens[:, :2] = BOS
    with pytest.warns(UserWarning, match="every prompt begins with the token 0 twice") as caught:
        for _ in range(2):
            assert sweep(model=model, corrupted_tokens=tokens).std() > 0
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 5, dtype=torch.long), ValueError, r"must be \[2, 6\] as the tokens are"),
        (torch.ones(2, 6), TypeError, "attention_mask must be whole numbers, got torch.float32"),
        ([[1] * 6, [0] + [1] * 5], ValueError, "mask of prompt 1 hides tokens that are not at"),
        ([[1, 1, 0, 1, 1, 1], [1] * 6], ValueError, "mask of prompt 0 hides tokens"),
        (torch.zeros(2, 6, dtype=torch.bool), ValueError, "mask of prompt 0 hides tokens"),
    ],
)
def test_masks_that_a_sweep_cannot_heed_are_refused(
    mask: Any, error: type[Exception], message: str, no_forward: None
) -> None:
    with pytest.raises(error, match=message):
        sweep(attention_mask=mask)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("kind", ["resid_pre", "attn_head_out_by_pos", "attn_head_pattern_by_pos"])
def test_padded_prompts_get_the_values_they_get_alone(kind: str, declared: bool) -> None:
    """Padded on the right and read at its own last token, a prompt is as if it stood alone."""
    clean, corrupted, cache, metric = padded_pair()
    model = tiny.model("gpt2")
    per_example = metric.per_example
    together = sweep(
        kind=kind,
        corrupted_tokens=corrupted,
        clean_cache=cache,
        patching_metric=per_example if declared else lambda logits: per_example(logits),
        reduce="none",
    ).values
    for row, length in ((0, 6), (1, 4)):
        with torch.no_grad():
            _, alone = model.run_with_cache(clean[row : row + 1, :length])
        wanted = sweep(
            kind=kind,
            corrupted_tokens=corrupted[row : row + 1, :length],
            clean_cache=alone,
            patching_metric=LogitDifference(metric.tokens[row : row + 1], length - 1),
        )
        assert wanted.std() > 0
        text = together[..., row]
        text = text[..., :length] if "pattern" in kind else text[:, :length]
        assert_close(text, wanted, metric_axis=False)


# ---- metrics


def nan_where_patched(logits: Tensor) -> Tensor:
    """Fine on the corrupted run, NaN as soon as the first block's stream at 3 is patched."""
    with torch.no_grad():
        usual = pair("gpt2").metrics["difference"]
        value = usual(logits)
        baseline = float(usual(tiny.model("gpt2")(pair("gpt2").corrupted)))
    return torch.where((value - baseline).abs() > 1e-3, float("nan"), value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_metric_that_is_not_finite_names_the_run(value: str) -> None:
    with pytest.raises(ValueError, match=f"metric 'm' is {value} at the corrupted run"):
        sweep(patching_metric={"m": lambda logits: logits.sum() * 0 + float(value)})


@pytest.mark.filterwarnings("ignore:this sweep takes the plain loop")
@pytest.mark.parametrize("plain", [False, True])
def test_nan_names_the_cell(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(runner, "_reasons_for_plain_loop", lambda *_: ["a test"])
    with pytest.raises(
        ValueError, match=r"metric 'metric' is nan at blocks.0.hook_resid_pre, index"
    ):
        sweep(patching_metric=nan_where_patched)


@pytest.mark.parametrize(
    "form",
    [
        lambda value: float(value),
        lambda value: value.item(),
        lambda value: np.float64(value.item()),
        lambda value: value.detach(),
        lambda value: value.double(),
        lambda value: value.requires_grad_() if not value.requires_grad else value,
    ],
    ids=["float", "item", "numpy", "detached", "float64", "with gradient"],
)
def test_a_metric_may_return_any_number(form: Any) -> None:
    found = sweep(patching_metric=lambda logits: form(oracle.all_logits(logits)))
    wanted = sweep(patching_metric=oracle.all_logits)
    assert torch.allclose(found.double(), wanted.double(), rtol=1e-6)
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (lambda logits: "high", TypeError, "'metric' must return a number or a tensor, got str"),
        (lambda logits: None, TypeError, "'metric' must return a number or a tensor, got NoneType"),
        (lambda logits: logits[:, -1, 0], ValueError, r"return a scalar .* got shape \(2,\): pass"),
        (lambda logits: logits, ValueError, r"return a scalar with reduce='scalar', got shape"),
        (lambda logits: logits.mean() * 1j, TypeError, "must return real numbers, got torch.comp"),
        ("logit difference", TypeError, "'metric' must be a function of logits, got str"),
        (None, TypeError, "'metric' must be a function of logits, got NoneType"),
        ({}, ValueError, "patching_metric is an empty mapping"),
        ({"m": 3}, TypeError, "metric 'm' must be a function of logits, got int"),
    ],
)
def test_metrics_that_are_no_numbers_are_refused(
    metric: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sweep(patching_metric=metric)


@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_per_example_metrics_must_return_a_batch(reduce: str) -> None:
    with pytest.raises(ValueError, match=r"'metric' must return a \[batch\] tensor of length 2"):
        sweep(patching_metric=oracle.all_logits, reduce=reduce)


def test_a_metric_made_for_another_batch_names_itself() -> None:
    other = make_pair(tiny.model("gpt2"), batch=3)
    with pytest.raises(ValueError, match="logit difference.*made for a batch of 3"):
        sweep(patching_metric=other.metrics["difference"])


def test_a_metric_that_is_all_rounding_is_no_mismatch() -> None:
    """The logits are centred, so their mean is 0 but for the last bits."""
    found = sweep(
        kind="attn_head_pattern_dest_src_pos",
        patching_metric=lambda logits: logits.mean(),
        check=60,
    )
    assert found.abs().max() < 1e-6


@pytest.mark.parametrize("read", [3.0, b"", None, torch.zeros(2), torch.zeros(2, 3)])
def test_a_metric_whose_parts_are_of_the_wrong_kind_gets_all_logits(read: Any) -> None:
    """It is believed no further than a comparison on the corrupted run goes."""

    class Odd:
        positions, tokens = [[0], [0]], None
        read = staticmethod(lambda logits: logits)
        from_read = staticmethod(lambda logits: read)
        __call__ = staticmethod(oracle.all_logits)

    assert torch.equal(sweep(patching_metric=Odd()), sweep(patching_metric=oracle.all_logits))


def test_a_value_on_another_device_is_brought_to_that_of_the_logits() -> None:
    """The meta device stands for the other one: it has no numbers, but it is there everywhere."""
    logits = torch.zeros(2, 6, tiny.D_VOCAB, device="meta")
    value = scoring.measured("m", lambda logits: torch.tensor(3.0), logits, per_example=False)
    assert value.device == logits.device


def test_a_metric_on_a_device_without_numbers_is_refused() -> None:
    """A tensor of another device is copied over; one of the meta device holds nothing to copy."""
    with pytest.raises(TypeError, match="'metric' must return a number or a tensor"):
        sweep(patching_metric=lambda logits: oracle.all_logits(logits).to("meta"))


# ---- models


def test_training_mode_is_refused_and_left_as_it_is(no_forward: None) -> None:
    model = tiny.fresh("gpt2")
    model.blocks[1].mlp.train()
    with pytest.raises(ValueError, match=r"the model is in training mode \(.*blocks.1.*eval\(\)"):
        sweep(model=model)
    assert model.blocks[1].mlp.training


@pytest.mark.parametrize("dtype", checks.FEWEST_BITS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama-gqa"])
def test_half_precision_is_served_and_warns_once_of_the_error_it_has(
    architecture: str, dtype: torch.dtype
) -> None:
    model = tiny.fresh(architecture)
    model.to(dtype)
    data = make_pair(model)
    errors = []
    with pytest.warns(UserWarning, match="the model runs in") as caught:
        for kind in ("resid_pre", "attn_head_out_by_pos"):
            arguments = (model, data.corrupted, data.cache, data.metrics["difference"])
            found = getattr(patching, f"get_act_patch_{kind}")(*arguments, progress=False)
            assert found.dtype == torch.float32
            full = sweep(architecture, kind=kind)
            errors.append(float((found - full).abs().max() / (full.max() - full.min())))
    (said,) = {str(w.message) for w in caught if "runs in" in str(w.message)}
    assert len([w for w in caught if "runs in" in str(w.message)]) == 1
    name, percent = re.search(r"runs in (\w+): expect errors of about (\d+)%", said).groups()
    assert name == str(dtype).removeprefix("torch.")
    # The largest error of all cells is of the order that the warning says.
    assert int(percent) / 1000 < max(errors) < 2 * int(percent) / 100


@pytest.mark.parametrize("architecture", ["gpt2", "llama-gqa"])
def test_double_precision_stays_double(architecture: str) -> None:
    model = tiny.fresh(architecture).double()
    data = make_pair(model)
    arguments = (model, data.corrupted, data.cache, data.metrics["difference"])
    found = patching.get_act_patch_attn_head_k_by_pos(*arguments, progress=False, check=5)
    assert found.dtype == torch.float64
    with torch.no_grad(), oracle.quiet():
        wanted = oracle.plain_patching.get_act_patch_attn_head_k_by_pos(*arguments)
    # The plain loop stores float32.
    assert_close(found.float(), wanted, metric_axis=False)
    # And twice as many digits as single precision has are right.
    with torch.no_grad():
        logits = model(data.corrupted)
    base = data.metrics["difference"](logits)
    assert abs(float(found[0, 0, 0] - base)) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.blocks[1].mlp.to("meta"), r"on the meta device, where there are no numbers"),
        (lambda m: m.original_model.to("meta"), r"on the meta device, where there are no numbers"),
        (
            lambda m: setattr(m.original_model.config, "is_encoder_decoder", True),
            "encoder-decoder models are not supported",
        ),
        (
            lambda m: setattr(m.cfg, "attention_dir", "bidirectional"),
            "the model attends in both directions",
        ),
    ],
)
def test_models_that_cannot_be_swept_are_refused(
    change: Any, message: str, no_forward: None
) -> None:
    model = tiny.fresh("gpt2")
    change(model)
    with pytest.raises(ValueError, match=message):
        sweep(model=model)


def test_a_real_encoder_is_refused() -> None:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=tiny.D_VOCAB,
        max_position_embeddings=tiny.N_CTX,
    )
    config._attn_implementation = "eager"
    model = TransformerBridge.boot_transformers(
        "google-bert/bert-base-uncased",
        hf_model=BertForMaskedLM(config),
        tokenizer=tiny.tokenizer(),
        device="cpu",
    ).eval()
    with pytest.raises(ValueError, match="attends in both directions"):
        sweep(model=model)


@pytest.mark.parametrize("model", [None, "gpt2", torch.nn.Linear(2, 2), SimpleNamespace(blocks=[])])
def test_something_else_than_a_bridge_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="the model must be a TransformerBridge of a decoder"):
        sweep(model=model)


def test_a_plain_hugging_face_model_is_refused() -> None:
    with pytest.raises(TypeError, match="got GPT2LMHeadModel: see .*boot_transformers"):
        sweep(model=tiny.fresh("gpt2").original_model)


@pytest.mark.parametrize("where", ["src_layer", "src_head"])
def test_a_truth_value_is_no_head(where: str) -> None:
    """As an index it would add a dimension."""
    data, place = pair("gpt2"), {"src_layer": 0, "src_head": 0}
    with pytest.raises(ValueError, match=f"{where} must be a whole number .* got True"):
        patching.get_act_patch_direct_path(
            tiny.model("gpt2"),
            data.corrupted,
            data.cache,
            oracle.corrupted_cache("gpt2"),
            oracle.all_logits,
            **{**place, where: True},
            verbose=False,
        )


# ---- warnings


def warning_sweeps() -> dict[str, Any]:
    """Each warning of the package, by its words, and a sweep that gives it."""
    half = tiny.fresh("gpt2").half()
    return {
        "there is nothing to patch": lambda: sweep(corrupted_tokens=pair("gpt2").clean),
        "takes the plain loop": lambda: patching.generic_activation_patch(
            tiny.model("gpt2"),
            pair("gpt2").corrupted,
            pair("gpt2").cache,
            oracle.all_logits,
            lambda activation, index, clean: activation,
            "resid_pre",
            ["layer"],
            progress=False,
        ),
        "runs in float16": lambda: sweep(model=half),
    }


@pytest.mark.parametrize("words", warning_sweeps())
def test_a_filter_for_the_package_finds_its_warnings(words: str) -> None:
    call = warning_sweeps()[words]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"patching_demo\Z")
        call()
    (warning,) = caught
    assert words in str(warning.message)
    assert warning.filename == __file__, "it points to the line that called"
    checks._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"patching_demo\Z")
        with pytest.raises(UserWarning, match=words):
            call()
