"""Listening unix sockets that QEMU connects to."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final

from vmrewind.errors import ConfigError

SOCKET_PATH_BYTES_MAX: Final = 107
_BACKLOG: Final = 64


def listen(path: Path, owner: tuple[int, int] | None) -> socket.socket:
    """A listening unix socket that outlives the captures that serve it. ``owner``: (uid, gid) of QEMU's user.

    Connectable by that user, or without one by ours, and by nobody else. Raises ConfigError if the path is too long for a socket.
    """
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            f"{path}: too long for a unix socket ({SOCKET_PATH_BYTES_MAX} bytes)", "set VMREWIND_RUNTIME_DIR to a shorter path"
        )
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        mask = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(mask)
        if owner is not None:
            os.chown(path, *owner)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
