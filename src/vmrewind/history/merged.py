"""Merged tables: what a stretch of closed segments made of each disk, sorted, the last writer chosen, in one file.

A cache: whatever is missing, damaged, or not of just these segments is done without, and made anew. A table names for each of its
segments the header and the last batch that it was made of, so one that was recycled, or cut short by a recovery and written on, is
noticed. A file is a fixed beginning, a JSON object, and sections: the rows that tell something of others, and each disk's layer.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from vmrewind.errors import CorruptionError
from vmrewind.history.layers import OWNER, Layer
from vmrewind.history.rows import ROW
from vmrewind.history.stretches import Stretch
from vmrewind.journal.reader import Segment
from vmrewind.journal.runs import write_durably
from vmrewind.repository.segment import Rows

MAGIC: Final = b"VMRWMRG2"
_BEGINNING: Final = struct.Struct("<8sQQ")
"""magic, length of the JSON object, its xxh3_64."""
_HEAD_BYTES_MAX: Final = 1 << 20
_STARTS: Final[dict[int, np.dtype[Any]]] = {4: np.dtype(np.uint32), 8: np.dtype(np.int64)}


@dataclass(frozen=True, slots=True)
class Member:
    """A segment of a stretch: of its header, and where its valid prefix ends. ``batch_at``: where the last batch begins."""

    number: int
    uuid: str
    first_seq: int
    first_batch: int
    created_ns: int
    last_seq: int
    end: int
    batch_at: int
    batch: int
    batch_time_ns: int


def member_of(segment: Segment, batch_at: int, batch: int) -> Member:
    """What a table notes of a segment whose last batch is that one; raises CorruptionError if it is not."""
    header = segment.header
    if (last := segment.batch_at(batch_at, batch)) is None:
        raise CorruptionError(f"{segment.path}: batch {batch} is not valid any more (offset {batch_at})")
    return Member(
        header.number, header.uuid.hex(), header.first_seq, header.first_batch, header.created_ns,
        last.last_seq, last.end, batch_at, batch, last.time_ns,
    )  # fmt: skip


def write_table(path: Path, members: Sequence[Member], notes: Rows, layers: Mapping[int, Layer]) -> None:
    """Write the table of a stretch, whole or not at all. ``layers``: by index of the disk. Raises OSError."""
    sections = [notes.tobytes(), *(_packed(layer) for layer in layers.values())]
    head = {
        "segments": [astuple(member) for member in members],
        "disks": [
            {
                "disk": disk,
                "extents": len(layer),
                "shift": layer.shift,
                "start_bytes": layer.starts.itemsize,
                "records": len(layer.records),
                "counts": list(layer.counts),
            }
            for disk, layer in layers.items()
        ],
        "sections": [[len(section), xxhash.xxh3_64_intdigest(section)] for section in sections],
    }
    packed = json.dumps(head).encode()
    write_durably(path, b"".join((_BEGINNING.pack(MAGIC, len(packed), xxhash.xxh3_64_intdigest(packed)), packed, *sections)))


def _packed(layer: Layer) -> bytes:
    return b"".join(column.tobytes() for column in (layer.records, layer.starts, layer.lengths, layer.owners))


@contextlib.contextmanager
def _shaped(path: Path) -> Iterator[None]:
    """Raise CorruptionError for a table that is whole, and not of the shape that tables have."""
    try:
        yield
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise CorruptionError(f"{path}: not the shape of a merged table: {type(error).__name__}: {error}") from error


class MergedTable:
    """An open table, its head and notes verified; a layer is when it is read. All of it raises CorruptionError, naming the file."""

    def __init__(self, path: Path, stretch: Stretch) -> None:
        self.path = path
        self.stretch = stretch
        self.usable = True
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with _shaped(path):
                self._load()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """It is not to be used any more; removed, where we may, the next one is made of the segments."""
        self.usable = False
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _load(self) -> None:
        beginning = self._read(_BEGINNING.size, 0)
        if len(beginning) < _BEGINNING.size or beginning[:8] != MAGIC:
            raise CorruptionError(f"{self.path}: not a merged table")
        _, length, checksum = _BEGINNING.unpack(beginning)
        packed = self._read(min(length, _HEAD_BYTES_MAX), _BEGINNING.size)
        if len(packed) != length or xxhash.xxh3_64_intdigest(packed) != checksum:
            raise CorruptionError(f"{self.path}: the head does not match its checksum")
        head: dict[str, Any] = json.loads(packed)
        self.members = [Member(*member) for member in head["segments"]]
        self._disks: dict[int, tuple[int, dict[str, Any]]] = {
            disk["disk"]: (number, disk) for number, disk in enumerate(head["disks"], 1)
        }
        at = _BEGINNING.size + length
        self._sections: list[tuple[int, int, int]] = []
        for size, digest in head["sections"]:
            self._sections.append((at, size, digest))
            at += size
        self.notes: Rows = np.frombuffer(self._section(0), ROW)

    def fits(self, segments: Mapping[int, Segment]) -> bool:
        """Whether these segments, by number, are still just what the table was made of."""
        if [member.number for member in self.members] != list(self.stretch.numbers):
            return False
        for member in self.members:
            segment = segments.get(member.number)
            if segment is None or segment.header.run != self.stretch.run:
                return False
            try:
                with _shaped(self.path):
                    if member_of(segment, member.batch_at, member.batch) != member:
                        return False
            except (OSError, CorruptionError):
                return False
        return True

    def layer(self, disk: int) -> Layer:
        """What the stretch made of a disk."""
        if disk not in self._disks:
            nothing = np.empty(0, np.uint32)
            return Layer(nothing, 0, nothing, nothing, np.empty(0, OWNER), [0] * len(self.members))
        with _shaped(self.path):
            return self._layer(*self._disks[disk])

    def _layer(self, number: int, described: dict[str, Any]) -> Layer:
        extents, records = described["extents"], described["records"]
        if len(described["counts"]) != len(self.members) or sum(described["counts"]) != records:
            raise ValueError(f"{records} records are not {described['counts']}")
        kind, shift = _STARTS[described["start_bytes"]], described["shift"]
        if shift not in range(64):
            raise ValueError(f"shift {shift}")
        packed = self._section(number)
        starts_at = OWNER.itemsize * records
        lengths_at = starts_at + kind.itemsize * extents
        return Layer(
            np.frombuffer(packed, kind, extents, starts_at),
            shift,
            np.frombuffer(packed, np.uint32, extents, lengths_at),
            np.frombuffer(packed, np.uint32, extents, lengths_at + 4 * extents),
            np.frombuffer(packed, OWNER, records),
            described["counts"],
        )

    def _section(self, number: int) -> bytes:
        at, size, digest = self._sections[number]
        section = self._read(size, at)
        while 0 < len(section) < size and (more := self._read(size - len(section), at + len(section))):
            section += more
        if len(section) != size or xxhash.xxh3_64_intdigest(section) != digest:
            raise CorruptionError(f"{self.path}: section {number} does not match its checksum (offset {at})")
        return section

    def _read(self, size: int, at: int) -> bytes:
        try:
            return os.pread(self._fd, size, at)
        except OSError as error:
            raise CorruptionError(f"{self.path} cannot be read (offset {at}): {error.strerror}") from error
