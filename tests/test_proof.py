"""Models that the engine cannot serve are found out before any number, and take the plain loop."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import tiny
import torch
from oracle import Pair, assert_close, make_pair
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from patching_demo import patching
from patching_demo.engine import checks, proof, runner
from patching_demo.metrics import LogitDifference


def changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Let a module do something to its output, without hooks."""
    kind = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = kind.forward(self, *args, **kwargs)
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def swept(model: Any, data: Pair, sweep: str, metric: Any, **options: Any) -> Tensor:
    call = getattr(patching, f"get_act_patch_{sweep}")
    return call(model, data.corrupted, data.cache, metric, progress=False, **options)


def plainly(model: Any, data: Pair, sweep: str, metric: Any, index: Any = None) -> Any:
    with torch.no_grad(), oracle.quiet():
        inputs = model, data.corrupted, data.cache, metric
        if index is None:
            return getattr(oracle.plain_patching, f"get_act_patch_{sweep}")(*inputs)
        activation, setter, _ = oracle.SWEEPS[sweep]
        patched = oracle.plain_patching.generic_activation_patch
        return patched(*inputs, setter, activation, index_df=index.reset_index(drop=True))


@contextmanager
def aloud(reason: str) -> Iterator[None]:
    with pytest.warns(UserWarning, match=f"takes the plain loop: .*{reason}"):
        yield


def slots(states: Tensor) -> Tensor:
    return torch.arange(states.shape[1])[:, None]


BY_SLOT: dict[str, Callable[[Tensor], Tensor]] = {
    "the last slot": lambda h: torch.where(slots(h) == h.shape[1] - 1, 1.3 * h, h),
    "the first slot": lambda h: torch.where(slots(h) == 0, h + 1, h),
    "scaled by slot": lambda h: h * (1 + 0.01 * slots(h)),
    "every third slot": lambda h: h + (slots(h) % 3 == 0),
    "late slots": lambda h: h + (slots(h) > 12),
    "long inputs": lambda h: h + (h.shape[1] > 15),
    "the slot before": lambda h: h + 0.3 * nn.functional.pad(h, (0, 0, 1, 0))[:, :-1],
    "the slot after": lambda h: h + 0.3 * nn.functional.pad(h, (0, 0, 0, 1))[:, 1:],
    "the mean of slots": lambda h: h + 0.3 * h.mean(dim=1, keepdim=True),
}
LOOKS_AHEAD = {"the slot after", "the mean of slots"}


@pytest.mark.parametrize(("n_pos", "first", "batch"), [(7, 3, 2), (24, 4, 1), (40, 30, 3)])
@pytest.mark.parametrize("kind", BY_SLOT)
def test_a_model_that_works_by_slot_takes_the_plain_loop(
    kind: str, n_pos: int, first: int, batch: int
) -> None:
    for name, layer, sweep in (("gpt2", 1, "resid_pre"), ("llama-gqa", 0, "attn_out")):
        model = tiny.fresh(name)
        changed(model.blocks[layer], BY_SLOT[kind])
        data = make_pair(model, batch, n_pos, tuple(range(first, n_pos)))
        checks._warned.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = swept(model, data, sweep, data.metrics["difference"], check=0)
        metric, index = data.metrics["difference"], oracle.every_cell(model, n_pos, sweep)
        if kind not in LOOKS_AHEAD:
            # Before the first token that differs, both runs have the same to patch with.
            index = index.query("pos >= @first")
        with torch.no_grad():
            wanted = metric(model(data.corrupted)).expand(model.cfg.n_layers, n_pos).clone()
        cells = torch.tensor(index[["layer", "pos"]].values).T
        wanted[tuple(cells)] = plainly(model, data, sweep, metric, index)
        assert_close(found, wanted, metric_axis=False)
        if kind not in ("late slots", "long inputs"):
            assert any("works by the place in its input" in str(w.message) for w in caught)


