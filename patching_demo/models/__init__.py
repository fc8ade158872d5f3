"""Models by name, ready for patching: `load_model`, and `resolve_model`, which chooses the name.

Four names are the project's own (`MODELS`). Two come from the model hub, one from the Python
package index, and one is shipped with the package, so that something real runs anywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from patching_demo.models import hub
from patching_demo.models.cache import ModelUnavailable, in_a_line, sha256_of
from patching_demo.models.package_index import smollm2_folder

MODEL_ENV = "PATCHING_DEMO_MODEL"
#: The token that begins every sequence of `attn-only-2l-demo`, which has no tokenizer.
DEMO_BOS = 0
DATA = Path(__file__).parents[1] / "data"

TaskName = Literal["ioi", "induction"]


@dataclass(frozen=True)
class ModelSpec:
    """One row of `MODELS`: which tasks a model can do, and what else there is without a hub."""

    repo: str = ""
    tasks: tuple[TaskName, ...] = ("ioi", "induction")
    #: Whether the repository has TransformerLens's own older layout.
    legacy: bool = False
    #: What to do where it cannot be loaded.
    way_out: str = ' load_model("smollm2-135m") needs no hub, only a Python package index.'


MODELS: dict[str, ModelSpec] = {
    "gpt2-small": ModelSpec("openai-community/gpt2"),
    "attn-only-2l": ModelSpec(
        "NeelNanda/Attn_Only_2L512W_C4_Code",
        legacy=True,
        way_out=' load_model("attn-only-2l-demo") is shipped with the package.',
    ),
    "smollm2-135m": ModelSpec(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        way_out=' load_model("attn-only-2l-demo") needs no index either; it does induction only.',
    ),
    "attn-only-2l-demo": ModelSpec(tasks=("induction",), way_out=""),
}

#: What `auto` means for a task: the model of the literature, then the one that needs no hub.
AUTO: dict[TaskName, tuple[str, str]] = {
    "ioi": ("gpt2-small", "smollm2-135m"),
    "induction": ("attn-only-2l", "attn-only-2l-demo"),
}


def resolve_model(requested: str = "auto", task: TaskName = "ioi") -> str:
    """Return the name of the model to run for a task, and print one line that says why.

    The environment variable `PATCHING_DEMO_MODEL` overrides `requested`. `auto` is the hub's model
    for the task where it is cached or the hub delivers it, else the one that needs no hub; for the
    induction task `attn-only-2l` is replaced by `attn-only-2l-demo` in the same way. The files of
    a hub model are fetched here, so that what is named can be loaded.

    Args:
        requested: a name of `MODELS`, `auto`, or a repository on the hub.
        task: `ioi` (prompts in English) or `induction` (repeated random tokens).

    Raises:
        ValueError: there is no such model or task, or `requested` cannot do the task.
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
        print(f"{MODEL_ENV} is ignored: {problem}.", flush=True)
        chosen = "auto"
    # Where an offline twin exists for exactly this use, a hub model is a preference.
    if chosen == "auto" or (task == "induction" and chosen == best):
        try:
            _fetch(best)
            chosen, why = best, "it is cached, or the hub delivered it"
        except ModelUnavailable as error:
            chosen, why = offline, f"{error}"
    print(f"Model: {chosen} ({why}).", flush=True)
    return chosen


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is `auto`, one of `MODELS`, a hub model, or a folder."""
    if not isinstance(name, str):
        raise ValueError(f"a model's name is a string, not {name!r}")
    if name == "auto" or name in MODELS or _own_folder(name) is not None:
        return
    if _hub_repo(name) is None:
        raise ValueError(
            f"There is no model {name!r}. Choose one of auto, {', '.join(MODELS)}, a repository on "
            "the hub that TransformerLens supports, written owner/name, or a folder that "
            "save_pretrained wrote for the model and its tokenizer."
        )


def _own_folder(name: str) -> Path | None:
    """Return the user's own folder with a model that a name stands for, if it does."""
    try:
        folder = Path(name).expanduser()
        own = name not in MODELS and (folder / "config.json").is_file()
    except (OSError, RuntimeError):  # A name that is too long for a path, or of no user's home.
        return None
    return folder if own else None


def _hub_repo(name: str) -> str | None:
    """Return the repository a name stands for, if it looks like one that the hub may have."""
    if name in MODELS:
        return MODELS[name].repo or None
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):  # "./name" is a path.
        return name
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    if name in OFFICIAL_MODEL_NAMES:
        return name
    return next((repo for repo, aliases in MODEL_ALIASES.items() if name in aliases), None)


