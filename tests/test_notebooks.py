"""The chapters install what they need, type no result, and check what they claim."""

from __future__ import annotations

import ast
import importlib.util
import re

import chapters
import nbformat
import pytest
from chapters import ROOT, SCRIPTS, cells, code

from patching_demo import load_model
from patching_demo.claims import Claims

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
by_chapter = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)

# Numbers that explain a scale or name a place, and report no result.
EXAMPLES = {"0.3", "30 %", "100 %"}
# Part of a name: a head, a year, a paper, an activation.
NAMES = re.compile(r"L\d+H\d+|blocks\.\d+|\(https?://[^)]*\)|\b20\d\d\b|GPT-2|`[^`]*`")
RESULT = re.compile(r"\d+\.\d+|\d+ ?%|\b\d+ (?:nats|logits|times)\b")


@by_chapter
def test_install_cell_installs_from_the_repository_and_only_where_needed(script, monkeypatch):
    cell = cells(script, "code")[0]  # before anything of the package is imported
    (line,) = re.findall(r"^ *%pip (.*)$", cell.source, re.M)
    assert f'"patching-demo @ git+{URLS["Repository"]}"' in line
    runnable = re.sub(r"%pip.*", "installed.append(True)", cell.source)
    for found, expected in ((object(), []), (None, [True])):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        installed: list[bool] = []
        exec(runnable, {"installed": installed})
        assert installed == expected


@by_chapter
def test_model_is_a_parameter(script):
    (cell,) = [c for c in cells(script, "code") if "parameters" in c.metadata.get("tags", [])]
    assert cell.source == 'MODEL = "auto"'
    assert any("notebook.model(MODEL" in c.source for c in cells(script, "code"))


@by_chapter
def test_public_names_only(script):
    for tree in map(ast.parse, code(script)):
        for node in ast.walk(tree):
            if isinstance(node, (ast.Attribute, ast.alias)):
                name = node.attr if isinstance(node, ast.Attribute) else node.name
                assert not name.startswith("_"), name
            if isinstance(node, ast.keyword) and node.arg == "progress":
                pytest.fail("a reader should see how far a sweep is")


@by_chapter
def test_prose_types_no_result(script):
    for cell in cells(script, "markdown"):
        typed = set(RESULT.findall(NAMES.sub("", cell.source))) - EXAMPLES
        assert not typed, f"{typed} in: {cell.source[:200]}"


@by_chapter
def test_computed_sentences_type_no_result(script):
    """In code, digits of a sentence stand inside the braces of an f-string."""
    for tree in map(ast.parse, code(script)):
        nodes = list(ast.walk(tree))
        specs = [
            n.format_spec for n in nodes if isinstance(n, ast.FormattedValue) and n.format_spec
        ]
        formats = {id(part) for spec in specs for part in ast.walk(spec)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) in formats:
                    continue
                assert not RESULT.search(NAMES.sub("", node.value)), node.value


@by_chapter
def test_every_sweep_is_drawn_with_its_largest_cells(script):
    sources = [cell.source for cell in cells(script, "code")]
    for i, source in enumerate(sources):
        if "plots.heatmap(" in source or "plots.curves(two_places" in source:
            beside = source + "".join(sources[i + 1 : i + 2])
            assert "notebook.largest(" in beside or "claims.check(" in beside


@by_chapter
def test_chapter_states_what_it_expects_and_checks_it(script):
    text = " ".join(cell.source for cell in cells(script, "markdown"))
    assert re.search(r"\b[Ee]xpect", text)
    sources = code(script)
    made, shown = (sum(s.count(part) for s in sources) for part in ("= Claims(", "claims.show()"))
    assert made == shown > 0, "claims that are not shown are not verified"


@pytest.mark.hub
@pytest.mark.parametrize(
    ("chapter", "model"),
    [
        ("01", "gpt2-small"),
        ("02", "gpt2-small"),
        ("03", "attn-only-2l"),
        ("04", "attn-only-2l"),
        ("05", "gpt2-small"),
        ("06", "gpt2-small"),
        ("07", "gpt2-small"),
        ("08", "gpt2-small"),
    ],
)
def test_claims_hold_on_the_hubs_models(chapter, model):
    """The built book holds the offline models to their claims; see test_book.py."""
    chapters.check_claims(chapters.run(chapter, model), chapter, model)


def test_a_run_is_held_to_the_claims_that_it_shows():
    """Also where the hub is out of reach, and the notebook falls back on another model."""

    def run(model: str, measured: float):
        claims = Claims("title")
        claims.check("a < b", "It is large.", measured, at_least=0.5)
        data = {"text/plain": repr(claims), "text/html": claims._repr_html_()}
        outputs = [
            nbformat.v4.new_output("stream", text=f"Model: {model} (offline).\n"),
            nbformat.v4.new_output("display_data", data),
        ]
        cell = nbformat.v4.new_code_cell(outputs=outputs)
        return nbformat.v4.new_notebook(cells=[cell])

    (rows,) = chapters.check_claims(run("gpt2-small", 0.7), "01", "gpt2-small").values()
    (row,) = rows
    assert (row.claim, row.expected, row.verdict) == ("a < b", "It is large.", "✓ holds")
    with pytest.raises(AssertionError, match="✗ fails"):
        chapters.check_claims(run("gpt2-small", 0.3), "01", "gpt2-small")
    with pytest.raises(AssertionError, match="gpt2-small was asked for"):
        chapters.check_claims(run("smollm2-135m", 0.7), "01", "gpt2-small")


def test_two_runs_say_the_same():
    """Chapter 4, on the shipped model; the others use the same seeds and sweeps."""
    said = []
    for _ in range(2):
        cells = chapters.Rehearsal("04", load_model("attn-only-2l-demo"))
        said.append([*map(repr, cells.claims(lambda result: result)), *cells.said])
        said[-1] += [r.values.tobytes() for swept in cells.swept for r in swept.values()]
    assert said[0] == said[1] and len(said[0]) > 3
