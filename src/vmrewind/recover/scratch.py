"""A disk as it was at a moment, with changes that go into a scratch file: what a writable export serves, or boots from."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vmrewind.errors import SpaceError
from vmrewind.history.view import Extent, View
from vmrewind.journal.holes import punch_hole
from vmrewind.recover.ranges import Ranges

_ZEROES: Final = bytes(1 << 20)


class Scratch:
    """A view whose changes lie in a sparse file without a name, which is gone when the process is: history does not change.

    Used from several threads, as a view is.
    """

    def __init__(self, view: View, directory: Path) -> None:
        self._view = view
        self._held = Ranges()
        self._lock = threading.Lock()
        try:
            with tempfile.TemporaryFile(dir=directory, prefix="vmrewind-export-") as file:
                self._fd = os.dup(file.fileno())
            os.truncate(self._fd, view.size)
        except OSError as error:
            raise SpaceError(
                f"{directory}: no scratch file can be made: {error.strerror}", "name another directory with --scratch"
            ) from error

    @property
    def size(self) -> int:
        """Bytes."""
        return self._view.size

    @property
    def changed_bytes(self) -> int:
        """How much of the disk differs, or may, from the view."""
        with self._lock:
            return self._held.total

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``: from the scratch file what it holds, the rest from the view."""
        with self._lock:
            parts = list(self._held.split(offset, offset + len(buffer)))
        for start, end, held in parts:
            part = buffer[start - offset : end - offset]
            if held:
                self._read_scratch(start, part)
            else:
                self._view.read_into(start, part)

    def _read_scratch(self, start: int, part: memoryview) -> None:
        while part:
            got = os.preadv(self._fd, (part,), start)
            if not got:
                raise OSError(errno.EIO, "the scratch file is shorter than its disk")
            start, part = start + got, part[got:]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What is held counts as data."""
        with self._lock:
            parts = list(self._held.split(offset, offset + length))
        for start, end, held in parts:
            if held:
                yield Extent(start, end - start, zero=False)
            else:
                yield from self._view.extents(start, end - start)

    def write(self, offset: int, data: memoryview) -> None:
        """Into the scratch file. What did not get there whole stays as it was."""
        at = offset
        left = data
        while left:
            written = os.pwrite(self._fd, left, at)
            left, at = left[written:], at + written
        with self._lock:
            self._held.add(offset, offset + len(data))

    def zero(self, offset: int, length: int) -> None:
        """By a hole where the file system can."""
        try:
            punch_hole(self._fd, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            for at in range(offset, offset + length, len(_ZEROES)):
                self.write(at, memoryview(_ZEROES)[: offset + length - at])
        with self._lock:
            self._held.add(offset, offset + length)

    def close(self) -> None:
        """Give the scratch file up."""
        os.close(self._fd)
