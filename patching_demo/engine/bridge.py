"""The one place that reaches inside a ``TransformerBridge``.

The sweep engine needs four things that TransformerLens does not offer as calls: what a forward
pass handed to each block, the keys and values each block computed, a way to run one block on
rows of our own making, and the step from the last residual stream to logits. They live here, so
that a TransformerLens release that moves one of them breaks one file, and the tests of this
module say which.

Nothing here knows a model by its name. A block is served if its arguments are ones we know how
to slice; anything else raises :class:`Unsupported`, and the sweep takes the plain loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformer_lens.model_bridge.sources.native.model import NativeAttention

from patching_demo.engine.cells import Patch
from patching_demo.engine.tokens import devices_of_weights

CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")

# A module and the name of a bool buffer ``[..., slot, slot]`` in it.
SlotMask = tuple[torch.nn.Module, str]


class Unsupported(Exception):
    """A model or input that the fast engine cannot serve exactly; says why."""


@dataclass
class Run:
    """One forward pass with everything needed to resume it at any layer and position.

    Attributes:
        tokens: ``[batch, pos]``.
        logits: ``[batch, pos, d_vocab]``.
        resid: the residual stream before each block and, last, after the final one: a list of
            n_layers + 1 tensors ``[batch, pos, d_model]``.
        keys: per layer ``[batch, kv_head, pos, d_head]`` as the block's attention used them.
        values: the same for values.
        arguments: per layer, the other arguments the block was called with, by name.
        slot_masks: per layer, masks that the block's own modules keep (local attention).
        logit_scale: what the model multiplies its unembedding by, a number measured on the run.
    """

    tokens: Tensor
    logits: Tensor
    resid: list[Tensor]
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)
    slot_masks: list[list[SlotMask]] = field(default_factory=list)
    logit_scale: float = 1.0


class _Recorder:
    """Stands in for a key-value cache and keeps what one layer writes to it."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        # A real cache is of the keys' type, and joining widens the values to it.
        self.keys, self.values = keys, values.to(torch.promote_types(keys.dtype, values.dtype))
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> int:
        return 0


class _Prefix:
    """Stands in for a key-value cache that holds a fixed prefix, one for all groups of a pack.

    A Hugging Face cache grows when it is used, so one object cannot serve several runs. This one
    never changes.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return _behind(self.keys, keys), _behind(self.values, values)

    def get_seq_length(self, *_: Any) -> int:
        return self.keys.shape[2]


def _behind(prefix: Tensor, own: Tensor) -> Tensor:
    """``own`` [group * batch, kv_head, slot, d_head] behind a prefix [batch, kv_head, pos, d_head].

    The same as repeating the prefix for every group and joining the two, with one copy.
    """
    length = prefix.shape[2]
    shape = (*own.shape[:2], length + own.shape[2], own.shape[3])
    joined = own.new_empty(shape, dtype=torch.promote_types(prefix.dtype, own.dtype))
    joined.unflatten(0, (-1, len(prefix)))[..., :length, :] = prefix
    joined[:, :, length:] = own
    return joined


class _KeysComputed(Exception):
    """Leaves a block as soon as it has the keys and values."""


class _KeysOnly(_Prefix):
    """Takes a block's keys and values, and stops the block there."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = super().update(keys, values)
        raise _KeysComputed


