"""Reading segments: forward from the header until the next batch is not valid.

Every consumer (recovery, ship, history, dump, verify) goes through :class:`Segment`. Batches are self-delimiting and
self-checking: what does not carry the expected run, batch number and checksum is either not yet written, torn, or left over
from the segment's earlier life, and in each case the valid prefix ends there.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash

from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.journal import format as fmt

_HEAD_SIZE = fmt.BATCH.size
_RECORD_SIZE = fmt.RECORD.size
_CHECKED_FROM = fmt.BATCH_CHECKED_FROM
_unpack_head = fmt.BATCH.unpack_from
_xxh3 = xxhash.xxh3_64_intdigest
_HEAD_GUESS = fmt.BATCH.size + 16 * fmt.RECORD.size
"""Bytes read at a batch's beginning: enough for the sixteen requests that QEMU has in flight."""


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """A segment's first 4 KiB, decoded. ``uuid`` is the VM's, 16 bytes; ``size`` is the file's, bytes."""

    uuid: bytes
    run: int
    number: int
    first_seq: int
    first_batch: int
    created_ns: int
    size: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch whose header and table are verified. ``table`` is ``count`` packed records (format.RECORD).

    ``position`` and ``payload_position`` are byte offsets in the segment file. Record ``i`` has seq ``first_seq + i`` and
    time ``time_ns + i``. Payloads lie in the records' order, each padded to 8 bytes.
    """

    position: int
    number: int
    time_ns: int
    first_seq: int
    count: int
    table: bytes
    payload_position: int
    payload_length: int

    @property
    def end(self) -> int:
        """Offset of the next batch."""
        return self.payload_position + self.payload_length

    @property
    def last_seq(self) -> int:
        """Seq of the last record."""
        return self.first_seq + self.count - 1


@dataclass(frozen=True, slots=True)
class Tables:
    """Consecutive batches, verified: header and record table of each in ``blocks``, and where in the file each begins.

    ``end`` and ``number``: where the next batch would begin, and its number.
    """

    positions: list[int]
    blocks: list[bytes]
    end: int
    number: int


@dataclass(frozen=True, slots=True)
class Record:
    """One record, for dumps and recovery; bulk readers use ``Batch.table`` with numpy. ``position``: the payload's."""

    seq: int
    time_ns: int
    offset: int
    length: int
    disk: int
    op: int
    flags: int
    xxh3: int
    position: int

    @property
    def has_payload(self) -> bool:
        """Whether ``length`` bytes lie at ``position``."""
        return self.op in fmt.PAYLOAD_OPS


def records(batch: Batch) -> Iterator[Record]:
    """The records of a batch, in order."""
    position = batch.payload_position
    for i, (offset, length, disk, op, flags, xxh3) in enumerate(fmt.RECORD.iter_unpack(batch.table)):
        yield Record(batch.first_seq + i, batch.time_ns + i, offset, length, disk, op, flags, xxh3, position)
        if op in fmt.PAYLOAD_OPS:
            position += fmt.padded(length)


def pack_segment_header(header: SegmentHeader) -> bytes:
    """The 4 KiB that begin a segment."""
    fields = (fmt.SEGMENT_MAGIC, fmt.FORMAT_VERSION, fmt.SEGMENT_HEADER_SIZE, header.uuid, header.run, header.number,
              header.first_seq, header.first_batch, header.created_ns, header.size)  # fmt: skip
    checked = fmt.SEGMENT.pack(*fields, 0)[: fmt.SEGMENT_CHECKED]
    packed = checked + xxhash.xxh3_64_intdigest(checked).to_bytes(8, "little")
    return packed.ljust(fmt.SEGMENT_HEADER_SIZE, b"\0")


def unpack_segment_header(data: bytes, path: Path | str) -> SegmentHeader:
    """Decode and verify; raises CorruptionError, or RepositoryError for a format version from the future."""
    if len(data) < fmt.SEGMENT.size or data[:8] != fmt.SEGMENT_MAGIC:
        raise CorruptionError(f"{path}: not a journal segment (no magic at offset 0)")
    fields = fmt.SEGMENT.unpack_from(data)
    if fields[1] > fmt.FORMAT_VERSION:
        raise RepositoryError(
            f"{path}: journal format {fields[1]}, this vmrewind reads up to {fmt.FORMAT_VERSION}",
            "use the vmrewind that wrote it, or a newer one",
        )
    if xxhash.xxh3_64_intdigest(data[: fmt.SEGMENT_CHECKED]) != fields[-1]:
        raise CorruptionError(f"{path}: the segment header's checksum is wrong (offset 0)")
    return SegmentHeader(*fields[3:10])


class UnreadableHeader(OSError):
    """A segment file is there and opens, and its storage does not give the header back."""


