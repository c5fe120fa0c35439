"""Holes in files: ``fallocate`` with the modes that Python's own does not have."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

KEEP_SIZE: Final = 1
PUNCH_HOLE: Final = 2
ZERO_RANGE: Final = 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """As the system call. Raises OSError."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Make a range of a file a hole, which reads as zeroes. Raises OSError where that cannot be done."""
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
