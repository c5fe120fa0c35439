"""The segment pool: the storage space that a capture is given, as preallocated files that are used again and again.

All space is reserved when the pool is opened, so a full file system is found out before the VM starts and not while it runs.
Overwriting a segment that exists is also 3 to 5 times as fast as appending to a new file (DESIGN's prototype).
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from vmrewind.errors import SpaceError
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import (
    SegmentFile,
    SegmentHeader,
    pack_segment_header,
    segment_files,
    unpack_segment_header,
)
from vmrewind.journal.runs import sync_directory

SEGMENTS_MIN: Final = 8
"""A small journal gets smaller segments rather than fewer: one is written, the others hold history."""
SEGMENT_SIZE_MIN: Final = 1 << 20


class JournalFull(Exception):
    """No segment may be used again now; never shown to a user: the journal-full policy decides what it means."""


class Recycling(enum.Enum):
    """May this segment be recycled? ``DROPS`` means yes, and that history is lost by it."""

    NO = enum.auto()
    FREE = enum.auto()
    DROPS = enum.auto()


@dataclass(frozen=True, slots=True)
class Recycled:
    """A segment whose records were dropped to make room: ``first_seq`` up to the next segment's."""

    run: int
    number: int
    first_seq: int


def segment_size(journal_size: int) -> int:
    """Bytes per segment for a journal of ``journal_size`` bytes: 64 MiB, less for small journals, whole MiB."""
    return max(SEGMENT_SIZE_MIN, min(fmt.SEGMENT_SIZE, journal_size // SEGMENTS_MIN >> 20 << 20))


class SegmentPool:
    """Hands out segment files of one journal directory; ``may_recycle(segment)`` is the policy's word on each old one."""

    def __init__(self, journal: Path, journal_size: int) -> None:
        self.journal = journal
        self.segment_size = segment_size(journal_size)
        self.segments_max = max(2, journal_size // self.segment_size)
        self.stretch = False
        """Rather exceed the quota by a segment than raise JournalFull."""
        self._free: list[Path] = []

    def allot(self) -> None:
        """Reserve all of the space; raises SpaceError if it is not there. Call once, before the VM starts."""
        self.journal.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._free = []
        for path in sorted(self.journal.glob("free-*.seg")):
            if path.stat().st_size == self.segment_size:
                self._free.append(path)
            else:
                path.unlink()
        live = len(segment_files(self.journal))
        serial = 0
        while live + len(self._free) < self.segments_max:
            path = self.journal / f"free-{serial:08d}.seg"
            serial += 1
            if path.exists():
                continue
            try:
                self._preallocate(path)
            except SpaceError:
                # Give back what was taken: a start that fails leaves the file system as it found it.
                for made in self.journal.glob("free-*.seg"):
                    made.unlink()
                raise
            self._free.append(path)
        while self._free and live + len(self._free) > self.segments_max:
            self._free.pop().unlink()
        sync_directory(self.journal)

    def _preallocate(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, self.segment_size)
        except OSError as error:
            path.unlink()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            wanted = self.segments_max * self.segment_size >> 20
            raise SpaceError(
                f"{self.journal}: no room for a journal of {wanted} MiB ({error.strerror})",
                "free space there, set journal_size smaller, or set journal to another directory",
            ) from error
        finally:
            os.close(fd)

    def take(self, header: SegmentHeader, may_recycle: Callable[[SegmentFile], Recycling]) -> tuple[int, int, list[Recycled]]:
        """Make a segment with this header (its size is filled in).

        Returns its file descriptor, its size in bytes, and what history was dropped for it. Raises JournalFull. The caller
        makes the directory entry durable before it promises anything about the segment's content.
        """
        dropped: list[Recycled] = []
        path = self._free.pop() if self._free else self._recycle(may_recycle, dropped)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        # Exclusive until the new header is in place: a reader that comes now waits, and then sees that its segment is gone.
        fcntl.flock(fd, fcntl.LOCK_EX)
        size = os.fstat(fd).st_size
        os.pwrite(fd, pack_segment_header(replace(header, size=size)), 0)
        os.rename(path, self.journal / fmt.segment_name(header.run, header.number))
        fcntl.flock(fd, fcntl.LOCK_UN)
        return fd, size, dropped

    def _recycle(self, may_recycle: Callable[[SegmentFile], Recycling], dropped: list[Recycled]) -> Path:
        """A segment file to overwrite: the oldest, so that history shrinks from its oldest end and never gets a hole."""
        live = segment_files(self.journal)
        for i, segment in enumerate(live):
            with open(segment.path, "rb") as file:
                header = unpack_segment_header(file.read(fmt.SEGMENT_HEADER_SIZE), segment.path)
                verdict = may_recycle(segment)
                if verdict is Recycling.NO:
                    break
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return self._beyond_quota(len(live) - i)
            if verdict is Recycling.DROPS:
                dropped.append(Recycled(segment.run, segment.number, header.first_seq))
            if len(live) - i > self.segments_max or header.size != self.segment_size:
                segment.path.unlink()
                continue
            # Taken out of the live names at once: between here and the new header no reader may find it by its old name.
            free = self.journal / "free-recycled.seg"
            os.rename(segment.path, free)
            return free
        if self.stretch or len(segment_files(self.journal)) < self.segments_max:
            return self._beyond_quota(0)
        raise JournalFull

    def _beyond_quota(self, live: int) -> Path:
        """A new segment although the quota is used up: a reader holds the oldest, and must not hold up the guest."""
        if live >= 2 * self.segments_max:
            raise JournalFull
        path = self.journal / "free-extra.seg"
        path.unlink(missing_ok=True)
        try:
            self._preallocate(path)
        except SpaceError as error:
            raise JournalFull from error
        return path
