"""The records of one run, put together from all sources: which seqs are there for which disk, and what became of the others."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final, TypeVar

import numpy as np

from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.history.merged import MergedTable
from vmrewind.history.rows import Columns, between, last_at, of_disk
from vmrewind.history.sources import BrokenFile, DamagedObject, LocalSource, ShippedSource, Source
from vmrewind.journal import format as fmt
from vmrewind.journal.format import run_name
from vmrewind.repository.segment import Rows

_READERS: Final = 8
_READ_AHEAD: Final = 32
Found = TypeVar("Found")

_PAYLOAD_OPS: Final = [int(op) for op in fmt.PAYLOAD_OPS]


@dataclass(frozen=True, slots=True)
class Piece:
    """The part [first, last] of a source that stands for these seqs."""

    source: Source
    first: int
    last: int

    @property
    def rows(self) -> Rows:
        """Every row of the part, of whatever disk; raises DamagedObject, rather than to leave any out."""
        return self.source.rows(self.first, self.last)

    @property
    def notes(self) -> Rows:
        """Its rows that tell something of others, or of the whole; raises DamagedObject, rather than to leave any out."""
        return self.source.notes(self.first, self.last)


@dataclass(frozen=True, slots=True)
class Hole:
    """Records [first, last] of a run that no source has, and why."""

    first: int
    last: int
    cause: str


class RunRecords:
    """What is known of a run's records. Pieces are made once per disk; the local journal goes before the repository."""

    def __init__(
        self, run: int, local: Sequence[LocalSource], shipped: Sequence[ShippedSource], broken: Sequence[BrokenFile]
    ) -> None:
        self.run = run
        self.local = sorted(local, key=lambda source: source.first)
        self.shipped = sorted(shipped, key=lambda source: (source.first, source.last))
        self.broken = broken
        self._left_out: list[tuple[ShippedSource, str]] = []
        self._pieces: dict[int, list[Piece]] = {}
        self._here: list[Piece] | None = None
        self._lock = threading.Lock()
        self.losses = 0
        """How often something was left out: what was concluded of the records before may not hold any more."""

    def pieces(self, disk: int) -> list[Piece]:
        """Disjoint pieces in order of seq that hold every known record of the disk (its index) and of the whole VM."""
        pieces = self._pieces.get(disk)
        if pieces is None:
            shipped = [source for source in self.shipped if source.mask >> disk & 1]
            self._pieces[disk] = pieces = _merge(self._local_pieces(), shipped)
        return pieces

    def leave_out(self, damaged: DamagedObject) -> None:
        """Do without an object that turned out to be damaged, or with the part of a segment that can be read."""
        source = damaged.source
        with self._lock:
            if isinstance(source, LocalSource):
                source.look_again()
            elif source in self.shipped:
                # Another list: readers in other threads go through the one that they have.
                self.shipped = [other for other in self.shipped if other is not source]
                self._left_out.append((source, str(damaged)))
            self._pieces.clear()
            self._here = None
            self.losses += 1

    @property
    def damaged(self) -> bool:
        """Whether there is anything of the run that cannot be read."""
        return bool(self.broken or self._left_out)

    def event_pieces(self) -> list[Piece]:
        """Disjoint pieces that hold every known record of the whole VM: any source has those, whatever its disks."""
        return _merge(self._local_pieces(), self.shipped)

    def _local_pieces(self) -> list[Piece]:
        pieces = self._here
        if pieces is None:
            self._here = pieces = [Piece(source, source.first, source.last) for source in self.local if source.last >= source.first]
        return pieces

    def last(self, disk: int) -> int | None:
        """Seq of the last record known for the disk, None if nothing is known."""
        pieces = self.pieces(disk)
        return pieces[-1].last if pieces else None

    def reaches(self, disk: int) -> int:
        """Seq up to which the disk's records were stored, whether or not they can be read; 0 if nothing is known."""
        left_out = (source.last for source, _ in self._left_out if source.mask >> disk & 1)
        return max(self.last(disk) or 0, *left_out, 0)

    @property
    def last_known(self) -> int | None:
        """Seq of the last record known for any disk."""
        ends = [piece.last for piece in self._local_pieces()[-1:]] + [source.last for source in self.shipped]
        return max(ends, default=None)

    @property
    def tail_damage(self) -> str | None:
        """Why records behind the last known one are lost, None if nothing says so."""
        if self.last_known is None or (self.local and self.last_known > self.local[-1].last):
            return None
        return self.damage

    @property
    def damage(self) -> str | None:
        """What is seen to be wrong at the local journal's end, None if nothing is."""
        if self.local and self.local[-1].damage is not None:
            return f"{self.local[-1].name} is damaged at offset {self.local[-1].end}: {self.local[-1].damage}"
        return self._broken_after(self.local[-1] if self.local else None)

    def _broken_after(self, source: LocalSource | None) -> str | None:
        number = source.number if source is not None else 0
        return next((file.message for file in self.broken if file.number > number), None)

    def holes(self, disk: int, first: int, last: int) -> Iterator[Hole]:
        """What is missing of [first, last] for the disk, in order."""
        for piece in self.pieces(disk):
            if piece.last < first:
                continue
            if piece.first > last:
                break
            if piece.first > first:
                yield self._hole(first, piece.first - 1)
            first = piece.last + 1
        if first <= last:
            yield self._hole(first, last)

    def gap_closed(self, disk: int, first: int, last: int) -> int | None:
        """Seq in [first, last] at which a resync had brought the disk's history level with its image again, None if none did."""
        for rows in self.notes(disk, first, last):
            ends = rows[(rows["op"] == fmt.Op.EVENT) & (rows["flags"] == fmt.Event.GAP_END) & (rows["disk"] == disk)]
            if len(ends):
                return int(ends["seq"][0])
        return None

    def _hole(self, first: int, last: int) -> Hole:
        return Hole(first, last, self._cause(first, last))

    def _cause(self, first: int, last: int) -> str:
        which = f"record {first}" if first == last else f"records {first} to {last}"
        which += f" of run {run_name(self.run)}"
        for source, following in zip_longest(self.local, self.local[1:]):
            # The next segment tells that this one had more. A lost or unreadable segment in between is another matter.
            ends_early = following.number == source.number + 1 if following is not None else not self._broken_after(source)
            if source.last + 1 == first and ends_early:
                return f"{which}: {source.name} is damaged at offset {source.end}" + (
                    f" ({source.damage})" if source.damage else ""
                )
        for file in self.broken:
            before = [source.last for source in self.local if source.number < file.number]
            after = [source.first for source in self.local if source.number > file.number]
            if max(before, default=0) < first and last < min(after, default=1 << 64):
                return f"{which}: {file.message}"
        for object_, message in self._left_out:
            if object_.first <= first <= object_.last:
                return f"{which}: {message}"
        if self.local:
            if last < self.local[0].first:
                return f"{which} were recycled before they were shipped"
            return f"{which} are neither in the journal nor in the repository"
        return f"{which} were not shipped, and the journal does not have this run any more"

    def last_row_at(self, disk: int, time_ns: int) -> np.void | None:
        """The last row with a time of at most ``time_ns`` in the disk's pieces, of whatever disk; None before the first."""
        pieces = self.pieces(disk)
        low, high = 0, len(pieces)
        while low < high:
            middle = (low + high) // 2
            # A piece may be without rows, when it says that nothing happened to the disk; what precedes it has the time then.
            filled = middle
            while filled > low and not len(pieces[filled].rows):
                filled -= 1
            rows = pieces[filled].rows
            if not len(rows) or int(rows["time_ns"][0]) <= time_ns:
                low = middle + 1
            else:
                high = filled
        while low:
            row: np.void | None = last_at(pieces[low - 1].rows, time_ns)
            if row is not None:
                return row
            low -= 1
        return None

    def row_at(self, disk: int, seq: int) -> np.void | None:
        """The row ``seq`` or, where a source leaves other disks' records out, the last one before it."""
        pieces = self.pieces(disk)
        at = bisect_right(pieces, seq, key=lambda piece: piece.first)
        while at:
            rows = between(pieces[at - 1].rows, 0, seq)
            if len(rows):
                row: np.void = rows[-1]
                return row
            at -= 1
        return None

    def first_time(self, disk: int, seq: int) -> int | None:
        """Time of the first known record from ``seq`` on, ns."""
        for piece in self.pieces(disk):
            if piece.last >= seq and len(rows := between(piece.rows, seq, piece.last)):
                return int(rows["time_ns"][0])
        return None

    def select(self, disk: int, first: int, last: int) -> Iterator[tuple[Source, Rows]]:
        """The disk's rows (and the whole VM's) with seqs in [first, last], by source, in order."""
        for piece, rows in with_rows(self._within(disk, first, last)):
            yield piece.source, of_disk(between(rows, first, last), disk)

    def stretches(self, disk: int, first: int, last: int) -> Iterator[tuple[MergedTable | None, list[Piece]]]:
        """The pieces of [first, last], in order, those together of which a merged table tells what they made of the disks."""
        pieces = self._within(disk, first, last)
        single: list[Piece] = []
        while pieces:
            source = pieces[0].source
            table = source.table if isinstance(source, LocalSource) else None
            members = pieces[: len(table.members)] if table is not None else []
            if table is None or members[-1].last > last or not _all_of(table, members):
                single.append(pieces.pop(0))
                continue
            if single:
                yield None, single
                single = []
            yield table, members
            del pieces[: len(members)]
        if single:
            yield None, single

    def notes(self, disk: int, first: int, last: int) -> Iterator[Rows]:
        """Those of the rows that ``select`` gives which tell something of others."""
        for table, pieces in self.stretches(disk, first, last):
            every = [table.notes] if table is not None else (rows for _, rows in with_notes(pieces))
            yield from (of_disk(between(rows, first, last), disk) for rows in every if len(rows))

    def _within(self, disk: int, first: int, last: int) -> list[Piece]:
        return [piece for piece in self.pieces(disk) if piece.last >= first and piece.first <= last]

    def payload(self, source: Source, disk: int | None, seqs: tuple[int, int], position: int, length: int, xxh3: int) -> bytes:
        """A record's verified payload: from ``source`` or, if it is damaged there, from any other that has the record.

        ``seqs``: the first and the last that it may have, told by whoever knew the source before it was damaged. ``disk`` is None
        for the whole VM's: any source has those. Raises CorruptionError, RepositoryError.
        """
        first, last = seqs
        try:
            return source.payload(_which(first, last), position, length, xxh3)
        except CorruptionError as error:
            problems: list[str] = []
            for other in self.shipped:
                has_disk = disk is None or other.mask >> disk & 1
                if other is source or not (other.first <= last and first <= other.last and has_disk):
                    continue
                try:
                    rows = other.rows(max(first, other.first), min(last, other.last))
                    same = (rows["xxh3"] == np.uint64(xxh3)) & (rows["length"] == length) & np.isin(rows["op"], _PAYLOAD_OPS)
                    for row in rows[same]:
                        return other.payload(f"record {row['seq']}", int(row["position"]), length, xxh3)
                except DamagedObject as damaged:
                    self.leave_out(damaged)
                    problems.append(str(damaged))
                except (CorruptionError, RepositoryError) as problem:
                    problems.append(str(problem))
            if problems:
                error.hint = f"the repository's copy cannot be had either: {'; '.join(problems)}"
            return self._named(source, first, last, position, length, xxh3, error)

    def _named(self, source: Source, first: int, last: int, position: int, length: int, xxh3: int, error: CorruptionError) -> bytes:
        """The payload once more, for an error that names its record; else raises ``error``."""
        try:
            rows = source.rows(first, min(last, source.last))
        except DamagedObject as damaged:
            # Whoever reads may take it for an error of this place alone, and go on.
            self.leave_out(damaged)
            raise
        for row in rows[(rows["position"] == np.uint64(position)) & (rows["op"] == fmt.Op.WRITE)]:
            try:
                return source.payload(f"record {row['seq']}", position, length, xxh3)
            except CorruptionError as named:
                named.hint = error.hint
                raise
        raise error


