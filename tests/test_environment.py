"""The wheel, and what may be missing where it runs: a home, git, the network, rights to write."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from machines import works

ROOT = Path(__file__).resolve().parents[1]

#: Forbids what a read-only checkout, no network and no other programs forbid, root or not.
GUARD = """
    import os, sys

    ROOT = sys.argv[1]
    CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.symlink"}

    def inside(path):
        return isinstance(path, (str, os.PathLike)) and (
            os.path.abspath(os.fspath(path)).startswith(ROOT + os.sep)
        )

    def guard(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if flags else 0
            if writes and inside(path):
                raise OSError(30, "Read-only file system", str(path))
        elif event in CHANGES and any(map(inside, arguments)):
            raise OSError(30, "Read-only file system", str(arguments))
        elif event in ("socket.connect", "socket.getaddrinfo"):
            raise OSError(101, "Network is unreachable")
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            started.append(arguments)

    started = []
    sys.addaudithook(guard)
    sys.path.insert(0, ROOT)
"""
WORK = """
    try:
        open(os.path.join(ROOT, "written"), "w")
        sys.exit("the guard does not hold")
    except OSError:
        pass
    import importlib, pkgutil, patching_demo
    assert patching_demo.__file__.startswith(ROOT), patching_demo.__file__
    for module in pkgutil.walk_packages(patching_demo.__path__, "patching_demo."):
        importlib.import_module(module.name)
    from patching_demo import *
    model = load_model("attn-only-2l-demo")
    task = induction_task(model, batch=1, seq_len=4)
    result = sweep(model, task, "out", by="all_pos", store="cells é.safetensors", progress=False)
    assert load(save(result, "a result é.json")).identical(result)
    plots.heatmap(result)
    assert not any("git" in str(program) for program in started), started
    print("done", len(result.values.ravel()))
"""


def bare(folder: Path) -> dict[str, str]:
    """An environment without a home, and with no programs to be found but Python."""
    kept = {k: v for k, v in os.environ.items() if k.startswith(("LANG", "LC_", "OMP_"))}
    return {**kept, "PATH": str(Path(sys.executable).parent), "TMPDIR": str(folder)}


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
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"patching_demo"}
    data = (path for path in (ROOT / "patching_demo/data").rglob("*") if path.is_file())
    kept = {path.relative_to(ROOT).as_posix() for path in data if "__pycache__" not in path.parts}
    assert kept and kept <= set(names)
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin", ".pkl"))]


def test_wheel_works_where_it_cannot_be_written_without_home_git_or_network(wheel, tmp_path):
    """In this environment; test_project.py holds imports to the dependencies that are declared."""
    place, folder = tmp_path / "a place", tmp_path / "a földer"
    folder.mkdir()
    zipfile.ZipFile(wheel).extractall(place)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(GUARD) + textwrap.dedent(WORK), str(place)],
        cwd=folder,
        env=bare(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done 16\n"
    assert {"a result é.json", "cells é.safetensors"} <= {p.name for p in folder.iterdir()}


WITHOUT_NETWORK = """
    import socket
    print([name for _, name in socket.if_nameindex()])
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
    try:
        socket.create_connection(("192.0.2.1", 80), timeout=5)
    except OSError as error:
        raise SystemExit(f"as it should be: {error.strerror}")
"""


def offline(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "offline.py"), *command],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(
    not works("unshare", "--map-root-user", "--net", "true"), reason="namespaces are not allowed"
)
def test_offline_leaves_the_loopback_and_nothing_else():
    done = offline(sys.executable, "-c", textwrap.dedent(WITHOUT_NETWORK))
    assert done.stdout == "['lo']\n"
    assert done.stderr == "as it should be: Network is unreachable\n" and done.returncode == 1


def test_offline_says_where_it_cannot_cut_the_network(tmp_path):
    done = offline("true", PATH=str(tmp_path))
    assert "the network cannot be cut on this machine (" in done.stderr and done.returncode == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide otherwise")
def test_a_sweep_has_memory_kept_for_its_next_block_call():
    code = """
        import resource
        import torch
        from oracle import model
        from patching_demo import induction_task, sweep

        def allocate(times):
            for _ in range(times):  # About as much as a block call needs at once.
                buffers = [torch.zeros(14 * 2**18) for _ in range(4)]
                del buffers

        bridge = model("llama-gqa")
        sweep(bridge, induction_task(bridge, batch=2, seq_len=4), "resid_pre", progress=False)
        allocate(2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        allocate(20)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    pages = 20 * 4 * 14 * 2**20 // mmap.PAGESIZE
    assert int(done.stdout) < pages / 10