def load_model(
    name: str | os.PathLike[str] = "auto", *, device: str | torch.device | None = None
) -> Any:
    """Return a `TransformerBridge` in compatibility mode and eval mode, ready for patching.

    Compatibility mode folds and centres weights, which must leave a model's predictions as they
    are. They are compared with those from before on a few tokens, and a step that changes them is
    left out, with one line that says so.

    Weights are read from safetensors (or, converted once, from a GGUF file) and checked by sha256.
    TransformerLens's own older repositories, of which `attn-only-2l` is one, have a `.pth` file;
    PyTorch's restricted loader reads it, which runs no code, once its sum is right.

    Args:
        name: a name of `MODELS`; `auto` for GPT-2 small where it is cached or the hub delivers it,
            else smollm2-135m (and `PATCHING_DEMO_MODEL` overrides `auto`); a repository on the
            hub that TransformerLens supports; or a folder of your own, which `save_pretrained`
            wrote for the model and its tokenizer.
        device: where it runs; the GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no such model.
        ModelUnavailable: its files are not there or cannot be trusted, or it predicts something
            else once it is in TransformerLens; the message names a model that needs no hub.
    """
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    check_name(name)
    from transformer_lens.utilities import get_device

    try:
        if name == "auto":
            name = resolve_model(name)
        with _quiet():
            bridge = _compatible(name, partial(_boot, name, _fetch(name), device or get_device()))
    except ModelUnavailable as error:
        # One raise from here: what went on inside is in the message.
        way_out = MODELS.get(name, ModelSpec()).way_out
        raise ModelUnavailable(f"{name} can't be loaded: {error}.{way_out}") from None
    folder = _own_folder(name)
    bridge.cfg.model_name = name if folder is None else folder.resolve().name
    return bridge


# Compatibility mode that changes no prediction --------------------------------------------------

#: What to leave out of compatibility mode, one after the other, until predictions stay the same.
#: Value biases are folded as if attention always summed to one, which attention sinks break, and
#: norms as if nothing stood between a norm and the next weights, which quantised models break.
LEFT_OUT: tuple[dict[str, bool], ...] = (
    {},
    {"fold_value_biases": False},
    {"fold_ln": False},
    {"fold_value_biases": False, "fold_ln": False},
    {"no_processing": True},
)
#: How far log-probabilities may move by rounding, as a share of the largest of them. In float32,
#: compatibility mode moves them by less than a tenth of this.
ROUNDING = 1e-4

#: A bridge out of compatibility mode, a few tokens, and what the model predicts after them.
Booted = tuple[Any, Tensor, Tensor]


def _compatible(name: str, boot: Callable[[], Booted]) -> Any:
    """Return a bridge that predicts what its model does, in as much compatibility mode as can be.

    Raises:
        ModelUnavailable: it predicts something else, or cannot be booted.
    """
    for options in LEFT_OUT:
        bridge = None  # Two copies of a large model may be one too many.
        bridge, tokens, expected = boot()
        try:
            bridge.enable_compatibility_mode(**options)
            found = _log_probs(bridge, tokens)
        except Exception as error:  # what TransformerLens did not foresee, or refuses with a reason
            problem = in_a_line(error)
            continue
        # Where both are minus infinity, their difference is no number.
        change = (found - expected).masked_fill(found == expected, 0).abs().max().item()
        if change <= ROUNDING * expected[expected.isfinite()].abs().max().item():
            if options:
                chosen = ", ".join(f"{option}={value}" for option, value in options.items())
                print(
                    f"{name} is used with enable_compatibility_mode({chosen}): more of it would "
                    f"change what the model predicts ({problem}).",
                    flush=True,
                )
            return bridge
        problem = f"log-probabilities off by {change:.2g}"
    raise ModelUnavailable(f"in TransformerLens it predicts something else ({problem})")


def _sample(model: Any, d_vocab: int) -> tuple[Tensor, Tensor]:
    """Return a few tokens `[1, pos]`, and the log-probabilities that follow them."""
    draw = torch.Generator("cpu").manual_seed(0)
    tokens = torch.randint(d_vocab, (1, 12), generator=draw, device="cpu")
    return tokens, _log_probs(model, tokens)


