"""The read path: what the page cache has goes out at once; what it lacks is asked for, all of it, and waited for one by one.

A read that waits for the disk stops the loop, so as many as there are must be with the disk meanwhile. Every missing range is asked
for as soon as its request is there (``WILLNEED``). Then the loop goes on receiving; only when nothing else is left to do does it
wait for the oldest, after which it answers every other that has come in by then. Requests that arrive in between join them, so
the disk never runs dry (measured, 4 KiB cold at 16 in flight: 3 times the rate of one by one).
"""

from __future__ import annotations

import errno
import os
from collections import deque
from typing import Final

from vmrewind.capture.image import Image
from vmrewind.capture.replies import pack_read_error
from vmrewind.nbd import protocol as nbd

Read = tuple[int, int, int]
"""Cookie, offset, length; a length of 0 or less is the negative errno to answer."""

_WAITING_BYTES_MAX: Final = 64 << 20
_WAITING_MAX: Final = 256
_HEADER_MAX: Final = nbd.DATA_CHUNK.size


class Reader:
    """Reads of one connection."""

    def __init__(self, image: Image, *, structured: bool) -> None:
        self._image = image
        self._structured = structured
        self._head = nbd.DATA_CHUNK.size if structured else nbd.SIMPLE_REPLY.size
        self._waiting: deque[Read] = deque()
        self._waiting_bytes = 0
        self._nowait = os.RWF_NOWAIT

    @property
    def waiting(self) -> bool:
        """Whether a read waits for the disk."""
        return bool(self._waiting)

    @property
    def full(self) -> bool:
        """Whether so many wait that no more should be taken on."""
        return len(self._waiting) >= _WAITING_MAX or self._waiting_bytes >= _WAITING_BYTES_MAX

    def serve(self, reads: list[Read], output: bytearray, at: int) -> int:
        """Put the replies of all reads that can be answered now into ``output`` from ``at``; returns where they end."""
        view = memoryview(output)
        for read in reads:
            cookie, offset, length = read
            if length <= 0:
                at = pack_read_error(output, at, cookie, -length, structured=self._structured)
                continue
            end = self._read(read, output, view, at, self._nowait)
            if end < 0:
                os.posix_fadvise(self._image.fd, offset, length, os.POSIX_FADV_WILLNEED)
                self._waiting.append(read)
                self._waiting_bytes += length
            else:
                at = end
        return at

    def room(self, bytes_max: int) -> int:
        """How large a buffer ``wait`` can use, at most about ``bytes_max`` bytes."""
        oldest = self._waiting[0][2] + _HEADER_MAX
        return max(oldest, min(bytes_max, self._waiting_bytes + len(self._waiting) * _HEADER_MAX))

    def wait(self, output: bytearray) -> int:
        """Wait for the oldest read; put its reply, and those of all others that are there and fit, into ``output``.

        ``output`` is of at least ``room`` bytes. Returns where they end.
        """
        view = memoryview(output)
        oldest = self._waiting.popleft()
        self._waiting_bytes -= oldest[2]
        at = self._read(oldest, output, view, 0, 0)
        missing: list[Read] = []
        while self._waiting and at + self._waiting[0][2] + _HEADER_MAX <= len(output):
            read = self._waiting.popleft()
            end = self._read(read, output, view, at, self._nowait)
            if end < 0:
                missing.append(read)
            else:
                at = end
                self._waiting_bytes -= read[2]
        self._waiting.extendleft(reversed(missing))
        return at

    def fill(self, view: memoryview, offset: int) -> int:
        """Read from the image until ``view`` is full, however long that takes; returns the protocol's error."""
        done = 0
        try:
            while done < len(view):
                got = os.preadv(self._image.fd, (view[done:],), offset + done)
                if not got:
                    # The file was cut short behind our back.
                    return nbd.EIO
                done += got
        except OSError as error:
            return nbd.wire_error(error.errno)
        return 0

    def _read(self, read: Read, output: bytearray, view: memoryview, at: int, flags: int) -> int:
        """Put the reply of one read into ``output``, of which ``view`` is, from ``at``; returns where it ends.

        With ``flags`` it does not wait: -1 if it would have to.
        """
        cookie, offset, length = read
        start = at + self._head
        data = view[start : start + length]
        if flags:
            try:
                if os.preadv(self._image.fd, (data,), offset, flags) != length:
                    return -1
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    # This file system cannot tell what is cached: every read waits its turn.
                    self._nowait = 0
                return -1
        elif failure := self.fill(data, offset):
            return pack_read_error(output, at, cookie, failure, structured=self._structured)
        if self._structured:
            nbd.DATA_CHUNK.pack_into(
                output, at, nbd.STRUCTURED_REPLY_MAGIC, nbd.REPLY_FLAG_DONE, nbd.REPLY_OFFSET_DATA, cookie, length + 8, offset
            )
        else:
            nbd.SIMPLE_REPLY.pack_into(output, at, nbd.SIMPLE_REPLY_MAGIC, 0, cookie)
        return start + length
