"""Gathering batches of the journal until they make a shipped segment: the records of some disks, with their payloads."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Batch
from vmrewind.repository.layout import SegmentName
from vmrewind.repository.segment import SHIP_ROW, Rows, encode_segment, payload_lengths
from vmrewind.ship.plan import Entry

RECORD_ROW: Final = np.dtype(fmt.RECORD_FIELDS)
PAYLOAD_MAX: Final = 8 << 20
"""Bytes of payload that make a segment full."""
ROWS_MAX: Final = 1 << 17
"""Records that make a segment full."""
_SELECT_AT: Final = 1 << 20
"""Bytes read before the records that are carried are picked out: one pass over many small batches costs little per record."""


class Gathered:
    """What was read for one segment: every seq from ``first`` to ``last`` (``first - 1`` while there is none) was looked at."""

    def __init__(self, entry: Entry, first: int) -> None:
        self.first = first
        self.payload_max = PAYLOAD_MAX
        self.last = first - 1
        self.last_time_ns = 0
        self.oldest_time_ns: int | None = None
        """Time of the oldest record that is carried."""
        self.row_count = 0
        self.payload_bytes = 0
        self._entry = entry
        self._carried = np.array([i for i in range(64) if entry.mask >> i & 1] + [fmt.ALL_DISKS], np.uint16)
        self._fresh: list[tuple[Batch, bytes]] = []
        self._fresh_bytes = 0
        self._rows: list[Rows] = []
        self._payloads: list[bytes] = []

    def add(self, batch: Batch, payload: bytes) -> None:
        """Take a batch in; what of it lies before ``last`` or behind the entry's end does not count."""
        self._fresh.append((batch, payload))
        self._fresh_bytes += len(batch.table) + len(payload)
        if self._fresh_bytes >= min(_SELECT_AT, self.payload_max):
            self.select()

    def __bool__(self) -> bool:
        """Whether anything was looked at that a segment would cover."""
        return self.last >= self.first

    @property
    def full(self) -> bool:
        """Whether it is time to send whatever the clock says."""
        return self.payload_bytes >= self.payload_max or self.row_count >= ROWS_MAX

    def select(self) -> None:
        """Pick out the records that are carried, of all batches taken in since the last time."""
        if not self._fresh:
            return
        batches = [batch for batch, _ in self._fresh]
        table = np.frombuffer(b"".join(batch.table for batch in batches), RECORD_ROW)
        counts = np.array([batch.count for batch in batches])
        within = np.arange(len(table), dtype=np.uint64) - np.repeat(np.cumsum(counts) - counts, counts).astype(np.uint64)
        seq = np.repeat(np.array([batch.first_seq for batch in batches], np.uint64), counts) + within
        time_ns = np.repeat(np.array([batch.time_ns for batch in batches], np.uint64), counts) + within
        lengths = payload_lengths(table["op"], table["length"])
        # Positions in the payloads of these batches, one behind the other: each batch's begin where the one before ends.
        starts = np.cumsum(lengths) - lengths

        last = batches[-1].last_seq if self._entry.last is None else min(batches[-1].last_seq, self._entry.last)
        keep = np.isin(table["disk"], self._carried) & (seq >= np.uint64(self.last + 1)) & (seq <= np.uint64(last))
        rows: Rows = np.zeros(int(np.count_nonzero(keep)), SHIP_ROW)
        for field in ("offset", "length", "disk", "op", "flags", "xxh3"):
            rows[field] = table[field][keep]
        rows["seq"], rows["time_ns"] = seq[keep], time_ns[keep]
        kept = lengths[keep]
        rows["position"] = self.payload_bytes + np.cumsum(kept) - kept
        self._take_payloads(starts[keep][kept > 0], kept[kept > 0])
        if len(rows):
            self._rows.append(rows)
            self.row_count += len(rows)
            self.payload_bytes += int(kept.sum())
            if self.oldest_time_ns is None:
                self.oldest_time_ns = int(rows["time_ns"][0])
        self.last = last
        self.last_time_ns = int(time_ns[np.searchsorted(seq, np.uint64(last))])
        self._fresh, self._fresh_bytes = [], 0

    def _take_payloads(self, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> None:
        """Slices of the fresh payloads, neighbours in one; none reaches over the end of its batch's payload."""
        batch_end = 0
        ends = starts + lengths
        at = 0
        for _, payload in self._fresh:
            batch_start, batch_end = batch_end, batch_end + len(payload)
            stop = int(np.searchsorted(starts, batch_end))
            if stop > at:
                view = memoryview(payload)
                breaks = np.flatnonzero(starts[at + 1 : stop] != ends[at : stop - 1]) + at + 1
                for from_, to in zip([at, *breaks.tolist()], [*breaks.tolist(), stop], strict=True):
                    piece = view[int(starts[from_]) - batch_start : int(ends[to - 1]) - batch_start]
                    # A copy of a part, so that what is not carried does not stay in memory for its sake.
                    self._payloads.append(payload if len(piece) == len(payload) else bytes(piece))
                at = stop

    def encode(self, vm: str, uuid: bytes) -> tuple[SegmentName, bytes]:
        """The segment that covers everything looked at so far."""
        name = SegmentName(self._entry.run, self.first, self.last, self._entry.mask, vm)
        rows: Rows = np.concatenate(self._rows) if self._rows else np.zeros(0, SHIP_ROW)
        return name, encode_segment(name, uuid, rows, b"".join(self._payloads))
