"""The files around the package agree with each other."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml
from jupytext.config import load_jupytext_config
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import patching_demo

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ADDRESS = PROJECT["urls"]["Repository"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


def requirements(*extras: str) -> list[Requirement]:
    """The runtime requirements and those of `extras`."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in EXTRAS[extra]]
    return [r for r in map(Requirement, lines) if r.name != PROJECT["name"]]


def pins(path: Path, python: str) -> dict[str, str]:
    """Exact versions by canonical name, as pip reads them with this Python on Linux.

    No machine's address and no build of its own may stand there.
    """
    environment = {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
    }
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and not requirement.url, f"{line} is not exact"
        assert "+" not in specifier.version, line
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is pinned twice for Python {python}"
        found[name] = specifier.version
    return found


def text_files() -> list[Path]:
    """The project's own text files, without what builds and tools leave beside them."""
    ignored = {"_build", "build", "data", "__pycache__"}
    kinds = {".py", ".md", ".yml", ".yaml", ".toml", ".cff", ".ipynb", ".txt", ".sh", ""}
    found = []
    for folder, folders, names in os.walk(ROOT):
        here = Path(folder)
        hidden = {name for name in folders if name.startswith(".")} - {".ci", ".github"}
        runs = {"notebooks"} if here == ROOT / "book" else set()
        folders[:] = sorted(set(folders) - ignored - hidden - runs)
        # In a linked work tree .git is a file, and a copy of it would write to the real index.
        names = [name for name in names if Path(name).suffix in kinds and name != ".git"]
        found += [here / name for name in names]
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_pins_every_requirement_within_its_range(python):
    locked = pins(ROOT / "requirements.lock", python)
    for requirement in requirements(*EXTRAS):
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{requirement.name} has no pin for Python {python}; run `make lock`"
        assert requirement.specifier.contains(locked[name], prereleases=True), (
            f"{name}=={locked[name]} lies outside {requirement.specifier}"
        )


def test_ranges_admit_colab():
    colab = pins(ROOT / "requirements-colab.txt", "3.13")
    ranges = {canonicalize_name(r.name): r.specifier for r in requirements(*EXTRAS)}
    for name, version in colab.items():
        if name in ranges:
            assert ranges[name].contains(version), f"Colab's {name} {version}: {ranges[name]}"
    assert {"plotly", "ipywidgets", "numpy", "transformers"} <= colab.keys() & ranges.keys()


def test_environment_yml_repeats_no_dependency():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, lines = environment["dependencies"]
    assert python == f"python{PROJECT['requires-python']}"
    assert pip == "pip"
    constraint, install = lines["pip"]
    assert constraint == "-c requirements.lock"
    extras = re.fullmatch(r"-e \.\[([a-z,]+)\]", install)
    assert extras and set(extras[1].split(",")) <= EXTRAS.keys()


