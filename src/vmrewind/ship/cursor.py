"""Reading a run's journal forward from a seq, while capture appends to it and recycles it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import xxhash

from vmrewind.errors import CorruptionError
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import (
    Batch,
    Segment,
    SegmentFile,
    SegmentHeader,
    UnreadableHeader,
    records,
    segment_files,
    unpack_segment_header,
)
from vmrewind.ship.patience import Patience, UnreadableNow

T = TypeVar("T")

_xxh3 = xxhash.xxh3_64_intdigest
_LIST_SECONDS: Final = 1.0
"""How often, at the end of a growing journal, all of the directory is looked at and not just for the next segment."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A whole batch, verified, with its payloads (empty from a cursor that does not read them)."""

    batch: Batch
    payload: bytes


@dataclass(frozen=True, slots=True)
class Hole:
    """Seqs that the journal does not have (any more), ends included."""

    first: int
    last: int
    cause: str


class Cursor:
    """A place in a run's journal; ``next_seq`` is the first seq that was not returned yet.

    ``growing``: the run is the newest, its end is not final. Without ``payloads`` only headers and tables are read, with ``disks``
    (indexes) only the payloads of their records need be whole: what is damaged of others is whatever it is.
    The segment being read is kept, by a shared lock, until ``release``, which keeps the place; those behind it may be recycled.
    What storage does not give back is an error as long as ``patience`` lasts (none: not at all), then damage.
    """

    def __init__(
        self,
        journal: Path,
        run: int,
        seq: int,
        *,
        growing: bool,
        payloads: bool = True,
        patience: Patience | None = None,
        disks: Collection[int] | None = None,
    ) -> None:
        self._journal = journal
        self._run = run
        self._growing = growing
        self._payloads = payloads
        self._disks = disks
        self._patience = patience or Patience(0.0)
        self.unreadable: CorruptionError | None = None
        """What ``read`` has taken for damage because it cannot be read."""
        self._harm = ""
        self.next_seq = seq
        self._segment: Segment | None = None
        self._number = 0
        """The segment of the place, 0 before the first was found: segments count from 1."""
        self._position = 0
        self._batch = 0
        self._expected = 0
        """The seq that the batch at the place must begin with."""
        self._list_at = 0.0

    def read(self) -> Piece | Hole | None:
        """The batch that holds ``next_seq``, or the hole that it lies in; None if there is nothing (yet).

        Raises CorruptionError for a newest segment without a readable header, or with anything in it that storage does not give
        back for good and nothing behind it; and OSError.
        """
        while True:
            self.unreadable, self._harm = None, "is damaged"
            if self._segment is None and (hole := self._open()):
                return hole
            if self._segment is None:
                self._complain()
                return None
            batch = self._batch_at(self._position, self._batch)
            if batch is not None and batch.first_seq > self._expected:
                self._expected = batch.first_seq
                if hole := self._skip_to(batch.first_seq, f"{self._name} goes on without them at offset {batch.position}"):
                    return hole
            if batch is not None and batch.last_seq < self.next_seq:
                self._pass(batch)
                continue
            piece = self._verified(batch)
            if piece is None and batch is not None and self._batch_at(batch.end, batch.number + 1) is not None:
                # Batches are written one after the other, so this one was whole when its successor was: look once more.
                piece = self._verified(batch)
                if piece is None:
                    self._pass(batch)
                    if hole := self._skip_to(batch.last_seq + 1, f"{self._name} {self._harm} at offset {batch.payload_position}"):
                        return hole
                    continue
            if piece is None:
                successors = self._successors()
                if not successors:
                    self._complain()
                    return None
                # Since we saw the end something may have been appended: the successor came after that.
                batch = self._batch_at(self._position, self._batch)
                piece = self._verified(batch)
                if piece is None:
                    left = self._number
                    try:
                        hole = self._advance(successors)
                    except CorruptionError:
                        if self._growing:
                            raise
                        return None  # It is not going to be mended, and what other runs have must not wait for it.
                    if hole is not None:
                        return hole
                    if self._number == left:
                        return None
                    continue
            self._pass(piece.batch)
            self.next_seq = piece.batch.last_seq + 1
            return piece

    def release(self) -> None:
        """Let the pool recycle the segment being read. The next read goes on at the same place if it is still there."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    @property
    def _name(self) -> str:
        return f"segment {fmt.segment_name(self._run, self._number)}"

    def _pass(self, batch: Batch) -> None:
        self._position, self._batch, self._expected = batch.end, batch.number + 1, batch.last_seq + 1

    def _skip_to(self, seq: int, cause: str) -> Hole | None:
        """The hole before ``seq``, None if it was behind us already."""
        if seq <= self.next_seq:
            return None
        hole = Hole(self.next_seq, seq - 1, cause)
        self.next_seq = seq
        return hole

    def _complain(self) -> None:
        """What is not going to be mended is told, unless it keeps what other runs have from being carried."""
        if self.unreadable is not None and self._growing:
            raise self.unreadable

    def _given_back(self, read: Callable[[], T], path: Path, offset: int) -> T | None:
        """What ``read`` reads; None if it cannot, and patience has ended. Raises UnreadableNow while it has not."""
        try:
            found = read()
        except OSError as error:
            not_opened = error.filename is not None and not isinstance(error, UnreadableHeader)
            if not_opened or isinstance(error, FileNotFoundError):
                raise  # It is gone, or this process may open no more files.
            if not self._patience.ends(path, offset):
                raise UnreadableNow(error.errno, f"cannot be read at offset {offset}: {error.strerror}", str(path)) from error
            self._harm = f"cannot be read ({error.strerror})"
            self.unreadable = CorruptionError(
                f"{path}: cannot be read at offset {offset}: {error.strerror}",
                "nothing behind it can be shipped before capture begins its next segment; look at the health of its storage",
            )
            return None
        self._patience.works(path, offset)
        return found

    def _batch_at(self, position: int, number: int) -> Batch | None:
        segment = self._segment
        assert segment is not None
        return self._given_back(lambda: segment.batch_at(position, number), segment.path, position)

    def _verified(self, batch: Batch | None) -> Piece | None:
        """The batch with its payloads, None if they are torn or damaged: each record's checksum must be right."""
        if batch is None or self._segment is None:
            return None
        if not self._payloads:
            return Piece(batch, b"")
        payload = self._payload(self._segment, batch)
        if payload is None or len(payload) != batch.payload_length:
            return None
        view = memoryview(payload)
        wanted = self._disks
        at = 0
        for _, length, disk, op, _, xxh3 in fmt.RECORD.iter_unpack(batch.table):
            if op in fmt.PAYLOAD_OPS:
                if _xxh3(view[at : at + length]) != xxh3 and (wanted is None or disk in wanted):
                    return None
                at += fmt.padded(length)
        return Piece(batch, payload) if at == batch.payload_length else None

    def _payload(self, segment: Segment, batch: Batch) -> bytes | None:
        """A batch's payloads; in the place of what cannot be read and need not be, zeroes."""
        try:
            whole = segment.read(batch.payload_length, batch.payload_position)
        except OSError:
            payload = bytearray()
        else:
            self._patience.works(segment.path, batch.payload_position, batch.payload_length)
            return whole
        for record in records(batch):
            if not record.has_payload:
                continue
            length, position = fmt.padded(record.length), record.position
            read = partial(segment.read, length, position)
            if self._disks is None or record.disk in self._disks:
                data = self._given_back(read, segment.path, position)
                if data is None:
                    return None
            else:
                try:
                    data = read()
                except OSError:
                    data = bytes(length)
            payload += data
        return bytes(payload)

    def _open(self) -> Hole | None:
        """Open the segment of the place, or else the one that holds ``next_seq``; without one nothing is open afterwards."""
        if self._number and self._try_open(self._number):
            return None
        self._number = 0
        while True:
            found: tuple[SegmentFile, int] | None = None
            waiting_for: OSError | None = None
            for file in reversed(segment_files(self._journal, self._run)):
                try:
                    first_seq = self._first_seq(file)
                except OSError as error:
                    first_seq, waiting_for = None, error
                if first_seq is not None:
                    found = (file, first_seq)
                    if first_seq <= self.next_seq:
                        break
            if waiting_for is not None and (found is None or found[1] > self.next_seq):
                raise waiting_for  # The place may be in there.
            if found is None:
                return None
            if self._try_open(found[0].number):
                self._to_start()
                cause = f"{self._name} is the oldest one left: they were recycled before they were shipped"
                return self._skip_to(self._expected, cause if self.unreadable is None else str(self.unreadable))

    def _try_open(self, number: int) -> bool:
        """Open a segment and lock it, False if it was recycled; raises CorruptionError if its header is damaged."""
        path = self._journal / fmt.segment_name(self._run, number)
        try:
            segment = self._given_back(lambda: Segment(path), path, 0)
        except FileNotFoundError:
            return False  # Recycled; or the file of another segment, which bears this one's name.
        if segment is None:
            assert self.unreadable is not None
            raise self.unreadable
        if (segment.header.run, segment.header.number) != (self._run, number):
            segment.close()
            return False
        self.release()
        self._segment, self._number = segment, number
        return True

    def _to_start(self) -> None:
        assert self._segment is not None
        header = self._segment.header
        self._position, self._batch, self._expected = fmt.SEGMENT_HEADER_SIZE, header.first_batch, header.first_seq

    def _first_seq(self, file: SegmentFile) -> int | None:
        """From the header, without a lock; None if the segment is gone or damaged."""

        def read() -> SegmentHeader:
            with open(file.path, "rb", buffering=0) as opened:
                return unpack_segment_header(os.pread(opened.fileno(), fmt.SEGMENT_HEADER_SIZE, 0), file.path)

        try:
            header = self._given_back(read, file.path, 0)
        except (FileNotFoundError, CorruptionError):
            return None
        if header is None:
            return None
        return header.first_seq if (header.run, header.number) == (file.run, file.number) else None

    def _successors(self) -> list[SegmentFile]:
        """The segments behind the one being read."""
        following = self._journal / fmt.segment_name(self._run, self._number + 1)
        if following.exists():
            return [SegmentFile(following, self._run, self._number + 1), *self._listed(self._number + 2)]
        if self._growing and time.monotonic() < self._list_at:
            return []
        self._list_at = time.monotonic() + _LIST_SECONDS
        return self._listed(self._number + 1)

    def _listed(self, number_min: int) -> list[SegmentFile]:
        return [file for file in segment_files(self._journal, self._run) if file.number >= number_min]

    def _advance(self, successors: list[SegmentFile]) -> Hole | None:
        """Go on in the first of the successors that can be read; what they begin with tells whether anything is lost."""
        left, position, expected = self._number, self._position, self._expected
        for file in successors:
            try:
                if not self._try_open(file.number):
                    continue
            except CorruptionError:
                if file is successors[-1]:
                    raise
                continue
            self._to_start()
            if self._expected <= expected:
                return None
            if file.number == left + 1:
                cause = f"segment {fmt.segment_name(self._run, left)} {self._harm} at offset {position}"
            elif self.unreadable is not None:
                cause = str(self.unreadable)
            else:
                cause = f"the segments before {self._name} were recycled before they were shipped, or are damaged"
            return self._skip_to(self._expected, cause)
        return None


def has_records(journal: Path, run: int) -> bool:
    """Whether the journal holds any record of an ended run; so is damage taken that hides it."""
    cursor = Cursor(journal, run, 0, growing=False, payloads=False)
    try:
        while (found := cursor.read()) is not None:
            if isinstance(found, Piece):
                return True
    except CorruptionError:
        return True
    finally:
        cursor.release()
    return cursor.unreadable is not None
