"""Locking a disk image against other users, in the way QEMU does, so that QEMU and its tools see our lock and we see theirs.

QEMU's file-posix driver takes open-file-description locks on single bytes of the image: a shared lock on byte 100 + p says "I use
permission p", one on byte 200 + p says "nobody else may use p". After taking them it looks whether anyone holds the opposite byte.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import Final

from vmrewind.errors import ImageError

_F_OFD_GETLK: Final = 36
_F_OFD_SETLK: Final = 37
_FLOCK: Final = struct.Struct("hhqqi4x")
"""l_type, l_whence, l_start, l_len, l_pid."""

_USES_AT: Final = 100
_REFUSES_AT: Final = 200
_CONSISTENT_READ: Final = 0
_WRITE: Final = 1
_RESIZE: Final = 3
_USES: Final = (_CONSISTENT_READ, _WRITE, _RESIZE)
_REFUSES: Final = (_WRITE, _RESIZE)


def lock_image(fd: int, path: str | Path) -> None:
    """Lock ``fd`` for writing, until it is closed; raises ImageError naming who has it, when that can be found out."""
    for permission in _USES:
        _shared_lock(fd, _USES_AT + permission, path)
    for permission in _REFUSES:
        _shared_lock(fd, _REFUSES_AT + permission, path)
    if any(_held_by_other(fd, _REFUSES_AT + p) for p in _USES) or any(_held_by_other(fd, _USES_AT + p) for p in _REFUSES):
        raise _in_use(fd, path)


def _shared_lock(fd: int, byte: int, path: str | Path) -> None:
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _in_use(fd, path) from error
        raise ImageError(f"{path}: cannot be locked: {error.strerror}", "put the image on a file system with locks") from error


def _held_by_other(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _in_use(fd: int, path: str | Path) -> ImageError:
    holders = ", ".join(f"{name} (pid {pid})" for pid, name in image_users(fd)) or "another process"
    return ImageError(
        f"{path}: the image is in use by {holders}",
        "stop what uses it first; two writers would destroy it",
    )


def image_users(fd: int) -> list[tuple[int, str]]:
    """(pid, command name) of every other process that has the file of ``fd`` open and that we may look into."""
    wanted = _file_key(os.fstat(fd))
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) == os.getpid():
            continue
        try:
            with os.scandir(f"/proc/{pid}/fd") as entries:
                if any(_file_key(os.stat(entry.path)) == wanted for entry in entries):
                    found.append((int(pid), Path(f"/proc/{pid}/comm").read_text().strip()))
        except OSError:
            continue
    return found


def _file_key(status: os.stat_result) -> tuple[int, int]:
    if stat.S_ISBLK(status.st_mode):
        return (-1, status.st_rdev)
    return (status.st_dev, status.st_ino)
