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
from vmrewind.history.gathering import PAD_SIZE, PARTS_MAX, gather
from vmrewind.history.index import Index, Piece
from vmrewind.history.layers import ZEROES
from vmrewind.history.records import RunRecords
from vmrewind.history.sources import LocalSource, Source
from vmrewind.journal.format import ALIGNMENT

_BLOCK: Final = 4096
_SHORT: Final = 4 * _BLOCK
"""To read and verify the whole of such a payload costs no more than to look for checksums of its blocks, and copying it once more
less than a read of its own."""
_EXPECTED: Final = 32
"""So many times after storage was read the kernel is first told of all that will be: it would wait for one part after another."""
_SUMS_BYTES_MAX: Final = 16 << 20
"""Of 64 KiB records, some 2 GiB."""
_SUMS_OVERHEAD_BYTES: Final = 256
_PAYLOADS_BYTES_MAX: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an indexed row's payload is had from: the part of a source, as it was then, that has seqs in [first, last]."""

    records: RunRecords
    source: Source
    disk: int
    first: int
    last: int


class Payloads:
    """The payloads of a view's records. Used from several threads."""

    def __init__(self, index: Index, origins: Sequence[Origin]) -> None:
        self._index = index
        self._origins = origins
        self._sources = [origin.source for origin in origins]
        self._source_ends = index.source_ends
        self._sums: Lru[array[int]] = Lru(_SUMS_BYTES_MAX, lambda sums: 8 * len(sums) + _SUMS_OVERHEAD_BYTES)
        self._expected = _EXPECTED
        self._kept: Lru[bytes] = Lru(_PAYLOADS_BYTES_MAX, len)

    def get(self, owner: int) -> bytes:
        """A record's whole payload; raises RepositoryError, CorruptionError."""
        _, xxh3, length, place = self._index.record(owner)
        origin = self._origins[bisect_right(self._source_ends, owner)]
        return origin.records.payload(origin.source, origin.disk, (origin.first, origin.last), place * ALIGNMENT, length, xxh3)

    def fill(self, buffer: memoryview, at: int, pieces: Sequence[Piece]) -> None:
        """Write what the pieces give into a buffer whose first byte is the disk's byte ``at``. Raises as ``get`` does."""
        ends, sources = self._source_ends, self._sources
        short: list[Piece] = []
        parts: list[memoryview] = []
        room = PAD_SIZE
        several = len(pieces) > 1
        run: list[Piece] = []
        run_source: Source | None = None
        run_position = run_end = 0
        for piece in pieces:
            start, end, owner, _, _, length, place = piece
            if place == ZEROES:
                buffer[start - at : end - at] = bytes(end - start)
                continue
            source = sources[bisect_right(ends, owner)]
            position = place * ALIGNMENT
            if several and length <= _SHORT and isinstance(source, LocalSource) and (content := source.mapped):
                if length > room or len(parts) == PARTS_MAX:
                    self._fill_short(buffer, at, short, parts)
                    short, parts, room = [], [], PAD_SIZE
                short.append(piece)
                parts.append(content[position : position + length])
                room -= length
            elif end - start != length:
                self._fill_part(buffer[start - at : end - at], piece, source)
            else:
                if start != run_end or position != run_position or source is not run_source:
                    if run:
                        self._fill_run(buffer, at, run, run_source)
                    run, run_source = [], source
                run.append(piece)
                run_position, run_end = position + length, end
        if run:
            self._fill_run(buffer, at, run, run_source)
        if short:
            self._fill_short(buffer, at, short, parts)

    def _fill_short(self, buffer: memoryview, at: int, pieces: Sequence[Piece], parts: Sequence[memoryview]) -> None:
        """Of payloads, ``parts`` of mappings, that are read whole, whatever is wanted of them."""
        if self._expected:
            self._expected -= 1
            for _, _, owner, _, _, length, place in pieces:
                source = self._sources[bisect_right(self._source_ends, owner)]
                if isinstance(source, LocalSource):
                    source.expect(place * ALIGNMENT, length)
        gathered, cold = gather(parts)
        if cold:
            self._expected = _EXPECTED
        begin = 0
        for start, end, owner, offset, xxh3, length, _ in pieces:
            stop = begin + length
            payload = gathered[begin:stop]
            # If there is less of it, that does not match either.
            if xxh3_64_intdigest(payload) != xxh3:
                payload = memoryview(self.get(owner))
            buffer[start - at : end - at] = payload if end - start == length else payload[start - offset : end - offset]
            begin = stop

    def _fill_run(self, buffer: memoryview, at: int, run: Sequence[Piece], source: Source | None) -> None:
        """Of whole records that are neighbours on the disk and in their source."""
        first, last = run[0][0], run[-1][1]
        together = buffer[first - at : last - at]
        here = isinstance(source, LocalSource) and source.read_into(run[0][6] * ALIGNMENT, together)
        for start, end, owner, _, xxh3, _, _ in run:
            part = together[start - first : end - first]
            if not here or xxh3_64_intdigest(part) != xxh3:
                part[:] = self.get(owner)

    def _fill_part(self, part: memoryview, piece: Piece, source: Source) -> None:
        start, end, owner, offset, _, length, place = piece
        low, high = start - offset, end - offset
        if not isinstance(source, LocalSource):
            # What is far away, or has to be unpacked, is kept.
            part[:] = memoryview(self._kept.get(owner, lambda: self.get(owner)))[low:high]
            return
        if length <= _SHORT:
            part[:] = memoryview(self.get(owner))[low:high]
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
