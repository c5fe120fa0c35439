"""``capture.state``: the mapped page that says how far the images have followed the journal.

It outlives capture's process (the kernel keeps a shared mapping's page), so after a SIGKILL ``applied`` is exact: batches after
it may not be in the image. After the host's death (another boot id) only ``checkpoint`` counts: it was synced after the images.
One little-endian struct at offset 0; each number is stored by one aligned 8-byte write.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from vmrewind.errors import CorruptionError

SIZE: Final = 4096
MAGIC: Final = b"VMRWSTAT"
VERSION: Final = 1
LAYOUT: Final = struct.Struct("<8sII16sQQQ")
"""magic, version, doubts, boot id, run, batch applied, batch checkpointed."""
_DOUBTS: Final = 12
_DOUBT_LAST: Final = 30
"""The bit of every disk from this index on."""
_BYPASS: Final = 1 << 31
_RUN: Final = 32
_APPLIED: Final = 40
_CHECKPOINT: Final = 48
_HINT: Final = "restore it or move the journal away"
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


def boot_id() -> bytes:
    """16 bytes that change whenever the host boots."""
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))


class StatePage:
    """The open page of a journal directory; created zeroed (run 0: none yet) if it is not there."""

    def __init__(self, journal: Path) -> None:
        path = journal / "capture.state"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < SIZE:
                os.ftruncate(fd, SIZE)
            try:
                os.pread(fd, SIZE, 0)
            except OSError as error:
                # Through the mapping it would be a signal, and no error.
                raise CorruptionError(f"{path}: it cannot be read: {error.strerror}", _HINT) from error
            self._map = mmap.mmap(fd, SIZE)
        finally:
            os.close(fd)
        magic, version, _, self.boot, self.run, _, _ = LAYOUT.unpack_from(self._map)
        if magic == bytes(8):
            self.begin(0)
        elif magic != MAGIC or version != VERSION:
            raise CorruptionError(f"{path}: not a state page of version {VERSION}", _HINT)

    @property
    def applied(self) -> int:
        """Number of the last batch whose writes are all in the images' page cache."""
        return int(_U64.unpack_from(self._map, _APPLIED)[0])

    @property
    def checkpoint(self) -> int:
        """Number of the last batch known to be on the images' stable storage."""
        return int(_U64.unpack_from(self._map, _CHECKPOINT)[0])

    def set_applied(self, batch: int) -> None:
        """Record that every batch up to ``batch`` is in the images (page cache)."""
        _U64.pack_into(self._map, _APPLIED, batch)

    def set_checkpoint(self, batch: int) -> None:
        """Record, durably, that the images hold every batch up to ``batch`` on stable storage."""
        _U64.pack_into(self._map, _CHECKPOINT, batch)
        self._map.flush()

    @property
    def _doubts(self) -> int:
        return int(_U32.unpack_from(self._map, _DOUBTS)[0])

    def is_doubtful(self, index: int) -> bool:
        """Whether disk ``index`` may hold what its history does not, in this run."""
        return bool(self._doubts >> min(index, _DOUBT_LAST) & 1)

    def set_doubtful(self, indices: Iterable[int]) -> None:
        """Record which disks may hold what their history does not; like ``applied``, a process's death does not undo it."""
        doubts = sum({1 << min(index, _DOUBT_LAST) for index in indices}) | (self._doubts & _BYPASS)
        _U32.pack_into(self._map, _DOUBTS, doubts)

    @property
    def bypassed(self) -> bool:
        """Whether a bypass of the journal has begun whose gap is not closed."""
        return bool(self._doubts & _BYPASS)

    @bypassed.setter
    def bypassed(self, bypassed: bool) -> None:
        doubts = self._doubts & ~_BYPASS | (_BYPASS if bypassed else 0)
        _U32.pack_into(self._map, _DOUBTS, doubts)

    def begin(self, run: int) -> None:
        """A new run starts: nothing of it applied yet. Durable when this returns."""
        self.run, self.boot = run, boot_id()
        LAYOUT.pack_into(self._map, 0, MAGIC, VERSION, 0, self.boot, run, 0, 0)
        self._map.flush()

    def close(self) -> None:
        """Unmap."""
        self._map.close()
