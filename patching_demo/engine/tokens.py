"""Token ids and what the model says of them: vocabulary, length, heads, and what is padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from patching_demo.engine.kinds import Kind

__all__ = [
    "check_ids",
    "check_length",
    "config_number",
    "device_of",
    "devices_of_weights",
    "heads_of",
    "key_value_heads",
    "name_of",
    "pads",
    "text_lengths",
    "whole_numbers",
]


def whole_numbers(values: Any, what: str) -> Tensor:
    """``values`` as an int64 tensor that is nobody else's.

    Raises:
        TypeError: if they are anything but whole numbers in a rectangle.
        ValueError: if there are none.
    """
    if isinstance(values, Mapping):
        ids = ": pass its ['input_ids']" if "input_ids" in values else ""
        raise TypeError(f"{what} must be whole numbers, got {type(values).__name__}{ids}")
    try:
        tensor = (
            values if isinstance(values, torch.Tensor) else torch.as_tensor(values, device="cpu")
        )
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise TypeError(
            f"{what} must be whole numbers in rows of equal length, got {type(values).__name__}"
        ) from error
    if not tensor.numel():
        raise ValueError(f"{what} is empty, of shape {tuple(tensor.shape)}")
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{what} must be whole numbers, got {tensor.dtype}")
    if tensor.is_meta or tensor.layout is not torch.strided:
        where = "on the meta device" if tensor.is_meta else f"in the layout {tensor.layout}"
        raise TypeError(f"{what} must hold numbers, got a tensor {where}")
    return tensor.detach().to(torch.int64, copy=True)


def check_ids(model: Any, ids: Tensor, what: str) -> None:
    """Refuse ids that are not in the model's vocabulary.

    Raises:
        ValueError: naming one of them.
    """
    size = config_number(model, "d_vocab")
    if size is not None:
        size += vars(model).get("_more_tokens", 0) if hasattr(model, "__dict__") else 0
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (size is not None and high >= size):
        raise ValueError(
            f"{what}: token id {low if low < 0 else high} is not in the model's vocabulary of "
            f"{size}. Was it made by another model's tokenizer?"
        )


def check_length(model: Any, length: int, what: str) -> None:
    """Refuse prompts that are longer than the model's context.

    Raises:
        ValueError: with both numbers.
    """
    most = config_number(model, "n_ctx")
    if most is not None and length > most:
        raise ValueError(f"{what} has {length} tokens, the model takes at most {most}: shorten it")


def config_number(model: Any, name: str) -> int | None:
    """A positive whole number of the model's config, None if it has none of that name."""
    value = getattr(getattr(model, "cfg", None), name, None)
    return value if isinstance(value, int) and value > 0 else None


def key_value_heads(model: Any) -> int:
    """How many heads keys and values have: fewer than queries under grouped-query attention."""
    return config_number(model, "n_key_value_heads") or int(model.cfg.n_heads)


def heads_of(model: Any, kind: Kind | None) -> int:
    """How many heads an activation of this kind has, where it has heads."""
    return key_value_heads(model) if kind and "kv_head" in kind.axes else int(model.cfg.n_heads)


def device_of(model: Any) -> Any:
    """Where the model's inputs belong: with its first weights.

    Its config may say otherwise: "meta" where it is offloaded, and the GPU, where there is one, for
    a model that was given to `boot_transformers` on the CPU.
    """
    return devices_of_weights(model)[0]


def devices_of_weights(model: Any) -> list[torch.device]:
    """Where each parameter is while its module runs: offloaded ones are brought there."""
    found = []
    for module in model.modules():
        hook = vars(module).get("_hf_hook")  # of accelerate
        for weight in module.parameters(recurse=False):
            brought = weight.is_meta and getattr(hook, "offload", False)
            found.append(torch.device(hook.execution_device) if brought else weight.device)
    return found


def name_of(model: Any) -> str:
    """What the model's config calls it."""
    return str(getattr(getattr(model, "cfg", None), "model_name", None) or "model")


def pads(model: Any, tokens: Tensor, side: str) -> tuple[int | None, Tensor, Tensor]:
    """What of tokens ``[batch, pos]`` without a mask is padding on the "left" or "right".

    Ids alone do not tell where the pad token also begins or ends texts. So on the right the first
    of them may be the end of its text, and on the left one or two that all prompts have may be
    its beginning (two where a chat template wrote the BOS that the tokenizer puts there too).

    Returns:
        The pad token's id, and bool ``[batch, pos]``: what surely is padding, and what may be.
    """
    tokenizer = getattr(model, "tokenizer", None)
    pad, *marks = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))
    nowhere = torch.zeros_like(tokens, dtype=torch.bool)
    if pad is None:
        return None, nowhere, nowhere
    inwards = tokens if side == "left" else tokens.flip(1)
    outer = (inwards == pad).cumprod(dim=1).bool()
    count = outer.sum(1, keepdim=True)
    if pad not in marks:
        sure, may = outer, nowhere
    elif side == "left":
        sure = outer & ((count > count.min()) | (count > 2))
        may = outer & (count == 2) & ~sure
    else:
        innermost = outer & (outer.cumsum(1) == count)
        sure = outer & ~innermost
        may = innermost if (count != 1).any() else nowhere
    return (pad, sure, may) if side == "left" else (pad, sure.flip(1), may.flip(1))


def text_lengths(mask: Any, tokens: Tensor) -> Tensor:
    """The tokens of each prompt without padding, int64 ``[batch]``, from its attention mask.

    Raises:
        TypeError: if the mask is anything but whole numbers or truth values.
        ValueError: if it has another shape, or lacks a token that is not at the end.
    """
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = mask.long()
    mask = whole_numbers(mask, "attention_mask").to(tokens.device)
    if mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask must be {list(tokens.shape)} as the tokens are, got {list(mask.shape)}"
        )
    there = mask != 0
    lengths = there.sum(1)
    within = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    wrong = (there != within).any(1) | (lengths == 0)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"the attention mask of prompt {row} hides tokens that are not at its end, and a sweep "
            "takes no mask: pad on the right"
        )
    return lengths
