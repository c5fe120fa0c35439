"""The index of a view: which record owns which bytes, the last writer winning, built from record tables alone.

It is made of layers, each disjoint in itself and newer than the one before. Where the disk is read, the layers' extents are
composed to one, region by region, and the regions that were used last are kept. So opening costs no more than the making of the
layers. It takes 16 bytes for an extent, and 24 for a record that owns any; the rest is looked up when it is needed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vmrewind.errors import CorruptionError
from vmrewind.history.cache import Lru
from vmrewind.history.painting import Extents, last_writers
from vmrewind.history.rows import DATA_OPS, Columns
from vmrewind.journal import format as fmt

OWNER: Final = np.dtype([("offset", "<i8"), ("xxh3", "<u8"), ("length", "<u4"), ("place", "<u4")])
"""A record that changes a disk, 24 bytes. ``place``: where its payload lies in its source, in units of 8 bytes; or ZEROES."""
Owners = NDArray[np.void]
"""An array of OWNER."""

EXTENT: Final = np.dtype([("start", "<i8"), ("length", "<u4"), ("owner", "<u4")])
"""Bytes of the disk and the number of the record that owns them."""

ZEROES: Final = (1 << 32) - 1

Piece = tuple[int, int, int, int, int, int, int]
"""Bytes of the disk and the record that owns them: (start, end, owner, offset, xxh3, length, place)."""

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
REGION_EXTENTS: Final = 1 << 14
"""So many extents of all layers are composed at a time: some 2 ms."""
_REGIONS_BYTES_MAX: Final = 32 << 20

_NO_STARTS: Final = np.empty(0, np.int64)
_NO_LENGTHS: Final = np.empty(0, np.uint32)
_LENGTH: Final = (1 << 32) - 1
_END: Final = 1 << 62
"""Behind the end of any disk."""
_CHANGES: Final = np.isin(np.arange(256), [int(op) for op in DATA_OPS])


@dataclass(frozen=True, slots=True)
class Layer:
    """Disjoint extents in order of offset, and their owners in order of seq: ``counts`` tells how many are of each source."""

    extents: Extents
    records: Owners
    counts: Sequence[int]


class Index:
    """Which record owns which bytes of a disk; the rest is the base's. Layers are given the oldest first.

    Owners are numbered through all layers.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        counts = np.array([len(layer.records) for layer in layers], np.int64)
        self._ends = np.cumsum(counts)
        self._firsts = self._ends - counts
        self._bounds = np.cumsum([count for layer in layers for count in layer.counts], dtype=np.int64)
        # For one at a time: bisect takes a tenth of what searchsorted does, and three words an eighth of what a row's fields do.
        self._layer_ends: list[int] = self._ends.tolist()
        self.source_ends: list[int] = self._bounds.tolist()
        self._words = [layer.records.view("<u8").reshape(-1, 3) for layer in layers]
        self._borders = _borders(layers)
        self._regions: Lru[Extents] = Lru(_REGIONS_BYTES_MAX, lambda extents: len(extents[0]) * EXTENT.itemsize)

    def __len__(self) -> int:
        """How many extents the layers have, those included of which a newer one leaves less, or nothing."""
        return sum(len(layer.extents[0]) for layer in self._layers)

    def within(self, offset: int, length: int) -> Iterator[Extents]:
        """The extents in a range, clipped to it, in order, by region."""
        end = offset + length
        first = int(np.searchsorted(self._borders, offset, side="right"))
        last = int(np.searchsorted(self._borders, end, side="left"))
        for number in range(first, last + 1):
            yield _clipped(self._region(number), offset, end)

    def whole(self) -> NDArray[np.void]:
        """All extents in order, as EXTENT."""
        starts, lengths, owners = self._compose(0, _END)
        found = np.empty(len(starts), EXTENT)
        found["start"], found["length"], found["owner"] = starts, lengths, owners
        return found

    def pieces(self, offset: int, length: int) -> list[Piece]:
        """What ``within`` gives, with the records: quicker where a reader asks for a little at a time."""
        end = offset + length
        first = last = 0
        if len(self._borders):
            first = int(self._borders.searchsorted(offset, side="right"))
            last = int(self._borders.searchsorted(end, side="left"))
        found: list[Piece] = []
        for number in range(first, last + 1):
            starts, lengths, owners = self._region(number)
            # The one in front may reach into the range.
            low = max(int(starts.searchsorted(offset, side="right")) - 1, 0)
            high = int(starts.searchsorted(end, side="left"))
            columns = starts[low:high].tolist(), lengths[low:high].tolist(), owners[low:high].tolist()
            found += [
                (start, start + size, owner, at, xxh3, rest & _LENGTH, rest >> 32)
                for start, size, owner, (at, xxh3, rest) in zip(*columns, self._rows(owners[low:high]), strict=True)
                if start + size > offset
            ]
        if found:
            found[0] = (max(found[0][0], offset), *found[0][1:])
            found[-1] = (found[-1][0], min(found[-1][1], end), *found[-1][2:])
        return found

    def record(self, owner: int) -> tuple[int, int, int, int]:
        """(offset, xxh3, length, place) of an owner."""
        offset, xxh3, rest = self._row(owner)
        return offset, xxh3, rest & _LENGTH, rest >> 32

    def _row(self, owner: int) -> list[int]:
        layer = bisect_right(self._layer_ends, owner)
        # Counted from the layer's end: negative.
        row: list[int] = self._words[layer][owner - self._layer_ends[layer]].tolist()
        return row

    def _rows(self, owners: NDArray[np.uint32]) -> list[list[int]]:
        if len(self._words) != 1:
            return [self._row(owner) for owner in owners.tolist()]
        rows: list[list[int]] = self._words[0].take(owners, axis=0).tolist()
        return rows

    def records(self, owners: NDArray[np.uint32]) -> Owners:
        """The same of many, as OWNER."""
        found = np.empty(len(owners), OWNER)
        layers = np.searchsorted(self._ends, owners, side="right")
        for number in np.unique(layers).tolist():
            chosen = layers == number
            found[chosen] = self._layers[number].records[owners[chosen] - self._firsts[number]]
        return found

    def sources(self, owners: NDArray[np.uint32] | int) -> NDArray[np.int64]:
        """The number of each owner's source."""
        return np.searchsorted(self._bounds, owners, side="right")

    def _region(self, number: int) -> Extents:
        if len(self._layers) == 1:
            return self._layers[0].extents
        low = int(self._borders[number - 1]) if number else 0
        high = int(self._borders[number]) if number < len(self._borders) else _END
        return self._regions.get(number, lambda: self._compose(low, high))

    def _compose(self, low: int, high: int) -> Extents:
        parts = [_clipped(layer.extents, low, high) for layer in self._layers]
        starts = np.concatenate([_NO_STARTS, *(part[0] for part in parts)])
        lengths = np.concatenate([_NO_LENGTHS, *(part[1] for part in parts)])
        numbered = (part[2] + np.uint32(first) for part, first in zip(parts, self._firsts, strict=True))
        owners = np.concatenate([_NO_LENGTHS, *numbered])
        if len(parts) == 1:
            return starts, lengths, owners
        starts, lengths, numbers = last_writers(starts, lengths, in_runs=True)
        return starts, lengths, owners[numbers]


