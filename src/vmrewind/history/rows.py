"""Records as numpy rows: one layout for the local journal's records and for those that were shipped.

Rows are built from record tables alone, vectorised; no payload is touched.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Tables
from vmrewind.repository.segment import SHIP_ROW, Rows, payload_lengths

ROW: Final = SHIP_ROW
"""``position`` is the payload's in the row's source: file offset in a segment, offset in the payload stream of a shipped object."""

TABLE: Final = np.dtype(fmt.RECORD_FIELDS)

DATA_OPS: Final = (fmt.Op.WRITE, fmt.Op.ZERO, fmt.Op.DISCARD)
"""Ops that change a disk's content."""


NOTE_OPS: Final = (fmt.Op.VOID, fmt.Op.EVENT)
"""Ops that tell something of other records, or of the whole."""

_IS_NOTE: Final = np.isin(np.arange(256), [int(op) for op in NOTE_OPS])
_HEAD_WORDS: Final = fmt.BATCH.size // 8
_TIME_WORD, _SEQ_WORD = 4, 5


class Columns(Protocol):
    """Records whose fields are had by the names that ROW has: rows, or what they can be made of."""

    def __len__(self) -> int:
        """How many records."""

    def __getitem__(self, field: str, /) -> NDArray[Any]:
        """A field of every record."""


class RecordTables:
    """The record tables of consecutive batches of one segment file; rows are made of them when asked for.

    It takes 26 bytes for a record when sixteen are a batch, where a row takes 48.
    """

    def __init__(self, tables: Tables) -> None:
        sizes = np.fromiter(map(len, tables.blocks), np.int64, len(tables.blocks))
        words: NDArray[np.uint64] = np.frombuffer(b"".join(tables.blocks), np.uint64)
        heads = (np.cumsum(sizes) - sizes) // 8
        of_records = np.ones(len(words), np.bool_)
        of_records[(heads[:, None] + np.arange(_HEAD_WORDS)).ravel()] = False
        self._table: NDArray[np.void] = words[of_records].view(TABLE)
        self._first_seqs: NDArray[np.uint64] = words[heads + _SEQ_WORD]
        self._times_ns: NDArray[np.uint64] = words[heads + _TIME_WORD]
        self._counts = (sizes - fmt.BATCH.size) // fmt.RECORD.size
        self._payloads = np.array(tables.positions, np.int64) + sizes

    @property
    def nbytes(self) -> int:
        """What it takes, bytes."""
        of_batches = (self._first_seqs, self._times_ns, self._counts, self._payloads)
        return self._table.nbytes + sum(column.nbytes for column in of_batches)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, field: str) -> NDArray[Any]:
        """A field of every record's row."""
        match field:
            case "seq":
                return self._counted_on(self._first_seqs)
            case "time_ns":
                return self._counted_on(self._times_ns)
            case "position":
                return self._positions()
        return self._table[field]

    @property
    def last_seq(self) -> int | None:
        """Seq of the last record, None without one."""
        return int(self._first_seqs[-1]) + int(self._counts[-1]) - 1 if len(self._counts) else None

    @property
    def rows(self) -> Rows:
        """Every record's row, in order of seq."""
        rows = np.empty(len(self), ROW)
        for field in rows.dtype.names or ():
            rows[field] = self[field]
        return rows

    @property
    def notes(self) -> Rows:
        """The rows that tell something of others."""
        chosen = _IS_NOTE[self._table["op"]]
        return self.rows[chosen] if chosen.any() else np.empty(0, ROW)

    def _counted_on(self, firsts: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """What counts on within a batch from its first record."""
        before = (np.cumsum(self._counts) - self._counts).astype(np.uint64)
        counted: NDArray[np.uint64] = np.repeat(firsts - before, self._counts)
        counted += np.arange(len(self), dtype=np.uint64)
        return counted

    def _positions(self) -> NDArray[np.uint64]:
        padded = payload_lengths(self._table["op"], self._table["length"])
        before = np.cumsum(padded) - padded
        firsts = np.cumsum(self._counts) - self._counts
        starts = self._payloads - before[firsts] if len(self) else self._payloads
        positions: NDArray[np.uint64] = (np.repeat(starts, self._counts) + before).astype(np.uint64)
        return positions


def between(rows: Rows, first: int, last: int) -> Rows:
    """The rows with seqs in [first, last]."""
    if not len(rows) or (int(rows["seq"][0]) >= first and int(rows["seq"][-1]) <= last):
        return rows
    low, high = np.searchsorted(rows["seq"], np.array([first, last + 1], np.uint64))
    return rows[low:high]


def of_disk(rows: Rows, disk: int) -> Rows:
    """The rows that concern a disk: its own and those of the whole VM."""
    wanted = (rows["disk"] == disk) | (rows["disk"] == fmt.ALL_DISKS)
    chosen: Rows = rows if wanted.all() else rows[wanted]
    return chosen


def notes_of(rows: Rows) -> Rows:
    """The rows that tell something of others, or of the whole."""
    chosen: Rows = rows[_IS_NOTE[rows["op"]]]
    return chosen


def last_at(rows: Rows, time_ns: int) -> Any | None:
    """The last row whose time is at most ``time_ns``, None if there is none."""
    at = int(np.searchsorted(rows["time_ns"], np.uint64(max(time_ns, 0)), side="right"))
    return rows[at - 1] if at else None
