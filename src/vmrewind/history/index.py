"""The index of a view: which record owns which bytes, the last writer winning, built from record tables alone.

It takes 16 bytes for an extent and 24 for a record that owns any; what else is known of a record is looked up when it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vmrewind.errors import CorruptionError
from vmrewind.history.painting import last_writers
from vmrewind.history.rows import DATA_OPS
from vmrewind.journal import format as fmt
from vmrewind.repository.segment import Rows

OWNER: Final = np.dtype([("offset", "<i8"), ("xxh3", "<u8"), ("length", "<u4"), ("place", "<u4")])
"""A record that changes a disk, 24 bytes. ``place``: where its payload lies in its source, in units of 8 bytes; or ZEROES."""
Owners = NDArray[np.void]
"""An array of OWNER."""

ZEROES: Final = (1 << 32) - 1

_CHANGES: Final = np.isin(np.arange(256), [int(op) for op in DATA_OPS])


@dataclass(frozen=True, slots=True)
class Index:
    """Disjoint extents in order of offset: ``lengths`` bytes from ``starts`` on are record ``owners``. The rest is the base's.

    ``records`` are the owning records alone, in order of seq; those before ``bounds[0]`` are of the first source, and so on.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.uint32]
    owners: NDArray[np.uint32]
    records: Owners
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def overlapping(self, offset: int, length: int) -> slice:
        """The extents that touch [offset, offset + length)."""
        first = int(np.searchsorted(self.starts, offset, side="right"))
        if first and int(self.starts[first - 1]) + int(self.lengths[first - 1]) > offset:
            first -= 1
        last = int(np.searchsorted(self.starts, offset + length, side="left"))
        return slice(first, max(first, last))

    def ends(self, extents: slice | NDArray[np.int64] | NDArray[np.bool_]) -> NDArray[np.int64]:
        """Where extents end, bytes."""
        found: NDArray[np.int64] = self.starts[extents] + self.lengths[extents]
        return found

    def sources(self, owners: NDArray[np.uint32]) -> NDArray[np.int64]:
        """The number of each owner's source."""
        return np.searchsorted(self.bounds, owners, side="right")

    def written(self, extents: slice | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which extents hold what a record's payload gives; the others read as zeroes."""
        found: NDArray[np.bool_] = self.records["place"][self.owners[extents]] != ZEROES
        return found


def effective(rows: Rows, disk: int, last_seq: int, voided: NDArray[np.uint64] | None = None) -> NDArray[np.bool_]:
    """Which rows count for a disk's state after ``last_seq``: its data records up to there whose seqs are not ``voided``.

    Without ``voided`` the rows themselves tell.
    """
    counts: NDArray[np.bool_] = (rows["disk"] == disk) & _CHANGES[rows["op"]] & (rows["length"] > 0)
    counts &= rows["seq"] <= np.uint64(last_seq)
    if voided is None:
        voided = rows["offset"][rows["op"] == fmt.Op.VOID]
    if len(voided):
        counts &= ~np.isin(rows["seq"], voided)
    return counts


def owners_of(rows: Rows, name: str) -> Owners:
    """Data records of one source, which ``name`` names, as owners."""
    owners = np.empty(len(rows), OWNER)
    for field in ("offset", "xxh3", "length"):
        owners[field] = rows[field]
    places = rows["position"] // fmt.ALIGNMENT
    if len(rows) and int(places.max()) >= ZEROES:
        raise CorruptionError(f"{name}: a payload at {int(rows['position'].max())} is farther in than any source is long")
    owners["place"] = np.where(rows["op"] == fmt.Op.WRITE, places, ZEROES)
    return owners


def build_index(parts: Sequence[Owners]) -> Index:
    """Index the records of each source, all in order of seq and nothing voided among them."""
    counts = [len(part) for part in parts]
    records = np.concatenate(parts) if parts else np.empty(0, OWNER)
    starts, lengths, owners = last_writers(records["offset"], records["length"])
    used = np.zeros(len(records), np.bool_)
    used[owners] = True
    bounds = np.cumsum(counts, dtype=np.int64)
    if not used.all():
        before = np.concatenate((np.zeros(1, np.uint32), np.cumsum(used, dtype=np.uint32)))
        owners = before[owners]
        bounds = before[bounds].astype(np.int64)
        records = records[used]
    return Index(starts, lengths, owners, records, bounds)
