"""The segment pool: the storage space that a capture is given, as preallocated files that are used again and again.

All space is reserved when the pool is opened, so a full file system is found out before the VM starts and not while it runs.
Overwriting a segment that exists is also 3 to 5 times as fast as appending to a new file (DESIGN's prototype).
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from vmrewind.errors import CorruptionError, RepositoryError, SpaceError
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import (
    SegmentFile,
    SegmentHeader,
    pack_segment_header,
    segment_files,
    unpack_segment_header,
)
from vmrewind.journal.runs import private_directory, sync_directory

SEGMENTS_MIN: Final = 8
"""A small journal gets smaller segments rather than fewer: one is written, the others hold history."""
SEGMENT_SIZE_MIN: Final = 1 << 20


class JournalFull(Exception):
    """The journal cannot take more now; never shown to a user: the journal-full policy decides what it means."""


class Recycling(enum.Enum):
    """May this segment be recycled? ``DROPS`` means yes, and that history is lost by it."""

    NO = enum.auto()
    FREE = enum.auto()
    DROPS = enum.auto()


@dataclass(frozen=True, slots=True)
class Recycled:
    """A segment whose records were dropped to make room: ``first_seq`` (None: not readable) up to the next segment's."""

    run: int
    number: int
    first_seq: int | None


