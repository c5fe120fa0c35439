"""Which record owns which bytes, the last writer winning: from ranges in order of their records to disjoint extents.

Vectorised throughout. Sorted by where they begin, most ranges of a large disk lie apart from all others and are extents as they
are. The others are painted: their edges cut the disk into elementary intervals, a range covers a row of them, and each interval
belongs to the newest range that covers it. Ranges are painted like a sparse table's: a range of n intervals is two overlapping
ranges of the largest power of two within n, noted at that power's level, and each level hands its notes down to two halves on the
level below. That takes O(intervals x levels) whatever the ranges' lengths, a discard of the whole disk included.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Extents = tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint32]]
"""Disjoint, in order of offset: where they begin, their lengths, and which range owns each."""


def last_writers(starts: NDArray[np.int64], lengths: NDArray[np.uint32], *, in_runs: bool = False) -> Extents:
    """The extents of ranges that are given in order of age, the oldest first; none is empty.

    ``in_runs``: the ranges come as a few runs, each in order of offset, which is quicker to sort.
    """
    if not len(starts):
        return starts.astype(np.int64), lengths.astype(np.uint32), np.empty(0, np.uint32)
    starts, owners = _in_order(starts, in_runs)
    lengths = lengths[owners]
    ends = starts + lengths
    apart = np.ones(len(starts) + 1, np.bool_)
    apart[1:-1] = starts[1:] >= np.maximum.accumulate(ends)[:-1]
    alone = apart[:-1] & apart[1:]
    if alone.all():
        return starts, lengths, owners
    crowded = ~alone
    painted = _paint(starts[crowded], ends[crowded], owners[crowded])
    del ends, apart, crowded
    return _merge((starts[alone], lengths[alone], owners[alone]), painted)


def unit_shift(starts: NDArray[np.int64]) -> int:
    """How many bits at the end of every start are 0."""
    unit = int(np.bitwise_or.reduce(starts))
    return (unit & -unit).bit_length() - 1 if unit else 0


def _in_order(starts: NDArray[np.int64], in_runs: bool) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """(the starts in order, the number of each). Offset and number are sorted as one word where they fit: thrice as quick."""
    shift = unit_shift(starts)
    bits = len(starts).bit_length()
    if (int(starts.max()) >> shift).bit_length() + bits > 63:
        order = np.argsort(starts, kind="stable").astype(np.uint32)
        return starts[order], order
    words = starts >> shift
    words <<= bits
    words |= np.arange(len(starts))
    words.sort(kind="stable" if in_runs else "quicksort")
    owners = (words & ((1 << bits) - 1)).astype(np.uint32)
    words >>= bits
    words <<= shift
    return words, owners


def _paint(starts: NDArray[np.int64], ends: NDArray[np.int64], owners: NDArray[np.uint32]) -> Extents:
    """The extents of ranges in order of offset that overlap, the one with the highest owner winning."""
    edges = np.concatenate((starts, ends))
    edges.sort()
    edges = edges[np.append(True, edges[1:] != edges[:-1])]
    lows, highs = np.searchsorted(edges, starts), np.searchsorted(edges, ends)
    levels = (np.frexp((highs - lows).astype(np.float64))[1] - 1).astype(np.int8)
    top = int(levels.max())
    marks = owners + np.uint32(1)
    # For each elementary interval the owner that is known so far, plus one; 0: nobody.
    notes = np.zeros(len(edges) - 1, np.uint32)
    for level in range(top, -1, -1):
        span = 1 << level
        if level < top:
            # What was noted one level up at i covers [i, i + 2 * span): both halves take it over.
            notes[span:] = np.maximum(notes[span:], notes[:-span])
        chosen = np.flatnonzero(levels == level)
        np.maximum.at(notes, lows[chosen], marks[chosen])
        if level:
            np.maximum.at(notes, highs[chosen] - span, marks[chosen])
    # Neighbouring intervals of one owner are one extent.
    begins = np.flatnonzero(np.append(True, notes[1:] != notes[:-1]))
    found = edges[begins]
    lengths = np.diff(found, append=edges[-1])
    owned = notes[begins] > 0
    return found[owned], lengths[owned].astype(np.uint32), notes[begins[owned]] - np.uint32(1)


def _merge(some: Extents, others: Extents) -> Extents:
    """Two sets of extents that do not overlap, as one."""
    places = np.searchsorted(some[0], others[0]) + np.arange(len(others[0]))
    here = np.ones(len(some[0]) + len(others[0]), np.bool_)
    here[places] = False

    starts, lengths, owners = (np.empty(len(here), column.dtype) for column in some)
    for column, one, other in zip((starts, lengths, owners), some, others, strict=True):
        column[here], column[places] = one, other
    return starts, lengths, owners