@pytest.mark.filterwarnings("ignore:this sweep takes the plain loop")
@pytest.mark.parametrize("part", ["ln_final", "unembed"])
@pytest.mark.parametrize("kind", ["the last slot", "every third slot", "the mean of slots"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_an_unembedding_that_works_by_slot_is_never_wrong_in_silence(
    name: str, kind: str, part: str
) -> None:
    model = tiny.fresh(name)
    changed(getattr(model, part).original_component, BY_SLOT[kind])
    data = make_pair(model, 2, 13, (3, 4))
    wanted = plainly(model, data, "attn_out", data.metrics)
    for name, metric in data.metrics.items():
        found = swept(model, data, "attn_out", metric, check=0)
        assert_close(found, wanted[name].values, metric_axis=False)


@pytest.mark.filterwarnings("ignore:this sweep takes the plain loop")
@pytest.mark.parametrize("kind", ["the last slot", "scaled by slot", "the slot before"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_what_was_proved_is_proved_again(name: str, kind: str) -> None:
    """What a model computes may depend on more than its modules, such as a switch elsewhere."""
    model, switch = tiny.fresh(name), [False]
    changed(model.blocks[0], lambda h: BY_SLOT[kind](h) if switch[0] else h)
    data = make_pair(model, 2, 19, (3, 4))
    wanted = {}
    for switch[0] in (False, True):
        wanted[switch[0]] = plainly(model, data, "resid_pre", oracle.all_logits)
    for switch[0] in (False, True, False):
        gc.collect()  # So that the next sweep runs on the modules of the one before.
        found = swept(model, data, "resid_pre", oracle.all_logits, check=0)
        assert_close(found, wanted[switch[0]], metric_axis=False)


@pytest.mark.filterwarnings("ignore:this sweep takes the plain loop")
def test_some_of_many_blocks_are_proved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, switch, proved = tiny.fresh("gpt2-12x12"), [False], []
    for block in model.blocks:
        changed(block, lambda h: BY_SLOT["scaled by slot"](h) if switch[0] else h)
    compare = proof._compare
    monkeypatch.setattr(
        proof,
        "_compare",
        lambda pack, layer, own: proved.append(layer) or compare(pack, layer, own),
    )
    data = make_pair(model, 2, 9, (3, 4))
    found = []
    for switch[0] in (False, False, True):
        gc.collect()
        found.append(swept(model, data, "resid_pre", data.metrics["difference"], check=0))
    n_layers = model.cfg.n_layers
    first, again = set(proved[: 2 * n_layers]), sorted(set(proved[2 * n_layers + 1 :]))
    assert first == set(range(n_layers))
    assert len(again) == proof.BLOCKS_AGAIN and again[:: len(again) - 1] == [0, n_layers - 1]
    assert torch.equal(found[0], found[1])
    wanted = plainly(model, data, "resid_pre", data.metrics["difference"])
    assert_close(found[2], wanted, metric_axis=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_of_few_bits_are_held_to_what_rounding_does(dtype: torch.dtype) -> None:
    model = tiny.fresh("llama-gqa").to(dtype)
    data = make_pair(model, 2, 24, (4, 9))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        swept(model, data, "resid_pre", data.metrics["difference"], check=5)
    assert not any("plain loop" in str(w.message) for w in caught), [str(w) for w in caught]
    # Four times what rounding explains: the type of more bits is held to more.
    factor = 1 + 32 * torch.finfo(dtype).eps
    changed(model.blocks[1], lambda h: torch.where(slots(h) == h.shape[1] - 1, factor * h, h))
    with aloud("works by the place in its input"):
        swept(model, data, "resid_pre", data.metrics["difference"], check=0)


def steer(*arguments: Any) -> Any:
    out = arguments[-1]
    states = (out[0] if isinstance(out, tuple) else out).clone()
    states[:, 5] += 1.0
    return (states, *out[1:]) if isinstance(out, tuple) else states


def linear_in(module: nn.Module) -> nn.Module:
    """A plain PyTorch module that the block runs, deep inside the original model."""
    found = [m for m in module.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    return found[-1]


class Steering:
    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        return steer(out)


HOOKED = (
    *("hook", "pre-hook", "everywhere", "everywhere before", "wrapped", "inner hook", "object"),
    *("embedding", "unembedding", "hook point", "bridge"),
)


@pytest.mark.parametrize("how", HOOKED)
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_hooks_of_pytorch_take_part_by_the_plain_loop(name: str, how: str) -> None:
    model = tiny.fresh(name)
    layers = getattr(model.original_model, "transformer", None)
    layer = (layers.h if layers is not None else model.original_model.model.layers)[1]
    inner = layer.mlp
    remove: Callable[[], None] = lambda: None  # noqa: E731
    of_torch = nn.modules.module
    if how == "hook":
        layer.register_forward_hook(steer)
    elif how == "object":
        layer.register_forward_hook(Steering())
    elif how in ("embedding", "unembedding"):
        part = {"embedding": model.embed, "unembedding": model.unembed}[how]
        part.original_component.register_forward_hook(steer)
    elif how == "bridge":
        model.register_forward_hook(steer)  # run_with_hooks passes it by.
    elif how == "hook point":
        model.hook_dict["blocks.1.hook_mlp_out"].register_forward_hook(steer)
    elif how == "inner hook":
        linear_in(inner).register_forward_hook(steer)
    elif how == "wrapped":
        linear = linear_in(inner)
        own = linear.forward
        linear.forward = lambda states: steer(own(states))
    elif how == "pre-hook":
        inner.register_forward_pre_hook(lambda module, args: (steer(args[0]), *args[1:]))
    elif how == "everywhere before":
        before = lambda module, args: steer(args[0]) if module is inner else None  # noqa: E731
        remove = of_torch.register_module_forward_pre_hook(before).remove
    else:
        hook = lambda module, args, out: steer(out) if module is inner else None  # noqa: E731
        remove = of_torch.register_module_forward_hook(hook).remove
    try:
        data = make_pair(model, 2, 6, (3,))
        with aloud("the model has hooks attached"):
            found = swept(model, data, "resid_pre", oracle.all_logits)
        assert_close(found, plainly(model, data, "resid_pre", oracle.all_logits), False)
    finally:
        remove()


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_a_clean_pattern_that_reaches_into_the_future_is_exact(name: str) -> None:
    model = tiny.model(name)
    data = make_pair(model, 2, 8, (3,))
    edited = {key: value.clone() for key, value in data.cache.items()}
    for key in edited:
        if key.endswith("hook_pattern"):
            edited[key][:] = edited[key].mean(dim=-1, keepdim=True)
    data.cache = edited
    with aloud("attends to later positions"):
        found = swept(model, data, "attn_head_pattern_by_pos", oracle.all_logits)
    wanted = plainly(model, data, "attn_head_pattern_by_pos", oracle.all_logits)
    assert_close(found, wanted, metric_axis=False)


@pytest.mark.filterwarnings("ignore:the model runs in bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_an_adapter_on_the_unembedding_is_read(name: str, dtype: torch.dtype) -> None:
    model = tiny.fresh(name).to(dtype)
    draw = torch.Generator().manual_seed(0)
    adapter = (0.2 * torch.randn(32, tiny.D_VOCAB, generator=draw)).to(dtype)
    head = model.unembed.original_component
    kind = type(head)

    def forward(self: Any, states: Tensor) -> Tensor:
        return kind.forward(self, states) + states @ adapter

    head.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    data = make_pair(model, 2, 9, (3,))
    metric = data.metrics["difference"]
    found = swept(model, data, "resid_pre", metric, check=0)  # A recheck would find it, too.
    wanted = plainly(model, data, "resid_pre", metric)
    spread = float(wanted.max() - wanted.min())
    allowed = 1e-4 if dtype == torch.float32 else 0.05
    assert float((found - wanted).abs().max()) <= allowed * spread


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, KeyError])
def test_whatever_fails_in_a_packed_call_leads_to_the_plain_loop(error: type[Exception]) -> None:
    model = tiny.fresh("gpt2")

    def fail(states: Tensor) -> Tensor:
        if len(states) != 2:
            raise error("not with so many rows")
        return states

    changed(model.blocks[1], fail)
    data = make_pair(model, 2, 9, (3,))
    with aloud(f"block 1 on packed runs raises {error.__name__}"):
        found = swept(model, data, "resid_pre", oracle.all_logits)
    assert_close(found, plainly(model, data, "resid_pre", oracle.all_logits), False)


def test_each_call_of_a_metric_has_logits_of_its_own() -> None:
    model, kept = tiny.model("gpt2"), []
    data = make_pair(model, 2, 9, (3,))

    def metric(logits: Tensor) -> Tensor:
        kept.append((logits[0], logits[0].clone()))
        return oracle.all_logits(logits)

    with torch.inference_mode():
        found = swept(model, data, "resid_pre", metric, check=0)
    assert all(torch.equal(view, copy) for view, copy in kept)
    assert len({copy.numpy().tobytes() for _, copy in kept}) == len(torch.unique(found))


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_a_model_made_in_inference_mode_is_swept_in_it_and_outside(name: str) -> None:
    with torch.inference_mode():
        model = tiny.fresh(name)
        data = make_pair(model, 2, 9, (3,))
        wanted = plainly(model, data, "attn_out", oracle.all_logits)
        inside = swept(model, data, "attn_out", oracle.all_logits)
    for found in (inside, swept(model, data, "attn_out", oracle.all_logits)):
        assert_close(found, wanted, metric_axis=False)


class NoFloat64(TorchDispatchMode):
    """A device without float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert not (isinstance(out, Tensor) and out.dtype == torch.float64), func
        return out


@pytest.mark.parametrize("metric", ["difference", "log-probability", "all logits"])
def test_no_float64_is_made(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    data = make_pair(model, 2, 9, (3,))
    monkeypatch.setattr(runner, "tolerance", lambda dtype: 0.0)  # So that rounding is measured.
    with NoFloat64():
        swept(model, data, "attn_head_out_by_pos", data.metrics[metric], check=3)


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps"])
def test_free_memory_is_that_of_the_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(
        tokens=SimpleNamespace(device=torch.device(device)),
        resid=[torch.zeros(1, 9, 64)],
        logits=torch.zeros(1, 9, 500),
    )

    def budgets(of_machine: int, of_device: int) -> tuple[int, int]:
        machine = SimpleNamespace(available=of_machine)
        monkeypatch.setattr(runner.psutil, "virtual_memory", lambda: machine)
        own = SimpleNamespace(mem_get_info=lambda device: (of_device, 2**40))
        # Apple's devices have the machine's memory, and say nothing of their own.
        monkeypatch.setattr(torch, device, SimpleNamespace() if device == "mps" else own)
        return runner._budgets(run, runner.Options())

    little, much = 2**28, 2**34
    by_machine, by_device = budgets(little, much), budgets(much, little)
    wanted = int.__lt__ if device == "mps" else int.__gt__
    assert all(map(wanted, by_machine, by_device)), (by_machine, by_device)


def test_memory_counts_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    right = runner.Scorer.__init__.__globals__["logits_from_resid"]

    def spy(model: Any, resid: Tensor, *scale: float) -> Tensor:
        sizes.append(resid.shape[0] * resid.shape[1])
        return right(model, resid, *scale)

    monkeypatch.setitem(runner.Scorer.__init__.__globals__, "logits_from_resid", spy)
    model = tiny.model("gpt2")
    data = make_pair(model, 2, 12, (3,))
    for metric in (oracle.all_logits, data.metrics["log-probability"]):
        sizes.clear()
        # Room for the states of seven runs, but not for the logits of as many.
        swept(model, data, "attn_head_out_by_pos", metric, memory=100_000, check=0)
        assert max(sizes) <= 2 * 12


def test_a_metric_may_say_where_it_reads_and_not_which_tokens() -> None:
    class Own:
        positions = torch.tensor([[8], [7]])

        def read(self, logits: Tensor) -> Tensor:
            return logits[torch.arange(2)[:, None], self.positions]

        def from_read(self, read: Tensor) -> Tensor:
            return (read[..., 5] - read[..., 9])[..., 0]

        def __call__(self, logits: Tensor) -> Tensor:
            return self.from_read(self.read(logits)).mean()

    model = tiny.model("gpt2")
    data = make_pair(model, 2, 9, (3,))
    usual = LogitDifference([[5, 9], [5, 9]], positions=[8, 7])
    found = swept(model, data, "resid_pre", Own())
    assert_close(found, swept(model, data, "resid_pre", usual), metric_axis=False)