class Segment:
    """An open segment file, with a shared lock that keeps the pool from recycling it while it is read.

    Raises FileNotFoundError if the segment is gone, or was recycled between the listing and the opening, and UnreadableHeader.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path if isinstance(path, Path) else Path(path)
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_SH)
            self.header = unpack_segment_header(self._head(), self.path)
            named = fmt.parse_segment_name(self.path.name)
            if named is not None and named != (self.header.run, self.header.number):
                raise FileNotFoundError(f"{self.path}: recycled while it was being opened")
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which gives the lock up."""
        if self.fd >= 0:
            # A mapping of the file has a descriptor of its own, which would keep the lock as long as anybody has the mapping.
            fcntl.flock(self.fd, fcntl.LOCK_UN)
            os.close(self.fd)
            self.fd = -1

    def read(self, length: int, position: int) -> bytes:
        """What there is, less only at the file's end: a single call also gives less in front of what it could not read.

        Raises OSError.
        """
        data = os.pread(self.fd, length, position)
        while data and len(data) < length and (more := os.pread(self.fd, length - len(data), position + len(data))):
            data += more
        return data

    def _head(self) -> bytes:
        try:
            return os.pread(self.fd, fmt.SEGMENT_HEADER_SIZE, 0)
        except OSError as error:
            raise UnreadableHeader(error.errno, error.strerror, str(self.path)) from error

    def batch_at(self, position: int, number: int) -> Batch | None:
        """The batch at ``position`` if it is valid and carries batch number ``number``; payloads are not looked at."""
        for block, end in self._blocks(position, number):
            _, _, _, _, time_ns, first_seq, count, _, payload = _unpack_head(block)
            return Batch(position, number, time_ns, first_seq, count, block[_HEAD_SIZE:], end - payload, payload)
        return None

    def _blocks(self, position: int, number: int) -> Iterator[tuple[bytes, int]]:
        """(header and table of a batch, where the next one begins) from ``position`` on, as long as the expected one is valid."""
        # A journal of 134 GB has 600,000 batches: whatever is looked up here once is not looked up for each.
        fd, run, size, pread = self.fd, self.header.run, self.header.size, os.pread
        magic, head_size, record_size, checked_from = fmt.BATCH_MAGIC, _HEAD_SIZE, _RECORD_SIZE, _CHECKED_FROM
        while True:
            # One read for header and table of most batches: a scan of a whole journal is bound by the number of its reads.
            block = pread(fd, _HEAD_GUESS, position)
            if len(block) < head_size and len(block := self.read(head_size, position)) < head_size:
                return
            its_magic, checksum, its_run, found, _, _, count, _, payload = _unpack_head(block)
            if found != number or its_run != run or its_magic != magic or not 0 < count <= fmt.RECORDS_MAX:
                return
            length = head_size + count * record_size
            if length != len(block):
                block = block[:length] if length < len(block) else self.read(length, position)
            if _xxh3(block[checked_from:]) != checksum:
                return
            position += length + payload
            if position > size:
                return
            yield block, position
            number += 1

    def tables(self, position: int = fmt.SEGMENT_HEADER_SIZE, number: int | None = None) -> Tables:
        """What ``batches`` gives, as it lies in the file: a third of what it takes to make an object of each."""
        tables, error = self.readable_tables(position, number)
        if error is not None:
            raise error
        return tables

    def readable_tables(self, position: int = fmt.SEGMENT_HEADER_SIZE, number: int | None = None) -> tuple[Tables, OSError | None]:
        """``tables``, as far as they can be read, and what kept from reading on, None if they ended by themselves."""
        number = self.header.first_batch if number is None else number
        positions: list[int] = []
        blocks: list[bytes] = []
        unreadable: OSError | None = None
        try:
            for block, end in self._blocks(position, number):
                positions.append(position)
                blocks.append(block)
                position = end
        except OSError as error:
            unreadable = error
        return Tables(positions, blocks, position, number + len(blocks)), unreadable

    def batches(self, position: int = fmt.SEGMENT_HEADER_SIZE, number: int | None = None) -> Iterator[Batch]:
        """Batches from ``position`` on (default: all), until the next is not valid."""
        number = self.header.first_batch if number is None else number
        while (batch := self.batch_at(position, number)) is not None:
            yield batch
            position, number = batch.end, number + 1

    def payload(self, record: Record) -> bytes:
        """A record's payload, verified; raises CorruptionError naming file and offset."""
        return self.payload_at(record.position, record.length, record.xxh3, f"record {record.seq}")

    def payload_at(self, position: int, length: int, xxh3: int, which: str) -> bytes:
        """The same of the record that ``which`` names for the error."""
        try:
            data = self.read(length, position)
        except OSError as error:
            raise CorruptionError(
                f"{self.path}: the payload of {which} cannot be read (offset {position}, {length} bytes): {error.strerror}"
            ) from error
        if len(data) != length or xxhash.xxh3_64_intdigest(data) != xxh3:
            raise CorruptionError(f"{self.path}: the payload of {which} is damaged (offset {position}, {length} bytes)")
        return data

    def intact(self, batch: Batch) -> bool:
        """Whether every payload of the batch matches its checksum. Raises OSError for what storage does not give back."""
        data = self.read(batch.payload_length, batch.payload_position)
        if len(data) != batch.payload_length:
            return False
        view = memoryview(data)
        for record in records(batch):
            if record.has_payload:
                at = record.position - batch.payload_position
                if xxhash.xxh3_64_intdigest(view[at : at + record.length]) != record.xxh3:
                    return False
        return True


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """A live segment's file, known by name only."""

    path: Path
    run: int
    number: int


def segment_files(journal: Path, run: int | None = None) -> list[SegmentFile]:
    """The live segments of a journal directory (of one run, if given), in order of run and number."""
    try:
        names = os.listdir(journal)
    except FileNotFoundError:
        return []
    parsed = ((name, fmt.parse_segment_name(name)) for name in names)
    found = [SegmentFile(journal / name, *key) for name, key in parsed if key is not None]
    return sorted((f for f in found if run is None or f.run == run), key=lambda f: (f.run, f.number))
