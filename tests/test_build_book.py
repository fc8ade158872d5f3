"""The book's build: a failing cell stops it, nothing stale stays, no run is repeated for nothing.

The Makefile runs in a checkout in miniature, in the environment that runs the tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import plotly.graph_objects as go
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book/_ext"))
import book_figures  # noqa: E402

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
RUNS = "book/notebooks"
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="there is no make")


def write(path: Path, *sources: str) -> None:
    cells = [new_code_cell(source) for source in sources]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), path)


class Checkout:
    """The Makefile with a package and notebooks of its own, in a folder with an odd name."""

    def __init__(self, root: Path):
        self.root, self.stamp = root, root / "stamp"
        for folder in ("notebooks", "patching_demo", "book/_build/html"):
            (root / folder).mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml", "requirements.lock"):
            shutil.copy(ROOT / name, root)
        (root / "patching_demo/metrics.py").write_text("one = 1\n")
        (root / "book/_build/html/index.html").write_text("an older book")
        self.stamp.write_text(f"{root}\n")

    def make(self, *goals: str, **settings: str) -> tuple[int, str]:
        """Exit status and output of some targets, with nothing to install."""
        places = [f"VENV={sys.prefix}", f"STAMP={self.stamp}"]
        done = subprocess.run(
            ["make", "--no-print-directory", "--keep-going", *places, *goals],
            cwd=self.root,
            env={**os.environ, "PIP_DRY_RUN": "1", **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "chäckout")


@needs_make
def test_failing_and_dying_cells_are_named_and_leave_no_book(checkout):
    write(checkout.root / "notebooks/01_good.ipynb", "'fine'")
    write(checkout.root / "notebooks/02_bad.ipynb", "1 + 1", "raise KeyError('no such head')")
    write(checkout.root / "notebooks/03_dies.ipynb", "1", "2", "import os; os._exit(1)", "4")
    status, shown = checkout.make("book")
    assert status
    assert "02_bad.ipynb" in shown and 'at "In [2]"' in shown
    assert "KeyError: 'no such head'" in shown
    assert "DeadKernelError" in shown and re.search(r"03_dies.ipynb(.|\n)* 3/4 ", shown)
    assert not (checkout.root / "book/_build/html").exists()
    assert [path.name for path in (checkout.root / RUNS).iterdir()] == ["01_good.ipynb"]


@needs_make
def test_run_is_repeated_only_when_something_changed(checkout):
    counter = checkout.root / "count.txt"
    run, notebook = f"{RUNS}/01_count.ipynb", checkout.root / "notebooks/01_count.ipynb"
    write(notebook, f"with open({str(counter)!r}, 'a') as file: print('run', file=file)")
    model = {"PATCHING_DEMO_MODEL": "attn-only-2l-demo"}

    def runs(**settings: str) -> int:
        status, shown = checkout.make(run, **settings)
        assert status == 0, shown
        return len(counter.read_text().splitlines())

    assert [runs(), runs()] == [1, 1]
    assert [runs(**model), runs(**model)] == [2, 2]
    for path in (notebook, checkout.root / "patching_demo/metrics.py", checkout.stamp):
        before = path.stat().st_mtime_ns
        later = (checkout.root / run).stat().st_mtime_ns + 10**9
        os.utime(path, ns=(later, later))
        assert checkout.make("--question", run, **model)[0] == 1, path
        os.utime(path, ns=(before, before))
        assert checkout.make("--question", run, **model)[0] == 0, path


@needs_make
@pytest.mark.parametrize("home", ["", "/nonexistent", "/dev/null"])
def test_make_says_what_is_wrong_with_a_home(checkout, home):
    status, shown = checkout.make("help", HOME=home)
    assert status == 2 and f'HOME is "{home}"' in shown and "HOME=/tmp/home make" in shown


# ---- what the extension makes of a run

HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)> & "quoted" <!-- $x$'


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def html_of(figure: go.Figure) -> tuple[str, dict]:
    """The HTML of a figure, and the JSON in it."""
    page = book_figures.figure_html(json.loads(figure.to_json()))
    return page, json.loads(re.search(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)[1])


def test_hostile_text_stays_text():
    figure = go.Figure(go.Heatmap(z=[[1]], x=[HOSTILE]))
    figure.update_layout(title=HOSTILE, meta={"alt": HOSTILE, "caption": HOSTILE})
    page, stored = html_of(figure)
    tags = Tags(page).tags
    assert [tag for tag, _ in tags] == "figure div script noscript p figcaption".split()
    assert stored["data"][0]["x"] == [HOSTILE]
    assert tags[0][1]["aria-label"].startswith("</script><script>alert")


def test_figure_keeps_its_data_layout_and_frames():
    figure = go.Figure(go.Scatter(y=[3, 1, 2]), frames=[go.Frame(name="next")])
    figure.update_layout(title="Clean <b>resid_pre</b><br>into corrupted", height=321)
    page, stored = html_of(figure)
    assert stored["data"][0]["y"] == [3, 1, 2] and stored["frames"][0]["name"] == "next"
    assert 'aria-label="Clean resid_pre into corrupted"' in page and "min-height:321px" in page


def notebook_of(*outputs: dict) -> dict:
    return new_notebook(cells=[new_code_cell("x", outputs=list(outputs))], metadata={"widgets": {}})


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ({"data": [], "layout": {"title": {"text": "Empty"}}}, "cell 1: .*would be blank"),
        ({"data": [{"y": [1]}], "layout": {}}, "no text for screen readers"),
        ({"data": [{"y": [1]}], "layout": {"meta": "a note"}}, "no text for screen readers"),
    ],
)
def test_blank_and_mute_figures_are_refused(figure, message):
    output = new_output("display_data", data={book_figures.FIGURE_TYPE: figure})
    with pytest.raises(ValueError, match=message):
        book_figures.page_of_run(notebook_of(output))


def test_widgets_become_notes_and_progress_bars_vanish():
    def widget(text: str) -> dict:
        data = {book_figures.WIDGET_TYPE: {"model_id": "1"}, "text/plain": text}
        return new_output("display_data", data=data)

    bar = widget("  0%|          | 0/30 [00:00<?, ?it/s]")
    run = notebook_of(bar, widget("VBox(children=())"))
    badge = "[![Open In Colab](https://elsewhere.example/badge.svg)](https://colab.example/1)"
    run.cells.append(new_markdown_cell(badge))
    page = book_figures.page_of_run(run)
    (note,) = page["cells"][0]["outputs"]
    assert note["data"] == {"text/markdown": book_figures.WIDGET_NOTE}
    assert page["cells"][1]["source"] == "[Open in Colab](https://colab.example/1)"
    assert "widgets" not in page["metadata"]
