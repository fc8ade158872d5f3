"""Run a command with the network cut, for it and all that it starts.

Linux only: the command gets a network of its own without a card. The loopback stays, on which
Jupyter talks to its kernels.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys

ALONE = ("unshare", "--map-root-user", "--net")
SIOCSIFFLAGS, IFF_UP = 0x8914, 1


def raise_loopback() -> None:
    """A new network has a loopback that is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))


def main(command: list[str]) -> None:
    if command[0] == "--inside":
        raise_loopback()
        os.execvp(command[1], command[1:])
    try:
        subprocess.run([*ALONE, "true"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        sys.exit(
            f"the network cannot be cut on this machine ({str(reason).strip()}): disconnect the "
            "machine and run make test"
        )
    os.execvp(ALONE[0], [*ALONE, sys.executable, __file__, "--inside", *command])


if __name__ == "__main__":
    main(sys.argv[1:])
