"""The segment pool: the storage space that a capture is given, as preallocated files that are used again and again.

All space is reserved when the pool is opened, so a full file system is found out before the VM starts and not while it runs.
Overwriting a segment that exists is also 3 to 5 times as fast as appending to a new file (DESIGN's prototype).

A *thin* pool (``local_history``) takes space as history needs it and gives back what history leaves, but for a reserve that is
overwritten first. The quota is its limit then, not its size.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
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
_RESERVE_PART: Final = 8
"""A thin pool keeps one such part of the quota free."""
_NOBODYS: Final = SegmentHeader(bytes(16), 0, 0, 0, 0, 0, 0)
"""The header of a segment file that holds nothing: whoever opened it by an older name sees that it is gone."""


class JournalFull(Exception):
    """The journal cannot take more now; never shown to a user: the journal-full policy decides what it means."""


class _NoRoom(JournalFull):
    """The quota allows another segment, and the file system has no room for it."""


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

    def __init__(self, journal: Path, journal_size: int, *, thin: bool = False) -> None:
        self.journal = journal
        self.segment_size = segment_size(journal_size)
        self.segments_max = max(2, journal_size // self.segment_size)
        self.quota = self.segments_max * self.segment_size
        """Bytes that segments, live and free, may take."""
        self._reserve = max(2, self.segments_max // _RESERVE_PART) if thin else self.segments_max
        """Most segments that are kept free."""
        self.stretch = False
        """Rather exceed the quota than raise JournalFull."""
        self.deleted = False
        """The journal's directory is gone: another one of that name is not this journal."""
        self.make_room: Callable[[], bool] = lambda: False
        """Have others free what they took of the file system; False if there is nothing of theirs to be had."""
        self.dropped: list[Recycled] = []
        """History that was recycled to make room, for the caller to declare and clear."""
        self._free: list[Path] = []

    def allot(self) -> None:
        """Reserve all of the space, of a thin pool the reserve. Once, before the VM starts; raises SpaceError."""
        private_directory(self.journal)
        self._free = []
        made: list[Path] = []
        room = self.quota - self._used()
        for path in sorted(self.journal.glob("free-*.seg")):
            if path.stat().st_size == self.segment_size <= room and len(self._free) < self._reserve:
                self._free.append(path)
                room -= self.segment_size
            else:
                path.unlink()
        wanted = min(room // self.segment_size, self._reserve - len(self._free)) * self.segment_size
        found = os.statvfs(self.journal)
        # What cannot be had is not tried: for as long as that takes, it would leave nothing to anybody else on the file system.
        if self._reserve == self.segments_max and wanted > found.f_bfree * found.f_frsize:
            raise self._no_room(os.strerror(errno.ENOSPC))
        serial = 0
        while room >= self.segment_size and len(self._free) + len(made) < self._reserve:
            path = self.journal / f"free-{serial:08d}.seg"
            serial += 1
            if path.exists():
                continue
            try:
                self._preallocate(path)
            except SpaceError:
                if self._reserve < self.segments_max and (made or self._free or segment_files(self.journal)):
                    # A thin pool's capture that takes a dead one's place must not fail for want of a reserve.
                    break
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
            raise self._no_room(error.strerror) from error
        finally:
            os.close(fd)

    def _no_room(self, why: str | None) -> SpaceError:
        return SpaceError(
            f"{self.journal}: no room for a journal of {self.quota >> 20} MiB ({why})",
            "free space there, set journal_size smaller, or set journal to another directory",
        )

    def expire(self, may_recycle: Callable[[SegmentFile], Recycling], is_old: Callable[[SegmentFile], bool]) -> None:
        """Let go of what is old and may be recycled without loss: a part becomes the reserve, the rest goes to the file system."""
        for segment in self._shipped(may_recycle):
            if not is_old(segment):
                break
            if len(self._free) >= self._reserve or not self._make_free(segment):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(segment.path)

    def _make_free(self, segment: SegmentFile) -> bool:
        """False if a reader has it, or it is of another size. A crash in between leaves a file that is live, or free already."""
        try:
            fd = self._open_locked(segment.path)
        except OSError:
            return False
        try:
            if os.fstat(fd).st_size != self.segment_size:
                return False
            free = self._free_path()
            os.rename(segment.path, free)
            self._free.insert(0, free)
            os.pwrite(fd, pack_segment_header(_NOBODYS), 0)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    def _free_path(self) -> Path:
        """A name for a free segment that none has."""
        return next(path for n in range(1 << 30) if not (path := self.journal / f"free-{n:08d}.seg").exists())

    def _shipped(self, may_recycle: Callable[[SegmentFile], Recycling]) -> Iterator[SegmentFile]:
        """Segments that may be recycled without loss, oldest first: of each run those before the first that may not."""
        kept = -1
        for segment in segment_files(self.journal):
            if segment.run == kept:
                continue
            if may_recycle(segment) is Recycling.FREE:
                yield segment
            else:
                kept = segment.run

    def _candidates(self, may_recycle: Callable[[SegmentFile], Recycling]) -> Iterator[tuple[SegmentFile, Recycling]]:
        """What may be overwritten, in this order: what is shipped, then what is lost by it, up to the first that must stay."""
        for segment in self._shipped(may_recycle):
            yield segment, Recycling.FREE
        for segment in segment_files(self.journal):
            if (verdict := may_recycle(segment)) is Recycling.NO:
                return
            yield segment, verdict

    def take(self, header: SegmentHeader, may_recycle: Callable[[SegmentFile], Recycling]) -> tuple[int, int]:
        """Make a segment with this header (its size is filled in); returns its file descriptor and its size in bytes.

        What history is lost by it is added to ``dropped``. Raises JournalFull. The caller makes the directory entry durable
        before it promises anything about the segment's content.
        """
        if self.deleted:
            raise JournalFull("the journal's directory was deleted")
        try:
            path, fd = self._open_free() or self._recycle(may_recycle)
        except _NoRoom:
            if not self.make_room():
                raise
            return self.take(header, may_recycle)
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
            except BlockingIOError:
                # Somebody reads what it held before: it stays with that reader, as in ``_recycle``.
                os.unlink(path)
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
        """A segment file to overwrite, open and locked: the oldest that is shipped, else the oldest that may be lost.

        So history shrinks from its oldest end only, or where the repository has it. A thin pool grows first, up to its quota.

        It stays locked from before it loses its live name until it has its new header: a reader that opened it by the old name
        waits for its own lock until then, and sees that its segment is gone. One that a reader has locked already is left to that
        reader, without a name, and a new file takes its place: no reader, however slow, holds up the guest.
        """
        used = self._used()
        with contextlib.suppress(JournalFull):
            return self._extra(used, self.quota)
        for segment, verdict in self._candidates(may_recycle):
            if verdict is Recycling.DROPS and used + self.segment_size <= self.quota and self.make_room():
                with contextlib.suppress(JournalFull):
                    return self._extra(used, self.quota)
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
            raise _NoRoom(str(error)) from error
        return path, self._open_locked(path)


def _first_seq(path: Path) -> int | None:
    try:
        with open(path, "rb", buffering=0) as file:
            return unpack_segment_header(file.read(fmt.SEGMENT_HEADER_SIZE), path).first_seq
    except (CorruptionError, RepositoryError):
        return None
