"""Refusals: inputs for which a sweep would give a plausible number that means nothing.

Every check runs before the first forward pass, and every message names the value and the way out.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patching_demo.engine.bridge import Run, block_kind, block_output, hook_point, hooked
from patching_demo.engine.cells import Cell, changed_positions
from patching_demo.engine.scoring import tolerance

#: Types of few bits, and the error to expect in a cell, as a share of the sweep's range.
FEWEST_BITS = {torch.float16: 0.01, torch.bfloat16: 0.1}


def checked_model(model: Any) -> None:
    """Refuse models whose sweep would be wrong.

    Raises:
        TypeError: if the model is not a TransformerBridge with blocks.
        ValueError: if it is in training mode, an encoder, quantised or spread over devices.
    """
    original = getattr(model, "original_model", None)
    config = getattr(original, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("encoder-decoder models are not supported: patch a decoder-only model")
    if not hasattr(model, "blocks") or not hasattr(model, "run_with_hooks"):
        raise TypeError(
            f"the model must be a TransformerBridge of a decoder, got {type(model).__name__}: "
            "see transformer_lens.model_bridge.TransformerBridge.boot_transformers"
        )
    training = [
        name or "the model"
        for root in (model, original)
        if isinstance(root, torch.nn.Module)
        for name, module in root.named_modules()
        if module.training
    ]
    if training:
        raise ValueError(
            f"the model is in training mode ({training[0]}), where dropout makes every run "
            "different: call model.eval() first"
        )
    if getattr(model.cfg, "attention_dir", "causal") == "bidirectional":
        raise ValueError("the model attends in both directions: patch a decoder-only model")
    floating, quantised = set(), []
    for name, parameter in model.named_parameters():
        floating.add((parameter.device, parameter.dtype))
        if not parameter.is_floating_point():
            quantised.append(name)
    if quantised or getattr(config, "quantization_config", None) is not None:
        where = quantised[0] if quantised else "its config says so"
        raise ValueError(f"the model is quantised ({where}): load it in float32 or bfloat16")
    devices = sorted({str(device) for device, _ in floating})
    if len(devices) > 1:
        raise ValueError(f"the model is spread over {devices}: move it to one device")
    for dtype in {dtype for _, dtype in floating} & FEWEST_BITS.keys():
        warn_once(
            f"the model runs in {str(dtype)[6:]}: expect errors of about {FEWEST_BITS[dtype]:.0%} "
            "of the metric's range in every cell"
        )


def checked_tokens(model: Any, tokens: Any) -> Tensor:
    """Tokens as int64 ``[batch, pos]`` on the model's device.

    Raises:
        TypeError: if they are text, or not whole numbers.
        ValueError: if the shape, the length or a token id does not fit the model.
    """
    if isinstance(tokens, str) or (
        isinstance(tokens, Sequence) and tokens and isinstance(tokens[0], str)
    ):
        raise TypeError("corrupted_tokens must be token ids: pass model.to_tokens(prompts)")
    try:
        tokens = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"corrupted_tokens must be int [batch, pos], got {type(tokens).__name__}"
        ) from error
    if tokens.ndim != 2 or not tokens.numel():
        raise ValueError(
            f"corrupted_tokens must be [batch, pos], got shape {tuple(tokens.shape)}: for one "
            "prompt use tokens[None]"
        )
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"corrupted_tokens must be whole numbers, got {tokens.dtype}")
    if tokens.is_meta or tokens.layout is not torch.strided:
        where = "on the meta device" if tokens.is_meta else f"in the layout {tokens.layout}"
        raise TypeError(f"corrupted_tokens must hold their numbers, got a tensor {where}")
    tokens = tokens.to(device=next(model.parameters()).device, dtype=torch.int64)
    lowest, highest, size = int(tokens.min()), int(tokens.max()), model.cfg.d_vocab
    if lowest < 0 or highest >= size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"token id {wrong} is not in the model's vocabulary of {size}")
    n_ctx = getattr(model.cfg, "n_ctx", None)
    if n_ctx and tokens.shape[1] > n_ctx:
        raise ValueError(
            f"the prompts have {tokens.shape[1]} tokens, the model takes at most {n_ctx}: "
            "shorten them"
        )
    _refuse_left_padding(model, tokens)
    return tokens


def _refuse_left_padding(model: Any, tokens: Tensor) -> None:
    """A patched run takes no attention mask, so pads before the text would be attended to."""
    pad, padded = _pads(model, tokens, "bos")
    rows = padded.any(dim=1).nonzero()
    if tokens.shape[1] > 1 and len(rows):
        raise ValueError(
            f"prompt {int(rows[0])} is padded on the left (it starts with the pad token {pad}), "
            "and a sweep takes no attention mask: pad on the right and read each prompt's own last "
            "token (patching_demo.prompt_task does), or use prompts of equal length"
        )


def refuse_reading_pads(
    model: Any, tokens: Tensor, logits: Tensor, metrics: Mapping[str, Callable[[Tensor], Tensor]]
) -> None:
    """Refuse metrics that read where a prompt is padded on the right.

    Found out by changing the logits there, as a function does not say where it reads.

    Raises:
        ValueError: if a metric's value depends on the logits at a pad.
    """
    pad, padded = _pads(model, tokens, "eos")
    for row in padded.any(dim=1).nonzero()[:, 0].tolist():
        for name, metric in metrics.items():
            changed = logits.clone()
            changed[row, padded[row]] = 1 - 2 * logits[row, padded[row]].flip(-1)
            usual = metric(logits.clone())
            # NaN in both is another mistake, and has its own message.
            if not torch.allclose(metric(changed), usual, rtol=0, atol=0, equal_nan=True):
                raise ValueError(
                    f"prompt {row} is padded on the right with the pad token {pad}, and metric "
                    f"{name!r} reads there: read each prompt's own last token "
                    "(patching_demo.metrics takes positions, patching_demo.prompt_task finds them)"
                )


def _pads(model: Any, tokens: Tensor, side: str) -> tuple[int | None, Tensor]:
    """The pad token, and which tokens are padding before ("bos") or after ("eos") the text.

    Where the pad token is also the one that begins or ends a text, a single one that all prompts
    have is text.
    """
    tokenizer = getattr(model, "tokenizer", None)
    pad, mark = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", side))
    if pad is None:
        return None, torch.zeros_like(tokens, dtype=torch.bool)
    inwards = tokens if side == "bos" else tokens.flip(1)
    outer = (inwards == pad).cumprod(dim=1).bool()
    if pad == mark and outer[:, 0].all():
        outer = outer.roll(-1, dims=1)
        outer[:, -1] = False
    return pad, outer if side == "bos" else outer.flip(1)


def checked_activation(
    model: Any, cache: Mapping[str, Tensor], name: str, tokens: Tensor, which: str = "clean"
) -> Tensor:
    """One activation of the clean (or the corrupted) cache, checked against the corrupted tokens.

    Raises:
        ValueError: if the model has no such hook, the cache has no such entry, or its shape
            belongs to other prompts or another model.
    """
    if hook_point(model, name) is None:
        raise ValueError(
            f"this model has no hook {name!r}: block {name.split('.')[1]} has no such activation "
            "(a parallel block has no resid_mid, an attention-only block no mlp_out)"
        )
    ending = name.split(".", 2)[-1]
    activation = _entry(cache, name)
    if activation is None:
        raise ValueError(
            f"the {which} cache has no {name!r}: make it with model.run_with_cache({which}_tokens)"
            f", or with a names_filter that keeps names ending in {ending!r}"
        )
    if not isinstance(activation, Tensor):
        raise ValueError(f"{name!r} in the {which} cache is a {type(activation).__name__}")
    beyond = f"blocks.{model.cfg.n_layers}.{ending}"
    if _entry(cache, beyond) is not None:
        raise ValueError(
            f"the {which} cache has {beyond!r}, but this model has only {model.cfg.n_layers} blocks"
            ": the cache must come from this model"
        )
    expected = _expected_shape(model, name, tokens)
    shape = tuple(activation.shape)
    if not _fits(shape, expected):
        raise ValueError(
            f"{name!r} in the {which} cache has shape {shape}, the corrupted tokens need "
            f"{_shape_in_words(expected)}: clean and corrupted prompts must have the same number "
            "of prompts and of tokens, and the cache must come from this model"
        )
    if not torch.isfinite(activation).all():
        raise ValueError(f"{name!r} in the {which} cache holds NaN or infinity")
    return activation


def _entry(cache: Mapping[str, Any], name: str) -> Any:
    """An entry of a cache, None if it has no such entry or is no cache at all."""
    try:
        return cache[name]
    except (KeyError, TypeError, IndexError):
        return None


class Survey:
    """What the swept hooks are given during one forward pass of the corrupted prompts.

    It costs no pass of its own: it listens to the one that a sweep starts with. Attributes:
        moved: per hook name, whether clean and corrupted differ at a position: bool ``[pos]``.
        far: the same, but only where they differ by more than rounding.
    """

    def __init__(self, clean: Mapping[str, Tensor]) -> None:
        self.clean = clean
        self.moved: dict[str, Tensor] = {}
        self.far: dict[str, Tensor] = {}

    @contextmanager
    def listening(self, model: Any) -> Iterator[Survey]:
        """Listen while the model runs.

        Raises:
            ValueError: on leaving, if a swept hook was not called, or has another shape.
        """
        with ExitStack() as stack:
            for name in self.clean:
                stack.enter_context(hooked(model, name, self._listener(name)))
            yield self
        for name in self.clean:
            if name not in self.moved:
                raise ValueError(
                    f"hook {name!r} is not live on this model: a forward pass never calls it, so "
                    "every cell would read as zero effect (some hooks need a switch, for instance "
                    "model.set_use_attn_result(True))"
                )

    def _listener(self, name: str) -> Callable[..., None]:
        return lambda activation, hook=None: self.compare(name, activation)

    def compare(self, name: str, activation: Tensor) -> None:
        """Note where a corrupted activation differs from the clean one.

        Raises:
            ValueError: if it has another shape.
        """
        clean = self.clean[name].to(activation.device)
        if clean.shape != activation.shape:
            raise ValueError(
                f"{name!r} in the clean cache has shape {tuple(clean.shape)}, in the corrupted "
                f"run it has {tuple(activation.shape)}: the cache must come from this model"
            )
        position = 2 if name.endswith("hook_pattern") else 1
        others = [axis for axis in range(clean.ndim) if axis != position]
        apart = (clean - activation).abs()
        allowed = 0.1 * tolerance(clean.dtype) * clean.abs().max()
        self.moved[name] = (clean != activation).amax(dim=others).cpu()
        self.far[name] = (apart > allowed).amax(dim=others).cpu()

    def narrowed(self, cells: Sequence[Cell], differing: Sequence[int]) -> list[Cell]:
        """Cells with only the positions that the patch can change (idea 3 of the engine).

        That nothing changes before the first input that differs holds for the cache of a clean
        run, not for one that was edited (averaged over prompts, for instance). So it is believed
        only where the activations themselves agree.
        """
        known: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
        out = []
        for cell in cells:
            key = cell.hook_name, cell.positions
            if cell.kind is not None and key not in known:
                claimed = changed_positions(cell.kind, cell.layer, cell.positions, differing)
                moved, far = self.moved[cell.hook_name], self.far[cell.hook_name]
                known[key] = tuple(
                    p for p in cell.positions if moved[p] and (p in claimed or far[p])
                )
            positions = known.get(key, cell.positions)
            out.append(cell if positions == cell.positions else replace(cell, positions=positions))
        return out

    def warn_if_nothing_moves(self, differing: Sequence[int]) -> None:
        """Warn once if clean and corrupted activations are the same everywhere."""
        apart = self.moved if differing else self.far
        if not any(bool(moved.any()) for moved in apart.values()):
            warn_once(
                "there is nothing to patch: clean and corrupted activations are the same at every "
                "position (are the prompts the same?), so every cell is the corrupted baseline"
            )


def refuse_dead_hooks(model: Any, tokens: Tensor, run: Run | None, cells: Sequence[Cell]) -> None:
    """Refuse hooks that can be read but not patched.

    Where a model's attention is computed elsewhere, the hook is called with a finished copy, and
    what it returns goes nowhere. Found by returning NaN from it, once for each kind of block: one
    block is run where the engine runs blocks, else the model.

    Raises:
        ValueError: if the output does not depend on what the hook returns.
    """
    tried: set[Any] = set()
    for name, cell in {cell.hook_name: cell for cell in cells}.items():
        if run is not None and cell.kind is not None and cell.kind.enters != "hook":
            continue  # The residual stream itself is set, not a hook.
        kind = (name.split(".", 2)[-1], block_kind(model, cell.layer))
        if kind in tried:
            continue
        tried.add(kind)
        with hooked(model, name, _not_a_number):
            patched = _output(model, tokens, run, cell.layer)
        if patched.isnan().any():
            continue
        if torch.equal(patched, _output(model, tokens, run, cell.layer)):
            raise ValueError(
                f"hook {name!r} is not live on this model: it is called, but what it returns "
                "changes nothing (the attention is computed elsewhere), so it would read as zero "
                "everywhere. Sweep another activation, for instance the heads' outputs"
            )


def _output(model: Any, tokens: Tensor, run: Run | None, layer: int) -> Tensor:
    if run is None:
        return model(tokens, return_type="logits")
    return block_output(model, run, layer)


def _not_a_number(activation: Tensor, hook: Any = None) -> Tensor:
    return torch.full_like(activation, float("nan"))


def _fits(shape: tuple[int, ...], expected: tuple[Any, ...]) -> bool:
    """Whether the sizes are the expected ones: None is any size, a final ... any further sizes."""
    if expected[-1] is ...:
        expected = expected[:-1]
        shape = shape[: len(expected)]
    return len(shape) == len(expected) and all(
        want is None or got == want for got, want in zip(shape, expected, strict=True)
    )


def _expected_shape(model: Any, name: str, tokens: Tensor) -> tuple[Any, ...]:
    batch, n_pos = tokens.shape
    heads = model.cfg.n_heads
    last = name.rsplit(".", 1)[-1]
    if last == "hook_pattern":
        return batch, heads, n_pos, n_pos
    if last in ("hook_q", "hook_z"):
        return batch, n_pos, heads, None
    if last in ("hook_k", "hook_v"):
        return batch, n_pos, getattr(model.cfg, "n_key_value_heads", None) or heads, None
    if last.startswith("hook_resid_") or last in ("hook_attn_out", "hook_mlp_out"):
        return batch, n_pos, model.cfg.d_model
    return (batch, ...)  # The rest is compared with the corrupted run's own, see Survey.


def _shape_in_words(shape: tuple[Any, ...]) -> str:
    words = {None: "any", ...: "..."}
    return "[" + ", ".join(words.get(size, str(size)) for size in shape) + "]"


_INNER = ("patching_demo.", "torch.")  # What lies between a warning and who caused it.
_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn, but not a second time with the same words.

    The warning points to the caller's line. Its module is given as ``patching_demo``, so that
    filters for this package find it.
    """
    if message in _warned:
        return
    _warned.add(message)
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(_INNER):
        frame = frame.f_back
    warnings.warn_explicit(
        message, UserWarning, frame.f_code.co_filename, frame.f_lineno, module="patching_demo"
    )
