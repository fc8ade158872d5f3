"""The files around the package agree with each other."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml
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
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

sys.path.insert(0, str(ROOT / "scripts"))
import sync_notebooks  # noqa: E402


def requirements(*extras: str) -> list[Requirement]:
    """The runtime requirements and those of `extras`."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in EXTRAS[extra]]
    return [r for r in map(Requirement, lines) if r.name != PROJECT["name"]]


def pins(path: Path, python: str) -> dict[str, str]:
    """Exact versions by canonical name, as pip reads them with this Python on Linux."""
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
        assert specifier.operator == "==", f"{line} is not an exact version"
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is pinned twice for Python {python}"
        found[name] = specifier.version
    return found


def text_files() -> list[Path]:
    """The project's own text files, without what builds and tools leave beside them."""
    ignored = {"_build", "generated", "data", "__pycache__"}
    kinds = {".py", ".md", ".yml", ".yaml", ".toml", ".cff", ".ipynb", ".txt", ".sh", ""}
    found = []
    for folder, folders, names in os.walk(ROOT):
        here = Path(folder)
        hidden = {name for name in folders if name.startswith(".")} - {".ci", ".github"}
        runs = {"notebooks"} if here == ROOT / "book" else set()
        folders[:] = sorted(set(folders) - ignored - hidden - runs)
        found += [here / name for name in names if Path(name).suffix in kinds]
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


