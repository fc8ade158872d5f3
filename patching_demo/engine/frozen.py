"""What one component's clean output becomes further up while all attention stays as it was.

With the attention frozen, every token is on its own: what is left of a block (norms, the MLP and
the residual stream) works position by position. So a path costs no attention at all, and only the
positions that differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patching_demo.engine.bridge import (
    CACHE_ARGUMENTS,
    Run,
    Unsupported,
    attached_hooks,
    capture,
    hook_point,
    hooked,
    tensor_of,
)
from patching_demo.engine.packs import CALL_TOKENS, unforeseen
from patching_demo.engine.scoring import tolerance

#: Begins the reason why a model is not served.
DOING = "a run with frozen attention"

#: The kinds whose clean output can be sent along a path.
SENDERS = ("out", "attn_out", "mlp_out")


class _Seen(Exception):
    """Leaves a block as soon as the receivers' activations are known."""


class Call(NamedTuple):
    """One call of a module: the tensors that it was given, and what it returned."""

    module: torch.nn.Module
    given: list[Tensor]
    output: Any


@contextmanager
def recorded(
    model: Any, parts: Sequence[str] = ("attn", "mlp", "attn.o")
) -> Iterator[list[dict[str, Call]]]:
    """The calls of some parts of each block, in the first forward pass within the ``with`` block.

    By default those of attention and MLP, and of the attention's output projection.
    """
    found: list[dict[str, Call]] = [{} for _ in model.blocks]

    def keep(
        layer: int, part: str, module: Any, args: Any, named: dict[str, Any], output: Any
    ) -> None:
        given = [value for value in (*args, *named.values()) if isinstance(value, Tensor)]
        found[layer].setdefault(part, Call(module, given, output))

    with ExitStack() as stack:
        for layer, part in product(range(len(found)), parts):
            module = hook_point(model, f"blocks.{layer}.{part}")
            if isinstance(module, torch.nn.Module):
                hook = partial(keep, layer, part)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield found


