"""An image that comes to hold a moment while a VM that began from that moment runs on it.

What the VM writes goes to capture, which journals it and writes it to the image; what the image does not have yet is read from the
moment, and copied piece by piece into the image, past the journal, which knows the moment by its base. Both are done by this
process alone and one at a time, so a piece that the VM has written to is never copied over.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vmrewind.errors import ImageError, SpaceError
from vmrewind.history.view import View
from vmrewind.nbd.client import NbdClient
from vmrewind.recover.restore import NO_SPACE
from vmrewind.recover.scratch import Overlay

_PIECE: Final = 1 << 20
_HEAD: Final = 1 << 20
"""So much is there before capture opens the image: a qcow2 file's header tells what it is."""


class Filling(Overlay):
    """The disk ``target`` of a capture that listens at ``socket``, on ``image``, which is made here and must not be there."""

    def __init__(self, view: View, image: Path, target: str, socket: Path) -> None:
        self.image = image
        self._changing = threading.Lock()
        # Flushes take long, and the next write need not wait for them.
        self._writer = NbdClient(socket, target)
        self._flusher = NbdClient(socket, target)
        try:
            fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ImageError(f"{image}: cannot be made: {error.strerror}", "name another directory with --keep") from error
        super().__init__(view, fd)
        try:
            os.truncate(fd, view.size)
            self._fill(0, min(_HEAD, view.size))
        except OSError as error:
            raise self._refused(error) from error

    def write(self, offset: int, data: memoryview) -> None:
        """Through capture: it is in the journal and the image when this returns."""
        with self._changing:
            self._writer.write(offset, data)
            with self._lock:
                self._held.add(offset, offset + len(data))

    def zero(self, offset: int, length: int) -> None:
        """As ``write``."""
        with self._changing:
            self._writer.zero(offset, length)
            with self._lock:
                self._held.add(offset, offset + length)

    def flush(self) -> None:
        """By capture."""
        self._flusher.flush()

    def fill(self, stop: threading.Event, progress: Callable[[int, int], None]) -> None:
        """Copy what the image lacks, then sync it; returns early on ``stop``. May be called again after it failed.

        ``progress`` is told (bytes done, bytes in total). Raises SpaceError, ImageError, and what the view raises.
        """
        try:
            for at in range(0, self.size, _PIECE):
                if stop.is_set():
                    return
                self._fill(at, min(at + _PIECE, self.size))
                progress(min(at + _PIECE, self.size), self.size)
            os.fsync(self._fd)
        except OSError as error:
            raise self._refused(error) from error

    def _fill(self, start: int, end: int) -> None:
        for extent in self._view.extents(start, end - start):
            low, high = extent.offset, extent.offset + extent.length
            # A file that was just made reads as zeroes wherever nothing was written.
            data = b"" if extent.zero or not self._lacking(low, high) else self._view.read(low, high - low)
            with self._changing:
                for begin, stop in self._lacking(low, high):
                    if not extent.zero:
                        self._put(memoryview(data)[begin - low : stop - low], begin)
                    with self._lock:
                        self._held.add(begin, stop)

    def _lacking(self, start: int, end: int) -> list[tuple[int, int]]:
        with self._lock:
            return [(low, high) for low, high, held in self._held.split(start, end) if not held]

    def _put(self, data: memoryview, offset: int) -> None:
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written

    def _refused(self, error: OSError) -> ImageError | SpaceError:
        if error.errno in NO_SPACE:
            return SpaceError(f"{self.image}: no space left", "make room: what it lacks is tried again")
        return ImageError(f"{self.image}: cannot be written: {error.strerror or errno.errorcode.get(error.errno or 0)}")

    def abandon(self) -> None:
        """Let go of requests that wait for capture; they fail."""
        self._writer.close()
        self._flusher.close()

    def close(self) -> None:
        """Nothing is read or changed any more."""
        self.abandon()
        os.close(self._fd)
