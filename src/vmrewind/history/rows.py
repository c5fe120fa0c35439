"""Records as numpy rows: one layout for the local journal's records and for those that were shipped.

Rows are built from record tables alone, vectorised; no payload is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Batch
from vmrewind.repository.segment import SHIP_ROW, Rows, payload_lengths

ROW: Final = SHIP_ROW
"""``position`` is the payload's in the row's source: file offset in a segment, offset in the payload stream of a shipped object."""

TABLE: Final = np.dtype(fmt.RECORD_FIELDS)

DATA_OPS: Final = (fmt.Op.WRITE, fmt.Op.ZERO, fmt.Op.DISCARD)
"""Ops that change a disk's content."""


def rows_of_batches(batches: Sequence[Batch]) -> Rows:
    """Rows of consecutive batches of one segment file."""
    table = np.frombuffer(b"".join([batch.table for batch in batches]), TABLE)
    rows = np.empty(len(table), ROW)
    for name in ("offset", "xxh3", "length", "disk", "op", "flags"):
        rows[name] = table[name]
    counts = np.array([batch.count for batch in batches], np.int64)
    firsts = np.cumsum(counts) - counts
    within = np.arange(len(table), dtype=np.uint64) - np.repeat(firsts, counts).astype(np.uint64)
    rows["seq"] = np.repeat(np.array([batch.first_seq for batch in batches], np.uint64), counts) + within
    rows["time_ns"] = np.repeat(np.array([batch.time_ns for batch in batches], np.uint64), counts) + within
    padded = payload_lengths(table["op"], table["length"])
    before = np.cumsum(padded) - padded
    starts = np.array([batch.payload_position for batch in batches], np.int64)
    if len(table):
        starts -= before[firsts]
    rows["position"] = (np.repeat(starts, counts) + before).astype(np.uint64)
    return rows


def between(rows: Rows, first: int, last: int) -> Rows:
    """The rows with seqs in [first, last]."""
    if not len(rows) or (int(rows["seq"][0]) >= first and int(rows["seq"][-1]) <= last):
        return rows
    low, high = np.searchsorted(rows["seq"], np.array([first, last + 1], np.uint64))
    return rows[low:high]


def of_disk(rows: Rows, disk: int) -> Rows:
    """The rows that concern a disk: its own and those of the whole VM."""
    chosen: Rows = rows[(rows["disk"] == disk) | (rows["disk"] == fmt.ALL_DISKS)]
    return chosen


def last_at(rows: Rows, time_ns: int) -> Any | None:
    """The last row whose time is at most ``time_ns``, None if there is none."""
    at = int(np.searchsorted(rows["time_ns"], np.uint64(max(time_ns, 0)), side="right"))
    return rows[at - 1] if at else None