def segment_size(journal_size: int) -> int:
    """Bytes per segment for a journal of ``journal_size`` bytes: 64 MiB, less for small journals, whole MiB."""
    return max(SEGMENT_SIZE_MIN, min(fmt.SEGMENT_SIZE, journal_size // SEGMENTS_MIN >> 20 << 20))


class SegmentPool:
    """Hands out segment files of one journal directory; ``may_recycle(segment)`` is the policy's word on each old one."""

    def __init__(self, journal: Path, journal_size: int) -> None:
        self.journal = journal
        self.segment_size = segment_size(journal_size)
        self.segments_max = max(2, journal_size // self.segment_size)
        self.quota = self.segments_max * self.segment_size
        """Bytes that segments, live and free, may take."""
        self.stretch = False
        """Rather exceed the quota than raise JournalFull."""
        self.deleted = False
        """The journal's directory is gone: another one of that name is not this journal."""
        self.dropped: list[Recycled] = []
        """History that was recycled to make room, for the caller to declare and clear."""
        self._free: list[Path] = []

    def allot(self) -> None:
        """Reserve all of the space; raises SpaceError if it is not there. Call once, before the VM starts."""
        private_directory(self.journal)
        self._free = []
        made: list[Path] = []
        room = self.quota - self._used()
        for path in sorted(self.journal.glob("free-*.seg")):
            if path.stat().st_size == self.segment_size <= room:
                self._free.append(path)
                room -= self.segment_size
            else:
                path.unlink()
        serial = 0
        while room >= self.segment_size:
            path = self.journal / f"free-{serial:08d}.seg"
            serial += 1
            if path.exists():
                continue
            try:
                self._preallocate(path)
            except SpaceError:
                # Give back what was taken: a start that fails leaves the file system as it found it.
                for taken in made:
                    taken.unlink()
                raise
            made.append(path)
            room -= self.segment_size
        self._free += made
        sync_directory(self.journal)

    def _used(self) -> int:
        """Bytes that the live segments take; another size than this pool's, when the journal was resized, counts as it is."""
        return sum(file.path.stat().st_size for file in segment_files(self.journal))

    def _preallocate(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, self.segment_size)
        except OSError as error:
            path.unlink()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise SpaceError(
                f"{self.journal}: no room for a journal of {self.quota >> 20} MiB ({error.strerror})",
                "free space there, set journal_size smaller, or set journal to another directory",
            ) from error
        finally:
            os.close(fd)

    def take(self, header: SegmentHeader, may_recycle: Callable[[SegmentFile], Recycling]) -> tuple[int, int]:
        """Make a segment with this header (its size is filled in); returns its file descriptor and its size in bytes.

        What history is lost by it is added to ``dropped``. Raises JournalFull. The caller makes the directory entry durable
        before it promises anything about the segment's content.
        """
        if self.deleted:
            raise JournalFull("the journal's directory was deleted")
        try:
            path, fd = self._open_free() or self._recycle(may_recycle)
        except OSError as error:
            raise JournalFull(f"no segment can be had: {error}") from error
        try:
            size = os.fstat(fd).st_size
            os.pwrite(fd, pack_segment_header(replace(header, size=size)), 0)
            os.rename(path, self.journal / fmt.segment_name(header.run, header.number))
            fcntl.flock(fd, fcntl.LOCK_UN)
        except OSError as error:
            os.close(fd)
            self._free.insert(0, path)
            raise JournalFull(f"{path}: cannot be made a segment: {error}") from error
        return fd, size

    def _open_free(self) -> tuple[Path, int] | None:
        """A file of the reserved space, open and locked; None if none is left. One that somebody deleted is made anew."""
        while self._free:
            path = self._free[-1]
            try:
                fd = self._open_locked(path)
            except FileNotFoundError:
                self._free.pop()
                with contextlib.suppress(JournalFull):
                    return self._extra(self._used() + len(self._free) * self.segment_size, self.quota)
                continue
            self._free.pop()
            return path, fd
        return None

    @staticmethod
    def _open_locked(path: Path) -> int:
        """Open a file that no reader has: exclusive until its new header is in place."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _recycle(self, may_recycle: Callable[[SegmentFile], Recycling]) -> tuple[Path, int]:
        """A segment file to overwrite, open and locked: the oldest, so that history shrinks from its oldest end only.

        It stays locked from before it loses its live name until it has its new header: a reader that opened it by the old name
        waits for its own lock until then, and sees that its segment is gone. One that a reader has locked already is left to that
        reader, without a name, and a new file takes its place: no reader, however slow, holds up the guest.
        """
        used = self._used()
        for segment in segment_files(self.journal):
            verdict = may_recycle(segment)
            if verdict is Recycling.NO:
                break
            try:
                fd = self._open_locked(segment.path)
            except BlockingIOError:
                size = segment.path.stat().st_size
                # First, as it may fail: its space comes back only when the reader is done.
                extra = self._extra(used - size, self.quota) if used - size + self.segment_size <= self.quota else None
                self._note_dropped(segment, verdict)
                os.unlink(segment.path)
                if extra is not None:
                    return extra
                used -= size
                continue
            size = os.fstat(fd).st_size
            self._note_dropped(segment, verdict)
            if size == self.segment_size and used <= self.quota:
                free = self.journal / "free-recycled.seg"
                os.rename(segment.path, free)
                return free, fd
            # Of another size, or beyond the quota since the last run's end was worth it: give its space back.
            os.unlink(segment.path)
            os.close(fd)
            used -= size
            if used + self.segment_size <= self.quota:
                break
        return self._extra(used, self.quota * (2 if self.stretch else 1))

    def _note_dropped(self, segment: SegmentFile, verdict: Recycling) -> None:
        if verdict is Recycling.DROPS:
            self.dropped.append(Recycled(segment.run, segment.number, _first_seq(segment.path)))

    def _extra(self, used: int, limit: int) -> tuple[Path, int]:
        """A new segment, if ``limit`` bytes of segments in all allow it."""
        if used + self.segment_size > limit:
            raise JournalFull("every segment is in use")
        path = self.journal / "free-extra.seg"
        path.unlink(missing_ok=True)
        try:
            self._preallocate(path)
        except SpaceError as error:
            raise JournalFull(str(error)) from error
        return path, self._open_locked(path)


def _first_seq(path: Path) -> int | None:
    try:
        with open(path, "rb", buffering=0) as file:
            return unpack_segment_header(file.read(fmt.SEGMENT_HEADER_SIZE), path).first_seq
    except (CorruptionError, RepositoryError):
        return None
