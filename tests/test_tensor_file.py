"""A file of `torch.save` gives the tensors that PyTorch reads from it, and runs nothing."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from patching_demo.models import tensor_file
from patching_demo.models.tensor_file import DTYPES, read_tensors


def saved(thing: Any, **options: Any) -> bytes:
    packed = io.BytesIO()
    torch.save(thing, packed, **options)
    return packed.getvalue()


def read(content: bytes, folder: Path) -> dict[str, Tensor]:
    (folder / "some.pth").write_bytes(content)
    return read_tensors(folder / "some.pth")


class Attention(nn.Module):
    """What TransformerLens's older models kept: weights, and two buffers beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.W_Q = nn.Parameter(torch.randn(2, 8, 4))
        self.inner = nn.Linear(3, 5)
        self.register_buffer("mask", torch.tril(torch.ones(6, 6)).bool())
        self.register_buffer("IGNORE", torch.tensor(-1e5))


def views() -> dict[str, Tensor]:
    base = torch.randn(6, 4)
    return {"whole": base, "turned": base.T, "a part": base[2:4, 1:], "repeated": base[:1, :1]}


STATES = {
    "a module": Attention().state_dict(),
    "types": {str(d): (torch.randn(3, 2) * 9).to(d) for d in DTYPES.values()},
    "views of the same numbers": views(),
    "spread out": {"row": torch.randn(1, 4).expand(3, 4)},
    # More than one byte counts, and more than pickle sets at once.
    "many": OrderedDict((f"layer {i}", torch.tensor([i])) for i in range(2500)),
    "large": {"a": torch.randn(300, 70_000)[:, ::7]},
    "one": {"only": torch.zeros(1)},
    "none": {},
}


@pytest.mark.parametrize("name", STATES)
def test_tensors_are_those_that_pytorch_reads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = saved(STATES[name])
    wanted = torch.load(io.BytesIO(content), weights_only=True)
    for module, unpickles in ((pickle, "Unpickler"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, unpickles, None)
    found = read(content, tmp_path)
    assert list(found) == list(wanted)
    for key, value in found.items():
        assert value.dtype == wanted[key].dtype and torch.equal(value, wanted[key]), key


class Trap:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize("place", ["whole", "value", "key"])
def test_what_would_call_something_is_refused_by_name(place: str, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = Trap(exec, f"open({str(sprung)!r}, 'w').close()")
    thing = {"whole": trap, "value": {"W": trap}, "key": {trap: torch.zeros(2)}}[place]
    content = saved(thing)
    with pytest.raises(ValueError, match="some.pth is no state dict: GLOBAL .*exec has no place"):
        read(content, tmp_path)
    assert not sprung.exists()
    # The trap does work, on a reader who lets it.
    torch.load(io.BytesIO(content), weights_only=False)
    assert sprung.exists()


def with_list(content: bytes, change: Any, member: str = "data.pkl") -> bytes:
    """The same archive with another list, or another member, in it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith(f"/{member}") else data)
    return packed.getvalue()


SMALL = saved({"W": torch.arange(6.0).view(2, 3), "b": torch.ones(3)})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a zip file"),
        (b"\x80\x02}.", "not a zip file"),
        (SMALL[:-100], "not a zip file"),
        (saved({"W": torch.ones(2)}, _use_new_zipfile_serialization=False), "not a zip file"),
        (with_list(SMALL, lambda list_: list_[:-30]), ""),
        (with_list(SMALL, lambda list_: b""), ""),
        (with_list(SMALL, lambda list_: list_.replace(b"W", b"\xff")), ""),
        (with_list(SMALL, lambda order: b"big", "byteorder"), "another byte order"),
        (with_list(SMALL, lambda numbers: numbers[:8], "data/0"), "out of bounds"),
        (saved({"model": {"W": torch.ones(2)}}), ""),
        (saved({"W": torch.ones(2), "step": 3}), ""),
        (saved([torch.ones(2)]), "EMPTY_LIST"),
        (saved(torch.ones(2)), ""),
        (saved({"W": torch.ones(2).to_sparse()}), "GLOBAL torch"),
        (saved({"W": torch.ones(2, dtype=torch.complex64)}), "GLOBAL torch ComplexFloatStorage"),
    ],
)
def test_anything_else_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"some.pth is no state dict: .*{words}"):
        read(content, tmp_path)


def test_a_damaged_list_gives_tensors_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Whatever bytes stand in the list, and nothing but refusals comes of it."""
    folder = tmp_path_factory.mktemp("damaged")
    with zipfile.ZipFile(io.BytesIO(SMALL)) as archive:
        size = len(archive.read("archive/data.pkl"))

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, 255)), min_size=1, max_size=4)
    )
    def run(changes: list[tuple[int, int]]) -> None:
        def change(list_: bytes) -> bytes:
            altered = bytearray(list_)
            for place, byte in changes:
                altered[place] = byte
            return bytes(altered)

        try:
            found = read(with_list(SMALL, change), folder)
        except ValueError as error:
            assert "some.pth is no state dict: " in str(error)
        else:
            assert all(isinstance(value, Tensor) for value in found.values())

    run()


def test_no_module_of_the_package_unpickles() -> None:
    unpickling = re.compile(r"torch\.load\b|import pickle\b|pickle\.load|allow_pickle|read_pickle")
    for path in Path(tensor_file.__file__).parent.glob("*.py"):
        assert not unpickling.search(path.read_text(encoding="utf-8")), path.name
