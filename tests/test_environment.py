"""What may be missing where the project runs: a home, git, the network, the right to write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

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
