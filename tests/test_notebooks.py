"""The chapters keep what they promise: no machinery, no typed results, every claim checked."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import chapters
import jupytext
import pytest
import tiny
from chapters import ROOT, SCRIPTS
from loopback_hub import serve, tiny_repositories
from test_claims import CHECKED

from patching_demo import notebook
from patching_demo.plots.diagram import patching_diagram

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
LONGEST_CELL = 30
by_chapter = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)

# Numbers that explain a scale or name a place, and report no result.
EXAMPLES = {"0.3", "30 %", "100 %"}
# Part of a name: a head, a year, a paper, an activation.
NAMES = re.compile(r"L\d+H\d+|blocks\.\d+|\(https?://[^)]*\)|\b20\d\d\b|GPT-2|`[^`]*`")
RESULT = re.compile(r"\d+\.\d+|\d+ ?%|\b\d+ (?:nats|logits|times)\b")


def cells(script: Path, kind: str) -> list:
    """The cells of one kind, as a notebook holds them."""
    return [cell for cell in jupytext.read(script).cells if cell.cell_type == kind]


def code(script: Path) -> list[ast.Module]:
    """Every code cell as Python, magics left out."""
    sources = (re.sub(r"^( *)%.*$", r"\1pass", c.source, flags=re.M) for c in cells(script, "code"))
    return [ast.parse(source) for source in sources]


def test_there_are_four_chapters():
    assert [path.stem[:2] for path in SCRIPTS] == ["01", "02", "03", "04"]


@by_chapter
def test_install_cell_installs_from_the_repository_and_only_where_needed(script, monkeypatch):
    (cell,) = [c for c in cells(script, "code") if "%pip" in c.source]
    (line,) = re.findall(r"^ *%pip (.*)$", cell.source, re.M)
    assert f'"patching-demo @ git+{URLS["Repository"]}"' in line
    runnable = re.sub(r"%pip.*", "installed.append(True)", cell.source)
    for found, expected in ((object(), []), (None, [True])):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        installed: list[bool] = []
        exec(runnable, {"installed": installed})
        assert installed == expected


@by_chapter
def test_install_cell_comes_before_the_package_is_needed(script):
    sources = [cell.source for cell in cells(script, "code")]
    (install,) = [i for i, source in enumerate(sources) if "%pip" in source]
    assert not any("import" in source for source in sources[:install])


@by_chapter
def test_model_is_a_parameter(script):
    (cell,) = [c for c in cells(script, "code") if "parameters" in c.metadata.get("tags", [])]
    assert cell.source == 'MODEL = "auto"'
    assert any("notebook.model(MODEL" in c.source for c in cells(script, "code"))


@by_chapter
def test_cells_are_short_and_hold_no_machinery(script):
    for cell, tree in zip(cells(script, "code"), code(script), strict=True):
        assert len(cell.source.splitlines()) <= LONGEST_CELL, cell.source
        nodes = list(ast.walk(tree))
        assert not [n for n in nodes if isinstance(n, (ast.ClassDef, ast.Try, ast.While))]
        functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
        # The hook of the first chapter is there to be read; elsewhere at most a small formatter.
        assert all(n.end_lineno - n.lineno < 12 for n in functions), cell.source
        assert "renderer" not in cell.source and "pio" not in cell.source


@by_chapter
def test_public_names_only(script):
    for tree in code(script):
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
    for tree in code(script):
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
            assert "notebook.largest(" in beside or "ioi_blocks" in beside


@by_chapter
def test_head_sweeps_lead_to_the_attention_patterns_of_their_heads(script):
    sources = "\n".join(cell.source for cell in cells(script, "code"))
    text = "\n".join(cell.source for cell in cells(script, "markdown"))
    if "KINDS = [" not in sources:
        assert script.stem == "01_setup"
        return
    if "plots.attention_patterns(" in sources:
        return
    linked = [ROOT / "notebooks" / name for name in re.findall(r"\]\((\w+)\.ipynb\)", text)]
    assert any(
        "plots.attention_patterns(" in path.with_suffix(".py").read_text("utf-8") for path in linked
    )


@by_chapter
def test_chapter_states_what_it_expects_and_checks_it(script):
    text = " ".join(cell.source for cell in cells(script, "markdown"))
    assert re.search(r"\b[Ee]xpect", text)
    assert any(
        ".show()" in c.source and "chapter_claims" in c.source for c in cells(script, "code")
    )


def test_every_claim_of_a_chapter_is_shown_to_be_able_to_fail():
    used = [name for script in SCRIPTS for name in chapters.claimed(script)]
    assert sorted(used) == sorted(chapters.offered()) == sorted(CHECKED)


@by_chapter
def test_links_between_chapters_lead_somewhere(script):
    for cell in cells(script, "markdown"):
        for target in re.findall(r"\]\(([\w.]+\.ipynb)\)", cell.source):
            assert (ROOT / "notebooks" / target).exists()


def test_setup_reports_and_seeds(capsys):
    import torch

    try:
        notebook.setup()
        first = torch.rand(1)
        notebook.setup()
        assert torch.equal(first, torch.rand(1))
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    out = capsys.readouterr().out
    assert "Runtime: " in out and "torch " in out and "plotly " in out


def test_colab_is_known_by_its_module(monkeypatch):
    import sys

    assert not notebook.in_colab()
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    assert notebook.in_colab() and "Google Colab" in notebook.runtime()


def test_diagram_speaks_to_screen_readers():
    markup = patching_diagram()._repr_html_()
    assert 'role="img"' in markup
    for element in ("title", "desc"):
        (identifier,) = re.findall(rf'<{element} id="([\w-]+)">', markup)
        assert re.search(rf'aria-labelledby="[^"]*\b{identifier}\b', markup)
    assert "http" not in markup.replace("http://www.w3.org/2000/svg", "")


@cache
def ran(chapter: str, model: str):
    """One run of a chapter on a model, for every test that reads it."""
    return chapters.run(chapter, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chapter", "model"),
    [("01", "smollm2-135m"), ("03", "attn-only-2l-demo"), ("04", "attn-only-2l-demo")],
)
def test_claims_hold_on_offline_models(chapter, model):
    """The built book holds chapter 2 to its claims, which takes minutes; see test_book.py."""
    chapters.check_claims(ran(chapter, model), chapter, model)


@pytest.mark.hub
@pytest.mark.parametrize(
    ("chapter", "model"),
    [("01", "gpt2-small"), ("02", "gpt2-small"), ("03", "attn-only-2l"), ("04", "attn-only-2l")],
)
def test_claims_hold_on_the_hubs_models(chapter, model):
    """With those about the published heads of GPT-2 small, which are open on every other model."""
    tables = chapters.check_claims(ran(chapter, model), chapter, model)
    assert chapters.published(tables) == (chapter == "02")


@pytest.mark.slow
@pytest.mark.parametrize(("chapter", "model"), [("02", "gpt2-small"), ("03", "attn-only-2l")])
def test_claims_are_decided_on_the_hubs_models_and_fail_on_random_weights(chapter, model, tmp_path):
    """What the test above does, against a hub of this machine that has random weights."""
    gpt2 = tiny._hf("gpt2-12x12")[1]
    repos = tiny_repositories(tmp_path / "repos", gpt2)
    with serve(repos) as hub:
        settings = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
            "HF_HUB_OFFLINE": "0",
            "PATCHING_DEMO_CACHE": str(tmp_path / "own"),
        }
        book = chapters.run(chapter, model, go_on=True, **settings)
    tables = chapters.claims(book)
    assert chapters.published(tables) == (chapter == "02")
    verdicts = {row.verdict for rows in tables.values() for row in rows}
    assert verdicts == {"✓ holds", "✗ fails"}
    assert "ClaimFailed" in {
        output.ename
        for cell in book.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    }
    with pytest.raises(AssertionError, match="✗ fails"):
        chapters.check_claims(book, chapter, model)


@pytest.mark.slow
def test_claims_of_another_model_than_asked_for_do_not_count():
    """As where the hub is out of reach, and the notebook falls back on the offline model."""
    book = ran("03", "attn-only-2l-demo")
    with pytest.raises(AssertionError, match="attn-only-2l was asked for"):
        chapters.check_claims(book, "03", "attn-only-2l")


def outputs_of(book) -> list:
    """What a run of a notebook shows, without progress bars and version lines."""
    shown = []
    for cell in book.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if output.output_type == "stream" and output.name == "stderr":
                continue
            if "application/vnd.jupyter.widget-view+json" in data:
                continue
            shown.append(output.get("text") or dict(data))
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("chapter", ["03", "04"])
def test_two_runs_show_the_same(chapter):
    """The induction chapters on the shipped model; the others use the same seeds and sweeps."""
    model = "attn-only-2l-demo"
    assert outputs_of(ran(chapter, model)) == outputs_of(chapters.run(chapter, model))
