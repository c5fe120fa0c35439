"""A shipped segment: the records of some disks of one run in a range of seqs, as one object that can be read in pieces.

Header, compressed record table, index of frames, frames. The payloads of the records follow one another, each padded to 8 bytes, in
a virtual stream that is cut into frames of 256 KiB, so that one record is had by reading the frames that it touches.
``docs/repository-format.md`` gives it as tables.
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.journal import format as fmt
from vmrewind.repository.compression import compress, decompress
from vmrewind.repository.layout import SegmentName

MAGIC: Final = b"VMRWSHIP"
VERSION: Final = 1
FRAME_SIZE: Final = 256 << 10

HEADER: Final = struct.Struct("<8sII16sQQQQQQIIIIQQQ")
"""magic, version, header size, VM uuid, run, first seq, last seq, mask, record count, payload length, table length, frame
count, frame size, reserved (0), xxh3 of the packed table, xxh3 of the index, xxh3 of the header so far."""
_CHECKED: Final = HEADER.size - 8

SHIP_ROW: Final = np.dtype(
    [
        ("seq", "<u8"), ("time_ns", "<u8"), ("offset", "<u8"), ("position", "<u8"), ("xxh3", "<u8"),
        ("length", "<u4"), ("disk", "<u2"), ("op", "u1"), ("flags", "u1"),
    ]
)  # fmt: skip
"""A record as shipped, 48 bytes: the journal's fields, with seq, time, and ``position``: where its payload begins in the stream, or
where the next one does if it has none."""
Rows = npt.NDArray[np.void]
"""An array of SHIP_ROW."""

INDEX_ROW: Final = np.dtype([("end", "<u8"), ("xxh3", "<u8")])
"""A frame: where it ends, bytes from the first frame's beginning, and the xxh3 of its compressed bytes."""

_READ_AHEAD: Final = 64 << 10
"""Bytes of the first read, which get header, table and index of most segments at once."""
_FRAMES_CACHED: Final = 8
_NO_PAYLOAD: Final = np.array([op not in fmt.PAYLOAD_OPS for op in range(256)])


