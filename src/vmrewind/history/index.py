"""The index of a view: which record owns which bytes, the last writer winning, built from record tables alone.

Vectorised throughout. The records' edges cut the disk into elementary intervals; a record covers a range of them, and each
interval belongs to the highest record that covers it. Ranges are painted like a sparse table's: a range of n intervals is two
overlapping ranges of the largest power of two within n, noted at that power's level, and each level hands its notes down to two
halves on the level below. That takes O(intervals x levels) whatever the records' lengths, a discard of the whole disk included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vmrewind.history.rows import DATA_OPS
from vmrewind.journal import format as fmt
from vmrewind.repository.segment import Rows

NOBODY: Final = -1

_CHANGES: Final = np.isin(np.arange(256), [int(op) for op in DATA_OPS])


@dataclass(frozen=True, slots=True)
class Index:
    """Disjoint extents in order of offset: bytes [starts, ends) belong to row ``owners`` of ``rows``. The rest is the base's.

    ``rows`` are the owning records alone, in order of seq, ``sources`` their sources' numbers.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    owners: NDArray[np.int64]
    rows: Rows
    sources: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.starts)

    def overlapping(self, offset: int, length: int) -> slice:
        """The extents that touch [offset, offset + length)."""
        first = int(np.searchsorted(self.ends, offset, side="right"))
        last = int(np.searchsorted(self.starts, offset + length, side="left"))
        return slice(first, max(first, last))


def effective(rows: Rows, disk: int, last_seq: int) -> NDArray[np.bool_]:
    """Which rows count for a disk's state after ``last_seq``: its data records up to there that are not voided by any row."""
    counts: NDArray[np.bool_] = (rows["disk"] == disk) & _CHANGES[rows["op"]] & (rows["length"] > 0)
    counts &= rows["seq"] <= np.uint64(last_seq)
    if len(voided := rows["offset"][rows["op"] == fmt.Op.VOID]):
        counts &= ~np.isin(rows["seq"], voided)
    return counts


def build_index(rows: Rows, sources: NDArray[np.uint32]) -> Index:
    """Index data records (in order of seq, nothing voided among them); ``sources`` runs parallel to ``rows``."""
    starts = rows["offset"].astype(np.int64)
    edges, ranks = _compress(np.concatenate((starts, starts + rows["length"])))
    owners = _paint(ranks[: len(rows)], ranks[len(rows) :], max(len(edges) - 1, 0))
    # Neighbouring intervals of one owner are one extent.
    begins = np.flatnonzero(np.diff(owners, prepend=NOBODY - 1))
    extent_owners = owners[begins]
    extent_ends = edges[np.append(begins[1:], len(owners))] if len(begins) else edges[:0]
    taken = extent_owners != NOBODY
    used = np.zeros(len(rows), np.bool_)
    used[extent_owners[taken]] = True
    numbers = np.cumsum(used) - 1
    return Index(edges[begins][taken], extent_ends[taken], numbers[extent_owners[taken]], rows[used], sources[used])


def _compress(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(distinct values in order, index of each value among them). np.unique does this by hashing, an order slower."""
    order = np.argsort(values)
    ascending = values[order]
    fresh = np.ones(len(values), np.bool_)
    np.not_equal(ascending[1:], ascending[:-1], out=fresh[1:])
    ranks = np.empty(len(values), np.int64)
    ranks[order] = np.cumsum(fresh) - 1
    return ascending[fresh], ranks


def _paint(lows: NDArray[np.int64], highs: NDArray[np.int64], count: int) -> NDArray[np.int32]:
    """Owner of each of ``count`` intervals: the highest i with lows[i] <= interval < highs[i], NOBODY without one."""
    records = np.arange(len(lows), dtype=np.int32)
    levels = (np.frexp((highs - lows).astype(np.float64))[1] - 1).astype(np.int8)
    top = int(levels.max(initial=0))
    notes = np.full(count, NOBODY, np.int32)
    for level in range(top, -1, -1):
        span = 1 << level
        if level < top:
            # What was noted one level up at i covers [i, i + 2 * span): both halves take it over.
            notes[span:] = np.maximum(notes[span:], notes[:-span])
        chosen = np.flatnonzero(levels == level)
        np.maximum.at(notes, lows[chosen], records[chosen])
        if level:
            np.maximum.at(notes, highs[chosen] - span, records[chosen])
    return notes
