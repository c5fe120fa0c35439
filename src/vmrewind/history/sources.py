"""Where records come from: the local journal's segment files and the repository's segment objects, behind one face."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

import xxhash

from vmrewind.errors import CorruptionError
from vmrewind.history.cache import Lru
from vmrewind.history.gathering import mapped
from vmrewind.history.merged import Member, MergedTable
from vmrewind.history.rows import Columns, RecordTables, between, notes_of
from vmrewind.history.stretches import merged_directory, merged_stretches
from vmrewind.journal.reader import Segment, SegmentFile, Tables, UnreadableHeader, segment_files
from vmrewind.journal.verify import later_batch
from vmrewind.repository.layout import SegmentName
from vmrewind.repository.repository import VmRepository
from vmrewind.repository.segment import FRAME_SIZE, Framing, Rows, ShippedSegment

ALL_DISKS_MASK: Final = -1
"""Mask with every disk's bit."""

ROWS_BYTES_MAX: Final = 256 << 20
"""Of tables, some 5 million records."""
_AGAIN: Final = "once more: what was noted of it before is not used any more"
_DESCRIPTORS_SPARE: Final = 512
"""Beside the journal's: an export's clients, each with four threads that gather, take 288 at most."""
_FRAMES_BYTES_MAX: Final = 8 * FRAME_SIZE
"""What an opened object keeps of its payload at most, bytes."""


class Source(Protocol):
    """Some records of one run: every record of the disks in ``mask`` (bit i: disk index i) with a seq in [first, last]."""

    @property
    def name(self) -> str:
        """The file's path or the object's key, for messages."""

    @property
    def run(self) -> int:
        """The run."""

    @property
    def first(self) -> int:
        """Seq of the first record."""

    @property
    def last(self) -> int:
        """Seq of the last record; ``first - 1`` if there is none."""

    @property
    def mask(self) -> int:
        """The disks."""

    def rows(self, first: int, last: int) -> Rows:
        """Its rows with seqs in [first, last], in order. Raises DamagedObject if it does not reach up to ``last`` (any more)."""

    def columns(self, first: int, last: int) -> Columns:
        """The same, as columns."""

    def notes(self, first: int, last: int) -> Rows:
        """Those of them that tell something of others, or of the whole: VOIDs and events. Raises as ``rows`` does."""

    def payload(self, which: str, position: int, length: int, xxh3: int) -> bytes:
        """The verified payload of one of its rows; raises CorruptionError naming file or object, ``which`` record, and offset."""


