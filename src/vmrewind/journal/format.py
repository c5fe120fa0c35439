"""The journal's on-disk format: constants and structs, nothing else. ``docs/journal-format.md`` has it as tables.

Little-endian throughout. A segment is a 4 KiB header followed by batches; a batch is a 64-byte header, a table of 24-byte
records, and the payloads of those records that have one, each padded to 8 bytes. Two checksums suffice: the batch's covers
its header and table, and each record's covers its own payload, so one record can be verified without reading its neighbours.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

FORMAT_VERSION: Final = 1
ALIGNMENT: Final = 8

SEGMENT_SIZE: Final = 64 << 20
SEGMENT_MAGIC: Final = b"VMRWSEGM"
SEGMENT_HEADER_SIZE: Final = 4096
SEGMENT: Final = struct.Struct("<8sII16sQQQQQQQ")
"""magic, version, header size, VM uuid, run, segment number, first seq, first batch, creation time (ns), size,
xxh3_64 of the former."""
SEGMENT_CHECKED: Final = SEGMENT.size - 8

BATCH_MAGIC: Final = b"VMRWBTCH"
BATCH: Final = struct.Struct("<8sQQQQQIIQ")
"""magic, checksum, run, batch number, time (ns), first seq, record count, reserved (0), payload length (bytes, padded).

The checksum is xxh3_64 of everything after it in header and table: bytes 16 to 64 + 24 * record count."""
BATCH_CHECKED_FROM: Final = 16

RECORD: Final = struct.Struct("<QIHBBQ")
"""offset (bytes), length (bytes), disk index, op, flags, xxh3_64 of the payload (0 without one)."""
RECORD_FIELDS: Final = [
    ("offset", "<u8"), ("length", "<u4"), ("disk", "<u2"), ("op", "u1"), ("flags", "u1"), ("xxh3", "<u8"),
]  # fmt: skip
"""The same as a numpy dtype description; numpy itself is not imported here."""

RECORDS_MAX: Final = 4096
"""Most records in one batch."""
RECORD_LENGTH_MAX: Final = 8 << 20
"""Longest payload of one record; a longer write becomes several records."""
ALL_DISKS: Final = 0xFFFF
"""Disk index of records that belong to the whole VM."""


class Op(enum.IntEnum):
    """What a record is. WRITE and EVENT have a payload; for the others ``length`` is only a length."""

    WRITE = 1
    ZERO = 2
    DISCARD = 3
    FLUSH = 4
    VOID = 5
    """The image refused the write whose seq is in ``offset``: that record never happened."""
    EVENT = 16
    """Payload is a JSON object; ``flags`` holds the Event."""


class Event(enum.IntEnum):
    """Kinds of EVENT records, held in ``flags``."""

    START = 1
    STOP = 2
    BOOKMARK = 3
    CLOCK = 4
    GAP_BEGIN = 5
    GAP_END = 6


FLAG_FUA: Final = 1
FLAG_NO_HOLE: Final = 2

PAYLOAD_OPS: Final = frozenset({Op.WRITE, Op.EVENT})


def padded(length: int) -> int:
    """``length`` rounded up to the payload alignment."""
    return (length + ALIGNMENT - 1) & -ALIGNMENT


def segment_name(run: int, number: int) -> str:
    """File name of a live segment."""
    return f"{run:016x}-{number:08d}.seg"


def parse_segment_name(name: str) -> tuple[int, int] | None:
    """(run, number) of a live segment's file name, None for any other name."""
    stem, dot, extension = name.partition(".")
    run, dash, number = stem.partition("-")
    if extension != "seg" or not dot or not dash or len(run) != 16 or not number.isdigit():
        return None
    try:
        return int(run, 16), int(number)
    except ValueError:
        return None


def run_name(run: int) -> str:
    """A run's id as it is written everywhere: 16 hex digits, sorting by start time."""
    return f"{run:016x}"
