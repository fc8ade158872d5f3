"""However a model keeps its weights, its sweeps are those of its own plain loop, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import tiny
import torch
from oracle import all_logits, make_pair
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from patching_demo import attribute, ioi_task, patch, patching, paths, prompt_task, sweep
from patching_demo.engine import checks
from patching_demo.engine.scoring import tolerance
from patching_demo.tasks import noise_task

pytestmark = pytest.mark.filterwarnings("ignore:the model runs in", "ignore:this sweep takes")
HEADS = {str(head): [("out", 0, head), ("mlp_out", 1)] for head in range(4)}


def task_of(model: Any) -> Any:
    data = make_pair(model, 2, 9, (3,))
    return prompt_task(model, data.clean, data.corrupted, [[5, 9], [11, 6]])


QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "sweep": lambda m: sweep(m, task_of(m), ["resid_pre", "mlp_out"], check=0, progress=False),
    "heads": lambda m: sweep(m, task_of(m), ["out", "k"], check=0, progress=False),
    "roles": lambda m: sweep(m, ioi_task(m), "out", by="role", check=0, progress=False),
    "patch": lambda m: patch(m, task_of(m), HEADS, check=0, progress=False),
}
ESTIMATES: dict[str, Callable[[Any], Any]] = {
    "paths": lambda m: paths(m, task_of(m), [("q", 1, 1)], progress=False),
    "logits": lambda m: paths(m, task_of(m), "logits", progress=False),
    "attribute": lambda m: attribute(m, task_of(m), ["out", "q"], by="all_pos"),
}


def asked(question: str, model: Any, more: dict[str, Any] | None = None) -> tuple[Any, str]:
    """The answer, and why it came by the plain loop, if it did."""
    checks._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = {**QUESTIONS, **ESTIMATES, **(more or {})}[question](model)
    said = [str(w.message) for w in caught]
    return found, "".join(words for words in said if "takes the plain loop" in words)


def plainly(question: str, model: Any) -> Any:
    handle = model.hook_dict["blocks.0.hook_resid_pre"].register_forward_hook(lambda *_: None)
    found, why = asked(question, model)
    handle.remove()
    assert "hooks attached" in why
    return found


def assert_within(found: Any, wanted: Any, share: float) -> None:
    scale = max(float(abs(wanted).max()), abs(wanted.attrs["corrupted_baseline"]))
    assert (found.isnull() == wanted.isnull()).all()
    assert float(abs(found - wanted).max()) <= share * scale


@lru_cache(None)
def in_type(name: str, dtype: torch.dtype) -> Any:
    return tiny.fresh(name).to(dtype)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "llama-gqa"])
def test_every_type_is_its_own_plain_loop_to_its_rounding(
    name: str, dtype: torch.dtype, question: str
) -> None:
    model = in_type(name, dtype)
    found, why = asked(question, model)
    assert not why
    assert_within(found, plainly(question, model), tolerance(dtype))


@pytest.mark.parametrize("question", ESTIMATES)
@pytest.mark.parametrize("dtype", checks.FEWEST_BITS)
def test_few_bits_find_what_single_precision_finds(dtype: torch.dtype, question: str) -> None:
    single, few = tiny.fresh("llama-gqa"), tiny.fresh("llama-gqa").to(dtype)
    found, wanted = asked(question, few)[0], asked(question, single)[0]
    assert_within(found, wanted, 2 * checks.FEWEST_BITS[dtype])


def boot(name: str, change: Callable[[Any], Any], seed: int = 0) -> TransformerBridge:
    """A tiny model on a bridge, not in compatibility mode, its Hugging Face model changed first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hub_name, inner = tiny._hf(name)
    inner = change(inner.eval())
    return TransformerBridge.boot_transformers(
        hub_name, hf_model=inner, tokenizer=tiny.tokenizer()
    ).eval()


def offloaded(inner: Any, folder: Path, how: str) -> Any:
    """The model with some of its modules on disk, or all."""
    if how == "accelerate":
        return accelerate.disk_offload(inner, folder, execution_device="cpu")
    inner.save_pretrained(folder)
    names = [n for n, m in inner.named_modules() if n.count(".") == 1 + n[-1:].isdigit()]
    places = {n: "disk" if n.endswith(".1") or how == "every" else "cpu" for n in names}
    places = {n: p for n, p in places.items() if not n.endswith((".h", ".layers"))}
    return type(inner).from_pretrained(
        folder,
        device_map=places | {"lm_head": "cpu" if how == "block" else "disk"},
        offload_folder=folder / "off",
        attn_implementation="eager",
    )