class FrozenModel:
    """The corrupted run, block by block, with attention outputs and MLP outputs held fixed.

    Args:
        model: a TransformerBridge.
        tokens: the corrupted tokens ``[batch, pos]``.

    Raises:
        Unsupported: if the blocks do not add what their attention and MLP return to the stream, or
            the caller left hooks on the model.
    """

    @unforeseen(DOING)
    def __init__(self, model: Any, tokens: Tensor) -> None:
        if hooks := attached_hooks(model):
            raise Unsupported(f"the model has hooks attached ({hooks[0]})")
        self.model = model
        with recorded(model) as self.outputs:
            self.run: Run = capture(model, tokens)
        for layer in range(len(model.blocks)):
            self._check(layer)

    def _check(self, layer: int) -> None:
        """With both outputs frozen, a change of the stream must pass a block as it is."""
        block = self.model.blocks[layer]
        if not hasattr(getattr(getattr(block, "attn", None), "o", None), "forward"):
            raise Unsupported(f"the attention of block {layer} has no output projection of its own")
        before, after = self.run.resid[layer], self.run.resid[layer + 1]
        change = before.std() * torch.cos(torch.arange(before.numel(), device=before.device) ** 1.5)
        change = change.view(before.shape).to(before.dtype)
        every = torch.arange(before.shape[1], device=before.device)
        passed = self.step(layer, (before + change)[None], every, "direct")[0] - after
        if (passed - change).abs().max() > tolerance(before.dtype) * 10 * after.abs().max():
            raise Unsupported(
                f"block {layer} does more with its input than add the outputs of attention and MLP"
            )
        # Some positions alone, in another order, with heads put together from the recorded ones.
        at = every.flip(0)[::4]
        rows = self.sent(self.outputs[layer], "out", layer, at, "mlps") - after[:, at]
        if rows.abs().max() > tolerance(before.dtype) * 10 * after.abs().max():
            raise Unsupported(f"block {layer} works on more than one position at a time")

    def step(self, layer: int, states: Tensor, at: Tensor, through: str, **given: Tensor) -> Tensor:
        """One block with its attention frozen: ``[n, batch, token, d_model]`` at positions ``at``.

        The MLP is frozen too where ``through`` is "direct". What is ``given`` for "attn" or "mlp"
        takes the place of the frozen output.
        """
        block, outputs, rows = self.model.blocks[layer], self.outputs[layer], states.flatten(0, 1)
        held = ["attn"]
        if "mlp" in outputs and (through == "direct" or "mlp" in given):
            held.append("mlp")
        with ExitStack() as stack:
            for name in held:
                output = outputs[name].output
                value = given.get(name)
                if value is None:
                    value = _positions(output, at).expand(len(states), -1, -1, -1)
                value = value.reshape(rows.shape)
                returned = (value, *output[1:]) if isinstance(output, tuple) else value
                stack.enter_context(_returning(getattr(block, name), returned))
            output = block(rows.clone(), **self.run.arguments[layer])
        return tensor_of(output).to(states.device).view(states.shape)

    @unforeseen(DOING)
    def sent(
        self, clean: Mapping[str, Call], kind: str, layer: int, at: Tensor, through: str
    ) -> Tensor:
        """The stream after ``layer`` with one clean output in it: ``[n, batch, token, d_model]``.

        There is one row for each head, or one in all for ``attn_out`` and ``mlp_out``. ``clean``
        is what was :func:`recorded` of that layer in the clean run.
        """
        start = self.run.resid[layer][None, :, at]
        if kind != "out":
            name = kind.removesuffix("_out")
            value = _positions(clean[name].output, at)
            return self.step(layer, start, at, through, **{name: value})
        n_heads = self.model.cfg.n_heads
        heads, others = (
            _positions(calls["attn.o"].given[0], at).flatten(2).unflatten(-1, (n_heads, -1))
            for calls in (self.outputs[layer], clean)
        )
        rows = heads.expand(n_heads, *heads.shape).clone()
        each = torch.arange(n_heads, device=heads.device)
        rows[each, :, :, each] = others.permute(2, 0, 1, 3)
        projected = self.model.blocks[layer].attn.o(rows.flatten(0, 1).flatten(-2))
        attn = projected.unflatten(0, (n_heads, -1))
        return self.step(layer, start.expand(n_heads, -1, -1, -1), at, through, attn=attn)

    @unforeseen(DOING)
    def received(
        self, layer: int, states: Tensor, at: Tensor, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Activations that a block computes from its input, without running all of it.

        ``states`` are the stream before the block at positions ``at``, ``[n, batch, token,
        d_model]``; it is the corrupted run's elsewhere. The result has, for each of ``names``
        (hooks of queries, keys or values), ``[n, batch, pos, head, d_head]``.

        Raises:
            Unsupported: if the block does not call one of the hooks.
        """
        seen: dict[str, Tensor] = {}

        def keep(name: str, activation: Tensor, hook: Any = None) -> None:
            seen[name] = activation.to(self.run.tokens.device, copy=True)
            if len(seen) == len(names):
                raise _Seen

        resid = self.run.resid[layer]
        arguments = self.run.arguments[layer] | {
            name: None for name in CACHE_ARGUMENTS if name in self.run.arguments[layer]
        }
        parts: list[dict[str, Tensor]] = []
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(hooked(self.model, name, partial(keep, name)))
            for some in states.split(max(1, CALL_TOKENS["cpu"] // resid.shape[:2].numel())):
                rows = resid.expand(len(some), *resid.shape).clone()
                rows[:, :, at] = some
                seen.clear()
                try:
                    self.model.blocks[layer](rows.flatten(0, 1), **arguments)
                except _Seen:
                    pass
                if missing := set(names) - seen.keys():
                    raise Unsupported(f"block {layer} does not call {min(missing)}")
                parts.append({n: v.unflatten(0, rows.shape[:2]) for n, v in seen.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in names}


def _positions(output: Any, at: Tensor) -> Tensor:
    """What a module returns at some positions: ``[batch, token, ...]``."""
    tensor = tensor_of(output)
    return tensor[:, at.to(tensor.device)]


@contextmanager
def _returning(module: Any, output: Any) -> Iterator[None]:
    """Let a module return ``output``, whatever it is given."""
    own = module.__dict__.get("forward")
    # The bridge's modules hand other attributes on.
    module.__dict__["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


class PlainPaths:
    """Whole forward passes of the corrupted prompts with attention, and MLPs, held by hooks.

    For models whose blocks :class:`FrozenModel` does not know how to run. What is held is what the
    output projections return, so that whatever else a block does with its input is done.

    Args:
        model: a TransformerBridge.
        clean, corrupted: tokens ``[batch, pos]``.

    Raises:
        Unsupported: if a block has an attention or MLP without an output that can be held.
    """

    def __init__(self, model: Any, clean: Tensor, corrupted: Tensor) -> None:
        self.model, self.tokens = model, corrupted
        self.clean, self.corrupted = self._ends(clean), self._ends(corrupted)

    def _ends(self, tokens: Tensor) -> dict[tuple[int, str], Call]:
        """The calls at whose output attention and MLP of each layer can be held."""
        with recorded(self.model, ("attn.o", "mlp", "mlp.out")) as found:
            self.model(tokens)
        ends = {}
        for layer, calls in enumerate(found):
            if "attn.o" not in calls:
                raise Unsupported(f"the attention of block {layer} has no output projection")
            ends[layer, "attn"] = calls["attn.o"]
            if getattr(self.model.blocks[layer], "mlp", None) is None:
                continue
            # An MLP that is given the stream as well adds its output to it itself.
            whole = "mlp" in calls and len(calls["mlp"].given) < 2
            end = calls.get("mlp" if whole else "mlp.out")
            if end is None:
                raise Unsupported(f"the MLP of block {layer} has no output that can be held")
            ends[layer, "mlp"] = end
        return ends

    def logits(
        self, kind: str, layer: int, head: int, through: str, seen: dict[str, Any]
    ) -> Tensor:
        """``[batch, pos, d_vocab]`` with one clean output, the rest of the attention corrupted.

        The activations named in ``seen`` are filled in.
        """
        sent = "mlp" if kind == "mlp_out" else "attn"

        def keep(name: str, activation: Tensor, hook: Any = None) -> None:
            seen[name] = activation.to(self.tokens.device, copy=True)

        with ExitStack() as stack:
            for end, call in self.corrupted.items():
                if end == (layer, sent) and kind == "out":
                    hook = self._with_head(layer, head)
                    stack.callback(call.module.register_forward_pre_hook(hook).remove)
                elif end == (layer, sent) or end[1] == "attn" or through == "direct":
                    held = self.clean if end == (layer, sent) else self.corrupted
                    hook = partial(lambda output, *_: output, held[end].output)
                    stack.callback(call.module.register_forward_hook(hook).remove)
            for name in seen:
                stack.enter_context(hooked(self.model, name, partial(keep, name)))
            return self.model(self.tokens)

    def _with_head(self, layer: int, head: int) -> Callable[..., Any]:
        """A hook that gives an output projection one clean head among the corrupted ones."""
        own, other = (ends[layer, "attn"].given[0] for ends in (self.corrupted, self.clean))
        n_heads = self.model.cfg.n_heads
        rows = own.flatten(2).unflatten(-1, (n_heads, -1)).clone()
        rows[:, :, head] = other.flatten(2).unflatten(-1, (n_heads, -1))[:, :, head]
        return lambda module, args: (rows.view(own.shape), *args[1:])


__all__ = ["SENDERS", "FrozenModel", "PlainPaths", "recorded"]
