"""A set of byte ranges that grows: what a writable view holds itself."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Ranges:
    """Disjoint ranges [start, end) in order, neighbours joined."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Take [start, end) in."""
        if start >= end:
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def split(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(start, end, whether it is in the set): the parts of [start, end), in order."""
        if start >= end:
            return
        at = start
        for number in range(bisect_right(self._ends, start), len(self._starts)):
            low, high = self._starts[number], min(self._ends[number], end)
            if low >= end:
                break
            if low > at:
                yield at, low, False
            yield max(at, low), high, True
            at = high
        if at < end:
            yield at, end, False

    @property
    def total(self) -> int:
        """How many bytes they are together."""
        return sum(self._ends) - sum(self._starts)
