"""What is shipped already: ranges of seqs per run and disk, as the names of the repository's objects tell."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import Final

from vmrewind.repository.layout import SegmentName

SEQ_MAX: Final = (1 << 64) - 1


class Ranges:
    """A set of seqs, kept as disjoint ascending ranges, ends included."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []

    def add(self, first: int, last: int) -> None:
        """Add every seq from ``first`` to ``last``."""
        # Everything that overlaps or touches is swallowed.
        start = bisect.bisect_left(self._lasts, first - 1)
        end = bisect.bisect_right(self._firsts, last + 1)
        if start < end:
            first = min(first, self._firsts[start])
            last = max(last, self._lasts[end - 1])
        self._firsts[start:end] = [first]
        self._lasts[start:end] = [last]

    def missing(self, first: int) -> list[tuple[int, int | None]]:
        """The ranges from ``first`` on that are not in the set; the last one has no end, unless the set goes on for ever."""
        found: list[tuple[int, int | None]] = []
        for i in range(bisect.bisect_left(self._lasts, first), len(self._firsts)):
            if self._firsts[i] > first:
                found.append((first, self._firsts[i] - 1))
            first = self._lasts[i] + 1
        if first <= SEQ_MAX:
            found.append((first, None))
        return found


class Coverage:
    """The ranges of every run and disk index."""

    def __init__(self, names: Iterable[SegmentName] = ()) -> None:
        self._ranges: dict[tuple[int, int], Ranges] = {}
        for name in names:
            self.add(name.run, name.mask, name.first, name.last)

    def add(self, run: int, mask: int, first: int, last: int) -> None:
        """Note that nothing more is to be done for the disks in ``mask`` from ``first`` to ``last``."""
        index = 0
        while mask:
            if mask & 1:
                self._ranges.setdefault((run, index), Ranges()).add(first, last)
            mask >>= 1
            index += 1

    def reached(self, run: int, disk_index: int, first: int) -> int:
        """Seq up to which nothing is to be done from ``first`` on for one disk of a run: ``first - 1`` if nothing was."""
        missing = self.missing(run, disk_index, first)
        return missing[0][0] - 1 if missing else SEQ_MAX

    def missing(self, run: int, disk_index: int, first: int) -> list[tuple[int, int | None]]:
        """As ``Ranges.missing``, of one disk of a run."""
        return self._ranges.get((run, disk_index), Ranges()).missing(first)
