"""Records' payloads, straight into the buffer of whoever reads the disk, every byte verified whenever it is read.

Records that are neighbours in a segment are read at once. Of a long record a reader may want only a little, and its checksum
is the whole payload's: so checksums of its blocks are kept from the first such read on, which verifies the whole.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_64_intdigest

from vmrewind.history.cache import Lru
from vmrewind.history.index import ZEROES, Index, Piece
from vmrewind.history.records import RunRecords
from vmrewind.history.sources import LocalSource, Source
from vmrewind.journal.format import ALIGNMENT

_BLOCK: Final = 4096
_SHORT: Final = 4 * _BLOCK
"""To read and verify the whole of such a payload costs no more than to look for checksums of its blocks."""
_SUMS_BYTES_MAX: Final = 16 << 20
"""Of 64 KiB records, some 2 GiB."""
_SUMS_OVERHEAD_BYTES: Final = 256
_PAYLOADS_BYTES_MAX: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an indexed row's payload is had from."""

    records: RunRecords
    source: Source
    disk: int


class Payloads:
    """The payloads of a view's records. Used from several threads."""

    def __init__(self, index: Index, origins: Sequence[Origin]) -> None:
        self._index = index
        self._origins = origins
        self._sources = [origin.source for origin in origins]
        self._source_ends = index.source_ends
        self._sums: Lru[array[int]] = Lru(_SUMS_BYTES_MAX, lambda sums: 8 * len(sums) + _SUMS_OVERHEAD_BYTES)
        self._kept: Lru[bytes] = Lru(_PAYLOADS_BYTES_MAX, len)

    def get(self, owner: int) -> bytes:
        """A record's whole payload; raises RepositoryError, CorruptionError."""
        _, xxh3, length, place = self._index.record(owner)
        origin = self._origins[bisect_right(self._source_ends, owner)]
        return origin.records.payload(origin.source, origin.disk, None, place * ALIGNMENT, length, xxh3)

    def fill(self, buffer: memoryview, at: int, pieces: Sequence[Piece]) -> None:
        """Write what the pieces give into a buffer whose first byte is the disk's byte ``at``. Raises as ``get`` does."""
        run: list[Piece] = []
        segment: Source | None = None
        run_position = run_end = 0
        for piece in pieces:
            start, end, owner, _, _, length, place = piece
            if place == ZEROES:
                buffer[start - at : end - at] = bytes(end - start)
                continue
            source = self._sources[bisect_right(self._source_ends, owner)]
            if end - start != length:
                self._fill_part(buffer[start - at : end - at], piece, source)
                continue
            if start != run_end or place * ALIGNMENT != run_position or source is not segment:
                if run:
                    self._fill_run(buffer, at, run, segment)
                run, segment = [], source
                run_position = place * ALIGNMENT
            run.append(piece)
            run_position += length
            run_end = end
        if run:
            self._fill_run(buffer, at, run, segment)

    def _fill_run(self, buffer: memoryview, at: int, run: Sequence[Piece], source: Source | None) -> None:
        """Of whole records that are neighbours on the disk and in their source."""
        together = buffer[run[0][0] - at : run[-1][1] - at]
        here = isinstance(source, LocalSource) and source.read_into(run[0][6] * ALIGNMENT, together)
        begin = 0
        for _, _, owner, _, xxh3, length, _ in run:
            part = together if len(run) == 1 else together[begin : begin + length]
            if not here or xxh3_64_intdigest(part) != xxh3:
                part[:] = self.get(owner)
            begin += length

    def _fill_part(self, part: memoryview, piece: Piece, source: Source) -> None:
        start, end, owner, offset, xxh3, length, place = piece
        low, high = start - offset, end - offset
        if not isinstance(source, LocalSource):
            # What is far away, or has to be unpacked, is kept.
            part[:] = memoryview(self._kept.get(owner, lambda: self.get(owner)))[low:high]
            return
        if length <= _SHORT:
            payload = bytearray(length)
            if not source.read_into(place * ALIGNMENT, memoryview(payload)) or xxh3_64_intdigest(payload) != xxh3:
                payload[:] = self.get(owner)
            part[:] = memoryview(payload)[low:high]
            return
        sums = self._sums.get(owner, lambda: _sums(self.get(owner)))
        first = low // _BLOCK
        begin, stop = first * _BLOCK, min(-(-high // _BLOCK) * _BLOCK, length)
        blocks = part if (begin, stop) == (low, high) else memoryview(bytearray(stop - begin))
        whole = source.read_into(place * ALIGNMENT + begin, blocks)
        if not whole or any(
            xxh3_64_intdigest(blocks[number * _BLOCK : (number + 1) * _BLOCK]) != sums[first + number]
            for number in range(-(-len(blocks) // _BLOCK))
        ):
            blocks[:] = memoryview(self.get(owner))[begin:stop]
        if blocks is not part:
            part[:] = blocks[low - begin : high - begin]


def _sums(payload: bytes) -> array[int]:
    blocks = memoryview(payload)
    return array("Q", (xxh3_64_intdigest(blocks[at : at + _BLOCK]) for at in range(0, len(payload), _BLOCK)))
