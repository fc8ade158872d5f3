"""The page of messages lists messages that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "book" / "when-it-goes-wrong.md"
VALUE = "…"


def text_of(node: ast.AST) -> str | None:
    """A string of the source, with "…" for each value put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or VALUE for part in node.values)
    return None


def says(message: str, row: str) -> bool:
    """Whether the parts of a row stand in a message, in order."""
    at = 0
    for part in row.split(VALUE):
        at = message.find(part, at) + len(part)
        if at < len(part):
            return False
    return True


def test_each_listed_message_exists() -> None:
    rows = re.findall(r"^\| `(.+?)` \|", PAGE.read_text(encoding="utf-8"), flags=re.M)
    assert len(rows) > 50
    texts = {
        text
        for path in [*(ROOT / "patching_demo").rglob("*.py"), *(ROOT / "book/_ext").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (text := text_of(node))
    }
    for row in rows:
        assert len(re.sub(r"[… ]", "", row)) >= 12, f"{row!r} fits anything"
        assert any(says(text, row) for text in texts), f"no message says {row!r}"
