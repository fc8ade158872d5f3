"""Refusals: inputs for which a sweep would give a plausible number that means nothing.

Every check runs before the first forward pass, and every message names the value and the way out.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patching_demo.engine.bridge import (
    Run,
    block_kind,
    block_output,
    growing_axes,
    hook_point,
    hooked,
)
from patching_demo.engine.cells import Cell
from patching_demo.engine.kinds import KINDS, kind_of_hook
from patching_demo.engine.tokens import (
    check_ids,
    check_length,
    devices_of_weights,
    key_value_heads,
    pads,
    whole_numbers,
)

#: Types of few bits, and the error to expect in a cell, as a share of the sweep's range.
FEWEST_BITS = {torch.float16: 0.01, torch.bfloat16: 0.1}


class HookNotLive(ValueError):
    """A hook that a sweep would patch in vain.

    Attributes:
        hook: its name.
    """

    def __init__(self, hook: str, called: bool) -> None:
        self.hook, self._called = hook, called
        super().__init__(
            f"hook {hook!r} is not live on this model: it is called, but what it returns changes "
            "nothing (the attention is computed elsewhere), so it would read as zero everywhere. "
            "Sweep another activation, for instance the heads' outputs"
            if called
            else f"hook {hook!r} is not live on this model: a forward pass never calls it, so "
            "every cell would read as zero effect (some hooks need a switch, for instance "
            "model.set_use_attn_result(True))"
        )

    def __reduce__(self) -> Any:  # Workers send it to the process that asked.
        return HookNotLive, (self.hook, self._called)


def without_dead_kinds(kinds: Sequence[str], swept: Callable[[Sequence[str]], Any]) -> Any:
    """What ``swept`` returns for the kinds whose hooks are live; a warning names the others.

    Raises:
        HookNotLive: if no kind is left, or a hook of no kind is not live.
    """
    live = list(kinds)
    while True:
        try:
            return swept(live)
        except HookNotLive as reason:
            left = [name for name in live if not reason.hook.endswith(KINDS[name].hook)]
            if not left or left == live:
                raise
            gone = ", ".join(name for name in live if name not in left)
            warn_once(f"{gone!r} is NaN in this sweep, as {reason}")
            live = left


def check_bridge(model: Any, *parts: str) -> None:
    """Refuse what has not these parts of a ``TransformerBridge``, by default its config.

    Raises:
        TypeError: for a Hugging Face model, a name, or arguments in another order.
    """
    if not all(hasattr(model, part) for part in parts or ("cfg",)):
        raise TypeError(
            f"the model must be a TransformerBridge of a decoder, got {type(model).__name__}: "
            "see transformer_lens.model_bridge.TransformerBridge.boot_transformers. The model is "
            "the first argument"
        )


def checked_model(model: Any) -> None:
    """Refuse models whose sweep would be wrong.

    Raises:
        TypeError: if the model is not a TransformerBridge with blocks.
        ValueError: if it is in training mode, an encoder, or has weights that hold no numbers.
    """
    original = getattr(model, "original_model", None)
    config = getattr(original, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("encoder-decoder models are not supported: patch a decoder-only model")
    check_bridge(model, "cfg", "blocks", "run_with_hooks")
    walked: set[torch.nn.Module] = set()
    training = [
        name or "the model"
        for root in (model, original)
        if isinstance(root, torch.nn.Module)
        for name, module in root.named_modules(walked)
        if module.training
    ]
    if training:
        raise ValueError(
            f"the model is in training mode ({training[0]}), where dropout makes every run "
            "different: call model.eval() first"
        )
    if getattr(model.cfg, "attention_dir", "causal") == "bidirectional":
        raise ValueError("the model attends in both directions: patch a decoder-only model")
    if any(device.type == "meta" for device in devices_of_weights(model)):
        raise ValueError(
            "some weights of the model are on the meta device, where there are no numbers: load "
            "them, or let device_map of boot_transformers place them"
        )
    for dtype in {weight.dtype for weight in model.parameters()} & FEWEST_BITS.keys():
        warn_once(
            f"the model runs in {str(dtype)[6:]}: expect errors of about {FEWEST_BITS[dtype]:.0%} "
            "of the metric's range in every cell"
        )


def checked_tokens(model: Any, tokens: Any, masked: bool = False) -> Tensor:
    """Tokens as int64 ``[batch, pos]`` on the model's device.

    ``masked`` says that an attention mask tells what is padding, which is then not looked for.

    Raises:
        TypeError: if they are text, or not whole numbers.
        ValueError: if the shape, the length or a token id does not fit the model.
    """
    if isinstance(tokens, str) or (
        isinstance(tokens, Sequence) and tokens and isinstance(tokens[0], str)
    ):
        raise TypeError("corrupted_tokens must be token ids: pass model.to_tokens(prompts)")
    tokens = whole_numbers(tokens, "corrupted_tokens")
    if tokens.ndim != 2:
        raise ValueError(
            f"corrupted_tokens must be [batch, pos], got shape {tuple(tokens.shape)}: for one "
            "prompt use tokens[None]"
        )
    check_ids(model, tokens, "corrupted_tokens")
    check_length(model, tokens.shape[1], "each row of corrupted_tokens")
    tokens = tokens.to(devices_of_weights(model)[0])
    if not masked:
        _refuse_left_padding(model, tokens)
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    if tokens.shape[1] > 2 and bos is not None and bool((tokens[:, :2] == bos).all()):
        warn_once(_TWICE.format(bos))
    return tokens


_TWICE = (
    "every prompt begins with the token {} twice: a tokenizer puts a BOS before text that a chat "
    "template gave one already (model.to_tokens(prompts, prepend_bos=False))"
)


def _refuse_left_padding(model: Any, tokens: Tensor) -> None:
    """A patched run takes no attention mask, so pads before the text would be attended to."""
    pad, sure, may = pads(model, tokens, "left")
    rows = sure.any(dim=1).nonzero()
    if tokens.shape[1] > 1 and len(rows):
        raise ValueError(
            f"prompt {int(rows[0])} is padded on the left (it starts with the pad token {pad}), "
            "and a sweep takes no attention mask: pad on the right and read each prompt's own last "
            "token (patching_demo.prompt_task does), or use prompts of equal length"
        )
    if tokens.shape[1] > 2 and may.any():
        warn_once(_TWICE.format(pad))


def refuse_reading_pads(
    model: Any,
    tokens: Tensor,
    logits: Tensor,
    metrics: Mapping[str, Callable[[Tensor], Tensor]],
    lengths: Tensor | None = None,
) -> None:
    """Refuse metrics that read where a prompt is padded on the right.

    Found out by changing the logits there, as a function does not say where it reads. ``lengths``
    of the prompts ``[batch]``, where they are known, tell padding from text; where not, a token
    that may be either is warned of.

    Raises:
        ValueError: if a metric's value depends on the logits at a pad.
    """
    if lengths is None:
        _, sure, may = pads(model, tokens, "right")
    else:
        every = torch.arange(tokens.shape[1], device=tokens.device)
        sure = every >= lengths[:, None].to(tokens.device)
        may = torch.zeros_like(sure)
    for name, metric in metrics.items() if (sure | may).any() else ():
        # What the metric may change is a copy. Copies of all logits are large: few are made.
        reads = partial(_reads, metric, metric(logits.clone()), logits)
        if (row := _first_row(reads, sure)) is not None:
            raise ValueError(
                f"prompt {row} is padded on the right with the pad token {int(tokens[row, -1])}, "
                f"and metric {name!r} reads there: read each prompt's own last token "
                "(patching_demo.metrics takes positions, patching_demo.prompt_task finds them)"
            )
        if (row := _first_row(reads, may)) is not None:
            warn_once(
                f"prompt {row} ends in token {int(tokens[row, -1])}, which ends texts and pads "
                f"them, and metric {name!r} reads there: if it is padding, read the token before "
                "it, and pass attention_mask to be sure"
            )


def _first_row(reads: Callable[[Tensor], bool], where: Tensor) -> int | None:
    """The first prompt that is read ``where [batch, pos]``, None if none is."""
    if not reads(where):
        return None
    rows = where.any(dim=1).nonzero()[:, 0].tolist()
    alone = torch.eye(len(where), dtype=torch.bool, device=where.device)[..., None]
    return next((row for row in rows if reads(where & alone[row])), rows[0])


def _reads(
    metric: Callable[[Tensor], Tensor], value: Tensor, logits: Tensor, where: Tensor
) -> bool:
    """Whether the metric, which has this value, depends on the logits ``where [batch, pos]``."""
    if not where.any():
        return False
    changed = logits.clone()
    # In each prompt by another factor, so that equal prompts do not cancel each other.
    factors = 2 + where.nonzero()[:, :1].to(logits) / len(where)
    changed[where] = 1 - factors * logits[where].flip(-1)
    # NaN in both is another mistake, and has its own message.
    return not torch.allclose(metric(changed), value, 0, 0, equal_nan=True)


def checked_activation(
    model: Any, cache: Mapping[str, Tensor], name: str, tokens: Tensor, which: str = "clean"
) -> Tensor:
    """One activation of the clean (or the corrupted) cache, checked against the corrupted tokens.

    Raises:
        ValueError: if the model has no such hook, the cache has no such entry, or its shape
            belongs to other prompts or another model.
    """
    if hook_point(model, name) is None:
        raise ValueError(
            f"this model has no hook {name!r}: block {name.split('.')[1]} has no such activation "
            "(a parallel block has no resid_mid, an attention-only block no mlp_out)"
        )
    ending = name.split(".", 2)[-1]
    activation = _entry(cache, name)
    if activation is None:
        raise ValueError(
            f"the {which} cache has no {name!r}: make it with model.run_with_cache({which}_tokens)"
            f", or with a names_filter that keeps names ending in {ending!r}"
        )
    if not isinstance(activation, Tensor):
        raise ValueError(f"{name!r} in the {which} cache is a {type(activation).__name__}")
    beyond = f"blocks.{model.cfg.n_layers}.{ending}"
    if _entry(cache, beyond) is not None:
        raise ValueError(
            f"the {which} cache has {beyond!r}, but this model has only {model.cfg.n_layers} blocks"
            ": the cache must come from this model"
        )
    kind = kind_of_hook(name)
    shape = tuple(activation.shape)
    # What is not in the table is compared with the corrupted run's own, see Survey.
    axes = kind.axes if kind else ("batch",)
    expected = _expected_sizes(model, axes, tokens)
    fits = all(e in (None, size) for e, size in zip(expected, shape, strict=False))
    if not fits or len(shape) < len(axes) or (kind and len(shape) > len(axes)):
        need = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(
            f"{name!r} in the {which} cache has shape {shape}, the corrupted tokens need [{need}] "
            f"({', '.join(axes)}): {_misfit(cache, shape, axes, expected)}"
        )
    _refuse_other_layouts(model, name, tokens)
    # -inf stands in masked scores; Survey compares it with the corrupted run's.
    bad = activation.isnan() | (activation.isinf() & (activation > 0 if kind is None else True))
    if bad.any():
        raise ValueError(f"{name!r} in the {which} cache holds NaN or infinity")
    return activation


def _refuse_other_layouts(model: Any, name: str, tokens: Tensor) -> None:
    """Refuse a hook that has heads where others have positions, if its shape does not show it."""
    kind, heads = kind_of_hook(name), (model.cfg.n_heads, key_value_heads(model))
    if kind is None or not kind.of_heads or tokens.shape[1] not in heads:
        return
    wanted = tuple(axis for axis, what in enumerate(kind.axes) if what in ("pos", "source"))
    found = growing_axes(model, name, tokens)
    if found != wanted:
        raise ValueError(
            f"hook {name!r} has another layout on this model (multi-head latent attention has): "
            f"its positions are in axis {list(found)} and not {list(wanted)}, so patching a head "
            "would patch a position. Sweep the residual stream or the attention's output instead"
        )


def _entry(cache: Mapping[str, Any], name: str) -> Any:
    """An entry of a cache, None if it has no such entry or is no cache at all."""
    try:
        return cache[name]
    except (KeyError, TypeError, IndexError):
        return None


def refuse_uncalled_hooks(
    model: Any, tokens: Tensor, cache: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Tell hooks that a cache lacks because the model never calls them from a cache too narrow.

    Raises:
        HookNotLive: if the cache lacks a hook that a forward pass does not call.
    """
    missing = [n for n in names if _entry(cache, n) is None and hook_point(model, n) is not None]
    if not missing:
        return
    called: set[str] = set()
    with ExitStack() as stack, torch.no_grad():
        for name in missing:
            note = partial(lambda name, activation, hook=None: called.add(name), name)
            stack.enter_context(hooked(model, name, note))
        model(tokens[:1], return_type="logits")
    for name in missing:
        if name not in called:
            raise HookNotLive(name, called=False)


