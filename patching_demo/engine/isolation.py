"""Modules of a sweep's own, which share the weights of the caller's model.

Hooks, and what a forward pass leaves behind, belong to modules. A sweep that hooked the caller's
modules would patch whatever another thread runs meanwhile, and would itself be patched.
"""

from __future__ import annotations

import operator
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.bridge_core import BridgeCore

_CALLS = {BridgeCore.run_with_hooks.__code__, BridgeCore.run_with_cache.__code__}
_ATTEMPTS = 100  # A snapshot fails only if another thread's call came or went while it was taken.


class _Idle:
    """Copies of a model that nobody uses now, each with what the model was when it was copied."""

    def __init__(self) -> None:
        self.copies: list[tuple[Any, _Copier]] = []

    def __reduce__(self) -> Any:  # A copied or pickled model begins with none.
        return _Idle, ()


def isolated(model: Any, user: Any = None) -> Any:
    """The same model on modules that nobody else has: nothing done to one reaches the other.

    Weights are shared, not copied, so it takes a fraction of a second and no memory. Hooks that the
    caller left on the model are kept. Those that ``run_with_cache`` or ``run_with_hooks`` has there
    for the length of a call in another thread are not. What is no bridge of modules, or is isolated
    already, is returned as it is; so is any model while PyTorch has hooks for every module, as
    those may know modules by identity.

    Once ``user`` is gone, its copy serves again, as long as nothing of the model was changed.
    """
    if not isinstance(model, BridgeCore) or not isinstance(model, nn.Module):
        return model
    every = nn.modules.module
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        return model
    if "_isolated" in model.__dict__:
        return model
    idle = model.__dict__.setdefault("_isolated_copies", _Idle())
    copied, copier = _idle_copy(idle) if user is not None else (None, None)
    for _ in range(_ATTEMPTS if copied is None else 0):
        copier = _Copier()
        try:
            copied = copier.of(model)
        except RuntimeError:  # Another thread's hooks came or went in what was being read.
            copied = None
            continue
        elsewhere = _hooks_of_calls_elsewhere(model)
        for point, handle in elsewhere:
            own = copier.of(point)
            own.fwd_hooks = [kept for kept in own.fwd_hooks if kept is not handle]
            own.bwd_hooks = [kept for kept in own.bwd_hooks if kept is not handle]
            own._forward_hooks.pop(handle.hook.id, None)
            own._backward_hooks.pop(handle.hook.id, None)
            user = None  # What it was copied from will not be there again.
        # A call that ended meanwhile has left the list of those under way, and its hooks here.
        if all(copier.of(m)._forward_hooks.keys() <= m._forward_hooks.keys() for m in copier.seen):
            break
        copied = None
    if copied is None:
        raise RuntimeError(
            "other threads attach and remove hooks of the model all the time, so there was no "
            "moment to copy it: let them pause while a sweep starts"
        )
    copied.__dict__["_isolated"] = True
    copied.__dict__.pop("_isolated_copies", None)
    if user is not None:
        weakref.finalize(user, idle.copies.append, (copied, copier)).atexit = False
    return copied


def with_more_tokens(model: Any, embeddings: Tensor) -> Any:
    """The model on modules of its own that embed more token ids than the vocabulary has.

    Args:
        model: a TransformerBridge.
        embeddings: ``[n, d_model]``, of the ids from ``d_vocab`` on, before any scaling that the
            model's embedding does.

    Raises:
        RuntimeError: if the embedding cannot be extended without touching the caller's model.
    """
    if "_more_tokens" in getattr(model, "__dict__", {}):  # It is such a model already.
        return model
    copied = isolated(model)
    table = getattr(getattr(copied, "embed", None), "original_component", None)
    weight = getattr(table, "weight", None)
    if copied is model or not isinstance(weight, Tensor) or weight.ndim != 2 or weight.is_meta:
        raise RuntimeError("this model's token embeddings cannot be extended, as noise needs it")
    more = torch.cat([weight.detach(), embeddings.to(weight)])
    table._parameters["weight"] = nn.Parameter(more, requires_grad=False)
    copied.__dict__["_more_tokens"] = len(embeddings)
    return copied


def _idle_copy(idle: _Idle) -> tuple[Any, _Copier | None]:
    """A copy that nobody uses and that is what a new one would be; those that are not go."""
    while idle.copies:
        try:
            copied, copier = idle.copies.pop()
            if copier.is_current():
                return copied, copier
        except (IndexError, RuntimeError, TypeError, ValueError):
            pass  # Another thread took it or changes the model, or tensors were replaced.
    return None, None


def _hooks_of_calls_elsewhere(model: Any) -> list[tuple[HookPoint, Any]]:
    """The hooks, with their points, that calls under way in other threads will take off again."""
    found = []
    frames = sys._current_frames()
    del frames[threading.get_ident()]  # A function that holds its own frame is never freed at once.
    for frame in frames.values():
        while frame is not None:
            if frame.f_code in _CALLS and frame.f_locals.get("self") is model:
                added = list(frame.f_locals.get("added_hooks") or ())
                found += [(point, handle) for point, _, handle in added]
            frame = frame.f_back
    return found


