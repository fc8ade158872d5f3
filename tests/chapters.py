"""Chapters run as a reader runs them, or in this process with their sweeps replaced."""

from __future__ import annotations

import itertools
import os
import pickle
import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import jupytext
import pytest
import xarray as xr
from bs4 import BeautifulSoup
from conftest import untraced

import patching_demo
from patching_demo import explorer, notebook, plots, sweeps
from patching_demo.claims import Claims
from patching_demo.tasks import Task

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))
HEADS = ["claim", "expected", "measured", "required", "verdict"]
#: The caption of the one table whose claims are open on other models.
PUBLISHED = "Published heads of GPT-2 small"


class Shown(NamedTuple):
    """One row of a table of claims, as it is shown."""

    claim: str
    expected: str
    measured: str
    required: str
    verdict: str


def script_of(chapter: str) -> Path:
    """The notebook whose name begins with a chapter's number."""
    (script,) = [path for path in SCRIPTS if path.stem.startswith(chapter)]
    return script


def cells(script: Path, kind: str) -> list:
    """The cells of one kind, as a notebook holds them."""
    return [cell for cell in jupytext.read(script).cells if cell.cell_type == kind]


def code(script: Path, without: str | None = None) -> list[str]:
    """Every code cell that does not have the tag given, as plain Python, magics left out."""
    kept = [c for c in cells(script, "code") if without not in c.metadata.get("tags", [])]
    return [re.sub(r"^( *)%.*$", r"\1pass", c.source, flags=re.M) for c in kept]


class Rehearsal:
    """A chapter's own cells in this process, on a given model, with what its runs return changed.

    What stands before the first run of the model's runs once, and so does each sweep, set, path
    and estimate. A task is made once, and activations that it is asked for by name are looked up
    once. Nothing is drawn. Where all values will be replaced, sweeps need not be ``measured``: then
    they have labels and NaN. What the chapter measures by runs of its own can be given by ``own``,
    under the names that it has there.
    """

    VERBS = ("sweep_metrics", "patch", "paths", "attribute")
    TASKS = ("ioi_task", "capital_task", "prompt_task", "noise_task")
    RUNS = ("clean_cache", "corrupted_cache")

    def __init__(self, chapter: str, model: Any, measured: bool = True, **own: Any) -> None:
        # Exercises are checked where they run, against what was really measured.
        sources = code(script_of(chapter), without="exercise")
        begins = re.compile(r"\b(sweep\w*|patch|paths|attribute)\(\s*model")
        first = next(i for i, source in enumerate(sources) if begins.search(source))
        self.model, self.own, self.swept, self.said, self.start = model, own, [], [], {}
        self._real = {verb: getattr(sweeps, verb) for verb in self.VERBS}
        self._makers = {name: self._made(getattr(patching_demo, name)) for name in self.TASKS}
        self._from_frame = self._made(Task.from_frame)
        self._solved = lru_cache(None)(Task.solved)
        self._runs = {run: self._kept(getattr(Task, run)) for run in self.RUNS}
        self._options = {verb: {"progress": False} for verb in self.VERBS}
        del self._options["attribute"]["progress"]
        if not measured:
            self._options["sweep_metrics"]["where"] = xr.DataArray(False)
            # A random model hardly tells right from wrong: by that scale rounding is large.
            for verb in ("patch", "paths"):
                self._options[verb]["check"] = 0
        self._run(sources[:first], self.start, lambda result: result)
        self.rest = sources[first:]

    def claims(
        self, change: Callable[[xr.DataArray], xr.DataArray], **overrides: Any
    ) -> list[Claims]:
        """The tables of claims that the chapter shows on changed results.

        Names in ``overrides`` keep their values, whatever the chapter sets them to.
        """
        return self._run(self.rest, dict(self.start), change, {**self.own, **overrides})

    def _measure(self, verb, *arguments, **options):
        call = next(self._calls)
        if call == len(self.swept):
            found = self._real[verb](*arguments, **{**options, **self._options[verb]})
            self.swept.append(found if verb == "sweep_metrics" else {"only": found})
        results = self.swept[call]
        if verb == "patch":  # On changed results, a chapter may ask for as many other sets.
            sets = list(arguments[2])
            results = {name: result.assign_coords(set=sets) for name, result in results.items()}
        return {name: self._change(result) for name, result in results.items()}

    @staticmethod
    def _made(maker: Callable[..., Task]) -> Callable[..., Task]:
        tasks: dict[bytes, Task] = {}

        def make(model: Any, *arguments: Any, **options: Any) -> Task:
            key = pickle.dumps((arguments, options))
            if key not in tasks:
                tasks[key] = maker(model, *arguments, **options)
            return tasks[key]

        return make

    @staticmethod
    def _kept(run: Callable[..., Any]) -> Callable[..., Any]:
        caches: dict[Any, Any] = {}

        def cache(task: Task, model: Any, names: Any = None) -> Any:
            if not isinstance(names, list | None):  # A function, as sweeps themselves give.
                return run(task, model, names)
            key = task, tuple(names or ())
            if key not in caches:
                caches[key] = run(task, model, names)
            return caches[key]

        return cache

    def _sweep(self, model, task, kinds, **options):
        return self._measure("sweep_metrics", model, {"only": task}, kinds, **options)["only"]

    def _run(
        self,
        sources: list[str],
        namespace: dict[str, Any],
        change: Callable,
        overrides: dict[str, Any] | None = None,
    ) -> list[Claims]:
        self._calls, self._change, shown = itertools.count(), change, []
        with untraced(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweeps, "sweep_metrics", partial(self._measure, "sweep_metrics"))
            patch.setattr(patching_demo, "sweep", self._sweep)
            for verb in self.VERBS[1:]:
                one = partial(
                    lambda *given, **options: self._measure(*given, **options)["only"], verb
                )
                patch.setattr(patching_demo, verb, one)
            for name, maker in self._makers.items():
                patch.setattr(patching_demo, name, maker)
            patch.setattr(Task, "from_frame", self._from_frame)
            patch.setattr(Task, "solved", self._solved)
            for name, run in self._runs.items():
                patch.setattr(Task, name, run)
            patch.setattr(notebook, "model", lambda *arguments: self.model)
            patch.setattr(notebook, "say", self.said.append)
            patch.setattr(Claims, "show", lambda claims: shown.append(claims))
            patch.setattr(notebook, "setup", MagicMock())
            patch.setattr(notebook, "largest", MagicMock())
            for module in (plots, explorer):
                for name in module.__all__:
                    patch.setattr(module, name, MagicMock())
            for source in sources:
                namespace.update(overrides or {})
                exec(compile(source, "<cell>", "exec"), namespace)
        return shown