def payload_lengths(op: npt.NDArray[np.uint8], length: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """Bytes that each record takes in a payload stream: its length padded to 8, 0 without a payload."""
    padded = (length.astype(np.int64) + (fmt.ALIGNMENT - 1)) & -fmt.ALIGNMENT
    padded[_NO_PAYLOAD[op]] = 0
    return padded


def encode_segment(name: SegmentName, uuid: bytes, rows: Rows, payload: bytes | bytearray | memoryview) -> bytes:
    """The object of the segment ``name`` of the VM ``uuid`` (16 bytes).

    ``rows`` are SHIP_ROW; ``payload`` is the stream that their positions refer to. Their order and fit are asserted.
    """
    _check_rows(rows, name, len(payload))
    view = memoryview(payload)
    frames = [compress(view[at : at + FRAME_SIZE]) for at in range(0, len(view), FRAME_SIZE)]
    table = compress(rows.tobytes())
    index = np.zeros(len(frames), INDEX_ROW)
    index["end"] = np.cumsum([len(frame) for frame in frames], dtype=np.uint64)
    index["xxh3"] = [xxhash.xxh3_64_intdigest(frame) for frame in frames]
    packed_index = index.tobytes()
    header = HEADER.pack(
        MAGIC, VERSION, HEADER.size, uuid, name.run, name.first, name.last, name.mask, len(rows), len(view), len(table),
        len(frames), FRAME_SIZE, 0, xxhash.xxh3_64_intdigest(table), xxhash.xxh3_64_intdigest(packed_index), 0,
    )[:_CHECKED]  # fmt: skip
    header += xxhash.xxh3_64_intdigest(header).to_bytes(8, "little")
    return b"".join((header, table, packed_index, *frames))


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """A shipped segment's header, decoded and verified. ``uuid``: 16 bytes; lengths in bytes."""

    uuid: bytes
    run: int
    first: int
    last: int
    mask: int
    count: int
    payload_length: int
    table_length: int
    frame_count: int
    frame_size: int
    table_xxh3: int
    index_xxh3: int

    @property
    def frames_at(self) -> int:
        """Offset of the first frame in the object."""
        return HEADER.size + self.table_length + self.frame_count * INDEX_ROW.itemsize


@dataclass(frozen=True, slots=True)
class Framing:
    """Where an object's frames are, and the first bytes of them that came with the table (``ahead``)."""

    header: SegmentHeader
    index: npt.NDArray[np.void]
    ahead: bytes


class ShippedSegment:
    """Reads a shipped segment piece by piece and verifies every piece. May be used from several threads.

    ``reader(offset, length)`` gives bytes of the object, fewer where it ends. Everything raises CorruptionError naming the object
    (and the seq of the record) where a checksum or the structure is wrong, and what the reader raises.
    """

    def __init__(self, reader: Callable[[int, int], bytes], name: SegmentName, framing: Framing | None = None) -> None:
        self.name = name
        self._reader = reader
        self._lock = threading.Lock()
        self._framing = framing
        self._rows: Rows | None = None
        self._frames: OrderedDict[int, bytes] = OrderedDict()

    @property
    def header(self) -> SegmentHeader:
        """The verified header."""
        return self.framing.header

    @property
    def rows(self) -> Rows:
        """Every record, as SHIP_ROW in order of seq."""
        if self._rows is None:
            self._load()
        assert self._rows is not None, "loaded"
        return self._rows

    @property
    def framing(self) -> Framing:
        """What is needed to read payloads, without the rows: given to another one of the same object, it need not ask again."""
        if self._framing is None:
            self._load()
        assert self._framing is not None, "loaded"
        return self._framing

    def payload(self, row: np.void) -> bytes:
        """The payload of one of ``rows``, verified; empty for a record without one."""
        if int(row["op"]) not in fmt.PAYLOAD_OPS:
            return b""
        try:
            data = self.read_range(int(row["position"]), int(row["length"]))
        except CorruptionError as error:
            raise CorruptionError(f"{error} (record {row['seq']})", error.hint) from error
        if xxhash.xxh3_64_intdigest(data) != int(row["xxh3"]):
            raise self._damaged(f"the payload of record {row['seq']} does not match its checksum")
        return data

    def read_range(self, position: int, length: int) -> bytes:
        """``length`` bytes of the payload stream from ``position`` on; the frames' checksums are verified, the records' are not."""
        header, index = self.framing.header, self.framing.index
        if length == 0:
            return b""
        if position < 0 or length < 0 or position + length > header.payload_length:
            raise ValueError(f"bytes {position}+{length} of a payload stream of {header.payload_length}")
        first, last = position // header.frame_size, (position + length - 1) // header.frame_size
        frames = self._get_frames(header, index, first, last)
        if first == last:
            start = position - first * header.frame_size
            return frames[0][start : start + length]
        joined = b"".join(frames)
        start = position - first * header.frame_size
        return joined[start : start + length]

    def _get_frames(self, header: SegmentHeader, index: npt.NDArray[np.void], first: int, last: int) -> list[bytes]:
        with self._lock:
            cached = {number: self._frames[number] for number in range(first, last + 1) if number in self._frames}
            for number in cached:
                self._frames.move_to_end(number)
        missing = [number for number in range(first, last + 1) if number not in cached]
        if missing:
            # One read for all: what is cached in between costs less than a second request.
            ends = index["end"]
            start = int(ends[missing[0] - 1]) if missing[0] else 0
            packed = memoryview(self._read_frames(start, int(ends[missing[-1]])))
            for number in missing:
                from_ = (int(ends[number - 1]) if number else 0) - start
                cached[number] = self._unpack(header, index, number, packed[from_ : int(ends[number]) - start])
            with self._lock:
                for number in missing:
                    self._frames[number] = cached[number]
                while len(self._frames) > _FRAMES_CACHED:
                    self._frames.popitem(last=False)
        return [cached[number] for number in range(first, last + 1)]

    def _unpack(self, header: SegmentHeader, index: npt.NDArray[np.void], number: int, packed: memoryview) -> bytes:
        size = min(header.frame_size, header.payload_length - number * header.frame_size)
        if xxhash.xxh3_64_intdigest(packed) != int(index["xxh3"][number]):
            raise self._damaged(f"frame {number} does not match its checksum")
        try:
            plain = decompress(packed, size)
        except ValueError as error:
            raise self._damaged(f"frame {number}: {error}") from error
        if len(plain) != size:
            raise self._damaged(f"frame {number} holds {len(plain)} bytes instead of {size}")
        return plain

    def _read_frames(self, start: int, end: int) -> bytes:
        """Bytes [start, end) behind the first frame's beginning; what came with the table is not asked for again."""
        ahead = self.framing.ahead
        if start >= len(ahead):
            return self._reader(self.framing.header.frames_at + start, end - start)
        if end <= len(ahead):
            return ahead[start:end]
        return ahead[start:] + self._reader(self.framing.header.frames_at + len(ahead), end - len(ahead))

    def _load(self) -> None:
        head = self._reader(0, _READ_AHEAD)
        header = self._parse_header(head)
        if header.frames_at > len(head):
            head += self._reader(len(head), header.frames_at - len(head))
        if len(head) < header.frames_at:
            raise self._damaged(f"the object ends at {len(head)} bytes, inside its table")
        table = head[HEADER.size : HEADER.size + header.table_length]
        packed_index = head[HEADER.size + header.table_length : header.frames_at]
        self._rows = self._parse_table(header, table)
        self._framing = Framing(header, self._parse_index(header, packed_index), head[header.frames_at :])

    def _parse_header(self, head: bytes) -> SegmentHeader:
        if len(head) < HEADER.size or head[:8] != MAGIC:
            raise self._damaged("it has no shipped segment's magic")
        fields = HEADER.unpack_from(head)
        if xxhash.xxh3_64_intdigest(head[:_CHECKED]) != fields[-1]:
            raise self._damaged("the header's checksum is wrong")
        if fields[1] > VERSION:
            raise RepositoryError(
                f"object {self.name.key}: segment format {fields[1]}, this vmrewind reads up to {VERSION}",
                "use the vmrewind that wrote it, or a newer one",
            )
        header = SegmentHeader(*fields[3:13], *fields[14:16])
        if (header.run, header.first, header.last, header.mask) != (
            self.name.run, self.name.first, self.name.last, self.name.mask,
        ):  # fmt: skip
            raise self._damaged(
                f"it is the segment of run {header.run:016x}, seq {header.first} to {header.last}, mask {header.mask:x}"
            )
        return header

    def _parse_table(self, header: SegmentHeader, table: bytes) -> Rows:
        if xxhash.xxh3_64_intdigest(table) != header.table_xxh3:
            raise self._damaged("the record table's checksum is wrong")
        try:
            rows: Rows = np.frombuffer(decompress(table, header.count * SHIP_ROW.itemsize), SHIP_ROW)
            if len(rows) != header.count:
                raise ValueError(f"{len(rows)} records instead of {header.count}")
            _check_rows(rows, self.name, header.payload_length)
        except ValueError as error:
            raise self._damaged(f"the record table: {error}") from error
        return rows

    def _parse_index(self, header: SegmentHeader, packed: bytes) -> npt.NDArray[np.void]:
        if xxhash.xxh3_64_intdigest(packed) != header.index_xxh3:
            raise self._damaged("the frame index's checksum is wrong")
        index: npt.NDArray[np.void] = np.frombuffer(packed, INDEX_ROW)
        if header.frame_count != (-(-header.payload_length // header.frame_size) if header.frame_size else -1):
            raise self._damaged(f"{header.frame_count} frames for {header.payload_length} bytes of payload")
        return index

    def _damaged(self, what: str) -> CorruptionError:
        return CorruptionError(f"object {self.name.key} is damaged: {what}")


def same_records(name: SegmentName, one: bytes, other: bytes) -> bool:
    """Whether two objects of one name hold the same records, however they are compressed."""
    if one == other:
        return True
    first, second = (ShippedSegment(_reader_of(data), name) for data in (one, other))
    if first.rows.tobytes() != second.rows.tobytes() or first.header.uuid != second.header.uuid:
        return False
    length = first.header.payload_length
    return length == second.header.payload_length and first.read_range(0, length) == second.read_range(0, length)


def _reader_of(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: data[offset : offset + length]


def _check_rows(rows: Rows, name: SegmentName, payload_length: int) -> None:
    """Raise ValueError unless the rows are what a segment of this name and payload length may hold."""
    if name.mask >> 64:
        raise ValueError(f"a mask of more than 64 disks: {name.mask:x}")
    if len(rows):
        seq: npt.NDArray[Any] = rows["seq"]
        if seq[0] < name.first or seq[-1] > name.last or not bool(np.all(seq[1:] > seq[:-1])):
            raise ValueError(f"its seqs do not ascend from {name.first} to {name.last}")
        disks = {int(disk) for disk in np.unique(rows["disk"])} - {fmt.ALL_DISKS}
        if not all(name.carries(disk) for disk in disks):
            raise ValueError(f"it has records of other disks than those in its mask: {sorted(disks)}")
    lengths = payload_lengths(rows["op"], rows["length"])
    ends = np.cumsum(lengths)
    if int(ends[-1] if len(ends) else 0) != payload_length or not np.array_equal(rows["position"], ends - lengths):
        raise ValueError("its payload positions do not follow one another")
