"""Weights in a file of `torch.save`, read as data: nothing in the file is unpickled.

Such a file is a zip archive. It has the numbers of every tensor as they are, and a list of names,
types and shapes, `data.pkl`, in the form of a pickle: a small program for a stack machine. The few
steps that spell out such a list are followed here. Any other is refused, and none calls anything.
"""

from __future__ import annotations

import pickletools
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TENSOR, ORDERED = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
DTYPES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch BoolStorage": torch.bool,
}
LITERALS = {"EMPTY_TUPLE": (), "NEWTRUE": True, "NEWFALSE": False, "NONE": None}
VALUES = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}
MARK = object()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict by name.

    Raises:
        ValueError: the file is something else, is damaged, or has more in it than tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (listing,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            folder = listing.removesuffix("data.pkl")
            order = f"{folder}byteorder"
            if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
                raise ValueError("its numbers are those of a machine with another byte order")
            entries = _listed(archive.read(listing))
            return {name: _tensor(archive, folder, entry) for name, entry in entries.items()}
    except Exception as error:  # whatever a file that is something else leads to
        raise ValueError(f"{path.name} is no state dict: {error}") from error


def _listed(program: bytes) -> dict[str, Any]:
    """What a pickled state dict says of its tensors: by name, the arguments that would make it."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        place = len(stack) - 1 - stack[::-1].index(MARK)
        items = stack[place + 1 :]
        del stack[place:]
        return items

    for step, value, _ in pickletools.genops(program):
        name = step.name
        if name in VALUES or (name == "GLOBAL" and value in (TENSOR, ORDERED, *DTYPES)):
            stack.append(value)
        elif name in LITERALS:
            stack.append(LITERALS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            stack.append(MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "REDUCE":  # In a pickle it calls; here the arguments themselves will do.
            arguments, called = stack.pop(), stack.pop()
            stack.append({} if called == ORDERED else arguments)
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "BUILD":
            stack.pop()  # Versions of the layers, which a state dict carries along.
        elif name not in ("PROTO", "BINPERSID", "STOP"):
            raise ValueError(f"{name} {value or ''} has no place in a list of tensors")
    (listed,) = stack
    return listed


def _tensor(archive: zipfile.ZipFile, folder: str, entry: Any) -> Tensor:
    (_, kind, key, *_), offset, shape, stride, *_ = entry
    numbers = torch.frombuffer(bytearray(archive.read(f"{folder}data/{key}")), dtype=DTYPES[kind])
    return numbers.as_strided(shape, stride, offset).clone()
