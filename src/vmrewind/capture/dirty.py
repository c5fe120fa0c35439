"""Which extents of the images differ from their history: a mapped file that outlives capture's process.

It lies in the VM's runtime directory, preallocated, so that nothing that befalls the journal's file system reaches it. It need
not outlive the host: after the host's death the next start compares the images with their history as a whole. One page of
header, then a bitmap for each disk; both are the process's own format, read by nobody else.
"""

from __future__ import annotations

import enum
import errno
import mmap
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from vmrewind.errors import SpaceError
from vmrewind.journal.runs import private_directory

_HEADER: Final = struct.Struct("<8sQQBBH")
"""magic, run, since when the gap is open (ns since the epoch), phase, whether the journal has its begin, length of its cause."""
_MAGIC: Final = b"VMRWDIR1"
_PHASE_AT: Final = 24
_DECLARED_AT: Final = 25
_PAGE: Final = 4096
_CAUSE_MAX: Final = 1000
_GRANULE_MIN: Final = 64 << 10
_BITS_MAX: Final = 1 << 24
"""Most bits for one disk: 2 MiB of bitmap serve 1 TiB in pieces of 64 KiB, a larger disk in larger pieces."""
_FILL_BYTES: Final = 64
_some = re.compile(rb"[^\0]")


class Phase(enum.IntEnum):
    """Where a bypass is."""

    NONE = 0
    """History follows the images."""
    BYPASSING = 1
    """The guest's writes go to the images only."""
    RESYNCING = 2
    """Writes are journaled again, and what was bypassed is being journaled."""


