"""Records as numpy rows: one layout for the local journal's records and for those that were shipped.

Rows are built from record tables alone, vectorised; no payload is touched.
"""

from __future__ import annotations

from typing import Any, Final

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


class RecordTables:
    """The record tables of consecutive batches of one segment file, as they lie there; rows are made of them when asked for.

    It takes 30 bytes for a record when sixteen are a batch, where a row takes 48.
    """

    def __init__(self, tables: Tables) -> None:
        sizes = np.array([len(block) for block in tables.blocks], np.int64)
        self._words: NDArray[np.uint64] = np.frombuffer(b"".join(tables.blocks), np.uint64)
        self._heads = (np.cumsum(sizes) - sizes) // 8
        self._counts = (sizes - fmt.BATCH.size) // fmt.RECORD.size
        self._payloads = np.array(tables.positions, np.int64) + sizes

    @property
    def nbytes(self) -> int:
        """What it takes, bytes."""
        return self._words.nbytes + self._heads.nbytes + self._counts.nbytes + self._payloads.nbytes

    @property
    def last_seq(self) -> int | None:
        """Seq of the last record, None without one."""
        return int(self._words[self._heads[-1] + _SEQ_WORD]) + int(self._counts[-1]) - 1 if len(self._heads) else None

    @property
    def rows(self) -> Rows:
        """Every record's row, in order of seq."""
        return self._rows(self._table)

    @property
    def notes(self) -> Rows:
        """The rows that tell something of others."""
        table = self._table
        chosen = _IS_NOTE[table["op"]]
        return self._rows(table)[chosen] if chosen.any() else np.empty(0, ROW)

    @property
    def _table(self) -> NDArray[np.void]:
        records = np.ones(len(self._words), np.bool_)
        records[(self._heads[:, None] + np.arange(_HEAD_WORDS)).ravel()] = False
        return self._words[records].view(TABLE)

    def _rows(self, table: NDArray[np.void]) -> Rows:
        rows = np.empty(len(table), ROW)
        for name in ("offset", "xxh3", "length", "disk", "op", "flags"):
            rows[name] = table[name]
        counts = self._counts
        firsts = np.cumsum(counts) - counts
        within = np.arange(len(table), dtype=np.uint64)
        rows["seq"] = within + np.repeat(self._words[self._heads + _SEQ_WORD] - firsts.astype(np.uint64), counts)
        rows["time_ns"] = within + np.repeat(self._words[self._heads + _TIME_WORD] - firsts.astype(np.uint64), counts)
        padded = payload_lengths(table["op"], table["length"])
        before = np.cumsum(padded) - padded
        starts = self._payloads - before[firsts] if len(table) else self._payloads
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
