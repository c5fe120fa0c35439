"""A bad sector in a file that this process reads: a call that begins there fails with EIO, one that begins before ends in front.

And files of which no process can read anything.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmrewind.history import sources
from vmrewind.history.gathering import mapped

PAGE = 4096
"""What the kernel reads at once, and so what one bad sector takes."""


def unreadable(path: Path) -> None:
    """The file opens from now on, in whatever process, and no byte of it can be read: EIO from the kernel itself.

    Nothing is mapped at address 0, which is what reading a process's memory from its beginning asks for.
    """
    path.unlink(missing_ok=True)
    path.symlink_to("/proc/self/mem")


@contextmanager
def bad_sector(path: Path, offset: int) -> Iterator[None]:
    """The page of ``offset`` cannot be read meanwhile."""
    low = offset // PAGE * PAGE
    wanted = path.stat()
    pread, preadv = os.pread, os.preadv

    def is_it(fd: int) -> bool:
        found = os.fstat(fd)
        return (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)

    def readable(fd: int, length: int, at: int) -> int:
        if not is_it(fd) or at + length <= low or at >= low + PAGE:
            return length
        if at >= low:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return low - at

    def bad_pread(fd: int, length: int, at: int) -> bytes:
        return pread(fd, readable(fd, length, at), at)

    def bad_preadv(fd: int, buffers: Sequence[memoryview], at: int) -> int:
        (buffer,) = buffers
        return preadv(fd, (buffer[: readable(fd, len(buffer), at)],), at)

    def bad_mapped(fd: int) -> memoryview:
        if not is_it(fd):
            return mapped(fd)
        return memoryview(mmap.mmap(fd, low, prot=mmap.PROT_READ)) if low else memoryview(b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", bad_pread)
        patch.setattr(os, "preadv", bad_preadv)
        patch.setattr(sources, "mapped", bad_mapped)
        yield
