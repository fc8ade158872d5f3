"""Run a command with the network cut, for it and all that it starts (Linux only).

The command gets a network of its own without a card. The loopback stays, for Jupyter's kernels.
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

if sys.argv[1] == "--inside":
    # A new network has a loopback that is down.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
    os.execvp(sys.argv[2], sys.argv[2:])
try:
    subprocess.run([*ALONE, "true"], check=True, capture_output=True, text=True)
except (OSError, subprocess.CalledProcessError) as error:
    reason = str(getattr(error, "stderr", None) or error).strip()
    sys.exit(
        f"the network cannot be cut on this machine ({reason}): disconnect the machine and run "
        "make test"
    )
os.execvp(ALONE[0], [*ALONE, sys.executable, __file__, "--inside", *sys.argv[1:]])
