"""What one component's clean output becomes further up while all attention stays as it was.

With the attention frozen, every token is on its own: what is left of a block (norms, the MLP and
the residual stream) works position by position. So a path costs no attention at all, and only the
positions that differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patching_demo.engine.bridge import (
    CACHE_ARGUMENTS,
    Run,
    Unsupported,
    attached_hooks,
    capture,
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
        rows = self.sent(self.outputs, "out", layer, at, "mlps") - after[:, at]
        if rows.abs().max() > tolerance(before.dtype) * 10 * after.abs().max():
            raise Unsupported(f"block {layer} works on more than one position at a time")

    def step(
        self,
        layer: int,
        states: Tensor,
        at: Tensor,
        through: str,
        attn: Tensor | None = None,
        mlp: Tensor | None = None,
    ) -> Tensor:
        """One block with its attention frozen: ``[n, batch, token, d_model]`` at positions ``at``.

        The MLP is frozen too where ``through`` is "direct". ``attn`` and ``mlp`` take the place of
        the frozen outputs.
        """
        block = self.model.blocks[layer]
        rows = states.flatten(0, 1)

        def held(name: str, given: Tensor | None) -> Callable[..., Any]:
            output = self.outputs[layer][name]
            if given is None:
                there = tensor_of(output)
                given = there[:, at.to(there.device)].expand(len(states), -1, -1, -1)
            value = given.reshape(rows.shape)
            rest = output[1:] if isinstance(output, tuple) else None
            return lambda *_, **__: value if rest is None else (value, *rest)

        with ExitStack() as stack:
            stack.enter_context(_forward_of(block.attn, held("attn", attn)))
            if "mlp" in self.outputs[layer] and (through == "direct" or mlp is not None):
                stack.enter_context(_forward_of(block.mlp, held("mlp", mlp)))
            output = block(rows.clone(), **self.run.arguments[layer])
        return tensor_of(output).to(states.device).view(states.shape)

    @unforeseen(DOING)
    def sent(
        self, clean: Sequence[dict[str, Any]], kind: str, layer: int, at: Tensor, through: str
    ) -> Tensor:
        """The stream after ``layer`` with one clean output in it: ``[n, batch, token, d_model]``.

        There is one row for each head, or one in all for ``attn_out`` and ``mlp_out``. ``clean``
        is what was :func:`recorded` of the clean run.
        """
        own, other = self.outputs[layer], clean[layer]
        start = self.run.resid[layer][None, :, at]
        there = at.to(tensor_of(own["attn"]).device)
        if kind == "mlp_out":
            mlp = tensor_of(other["mlp"])[None, :, there]
            return self.step(layer, start, at, through, mlp=mlp)
        if kind == "attn_out":
            attn = tensor_of(other["attn"])[None, :, there]
            return self.step(layer, start, at, through, attn=attn)
        n_heads = self.model.cfg.n_heads
        heads, others = (
            part["heads"][:, there].flatten(2).unflatten(-1, (n_heads, -1)) for part in (own, other)
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

        def keep(name: str) -> Callable[..., None]:
            def hook(activation: Tensor, hook: Any = None) -> None:
                seen[name] = activation.to(self.run.tokens.device, copy=True)
                if len(seen) == len(names):
                    raise _Seen

            return hook

        resid = self.run.resid[layer]
        arguments = self.run.arguments[layer] | {
            name: None for name in CACHE_ARGUMENTS if name in self.run.arguments[layer]
        }
        parts: list[dict[str, Tensor]] = []
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(hooked(self.model, name, keep(name)))
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


@contextmanager
def recorded(model: Any) -> Iterator[list[dict[str, Any]]]:
    """What attention and MLP of each block return, and what the attention's projection is given.

    Of the first forward pass within the ``with`` block.
    """
    found: list[dict[str, Any]] = [{} for _ in model.blocks]
    handles = []
    for outputs, block in zip(found, model.blocks, strict=True):
        for name in ("attn", "mlp"):
            if isinstance(getattr(block, name, None), torch.nn.Module):

                def keep(
                    module: Any, args: Any, output: Any, into: Any = outputs, name: str = name
                ) -> None:
                    into.setdefault(name, output)

                handles.append(getattr(block, name).register_forward_hook(keep))
        if isinstance(getattr(getattr(block, "attn", None), "o", None), torch.nn.Module):

            def keep_input(module: Any, args: Any, into: Any = outputs) -> None:
                into.setdefault("heads", args[0])

            handles.append(block.attn.o.register_forward_pre_hook(keep_input))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _forward_of(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Let a module return what ``function`` returns."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = function  # The bridge's modules hand other attributes on.
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
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

    def _ends(self, tokens: Tensor) -> dict[tuple[int, str], tuple[Any, Any, Any]]:
        """Modules at whose output attention and MLPs can be held, with an input and output each."""
        calls: dict[tuple[int, str], tuple[Any, list[Any], Any]] = {}
        with ExitStack() as stack:
            for layer, block in enumerate(self.model.blocks):
                mlp = getattr(block, "mlp", None)
                o = getattr(getattr(block, "attn", None), "o", None)
                for name, module in (("attn", o), ("mlp", mlp), ("out", getattr(mlp, "out", None))):

                    def keep(
                        module: Any, args: Any, named: Any, output: Any, key: Any = (layer, name)
                    ) -> None:
                        given = [x for x in (*args, *named.values()) if isinstance(x, Tensor)]
                        calls.setdefault(key, (module, given, output))

                    if isinstance(module, torch.nn.Module):
                        handle = module.register_forward_hook(keep, with_kwargs=True)
                        stack.callback(handle.remove)
            self.model(tokens)
        ends = {}
        for layer, block in enumerate(self.model.blocks):
            if (layer, "attn") not in calls:
                raise Unsupported(f"the attention of block {layer} has no output projection")
            ends[layer, "attn"] = calls[layer, "attn"]
            if getattr(block, "mlp", None) is not None:
                # An MLP that is given the stream as well adds its output to it itself.
                found = calls.get((layer, "mlp"))
                if found is None or len(found[1]) > 1:
                    found = calls.get((layer, "out"))
                if found is None:
                    raise Unsupported(f"the MLP of block {layer} has no output that can be held")
                ends[layer, "mlp"] = found
        return ends

    def logits(
        self, kind: str, layer: int, head: int, through: str, seen: dict[str, Any]
    ) -> Tensor:
        """``[batch, pos, d_vocab]`` with one clean output, the rest of the attention corrupted.

        The activations named in ``seen`` are filled in.
        """
        sent = "mlp" if kind == "mlp_out" else "attn"
        with ExitStack() as stack:
            for (at, name), (module, _, output) in self.corrupted.items():
                if at == layer and name == sent and kind == "out":
                    hook = self._with_head(layer, head)
                    stack.callback(module.register_forward_pre_hook(hook).remove)
                    continue
                if at == layer and name == sent:
                    output = self.clean[at, name][2]
                elif name == "mlp" and through != "direct":
                    continue
                hook = partial(_returned, output)
                stack.callback(module.register_forward_hook(hook).remove)
            for name in seen:
                keep = partial(_kept, seen, name, self.tokens.device)
                stack.enter_context(hooked(self.model, name, keep))
            return self.model(self.tokens)

    def _with_head(self, layer: int, head: int) -> Callable[..., Any]:
        """A hook that gives an output projection one clean head among the corrupted ones."""
        own, other = (ends[layer, "attn"][1][0] for ends in (self.corrupted, self.clean))
        n_heads = self.model.cfg.n_heads
        rows = own.flatten(2).unflatten(-1, (n_heads, -1)).clone()
        rows[:, :, head] = other.flatten(2).unflatten(-1, (n_heads, -1))[:, :, head]
        return lambda module, args: (rows.view(own.shape), *args[1:])


def _returned(output: Any, *_: Any) -> Any:
    return output


def _kept(seen: dict[str, Any], name: str, device: Any, activation: Tensor, hook: Any) -> None:
    seen[name] = activation.to(device, copy=True)


__all__ = ["SENDERS", "FrozenModel", "PlainPaths", "recorded"]
