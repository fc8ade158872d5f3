"""Write each notebook's .ipynb from its percent .py, or say where a pair disagrees.

The .py file is the one to edit. An existing .ipynb keeps its cell ids; outputs are never kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from jupytext.config import load_jupytext_config

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
FORMAT = "py:percent"


def problems(script: Path) -> list[str]:
    """What is wrong with the pair that `script` belongs to; empty when nothing is."""
    pair = script.with_suffix(".ipynb")
    if not script.exists():
        return [f"{pair.name} has no {script.name} beside it"]
    if not pair.exists():
        return [f"{script.name} has no {pair.name} beside it; run `make sync`"]
    found = []
    notebook = jupytext.read(pair)
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.get("outputs") or cell.get("execution_count"):
            found.append(f"{pair.name} cell {number} carries outputs; run `make sync`")
    if "widgets" in notebook.metadata:
        found.append(f"{pair.name} carries widget state; run `make sync`")
    config = load_jupytext_config(str(script))
    if jupytext.writes(notebook, fmt=FORMAT, config=config) != script.read_text(encoding="utf-8"):
        found.append(f"{script.name} and {pair.name} disagree; edit the .py and run `make sync`")
    return found


def write_pair(script: Path) -> None:
    """Write the .ipynb of `script` afresh, with the cell ids that it had, and tidy `script`."""
    pair = script.with_suffix(".ipynb")
    config = load_jupytext_config(str(script))
    notebook = jupytext.read(script, config=config)
    if pair.exists():
        notebook = combine_inputs_with_outputs(notebook, jupytext.read(pair), fmt=FORMAT)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell["outputs"], cell["execution_count"] = [], None
    notebook.metadata.pop("widgets", None)
    pair.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    script.write_text(
        jupytext.writes(jupytext.read(pair), fmt=FORMAT, config=config), encoding="utf-8"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail on a drift")
    check = parser.parse_args().check
    stems = {p.stem for p in NOTEBOOKS.glob("*.py")} | {p.stem for p in NOTEBOOKS.glob("*.ipynb")}
    scripts = [NOTEBOOKS / f"{stem}.py" for stem in sorted(stems)]
    for script in scripts:
        if not check and script.exists() and problems(script):
            write_pair(script)
            print(f"wrote {script.stem}.ipynb")
    found = [problem for script in scripts for problem in problems(script)]
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