class _Complete(_Prefix):
    """Holds the keys and values of every token, those of the rows being run among them."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


def capture(model: Any, tokens: Tensor) -> Run:
    """Run the model once on ``tokens`` [batch, pos] and keep what resuming it needs.

    Raises:
        Unsupported: if the model's blocks are not called with a hidden state they return, write
            no keys and values to a cache, or want more of a cache than a stand-in has.
    """
    n_layers, at_home = len(model.blocks), partial(moved, device=tokens.device)
    hidden: list[Tensor | None] = [None] * (n_layers + 1)
    recorders = [_Recorder() for _ in range(n_layers)]
    arguments: list[dict[str, Any]] = [{} for _ in range(n_layers)]

    def before(layer: int) -> Callable[..., Any]:
        def hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            names, named = _named_arguments(block, args, kwargs)
            states = named.pop(names[0], None)
            if not isinstance(states, Tensor) or states.shape[:2] != tokens.shape:
                raise Unsupported(f"block {layer} is not called with hidden states [batch, pos, .]")
            # A copy, as the patch setters of the field write in place.
            hidden[layer] = at_home(states).clone()
            for name in CACHE_ARGUMENTS:
                # A block that takes a cache is handed one, also where the model makes none.
                if name in named or name in names:
                    named[name] = recorders[layer]
            arguments[layer] = {name: at_home(value) for name, value in named.items()}
            return (states,), named

        return hook

    def after_last(block: Any, args: tuple[Any, ...], output: Any) -> None:
        hidden[n_layers] = at_home(tensor_of(output)).clone()

    handles: list[Any] = []
    try:
        for layer, block in enumerate(model.blocks):
            handles.append(block.register_forward_pre_hook(before(layer), with_kwargs=True))
            handles += _listen_to_native(block, recorders[layer])
        handles.append(model.blocks[-1].register_forward_hook(after_last))
        logits = at_home(model(tokens, return_type="logits"))
    except (Unsupported, torch.OutOfMemoryError):
        raise
    except Exception as error:  # Whatever it is, the plain loop meets it too if it is the model's.
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Unsupported(f"the model fails with a stand-in for its cache ({what})") from error
    finally:
        for handle in handles:
            handle.remove()
    if any(states is None for states in hidden):
        raise Unsupported("not every block ran in a forward pass")
    for layer, recorder in enumerate(recorders):
        _rotate_native(model.blocks[layer], recorder, arguments[layer])
        if recorder.keys is None or recorder.values is None:
            raise Unsupported(f"block {layer} writes no keys and values to a cache")
    return Run(
        tokens=tokens,
        logits=logits,
        resid=[states for states in hidden if states is not None],
        keys=[recorder.keys for recorder in recorders],
        values=[recorder.values for recorder in recorders],
        arguments=arguments,
        slot_masks=_take_slot_masks(model, arguments, hidden[-1], tokens.shape[1]),
        logit_scale=_logit_scale(model, hidden[-1], logits),
    )


def _take_slot_masks(
    model: Any, arguments: list[dict[str, Any]], resid: Tensor, n_pos: int
) -> list[list[SlotMask]]:
    """Find masks that modules of a block keep as buffers, and make them part of its argument.

    Such a mask goes by slot, so :func:`run_block` puts it out of force; what it hides besides the
    future (all but a window, in local attention) is gathered by position with the block's mask.
    """
    found: list[list[SlotMask]] = []
    causal = torch.ones(n_pos, n_pos, dtype=torch.bool, device=resid.device).tril()
    for block, named in zip(model.blocks, arguments, strict=True):
        found.append([])
        for module in block.modules():
            for name, buffer in module._buffers.items():
                if buffer is None or buffer.dtype != torch.bool or buffer.ndim < 2:
                    continue
                square = buffer.shape[-1] == buffer.shape[-2] >= n_pos
                if not square or buffer.numel() != buffer.shape[-1] ** 2:
                    continue
                found[-1].append((module, name))
                mask = buffer.reshape(buffer.shape[-2:])[:n_pos, :n_pos].to(resid.device)
                visible = mask if mask[0, 0] else ~mask
                if not (visible | ~causal).all():
                    usual = _additive(named.get("attention_mask"), resid, n_pos)
                    lowest = torch.finfo(resid.dtype).min
                    named["attention_mask"] = usual.masked_fill(~visible, lowest)
    return found


def _logit_scale(model: Any, resid: Tensor, logits: Tensor) -> float:
    """The factor between the unembedding of the last residual stream and the logits.

    Some models scale their logits after the unembedding. Measured at one position; 1 if it is 1
    to rounding, or if there is a soft cap in between.
    """
    try:
        usual = logits_from_resid(model, resid[:1, -1:])
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return 1.0
    one, other = (
        part.detach().to("cpu", torch.float32).flatten() for part in (usual, logits[0, -1])
    )
    capped = getattr(model.cfg, "output_logits_soft_cap", None) or 0.0
    if capped > 0 or one.shape != other.shape or not (one @ one > 0):
        return 1.0
    scale = float(one @ other / (one @ one))
    return 1.0 if abs(scale - 1) <= 16 * torch.finfo(logits.dtype).eps else scale


def _native_attention(block: Any) -> NativeAttention | None:
    """The attention of TransformerLens's own models, the one that takes no key-value cache."""
    attention = getattr(getattr(block, "attn", None), "original_component", None)
    return attention if isinstance(attention, NativeAttention) else None