class LocalSource:
    """A segment file of the local journal: its valid prefix at the time of the first look.

    The file stays open, and so locked against recycling, until ``close``.
    """

    mask = ALL_DISKS_MASK

    def __init__(self, segment: Segment, *, is_last: bool, may_map: bool = True) -> None:
        self.segment = segment
        self._may_map = may_map
        self.name = str(segment.path)
        self.run = segment.header.run
        self.number = segment.header.number
        self.first = segment.header.first_seq
        self._is_last = is_last
        self._table: MergedTable | None = None
        self._last: int | None = None
        self._notes: tuple[int, Rows] | None = None
        """Up to which seq, and they."""

    @property
    def table(self) -> MergedTable | None:
        """The merged table that tells what it holds, None if there is none: then the segment itself does."""
        return self._table if self._table is not None and self._table.usable else None

    def use(self, table: MergedTable, member: Member) -> None:
        """Take a merged table's word for what the segment holds, which is never a run's last."""
        self._table, self._member = table, member

    @functools.cached_property
    def _read_once(self) -> tuple[RecordTables, int, str | None]:
        """(tables, offset where the valid prefix ends, damage seen there)."""
        tables, damage = self._read()
        return RecordTables(tables), tables.end, damage

    @property
    def last(self) -> int:
        """Seq of the last record of the valid prefix."""
        if self.table is not None:
            return self._member.last_seq
        if self._last is None:
            last = self._read_once[0].last_seq
            self._last = last if last is not None else self.first - 1
        return self._last

    @property
    def end(self) -> int:
        """Offset in the file where the valid prefix ends."""
        return self._member.end if self.table is not None else self._read_once[1]

    @property
    def damage(self) -> str | None:
        """What the file itself shows to be wrong behind the valid prefix; what is not valid only in a run's last segment."""
        return self._read_once[2] if self.table is None else None

    def rows(self, first: int, last: int) -> Rows:
        """Rows of the valid prefix."""
        return between(self._reaching(last).rows, first, last)

    def columns(self, first: int, last: int) -> Columns:
        """Columns of the valid prefix."""
        tables = self._reaching(last)
        return tables if first <= self.first and tables.last_seq == last else between(tables.rows, first, last)

    def _reaching(self, last: int) -> RecordTables:
        tables, end, _ = self._read_once
        if (table := self.table) is not None and tables.last_seq != self._member.last_seq:
            table.discard()
            raise self._damaged(end)
        # Whoever asks was told so by a merged table, or by tables that were forgotten since.
        if (tables.last_seq or 0) < last:
            raise self._damaged(end)
        return tables

    def notes(self, first: int, last: int) -> Rows:
        """VOIDs and events of the valid prefix."""
        if (table := self.table) is not None:
            known, notes = self._member.last_seq, table.notes
        else:
            if self._notes is None:
                tables = self._read_once[0]
                self._notes = tables.last_seq or 0, tables.notes
            known, notes = self._notes
        if known < last:
            raise self._damaged(self.end)
        return between(notes, first, last)

    def _damaged(self, end: int) -> DamagedObject:
        return DamagedObject(self, CorruptionError(f"{self.name} is damaged at offset {end}", _AGAIN))

    def look_again(self) -> None:
        """Note nothing of what it held before: ``last`` is told by the segment as it is now, or by a table that is usable."""
        self._last = self._notes = None
        self.forget()

    @property
    def kept_bytes(self) -> int:
        """What is kept of its tables."""
        kept = self.__dict__.get("_read_once")
        return kept[0].nbytes if kept is not None else 0

    def forget(self) -> None:
        """Keep no tables: they are read again when they are needed. A run's last segment may grow, and keeps them."""
        if not self._is_last:
            self.__dict__.pop("_read_once", None)

    def _read(self) -> tuple[Tables, str | None]:
        """The valid prefix, and damage seen at its end.

        A run's last segment may be torn, damaged, or growing while we look at it. A valid batch behind an invalid one means damage,
        unless the invalid one was just being written when we came by. What storage does not give back is damage in any segment.
        """
        tables, unreadable = self.segment.readable_tables()
        if not self._is_last:
            return tables, _unreadable(unreadable) if unreadable is not None else None
        try:
            while unreadable is None and (later := later_batch(self.segment, tables.end, tables.number)) is not None:
                more, unreadable = self.segment.readable_tables(tables.end, tables.number)
                if unreadable is None and not more.blocks:
                    return tables, f"batch {tables.number} is not valid, though batch {later.number} is at offset {later.position}"
                tables = Tables(tables.positions + more.positions, tables.blocks + more.blocks, more.end, more.number)
        except OSError as error:
            unreadable = error
        if unreadable is not None:
            return tables, f"what follows {_unreadable(unreadable)}"
        # The last batch's table may have reached the file without all of its payloads.
        damage: str | None = None
        while tables.positions:
            at, number = tables.positions[-1], tables.number - 1
            try:
                last = self.segment.batch_at(at, number)
                if last is not None and self.segment.intact(last):
                    break
            except OSError as error:
                damage = f"batch {number} {_unreadable(error)}"
            tables = Tables(tables.positions[:-1], tables.blocks[:-1], at, number)
        return tables, damage

    def payload(self, which: str, position: int, length: int, xxh3: int) -> bytes:
        """The verified payload of one row."""
        return self.segment.payload_at(position, length, xxh3, which)

    def read_into(self, position: int, buffer: memoryview) -> bool:
        """Fill the buffer from the file, nothing of it verified; False if the file ends before, or cannot be read there."""
        try:
            return os.preadv(self.segment.fd, (buffer,), position) == len(buffer)
        except OSError:
            return False

    @functools.cached_property
    def mapped(self) -> memoryview:
        """The file as ``gather`` takes it, nothing of it verified; empty if it cannot be had so."""
        return mapped(self.segment.fd) if self._may_map else memoryview(b"")

    def expect(self, position: int, length: int) -> None:
        """Have the kernel read this part of the file beforehand, and no more."""
        os.posix_fadvise(self.segment.fd, position, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file and give the lock up."""
        self.__dict__.pop("mapped", None)
        self.segment.close()
        if self._table is not None:
            self._table.close()


@dataclass(frozen=True, slots=True)
class BrokenFile:
    """A segment file whose header cannot be read."""

    path: Path
    run: int
    number: int
    message: str


class DamagedObject(CorruptionError):
    """A source that holds less than it seemed to: its records are a hole, unless another source has them.

    It is an object whose table cannot be read, or a segment that is damaged since its merged table was made, or that table itself.
    """

    def __init__(self, source: ShippedSource | LocalSource, error: CorruptionError) -> None:
        super().__init__(str(error), error.hint)
        self.source = source


class ObjectCache:
    """What is kept of opened objects, bounded: tables, opened objects with some frames, and frames that came with their tables."""

    def __init__(self) -> None:
        self.rows: Lru[Rows] = Lru(ROWS_BYTES_MAX, lambda rows: rows.nbytes + 1024)
        self.segments: Lru[ShippedSegment] = Lru(128 << 20, lambda _: _FRAMES_BYTES_MAX)
        self.ahead: Lru[bytes] = Lru(64 << 20, lambda ahead: len(ahead) + 1024)


class ShippedSource:
    """A segment object of the repository, read when it is needed."""

    def __init__(self, repository: VmRepository, key: SegmentName, cache: ObjectCache) -> None:
        self._repository = repository
        self._key = key
        self._cache = cache
        self._framing: Framing | None = None
        self._notes: Rows | None = None
        self.name = key.key
        self.run = key.run
        self.first = key.first
        self.last = key.last
        self.mask = key.mask

    def _reader(self, offset: int, length: int) -> bytes:
        return self._repository.get_segment(self._key, offset, length)

    def _load(self) -> Rows:
        segment = ShippedSegment(self._reader, self._key)
        rows = segment.rows
        # Few, and asked for whenever a moment is looked for.
        self._notes = notes_of(rows)
        # Without it the table would have to be fetched again for the payloads, should it be forgotten by then.
        self._framing = replace(segment.framing, ahead=b"")
        ahead = segment.framing.ahead
        self._cache.ahead.get(self._key, lambda: ahead)
        return rows

    def _object(self) -> ShippedSegment:
        return self._cache.segments.get(self._key, self._open)

    def _open(self) -> ShippedSegment:
        if self._framing is None:
            self._load()
        assert self._framing is not None, "loaded"
        framing = replace(self._framing, ahead=self._cache.ahead.get(self._key, bytes))
        return ShippedSegment(self._reader, self._key, framing)

    def rows(self, first: int, last: int) -> Rows:
        """Rows of the object: of its disks, all that its name promises."""
        return between(self._rows, first, last)

    def columns(self, first: int, last: int) -> Columns:
        """The rows themselves."""
        return self.rows(first, last)

    def notes(self, first: int, last: int) -> Rows:
        """VOIDs and events of the object."""
        return between(self._notes if self._notes is not None else notes_of(self._rows), first, last)

    @property
    def _rows(self) -> Rows:
        try:
            return self._cache.rows.get(self._key, self._load)
        except CorruptionError as error:
            raise DamagedObject(self, error) from error

    def payload(self, which: str, position: int, length: int, xxh3: int) -> bytes:
        """The verified payload of one row."""
        try:
            data = self._object().read_range(position, length)
        except CorruptionError as error:
            raise CorruptionError(f"{error} ({which})", error.hint) from error
        if xxhash.xxh3_64_intdigest(data) != xxh3:
            raise CorruptionError(f"object {self.name}: the payload of {which} does not match its checksum")
        return data

    def span(self, position: int, length: int) -> bytes:
        """Bytes of the payload stream, by one request; the frames are verified, the records are not. Raises CorruptionError."""
        return self._open().read_range(position, length)


def open_journal(journal: Path) -> tuple[list[LocalSource], list[BrokenFile]]:
    """Open, and so lock, every live segment of a journal directory; one that is recycled meanwhile is left out.

    Raises RepositoryError for a format from a newer version.
    """
    files = segment_files(journal)
    may_map = _allow_descriptors(2 * len(files))
    last_of_run = {file.run: file.number for file in files}
    sources: list[LocalSource] = []
    broken: list[BrokenFile] = []
    try:
        for file in files:
            try:
                sources.append(LocalSource(Segment(file.path), is_last=last_of_run[file.run] == file.number, may_map=may_map))
            except FileNotFoundError:
                continue
            except CorruptionError as error:
                broken.append(_broken(file, str(error)))
            except UnreadableHeader as error:
                broken.append(_broken(file, f"{file.path}: the segment header {_unreadable(error)}"))
        _use_tables(journal, sources)
    except BaseException:
        for source in sources:
            source.close()
        raise
    return sources, broken


def _use_tables(journal: Path, sources: Sequence[LocalSource]) -> None:
    """Give the segments the merged tables that were made of them; a table that is damaged, or of others, is removed.

    Whether one is to be made is told by names alone, so it would never be made anew.
    """
    by_run: dict[int, dict[int, LocalSource]] = defaultdict(dict)
    for source in sources:
        by_run[source.run][source.number] = source
    for stretch in merged_stretches(journal):
        members = by_run[stretch.run]
        if not all(number in members for number in stretch.numbers):
            continue
        path = merged_directory(journal) / stretch.name
        try:
            table = MergedTable(path, stretch)
        except OSError:
            continue
        except CorruptionError:
            # Where we may not, whoever keeps the VM may.
            with contextlib.suppress(OSError):
                path.unlink()
            continue
        if not table.fits({number: members[number].segment for number in stretch.numbers}):
            table.discard()
            table.close()
            continue
        for member in table.members:
            members[member.number].use(table, member)


def _broken(file: SegmentFile, message: str) -> BrokenFile:
    return BrokenFile(file.path, file.run, file.number, message)


def _unreadable(error: OSError) -> str:
    return f"cannot be read: {error.strerror}"


def _allow_descriptors(count: int) -> bool:
    """Have room for so many more, or as many as there may be; whether that is enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        opened = sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:
        opened = soft  # To count them takes one more.
    wanted = opened + count + _DESCRIPTORS_SPARE
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return True
    enough = hard == resource.RLIM_INFINITY or hard >= wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if enough else hard, hard))
    return enough
