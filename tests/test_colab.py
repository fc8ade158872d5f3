"""The notebooks in an environment with Colab's versions and a stand-in for its own module.

`make colab` runs this in an environment that has the dependencies but not the package, and nbmake
runs the notebooks as they lie in the repository. The install cell fetches the package by the
repository's address, which git here resolves to the checkout. The tests of the explorer follow in
the same environment, as its widgets are those that differ most.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.colab

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
STAND_IN = '''
"""What notebooks may ask of Colab's own module, outside Colab."""


class output:
    @staticmethod
    def enable_custom_widget_manager():
        pass
'''


def wanted() -> dict[str, str]:
    """The versions that requirements-colab.txt names."""
    lines = (ROOT / "requirements-colab.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {r.name: str(r.specifier).removeprefix("==") for r in found}


def installed() -> dict[str, str]:
    """The versions in place of those that requirements-colab.txt names, a CPU build or not."""
    return {name: importlib.metadata.version(name).split("+")[0] for name in wanted()}


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """The checkout as a repository that stays as it is while the notebooks run."""
    repository = tmp_path_factory.mktemp("repository")
    ignore = shutil.ignore_patterns(".venv*", ".git", "__pycache__", "_build", "build")
    shutil.copytree(ROOT, repository, ignore=ignore, dirs_exist_ok=True)
    git = ["git", "-c", "user.name=ci", "-c", "user.email=ci@localhost", "-C", str(repository)]
    for command in ("init -q --initial-branch=main", "add .", "commit -q --message=checkout"):
        subprocess.run([*git, *command.split()], check=True)
    return repository


@pytest.fixture(scope="module")
def colab(repository, tmp_path_factory) -> dict[str, str]:
    """The settings of a machine that looks like Colab and finds the package in the repository."""
    module = tmp_path_factory.mktemp("colab") / "modules" / "google" / "colab"
    module.mkdir(parents=True)
    (module / "__init__.py").write_text(STAND_IN, encoding="utf-8")
    # Colab has loaded its module before the first cell runs.
    start = module.parents[1] / "sitecustomize.py"
    start.write_text("import google.colab\n", encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    address = re.search(r'^Repository = "(.*)"$', project, re.MULTILINE)[1]
    return {
        **os.environ,
        "PYTHONPATH": str(module.parents[1]),
        "COLAB_RELEASE_TAG": "stand-in",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": address,
    }


def test_environment_has_colabs_versions_and_not_the_package():
    assert installed() == wanted()
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("patching-demo")


def test_notebooks_install_the_package_and_run(colab, repository, tmp_path):
    # The first installs the package, as in Colab; the others then run two at a time.
    notebooks = [repository / "notebooks" / f"{stem}.ipynb" for stem in CHAPTERS]
    options = "-q -p no:randomly -p no:cacheprovider -o addopts= --overwrite --nbmake-timeout=1800"
    command = [sys.executable, "-m", "pytest", "--nbmake", "--durations=0", *options.split()]
    one_thread = {**colab, "OMP_NUM_THREADS": "1"}
    for env, extra, some in ((colab, [], notebooks[:1]), (one_thread, ["-n2"], notebooks[1:])):
        done = subprocess.run([*command, *extra, *map(str, some)], env=env, cwd=tmp_path)
        assert done.returncode == 0
    for path in notebooks:
        cells = nbformat.read(path, as_version=4).cells
        text = "".join(o.get("text", "") for cell in cells for o in cell.get("outputs", []))
        assert "Runtime: Google Colab" in text
        assert ("Installing patching-demo" in text) == (path == notebooks[0])
    assert importlib.metadata.version("patching-demo")
    assert installed() == wanted(), "the install cell changed what Colab ships"