def _which(first: int, last: int) -> str:
    return f"record {first}" if first == last else f"a record between {first} and {last}"


def _all_of(table: MergedTable, pieces: Sequence[Piece]) -> bool:
    sources = [piece.source for piece in pieces]
    return len(sources) == len(table.members) and all(isinstance(one, LocalSource) and one.table is table for one in sources)


def with_rows(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Rows]]:
    """Each piece with its rows, in order. The tables of shipped objects are fetched several at a time, some ahead."""
    return _read_ahead(pieces, lambda piece: piece.rows)


def with_columns(pieces: Sequence[Piece], first: int, last: int) -> Iterator[tuple[Piece, Columns]]:
    """Each piece with what of it lies in [first, last], in order, as columns: quicker where not all of them are wanted."""
    clipped = [Piece(piece.source, max(piece.first, first), min(piece.last, last)) for piece in pieces]
    return _read_ahead(clipped, lambda piece: piece.source.columns(piece.first, piece.last))


def with_notes(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Rows]]:
    """Each piece with those of its rows that tell something of others, or of the whole."""
    return _read_ahead(pieces, lambda piece: piece.notes)


def _read_ahead(pieces: Sequence[Piece], read: Callable[[Piece], Found]) -> Iterator[tuple[Piece, Found]]:
    if len(pieces) < 2 or not any(isinstance(piece.source, ShippedSource) for piece in pieces):
        yield from ((piece, read(piece)) for piece in pieces)
        return
    with ThreadPoolExecutor(_READERS, thread_name_prefix="tables") as pool:
        ahead: deque[tuple[Piece, Future[Found]]] = deque()
        for piece in pieces:
            ahead.append((piece, pool.submit(read, piece)))
            if len(ahead) > _READ_AHEAD:
                ready, rows = ahead.popleft()
                yield ready, rows.result()
        while ahead:
            ready, rows = ahead.popleft()
            yield ready, rows.result()


def _merge(local: Sequence[Piece], shipped: Sequence[ShippedSource]) -> list[Piece]:
    """Local pieces, and between them whatever the shipped sources (in order of their first seq) have."""
    merged: list[Piece] = []
    at, cursor = 0, 0
    widest: ShippedSource | None = None
    for piece in [*local, None]:
        limit = piece.first - 1 if piece is not None else (1 << 64) - 1
        while cursor <= limit:
            while at < len(shipped) and shipped[at].first <= cursor:
                if widest is None or shipped[at].last > widest.last:
                    widest = shipped[at]
                at += 1
            if widest is not None and widest.last >= cursor:
                last = min(widest.last, limit)
                merged.append(Piece(widest, cursor, last))
                cursor = last + 1
            elif at < len(shipped) and shipped[at].first <= limit:
                cursor = shipped[at].first
            else:
                break
        if piece is not None:
            merged.append(piece)
            cursor = max(cursor, piece.last + 1)
    return merged