def _borders(layers: Sequence[Layer]) -> NDArray[np.int64]:
    """Where to cut the disk so that a region has some REGION_EXTENTS of all layers' extents; one layer is not cut."""
    if len(layers) < 2:
        return _NO_STARTS
    # Of every layer so many that all together tell of REGION_EXTENTS, however they lie.
    step = max(REGION_EXTENTS // len(layers), 1)
    samples = np.sort(np.concatenate([layer.extents[0][::step] for layer in layers]))
    return np.unique(samples[:: max(REGION_EXTENTS // step, 1)])[1:]


def _clipped(extents: Extents, low: int, high: int) -> Extents:
    """The parts of extents that lie in [low, high)."""
    starts, lengths, owners = extents
    first = int(np.searchsorted(starts, low, side="right"))
    if first and int(starts[first - 1]) + int(lengths[first - 1]) > low:
        first -= 1
    last = max(first, int(np.searchsorted(starts, high, side="left")))
    starts, lengths, owners = starts[first:last], lengths[first:last], owners[first:last]
    if first < last and (int(starts[0]) < low or int(starts[-1]) + int(lengths[-1]) > high):
        ends = np.minimum(starts + lengths, high)
        starts = np.maximum(starts, low)
        lengths = (ends - starts).astype(np.uint32)
    return starts, lengths, owners


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
        np.concatenate([layer.extents[0] for layer in layers]),
        np.concatenate([layer.extents[1] for layer in layers]),
        in_runs=True,
    )
    owners = np.concatenate([layer.extents[2] + np.uint32(first) for layer, first in zip(layers, firsts, strict=False)])
    records: Owners = np.concatenate([layer.records.view(np.uint64) for layer in layers]).view(OWNER)
    return _of_use((starts, lengths, owners[numbers]), records, [count for layer in layers for count in layer.counts])


def _of_use(extents: Extents, records: Owners, counts: Sequence[int]) -> Layer:
    """The layer of these extents, without the records that own nothing, unless those are very few."""
    starts, lengths, owners = extents
    used = np.zeros(len(records), np.bool_)
    used[owners] = True
    if np.count_nonzero(used) >= len(used) - len(used) // _IDLE:
        return Layer(extents, records, counts)
    numbers = np.cumsum(used, dtype=np.uint32) - np.uint32(1)
    borders = np.cumsum([0, *counts]).tolist()
    left = [int(np.count_nonzero(used[low:high])) for low, high in pairwise(borders)]
    # Words are taken four times as quickly as a row of fields.
    kept = records.view(np.uint64).reshape(-1, 3).take(np.flatnonzero(used), axis=0)
    return Layer((starts, lengths, numbers[owners]), kept.reshape(-1).view(OWNER), left)


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
        self._apart += len(layer.extents[0])
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
        starts = layer.extents[0][:: max(len(layer.extents[0]) // _SAMPLES, 1)]
        seen = np.ones(len(starts), np.bool_)
        for newer_starts, newer_lengths, _ in (newer.extents for newer in layers[at + 1 :] if len(newer.extents[0])):
            above = newer_starts.searchsorted(starts, side="right") - 1
            seen &= (above < 0) | (newer_starts[above] + newer_lengths[above] <= starts)
        looked_at += len(seen)
        hidden += len(seen) - int(np.count_nonzero(seen))
    return hidden / max(looked_at, 1)


def _extents(layers: Sequence[Layer]) -> int:
    return sum(len(layer.extents[0]) for layer in layers)
