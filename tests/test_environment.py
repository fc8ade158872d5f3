"""What may be missing where the project runs: a home, git, the network, the right to write."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import namespaces
import nbformat
import pytest
from namespaces import works

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
    from patching_demo import induction_task, load, load_model, plots, save, sweep
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


def test_the_package_works_in_a_read_only_checkout_without_home_git_or_network(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "a földer"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(GUARD) + textwrap.dedent(WORK), str(ROOT)],
        cwd=folder,
        env=bare(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done 16\n"
    assert sorted(p.name for p in folder.iterdir() if p.suffix in (".json", ".safetensors")) == [
        "a result é.json",
        "cells é.safetensors",
    ]


# ---- the Makefile

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="there is no make")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile and what it looks at, in a folder with a space and an umlaut in its path."""
    folder = tmp_path / "a chäckout"
    (folder / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "requirements.lock", "Makefile"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "scripts" / "build_book.py").write_text("")
    with open(folder / "Makefile", "a", encoding="utf-8") as file:
        file.write('\nshow-home:\n\t@printf "%s\\n" "$$HOME"\n')
    return folder


def make(folder: Path, *arguments: str, **env: str) -> str:
    """What make prints, in an environment in which nothing is set that it is not told."""
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_make
@pytest.mark.parametrize("home", [None, "", "/nonexistent", "/dev/null"])
def test_make_lends_a_home_where_there_is_none(checkout: Path, home: str | None) -> None:
    env = {} if home is None else {"HOME": home}
    lent = Path(make(checkout, "show-home", **env).strip())
    assert lent == checkout / ".home" and lent.is_dir()


@needs_make
def test_make_keeps_a_home_that_can_be_written(checkout: Path, tmp_path: Path) -> None:
    assert make(checkout, "show-home", HOME=str(tmp_path)).strip() == str(tmp_path)
    assert not (checkout / ".home").exists()


@needs_make
@pytest.mark.parametrize("target", ["book", "test"])
def test_a_second_run_installs_nothing_and_a_moved_checkout_does(
    checkout: Path, tmp_path: Path, target: str
) -> None:
    home = {"HOME": str(tmp_path)}
    assert "pip install" in make(checkout, "-n", target, **home)
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".complete").write_text(f"{checkout}\n", encoding="utf-8")
    second = make(checkout, "-n", target, **home)
    assert "pip" not in second and "build_book.py" in second
    moved = checkout.rename(tmp_path / "elsewhere")
    assert "pip install" in make(moved, "-n", target, **home)


@needs_make
def test_make_works_in_a_copy_of_a_checkout_that_cannot_be_written(
    checkout: Path, tmp_path: Path
) -> None:
    """Forced, since root may write anywhere: the variable says what the folder would."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    before = sorted(checkout.rglob("*"))
    env = {"HOME": str(tmp_path), "TMPDIR": str(scratch)}
    shown = make(checkout, "WRITABLE=no", "show-home", "help", **env)
    assert shown.splitlines()[-1].split()[0] in ("clean", "show-home")
    (copy,) = scratch.iterdir()
    assert f"working in {copy}" in shown
    assert (copy / "Makefile").read_bytes() == (checkout / "Makefile").read_bytes()
    assert sorted(checkout.rglob("*")) == before
    # The second time it goes on from there, with the checkout's files as they are now.
    (copy / ".venv").mkdir()
    (copy / ".venv" / ".complete").write_text(f"{copy}\n", encoding="utf-8")
    (copy / "book" / "notebooks").mkdir(parents=True)
    (copy / "notebooks").mkdir()
    (checkout / "scripts" / "new.py").write_text("")
    make(checkout, "WRITABLE=no", "help", **env)
    assert (copy / "scripts" / "new.py").exists() and (copy / ".venv" / ".complete").exists()
    assert (copy / "book" / "notebooks").exists() and not (copy / "notebooks").exists()


# ---- a checkout that really cannot be written


@dataclass
class ReadOnly:
    """A checkout that cannot be written by what `before` is put before."""

    folder: Path
    before: list[str]
    scratch: Path
    copy: Path

    def make(self, goal: str, pytest_options: str = "") -> tuple[int, str]:
        """Exit status and output of a target, which must have been made in the copy."""
        env = {"PATH": os.environ["PATH"], "TMPDIR": str(self.scratch)}
        done = subprocess.run(
            [*self.before, "make", "--no-print-directory", "-C", str(self.folder), goal],
            env={**env, "PYTEST_ADDOPTS": pytest_options},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert f"{self.folder} cannot be written: working in {self.copy}" in done.stdout
        assert "pip install" not in done.stdout
        return done.returncode, done.stdout


@pytest.fixture(params=["mount", "permissions"])
def read_only(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ReadOnly]:
    """A copy of the checkout that cannot be written, in which one notebook lacks its pair.

    It is mounted read-only, or lacks the permission. That one does not stop root, unless root is
    in a user namespace, where it counts as the owner of its files and no more.
    """
    folder, scratch = tmp_path / "a chäckout", tmp_path / "scratch"
    made = (".*", "__pycache__", "_build", "generated")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*made))
    shutil.rmtree(folder / "book" / "notebooks", ignore_errors=True)
    (folder / "notebooks" / "01_setup.ipynb").unlink()
    inside = [folder, *folder.rglob("*")]
    if request.param == "mount":
        before = namespaces.read_only(folder)
    else:
        as_other = ["unshare", "--map-user=1000", "--map-group=1000"]
        before = as_other if os.geteuid() == 0 else []
        for path in inside:
            path.chmod(path.stat().st_mode & ~0o222)
    if not works(*before, "true"):
        pytest.skip(f"this machine allows no such namespace: {' '.join(before[:2])}")
    assert not works(*before, "touch", str(folder / "new")), "the checkout can be written"
    user = subprocess.check_output([*before, "id", "-u"], text=True).strip()
    copy = scratch / f"patching_demo-checkout-{user}"
    copy.mkdir(parents=True, mode=0o700)
    lend_environment(copy)
    was = all_of(folder)
    yield ReadOnly(folder, before, scratch, copy)
    assert all_of(folder) == was, "the checkout was changed"
    for path in inside:
        path.chmod(path.stat().st_mode | 0o200)


def all_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Mode, time of change and content of all that lies in a folder."""
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in folder.rglob("*")
    }


