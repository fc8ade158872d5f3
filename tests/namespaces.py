"""Machines as they may be, for one command: folders that nobody can write, and disks that are full.

Linux gives a command a view of its own on the machine, for which it need not be root. Where that
is not allowed, the tests that need it are skipped.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def works(*command: str) -> bool:
    """Whether a command is there and succeeds."""
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def read_only(folder: Path) -> list[str]:
    """What to put before a command for which a folder is mounted read-only."""
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    return ["unshare", "-rm", "sh", "-c", mount, str(folder)]


def small_disk(folder: Path, kilobytes: int) -> list[str]:
    """What to put before a command for which an empty disk of that size is mounted on a folder."""
    mount = f'mount -t tmpfs -o size={kilobytes}k none "$0" && exec "$@"'
    return ["unshare", "-rm", "sh", "-c", mount, str(folder)]


needs_mounts = pytest.mark.skipif(
    not works("unshare", "-rm", "sh", "-c", "mount -t tmpfs none /tmp"),
    reason="this machine allows no mounts of one's own",
)
