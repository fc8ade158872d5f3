"""A per-user cache of folders that are whole and unaltered, or not there at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import filelock
import platformdirs
from safetensors import SafetensorError

CACHE_ENV = "PATCHING_DEMO_CACHE"
#: The file of a finished folder that holds the sum of all its other files.
SUM_FILE = "sha256"
#: Seconds to wait for another process that is filling the same folder.
LOCK_S = 900.0


class ModelUnavailable(RuntimeError):
    """A model's files are not there or cannot be trusted; the message says why and what to do."""

    def _render_traceback_(self) -> list[str]:
        # IPython asks for this: the message is the whole story, so a notebook shows no frames.
        return [f"ModelUnavailable: {self}"]


def cache_dir() -> Path:
    """Return the folder that holds converted models.

    `PATCHING_DEMO_CACHE` names another one. Without it this is the system's per-user cache folder,
    and where there is no home folder at all, one of the user's own in the temporary folder.
    """
    override = os.environ.get(CACHE_ENV)
    if override:
        return Path(os.path.expanduser(override)).absolute()
    folder = Path(platformdirs.user_cache_dir("patching_demo", appauthor=False))
    if folder.is_absolute():
        return folder
    owner = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    return Path(tempfile.gettempdir()) / f"patching_demo-{owner}"


def in_a_line(error: Exception) -> str:
    """Return an error's type and the first line of what it says, to stand in a sentence."""
    said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {said}"


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sum_of(folder: Path) -> str:
    """Return one sha256 for the names and contents of a folder's files.

    Whole files are read each time: half a second for half a gigabyte, and the only way to notice a
    change that keeps the size and the date.
    """
    files = sorted(p for p in folder.glob("[!.]*") if p.is_file() and p.name != SUM_FILE)
    lines = "".join(f"{sha256_of(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _is_intact(folder: Path) -> bool:
    try:
        return (folder / SUM_FILE).read_text(encoding="ascii").strip() == _sum_of(folder)
    except (OSError, ValueError):  # a folder without its sum is one that was never finished
        return False


def verified_folder(name: str, build: Callable[[Path], None], needs_bytes: int = 0) -> Path:
    """Return the cache's folder `name`, its files checked; `build(empty folder)` makes it anew.

    The folder appears by one rename once it is complete, so that a process that dies, a full disk
    or a second process cannot leave half a folder behind. An altered folder is refused with a
    line that names it, and made again.

    Raises:
        ModelUnavailable: the cache cannot be written, has fewer than `needs_bytes` bytes free, or
            is kept by another process; or `build` raises it.
    """
    cache = cache_dir()
    folder = cache / name
    # No lock in the usual case, which then works from a read-only cache: nothing is ever written
    # into a finished folder.
    if _is_intact(folder):
        return folder
    if folder.exists():
        print(f"Refused: {folder} is not as it was written. Making it again.", flush=True)
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(cache).free
        if free < needs_bytes:
            room = f"{free / 1e6:,.0f} MB free, {needs_bytes / 1e6:,.0f} needed"
            raise OSError(errno.ENOSPC, room)
        # A lock waits for its whole time where its file cannot be made, so first see whether one
        # can.
        with tempfile.TemporaryFile(dir=cache):
            pass
        with filelock.FileLock(cache / f".{name}.lock", timeout=LOCK_S):
            if not _is_intact(folder):  # else another process did it while this one waited
                _make(folder, build)
    except filelock.Timeout as busy:
        raise ModelUnavailable(
            f"another process has held {busy.lock_file} for {LOCK_S:.0f} s; end it, or set "
            f"{CACHE_ENV} to another folder"
        ) from None
    except (OSError, SafetensorError) as error:  # the latter is how safetensors says "disk full"
        reason = getattr(error, "strerror", None) or error
        raise ModelUnavailable(
            f"the cache folder {cache} can't be used ({reason}); free some space there, or set the "
            f"environment variable {CACHE_ENV} to a folder that can be written"
        ) from None
    return folder


def _make(folder: Path, build: Callable[[Path], None]) -> None:
    """Build beside the folder and move the result into place; the caller holds the lock."""
    unfinished = folder.with_name(f".{folder.name}.part")
    # One may be left from a process that was killed. The lock is ours, so nobody is using it.
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        build(unfinished)
        (unfinished / SUM_FILE).write_text(f"{_sum_of(unfinished)}\n", encoding="ascii")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
