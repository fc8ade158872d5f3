"""The book build stops on a failing cell, leaves nothing stale, and repeats no run for nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import build_book  # noqa: E402

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout in miniature, with a space and an umlaut in its path."""
    root = tmp_path / "a chäckout"
    for folder in ("notebooks", "patching_demo", "book/_build/html"):
        (root / folder).mkdir(parents=True)
    (root / "requirements.lock").write_text("torch==1\n")
    (root / "patching_demo/metrics.py").write_text("one = 1\n")
    (root / "book/_build/html/index.html").write_text("an older book")
    places = {
        "ROOT": root,
        "SOURCES": root / "notebooks",
        "BOOK": root / "book",
        "RUNS": root / "book/notebooks",
        "FIGURES": root / "book/notebooks/figures",
        "GENERATED": root / "book/generated",
        "SITE": root / "book/_build/html",
    }
    for name, path in places.items():
        monkeypatch.setattr(build_book, name, path)
    monkeypatch.chdir(root)
    return root


def write(path: Path, *sources: str) -> Path:
    cells = [new_code_cell(source) for source in sources]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), path)
    return path


def test_failing_cell_is_named_and_leaves_no_book(project, capfd):
    write(project / "notebooks/01_good.ipynb", "'fine'")
    write(project / "notebooks/02_bad.ipynb", "1 + 1", "raise KeyError('no such head')")
    (project / "book/notebooks").mkdir()
    stale = write(project / "book/notebooks/02_bad.ipynb", "'from an earlier build'")
    assert build_book.main() == 1
    shown = capfd.readouterr().err
    assert "02_bad.ipynb, cell 2 failed: KeyError: 'no such head'" in shown
    assert "no book: 02_bad.ipynb failed" in shown
    assert not stale.exists() and not (project / "book/_build").exists()
    assert [path.name for path in (project / "book/notebooks").glob("*")] == ["01_good.ipynb"]


@pytest.mark.parametrize("how", ["dies", "hangs", "cannot start"])
def test_cell_in_which_the_kernel_ends_is_named(project, capfd, monkeypatch, how):
    source = "import os, time; os._exit(1)" if how == "dies" else "import time; time.sleep(60)"
    bad = write(project / "notebooks/01_bad.ipynb", "1 + 1", "2 + 2", source, "3 + 3")
    monkeypatch.setattr(build_book, "CELL_TIMEOUT", 1)
    if how == "cannot start":
        bad.write_text('{"cut": "short')
    assert build_book.main() == 1
    shown = capfd.readouterr().err
    if how == "cannot start":
        assert "01_bad.ipynb failed: " in shown
    else:
        assert f"01_bad.ipynb, cell 3 failed: {'DeadKernel' if how == 'dies' else ''}" in shown
    assert "no book: 01_bad.ipynb failed" in shown
    assert not (project / "book/_build").exists()
    assert not list((project / "book/notebooks").glob("*"))


def test_run_is_repeated_only_when_something_changed(project):
    counter = project / "count.txt"
    source = f"with open({str(counter)!r}, 'a') as file: print('run', file=file)"
    notebook = write(project / "notebooks/01_count.ipynb", source)
    build_book.RUNS.mkdir()

    def runs() -> int:
        build_book.execute(notebook)
        return len(counter.read_text().splitlines())

    assert runs() == 1
    assert runs() == 1
    (project / "patching_demo/metrics.py").write_text("one = 2\n")
    assert runs() == 2
    (build_book.RUNS / notebook.name).write_text('{"cut": "short')
    assert runs() == 3


@pytest.mark.parametrize("changed", ["notebook", "package", "data", "lock", "model"])
def test_key_depends_on(project, monkeypatch, changed):
    notebook = write(project / "notebooks/01_a.ipynb", "1")
    before = build_book.run_key(notebook)
    if changed == "notebook":
        write(notebook, "2")
    elif changed == "package":
        (project / "patching_demo/metrics.py").write_text("two = 2\n")
    elif changed == "data":
        (project / "patching_demo/data").mkdir()
        (project / "patching_demo/data/model.safetensors").write_bytes(b"\0")
    elif changed == "lock":
        (project / "requirements.lock").write_text("torch==2\n")
    else:
        monkeypatch.setenv("PATCHING_DEMO_MODEL", "attn-only-2l-demo")
    assert build_book.run_key(notebook) != before


def test_key_ignores_caches(project):
    notebook = write(project / "notebooks/01_a.ipynb", "1")
    before = build_book.run_key(notebook)
    (project / "patching_demo/__pycache__").mkdir()
    (project / "patching_demo/__pycache__/metrics.pyc").write_bytes(b"\0")
    assert build_book.run_key(notebook) == before


def test_widgets_become_notes_and_progress_bars_vanish(tmp_path):
    def widget(text: str) -> nbformat.NotebookNode:
        data = {build_book.WIDGET_TYPE: {"model_id": "1"}, "text/plain": text}
        return new_output("display_data", data=data)

    bar, panel = widget("  0%|          | 0/30 [00:00<?, ?it/s]"), widget("VBox(children=())")
    badge = "[![Open In Colab](https://elsewhere.example/badge.svg)](https://colab.example/1)"
    cells = [new_markdown_cell(badge), new_code_cell("x", outputs=[bar, panel])]
    path = tmp_path / "run.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata={"widgets": {}}), path)
    build_book.clean(path, "key")
    run = nbformat.read(path, as_version=4)
    assert run.cells[0].source == "[Open in Colab](https://colab.example/1)"
    (note,) = run.cells[1].outputs
    assert note.data == {"text/markdown": build_book.WIDGET_NOTE}
    assert "widgets" not in run.metadata and build_book.stored_key(path) == "key"


def test_tagged_figures_are_kept(project):
    figure = {"data": [{"y": [1]}], "layout": {}}
    tagged = new_code_cell(
        "fig", outputs=[new_output("display_data", data={build_book.FIGURE_TYPE: figure})]
    )
    tagged.metadata["tags"] = ["figure-headline"]
    build_book.RUNS.mkdir()
    run = build_book.RUNS / "01_a.ipynb"
    nbformat.write(new_notebook(cells=[tagged, new_code_cell("1")]), run)
    assert build_book.keep_figures(run) == 1
    assert json.loads((build_book.FIGURES / "headline.json").read_text()) == figure
    build_book.remove_stale(set())
    assert not build_book.FIGURES.exists() and not run.exists()


def test_missing_figure_fails_the_build(project):
    (build_book.SITE / "notebooks").mkdir()
    page = build_book.SITE / "notebooks/01_a.html"
    page.write_text('<figure class="plotly-figure" role="figure"></figure>')
    build_book.check_figures({"01_a": 1})
    with pytest.raises(build_book.BookError, match="drew 2 figures, its page has 1"):
        build_book.check_figures({"01_a": 2})


def test_benchmark_page_has_the_table_or_says_how_to_make_it(project):
    build_book.write_benchmark()
    page = build_book.GENERATED / "benchmark-table.md"
    assert "`make bench` runs it" in page.read_text()
    (project / "benchmark").mkdir()
    (project / "benchmark/table.md").write_text("Measured.\n\n| a |\n|---|\n| 1 |\n")
    build_book.write_benchmark()
    assert page.read_text() == "Measured.\n\n| a |\n|---|\n| 1 |\n"
