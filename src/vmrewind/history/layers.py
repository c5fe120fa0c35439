"""The layers that an index is made of: disjoint extents and the records that own them, and how they are gathered and joined.

Most disks' extents begin at multiples of a sector, so where they begin is kept in units, in 4 bytes; other disks' take 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from vmrewind.errors import CorruptionError
from vmrewind.history.painting import Extents, last_writers, unit_shift
from vmrewind.history.rows import DATA_OPS, Columns
from vmrewind.journal import format as fmt

OWNER: Final = np.dtype([("offset", "<i8"), ("xxh3", "<u8"), ("length", "<u4"), ("place", "<u4")])
"""A record that changes a disk, 24 bytes. ``place``: where its payload lies in its source, in units of 8 bytes; or ZEROES."""
Owners = NDArray[np.void]
"""An array of OWNER."""

ZEROES: Final = (1 << 32) - 1

LAYER_RECORDS: Final = 1 << 18
"""So many records are sorted at a time."""
JOINED_EXTENTS: Final = 1 << 20
"""So many extents of several layers are joined to one layer at once, which takes an eighth of a second."""
_WORTHWHILE: Final = 0.25
"""If so large a share of the extents is overwritten, joining them saves the memory that it is for."""
_SAMPLES: Final = 64
"""So many extents of a layer, or a few more, tell how much of it is overwritten."""
_PATIENCE: Final = 16
_IDLE: Final = 128
"""If no more than one record in so many owns nothing, to leave them takes less time than memory."""
_CHANGES: Final = np.isin(np.arange(256), [int(op) for op in DATA_OPS])


_STARTS_END: Final = (1 << 32) - 1
_FARTHEST: Final = (1 << 63) - 1

Starts = NDArray[np.uint32] | NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Layer:
    """Disjoint extents in order of offset, and their owners in order of seq: ``counts`` tells how many are of each source.

    An extent begins at its start times ``1 << shift`` bytes; ``lengths`` are bytes, ``owners`` the records' numbers.
    """

    starts: Starts
    shift: int
    lengths: NDArray[np.uint32]
    owners: NDArray[np.uint32]
    records: Owners
    counts: Sequence[int]

    @classmethod
    def of(cls, extents: Extents, records: Owners, counts: Sequence[int]) -> Self:
        """The layer of these extents."""
        starts, lengths, owners = extents
        shift = unit_shift(starts)
        if len(starts) and int(starts[-1]) >> shift >= _STARTS_END:
            return cls(starts, 0, lengths, owners, records, counts)
        return cls((starts >> shift).astype(np.uint32), shift, lengths, owners, records, counts)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def extents(self) -> Extents:
        """All of them."""
        return self.offsets(slice(None)), self.lengths, self.owners

    def offsets(self, chosen: slice | NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the chosen extents begin, bytes."""
        offsets: NDArray[np.int64] = self.starts[chosen].astype(np.int64)
        offsets <<= self.shift
        return offsets

    def clipped(self, low: int, high: int) -> Extents:
        """The parts of extents that lie in [low, high)."""
        first = self._up_to(low)
        if first and self._end(first - 1) > low:
            first -= 1
        last = max(first, self._up_to(high - 1))
        starts, lengths, owners = self.offsets(slice(first, last)), self.lengths[first:last], self.owners[first:last]
        if first < last and (int(starts[0]) < low or self._end(last - 1) > high):
            ends = np.minimum(starts + lengths, high)
            starts = np.maximum(starts, low)
            lengths = (ends - starts).astype(np.uint32)
        return starts, lengths, owners

    def covers(self, offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether an extent has each of these bytes of the disk."""
        if not len(self):
            return np.zeros(len(offsets), np.bool_)
        units = np.minimum(offsets >> self.shift, self._farthest).astype(self.starts.dtype)
        at = self.starts.searchsorted(units, side="right") - 1
        covered: NDArray[np.bool_] = (at >= 0) & (self.offsets(at) + self.lengths[at] > offsets)
        return covered

    def _up_to(self, offset: int) -> int:
        """How many begin at ``offset`` or before."""
        if offset < 0:
            return 0
        # Of the array's own type: for another one the whole array would be converted.
        unit = self.starts.dtype.type(min(offset >> self.shift, self._farthest))
        return int(self.starts.searchsorted(unit, side="right"))

    @property
    def _farthest(self) -> int:
        return _STARTS_END if self.starts.dtype == np.uint32 else _FARTHEST

    def _end(self, at: int) -> int:
        return (int(self.starts[at]) << self.shift) + int(self.lengths[at])


def effective(rows: Columns, disk: int, last_seq: int, voided: NDArray[np.uint64] | None = None) -> NDArray[np.bool_]:
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


def owners_of(rows: Columns, chosen: NDArray[np.bool_], name: str) -> Owners:
    """The data records among one source's rows that are ``chosen``, as owners; ``name`` names the source."""
    every = bool(chosen.all())

    def of(field: str) -> NDArray[Any]:
        return rows[field] if every else rows[field][chosen]

    owners = np.empty(np.count_nonzero(chosen), OWNER)
    for field in ("offset", "xxh3", "length"):
        owners[field] = of(field)
    positions = of("position")
    if len(positions) and int(positions.max()) >= ZEROES * fmt.ALIGNMENT:
        raise CorruptionError(f"{name}: a payload at {int(positions.max())} is farther in than any source is long")
    owners["place"] = np.where(of("op") == fmt.Op.WRITE, positions // fmt.ALIGNMENT, ZEROES)
    return owners


def layer_of(parts: Sequence[Owners]) -> Layer:
    """The layer that the records of some sources make, all in order of seq and nothing voided among them."""
    records: Owners = np.concatenate([part.view(np.uint64) for part in parts]).view(OWNER)
    return _of_use(last_writers(records["offset"], records["length"]), records, [len(part) for part in parts])


def joined(layers: Sequence[Layer]) -> Layer:
    """Layers, the oldest first, as one."""
    firsts = np.cumsum([0, *(len(layer.records) for layer in layers)])
    starts, lengths, numbers = last_writers(
        np.concatenate([layer.offsets(slice(None)) for layer in layers]),
        np.concatenate([layer.lengths for layer in layers]),
        in_runs=True,
    )
    owners = np.concatenate([layer.owners + np.uint32(first) for layer, first in zip(layers, firsts, strict=False)])
    records: Owners = np.concatenate([layer.records.view(np.uint64) for layer in layers]).view(OWNER)
    return _of_use((starts, lengths, owners[numbers]), records, [count for layer in layers for count in layer.counts])


def _of_use(extents: Extents, records: Owners, counts: Sequence[int]) -> Layer:
    """The layer of these extents, without the records that own nothing, unless those are very few."""
    starts, lengths, owners = extents
    used = np.zeros(len(records), np.bool_)
    used[owners] = True
    if np.count_nonzero(used) >= len(used) - len(used) // _IDLE:
        return Layer.of(extents, records, counts)
    numbers = np.cumsum(used, dtype=np.uint32) - np.uint32(1)
    borders = np.cumsum([0, *counts]).tolist()
    left = [int(np.count_nonzero(used[low:high])) for low, high in pairwise(borders)]
    # Words are taken four times as quickly as a row of fields.
    kept = records.view(np.uint64).reshape(-1, 3).take(np.flatnonzero(used), axis=0)
    return Layer.of((starts, lengths, numbers[owners]), kept.reshape(-1).view(OWNER), left)


class Layers:
    """Gathers layers, the oldest first: whole ones, and between them records by source.

    Many short sorts are quicker than a long one, and few records of a stretch overlap. What is overwritten again and again must not
    take memory each time: now and then all layers are joined, seldom if that leaves most extents.
    """

    def __init__(self) -> None:
        self._made: list[Layer] = []
        self._pending: list[Owners] = []
        self._apart = 0
        """Extents since the layers were joined last."""
        self._apart_max = JOINED_EXTENTS

    def add(self, part: Owners) -> None:
        """The records of the next source, in order of seq."""
        self._pending.append(part)
        if sum(map(len, self._pending)) >= LAYER_RECORDS:
            self._settle()

    def put(self, layer: Layer) -> None:
        """What the next sources made of the disk."""
        self._settle()
        self._keep(layer)

    def finish(self) -> list[Layer]:
        """All of them; one if they are small."""
        self._settle()
        if len(self._made) > 1 and _extents(self._made) <= JOINED_EXTENTS:
            return [joined(self._made)]
        return self._made

    def _settle(self) -> None:
        if self._pending:
            self._keep(layer_of(self._pending))
            self._pending = []

    def _keep(self, layer: Layer) -> None:
        self._made.append(layer)
        self._apart += len(layer)
        if self._apart >= self._apart_max and len(self._made) > 1:
            self._apart = 0
            if _overwritten(self._made) < _WORTHWHILE:
                self._apart_max = _extents(self._made) * _PATIENCE
                return
            self._made = [joined(self._made)]
            self._apart_max = max(_extents(self._made), JOINED_EXTENTS)


def _overwritten(layers: Sequence[Layer]) -> float:
    """Which share of the extents a newer layer has overwritten, judged by some of them."""
    looked_at = 0
    hidden = 0
    for at, layer in enumerate(layers):
        some = layer.offsets(slice(None, None, max(len(layer) // _SAMPLES, 1)))
        covered = np.zeros(len(some), np.bool_)
        for newer in layers[at + 1 :]:
            covered |= newer.covers(some)
        looked_at += len(some)
        hidden += int(np.count_nonzero(covered))
    return hidden / max(looked_at, 1)


def _extents(layers: Sequence[Layer]) -> int:
    return sum(map(len, layers))