def is_bypassed(path: Path, run: int) -> bool:
    """Whether a capture of the run left images that are newer than its journal, or may be."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
    except FileNotFoundError:
        return False
    return header[:16] == _MAGIC + run.to_bytes(8, "little") and header[_PHASE_AT] != Phase.NONE


def granule_of(size: int) -> int:
    """Bytes that one bit stands for on a disk of ``size`` bytes."""
    granule = _GRANULE_MIN
    while size > granule * _BITS_MAX:
        granule *= 2
    return granule


class _Bitmap:
    def __init__(self, at: int, size: int) -> None:
        self.at = at
        self.size = size
        self.granule = granule_of(size)
        self.bytes = (-(-size // self.granule) + 7) // 8
        self.clean = 0
        """Below this byte of it nothing is dirty."""


class DirtyMap:
    """The map of one run; what an earlier run left at ``path`` is forgotten. ``sizes``: bytes of each disk, by index."""

    def __init__(self, path: Path, run: int, sizes: Mapping[int, int]) -> None:
        self._bitmaps: dict[int, _Bitmap] = {}
        at = _PAGE
        for index, size in sorted(sizes.items()):
            self._bitmaps[index] = _Bitmap(at, size)
            at += -(-self._bitmaps[index].bytes // _PAGE) * _PAGE
        self._map = _open(path, run, at)
        self._bits = sum(int.from_bytes(self._map[b.at : b.at + b.bytes]).bit_count() * b.granule for b in self._bitmaps.values())

    @property
    def phase(self) -> Phase:
        """Where the bypass is."""
        return Phase(self._map[_PHASE_AT])

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._map[_PHASE_AT] = phase

    @property
    def declared(self) -> bool:
        """Whether the journal has the gap's begin."""
        return bool(self._map[_DECLARED_AT])

    @declared.setter
    def declared(self, declared: bool) -> None:
        self._map[_DECLARED_AT] = declared

    @property
    def since_ns(self) -> int:
        """When the gap began."""
        return int(_HEADER.unpack_from(self._map)[2])

    @property
    def cause(self) -> str:
        """Why it began."""
        length = int(_HEADER.unpack_from(self._map)[5])
        return self._map[_HEADER.size : _HEADER.size + length].decode(errors="replace")

    @property
    def dirty_bytes(self) -> int:
        """How much of the disks may differ from their history, in whole pieces."""
        return self._bits

    def begin(self, cause: str, since_ns: int) -> None:
        """A gap begins, as of when this returns."""
        text = cause.encode()[:_CAUSE_MAX]
        magic, run, *_ = _HEADER.unpack_from(self._map)
        self._map[_HEADER.size : _HEADER.size + len(text)] = text
        _HEADER.pack_into(self._map, 0, magic, run, since_ns, Phase.NONE, False, len(text))
        # Last, and one byte: whoever comes after a death finds all of it or nothing.
        self.phase = Phase.BYPASSING

    def mark(self, index: int, offset: int, length: int) -> None:
        """The range is about to differ."""
        bitmap = self._bitmaps[index]
        content = self._map
        first, last = offset // bitmap.granule, (offset + length - 1) // bitmap.granule
        bitmap.clean = min(bitmap.clean, first // 8)
        low, high = bitmap.at + (first + 7) // 8, bitmap.at + (last + 1) // 8
        if high - low > _FILL_BYTES:
            had = int.from_bytes(content[low:high]).bit_count()
            content[low:high] = b"\xff" * (high - low)
            self._bits += ((high - low) * 8 - had) * bitmap.granule
            single = [*range(first, (low - bitmap.at) * 8), *range((high - bitmap.at) * 8, last + 1)]
        else:
            single = [*range(first, last + 1)]
        for number in single:
            at, bit = bitmap.at + (number >> 3), 1 << (number & 7)
            if not content[at] & bit:
                content[at] |= bit
                self._bits += bitmap.granule

    def first(self, index: int) -> tuple[int, int] | None:
        """(offset, length) of a disk's first dirty piece, None if it has none."""
        bitmap = self._bitmaps[index]
        found = _some.search(self._map, bitmap.at + bitmap.clean, bitmap.at + bitmap.bytes)
        bitmap.clean = (found.start() - bitmap.at) if found is not None else bitmap.bytes
        if found is None:
            return None
        byte = self._map[found.start()]
        number = (found.start() - bitmap.at) * 8 + ((byte & -byte).bit_length() - 1)
        offset = number * bitmap.granule
        return offset, min(bitmap.granule, bitmap.size - offset)

    def clear(self, index: int, offset: int) -> None:
        """The piece at ``offset`` is in the history again."""
        bitmap = self._bitmaps[index]
        number = offset // bitmap.granule
        self._map[bitmap.at + (number >> 3)] &= ~(1 << (number & 7))
        self._bits -= bitmap.granule


def undeclared_gap(path: Path) -> tuple[int, int, str] | None:
    """(run, since when, cause) of a gap whose begin the journal could not take yet; None without one."""
    try:
        head = path.read_bytes()[:_PAGE]
    except OSError:
        return None
    if len(head) < _HEADER.size:
        return None
    magic, run, since_ns, phase, declared, length = _HEADER.unpack_from(head)
    if magic != _MAGIC or phase == Phase.NONE or declared:
        return None
    return run, since_ns, head[_HEADER.size : _HEADER.size + length].decode(errors="replace")


def _open(path: Path, run: int, length: int) -> mmap.mmap:
    private_directory(path.parent)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        known = os.pread(fd, _HEADER.size, 0)
        if known[:16] != _MAGIC + run.to_bytes(8, "little") or os.fstat(fd).st_size != length:
            os.ftruncate(fd, 0)
            try:
                # Every page is had now: one that could not be had later would be a signal, and no error.
                os.posix_fallocate(fd, 0, length)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise SpaceError(
                    f'{path}: no room for {length} bytes, which on_journal_full = "bypass" needs ({error.strerror})',
                    "free space there, or choose another policy",
                ) from error
            os.pwrite(fd, _HEADER.pack(_MAGIC, run, 0, Phase.NONE, False, 0), 0)
        return mmap.mmap(fd, length)
    finally:
        os.close(fd)