def refuse_dead_hooks(model: Any, tokens: Tensor, run: Run | None, cells: Sequence[Cell]) -> None:
    """Refuse hooks that can be read but not patched.

    Where a model's attention is computed elsewhere, the hook is called with a finished copy, and
    what it returns goes nowhere. Found by returning NaN from it, once for each kind of block: one
    block is run where the engine runs blocks, else the model.

    Raises:
        HookNotLive: if the output does not depend on what the hook returns.
    """
    tried: set[Any] = set()
    patches = {patch.hook_name: patch for cell in cells for patch in cell.patches}
    for name, patch in patches.items():
        if run is not None and patch.enters != "hook":
            continue  # The residual stream itself is set, not a hook.
        kind = (name.split(".", 2)[-1], block_kind(model, patch.layer))
        if kind in tried:
            continue
        tried.add(kind)
        try:
            # TransformerLens says so itself, in its own way, and not for every model.
            with hooked(model, name, _not_a_number), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                patched = _output(model, tokens, run, patch.layer)
        except Exception:
            _output(model, tokens, run, patch.layer)  # It fails on NaN alone, which arrives then.
            continue
        if patched.isnan().any():
            continue
        if torch.equal(patched, _output(model, tokens, run, patch.layer)):
            raise HookNotLive(name, called=True)