def test_lock_names_no_machine_and_no_build():
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        assert "+" not in line and "@" not in line and "://" not in line, line
    assert pins(ROOT / "requirements.lock", "3.11")["torch"] == "2.13.0"


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
    assert citation["version"] == PROJECT["version"] == patching_demo.__version__
    assert ADDRESS in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_opens_with_the_headline_figure():
    """The landing page shows the same one, live; `make picture` redraws this from a run."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    (picture,) = re.findall(r"!\[[^\]]{20,}\]\(([^)]+\.png)\)", lines)
    assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")
    assert picture in (ROOT / "scripts/picture.py").read_text("utf-8").replace('" / "', "/")
    assert "figures/headline.json" in (ROOT / "book/index.md").read_text("utf-8")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_opens_in_colab_by_itself(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    path = f"{ADDRESS.removeprefix('https://')}/blob/main/notebooks/{notebook.name}"
    badge = f"https://colab.research.google.com/{path.replace('github.com', 'github')}"
    assert badge in cells[0].source, f"the first cell lacks the badge {badge}"
    installs = [c.source for c in cells if c.cell_type == "code" and "pip" in c.source]
    assert any(f"git+{ADDRESS}" in source for source in installs), "no cell installs the package"
    assert any("parameters" in c.metadata.get("tags", []) for c in cells), "no parameters cell"


@pytest.mark.parametrize("stem", sorted({p.stem for p in (ROOT / "notebooks").glob("*.*")}))
def test_notebook_pair(stem):
    assert not sync_notebooks.problems(ROOT / "notebooks" / f"{stem}.py")


def test_sync_notices_drift_outputs_and_orphans(tmp_path):
    script = tmp_path / "a.py"
    script.write_text("# %%\n1 + 1\n", encoding="utf-8")
    assert "has no a.ipynb" in sync_notebooks.problems(script)[0]
    sync_notebooks.write_pair(script)
    assert sync_notebooks.problems(script) == []
    pair = jupytext.read(script.with_suffix(".ipynb"))
    first_id = pair.cells[0].id

    script.write_text(script.read_text(encoding="utf-8") + "\n# %%\n2\n", encoding="utf-8")
    assert "disagree" in sync_notebooks.problems(script)[0]
    pair.cells[0]["outputs"] = [nbformat.v4.new_output("stream", text="2")]
    nbformat.write(pair, script.with_suffix(".ipynb"))
    assert "outputs" in sync_notebooks.problems(script)[0]
    sync_notebooks.write_pair(script)
    mended = jupytext.read(script.with_suffix(".ipynb"))
    assert [cell.get("outputs") for cell in mended.cells] == [[], []]
    assert mended.cells[0].id == first_id


def test_book_contains_every_notebook_and_page():
    toc = yaml.safe_load((ROOT / "book/_toc.yml").read_text(encoding="utf-8"))
    entries = [c for part in toc["parts"] for c in part["chapters"]]
    assert {"glob": "notebooks/*"} in entries
    listed = {toc["root"], *(entry["file"] for entry in entries if "file" in entry)}
    assert listed == {path.stem for path in (ROOT / "book").glob("*.md")}


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
    # The book's renderer is loaded by Sphinx only; notebook set-up asks Colab and IPython.
    allowed = {"docutils", "sphinx", "google", "IPython", "patching_demo"}
    providers = importlib.metadata.packages_distributions()
    for path in (ROOT / "patching_demo").rglob("*.py"):
        for name in imported(path) - set(sys.stdlib_module_names) - allowed:
            distributions = {canonicalize_name(d) for d in providers.get(name, [])}
            assert distributions & declared, f"{path.name} imports {name}, which is not declared"


def test_make_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", makefile, re.MULTILINE)[1]
    targets = set(phony.replace("\\", " ").split()) - {"moved"}
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True
    )
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert done.returncode == 0 and listed == targets


# The landing run, with lanes that say what they are told to ---------------------------------------

TOOLS = "awk bash cat date dirname echo env git grep id make mktemp rm sleep tee".split()


def landing_run(folder: Path, rules: str, *tools: str) -> tuple[int, list[str]]:
    """Exit status and lines of .ci/run beside a Makefile of these rules, with no other tools."""
    (folder / ".ci").mkdir(parents=True)
    script = Path(shutil.copy(ROOT / ".ci" / "run", folder / ".ci"))
    (folder / "Makefile").write_text(rules, encoding="utf-8")
    (folder / "bin").mkdir()
    for tool in TOOLS:
        (folder / "bin" / tool).symlink_to(shutil.which(tool))
    (folder / "bin" / "python3").symlink_to(sys.executable)
    for tool in tools:
        (folder / "bin" / tool).symlink_to(shutil.which("env"))
    settings = {"PATH": str(folder / "bin"), "HOME": str(folder)}
    done = subprocess.run(
        [shutil.which("bash"), str(script)],
        env=settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout.splitlines()


def test_landing_run_sums_the_tests_of_its_lanes(tmp_path):
    rules = (
        "venv slow: ; @echo fine\n"
        "test: ; @echo '== 12 passed, 3 deselected in 1.0s =='; echo '== 4 passed in 9.99s =='\n"
        "browser colab: ; @echo '=== 2 passed, 1 skipped in 61.00s (0:01:01) ==='\n"
    )
    status, lines = landing_run(tmp_path, rules, "chromium")
    assert status == 0
    assert re.fullmatch(r"20 passed, 0 failed, 2 skipped in \d+s", lines[-1])
    names = [line.split()[0] for line in lines[-6:-1]]
    assert names == ["venv", "test", "slow", "browser", "colab"]


def test_landing_run_fails_with_a_lane_and_goes_on(tmp_path):
    rules = (
        "venv slow: ; @echo fine\n"
        "test: ; @echo '== 1 failed, 12 passed in 1.0s =='; exit 1\n"
        "browser: ; @echo broken before any test; exit 2\n"
        "colab: ; @echo '=== 2 passed in 3.00s ==='\n"
    )
    status, lines = landing_run(tmp_path, rules, "chromium")
    assert status == 1 and lines[-1].startswith("14 passed, 2 failed in ")
    verdicts = [line.split()[-1] for line in lines[-6:-1]]
    assert verdicts == ["passed", "FAILED", "passed", "FAILED", "passed"]
    status, lines = landing_run(tmp_path / "no environment", "venv: ; @exit 1\n", "chromium")
    assert status == 1 and lines[-1].startswith("0 passed, 1 failed in ")


def test_landing_run_never_calls_a_lane_passed_that_it_could_not_run(tmp_path):
    status, lines = landing_run(tmp_path, "venv test slow browser colab: ; @echo ran\n")
    assert status == 0 and lines.count("ran") == 4
    assert re.fullmatch(r"0 passed, 0 failed, not run: browser in \d+s", lines[-1])
    assert any(re.match(r"\s+browser .* NOT RUN: there is no Chromium", line) for line in lines)
