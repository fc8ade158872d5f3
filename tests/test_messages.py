"""The page of messages is held to the messages."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "book" / "when-it-goes-wrong.md"
#: Modules each refusal of which must be on the page: those that a sweep goes through.
SWEEPS = ("engine/checks", "engine/runner", "engine/store", "patching")
VALUE = "…"


def rows() -> list[str]:
    """The messages of the page, with "…" where a value stands."""
    found = re.findall(r"^\| `(.+?)` \|", PAGE.read_text(encoding="utf-8"), flags=re.M)
    assert len(found) > 50
    return found


def text_of(node: ast.AST) -> str | None:
    """A string of the source, with "…" for each value put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or VALUE for part in node.values)
    if isinstance(node, ast.BinOp):
        return (text_of(node.left) or VALUE) + (text_of(node.right) or VALUE)
    return None


@lru_cache(None)
def strings(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [text for node in nodes if (text := text_of(node))]


def raised(path: Path) -> list[str]:
    """The texts of errors and warnings that a module raises itself."""
    out = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        if isinstance(node, ast.Raise) or getattr(call.func, "id", "") == "warn_once":
            text = text_of(call.args[0])
            if text:
                out.append(text)
    return out


def says(message: str, row: str) -> bool:
    """Whether the parts of a row stand in a message, in order."""
    place = 0
    for part in row.split(VALUE):
        place = message.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


@pytest.mark.parametrize("row", rows())
def test_each_listed_message_exists(row: str) -> None:
    sources = [*(ROOT / "patching_demo").rglob("*.py"), *(ROOT / "book/_ext").rglob("*.py")]
    assert any(says(text, row) for path in sources for text in strings(path)), (
        f"no message says {row!r}"
    )


@pytest.mark.parametrize("module", SWEEPS)
def test_each_refusal_of_a_sweep_is_listed(module: str) -> None:
    texts = raised(ROOT / "patching_demo" / f"{module}.py")
    assert texts
    listed = rows()
    missing = [
        text
        for text in texts
        if text.strip(VALUE) and not any(says(text, row) for row in listed if len(row) > 8)
    ]
    assert not missing, f"the page does not list {missing}"


def test_no_row_is_so_short_that_it_fits_anything() -> None:
    for row in rows():
        assert len(row.replace(VALUE, "").replace(" ", "")) >= 12, row
