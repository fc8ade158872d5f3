"""Tiny random models of more architectures than :mod:`tests.tiny` has, for the sweep tests.

Each shows one thing that a sweep must get right: sliding windows, soft caps, norms after the
attention, norms of queries and keys, a bias added to the attention scores (ALiBi), attention that
the hooks only watch (OPT, GPT-Neo, GPT-J), TransformerLens's own attention with all its options.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from unittest import mock

import huggingface_hub
import torch
import transformers
from tiny import D_VOCAB, N_CTX, tokenizer
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.transformers import helpers
from transformers.models.auto import modeling_auto

_LLAMA_LIKE = dict(
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_size=32,
    intermediate_size=48,
    max_position_embeddings=N_CTX,
    head_dim=8,
)
_GEMMA = {**_LLAMA_LIKE, "sliding_window": 3, "query_pre_attn_scalar": 8}

#: name: (a hub name whose architecture the bridge knows, transformers class, config)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma2": (
        "google/gemma-2-2b",
        "Gemma2",
        {**_GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "google/gemma-3-1b-pt",
        "Gemma3",
        {
            **_GEMMA,
            "layer_types": ["sliding_attention", "full_attention"],
            "architectures": ["Gemma3ForCausalLM"],
        },
    ),
    "mistral": ("mistralai/Mistral-7B-v0.1", "Mistral", {**_LLAMA_LIKE, "sliding_window": 3}),
    "qwen3": ("Qwen/Qwen3-0.6B", "Qwen3", _LLAMA_LIKE),
    "olmo2": (
        "allenai/OLMo-2-0425-1B",
        "Olmo2",
        {**_LLAMA_LIKE, "num_key_value_heads": 4, "architectures": ["Olmo2ForCausalLM"]},
    ),
    "bloom": ("bigscience/bloom-560m", "Bloom", dict(n_layer=2, n_head=4, hidden_size=32)),
    "opt": (
        "facebook/opt-125m",
        "OPT",
        dict(
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_size=32,
            ffn_dim=48,
            max_position_embeddings=N_CTX,
            word_embed_proj_dim=32,
        ),
    ),
    "gpt-neo": (
        "EleutherAI/gpt-neo-125M",
        "GPTNeo",
        dict(
            num_layers=2,
            num_heads=4,
            hidden_size=32,
            max_position_embeddings=N_CTX,
            attention_types=[[["global", "local"], 1]],
            window_size=3,
        ),
    ),
    "gpt-j": (
        "EleutherAI/gpt-j-6b",
        "GPTJ",
        dict(n_layer=2, n_head=4, n_embd=32, n_positions=N_CTX, rotary_dim=4),
    ),
}

#: Those that the fast engine serves.
FAST = ("gemma2", "gemma3", "mistral", "qwen3", "olmo2", "native")
#: Those whose attention pattern can be read but not patched.
PATTERN_NOT_LIVE = ("opt", "gpt-neo", "gpt-j")


@lru_cache(None)
def model(name: str) -> TransformerBridge:
    """A shared tiny model in compatibility mode and eval mode; leave it as it was."""
    if name == "native":
        return _native()
    hub_name, family, settings = ARCHITECTURES[name]
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_name)(vocab_size=D_VOCAB, **settings)
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = getattr(transformers, f"{family}ForCausalLM")(config)
        for parameter in inner.parameters():
            # Far from the usual tiny weights, so that every patch shows in the logits.
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            else:
                torch.nn.init.normal_(parameter, mean=0.7, std=0.3)
    bridge = TransformerBridge.boot_transformers(
        hub_name, hf_model=inner, tokenizer=tokenizer(), device="cpu"
    )
    bridge.enable_compatibility_mode()
    return bridge.eval()


# Sizes by the names that configs give them; a config takes those that it has.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("attention_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("head_dim", "kv_channels", "global_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "moe_intermediate_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "n_groups"), 1),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "pad_token_id"), 1),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), N_CTX),
    "vocab_size": D_VOCAB,
}
_MAMBA = {"mamba_n_heads": 8, "n_mamba_heads": 8}
_LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_CONV = {"layer_types": ["conv", "full_attention", "conv"]}
_GEMMA4 = {"vocab_size_per_layer_input": D_VOCAB, "hidden_size_per_layer_input": 8}
#: What a family needs besides.
_SETTINGS: dict[str, dict[str, Any]] = {
    "Bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "FalconH1": {**_MAMBA, "mamba_d_ssm": 64},
    "GraniteMoeHybrid": {
        **_MAMBA,
        "layer_types": ["mamba", "attention", "mamba"],
        "position_embedding_type": "rope",
    },
    "Mamba2": {"num_heads": 8, "head_dim": 8},
    "Zamba2": {
        **_MAMBA,
        "layer_types": ["mamba", "hybrid", "mamba"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "DeepseekV3": {"num_key_value_heads": 4, "head_dim": 4},
    "Youtu": {"num_key_value_heads": 4, "head_dim": 4},
    "GlmMoeDsa": {"num_key_value_heads": 4, "index_n_heads": 4},
    "Gemma4": _GEMMA4,
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    **dict.fromkeys(("Lfm2", "Lfm2Moe"), _CONV),
    **dict.fromkeys(("Qwen3Next", "Qwen3_5", "Qwen3_5Moe", "OlmoHybrid"), _LINEAR),
    "GPTNeo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 4},
}
_DECODERS = {
    "AudioFlamingo3ForConditionalGeneration",
    "MusicFlamingoForConditionalGeneration",
    *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    *getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {}).values(),
    *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
}
#: Every decoder that TransformerLens boots and Transformers makes from a config, also those that
#: take text beside pictures or sound. Not there: those whose code is on the hub alone. Some that
#: see need torchvision.
DECODERS = sorted(_DECODERS & set(SUPPORTED_ARCHITECTURES) & set(dir(transformers)))


def decoder(
    architecture: str,
    *,
    compatible: bool = True,
    dtype: torch.dtype = torch.float32,
    attention: str = "eager",
    **more: Any,
) -> TransformerBridge:
    """A new tiny random model of any architecture in :data:`DECODERS`, in eval mode."""
    family = architecture.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    made = getattr(transformers, architecture)
    config = _tiny_config(made.config_class, {**_SETTINGS.get(family, {}), **more})
    config.architectures = [architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = made._from_config(config, attn_implementation=attention)
        for parameter in inner.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    # Some families ask a hub for more of themselves, and wait where there is none; for those that
    # see, TransformerLens installs packages.
    with (
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        mock.patch.object(helpers, "_ensure_torchvision", lambda: False),
    ):
        bridge = TransformerBridge.boot_transformers(
            f"tiny/{family}",
            hf_model=inner.to(dtype),
            tokenizer=tokenizer(),
            device="cpu",
            dtype=dtype,
        )
    if compatible:
        bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge.eval()


def _tiny_config(kind: Any, settings: dict[str, Any]) -> Any:
    usual = kind()
    names = {*usual.to_dict(), *getattr(kind, "attribute_map", {})}
    sizes = {name: size for name, size in _SIZES.items() if name in names}
    for part in getattr(kind, "sub_configs", {}):
        if (inner := getattr(usual, part, None)) is not None:
            more = settings if part == "text_config" else {}
            sizes[part] = _tiny_config(type(inner), more).to_dict()
    return kind(**{**sizes, **settings})


def _native() -> TransformerBridge:
    """TransformerLens's own model: rotary positions, grouped-query heads, soft caps, gated MLP."""
    config = TransformerBridgeConfig(
        n_layers=2,
        d_model=32,
        n_heads=4,
        n_key_value_heads=2,
        d_head=8,
        d_mlp=48,
        n_ctx=N_CTX,
        d_vocab=D_VOCAB,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=4,
        attn_scores_soft_cap=2.0,
        initializer_range=0.2,
        seed=0,
    )
    bridge = TransformerBridge.boot_native(config)
    bridge.enable_compatibility_mode()
    return bridge.eval()