def test_repository_address_stands_in_one_place():
    owner_and_name = ADDRESS.removeprefix("https://github.com/")
    name = owner_and_name.split("/")[1]
    # Any address on GitHub whose repository has our name, in links, badges and git addresses alike.
    pattern = re.compile(rf"github(?:\.com)?/([\w.-]+/{name})(?![\w-])")
    strangers = {
        f"{path.relative_to(ROOT)}: {match}"
        for path in text_files()
        for match in pattern.findall(path.read_text(encoding="utf-8", errors="ignore"))
        if match != owner_and_name
    }
    assert not strangers
    config = yaml.safe_load((ROOT / "book/_config.yml").read_text(encoding="utf-8"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert config["repository"]["url"] == ADDRESS
    assert citation["repository-code"] == ADDRESS
    assert citation["url"] == PROJECT["urls"]["Documentation"]
    assert citation["version"] == patching_demo.__version__
    assert ADDRESS in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_opens_in_colab_by_itself(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    path = f"{ADDRESS.removeprefix('https://')}/blob/main/notebooks/{notebook.name}"
    badge = f"https://colab.research.google.com/{path.replace('github.com', 'github')}"
    assert badge in cells[0].source, f"the first cell lacks the badge {badge}"
    installs = [c.source for c in cells if c.cell_type == "code" and "pip" in c.source]
    assert any(f"git+{ADDRESS}" in source for source in installs), "no cell installs the package"
    assert any("parameters" in c.metadata.get("tags", []) for c in cells), "no parameters cell"


@pytest.mark.parametrize("stem", sorted({p.stem for p in (ROOT / "notebooks").glob("*.[ip]*")}))
def test_notebook_pairs_agree_and_carry_no_outputs(stem):
    script, notebook = (ROOT / f"notebooks/{stem}.{end}" for end in ("py", "ipynb"))
    pair = jupytext.read(notebook)
    config = load_jupytext_config(str(script))
    assert jupytext.writes(pair, fmt="py:percent", config=config) == script.read_text("utf-8"), (
        f"{script.name} and {notebook.name} disagree: edit the .py and run make sync"
    )
    assert "widgets" not in pair.metadata
    assert not [c for c in pair.cells if c.get("outputs") or c.get("execution_count")]


def test_book_contains_every_notebook_and_page():
    toc = yaml.safe_load((ROOT / "book/_toc.yml").read_text(encoding="utf-8"))
    entries = [c for part in toc["parts"] for c in part["chapters"]]
    assert {"glob": "notebooks/*"} in entries
    listed = {toc["root"], *(entry["file"] for entry in entries if "file" in entry)}
    assert listed == {path.stem for path in (ROOT / "book").glob("*.md")}


def test_api_page_names_every_public_module():
    modules = {module.name for module in pkgutil.iter_modules(patching_demo.__path__)}
    page = (ROOT / "book/api.md").read_text("utf-8")
    named = set(re.findall(r"automodule:: patching_demo\.(\w+)", page))
    assert named == modules - {"engine", "notebook"}


def imported(path: Path) -> set[str]:
    """Top-level names that a module imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_package_imports_only_what_it_declares():
    declared = {canonicalize_name(r.name) for r in requirements()}
    # Notebook set-up asks Colab and IPython, which are there or not.
    allowed = {"google", "IPython", "patching_demo"}
    providers = importlib.metadata.packages_distributions()
    for path in (ROOT / "patching_demo").rglob("*.py"):
        for name in imported(path) - set(sys.stdlib_module_names) - allowed:
            distributions = {canonicalize_name(d) for d in providers.get(name, [])}
            assert distributions & declared, f"{path.name} imports {name}, which is not declared"


def test_make_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", makefile, re.MULTILINE)[1]
    targets = set(phony.replace("\\", " ").split()) - {"FORCE"}
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True
    )
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert done.returncode == 0 and listed == targets


MAKE = """#!/bin/sh
for target; do :; done
case "$target" in
    venv|slow) echo fine ;;
    test) echo "== 1 failed, 12 passed, 3 deselected in 1.0s =="; exit 2 ;;
    *) echo "=== 2 passed, 1 skipped in 61.00s (0:01:01) ===" ;;
esac
"""


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_ci_counts_tests_and_never_calls_passed_what_did_not_run(tmp_path, home):
    """With a make that prints what it is told to, and no Chromium."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "bin").mkdir()
    for tool in "awk bash cat date dirname echo env git grep id mkdir mktemp rm tee".split():
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    (tmp_path / "bin" / "make").write_text(MAKE)
    (tmp_path / "bin" / "make").chmod(0o755)
    settings = {"PATH": str(tmp_path / "bin")} | ({"HOME": home} if home else {})
    done = subprocess.run(
        ["bash", str(tmp_path / ".ci" / "run")], env=settings, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    last = r"14 passed, 1 failed, 1 skipped, not run: browser in \d+s"
    assert re.fullmatch(last, lines[-1])
    verdicts = [re.search("passed|FAILED|NOT RUN", line)[0] for line in lines[-6:-1]]
    assert verdicts == ["passed", "FAILED", "passed", "NOT RUN", "passed"]


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
def test_address_is_set_in_every_file(tmp_path):
    for path in text_files():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    subprocess.run("git init -q && git add -A", shell=True, check=True, cwd=tmp_path)
    new = "https://github.com/some-lab/patching.book"
    command = ["bash", "scripts/address.sh"]
    subprocess.run([*command, new], check=True, cwd=tmp_path, capture_output=True)
    copies = [tmp_path / path.relative_to(ROOT) for path in text_files()]
    text = "".join(path.read_text("utf-8", "ignore") for path in copies)
    owner_and_name = ADDRESS.removeprefix("https://github.com")
    assert owner_and_name not in text and PROJECT["urls"]["Documentation"] not in text
    assert new in text and "https://some-lab.github.io/patching.book/" in text
    assert "colab.research.google.com/github/some-lab/patching.book/blob" in text
    wrong = subprocess.run([*command, "patching"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2 and "'patching' is no address" in wrong.stderr


TABLE = """clean,corrupted,right,wrong,word,word_corrupted
The opposite of hot is,The opposite of high is, cold, low,hot,high
It is no longer dry but,It is no longer full but, wet, empty,dry,full
"""


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "book/index.md", "book/how-far-it-goes.md"])
def test_the_pages_examples_run_one_after_the_other(page: str, tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    (tmp_path / "prompts.csv").write_text(TABLE, encoding="utf-8")
    script = tmp_path / "examples.py"
    script.write_text("\n".join(examples), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert examples and done.returncode == 0, done.stderr
