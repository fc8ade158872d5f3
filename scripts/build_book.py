"""Run every notebook and build the book from the runs: `make book`.

1. papermill runs each notebook in a fresh kernel into book/notebooks/, unless the run that lies
   there was made from the same sources.
2. Figures of cells tagged `figure-NAME` are kept as book/notebooks/figures/NAME.json, for pages
   other than the notebook's own; parts of the reference pages are written.
3. Jupyter Book builds the site, with every warning an error, and the site is checked for figures
   that a notebook drew and the page lacks.

A failure at any step removes the site, so that nobody reads a page that its notebook no longer
bears out. The last line printed is the path of the site's first page.
"""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "notebooks"
BOOK = ROOT / "book"
RUNS = BOOK / "notebooks"
FIGURES = RUNS / "figures"
GENERATED = BOOK / "generated"
SITE = BOOK / "_build" / "html"

FIGURE_TYPE = "application/vnd.plotly.v1+json"
WIDGET_TYPE = "application/vnd.jupyter.widget-view+json"
# A progress bar as text: a share, a bar between two rules, a count.
PROGRESS_BAR = re.compile(r"\d+%\|.*\|\s*\S+/\S+\s*\[")
WIDGET_NOTE = "*In Jupyter and Colab a control panel stands here; it needs a kernel to answer.*"
# The badge's picture would be fetched from elsewhere, and the page has a button that does the same.
BADGE = re.compile(r"\[!\[Open [Ii]n Colab\]\([^)]*\)\]\(([^)]*)\)")
CELL_TIMEOUT = 3600
# Not part of a run, although part of the package: it only draws what the run left.
NOT_IN_RUNS = {"book_renderer.py"}
# Packages whose version can change a number or a figure.
LIBRARIES = ("torch", "transformer_lens", "transformers", "numpy", "xarray", "plotly")

# The API reference: modules in the order of use, others after them, inner workings left out.
API_ORDER = ("models", "tasks", "metrics", "patching", "results", "plots", "claims", "explorer")
INTERNAL = {
    "book_renderer",
    "bridge",
    "chapter_claims",
    "checks",
    "diagram",
    "engine",
    "explorer_html",
    "fetch",
    "heatmaps",
    "hub",
    "layout",
    "menus",
    "notebook",
    "runner",
    "series",
    "style",
    "tensor_file",
}


class BookError(Exception):
    """A build that must stop; its message is all the reader needs."""


def run_key(notebook: Path) -> str:
    """A digest of all that the run of `notebook` depends on."""
    digest = hashlib.sha256()
    package = (p for p in (ROOT / "patching_demo").rglob("*") if p.is_file())
    files = [p for p in package if "__pycache__" not in p.parts and p.name not in NOT_IN_RUNS]
    for path in [notebook, ROOT / "requirements.lock", *sorted(files)]:
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    facts = [f"{name} {version(name)}" for name in LIBRARIES]
    facts += [platform.python_version(), os.environ.get("PATCHING_DEMO_MODEL", "")]
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()


def stored_key(run: Path) -> str | None:
    """The digest that an earlier run was made from, or None where there is no whole run."""
    try:
        return nbformat.read(run, as_version=4).metadata["patching_demo"]["key"]
    except (OSError, ValueError, KeyError, nbformat.reader.NotJSONError):
        return None


def execute(notebook: Path) -> None:
    """Run `notebook` from top to bottom and leave the executed copy in book/notebooks/.

    Raises:
        BookError: a cell failed; the message names notebook and cell and shows the error.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    run = RUNS / notebook.name
    key = run_key(notebook)
    if stored_key(run) == key:
        print(f"{notebook.name}: unchanged since its last run", flush=True)
        return
    run.unlink(missing_ok=True)
    print(f"{notebook.name}: running ...", flush=True)
    start = time.monotonic()
    unfinished = run.with_suffix(".part.ipynb")
    # Relative paths: papermill writes them into the copy, which readers can download.
    try:
        papermill.execute_notebook(
            os.path.relpath(notebook, ROOT),
            os.path.relpath(unfinished, ROOT),
            cwd=os.path.relpath(SOURCES, ROOT),
            kernel_name="python3",
            progress_bar=False,
            execution_timeout=CELL_TIMEOUT,
        )
    except PapermillExecutionError as error:
        raise BookError(
            f"{notebook.name}, cell {error.cell_index + 1} failed: {error.ename}: {error.evalue}\n"
            f"--- the cell\n{error.source}\n--- the traceback\n" + "\n".join(error.traceback)
        ) from None
    except Exception as error:  # a kernel that dies, hangs or cannot start
        place = f"{notebook.name}{cell_under_way(unfinished)}"
        raise BookError(f"{place} failed: {type(error).__name__}: {error}") from error
    else:
        clean(unfinished, key)
        unfinished.replace(run)
        print(f"{notebook.name}: {time.monotonic() - start:.0f} s", flush=True)
    finally:
        unfinished.unlink(missing_ok=True)


def cell_under_way(run: Path) -> str:
    """The last cell that an unfinished run began, in words; none where it did not begin.

    An exception that is not the cell's own does not name it, but papermill notes in the copy when
    it began each.
    """
    try:
        cells = nbformat.read(run, as_version=4).cells
    except (OSError, ValueError, nbformat.reader.NotJSONError):
        return ""
    begun = [bool(cell.metadata.get("papermill", {}).get("start_time")) for cell in cells]
    return f", cell {sum(begun)}" if any(begun) else ""


def clean(run: Path, key: str) -> None:
    """Take out of a run what needs a kernel or comes from elsewhere, and note the run's key."""
    notebook = nbformat.read(run, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in map(without_widget, cell.outputs) if o is not None]
        else:
            cell.source = BADGE.sub(r"[Open in Colab](\1)", cell.source)
    notebook.metadata["patching_demo"] = {"key": key}
    nbformat.write(notebook, run)