@pytest.mark.parametrize("how", ["block", "every", "accelerate"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_offloaded_models_are_swept_where_their_blocks_run(
    name: str, how: str, tmp_path: Path
) -> None:
    model = boot(name, lambda inner: offloaded(inner, tmp_path, how))
    assert any(weight.is_meta for weight in model.parameters())
    memory = boot(name, lambda inner: inner)
    for question in (*QUESTIONS, *ESTIMATES):
        found, why = asked(question, model)
        assert not why, question
        assert_within(found, asked(question, memory)[0], 1e-5)
    if how != "block":
        with pytest.raises(RuntimeError, match="token embeddings cannot be extended"):
            clean, roles = "When Mary and John", {"name": " Mary"}
            sweep(model, noise_task(model, clean, (" Mary", " John"), roles), "resid_pre")


class Int8(nn.Module):
    """A linear layer with int8 weights, which may round what it is given as well."""

    def __init__(self, linear: nn.Linear, rounds: str) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        whole = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.rounds = rounds

    def forward(self, states: Tensor) -> Tensor:
        if self.rounds == "nothing, but divides by the size":
            states = states / states.norm(dim=-1, keepdim=True)
        elif self.rounds != "nothing":
            largest = states.abs().amax(-1, keepdim=True)
            largest = (largest if self.rounds == "each token" else largest.amax()) / 127
            states = (states / largest).round() * largest
        return nn.functional.linear(states, self.weight * self.scale)


def quantised(inner: Any, rounds: str, where: str = "") -> Any:
    """The model with every linear layer whose name begins like this quantised."""
    inner.config.quantization_config = {"quant_method": "by hand"}
    for name, module in list(inner.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith(where):
            inner.set_submodule(name, Int8(module, rounds))
    return inner


@pytest.mark.parametrize("question", ["sweep", "roles", "patch"])
@pytest.mark.parametrize("rounds", ["nothing", "nothing, but divides by the size"])
def test_quantised_weights_are_served_fast(rounds: str, question: str) -> None:
    model = boot("llama-gqa", lambda inner: quantised(inner, rounds))
    found, why = asked(question, model)
    assert not why
    assert_within(found, plainly(question, model), tolerance(torch.float32))


@pytest.mark.parametrize(
    ("rounds", "where"),
    [("each token", ""), *(("the whole tensor", w) for w in ("", "model.layers.1", "lm_head"))],
)
def test_what_rounds_its_input_to_few_bits_takes_the_plain_loop(rounds: str, where: str) -> None:
    """One prompt, other from its first token on: a pack of its own tokens has the same largest."""
    model = boot("llama-gqa", lambda inner: quantised(inner, rounds, where))
    data = make_pair(model, 1, 48, tuple(range(48)))
    with pytest.warns(UserWarning, match=r"takes the plain loop: (block|its logits)"):
        checks._warned.clear()
        patching.get_act_patch_attn_head_out_all_pos(
            model, data.corrupted, data.cache, all_logits, check=0, progress=False
        )
    found, why = asked("patch", model)
    assert not why or np.array_equal(found, plainly("patch", model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("library", ["torch", "bitsandbytes", "bitsandbytes, 8 bit", "torchao"])
def test_quantised_by_a_library(library: str, tmp_path: Path) -> None:
    """Its activations too in torch, where it is met with NaN, and in 8 bit; weights alone else."""

    def change(inner: Any) -> Any:
        if library == "torch":
            linear = {n for n, m in inner.named_modules() if isinstance(m, nn.Linear)}
            return torch.ao.quantization.quantize_dynamic(inner, linear - {"lm_head"})
        pytest.importorskip(library.split(",")[0])
        if library == "torchao":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(inner, Int8WeightOnlyConfig())
            return inner
        from transformers import BitsAndBytesConfig

        inner.save_pretrained(tmp_path)
        eight = "8 bit" in library
        bits = BitsAndBytesConfig(load_in_4bit=not eight, load_in_8bit=eight)
        kind = type(inner)
        return kind.from_pretrained(
            tmp_path, quantization_config=bits, device_map="cpu", attn_implementation="eager"
        )

    model = boot("llama-gqa", change)
    for question in ("sweep", "patch"):
        found, why = asked(question, model)
        assert bool(why) == (library in ("torch", "bitsandbytes, 8 bit")), why
        assert_within(found, plainly(question, model), 0 if why else tolerance(torch.float32))
    if library == "torch":
        with pytest.raises(ValueError, match="gradient does not reach"):
            asked("attribute", model)
