"""The wheel works by itself: outside the checkout, with the declared dependencies and no others.

The empty environment gets its dependencies as links to the files that the running environment
has, and only those that the wheel declares, directly or through others. So the test needs no
network, and a forgotten dependency is missing there as it would be in Colab.
"""

from __future__ import annotations

import email
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import importlib, pathlib, pkgutil, sys
import patching_demo
home = pathlib.Path(patching_demo.__file__).resolve()
assert home.is_relative_to(pathlib.Path(sys.prefix).resolve()), home
for module in pkgutil.walk_packages(patching_demo.__path__, "patching_demo."):
    importlib.import_module(module.name)
for name in patching_demo.__all__:
    getattr(patching_demo, name)
model = patching_demo.load_model("attn-only-2l-demo")
task = patching_demo.induction_task(model)
result = patching_demo.sweep(model, task, "resid_pre")
assert result.notnull().all(), result
print("layers", result.sizes["layer"])
"""


def declared(wheel: Path) -> list[str]:
    """The requirements in a wheel's metadata, without those of its extras."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    lines = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist")
    return [line for line in lines if "extra ==" not in line]


def closure(requirements: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """Installed distributions that `requirements` need, those of their dependencies included."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = [(Requirement(line), "") for line in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        new_extras = requirement.extras if name in found else requirement.extras | {""}
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
        lines = found[name].requires or []
        todo += [(Requirement(line), extra) for line in lines for extra in new_extras]
    return found


def link_files(distribution: importlib.metadata.Distribution, site: Path) -> None:
    """Link the importable files of an installed distribution into another site-packages."""
    for file in distribution.files or []:
        # A .pth file would bring in folders that the wheel did not ask for.
        if file.parts[0] == ".." or file.suffix == ".pth":
            continue
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        source = Path(distribution.locate_file(file))
        if source.is_file() and not target.exists():
            target.symlink_to(source)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the checkout without isolation, hence without network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        + ["--no-index", "--disable-pip-version-check", "--wheel-dir", str(folder), str(ROOT)],
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_its_data_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"patching_demo"}
    kept = {
        f"patching_demo/data/{path.relative_to(ROOT / 'patching_demo/data').as_posix()}"
        for path in (ROOT / "patching_demo" / "data").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert kept and kept <= set(names)
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin", ".pkl"))]


def test_wheel_works_in_an_empty_environment(wheel, tmp_path):
    environment = tmp_path / "an empty environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    for distribution in closure(declared(wheel)).values():
        link_files(distribution, site)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        + ["--no-index", "--disable-pip-version-check", str(wheel)],
        check=True,
    )
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_"))}
    done = subprocess.run(
        [str(python), "-c", PROBE], cwd=outside, env=settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "layers 2"
