"""Tiny random models and a tokenizer made in code, so that tests need no network and no weights.

Every builder is cached: tests share the models and must leave them as they were. ``fresh`` makes
one that a test may change.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from patching_demo.tasks import IOI_ANSWERS, IOI_PROMPTS

D_VOCAB = 128
N_CTX = 64

_SPECIAL = ("<bos>", "<pad>", "<unk>")
_WORDS = tuple(" " + w for w in "cat dog sat on mat ran home Rome Paris <  $ script".split())
# Some words also without their space, and the pieces of "<b>" and "$x$".
_BARE = ("Mary", "John", "ing", ".", "!", "\n", " ", "<", ">", "/", "$", "x", "b", "script", "The")


@lru_cache(None)
def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level with leading spaces kept, as in GPT-2: "gave the" is "gave" and " the"."""
    pattern = r" ?\w+| ?[^\w\s]|\s"
    splitter = Split(Regex(pattern), "isolated")
    texts = [*IOI_PROMPTS, *(a for pair in IOI_ANSWERS for a in pair)]
    pieces = [piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)]
    words = [*_SPECIAL, *pieces, *_WORDS, *_BARE]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    assert len(vocab) <= D_VOCAB
    inner = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = splitter
    inner.decoder = decoders.Fuse()
    inner.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<bos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=N_CTX,
        # The bridge rebuilds, from the hub, a tokenizer that does not prepend BOS itself.
        add_bos_token=True,
        name_or_path="tiny",
    )


@lru_cache(None)
def of_words(words: str, layers: int = 1, heads: int = 2) -> TransformerBridge:
    """A GPT-2 that has these words, each with a leading space, as single tokens.

    Its tokenizer is byte-level BPE, which can spell every other word, and has a chat template.
    """
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        special_tokens=["<bos>", "<pad>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([f" {words}"], trainer)
    inner.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<bos>",
        pad_token="<pad>",
        add_bos_token=True,
        name_or_path="tiny of words",
    )
    made.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    config = GPT2Config(
        vocab_size=len(made),
        attn_implementation="eager",
        n_embd=8 * heads,
        n_layer=layers,
        n_head=heads,
        n_positions=256,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = GPT2LMHeadModel(config)
    bridge = TransformerBridge.boot_transformers(
        "gpt2", hf_model=network, tokenizer=made, device="cpu"
    )
    bridge.enable_compatibility_mode()
    return bridge.eval()


def _hf(name: str) -> tuple[str, Any]:
    """(a hub name whose architecture the bridge knows, a random model of it)."""
    shared = {"vocab_size": D_VOCAB, "attn_implementation": "eager"}
    # Large initial weights: with the usual 0.02, two layers hardly change a logit.
    if name.startswith("gpt2"):
        # The second has the layers and heads of GPT-2 small, so that they can be named.
        width, depth, heads = {"gpt2": (32, 2, 4), "gpt2-12x12": (24, 12, 12)}[name]
        config = GPT2Config(
            n_embd=width,
            n_layer=depth,
            n_head=heads,
            n_positions=N_CTX,
            initializer_range=0.2,
            **shared,
        )
        return "gpt2", GPT2LMHeadModel(config)
    if name.startswith("neox"):
        config = GPTNeoXConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=N_CTX,
            use_parallel_residual=name == "neox-parallel",
            initializer_range=0.2,
            **shared,
        )
        return "EleutherAI/pythia-14m", GPTNeoXForCausalLM(config)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers={"llama": 2, "llama-gqa": 3}[name],
        num_attention_heads=4,
        num_key_value_heads={"llama": 4, "llama-gqa": 2}[name],
        max_position_embeddings=N_CTX,
        initializer_range=0.2,
        **shared,
    )
    return "meta-llama/Llama-2-7b-hf", LlamaForCausalLM(config)


#: Names that :func:`model` takes.
NAMES = ("gpt2", "neox-parallel", "neox-sequential", "llama", "llama-gqa", "attn-only")


def fresh(name: str, *, compatible: bool = True, seed: int = 0) -> TransformerBridge:
    """A new tiny model in eval mode, in compatibility mode unless asked otherwise."""
    if name == "attn-only":
        config = TransformerBridgeConfig(
            n_layers=2,
            d_model=32,
            n_heads=4,
            d_head=8,
            n_ctx=N_CTX,
            d_vocab=D_VOCAB,
            attn_only=True,
            act_fn=None,
            normalization_type="LN",
            seed=seed,
        )
        bridge = TransformerBridge.boot_native(config)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hub_name, inner = _hf(name)
        bridge = TransformerBridge.boot_transformers(
            hub_name, hf_model=inner, tokenizer=tokenizer(), device="cpu"
        )
    if compatible:
        bridge.enable_compatibility_mode()
    return bridge.eval()


@lru_cache(None)
def model(name: str, *, compatible: bool = True) -> TransformerBridge:
    """The shared tiny model of that name; see :data:`NAMES`."""
    return fresh(name, compatible=compatible)
