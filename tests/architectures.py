"""Tiny random models of more architectures than :mod:`tests.tiny` has, for the sweep tests.

Each shows one thing that a sweep must get right: sliding windows, soft caps, norms after the
attention, norms of queries and keys, a bias added to the attention scores (ALiBi), attention that
the hooks only watch (OPT, GPT-Neo, GPT-J), TransformerLens's own attention with all its options.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import transformers
from tiny import D_VOCAB, N_CTX, tokenizer
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

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