def run(chapter: str, model: str):
    """The chapter, run in a fresh kernel with its model chosen by the environment.

    Raises:
        CellExecutionError: a cell failed, as one does whose claims do not hold.
    """
    from nbclient import NotebookClient

    script = script_of(chapter)
    book = jupytext.read(script)
    resources = {"metadata": {"path": str(script.parent)}}
    client = NotebookClient(book, kernel_name="python3", timeout=3600, resources=resources)
    client.execute(env={**os.environ, "PATCHING_DEMO_MODEL": model})
    return book


def printed(book) -> str:
    """Everything that the cells of a notebook printed."""
    outputs = [o for cell in book.cells for o in cell.get("outputs", [])]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def tables(markup: str) -> list[list[list[str]]]:
    """The cells of every table in a piece of HTML, by table and row."""
    return [
        [[cell.get_text(strip=True) for cell in row(["th", "td"])] for row in table("tr")]
        for table in BeautifulSoup(markup, "html.parser")("table")
    ]


def claims(book) -> dict[str, list[Shown]]:
    """The rows of each table of claims that a run shows, by the first words of its text."""
    found = {}
    for cell in book.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for table in tables(data.get("text/html", "")):
                if table[0] == HEADS:
                    found[data["text/plain"].splitlines()[0]] = [Shown(*row) for row in table[1:]]
    return found


def check_claims(book, chapter: str, model: str) -> dict[str, list[Shown]]:
    """Hold a run to its claims: the model was the one asked for, and every claim holds.

    Claims about the published heads of GPT-2 small have to be open on any other model, and decided
    on that one. Returns what :func:`claims` does.
    """
    said = printed(book)
    assert f"Model: {model} (" in said, f"{model} was asked for, and the notebook says: {said}"
    found = claims(book)
    made = sum(source.count("= Claims(") for source in code(script_of(chapter)))
    assert len(found) == made > 0, list(found)
    for title, rows in found.items():
        assert rows, title
        open_ = title.startswith(PUBLISHED) and model != "gpt2-small"
        expected = "not checked" if open_ else "✓ holds"
        wrong = [row for row in rows if row.verdict != expected]
        assert not wrong, f"{title}: not {expected!r}: {wrong}"
    return found
