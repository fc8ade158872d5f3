"""Models spread over several devices, on devices that are only said to be there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import xarray as xr
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from chapters import Rehearsal
from conftest import untraced
from test_claims import RIGHT, model_of
from test_weights import ESTIMATES, QUESTIONS, asked, assert_within, boot, plainly, task_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from patching_demo import (
    Task,
    attribute,
    induction_task,
    ioi_task,
    patching,
    paths,
    prompt_task,
    sweep,
)
from patching_demo.engine.bridge import CACHE_ARGUMENTS
from patching_demo.engine.scoring import tolerance
from patching_demo.tasks import noise_task

LAST = ("ln_f", "norm", "final_layer_norm", "lm_head", "embed_out")
CACHES = list(CACHE_ARGUMENTS)
HOME, AWAY, CPU = torch.device("xla:0"), torch.device("xla:1"), torch.device("cpu")


def place(tensor: Tensor) -> torch.device:
    # A new parameter is made of a tensor without any call that a mode sees.
    where = getattr(tensor, "place", None)
    return where or (HOME if isinstance(tensor, nn.Parameter) else CPU)


def tensors_in(*things: Any) -> list[Tensor]:
    # Few calls hold tensors in anything, and to look into each takes longer than the call.
    if any(isinstance(thing, (tuple, list, dict)) for thing in things):
        things = tree_leaves(things)
    return [thing for thing in things if isinstance(thing, Tensor)]


class Devices(TorchFunctionMode):
    """Tensors say that they are where they were put, and refuse to meet one that is elsewhere.

    Only a CPU has float64. All stand in the machine's memory, so numbers are those of one device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return place(args[0])
        tensors = tensors_in(*args, *kwargs.values())
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self._to(func, args, kwargs)
        if func is torch.autograd.grad:
            found = func(*args, **kwargs)
            for gradient, of in zip(found, args[1], strict=True):
                if gradient is not None:
                    gradient.place = place(of)
            return found
        if "device" in kwargs:
            where = torch.device(kwargs.pop("device") or CPU)
        elif func is torch.Tensor.copy_:
            where = place(args[0])
        else:
            where = self._meeting(func, args, tensors)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            tensor.place = where
            assert tensor.dtype != torch.float64 or where == CPU, func
        return result

    def _to(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        where, rest, own = place(args[0]), [], dict(kwargs)
        if func is torch.Tensor.cpu:
            where = CPU
        for value in (*args[1:], own.pop("device", None), own.pop("other", None)):
            if isinstance(value, Tensor):
                where, value = place(value), value.dtype
            elif isinstance(value, (str, torch.device)):
                where = torch.device(value)
                continue
            if value is not None:
                rest.append(value)
        result = args[0].to(*rest, **own) if rest or own else args[0].to(args[0].dtype)
        if result is args[0] and where != place(args[0]):
            result = args[0].to(args[0].dtype, copy=True)
        result.place = where
        assert result.dtype != torch.float64 or where == CPU, func
        return result

    def _meeting(self, func: Any, args: Any, tensors: list[Tensor]) -> torch.device:
        indexing = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        where = {place(t) for t in tensors if t.ndim}
        if indexing and place(args[0]) != CPU:
            where -= {CPU}  # Indices may come from there.
        if len(where) > 1:
            raise RuntimeError(f"{func}: tensors on {sorted(map(str, where))}")
        return next(iter(where), place(tensors[0]) if tensors else CPU)


def spread(name: str, away: torch.device = AWAY) -> Any:
    """A model with all from its second block on on another device, as device_map leaves it."""
    places: dict[int, torch.device] = {}

    def hooks(inner: Any) -> Any:
        for name, module in inner.named_modules():
            last = any(part in ("1", "2", *LAST) for part in name.split("."))
            where = away if last else HOME
            for weight in module.parameters(recurse=False):
                where = places.setdefault(weight.data_ptr(), where)  # It may be tied.
            hook = AlignDevicesHook(where, io_same_device=module is inner, skip_keys=CACHES)
            add_hook_to_module(module, hook)
        return inner

    model = boot(name, hooks)
    return placed(model, away)


def placed(model: Any, away: torch.device = HOME) -> Any:
    model.cfg.device = str(HOME)
    for name, module in model.named_modules():
        # What the bridge has made itself, such as parts of joint weights, stands beside the others.
        where = away if {"1", "2"} & {*name.split(".")} else HOME
        where = getattr(vars(module).get("_hf_hook"), "execution_device", where)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                tensor.place = where
    return model


@pytest.fixture(autouse=True)
def tensors_are_in_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(AlignDevicesHook, "init_hook", lambda self, module: module)
    with untraced():  # Each call of PyTorch is one of Python here.
        yield


@lru_cache(None)
def here(name: str) -> Any:
    """Answers of a model in one place, by question."""
    model = boot(name, lambda inner: inner)
    return lru_cache(None)(lambda question: asked(question, model, MORE)[0])


@pytest.mark.parametrize(
    ("name", "away"),
    [("gpt2", HOME), ("gpt2", AWAY), ("llama-gqa", AWAY), ("neox-parallel", AWAY)],
)
def test_blocks_run_where_they_are(name: str, away: torch.device) -> None:
    model = spread(name, away)
    for question in (*QUESTIONS, *ESTIMATES, *MORE):
        wanted = here(name)(question)
        with Devices():
            found, why = asked(question, model, MORE)
        assert not why, question
        assert_within(found, wanted, 1e-5)


@pytest.mark.parametrize("default", [HOME, AWAY])
def test_what_is_made_without_a_device_may_be_elsewhere(
    default: torch.device, tmp_path: Path
) -> None:
    """As after ``torch.set_default_device``."""
    model = placed(boot("gpt2", lambda inner: inner))
    every = (*QUESTIONS, *ESTIMATES, *MORE)
    if default != HOME:  # The others begin with a run on tokens of their own.
        every = (*list(MORE)[: list(MORE).index("by hand")], "roles")
    for question in every:
        wanted = here("gpt2")(question)
        with Devices(), default:
            found, why = asked(question, model, MORE)
        assert not why, question
        assert_within(found, wanted, 1e-5)
    with Devices(), default:
        sweep(model, ioi_task(model), "out", store=tmp_path / "kept", progress=False)


@pytest.mark.parametrize("question", [*QUESTIONS, *ESTIMATES, "answers", "frame", "noise"])
def test_inputs_go_where_the_weights_are(question: str) -> None:
    """TransformerBridge names the GPU, where there is one, also for a model given on the CPU."""
    model = boot("gpt2", lambda inner: inner)
    model.cfg.device = "cuda"
    asked(question, model, MORE)
    assert {weight.device for weight in model.parameters()} == {CPU}


def unequal(model: Any) -> Any:
    roles = {"name": ("When Mary", "When John")}
    return prompt_task(
        model, "When Mary and John", "When John and", (" Mary", " John"), roles=roles
    )


def frame(model: Any) -> Any:
    rows = {"clean": ["When Mary and John"], "corrupted": ["When John and John"]}
    return Task.from_frame(model, pd.DataFrame(rows | {"right": " Mary", "wrong": " John"}))


def noise(model: Any) -> Any:
    return noise_task(model, "When Mary and John", (" Mary", " John"), {"name": " Mary"})


def by_hand(model: Any) -> Any:
    task = ioi_task(model)
    found = patching.get_act_patch_attn_head_pattern_by_pos(
        model, task.corrupted_tokens, task.clean_cache(model), task.metric, progress=False
    )
    return xr.DataArray(found.cpu(), attrs={"corrupted_baseline": task.corrupted_baseline})


MORE = {
    "unequal": lambda m: sweep(m, unequal(m), "out", by="role", progress=False),
    "patterns": lambda m: sweep(m, ioi_task(m), "pattern", by="all_pos", progress=False),
    "zero": lambda m: sweep(m, ioi_task(m), "v", source="zero", per_prompt=True, progress=False),
    "mean": lambda m: sweep(m, ioi_task(m), "out", by="role", source="mean", progress=False),
    "window": lambda m: sweep(m, ioi_task(m).reversed(), "mlp_out", window=2, progress=False),
    "solved": lambda m: sweep(m, ioi_task(m).solved(m), "q", by="role", progress=False),
    "answers": lambda m: sweep(
        m, induction_task(m, batch=2, seq_len=5), "out", by="all_pos", progress=False
    ),
    "frame": lambda m: sweep(m, frame(m), "resid_pre", progress=False),
    "noise": lambda m: sweep(m, noise(m), "resid_pre", by="role", progress=False),
    "by hand": by_hand,
    "integrated": lambda m: attribute(m, task_of(m), "mlp_out", method="integrated", steps=2),
    "softmax": lambda m: attribute(m, task_of(m), ["q", "k"], method="gradient+qk"),
    "mlps": lambda m: paths(
        m, task_of(m), [("v", 1, 0)], senders="mlp_out", through="mlps", progress=False
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [f"0{n}" for n in range(1, 9)])
def test_chapters_run_on_a_device(number: str) -> None:
    model = placed(model_of(number))
    with Devices():
        cells = Rehearsal(number, model, measured=False)
        del cells._options["sweep_metrics"]["where"]
        assert cells.claims(RIGHT.get(number, lambda result: result))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "neox-parallel"])
def test_a_gpu_finds_what_its_own_plain_loop_finds(name: str, dtype: torch.dtype) -> None:
    model = boot(name, lambda inner: inner.to("cuda", dtype))
    for question in QUESTIONS:
        found, why = asked(question, model)
        assert not why, question
        assert_within(found, plainly(question, model), tolerance(dtype))
    for question in MORE:
        asked(question, model, MORE)
