"""An image that comes to hold a moment while a VM that began from that moment runs on it.

What the VM writes goes to capture, which journals it and writes it to the image; what the image does not have yet is read from the
moment, and copied piece by piece into the image, past the journal, which knows the moment by its base. This process alone copies,
and where capture is sent it has copied before, so nothing that the VM has written is ever copied over.

Before capture is sent to a place, the image has all of the moment around it: there are faults in which capture journals a place as
the image holds it (a write that the image refuses; by granules, what bypassed the journal, which does not begin while images are
incomplete), and that must not be what was not copied yet.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from vmrewind.capture.dirty import granule_of
from vmrewind.errors import ImageError, RepositoryError, SpaceError
from vmrewind.history.view import View
from vmrewind.nbd.client import NbdClient
from vmrewind.recover.restore import NO_SPACE
from vmrewind.recover.scratch import Overlay

T = TypeVar("T")

_PIECE: Final = 1 << 20
_ZEROES_MAX: Final = 1 << 30
_RETRY_SECONDS: Final = 1.0
_HEAD: Final = 1 << 20
"""So much is there before capture opens the image: a qcow2 file's header tells what it is."""


class Filling(Overlay):
    """The disk ``target`` of a capture that listens at ``socket``, on ``image``, which is made here and must not be there.

    A repository that cannot be reached is waited for, and so does the VM. ``complain`` is told of it, once.
    """

    def __init__(self, view: View, image: Path, target: str, socket: Path, complain: Callable[[str], None]) -> None:
        self.image = image
        self._complain = complain
        self._abandoned = threading.Event()
        self._changing = threading.Lock()
        # Flushes take long, and the next write need not wait for them.
        self._writer = NbdClient(socket, target)
        self._flusher = NbdClient(socket, target)
        self._greeter = NbdClient(socket, target)
        try:
            fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ImageError(f"{image}: cannot be made: {error.strerror}", "name another directory with --keep") from error
        super().__init__(view, fd)
        try:
            os.truncate(fd, view.size)
            self._copy(0, min(_HEAD, view.size))
        except OSError as error:
            raise self._refused(error) from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``."""
        self._patiently(lambda: super(Filling, self).read_into(offset, buffer))

    def write(self, offset: int, data: memoryview) -> None:
        """Through capture: it is in the journal and the image when this returns."""
        self._surround(offset, len(data))
        self._writer.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """As ``write``."""
        end = offset + length
        while offset < end:
            stop = min(offset // _ZEROES_MAX * _ZEROES_MAX + _ZEROES_MAX, end)
            self._surround(offset, stop - offset)
            self._writer.zero(offset, stop - offset)
            offset = stop

    def flush(self) -> None:
        """By capture."""
        self._flusher.flush()

    def greet_capture(self) -> None:
        """Return once capture, as it is now, has answered, full as its journal may be. Raises Closed."""
        self._greeter.greet()

    def fill(self, stop: threading.Event, progress: Callable[[int, int], None]) -> None:
        """Copy what the image lacks, then sync it; returns early on ``stop``. May be called again after it failed.

        ``progress`` is told (bytes done, bytes in total). Raises SpaceError, ImageError, and what the view raises.
        """
        try:
            for at in range(0, self.size, _PIECE):
                if stop.is_set():
                    return
                self._copy(at, min(at + _PIECE, self.size))
                progress(min(at + _PIECE, self.size), self.size)
            os.fsync(self._fd)
        except OSError as error:
            raise self._refused(error) from error

    def _surround(self, offset: int, length: int) -> None:
        """Have the moment in the range and around it, by whole granules of capture's, so that no copy comes there any more.

        Capture may keep a request waiting until the image is complete, so the copy must not have to wait for the request.
        """
        size = granule_of(self.size)
        end = min(-(-(offset + length) // size) * size, self.size)
        for at in range(offset // size * size, end, _PIECE):
            self._copy(at, min(at + _PIECE, end))

    def _copy(self, start: int, end: int) -> None:
        lacked = self._lacked(start, end)  # Read before: nobody need wait for that.
        with self._changing:
            self._keep(lacked)

    def _lacked(self, start: int, end: int) -> list[tuple[int, int, bytes | None]]:
        """(start, end, what the moment has there; None: zeroes) of what the image lacks within a range."""
        return [
            (low, high, None if extent.zero else self._read(low, high))
            for extent in self._view.extents(start, end - start)
            for low, high in self._lacking(extent.offset, extent.offset + extent.length)
        ]

    def _read(self, start: int, end: int) -> bytes:
        return self._patiently(lambda: self._view.read(start, end - start))

    def _patiently(self, read: Callable[[], T]) -> T:
        told = False
        while True:
            try:
                return read()
            except RepositoryError as error:
                if not told:
                    self._complain(f"what is not copied yet cannot be read now, and is waited for: {error}")
                told = True
                if self._abandoned.wait(_RETRY_SECONDS):
                    raise

    def _keep(self, lacked: list[tuple[int, int, bytes | None]]) -> None:
        """Put what the image lacks still."""
        for low, high, data in lacked:
            for start, end in self._lacking(low, high):
                # A file that was just made reads as zeroes wherever nothing was written.
                if data is not None:
                    self._put(memoryview(data)[start - low : end - low], start)
                with self._lock:
                    self._held.add(start, end)

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
        """Let go of requests that wait for capture, or for the repository; they fail."""
        self._abandoned.set()
        self._writer.close()
        self._flusher.close()
        self._greeter.close()

    def close(self) -> None:
        """Nothing is read or changed any more."""
        self.abandon()
        os.close(self._fd)