class _Copier:
    """Copies modules and what refers to them; everything else is shared."""

    def __init__(self) -> None:
        self.seen: list[nn.Module] = []
        self._copies: dict[int, Any] = {}
        self._functions: dict[int, Any] = {}
        self._before: list[tuple[Any, type, dict[str, Any]]] = []

    def of(self, value: Any) -> Any:
        """The copy of a value, or the value itself if no module can be reached from it."""
        kind = type(value)
        if kind in _SHARED:
            return value
        if kind in (dict, OrderedDict):
            return kind([(key, self.of(entry)) for key, entry in list(value.items())])
        if kind in (list, tuple, set):
            return kind([self.of(entry) for entry in list(value)])
        if kind in weakref.ProxyTypes:
            return weakref.proxy(self.of(value.__repr__.__self__))
        if kind is MethodType:
            return MethodType(self.of(value.__func__), self.of(value.__self__))
        if kind is partial:
            keywords = {name: self.of(entry) for name, entry in value.keywords.items()}
            return partial(self.of(value.func), *map(self.of, value.args), **keywords)
        if kind is FunctionType:
            return self._function(value)
        if isinstance(value, nn.Module) or _of_the_bridge(kind):
            return self._object(value)
        return value

    def _object(self, value: Any) -> Any:
        if id(value) in self._copies:
            return self._copies[id(value)]
        copied = self._copies[id(value)] = object.__new__(type(value))
        if isinstance(value, nn.Module):
            self.seen.append(value)
        self._before.append((value, type(value), _contents_of(value.__dict__)))
        own = copied.__dict__
        own.update(value.__dict__)
        for name, entry in own.items():
            kind = type(entry)
            if kind in _SHARED:
                continue
            if kind in (dict, OrderedDict) and (not entry or name.endswith(_KEPT)):
                hooks = list(entry.items())  # at once: another thread may change the original
                own[name] = kind([(key, self._hook(hook)) for key, hook in hooks])
            else:
                own[name] = self.of(entry)
        return copied

    def is_current(self) -> bool:
        """Whether all that was copied is as it was, and no hook has been left on a copy."""
        same = all(type(of) is kind and of.__dict__ == had for of, kind, had in self._before)
        pairs = [(module, self._copies[id(module)]) for module in self.seen] if same else []
        return same and all(
            _left_on(copied._forward_hooks) == _left_on(of._forward_hooks)
            and _left_on(copied._forward_pre_hooks) == _left_on(of._forward_pre_hooks)
            for of, copied in pairs
        )

    def _hook(self, value: Any) -> Any:
        """The bridge's own hooks belong to their modules; all others are the caller's."""
        own = getattr(value, "__module__", None) or ""
        wired = type(value) is FunctionType and own.startswith(_LIBRARIES[0])
        return self._function(value) if wired else value

    def _function(self, value: Callable[..., Any]) -> Callable[..., Any]:
        """A function that has been put in place of a module's own, with its module replaced."""
        if id(value) in self._functions:
            return self._functions[id(value)][1]
        self._functions[id(value)] = value, value  # A function may refer to itself.

        def replaced(inside: Any) -> Any:
            return self.of(inside) if isinstance(inside, _LEADS_ON) else inside

        cells, named = value.__closure__ or (), value.__kwdefaults__ or {}
        before = [*map(_contents, cells), *(value.__defaults__ or ()), *named.values()]
        after = list(map(replaced, before))
        if all(map(operator.is_, before, after)):
            return value
        pairs = zip(cells, before, after, strict=False)
        closure = tuple(cell if old is new else CellType(new) for cell, old, new in pairs)
        by_place = tuple(after[len(cells) : len(after) - len(named)])
        copied = FunctionType(
            value.__code__, value.__globals__, value.__name__, by_place or None, closure
        )
        by_name = after[len(after) - len(named) :]
        copied.__kwdefaults__ = dict(zip(named, by_name, strict=True)) or None
        self._functions[id(value)] = value, copied
        return copied


# Where hooks come from that belong to a model.
_LIBRARIES = ("transformer_lens.model_bridge.", "transformers.")
# What a function may reach a module by.
_LEADS_ON = (nn.Module, MethodType, FunctionType, partial)
_SHARED = {type(None), bool, int, float, str, bytes, type}
# Weights are shared. The caller's hooks may count or collect.
_KEPT = ("_parameters", "_buffers", "_hooks", "_hooks_with_kwargs", "_hooks_always_called")


def _contents_of(value: Any) -> Any:
    """Containers copied, everything else as it is: to be compared with what they hold later."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        return kind([(key, _contents_of(entry)) for key, entry in list(value.items())])
    if kind in (list, tuple, set):
        return kind([_contents_of(entry) for entry in list(value)])
    return value


def _left_on(hooks: dict[int, Any]) -> set[int]:
    """Hooks by number, but for those that the libraries give a model when it is first run."""
    names = {number: getattr(hook, "__module__", None) or "" for number, hook in hooks.items()}
    return {number for number, name in names.items() if not name.startswith(_LIBRARIES)}


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # Not filled yet.
        return None


def _of_the_bridge(kind: type) -> bool:
    """Drivers, adapters and conversions refer to modules; a configuration does not."""
    ours = kind.__module__.startswith("transformer_lens.") and "Config" not in kind.__name__
    return ours and hasattr(kind, "__dict__") and kind.__name__ != "LensHandle"
