"""A disk as it was at a moment, with changes that go into a scratch file: what a writable export serves, or boots from."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from vmrewind.errors import SpaceError
from vmrewind.history.view import Extent, View
from vmrewind.journal.holes import punch_hole
from vmrewind.recover.ranges import Ranges

_ZEROES: Final = bytes(1 << 20)


class Overlay(ABC):
    """A view with changes over it, which a file of the disk's size holds. Used from several threads, as a view is."""

    def __init__(self, view: View, fd: int) -> None:
        self._view = view
        self._fd = fd
        self._held = Ranges()
        """What the file holds; the rest is the view's."""
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes."""
        return self._view.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``: from the file what it holds, the rest from the view."""
        with self._lock:
            parts = list(self._held.split(offset, offset + len(buffer)))
        for start, end, held in parts:
            part = buffer[start - offset : end - offset]
            if held:
                self._read_held(start, part)
            else:
                self._view.read_into(start, part)

    def _read_held(self, start: int, part: memoryview) -> None:
        while part:
            got = os.preadv(self._fd, (part,), start)
            if not got:
                raise OSError(errno.EIO, "the file that holds what was changed is shorter than its disk")
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

    @abstractmethod
    def write(self, offset: int, data: memoryview) -> None:
        """Change what is there. What did not get there whole stays as it was."""

    @abstractmethod
    def zero(self, offset: int, length: int) -> None:
        """Make a range zeroes."""

    @abstractmethod
    def flush(self) -> None:
        """What was changed is on stable storage afterwards."""

    @abstractmethod
    def close(self) -> None:
        """Nothing is read or changed any more."""


class Scratch(Overlay):
    """Changes in a sparse file without a name, which is gone when the process is: history does not change, nothing is durable."""

    def __init__(self, view: View, directory: Path) -> None:
        try:
            with tempfile.TemporaryFile(dir=directory, prefix="vmrewind-export-") as file:
                fd = os.dup(file.fileno())
            os.truncate(fd, view.size)
        except OSError as error:
            raise SpaceError(
                f"{directory}: no scratch file can be made: {error.strerror}", "name another directory with --scratch"
            ) from error
        super().__init__(view, fd)

    def write(self, offset: int, data: memoryview) -> None:
        """Into the scratch file."""
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

    def flush(self) -> None:
        """Nothing: what is changed here ends with this process."""

    def close(self) -> None:
        """Give the scratch file up."""
        os.close(self._fd)


def scratch_in(directory: Path | None) -> Callable[[str, View], Scratch] | None:
    """What makes a scratch file in a directory for each disk; None without one."""
    return None if directory is None else lambda _, view: Scratch(view, directory)
