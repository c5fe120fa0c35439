"""Reading several views whole, as a restore does: whatever they stand on is fetched once, several requests at a time.

Disks share objects: a chunk of equal content, a segment that holds the records of all of them. So the views are read together:
first each chunk that a base still gives anything of, for every place where it is; then each source of records from its beginning to
its end, for all disks, however the writes were scattered over them. Of a shipped segment the frames that are needed are had by one
request, or by a few where much lies between them that nobody needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vmrewind.errors import CorruptionError
from vmrewind.history.sources import ShippedSource, Source
from vmrewind.history.view import View
from vmrewind.repository.segment import FRAME_SIZE

_READERS: Final = 6
"""Threads that fetch, decompress and verify; all of it releases the interpreter's lock."""
_READ_AHEAD: Final = 8
"""So many tasks, each a chunk or a stretch of a segment's 8 MiB, are begun or done and not yet taken: that bounds the memory."""
_TASK_BYTES: Final = 4 << 20
_FRAMES_APART: Final = 4
"""So many frames that nobody needs cost less than another request."""

Part = tuple[int, int, bytes | memoryview]
"""(number of the view, offset on its disk, bytes)."""
_Wanted = list[tuple[int, View, NDArray[np.void]]]
"""Of one source: (number of the view, the view, its extents there)."""


def read_whole(views: Sequence[View]) -> Iterator[Part]:
    """Everything that may be other than zeroes on the views' disks, each byte once. Raises RepositoryError, CorruptionError."""
    tasks = chain(_base_tasks(views), _record_tasks(views))
    with ThreadPoolExecutor(_READERS, thread_name_prefix="view") as pool:
        ahead: deque[Future[list[Part]]] = deque()
        try:
            for task in tasks:
                ahead.append(pool.submit(task))
                if len(ahead) > _READ_AHEAD:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _base_tasks(views: Sequence[View]) -> Iterator[Callable[[], list[Part]]]:
    places: dict[str, list[tuple[int, int, list[tuple[int, int]]]]] = {}
    for number, view in enumerate(views):
        for chunk_id, offset, parts in view.base_pieces():
            places.setdefault(chunk_id, []).append((number, offset, parts))
    for chunk_id, where in places.items():
        yield partial(_base_parts, views[where[0][0]], chunk_id, where)


def _base_parts(view: View, chunk_id: str, where: list[tuple[int, int, list[tuple[int, int]]]]) -> list[Part]:
    chunk = memoryview(view.read_chunk(chunk_id))
    return [(number, low, chunk[low - at : high - at]) for number, at, parts in where for low, high in parts]


def _record_tasks(views: Sequence[View]) -> Iterator[Callable[[], list[Part]]]:
    wanted: dict[int, tuple[Source, _Wanted]] = {}
    for number, view in enumerate(views):
        for source, extents in view.written_extents():
            wanted.setdefault(id(source), (source, []))[1].append((number, view, extents))
    for source, places in wanted.values():
        if isinstance(source, ShippedSource):
            yield from (partial(_span_parts, source, *span) for span in _spans(places))
        else:
            for number, view, extents in places:
                sizes = np.cumsum(extents["length"], dtype=np.int64)
                borders = np.flatnonzero(np.diff(sizes // _TASK_BYTES, append=-1)) + 1
                for first, last in pairwise([0, *borders.tolist()]):
                    yield partial(_parts, number, view, extents[first:last])


def _parts(number: int, view: View, extents: NDArray[np.void]) -> list[Part]:
    return [(number, offset, data) for offset, data in view.parts(extents)]


def _spans(places: _Wanted) -> Iterator[tuple[int, int, _Wanted]]:
    """(position, end, what lies there) for the stretches of a segment's payload stream that are fetched by one request each."""
    payloads = [view.places(extents) for _, view, extents in places]
    starts = np.concatenate([begins for begins, _ in payloads])
    ends = np.concatenate([ends for _, ends in payloads])
    order = np.argsort(starts, kind="stable")
    reached = np.maximum.accumulate(ends[order])
    apart = starts[order][1:] // FRAME_SIZE - (reached[:-1] - 1) // FRAME_SIZE > _FRAMES_APART
    borders = [0, *(np.flatnonzero(apart) + 1).tolist(), len(order)]
    for first, last in pairwise(borders):
        low, high = int(starts[order[first]]), int(reached[last - 1])
        inside = [
            (number, view, extents[(begins >= low) & (begins < high)])
            for (number, view, extents), (begins, _) in zip(places, payloads, strict=True)
        ]
        yield low, high, inside


def _span_parts(source: ShippedSource, low: int, high: int, places: _Wanted) -> list[Part]:
    try:
        span = memoryview(source.span(low, high - low))
    except CorruptionError:
        # Record by record: what is sound here is used, the rest had from wherever else it is, or named.
        return [part for number, view, extents in places for part in _parts(number, view, extents)]

    def fetched(position: int, length: int) -> memoryview:
        return span[position - low : position - low + length]

    return [(number, offset, data) for number, view, extents in places for offset, data in view.parts(extents, fetched)]
