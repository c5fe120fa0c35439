"""Appending batches to the journal: the one place that writes segments.

The caller packs records straight into ``table`` (see :attr:`JournalWriter.table`), so that a batch costs one vectored write and no
copies; :meth:`JournalWriter.commit` returns when header, table and payloads are in the page cache of the segment file, where
no process's death can lose them. Durability is the caller's to ask for, by :meth:`take_unsynced`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import xxhash

from vmrewind.journal import format as fmt
from vmrewind.journal.clock import Clock
from vmrewind.journal.pool import JournalFull, Recycled, Recycling, SegmentPool
from vmrewind.journal.reader import SegmentFile, SegmentHeader

Buffer = bytes | bytearray | memoryview

_PAGE: Final = 4096
_ZERO_PAGE: Final = memoryview(bytes(_PAGE))
_PADDING: Final = tuple(bytes(n) for n in range(fmt.ALIGNMENT))
_xxh3 = xxhash.xxh3_64_intdigest
LAST_WORD_ROOM: Final = 2048
"""Bytes that are always left in a segment for one event more."""


class JournalWriter:
    """Appends batches of one run. ``next_seq`` and ``next_batch`` are those of the next record and batch."""

    def __init__(
        self,
        pool: SegmentPool,
        uuid: bytes,
        run: int,
        clock: Clock,
        may_recycle: Callable[[SegmentFile], Recycling],
        next_seq: int,
        next_batch: int = 1,
    ) -> None:
        self._pool = pool
        self._uuid = uuid
        self._clock = clock
        self._may_recycle = may_recycle
        self.run = run
        self.next_seq = next_seq
        self.next_batch = next_batch
        self.segment_number = 0
        self.segment_first_batch = next_batch
        self.last_time_ns = 0
        self._fd = -1
        self._position = 0
        self._size = 0
        self._head = bytearray(fmt.BATCH.size + fmt.RECORDS_MAX * fmt.RECORD.size)
        self._head_view = memoryview(self._head)
        self._unsynced: list[int] = []
        self._dirty = False
        self._rolled = False
        self.table = self._head
        """Where the caller packs record ``i``: at ``table_at + i * RECORD.size``."""

    table_at: Final = fmt.BATCH.size

    def resume(self, path: Path, number: int, position: int, unsynced: Sequence[Path] = ()) -> None:
        """Continue a run's last segment behind its last valid batch, which ends at ``position``.

        ``unsynced`` are the run's earlier segments that may not be on stable storage: the next flush promises that they are.
        """
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._size = os.fstat(self._fd).st_size
        self._position = position
        self._unsynced = [os.open(earlier, os.O_RDWR | os.O_CLOEXEC) for earlier in unsynced]
        self.segment_number = number
        self._dirty = self._rolled = True

    @property
    def payload_max(self) -> int:
        """Most payload bytes that fit into one batch of any number of records."""
        return self._pool.segment_size - fmt.SEGMENT_HEADER_SIZE - 2 * len(self._head) - LAST_WORD_ROOM

    @property
    def dropped(self) -> list[Recycled]:
        """History that was recycled to make room, for the caller to declare and clear."""
        return self._pool.dropped

    def commit(self, count: int, payloads: Sequence[Buffer], payload_length: int) -> int:
        """Write a batch of ``count`` records already packed into ``table``.

        ``payloads`` are the records' payloads in order, padding included, in at most 1,022 buffers (table and padding are two more,
        and IOV_MAX is 1,024); ``payload_length`` is their total in bytes. Returns the first record's seq. Raises JournalFull if
        there is no room or the journal's storage refuses: nothing of it counts then.

        As much space as voiding all of these records takes is left behind them: what the image refuses can always be voided. So is
        some for ``last_word``.
        """
        return self._append(count, payloads, payload_length, fmt.BATCH.size + count * fmt.RECORD.size + LAST_WORD_ROOM)

    def _append(self, count: int, payloads: Sequence[Buffer], payload_length: int, reserve: int) -> int:
        head_length = fmt.BATCH.size + count * fmt.RECORD.size
        length = head_length + payload_length
        if self._position + length + reserve > self._size:
            self._roll(length + reserve)
        head = self._head
        seq = self.next_seq
        time_ns = self._clock.take(count)
        # The checksum covers the header's fields after itself and the table, which lie behind one another.
        fmt.BATCH.pack_into(head, 0, fmt.BATCH_MAGIC, 0, self.run, self.next_batch, time_ns, seq, count, 0, payload_length)
        checksum = _xxh3(self._head_view[fmt.BATCH_CHECKED_FROM : head_length])
        head[8:16] = checksum.to_bytes(8, "little")
        # Zeroes up to the page's end, which the next batch overwrites: of a recycled segment that is not in the page cache a page
        # that is written in part would have to be read first.
        rest_of_page = -(self._position + length) % _PAGE
        buffers = (self._head_view[:head_length], *payloads, _ZERO_PAGE[:rest_of_page])
        try:
            written = os.pwritev(self._fd, buffers, self._position)
            if written != length + rest_of_page:
                self._write_rest(written, buffers)
        except OSError as error:
            # What did get there must not be taken for a batch, whose writes the images don't have.
            with contextlib.suppress(OSError):
                os.pwrite(self._fd, bytes(fmt.BATCH.size), self._position)
            raise JournalFull(f"segment {self.segment_number}: {error}") from error
        self._position += length
        self.next_seq = seq + count
        self.next_batch += 1
        self.last_time_ns = time_ns + count - 1
        self._dirty = True
        return seq

    def _write_rest(self, written: int, buffers: Sequence[Buffer]) -> None:
        rest = memoryview(b"".join(buffers))
        while written < len(rest):
            written += os.pwrite(self._fd, rest[written:], self._position + written)

    def event(self, kind: fmt.Event, content: dict[str, Any], disk: int = fmt.ALL_DISKS) -> int:
        """Write one event record in a batch of its own; returns its seq. Same errors as ``commit``."""
        payload = self._pack_event(kind, content, disk)
        return self.commit(1, (payload,), len(payload))

    def last_word(self, kind: fmt.Event, content: dict[str, Any]) -> int:
        """As ``event``, of the whole VM, for which a full journal has kept room."""
        payload = self._pack_event(kind, content, fmt.ALL_DISKS)
        return self._append(1, (payload,), len(payload), 0)

    def _pack_event(self, kind: fmt.Event, content: dict[str, Any], disk: int) -> bytes:
        payload = json.dumps(content, separators=(",", ":")).encode()
        fmt.RECORD.pack_into(self.table, self.table_at, 0, len(payload), disk, fmt.Op.EVENT, kind, _xxh3(payload))
        return payload.ljust(fmt.padded(len(payload)), b"\0")

    def write(self, disk: int, offset: int, data: bytes | None, length: int) -> int:
        """Write one WRITE record with ``data``, or one ZERO record of ``length`` bytes, in a batch of its own; returns its seq."""
        if data is None:
            fmt.RECORD.pack_into(self.table, self.table_at, offset, length, disk, fmt.Op.ZERO, 0, 0)
            return self.commit(1, (), 0)
        fmt.RECORD.pack_into(self.table, self.table_at, offset, len(data), disk, fmt.Op.WRITE, 0, _xxh3(data))
        padding = _PADDING[-len(data) & 7]
        return self.commit(1, (data, padding), len(data) + len(padding))

    def void(self, seqs: Sequence[int], disk: int) -> None:
        """Write that the records ``seqs``, of the last batch, never happened: the image refused them."""
        for i, seq in enumerate(seqs):
            fmt.RECORD.pack_into(self.table, self.table_at + i * fmt.RECORD.size, seq, 0, disk, fmt.Op.VOID, 0, 0)
        self._append(len(seqs), (), 0, 0)

    def _roll(self, length: int) -> None:
        """Go on in a segment with room for ``length`` bytes."""
        header = SegmentHeader(
            self._uuid, self.run, self.segment_number + 1, self.next_seq, self.next_batch, self._clock.take(1), 0
        )
        fd, size = self._pool.take(header, self._may_recycle)
        assert fmt.SEGMENT_HEADER_SIZE + length <= size, "a batch never exceeds a segment"
        if self._fd >= 0:
            self._unsynced.append(self._fd)
        self._fd, self._size = fd, size
        self._position = fmt.SEGMENT_HEADER_SIZE
        self.segment_number += 1
        self._dirty = self._rolled = True
        self.segment_first_batch = self.next_batch

    @property
    def deleted(self) -> bool:
        """Whether somebody has deleted the segment that is being written."""
        return self._fd >= 0 and os.fstat(self._fd).st_nlink == 0

    def abandon(self) -> None:
        """The journal was deleted: it takes nothing any more, so that nobody takes its remains for history."""
        self._pool.deleted = True
        self._size = 0

    @property
    def dirty(self) -> bool:
        """Whether anything was written since ``take_unsynced`` was last called."""
        return self._dirty

    def take_unsynced(self) -> tuple[list[int], int, bool]:
        """(finished segments to sync and close, current segment to sync, whether to sync the directory too)."""
        finished, self._unsynced = self._unsynced, []
        rolled, self._rolled = self._rolled, False
        self._dirty = False
        return finished, self._fd, rolled