def _output(model: Any, tokens: Tensor, run: Run | None, layer: int) -> Tensor:
    if run is None:
        return model(tokens, return_type="logits")
    return block_output(model, run, layer)


def _not_a_number(activation: Tensor, hook: Any = None) -> Tensor:
    return torch.full_like(activation, float("nan"))


def _expected_sizes(model: Any, axes: Sequence[str], tokens: Tensor) -> list[int | None]:
    """The size of each axis of an activation, None for any."""
    sizes = {
        "batch": tokens.shape[0],
        "pos": tokens.shape[1],
        "source": tokens.shape[1],
        "head": model.cfg.n_heads,
        "kv_head": key_value_heads(model),
        "d_model": model.cfg.d_model,
    }
    return [sizes.get(axis) for axis in axes]


def _misfit(cache: Any, shape: Sequence[int], axes: Sequence[str], sizes: Sequence[Any]) -> str:
    """Why a shape is not the expected one, as far as it can be told."""
    if len(shape) == len(axes) - 1:
        return "the cache has no batch axis (was it taken off by remove_batch_dim()?): keep it"
    got = dict(zip(axes, shape, strict=False))
    want = dict(zip(axes, sizes, strict=True))
    if "d_head" in axes and len(shape) == 4:
        if [*shape[:3]] == [sizes[0], sizes[2], sizes[1]]:
            return "this model's hook has heads before positions, so it cannot be swept by head"
        if all(got[axis] == want[axis] for axis in ("batch", "pos")):
            return (
                "the number of heads is another: the cache must come from this model, and a model "
                "whose hook does not split its heads like this cannot be swept by head"
            )
    return (
        "clean and corrupted prompts must have the same number of prompts and of tokens, and the "
        "cache must come from this model"
    )


_INNER = ("patching_demo.", "torch.")  # What lies between a warning and who caused it.
_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn, but not a second time with the same words.

    The warning points to the caller's line. Its module is given as ``patching_demo``, so that
    filters for this package find it.
    """
    if message in _warned:
        return
    _warned.add(message)
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(_INNER):
        frame = frame.f_back
    warnings.warn_explicit(
        message, UserWarning, frame.f_code.co_filename, frame.f_lineno, module="patching_demo"
    )


def warned_of() -> list[str]:
    """What was warned of since the last call; from now on it is warned of again."""
    messages = sorted(_warned)
    _warned.clear()
    return messages
