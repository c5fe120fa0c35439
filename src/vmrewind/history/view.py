"""A disk as it was at a moment, composed on demand from a base and the records since, every byte verified on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from vmrewind.errors import CorruptionError, MomentError
from vmrewind.history.cache import Lru
from vmrewind.history.history import History
from vmrewind.history.index import Index
from vmrewind.history.layers import ZEROES, Layer, Layers, effective, owners_of
from vmrewind.history.merged import MergedTable
from vmrewind.history.payloads import Origin, Payloads
from vmrewind.history.records import Piece, RunRecords, with_columns
from vmrewind.history.sources import DamagedObject, LocalSource, Source
from vmrewind.history.stretches import VOID_DISTANCE_MAX
from vmrewind.journal import format as fmt
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import DiskInfo, Position
from vmrewind.repository.manifest import Manifest

_CHUNKS_BYTES_MAX: Final = 64 << 20
_FEW: Final = 1024


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of the disk, bytes; ``zero``: known to read as zeroes without reading it."""

    offset: int
    length: int
    zero: bool


class View:
    """One disk at one position. Read-only; may be used from several threads. Valid while its history is open.

    ``size``: bytes; ``base_id``: the base that it is made of.
    """

    def __init__(
        self, history: History, info: DiskInfo, position: Position, manifest: Manifest, index: Index, origins: list[Origin]
    ) -> None:
        self._history = history
        self._manifest = manifest
        self._index = index
        self._origins = origins
        self._chunks: Lru[bytes | memoryview] = Lru(_CHUNKS_BYTES_MAX, len)
        self._payloads = Payloads(index, origins)
        self.disk = info
        self.size = info.size
        self.position = position
        self.base_id = manifest.id

    @classmethod
    def open(cls, history: History, target: str, position: Position) -> Self:
        """Compose the view. Raises MomentError if the position is not covered, RepositoryError and CorruptionError for what
        cannot be read."""
        try:
            return history.retrying(lambda: cls._open(history, target, position))
        finally:
            history.forget_tables()

    @classmethod
    def _open(cls, history: History, target: str, position: Position) -> Self:
        branch = history.branch_of_run(position.run)
        wanted = branch.legs[-1].info.disk(target)
        if wanted is None:
            raise MomentError(f"run {run_name(position.run)} had no disk {target}", "vmrewind timeline tells which disks it had")
        legs: list[tuple[RunRecords, int, int, int]] = []
        last = position.seq
        for leg in reversed(branch.legs):
            info = leg.info
            disk = info.disk(target)
            if disk is None:
                raise MomentError(f"disk {target} was not protected in run {run_name(info.run)}")
            records = history.records(info.run)
            for hole in records.holes(disk.index, info.first_seq, last):
                raise MomentError(f"disk {target} cannot be restored to record {position.seq}: {hole.cause}")
            legs.append((records, disk.index, info.first_seq, last))
            if target in info.bases and (target in info.gaps or history.base_problem(info, target) is None):
                manifest = history.manifest(info, target)
                break
            if info.parent is None:
                raise MomentError(f"disk {target} has no base for run {run_name(info.run)}")
            if target in info.gaps and records.gap_closed(disk.index, info.first_seq, last) is None:
                raise MomentError(f"disk {target}, run {run_name(info.run)}: {info.gaps[target].cause}; not resynced by then")
            last = info.parent.seq
        else:
            raise MomentError(f"disk {target} has no base on the branch of run {run_name(position.run)}")
        layers, origins = _layers(legs[::-1])
        return cls(history, wanted, position, manifest, Index(layers), origins)

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on, within the disk. Raises CorruptionError, RepositoryError."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the disk's bytes from ``offset`` on. Raises as ``read`` does."""
        length = len(buffer)
        if offset < 0 or offset + length > self.size:
            raise ValueError(f"bytes {offset}+{length} of a disk of {self.size}")
        pieces = self._index.pieces(offset, length)
        at = offset
        for piece in pieces:
            if piece[0] > at:
                self._read_base(buffer, offset, at, piece[0])
            at = piece[1]
        if at < offset + length:
            self._read_base(buffer, offset, at, offset + length)
        self._payloads.fill(buffer, offset, pieces)

    def base_pieces(self) -> Iterator[tuple[str, int, list[tuple[int, int]]]]:
        """(chunk id, its offset on the disk, the parts [start, end) of the disk that it gives) of every chunk that gives any."""
        size = self._manifest.chunk_size
        for number, chunk_id in enumerate(self._manifest.chunks):
            start, end = number * size, min((number + 1) * size, self._manifest.size, self.size)
            if chunk_id is not None and (free := list(self._uncovered(start, end))):
                yield chunk_id, start, free

    def _uncovered(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of [start, end) that no record owns."""
        at = start
        for low, high, _ in self._extents(start, max(end - start, 0)):
            if low > at:
                yield at, low
            at = high
        if at < end:
            yield at, end

    def read_chunk(self, chunk_id: str) -> bytes | memoryview:
        """A chunk of the base, verified; raises RepositoryError, CorruptionError."""
        repository = self._history.reachable_repository(f"base {self._manifest.id} of disk {self.disk.target}")
        return repository.read_chunk(chunk_id)

    def written_extents(self) -> Iterator[tuple[Source, NDArray[np.void]]]:
        """The extents (as index.EXTENT) that records' payloads give, by source, in the order in which they lie there."""
        extents = self._index.whole()
        places = self._index.records(extents["owner"])["place"]
        chosen = (places != ZEROES) & (extents["start"] < self.size)
        extents, places = extents[chosen], places[chosen]
        sources = self._index.sources(extents["owner"])
        order = np.lexsort((places, sources))
        extents, sources = extents[order], sources[order]
        borders = np.flatnonzero(np.diff(sources)) + 1
        for first, last in pairwise([0, *borders.tolist(), len(extents)]):
            if last > first:
                yield self._origins[int(sources[first])].source, extents[first:last]

    def parts(
        self, extents: NDArray[np.void], fetched: Callable[[int, int], bytes | memoryview | None] = lambda *_: None
    ) -> list[tuple[int, bytes | memoryview]]:
        """(offset, bytes) of extents of one source. ``fetched(position, length)`` gives payloads that are here already, or None."""
        records = self._index.records(extents["owner"]).tolist()
        parts: list[tuple[int, bytes | memoryview]] = []
        last_owner, payload = -1, memoryview(b"")
        for (start, size, owner), (offset, xxh3, length, place) in zip(extents.tolist(), records, strict=True):
            if owner != last_owner:
                here = fetched(place * fmt.ALIGNMENT, length)
                if here is None or xxhash.xxh3_64_intdigest(here) != xxh3:
                    here = self._payloads.get(owner)
                payload = memoryview(here)
                last_owner = owner
            parts.append((start, payload[start - offset : min(start + size, self.size) - offset]))
        return parts

    def places(self, extents: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(begin, end) of the payloads that extents are parts of, in the source."""
        records = self._index.records(extents["owner"])
        starts = records["place"].astype(np.int64) * fmt.ALIGNMENT
        return starts, starts + records["length"]

    @property
    def data_bytes(self) -> int:
        """How many bytes ``read_whole`` yields of it."""
        extents = self._index.whole()
        written = extents[self._index.records(extents["owner"])["place"] != ZEROES]
        ends = written["start"] + written["length"]
        total = int((np.minimum(ends, self.size) - np.minimum(written["start"], self.size)).sum())
        held = np.flatnonzero([chunk_id is not None for chunk_id in self._manifest.chunks])
        lows = held * self._manifest.chunk_size
        highs = np.minimum(lows + self._manifest.chunk_size, min(self._manifest.size, self.size))
        lows = np.minimum(lows, highs)
        return total + int((highs - lows - (_owned_before(extents, highs) - _owned_before(extents, lows))).sum())

    def untouched_chunk(self, number: int) -> tuple[str | None] | None:
        """The base's chunk id (None: zeroes), in a tuple, if no record since has touched that piece of the disk; else None."""
        size = self._manifest.chunk_size
        if number >= len(self._manifest.chunks) or next(iter(self._extents(number * size, size)), None) is not None:
            return None
        return (self._manifest.chunks[number],)

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Extents that cover a range (default: the disk) in order, neighbours of one kind joined."""
        end = self.size if length is None else min(offset + length, self.size)
        first = last = offset
        kind: bool | None = None
        for start, stop, zero in self._kinds(offset, end):
            if zero != kind:
                if kind is not None:
                    yield Extent(first, last - first, kind)
                first, kind = start, zero
            last = stop
        if kind is not None:
            yield Extent(first, last - first, kind)

    def _kinds(self, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(start, end, whether it is known to read as zeroes)."""
        at = offset
        for starts, lengths, owners in self._index.within(offset, end - offset):
            # A few at a time: whoever asks for the state of a large disk may want the first extent only.
            for few in (slice(low, low + _FEW) for low in range(0, len(starts), _FEW)):
                zeroes = self._index.records(owners[few])["place"] == ZEROES
                stops = (starts[few] + lengths[few]).tolist()
                for start, stop, zero in zip(starts[few].tolist(), stops, zeroes.tolist(), strict=True):
                    if start > at:
                        yield from self._base_kinds(at, start)
                    yield start, stop, zero
                    at = stop
        yield from self._base_kinds(at, end)

    def _base_kinds(self, at: int, end: int) -> Iterator[tuple[int, int, bool]]:
        size = self._manifest.chunk_size
        while at < end:
            if at >= self._manifest.size:
                yield at, end, True
                return
            number = at // size
            stop = min(end, (number + 1) * size, self._manifest.size)
            yield at, stop, self._manifest.chunks[number] is None
            at = stop

    def _extents(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, owner) of the indexed extents within a range, clipped to it."""
        for starts, lengths, owners in self._index.within(offset, length):
            yield from zip(starts.tolist(), (starts + lengths).tolist(), owners.tolist(), strict=True)

    def _read_base(self, buffer: memoryview, origin: int, start: int, end: int) -> None:
        for low, high, zero in self._base_kinds(start, end):
            at = low - origin
            if zero:
                buffer[at : at + high - low] = bytes(high - low)
                continue
            number, within = divmod(low, self._manifest.chunk_size)
            chunk = self._chunks.get(number, lambda number=number: self._chunk(number))  # type: ignore[misc]
            buffer[at : at + high - low] = memoryview(chunk)[within : within + high - low]

    def _chunk(self, number: int) -> bytes | memoryview:
        chunk_id = self._manifest.chunks[number]
        assert chunk_id is not None, "zero chunks are not read"
        return self.read_chunk(chunk_id)


def _layers(legs: Sequence[tuple[RunRecords, int, int, int]]) -> tuple[list[Layer], list[Origin]]:
    """What (records, disk, first seq, last seq) of each leg changed, and where the layers' records come from."""
    origins: list[Origin] = []
    layers = Layers()
    for records, disk, first, last in legs:
        notes = list(records.notes(disk, first, last + VOID_DISTANCE_MAX))
        voided = np.concatenate([np.empty(0, np.uint64), *(rows["offset"][rows["op"] == fmt.Op.VOID] for rows in notes)])
        for table, pieces in records.stretches(disk, first, last):
            origins += [Origin(records, piece.source, disk, piece.first, piece.last) for piece in pieces]
            if table is not None:
                layers.put(_merged(table, pieces, disk))
                continue
            for piece, columns in with_columns(pieces, first, last):
                layers.add(owners_of(columns, effective(columns, disk, last, voided), piece.source.name))
    return layers.finish(), origins


def _merged(table: MergedTable, pieces: Sequence[Piece], disk: int) -> Layer:
    try:
        return table.layer(disk)
    except CorruptionError as error:
        table.discard()
        source = pieces[0].source
        assert isinstance(source, LocalSource), "only segments have merged tables"
        raise DamagedObject(source, error) from error


def _owned_before(extents: NDArray[np.void], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many bytes in front of each offset belong to records."""
    starts = np.append(extents["start"], np.iinfo(np.int64).max)
    lengths = np.append(extents["length"], np.uint32(0)).astype(np.int64)
    before = np.cumsum(lengths) - lengths
    at = np.searchsorted(starts, offsets)
    # The extent in front may reach beyond the offset.
    last = np.maximum(at - 1, 0)
    reach = np.where(at > 0, starts[last] + lengths[last] - offsets, 0)
    owned: NDArray[np.int64] = before[at] - np.maximum(reach, 0)
    return owned