def _log_probs(model: Any, tokens: Tensor) -> Tensor:
    """Return log-probabilities `[1, pos, d_vocab]`; the constant that folding may add is gone."""
    with torch.no_grad():
        output = model.eval()(tokens.to(next(model.parameters()).device))
    return getattr(output, "logits", output).float().log_softmax(-1)


def _boot(name: str, folder: Path, device: Any) -> Booted:
    """Boot a model whose files are in `folder`."""
    if folder == DATA:
        return _boot_demo(device)
    boot = _boot_legacy if _is_legacy(name) else _boot_transformers
    try:
        return boot(folder, _hub_repo(name) or str(folder), device)
    except ModelUnavailable:
        raise
    except Exception as error:  # whatever a stranger's files lead to is said in one line
        reason = in_a_line(error)
        raise ModelUnavailable(f"its files, in {folder}, can't be used ({reason})") from error


def _fetch(name: str) -> Path:
    """Return the folder with a model's files, verified, fetching what isn't there."""
    if name == "attn-only-2l-demo":
        return DATA
    if name == "smollm2-135m":
        return smollm2_folder()
    if folder := _own_folder(name):
        if not hub.has_weights(folder, hub.MODEL_FILES):
            raise ModelUnavailable(
                f"{folder} has no model.safetensors, nor all the files that its index names: write "
                "them with model.save_pretrained(folder)"
            )
        return folder
    if not _is_legacy(name):
        return hub.repository(_hub_repo(name), hub.MODEL_FILES)
    folder = hub.repository(_hub_repo(name), hub.LEGACY_FILES)
    _tokenizer_folder(folder)
    return folder


# From the hub, or converted from the package index ---------------------------------------------


def _is_legacy(name: str) -> bool:
    if name in MODELS:  # without importing TransformerLens, which takes seconds
        return MODELS[name].legacy
    if _own_folder(name):
        return False
    from transformer_lens.model_bridge.sources.tl_legacy import TL_LEGACY_PREFIXES

    return _hub_repo(name).startswith(TL_LEGACY_PREFIXES)


def _tokenizer_folder(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return hub.repository(config["tokenizer_name"], hub.TOKENIZER_FILES)


def _boot_transformers(folder: Path, repo: str, device: Any) -> Booted:
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
    model = model.to(device)
    # The model's own predictions, from before TransformerLens has it.
    sample = _sample(model, model.config.get_text_config().vocab_size)
    bridge = TransformerBridge.boot_transformers(
        repo, hf_model=model, tokenizer=tokenizer, device=device
    )
    return bridge, *sample


def _boot_legacy(folder: Path, repo: str, device: Any) -> Booted:
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
    (weights, *_) = hub.weight_files(folder)
    if hub.recorded_sha256(weights) is None:  # `hub.repository` compares those that there are
        raise ModelUnavailable(f"no sha256 is recorded for {weights}, so it is not read")
    state = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    state = {key: value.float() for key, value in state.items()}
    state = convert_tl_checkpoint(state, cfg)
    # Some of these models were trained without a bias there; absent means zero.
    state.setdefault("unembed.bias", torch.zeros(cfg.d_vocab))
    tokenizer = AutoTokenizer.from_pretrained(
        _tokenizer_folder(folder), add_bos_token=True, local_files_only=True
    )
    bridge = TransformerBridge.boot_native(cfg, tokenizer=tokenizer, device=device, model_name=repo)
    bridge.load_state_dict(state, strict=True)
    return bridge, *_sample(bridge, cfg.d_vocab)


# Shipped ----------------------------------------------------------------------------------------


def _boot_demo(device: Any) -> Booted:
    from safetensors.torch import load_file
    from transformer_lens.model_bridge import TransformerBridge

    record = json.loads((DATA / "attn-only-2l-demo.json").read_text(encoding="utf-8"))
    weights = DATA / "attn-only-2l-demo.safetensors"
    if not weights.is_file() or sha256_of(weights) != record["sha256"]:
        raise ModelUnavailable(
            f"{weights} is not the file that was shipped; install the package again"
        )
    bridge = TransformerBridge.boot_native(
        record["config"], device=device, model_name="attn-only-2l-demo"
    )
    bridge.load_state_dict(load_file(weights), strict=True)
    bridge.cfg.bos_token_id = DEMO_BOS
    return bridge, *_sample(bridge, bridge.cfg.d_vocab)


# Around all of them -----------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice out of a notebook."""
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