def lend_environment(copy: Path) -> None:
    """Make the copy's `.venv` out of the environment that runs the tests, without installing."""
    venv.create(copy / ".venv", symlinks=True)
    (site,) = (copy / ".venv").glob("lib/python*/site-packages")
    # The copy comes first: an editable install of this checkout would hide it.
    (site / "lent.pth").write_text(f"{copy}\n{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    (copy / ".venv" / ".complete").write_text(f"{copy}\n", encoding="utf-8")


@needs_make
def test_make_works_from_a_checkout_that_cannot_be_written(read_only: ReadOnly) -> None:
    """What is wrong with the checkout is found, and mended in the copy alone, time and again."""
    status, shown = read_only.make("pairs")
    assert status and "01_setup.py has no 01_setup.ipynb beside it" in shown, shown
    for _ in range(2):
        status, shown = read_only.make("sync")
        assert not status, shown
        written = (read_only.copy / "notebooks" / "01_setup.ipynb").read_text(encoding="utf-8")
        assert nbformat.reads(written, as_version=4).cells


@needs_make
@pytest.mark.slow
def test_tests_pass_from_a_checkout_that_cannot_be_written(read_only: ReadOnly) -> None:
    # The doctests of a module fail where another copy of it was imported.
    files = "tests/test_notebook_helpers.py patching_demo/notebook.py"
    status, shown = read_only.make("unit", f"--no-cov {files}")
    assert not status and re.search(r"^=+ \d+ passed", shown, re.MULTILINE), shown
    assert f"rootdir: {read_only.copy}" in shown
    assert (read_only.copy / ".pytest_cache").is_dir()


# ---- the network cut

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
def test_offline_leaves_the_loopback_and_nothing_else() -> None:
    done = offline(sys.executable, "-c", textwrap.dedent(WITHOUT_NETWORK))
    assert done.stdout == "['lo']\n"
    assert done.stderr == "as it should be: Network is unreachable\n" and done.returncode == 1


def test_offline_says_where_it_cannot_cut_the_network(tmp_path: Path) -> None:
    done = offline("true", PATH=str(tmp_path))
    assert "the network cannot be cut on this machine (" in done.stderr
    assert "unshare" in done.stderr and done.returncode == 1


@needs_make
def test_make_offline_runs_make_test_that_way(checkout: Path, tmp_path: Path) -> None:
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    (checkout / ".venv" / ".complete").write_text(f"{checkout}\n", encoding="utf-8")
    last = make(checkout, "offline", HOME=str(tmp_path)).splitlines()[-1]
    assert re.fullmatch(r"scripts/offline.py \S*make --no-print-directory test", last)