def without_widget(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """Return `output`, or a note in place of a widget, or None in place of a progress bar."""
    if WIDGET_TYPE not in output.get("data", {}):
        return output
    if PROGRESS_BAR.search(str(output.data.get("text/plain", ""))):
        return None
    return nbformat.v4.new_output("display_data", data={"text/markdown": WIDGET_NOTE})


def remove_stale(names: set[str]) -> None:
    """Remove runs of notebooks that are no longer there, and figures, which are written afresh."""
    shutil.rmtree(FIGURES, ignore_errors=True)
    for run in RUNS.glob("*.ipynb"):
        if run.name not in names:
            run.unlink()


def keep_figures(run: Path) -> int:
    """Write the figures of cells tagged `figure-NAME`; return how many figures the run holds."""
    count = 0
    for cell in nbformat.read(run, as_version=4).cells:
        outputs = cell.get("outputs", [])
        figures = [o.data[FIGURE_TYPE] for o in outputs if FIGURE_TYPE in o.get("data", {})]
        count += len(figures)
        for tag in cell.metadata.get("tags", []):
            if tag.startswith("figure-") and figures:
                FIGURES.mkdir(parents=True, exist_ok=True)
                path = FIGURES / f"{tag.removeprefix('figure-')}.json"
                path.write_text(json.dumps(figures[0]), encoding="utf-8")
    return count


def write_run_times(runs: list[Path]) -> None:
    """Write the table of the run-times page from what papermill noted in each run."""
    lines = ["| notebook | run on | seconds | result |", "|---|---|---:|---|"]
    for run in runs:
        meta = nbformat.read(run, as_version=4).metadata["papermill"]
        result = "failed" if meta["exception"] else "ran to the end"
        lines.append(
            f"| [{run.stem}](notebooks/{run.name}) | {meta['start_time'][:10]} "
            f"| {meta['duration']:.0f} | {result} |"
        )
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines += [
        "",
        f"Machine: {platform.system()} {platform.machine()}, {os.cpu_count()} processors, "
        f"Python {platform.python_version()}, {versions}.",
    ]
    write_page("run-times.md", lines)


def write_benchmark() -> None:
    """Write the table of the benchmark page from what `make bench` left, if it was ever run."""
    table = ROOT / "benchmark" / "table.md"
    if table.exists():
        lines = table.read_text(encoding="utf-8").splitlines()
    else:
        lines = ["The benchmark has not been run for this copy of the book; `make bench` runs it."]
    write_page("benchmark-table.md", lines)


def write_api() -> None:
    """Write the API reference: a section for each module that readers import from."""
    import patching_demo

    names = {module.name for module in pkgutil.iter_modules(patching_demo.__path__)} - INTERNAL
    order = [name for name in API_ORDER if name in names]
    lines = []
    for name in [*order, *sorted(names - set(order))]:
        lines += [f"## patching_demo.{name}", "", "```{eval-rst}"]
        lines += [f".. automodule:: patching_demo.{name}", "   :members:", "```", ""]
    write_page("api.md", lines)


def write_page(name: str, lines: list[str]) -> None:
    """Write a part that a page of the book includes."""
    GENERATED.mkdir(exist_ok=True)
    (GENERATED / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def build_site() -> None:
    """Build the site afresh, with warnings as errors.

    Raises:
        BookError: Sphinx warned of anything.
    """
    # The site starts empty: a page that left the table of contents must not linger.
    shutil.rmtree(BOOK / "_build", ignore_errors=True)
    command = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"
    arguments = ["build", "book", "-W", "--keep-going", "-q"]
    done = subprocess.run([sys.executable, "-c", command, *arguments], cwd=ROOT, check=False)
    if done.returncode:
        raise BookError("the site was not built: see the warnings above")


def check_figures(drawn: dict[str, int]) -> None:
    """Compare the figures that each run holds with those on its page.

    Raises:
        BookError: a page has fewer figures than its notebook drew.
    """
    for stem, expected in drawn.items():
        page = (SITE / "notebooks" / f"{stem}.html").read_text(encoding="utf-8")
        found = page.count('<figure class="plotly-figure"')
        if found != expected:
            raise BookError(f"{stem}: the notebook drew {expected} figures, its page has {found}")


def main() -> int:
    os.chdir(ROOT)
    RUNS.mkdir(exist_ok=True)
    notebooks = sorted(SOURCES.glob("*.ipynb"))
    remove_stale({path.name for path in notebooks})
    failures = []
    for notebook in notebooks:
        try:
            execute(notebook)
        except BookError as error:
            # The others still run, so that one build names every failure.
            print(error, file=sys.stderr, flush=True)
            failures.append(notebook.name)
    try:
        if failures:
            raise BookError(f"no book: {', '.join(failures)} failed")
        runs = [RUNS / path.name for path in notebooks]
        drawn = {run.stem: keep_figures(run) for run in runs}
        write_run_times(runs)
        write_benchmark()
        write_api()
        build_site()
        check_figures(drawn)
    except BookError as error:
        shutil.rmtree(BOOK / "_build", ignore_errors=True)
        print(error, file=sys.stderr)
        return 1
    print(SITE / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
