"""Sweeps of many families of decoders, each held to the plain loop of ``transformer_lens``."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import architectures
import pytest
import torch
import transformer_lens.patching as plain_patching
from oracle import quiet

from patching_demo import patching
from patching_demo.engine import checks

BLOCKS = ("resid_pre", "mlp_out")
HEADS = ("attn_head_out_all_pos", "attn_head_k_all_pos")
PATTERN = ("attn_head_pattern_all_pos",)
LATENT = {"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"}


def outcome(model: Any, sweep: str, n_pos: int = 7, batch: int = 2) -> str:
    """Run a sweep: "fast", "plain: why" or "refused: why"; fails where a number is wrong."""
    clean = torch.randint(5, 90, (batch, n_pos), generator=torch.Generator().manual_seed(1))
    corrupted = clean.clone()
    corrupted[:, n_pos // 3] = (clean[:, n_pos // 3] + 7) % 90 + 5

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[0, -1, 5] - logits[0, -1, 9] + 0.3 * logits[-1, -2, 7]).float()

    with torch.no_grad(), quiet():
        _, cache = model.run_with_cache(clean)
        name = f"get_act_patch_{sweep}"
        try:
            wanted = getattr(plain_patching, name)(model, corrupted, cache, metric)
        except (KeyError, IndexError) as error:
            return f"refused: no such activation ({error})"
    checks._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = getattr(patching, name)(model, corrupted, cache, metric, progress=False)
        except ValueError as error:
            return f"refused: {error}"
    there = ~found.isnan()  # A kind that is not live is NaN in a combination.
    assert there.any()
    found, wanted = found[there], wanted[there]
    spread = wanted.max() - wanted.min()
    allowed = 1e-4 if wanted.dtype == torch.float32 and model.cfg.dtype == torch.float32 else 0.1
    assert (found - wanted).abs().max() <= allowed * spread, f"{sweep} is wrong in silence"
    why = [str(warning.message) for warning in caught if "plain loop" in str(warning.message)]
    return f"plain: {why[0]}" if why else "fast"


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("OPTForCausalLM", {}),
        ("XGLMForCausalLM", {}),
        ("BloomForCausalLM", {}),
        ("FalconForCausalLM", {}),
        ("FalconForCausalLM", {"alibi": True}),
        ("GraniteForCausalLM", {"logits_scaling": 7.0, "compatible": False}),
        ("CohereForCausalLM", {"compatible": False}),
        ("GPTNeoForCausalLM", {}),
        ("Gemma4ForCausalLM", {}),
        ("LlamaForCausalLM", {"use_cache": False}),
        ("Qwen2ForCausalLM", {"use_cache": False}),
        ("GPTNeoForCausalLM", {"use_cache": False}),
        ("FalconForCausalLM", {"use_cache": False, "alibi": True}),
        ("MistralForCausalLM", {"attention": "sdpa", "sliding_window": 3}),
        ("OlmoForCausalLM", {"dtype": torch.bfloat16, "compatible": False}),
        ("Olmo2ForCausalLM", {"dtype": torch.float16, "compatible": False}),
    ],
)
def test_families_that_people_use_are_served_fast(
    architecture: str, settings: dict[str, Any]
) -> None:
    model = architectures.decoder(architecture, **settings)
    for sweep in (*BLOCKS, *HEADS):
        assert outcome(model, sweep) == "fast", sweep


def test_local_attention_is_exact_beyond_its_window_and_near_the_length_of_its_buffer() -> None:
    model = architectures.decoder("GPTNeoForCausalLM")
    assert outcome(model, "resid_pre", n_pos=40, batch=1) == "fast"
    assert outcome(model, "attn_head_v_all_pos", n_pos=40) == "fast"
    assert outcome(model, "attn_head_all_pos_every", n_pos=44, batch=1) == "fast"


@pytest.mark.parametrize("window", [1, 5, 24, 40])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("MistralForCausalLM", {}),
        ("Gemma3ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_windows_of_any_size_are_served_fast(
    architecture: str, settings: dict[str, Any], window: int
) -> None:
    model = architectures.decoder(
        architecture, sliding_window=window, num_hidden_layers=2, compatible=False, **settings
    )
    assert outcome(model, "attn_head_v_all_pos", n_pos=26, batch=1) == "fast"


TUNED = {"attn_temperature_tuning": True, "floor_scale": 4, "attn_scale": 0.5}


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("Llama4ForCausalLM", {**TUNED, "no_rope_layers": [0, 0, 0]}, "works by the place"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "attend to later ones"),
        ("MptForCausalLM", {}, "not understood"),
    ],
)
@pytest.mark.parametrize("sweep", ["resid_pre", "attn_head_v_all_pos"])
def test_what_goes_by_slot_or_both_ways_is_never_wrong_in_silence(
    architecture: str, settings: dict[str, Any], reason: str, sweep: str
) -> None:
    model = architectures.decoder(architecture, compatible=False, **settings)
    found = outcome(model, sweep, n_pos=26, batch=1)
    # Runs of the same length, one a group, stand where a prompt has them: Llama 4 is right there.
    if sweep == "resid_pre" or "Llama4" not in architecture:
        assert found.startswith("plain: ") and reason in found, found


@pytest.mark.parametrize(
    "architecture", ["Lfm2ForCausalLM", "JambaForCausalLM", "BambaForCausalLM"]
)
def test_hybrids_take_the_plain_loop_aloud(architecture: str) -> None:
    model = architectures.decoder(architecture)
    found = outcome(model, "resid_pre")
    assert found.startswith("plain: ") and "stand-in for its cache" in found


@pytest.mark.parametrize("architecture", sorted(LATENT))
@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_heads_in_the_place_of_positions_are_refused(architecture: str, kind: str) -> None:
    """As many tokens as heads: a shape cannot tell them apart."""
    heads = {"num_key_value_heads": 4}
    model = architectures.decoder(architecture, **heads)
    found = outcome(model, f"attn_head_{kind}_by_pos", n_pos=4)
    assert f"attn.hook_{kind}' has another layout" in found
    assert outcome(model, "resid_pre", n_pos=4) == "fast"


def test_as_many_tokens_as_heads_are_no_matter_elsewhere() -> None:
    model = architectures.decoder("LlamaForCausalLM")
    for sweep in (*HEADS, *PATTERN):
        assert outcome(model, sweep, n_pos=4, batch=1) == "fast"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))  # So that several processes share the work.
def test_every_family_is_fast_plain_or_refused(
    part: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """No family is wrong in silence, and none ends in an error that is not ours."""
    lines, failures = [], []
    for architecture in architectures.DECODERS[part::4]:
        try:
            try:
                model = architectures.decoder(architecture)
            except (RuntimeError, NotImplementedError, ValueError):  # Not every family folds.
                model = architectures.decoder(architecture, compatible=False)
            model(torch.arange(5, 10)[None])
        except Exception as error:
            lines.append(f"{architecture:40} not booted: {str(error).strip()[:60]}")
            continue
        if not hasattr(model, "blocks"):
            continue
        found: dict[str, list[str]] = {}
        for sweep in (*BLOCKS, *HEADS, *PATTERN, "attn_head_out_by_pos"):
            try:
                found.setdefault(outcome(model, sweep).splitlines()[0], []).append(sweep)
            except Exception as error:
                failures.append(f"{architecture} {sweep}: {type(error).__name__}: {error}")
        for result, sweeps in found.items():
            lines.append(f"{architecture:40} {result[:90]:90} {' '.join(sweeps)}")
    with capsys.disabled():  # Of several processes, only this is shown.
        print("", *lines, sep="\n", file=sys.stderr)
    assert not failures, "\n".join(failures)
    assert sum(" fast " in line for line in lines) > 10