def _listen_to_native(block: Any, recorder: _Recorder) -> list[Any]:
    """Keep the keys and values that a native attention computes; gives the hooks to remove."""
    attention = _native_attention(block)
    if attention is None:
        return []

    def keep(what: str) -> Callable[..., None]:
        def hook(linear: Any, args: tuple[Any, ...], output: Tensor) -> None:
            heads = output.unflatten(-1, (attention.n_kv_heads, attention.d_head))
            setattr(recorder, what, heads.transpose(1, 2))

        return hook

    return [
        attention.k.register_forward_hook(keep("keys")),
        attention.v.register_forward_hook(keep("values")),
    ]


def _rotate_native(block: Any, recorder: _Recorder, arguments: dict[str, Any]) -> None:
    attention = _native_attention(block)
    if attention is not None and attention.rotary is not None and recorder.keys is not None:
        positions = arguments.get("position_ids")
        keys = recorder.keys
        _, recorder.keys = attention.rotary.apply_rope(keys, keys, position_ids=positions)


def _native_with_cache(
    attention: NativeAttention,
    cache: _Prefix,
    hidden_states: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None = None,
    pattern_fn: Callable[[Tensor], Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """What ``NativeAttention.forward`` computes, with a cache before it and an additive mask."""
    q, k, v = (
        linear(hidden_states).unflatten(-1, (-1, attention.d_head)).transpose(1, 2)
        for linear in (attention.q, attention.k, attention.v)
    )
    if attention.rotary is not None:
        q, k = attention.rotary.apply_rope(q, k, position_ids=position_ids)
    k, v = cache.update(k, v)
    if attention.kv_repeats > 1:
        k, v = (part.repeat_interleave(attention.kv_repeats, dim=1) for part in (k, v))
    scores = q @ k.transpose(-2, -1) / attention.scale
    if (cap := attention.attn_scores_soft_cap) > 0:
        scores = cap * torch.tanh(scores / cap)
    pattern = torch.softmax(scores + attention_mask, dim=-1)
    if pattern_fn is not None:
        pattern = pattern_fn(pattern)
    return attention.o((pattern @ v).transpose(1, 2).flatten(2)), pattern


def _named_arguments(
    block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names that the wrapped block gives its arguments, and all arguments by name.

    By its class, as an instance may carry a wrapper of ``forward`` that names none.
    """
    names = _parameter_names(type(block.original_component).forward)[1:]
    return names, {**dict(zip(names, args, strict=False)), **kwargs}


@cache
def _parameter_names(method: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(method).parameters)


def tensor_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, or a tuple of some, on a device; anything else as it is.

    Blocks may stand on several devices. What is between them, and what goes by position, stays
    where the tokens are; a block brings its inputs to its own device.
    """
    if isinstance(value, tuple):
        parts = tuple(moved(part, device) for part in value)
        return value if all(map(is_, parts, value)) else parts
    return value.to(device) if isinstance(value, Tensor) else value


def block_output(model: Any, run: Run, layer: int) -> Tensor:
    """One block on the run's own input, all of it: ``[batch, pos, d_model]``."""
    arguments = {
        name: _Recorder() if isinstance(value, _Recorder) else value
        for name, value in run.arguments[layer].items()
    }
    states = run.resid[layer].clone()
    return tensor_of(model.blocks[layer](states, **arguments)).to(states.device)


def block_kind(model: Any, layer: int) -> tuple[type, ...]:
    """Blocks of the same kind compute in the same way, and differ in weights at most."""
    attention = getattr(model.blocks[layer], "attn", None)
    parts = (attention, getattr(attention, "original_component", None))
    return (type(model.blocks[layer]), *map(type, parts))


@dataclass
class Layout:
    """Where in a pack each recomputed token sits.

    A pack is a stack of ``groups`` sequences of ``slots`` tokens. A slot holds one position of
    one patched run, its owner; a token attends to the unpatched prefix before its owner's first
    recomputed position and to its owner's own earlier tokens, never to another run's.

    Attributes:
        positions: int64 ``[group, slot]``, the position in the prompt.
        owner: int64 ``[group, slot]``, which patched run; -1 in a slot not used.
        start: int64 ``[group, slot]``, the owner's first recomputed position.
        prefix: how many prefix positions any token of the pack can see.
        columns: int64 ``[group, column]``, the positions that can be attended to: the prefix,
            then the slots.
        column_owner: int64 ``[group, column]``, -2 for the prefix.
    """

    positions: Tensor
    owner: Tensor
    start: Tensor
    prefix: int
    columns: Tensor | None = None
    column_owner: Tensor | None = None
    _arguments: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.columns is not None:
            return
        groups = len(self.positions)
        before = torch.arange(self.prefix, device=self.positions.device).expand(groups, -1)
        self.columns = torch.cat([before, self.positions], dim=1)
        self.column_owner = torch.cat([torch.full_like(before, -2), self.owner], dim=1)

    def visible(self) -> Tensor:
        """Which columns each slot may attend to: bool ``[group, slot, column]``."""
        before = self.columns[:, None, :] < self.start[:, :, None]
        own = self.owner[:, :, None] == self.column_owner[:, None, :]
        return torch.where(self.column_owner[:, None, :] == -2, before, own)


def groups_of(layout: Layout, groups: Tensor) -> Layout:
    """The layout of some groups alone."""
    return Layout(
        positions=layout.positions[groups],
        owner=layout.owner[groups],
        start=layout.start[groups],
        prefix=layout.prefix,
    )


def rows_of(layout: Layout, slots: Tensor) -> Layout:
    """The layout of some slots ``[group, n]`` alone, which still attend to all others."""
    return Layout(
        positions=layout.positions.gather(1, slots),
        owner=layout.owner.gather(1, slots),
        start=layout.start.gather(1, slots),
        prefix=layout.prefix,
        columns=layout.columns,
        column_owner=layout.column_owner,
    )


def run_block_rows(
    model: Any, run: Run, layer: int, layout: Layout, states: Tensor, slots: Tensor
) -> Tensor:
    """As :func:`run_block`, for some slots ``[group, n]`` only: ``[group, batch, n, d_model]``.

    The other tokens are run no further than their keys and values.
    """
    batch, d_model = states.shape[1], states.shape[3]
    cache = _prefix_cache(run, layer, layout, _KeysOnly)
    try:
        _call_block(model, run, layer, layout, states.flatten(0, 1), cache)
        raise Unsupported(f"block {layer} does not use the key-value cache it is given")
    except _KeysComputed:
        pass
    rows = states.gather(2, slots[:, None, :, None].expand(-1, batch, -1, d_model))
    cache = _Complete(cache.keys, cache.values)
    output = _call_block(model, run, layer, rows_of(layout, slots), rows.flatten(0, 1), cache)
    return output.reshape(rows.shape)


def _prefix_cache(run: Run, layer: int, layout: Layout, kind: type[_Prefix]) -> _Prefix:
    """The corrupted run's keys and values before the pack."""
    return kind(*(part[:, :, : layout.prefix] for part in (run.keys[layer], run.values[layer])))


def _call_block(
    model: Any, run: Run, layer: int, layout: Layout, rows: Tensor, cache: _Prefix
) -> Tensor:
    """One block on ``rows`` [group * batch, slot, d_model], attending to ``cache`` as well."""
    block = model.blocks[layer]
    arguments = {
        name: cache if isinstance(value, _Recorder) else value
        for name, value in _pack_arguments(run, layer, layout).items()
    }
    attention = _native_attention(block)
    if attention is not None:
        attention.forward = partial(_native_with_cache, attention, cache)
    kept = [module._buffers[name] for module, name in run.slot_masks[layer]]
    for (module, name), mask in zip(run.slot_masks[layer], kept, strict=True):
        length = layout.columns.shape[1]
        visible = mask[(0,) * mask.ndim].expand(*mask.shape[:-2], length, length)
        module._buffers[name] = visible
    try:
        return tensor_of(block(rows, **arguments)).to(rows.device)
    finally:
        for (module, name), mask in zip(run.slot_masks[layer], kept, strict=True):
            module._buffers[name] = mask
        if attention is not None:
            del attention.forward


def run_block(model: Any, run: Run, layer: int, layout: Layout, states: Tensor) -> Tensor:
    """Run one block on a pack, each token seeing just its own patched run.

    ``states`` and the result are ``[group, batch, slot, d_model]``. The unpatched prefix comes
    from ``run``, as cached keys and values.

    Raises:
        Unsupported: if the block takes an argument that we do not know how to slice.
    """
    cache = _prefix_cache(run, layer, layout, _Prefix)
    return _call_block(model, run, layer, layout, states.flatten(0, 1), cache).reshape(states.shape)


def _pack_arguments(run: Run, layer: int, layout: Layout) -> dict[str, Any]:
    """The captured arguments of a block, sliced to the rows and columns of a pack."""
    captured = run.arguments[layer]
    key = tuple((k, id(v)) for k, v in captured.items() if not isinstance(v, _Recorder))
    if key not in layout._arguments:
        if "attention_mask" not in captured:
            raise Unsupported(f"block {layer} takes no attention mask")
        sliced: dict[str, Any] = {}
        for name, value in captured.items():
            if name == "attention_mask":
                sliced[name] = _pack_mask(value, run, layout)
            elif name == "cache_position":
                sliced[name] = None
            elif isinstance(value, Tensor):
                sliced[name] = _take_positions(name, value, run, layout)
            elif isinstance(value, tuple):
                sliced[name] = tuple(
                    _take_positions(name, part, run, layout) if isinstance(part, Tensor) else part
                    for part in value
                )
            else:
                sliced[name] = value
        layout._arguments[key] = sliced
    return layout._arguments[key]


def _pack_mask(mask: Tensor | None, run: Run, layout: Layout) -> Tensor:
    """A block's mask, additive, for a pack: ``[group * batch or 1, head or 1, row, column]``.

    Gathering from the captured mask keeps sliding windows, padding and added biases as they are.
    """
    resid, n_pos = run.resid[0], run.tokens.shape[1]
    mask = _additive(mask, resid, n_pos)
    if len(mask) not in (1, len(run.tokens)) or mask.shape[-2:] != (n_pos, n_pos):
        raise Unsupported(f"an attention mask of shape {tuple(mask.shape)} cannot be sliced")
    gathered = mask[:, :, layout.positions[:, :, None], layout.columns[:, None, :]].transpose(1, 2)
    hidden = ~layout.visible()[:, None]
    return _flatten_batch(gathered.masked_fill(hidden, torch.finfo(resid.dtype).min), run)


def _additive(mask: Tensor | None, resid: Tensor, n_pos: int) -> Tensor:
    """An attention mask as what is added to the scores: ``[batch or 1, head or 1, pos, pos]``."""
    dtype, device = resid.dtype, resid.device
    if mask is None or mask.ndim != 4:
        causal = torch.ones(n_pos, n_pos, dtype=torch.bool, device=device).tril()[None, None]
        mask = causal if mask is None else causal & mask[:, None, None, :].to(torch.bool)
    if mask.dtype == torch.bool:
        lowest = torch.finfo(dtype).min
        mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, lowest)
    return mask


def _take_positions(name: str, value: Tensor, run: Run, layout: Layout) -> Tensor:
    """An argument of the block that goes by position, for the rows or columns of a pack.

    ``[batch or 1, pos, ...]`` becomes ``[group * batch or 1, row, ...]``. A bias for each position
    attended to, the same from everywhere (ALiBi), ``[batch * head, 1, pos]`` or
    ``[batch, head, 1, pos]``, becomes as many for each group, ``[group * ..., 1, column]``.
    """
    batch, n_pos = run.tokens.shape
    if value.ndim >= 2 and value.shape[0] in (1, batch) and value.shape[1] == n_pos:
        return _flatten_batch(value[:, layout.positions], run)
    if value.ndim >= 3 and value.shape[-2:] == (1, n_pos) and value.shape[0] % batch == 0:
        return value[..., 0, layout.columns].movedim(-2, 0).flatten(0, 1).unsqueeze(-2)
    raise Unsupported(f"an argument {name!r} of shape {tuple(value.shape)} cannot be sliced")


def _flatten_batch(value: Tensor, run: Run) -> Tensor:
    """``[batch or 1, group, ...]`` to ``[group * batch, ...]``, or ``[1, ...]`` for one group."""
    if value.shape[0] == 1 and value.shape[1] == 1:
        return value[0]
    spread = value.transpose(0, 1).expand(-1, len(run.tokens), *(-1,) * (value.ndim - 2))
    return spread.reshape(-1, *value.shape[2:])


def logits_from_resid(model: Any, resid: Tensor, scale: float = 1.0) -> Tensor:
    """Logits ``[rows, pos, d_vocab]`` of a final residual stream ``[rows, pos, d_model]``.

    ``scale`` is the run's ``logit_scale``.
    """
    logits = model.unembed(_normed(model, resid)).to(resid.device)
    return _scale_and_cap(model, logits, scale)


def _normed(model: Any, resid: Tensor) -> Tensor:
    """The final norm of streams, on the device of its weights."""
    return model.ln_final(resid.to(next(iter(devices_of_weights(model.ln_final)), resid.device)))


def some_logits_from_resid(model: Any, resid: Tensor, tokens: Tensor, scale: float = 1.0) -> Tensor:
    """Logits of a few vocabulary entries.

    ``resid`` is ``[rows, batch, pos, d_model]``, ``tokens`` ``[batch, n_tokens]``; the result is
    ``[rows, batch, pos, n_tokens]``.
    """
    flat = resid.reshape(-1, *resid.shape[-2:])
    normed = _normed(model, flat).to(resid.device).reshape(resid.shape)
    weight = model.W_U
    weight = weight[:, tokens.to(weight.device)].to(resid.device)  # [d_model, batch, n_tokens]
    logits = torch.einsum("rbpd,dbt->rbpt", normed, weight)
    bias = getattr(model, "b_U", None)
    if bias is not None:
        logits = logits + bias[tokens.to(bias.device)].to(resid.device)[:, None, :]
    return _scale_and_cap(model, logits, scale)


def _scale_and_cap(model: Any, logits: Tensor, scale: float) -> Tensor:
    logits = logits if scale == 1 else logits * scale
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0.0
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def hook_point(model: Any, name: str) -> Any:
    """The hook point ``name`` ("blocks.3.hook_attn_out"), aliases included, or None."""
    found: Any = model
    for part in name.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part, None)
        if found is None:
            return None
    return found


def growing_axes(model: Any, name: str, tokens: Tensor) -> tuple[int, ...]:
    """The axes of an activation that are as long as the prompts: where its positions are.

    Known from what the hook is given for prompts of another length, as a shape alone cannot tell
    positions from heads where there are as many of both. Kept for each model and kind of block.
    """
    known = _growing_axes.setdefault(model, {})
    layer, ending = name.split(".", 2)[1:]
    key = ending, block_kind(model, int(layer))
    if key not in known:
        room = tokens.shape[1] < (getattr(model.cfg, "n_ctx", None) or float("inf"))
        longer = torch.cat([tokens, tokens[:, -1:]], dim=1) if room else tokens[:, :-1]
        shapes = []
        with torch.no_grad(), hooked(model, name, lambda value, hook: shapes.append(value.shape)):
            for prompts in (tokens[:1], longer[:1]):
                model(prompts, return_type="logits")
        known[key] = tuple(a for a, (n, m) in enumerate(zip(*shapes, strict=True)) if n != m)
    return known[key]


_growing_axes: WeakKeyDictionary[Any, dict[Any, tuple[int, ...]]] = WeakKeyDictionary()


@contextmanager
def hooked(model: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Attach one forward hook for the duration of a block, and take it off again."""
    point = hook_point(model, name)
    handle = point.add_hook(function)
    try:
        yield
    finally:
        handle.hook.remove()
        if handle in point.fwd_hooks:
            point.fwd_hooks.remove(handle)


def run_plain(model: Any, tokens: Tensor, patches: Sequence[Patch], clean: Any) -> Tensor:
    """Logits ``[batch, pos, d_vocab]`` of a whole forward pass with some activations patched.

    Patches are written without autograd: with it, what a hook returns for resid_mid reaches only
    the MLP and not the stream. And they are written in place, as in ``transformer_lens.patching``.
    """

    def hook_for(patch: Patch) -> Callable[..., Tensor]:
        def write(activation: Tensor, hook: Any = None) -> Tensor:
            patched = patch.write(activation, clean.get(patch.hook_name))
            return activation if patched is activation else activation.copy_(patched)

        return write

    hooks = [(patch.hook_name, hook_for(patch)) for patch in patches]
    return model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks).to(tokens.device)


def attached_hooks(model: Any) -> list[str]:
    """Names of the hook points and modules on which the caller left hooks.

    Those of TransformerLens and Transformers themselves, which some models have from boot, are
    not the caller's.
    """
    points = model.hook_dict.items()
    found = [
        name
        for name, point in points
        if not all(_is_own(handle) for handle in (*point.fwd_hooks, *point.bwd_hooks))
    ]
    listed = {handle.hook.id for _, point in points for handle in point.fwd_hooks}
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        found.append("on every module")
    walked: set[torch.nn.Module] = set()
    for root in (model, getattr(model, "original_model", None)):
        for name, module in root.named_modules(walked) if root is not None else ():
            hooks = {**module._forward_hooks, **module._forward_pre_hooks}
            functions = [function for key, function in hooks.items() if key not in listed]
            functions += [
                vars(module)[own] for own in ("forward", "_hf_hook") if own in vars(module)
            ]
            if not all(_is_a_librarys(function) for function in functions):
                found.append(name or "the model")
    return found


def _is_a_librarys(function: Any) -> bool:
    """Whether a hook is defined in a library that models are made with, whatever it wraps."""
    function = getattr(function, "func", function)
    function = getattr(function, "__func__", function)
    module = getattr(function, "__globals__", {}).get("__name__", type(function).__module__)
    return module.split(".")[0] in ("transformer_lens", "transformers", "accelerate")


def _is_own(handle: Any) -> bool:
    module = getattr(getattr(handle, "user_hook", None), "__module__", None) or ""
    return bool(handle.is_permanent) and module.split(".")[0] == "transformer_lens"
