"""The index of a view: which record owns which bytes, the last writer winning, built from record tables alone.

It is made of layers, each disjoint in itself and newer than the one before. Where the disk is read, the layers' extents are
composed to one, region by region, and the regions that were used last are kept. So opening costs no more than the making of the
layers. It takes 12 bytes for an extent, 16 where sectors do not tell its place, and 24 for a record that owns any; the rest is
looked up when it is needed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vmrewind.history.cache import Lru
from vmrewind.history.layers import OWNER, Layer, Owners
from vmrewind.history.painting import Extents, last_writers

EXTENT: Final = np.dtype([("start", "<i8"), ("length", "<u4"), ("owner", "<u4")])
"""Bytes of the disk and the number of the record that owns them."""

Piece = tuple[int, int, int, int, int, int, int]
"""Bytes of the disk and the record that owns them: (start, end, owner, offset, xxh3, length, place)."""

REGION_EXTENTS: Final = 1 << 12
"""So many extents of all layers are composed at a time: of forty layers in 1 ms, which goes into layers more than into extents."""
_REGIONS_BYTES_MAX: Final = 8 << 20

_NO_STARTS: Final = np.empty(0, np.int64)
_NO_LENGTHS: Final = np.empty(0, np.uint32)
_LENGTH: Final = (1 << 32) - 1
_END: Final = 1 << 62
"""Behind the end of any disk."""


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
        return sum(map(len, self._layers))

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
        low = int(self._borders[number - 1]) if number else 0
        high = int(self._borders[number]) if number < len(self._borders) else _END
        return self._regions.get(number, lambda: self._compose(low, high))

    def _compose(self, low: int, high: int) -> Extents:
        parts = [layer.clipped(low, high) for layer in self._layers]
        starts = np.concatenate([_NO_STARTS, *(part[0] for part in parts)])
        lengths = np.concatenate([_NO_LENGTHS, *(part[1] for part in parts)])
        numbered = (part[2] + np.uint32(first) for part, first in zip(parts, self._firsts, strict=True))
        owners = np.concatenate([_NO_LENGTHS, *numbered])
        if len(parts) == 1:
            return starts, lengths, owners
        starts, lengths, numbers = last_writers(starts, lengths, in_runs=True)
        return starts, lengths, owners[numbers]


def _borders(layers: Sequence[Layer]) -> NDArray[np.int64]:
    """Where to cut the disk so that a region has some REGION_EXTENTS of all layers' extents."""
    if not layers:
        return _NO_STARTS
    # Of every layer so many that all together tell of REGION_EXTENTS, however they lie.
    step = max(REGION_EXTENTS // len(layers), 1)
    samples = np.sort(np.concatenate([layer.offsets(slice(None, None, step)) for layer in layers]))
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
