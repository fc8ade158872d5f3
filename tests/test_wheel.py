"""The wheel works by itself, outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import importlib, pathlib, pkgutil, sys
import patching_demo
home = pathlib.Path(patching_demo.__file__).resolve()
assert home.is_relative_to(pathlib.Path(sys.argv[1]).resolve()), home
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


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    """In this environment; test_project.py holds imports to the dependencies that are declared."""
    place, outside = tmp_path / "a place", tmp_path / "elsewhere"
    outside.mkdir()
    zipfile.ZipFile(wheel).extractall(place)
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_"))}
    settings["PYTHONPATH"] = str(place)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(place)],
        cwd=outside,
        env=settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "layers 2"
